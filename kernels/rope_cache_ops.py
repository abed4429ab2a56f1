"""Schemas, fake kernels and implementations of rotary embedding with the write of the KV cache.

`attention_rope_cache` is a decoding step's attention with both, `rope_cache` these two for several
positions: the rotated query is what it returns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from triton_only_backend.errors import UnsupportedProblemError
from triton_only_backend.kernels.limits import DTYPES, MAX_HEAD_DIM
from triton_only_backend.kernels.loading import load

Tensor = torch.Tensor

KINDS = ("half", "interleaved", "none")
SCHEMAS = (
    "attention_rope_cache(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, "
    "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor positions, Tensor? attn_mask=None, *, "
    'str rope="half", bool is_causal=False, float? scale=None, bool caches_ready=False) -> Tensor',
    "rope_cache(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, "
    'Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor positions, *, str rope="half") -> Tensor',
)


class Inputs(NamedTuple):
    """The tensors of both ops, of which only one takes a mask; shapes as `_checked` says."""

    query: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor | None
    sin: Tensor | None
    key_cache: Tensor
    value_cache: Tensor
    positions: Tensor
    attn_mask: Tensor | None = None


def _checked(op: str, tensors: tuple[Any, ...], rope: str) -> Inputs:
    """The arguments of the op named `op`.

    Raises:
        UnsupportedProblemError: what the kernels do not cover, naming the arguments, their dtypes
            and shapes, and a remedy.
    """
    x = Inputs(*tensors)
    query, key, value, cos, sin, key_cache, value_cache, positions, attn_mask = x

    def require(condition: bool, what: str, remedy: str) -> None:
        if not condition:
            shapes = ", ".join(
                f"{name} {t.dtype}{list(t.shape)}"
                for name, t in x._asdict().items()
                if t is not None
            )
            raise UnsupportedProblemError(
                f"triton_only.{op}({shapes}, rope={rope!r}): {what}; {remedy}"
            )

    states = (query, key, value, key_cache, value_cache)
    require(all(t.dim() == 4 for t in states), "four dimensions are needed", "reshape them")
    batch, heads, len_q, dim = query.shape
    kv_heads, dim_v = key.shape[1], value.shape[3]
    require(
        query.dtype in DTYPES and all(t.dtype == query.dtype for t in states),
        "query, key, value and caches must share one dtype of float16, bfloat16, float32",
        "cast them",
    )
    require(
        dim <= MAX_HEAD_DIM and dim_v <= MAX_HEAD_DIM,
        f"head dimensions over {MAX_HEAD_DIM}",
        "write rotation, cache update and attention apart",
    )
    require(
        op == "rope_cache" or (len_q == 1 and key.shape[2] == 1 and value.shape[2] == 1),
        "query, key and value must hold one position each",
        "for more, call triton_only.rope_cache and attention",
    )
    require(
        key.shape == (batch, kv_heads, len_q, dim) and value.shape == (*key.shape[:3], dim_v),
        "key must be (B, H_kv, L, D) and value (B, H_kv, L, D_v), with the query's L",
        "expand or reshape them",
    )
    require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"{heads} query heads cannot share {kv_heads} key heads evenly",
        "repeat the key and value heads",
    )
    length = key_cache.shape[2]
    require(
        key_cache.shape == (batch, kv_heads, length, dim)
        and value_cache.shape == (batch, kv_heads, length, dim_v),
        "the caches must be (B, H_kv, S, D) and (B, H_kv, S, D_v)",
        "slice them to the batch",
    )
    require(
        positions.dtype in (torch.int64, torch.int32)
        and positions.dim() in (1, 2)
        and (
            # Not tuples of unlike lengths: Python compares their first sizes, which adds a guard.
            (positions.shape[-1] == len_q and all(n in (1, batch) for n in positions.shape[:-1]))
            or (len_q == 1 and positions.shape == (batch,))
        ),
        "positions must be integers of shape (L,), (1, L) or (B, L), or of one position (B,)",
        "reshape or cast them",
    )
    require(rope in KINDS, f"unknown rope, must be one of {KINDS}", "choose one of them")
    require(
        (cos is None and sin is None) if rope == "none" else cos is not None and sin is not None,
        'cos and sin must both be given, or neither for rope="none"',
        "pass both or rope='none'",
    )
    if cos is not None and sin is not None:
        width = cos.shape[-1] if cos.dim() else 0
        rotary = width if rope == "half" else 2 * width
        require(
            all(
                t.is_floating_point()
                and t.dtype != torch.float64
                and 1 <= t.dim() <= 4
                and t.shape[-1] == width
                and all(size == 1 for size in t.shape[1:-2])
                and (t.shape[-2] if t.dim() > 1 else 1) == len_q
                and (t.dim() <= 2 or t.shape[0] in (1, batch))
                for t in (cos, sin)
            ),
            "cos and sin must be fp32, fp16 or bf16 of one width, (L, R) or (B or 1, L, R)",
            "reshape or cast them",
        )
        require(
            0 < rotary <= dim and rotary % 2 == 0,
            f"a rotary width of {rotary} does not suit head dimension {dim}",
            "an even width of at most the head dimension is needed",
        )
    if attn_mask is not None:
        require(
            attn_mask.dtype == torch.bool or attn_mask.is_floating_point(),
            f"a {attn_mask.dtype} mask",
            "pass a boolean or float mask",
        )
        full = (batch, heads, 1, length)
        require(
            attn_mask.dim() <= 4
            and all(
                size in (1, wanted)
                for size, wanted in zip(reversed(attn_mask.shape), reversed(full), strict=False)
            ),
            f"the mask does not broadcast to {list(full)}",
            "reshape it",
        )
    return x


def _empty_output(query: Tensor, like: Tensor) -> Tensor:
    """(B, H, L, width of `like`), laid out (B, L, H, width): merging the heads next is a view."""
    batch, heads, len_q, _ = query.shape
    return query.new_empty((batch, len_q, heads, like.shape[3])).transpose(1, 2)


def _attention_rope_cache(
    *tensors: Any,
    rope: str = "half",
    is_causal: bool = False,
    scale: float | None = None,
    caches_ready: bool = False,
) -> Tensor:
    # caches_ready: they may be read while the kernel launched last still runs, which only a caller
    # can say that knows the order of kernels (see the pass `mark_ready_inputs`).
    x = _checked("attention_rope_cache", tensors, rope)
    out = _empty_output(x.query, x.value)
    load("rope_cache_attention").attention_rope_cache(
        x, out, rope=rope, is_causal=is_causal, scale=scale, caches_ready=caches_ready
    )
    return out


def _fake_attention_rope_cache(*tensors: Any, rope: str = "half", **_: Any) -> Tensor:
    x = _checked("attention_rope_cache", tensors, rope)
    return _empty_output(x.query, x.value)


def _rope_cache(*tensors: Any, rope: str = "half") -> Tensor:
    x = _checked("rope_cache", tensors, rope)
    out = _empty_output(x.query, x.query)
    batch, _, len_q, _ = x.query.shape
    one_each = len_q == 1 and x.positions.dim() == 1
    slots = (x.positions[:, None] if one_each else x.positions).expand(batch, len_q)
    rotation = load("rope_cache").rotation_of(rope, x.cos, x.sin, x.query)
    with load("hardware").guard(x.query):
        load("rope_cache").rope_cache(
            x.query, x.key, x.value, rotation, x.key_cache, x.value_cache, slots, out
        )
    return out


def _fake_rope_cache(*tensors: Any, rope: str = "half") -> Tensor:
    x = _checked("rope_cache", tensors, rope)
    return _empty_output(x.query, x.query)


IMPLEMENTATIONS = {
    "rope_cache": (_rope_cache, _fake_rope_cache),
    "attention_rope_cache": (_attention_rope_cache, _fake_attention_rope_cache),
}
