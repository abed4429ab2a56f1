"""Attention's arguments: what they are, what the kernels refuse, and the 4-D views that they take.

Semantics are those of `torch.nn.functional.scaled_dot_product_attention`; `sdpa` launches.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from triton_only_backend.errors import UnsupportedProblemError
from triton_only_backend.kernels.attention_modifiers import Modifiers
from triton_only_backend.kernels.limits import DTYPES, MAX_HEAD_DIM
from triton_only_backend.kernels.mask_spans import spans_shape

Tensor = torch.Tensor


class Inputs(NamedTuple):
    """The tensors of attention; see `docs/attention.md`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    seed: Tensor | None = None


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

    def scale_of(self, query: Tensor) -> float:
        """The scale of the scores: 1 / sqrt(head_dim) unless one is given."""
        return 1.0 / math.sqrt(query.shape[-1]) if self.scale is None else float(self.scale)


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


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuses dtypes and shapes that the kernels do not cover.

    Raises:
        UnsupportedProblemError: naming the dtypes and shapes, and a remedy.
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


def check(x: Inputs, options: Options) -> None:
    """Refuses what the kernels do not cover.

    Raises:
        UnsupportedProblemError: naming the argument, the dtypes and shapes, and a remedy.
    """
    tensors = x.query, x.key, x.value
    check_tensors(*tensors)
    mask = x.attn_mask
    if mask is not None and not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise refuse(f"a {mask.dtype} mask", "pass a boolean or float mask", *tensors)
    check_options(x.seed, options, *tensors)


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


def share_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with as many heads as each other, which is what the kernels take.

    Of unlike numbers, which both divide the query's, each is repeated to their least common
    multiple: one head by a view, several by a copy.
    """
    heads, key_heads, value_heads = (t.shape[-3] for t in (query, key, value))
    if heads == key_heads == value_heads:
        return key, value
    torch._check(
        min(key_heads, value_heads) > 0 and heads % key_heads == heads % value_heads == 0,
        lambda: (
            f"triton_only.attention: {heads} query heads cannot share "
            f"{key_heads} key and {value_heads} value heads evenly"
        ),
    )
    if key_heads == value_heads:
        return key, value
    common = math.lcm(key_heads, value_heads)
    return _repeat_heads(key, common // key_heads), _repeat_heads(value, common // value_heads)


def _repeat_heads(tensor: Tensor, count: int) -> Tensor:
    """Each head (dimension -3) `count` times in a row."""
    if count == 1:
        return tensor
    *lead, heads, length, width = tensor.shape
    repeated = tensor.unsqueeze(-3).expand(*lead, heads, count, length, width)
    return repeated.flatten(-4, -3)


def expand_operands(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operands with their leading dimensions broadcast, so that gradients need no summing."""
    lead = lead_shape(query, key, value, enable_gqa)
    kv_lead = lead
    if enable_gqa:
        key, value = share_heads(query, key, value)
        kv_lead = (*lead[:-1], key.shape[-3])

    def expand(tensor: Tensor, to: tuple[int, ...]) -> Tensor:
        return tensor if tensor.shape[:-2] == to else tensor.expand(*to, *tensor.shape[-2:])

    return expand(query, lead), expand(key, kv_lead), expand(value, kv_lead)


def to_4d(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    """A view with two leading dimensions; more are flattened (a copy if the strides forbid)."""
    tensor = tensor.expand(*lead, *tensor.shape[-2:])
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() < 4:
        return tensor[(None,) * (4 - tensor.dim())]
    return tensor.flatten(0, -4)


def operands(x: Inputs, enable_gqa: bool) -> Operands:
    """Views the arguments as the kernels take them."""
    query, key, value = expand_operands(x.query, x.key, x.value, enable_gqa)
    lead, kv_lead = tuple(query.shape[:-2]), tuple(key.shape[:-2])
    mask = None
    if x.attn_mask is not None:
        mask = to_4d(x.attn_mask.expand(*lead, query.shape[-2], key.shape[-2]), lead)
    return Operands(to_4d(query, lead), to_4d(key, kv_lead), to_4d(value, kv_lead), mask, lead)


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
    flat = to_4d(spans.expand(*x.lead, tiles, *tail).flatten(-2), x.lead)
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
