"""Eager PyTorch with our kernels: `with triton_only_backend.eager(): model(x)`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nested._internal.nested_tensor import NestedTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from triton_only_backend import inductor
from triton_only_backend.kernels.limits import MAX_HEAD_DIM
from triton_only_backend.kernels.nested_attention import nested_attention
from triton_only_backend.passes.rewrite_matmul import PRODUCTS

if TYPE_CHECKING:
    from collections.abc import Iterator

ours = torch.ops.triton_only
SDPA = F.scaled_dot_product_attention


class _Attention(TorchFunctionMode):
    """scaled_dot_product_attention, above autograd: our op brings its own gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SDPA:
            return _attention(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:  # the mode does not see what it calls
            with mock.patch.object(F, "scaled_dot_product_attention", _attention):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Products(TorchDispatchMode):
    """mm, addmm, bmm and baddbmm, below autograd: also those of a backward run inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(issubclass(kind, NestedTensor) for kind in types):
            with self:  # what it does to the tensor that it holds comes here
                return NestedTensor.__torch_dispatch__(func, types, args, kwargs)
        if func not in PRODUCTS:
            with self:  # in inference mode linear, matmul and einsum arrive whole
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        if func._overloadname == "dtype":
            position = [a.name for a in func._schema.arguments].index("out_dtype")
            if len(args) > position:
                kwargs["out_dtype"] = args[position]
                args = args[:position]
        target, _ = PRODUCTS[func]
        return target(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if query.is_nested:
        nested: torch.Tensor = nested_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
        return nested
    masked = attn_mask is not None and (is_causal or attn_mask.requires_grad)
    transformed = any(map(inductor.is_transformed, (query, key, value, attn_mask)))
    if masked or transformed or max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return SDPA(
                query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
    seed = ours.random_seeds(1, device=query.device) if dropout_p > 0 else None
    output: torch.Tensor = ours.attention(
        query, key, value, attn_mask, seed,
        is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, dropout_p=dropout_p,
    )  # fmt: skip
    return output


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Sends mm, addmm, bmm, baddbmm and scaled_dot_product_attention to our ops, uncompiled.

    Attention with a head dimension over 256, with a mask that needs a gradient or within a
    transform of torch.func runs as bmm, softmax, bmm, of which the products are ours; that of
    nested tensors of the jagged layout as packed sequences. Everything else runs as PyTorch runs
    it; nothing is audited.

    Raises, at the call:
        UnsupportedProblemError: an operand that the kernels do not take (a dtype, say).
        DeviceError: tensors on a device that Triton cannot drive.
    """
    with _Attention(), _Products():
        yield
