"""scaled_dot_product_attention of nested tensors, of the jagged layout, by packed sequences.

A jagged tensor (B, H, j, D), as SDPA takes it, is the transpose of one (B, j, H, D), which holds
its rows one sequence after the other: what `attention_varlen` takes, so that nothing is copied or
padded. The result is a nested tensor of the query's sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nested._internal.nested_tensor import nested_view_from_values_offsets

from triton_only_backend.errors import UnsupportedProblemError

Tensor = torch.Tensor


def why_not(query: Any, key: Any, value: Any, attn_mask: Any) -> str | None:
    """Why `nested_attention` does not take these arguments, or None."""
    tensors = (query, key, value)
    if not all(t.is_nested and t.layout == torch.jagged for t in tensors):
        return "nested tensors of the jagged layout, all three, are needed"
    if any(t.dim() != 4 or t._ragged_idx != 2 for t in tensors):
        return "(batch, heads, ragged length, head_dim) is needed, a transpose of (B, j, H, D)"
    if any(t.lengths() is not None for t in tensors):
        return "nested tensors with holes cannot be taken; make them contiguous"
    if attn_mask is not None:
        return "a mask beside nested tensors cannot be taken"
    return None


def nested_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention of jagged tensors (B, H, j, D), with the arguments of PyTorch's function.

    Raises:
        UnsupportedProblemError: see `why_not`; a dtype, a head dimension or numbers of heads that
            are not taken.
    """
    reason = why_not(query, key, value, attn_mask)
    if reason is not None:
        raise UnsupportedProblemError(f"triton_only.attention of nested tensors: {reason}")
    heads = tuple(t.shape[1] for t in (query, key, value))
    if not enable_gqa and len(set(heads)) > 1:
        raise UnsupportedProblemError(
            f"triton_only.attention of nested tensors: {heads[0]} query heads over {heads[1]} key "
            f"and {heads[2]} value heads; pass enable_gqa=True to share them"
        )
    packed = [t.transpose(1, 2) for t in (query, key, value)]
    q, k, v = (t.values() for t in packed)
    rows = packed[0]
    seed = None
    if dropout_p > 0:
        seed = torch.ops.triton_only.random_seeds(1, device=q.device)
    out = torch.ops.triton_only.attention_varlen(
        q, k, v, rows.offsets(), packed[1].offsets(),
        rows._get_max_seqlen(), packed[1]._get_max_seqlen(), seed,
        is_causal=is_causal, scale=scale, dropout_p=dropout_p,
    )  # fmt: skip
    # The public nested_tensor_from_jagged refuses to be traced (torch 2.13).
    nested = nested_view_from_values_offsets(
        out, rows.offsets(), min_seqlen=rows._get_min_seqlen(), max_seqlen=rows._get_max_seqlen()
    )
    return nested.transpose(1, 2)
