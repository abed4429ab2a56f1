"""The one way from attention's tensors to a kernel: check, view as 4-D, choose, launch.

Semantics are those of `torch.nn.functional.scaled_dot_product_attention` (its mathematical
reference): `is_causal` is aligned to the top left also where L_q ≠ L_kv, and a row that sees no key
gives zeros.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from triton_only_backend.errors import UnsupportedProblemError
from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.attention_configs import (
    AttentionProblem,
    select_backward_config,
    select_decode_config,
    select_flash_config,
    uses_decode_kernel,
)
from triton_only_backend.kernels.attention_modifiers import Modifiers
from triton_only_backend.kernels.decode_attention import decode_attention
from triton_only_backend.kernels.flash_attention import flash_attention
from triton_only_backend.kernels.flash_attention_backward import flash_attention_backward
from triton_only_backend.kernels.limits import DTYPES, MAX_HEAD_DIM
from triton_only_backend.kernels.mask_spans import spans_shape
from triton_only_backend.kernels.matmul import float32_precision

Tensor = torch.Tensor


class Options(NamedTuple):
    """The arguments of attention that are no tensors; see `docs/attention.md`."""

    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    softcap: float = 0.0
    window_left: int = -1
    window_right: int = -1
    dropout_p: float = 0.0
    contiguous: bool = False

    def modifiers(self, seed: Tensor | None, **packed: Any) -> Modifiers:
        """What of them the kernels take beside the mask; `packed` describes the sequences."""
        window = (self.window_left, self.window_right)
        return Modifiers(self.softcap, window, self.dropout_p, seed, **packed)


class Operands(NamedTuple):
    """4-D views: query (B, H, L_q, D), key (B, H_kv, L_kv, D), value (B, H_kv, L_kv, D_v).

    `mask` is None or (B, H, L_q, L_kv) with stride 0 where it broadcasts; `lead` is the shape of
    the output before its last two dimensions.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    lead: tuple[int, ...]


def refuse(
    what: str, remedy: str, *tensors: Tensor, op: str = "attention"
) -> UnsupportedProblemError:
    """The error for what the kernels do not cover."""
    shapes = ", ".join(f"{t.dtype}{list(t.shape)}" for t in tensors)
    return UnsupportedProblemError(f"triton_only.{op}({shapes}): {what}; {remedy}")


def check_options(
    seed: Tensor | None, options: Options, *tensors: Tensor, op: str = "attention"
) -> None:
    """Refuses a soft-cap, a window or a dropout that means nothing.

    Raises:
        UnsupportedProblemError: naming the value and a remedy.
    """
    if not 0.0 <= options.dropout_p <= 1.0:
        raise refuse(
            f"dropout_p={options.dropout_p}", "a probability is from 0 to 1", *tensors, op=op
        )
    if options.dropout_p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        remedy = "pass one int64, as torch.ops.triton_only.random_seeds(1, device=…) draws it"
        raise refuse("dropout without a seed", remedy, *tensors, op=op)
    if not (0.0 <= options.softcap < math.inf):
        remedy = "pass a positive number, or 0 for none"
        raise refuse(f"softcap={options.softcap}", remedy, *tensors, op=op)
    if min(options.window_left, options.window_right) < -1:
        window = (options.window_left, options.window_right)
        remedy = "pass how many keys are seen on that side, or -1 for all"
        raise refuse(f"a window of {window}", remedy, *tensors, op=op)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    seed: Tensor | None = None,
    options: Options = Options(),  # noqa: B008  a tuple
) -> None:
    """Refuses what the kernels do not cover.

    Raises:
        UnsupportedProblemError: naming the argument, the dtypes and shapes, and a remedy.
    """

    if query.dim() < 2 or not query.dim() == key.dim() == value.dim():
        what = "query, key and value must have the same number (≥ 2) of dimensions"
        raise refuse(what, "reshape them", query, key, value)
    if {query.dtype, key.dtype, value.dtype} - set(DTYPES) or not (
        query.dtype == key.dtype == value.dtype
    ):
        what = "one dtype of float16, bfloat16, float32 is needed"
        raise refuse(what, "cast query, key and value", query, key, value)
    if query.shape[-1] > MAX_HEAD_DIM or value.shape[-1] > MAX_HEAD_DIM:
        what = f"head dimensions over {MAX_HEAD_DIM}"
        raise refuse(what, "split the heads or use bmm and softmax", query, key, value)
    torch._check(
        query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2],
        lambda: (
            "triton_only.attention: query and key must share their last dimension, key and "
            f"value their length; got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        ),
    )
    if attn_mask is not None and not (
        attn_mask.dtype == torch.bool or attn_mask.is_floating_point()
    ):
        what = f"a {attn_mask.dtype} mask"
        raise refuse(what, "pass a boolean or float mask", query, key, value)
    check_options(seed, options, query, key, value)


