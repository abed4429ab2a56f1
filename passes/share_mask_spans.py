"""Scans a boolean mask once for all the attentions that read it.

Why: attention begins with a scan of its mask, which says which keys all queries of a tile see and
which none does (`mask_spans`). Every layer of a model reads the same mask: in a prefill of
Llama-3-8B on an H200, 32 scans of 5.7 µs each.

Before:
    out = triton_only.attention.default(q, k, v, mask, enable_gqa=True)
    out_1 = triton_only.attention.default(q_1, k_1, v_1, mask, enable_gqa=True)
After:
    spans: "i32[1, 1, 32, 6, 2]" = triton_only.mask_spans.default(mask)
    out = triton_only.attention.default(q, k, v, mask, enable_gqa=True, spans=spans)
    out_1 = triton_only.attention.default(q_1, k_1, v_1, mask, enable_gqa=True, spans=spans)

Masks are the same that are the same views of one tensor; what is expanded over batches, heads or
queries is scanned before it is. The spans do not depend on the tiles that attention is launched
with. Left alone: a mask that one attention reads, attention that scans none (by the decoding
kernel, with a window; of symbolic sizes, where that is not known, the mask is scanned), masks that
attention broadcasts over the keys, and attention with a backward.
"""

from __future__ import annotations

from typing import Any

import torch

from triton_only_backend.kernels.loading import load
from triton_only_backend.passes.graph_edit import (
    VIEWS,
    arguments,
    describe,
    insert,
    same_sizes,
    value,
)
from triton_only_backend.passes.refusal import decline

aten = torch.ops.aten
ATTENTION = torch.ops.triton_only.attention.default
MASK_SPANS = torch.ops.triton_only.mask_spans.default
# Two of them with the same arguments are the same tensor.
SAME = (
    *VIEWS,
    aten.alias.default,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.unsqueeze.default,
)


def share_mask_spans(graph: torch.fx.Graph) -> int:
    """Scans each mask of several attentions once; returns how many masks."""
    readers: dict[str, list[torch.fx.Node]] = {}
    masks: dict[str, torch.fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        given = arguments(node)
        if given["spans"] is not None or not _scans_mask(given):
            continue
        mask = _before_expand(given["attn_mask"])
        if not same_sizes(value(mask).shape[-1:], value(given["key"]).shape[-2:-1]):
            facts = describe(mask, given["key"])
            decline(node, f"one scan of the mask for all: it has not the keys' length ({facts})")
            continue
        written = _written(mask)
        masks.setdefault(written, mask)
        readers.setdefault(written, []).append(node)
    shared = {written: nodes for written, nodes in readers.items() if len(nodes) > 1}
    for written, nodes in shared.items():
        spans = insert(nodes[0], MASK_SPANS, (masks[written],))
        for node in nodes:
            node.kwargs = {**node.kwargs, "spans": spans}
    return len(shared)


def _scans_mask(given: dict[str, Any]) -> bool:
    """Whether attention with these arguments begins with a scan, as far as its sizes tell."""
    mask = value(given["attn_mask"])
    if mask is None or mask.dtype != torch.bool or mask.dim() < 2:
        return False
    if max(given["window_left"], given["window_right"]) >= 0:
        return False
    tensors = [value(given[name]) for name in ("query", "key", "value")]
    if not all(isinstance(size, int) for tensor in tensors for size in tensor.shape):
        return True
    sdpa = load("sdpa")
    options = sdpa.Options(**{name: given[name] for name in sdpa.Options._fields})
    return not sdpa.decodes(*tensors, options)


def _before_expand(mask: torch.fx.Node) -> torch.fx.Node:
    """The tensor that a mask is expanded from over batches, heads or queries."""
    while mask.target is aten.expand.default:
        base: Any = mask.args[0]
        rows, keys = value(base).shape[-2:-1], value(base).shape[-1:]
        wide = value(mask).shape
        one_row = same_sizes(rows, [1])
        if not rows or not same_sizes(keys, wide[-1:]):
            break
        if not one_row and not same_sizes(rows, wide[-2:-1]):
            break
        mask = base
    return mask


def _written(node: torch.fx.Node) -> str:
    """What a view is made of: the same for the same views of one tensor."""
    if node.target not in SAME:
        return node.name
    args = [_written(a) if isinstance(a, torch.fx.Node) else str(a) for a in node.args]
    return f"{node.target}({', '.join(args)}, {node.kwargs})"
