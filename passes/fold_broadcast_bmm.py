"""Turns a batched product with one matrix for the whole batch into a single product.

Why: `linear` on a slice such as hidden[:, -1:] cannot be viewed as a matrix, so PyTorch expands the
weight over the batch and calls bmm, which then reads the weight once a batch entry: 0.9 ms instead
of 0.24 ms for Llama-3-8B's lm_head after a prefill of 2 sequences.

Before:
    expand: "bf16[2, 4096, 128256]" = aten.expand.default(weight, [2, 4096, 128256])    # stride 0
    bmm: "bf16[2, 1, 128256]" = aten.bmm.default(hidden, expand)
After:
    select: "bf16[4096, 128256]" = aten.select.int(expand, 0, 0)
    reshape: "bf16[2, 4096]" = aten.reshape.default(hidden, [2, 4096])
    mm: "bf16[2, 128256]" = aten.mm.default(reshape, select)
    bmm: "bf16[2, 1, 128256]" = aten.reshape.default(mm, [2, 1, 128256])

Left alone: batches of one, symbolic sizes, and operands with more rows than the matrix has columns,
where making the rows contiguous could cost more than reading the matrix again.
"""

from __future__ import annotations

import torch

from triton_only_backend.passes.graph_edit import arguments, insert, replace, value

aten = torch.ops.aten


def fold_broadcast_bmm(graph: torch.fx.Graph) -> int:
    """Folds every bmm whose second operand is one broadcast matrix; returns how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
        given = arguments(node)
        a, b = value(given["self"]), value(given["mat2"])
        sizes = (*a.shape, b.shape[2])
        if not all(isinstance(size, int) for size in sizes) or not isinstance(b.stride(0), int):
            continue
        batch, M, K, N = sizes
        if batch == 1 or b.stride(0) != 0 or M > N:
            continue
        matrix = insert(node, aten.select.int, (given["mat2"], 0, 0))
        rows = insert(node, aten.reshape.default, (given["self"], [batch * M, K]))
        product = insert(node, aten.mm.default, (rows, matrix))
        replace(node, aten.reshape.default, (product, [batch, M, N]))
        count += 1
    return count