def lead_shape(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The output's shape before its last two dimensions."""
    skip = 3 if enable_gqa else 2
    torch._check(
        query.dim() >= skip,
        lambda: (
            "triton_only.attention: enable_gqa needs (…, heads, length, head_dim), "
            f"got {list(query.shape)}"
        ),
    )
    if query.shape[:-skip] == key.shape[:-skip] == value.shape[:-skip]:
        return tuple(query.shape[:-2])
    shapes = (query.shape[:-skip], key.shape[:-skip], value.shape[:-skip])
    lead = tuple(torch.broadcast_shapes(*shapes))
    return (*lead, query.shape[-3]) if enable_gqa else lead


def _to_4d(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    """A view with two leading dimensions; more are flattened (a copy if the strides forbid)."""
    tensor = tensor.expand(*lead, *tensor.shape[-2:])
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() < 4:
        return tensor[(None,) * (4 - tensor.dim())]
    return tensor.flatten(0, -4)


def operands(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> Operands:
    """Views the arguments as the kernels take them."""
    lead = lead_shape(query, key, value, enable_gqa)
    kv_lead = (*lead[:-1], key.shape[-3]) if enable_gqa else lead
    torch._check(
        not enable_gqa
        or (query.shape[-3] % key.shape[-3] == 0 and key.shape[-3] == value.shape[-3]),
        lambda: (
            f"triton_only.attention: {query.shape[-3]} query heads cannot share "
            f"{key.shape[-3]} key and {value.shape[-3]} value heads evenly"
        ),
    )
    mask = None
    if attn_mask is not None:
        mask = attn_mask.expand(*lead, query.shape[-2], key.shape[-2])
        mask = _to_4d(mask, lead)
    return Operands(_to_4d(query, lead), _to_4d(key, kv_lead), _to_4d(value, kv_lead), mask, lead)


def view_spans(spans: Tensor, attn_mask: Tensor | None, x: Operands) -> Tensor:
    """A mask's spans as (B, H, tiles, chunks, 2), broadcast as the mask is.

    Raises:
        UnsupportedProblemError: spans that are of no boolean mask, or no spans at all.
    """
    if attn_mask is None or attn_mask.dtype != torch.bool or spans.dtype != torch.int32:
        what = f"{spans.dtype} spans beside {'no' if attn_mask is None else attn_mask.dtype} mask"
        remedy = "pass triton_only.mask_spans(attn_mask) of a boolean mask, or none"
        raise refuse(what, remedy, x.query, x.key, x.value)
    tiles, *tail = spans_shape(x.query.shape[-2], x.key.shape[-2])
    torch._check(
        spans.dim() >= 3 and spans.shape[-2] == tail[0] and spans.shape[-1] == tail[1],
        lambda: (
            f"triton_only.attention: spans (…, {tiles} or 1, {tail[0]}, {tail[1]}) are needed, got "
            f"{list(spans.shape)}; they are triton_only.mask_spans(attn_mask) of a mask that has "
            "all keys"
        ),
    )
    flat = _to_4d(spans.expand(*x.lead, tiles, *tail).flatten(-2), x.lead)
    return flat.view(*flat.shape[:3], *tail)


def empty_output(
    query: Tensor, lead: tuple[int, ...], head_dim_v: int, contiguous: bool = False
) -> Tensor:
    """(*lead, L_q, D_v), laid out (…, L_q, heads, D_v): merging the heads next is a view.

    `contiguous` asks for (…, heads, L_q, D_v), which is what PyTorch's mathematical form gives.
    """
    length = query.shape[-2]
    if len(lead) == 0 or contiguous:
        return query.new_empty((*lead, length, head_dim_v))
    return query.new_empty((*lead[:-1], length, lead[-1], head_dim_v)).transpose(-3, -2)


def empty_logsumexp(query: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(*lead, L_q), fp32."""
    return query.new_empty((*lead, query.shape[-2]), dtype=torch.float32)


def _problem(x: Operands, options: Options) -> AttentionProblem:
    batch, num_heads, len_q, head_dim = x.query.shape
    return AttentionProblem(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=x.key.shape[1],
        len_q=len_q,
        len_kv=x.key.shape[2],
        head_dim=head_dim,
        head_dim_v=x.value.shape[3],
        element_size=x.query.element_size(),
        is_causal=options.is_causal,
        has_mask=x.mask is not None,
        has_dropout=options.dropout_p > 0,
        has_softcap=options.softcap > 0,
        has_window=max(options.window_left, options.window_right) >= 0,
    )


def decodes(query: Tensor, key: Tensor, value: Tensor, options: Options) -> bool:
    """Whether the decoding kernel runs this attention, which scans a mask by itself."""
    x = operands(query, key, value, None, options.enable_gqa)
    return uses_decode_kernel(_problem(x, options))


def scale_of(query: Tensor, scale: float | None) -> float:
    """The scale of the scores: 1 / sqrt(head_dim) unless one is given."""
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)


def precision_of(query: Tensor) -> str:
    """How products are computed; a choice there is in fp32 only."""
    return float32_precision(query.device) if query.dtype == torch.float32 else "ieee"


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
    *,
    with_logsumexp: bool,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention's output (*lead, L_q, D_v) and, on request, its log-sum-exp (*lead, L_q) in fp32.

    `spans` are those of the mask (see `view_spans`), where something has scanned it already.

    Raises:
        UnsupportedProblemError: see `check`.
        DeviceError: tensors on a device that Triton cannot drive.
    """
    check(query, key, value, attn_mask, seed, options)
    device = hardware.of(query.device)
    x = operands(query, key, value, attn_mask, options.enable_gqa)
    if spans is not None:
        spans = view_spans(spans, attn_mask, x)
    output = empty_output(query, x.lead, value.shape[-1], options.contiguous)
    logsumexp = empty_logsumexp(query, x.lead) if with_logsumexp else None
    if output.numel() == 0 and (logsumexp is None or logsumexp.numel() == 0):
        return output, logsumexp
    out = _view_output(output, x)
    lse = None if logsumexp is None else logsumexp.view(x.query.shape[:3])
    problem = _problem(x, options)
    tensors = (x.query, x.key, x.value, x.mask, out, lse)
    arguments: dict[str, Any] = {
        "is_causal": options.is_causal,
        "scale": scale_of(query, options.scale),
        "precision": precision_of(query),
        "modifiers": options.modifiers(seed),
    }
    with hardware.guard(query):
        if uses_decode_kernel(problem):
            decode_attention(*tensors, config=select_decode_config(problem, device), **arguments)
        else:
            config = select_flash_config(problem, device)
            flash_attention(*tensors, config=config, **arguments, spans=spans)
    return output, logsumexp


def _view_output(output: Tensor, x: Operands) -> Tensor:
    """The output as (B, H, L_q, D_v); its layout always allows the view."""
    if output.dim() <= 4:
        return output[(None,) * (4 - output.dim())]
    return output.transpose(-3, -2).flatten(0, -4).transpose(-3, -2)


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their shapes and dtypes.

    The operands' leading dimensions must be equal already: see `expand_operands`.
    """
    device = hardware.of(query.device)
    x = operands(query, key, value, attn_mask, options.enable_gqa)
    grads = tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x.query, x.key, x.value)
    )
    with hardware.guard(query):
        flash_attention_backward(
            _to_4d(grad_output, x.lead),
            x.query, x.key, x.value, x.mask,
            _to_4d(output, x.lead), logsumexp.reshape(x.query.shape[:3]),
            *grads,
            is_causal=options.is_causal, scale=scale_of(query, options.scale),
            config=select_backward_config(_problem(x, options), device),
            precision=precision_of(query), modifiers=options.modifiers(seed),
        )  # fmt: skip
    return grads[0].view(query.shape), grads[1].view(key.shape), grads[2].view(value.shape)


def expand_operands(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operands with their leading dimensions broadcast, so that gradients need no summing."""
    lead = lead_shape(query, key, value, enable_gqa)
    kv_lead = (*lead[:-1], key.shape[-3]) if enable_gqa else lead

    def expand(tensor: Tensor, to: tuple[int, ...]) -> Tensor:
        return tensor if tensor.shape[:-2] == to else tensor.expand(*to, *tensor.shape[-2:])

    return expand(query, lead), expand(key, kv_lead), expand(value, kv_lead)
