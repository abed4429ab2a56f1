"""Writes the rarer products in terms of mm and addmm, which `rewrite_matmul` takes next.

Why: addbmm sums a batch of products into one matrix and has no Triton lowering; it is one product
with the batch folded into K.

Before:
    addbmm: "f32[4, 4]" = aten.addbmm.default(bias, a, b)            # a f32[3, 4, 5], b f32[3, 5, 4]
After:
    permute: "f32[4, 3, 5]" = aten.permute.default(a, [1, 0, 2])
    view: "f32[4, 15]" = aten.reshape.default(permute, [4, 15])
    view_1: "f32[15, 4]" = aten.reshape.default(b, [15, 4])
    addmm: "f32[4, 4]" = aten.addmm.default(bias, view, view_1)
"""

from __future__ import annotations

import torch

from triton_only_backend.passes.graph_edit import arguments, insert, replace, value

aten = torch.ops.aten


def canonicalise_matmul(graph: torch.fx.Graph) -> int:
    """Rewrites every addbmm of the graph; returns how many."""
    nodes = graph.find_nodes(op="call_function", target=aten.addbmm.default)
    for node in nodes:
        given = arguments(node)
        batch, M, K = value(given["batch1"]).shape
        N = value(given["batch2"]).shape[2]
        if not all(isinstance(size, int) for size in (batch, M, K, N)):
            continue
        a = insert(node, aten.permute.default, (given["batch1"], [1, 0, 2]))
        a = insert(node, aten.reshape.default, (a, [M, batch * K]))
        b = insert(node, aten.reshape.default, (given["batch2"], [batch * K, N]))
        options = {k: given[k] for k in ("beta", "alpha") if given[k] != 1}
        replace(node, aten.addmm.default, (given["self"], a, b), options)
    return len(nodes)
