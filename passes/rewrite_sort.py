"""Sorts the places that a topk found by counting them, where Inductor would call a library.

Why: a mixture of experts sorts the expert of every token and choice, so that each expert's tokens
lie together; Inductor sorts up to 512 numbers itself and leaves more to CUB. But they
are places in a row of a few hundred: counted, each knows where it goes.

Before:
    experts: "i64[4096]" = aten.view(aten.topk(scores, 8)[1], [-1])      # scores (512, 128)
    sort = aten.sort.default(experts)
After:
    marks: "i32[4096, 128]" = aten.eq(aten.unsqueeze(experts, 1), aten.arange(128))
    upto = aten.cumsum(marks, 0);  start = aten.cumsum(upto[-1], 0) - upto[-1]
    place = aten.gather(start + upto - 1, 1, experts)
    order = aten.scatter(…, 0, place, aten.arange(4096)).long();  sorted = experts[order]

The order is scattered as int32: Inductor leaves a scatter of int64 on a GPU to ATen.

Equal numbers keep their order. Left alone: what Inductor sorts itself, numbers that are not a
topk's places in rows of at most MAX_NUMBERS, other than ascending order of one dimension.
"""

from __future__ import annotations

import operator
from functools import partial

import torch

from triton_only_backend.passes.graph_edit import VIEWS, arguments, inline, put, value
from triton_only_backend.passes.rewrite_topk import BLOCK

aten = torch.ops.aten
MAX_NUMBERS = 1024
SEEN_THROUGH = (*VIEWS, aten.clone.default, aten.slice.Tensor, aten.permute.default)


def rewrite_sort(graph: torch.fx.Graph) -> int:
    """Rewrites every sort of a topk's places in the graph; returns how many."""
    count = 0
    for target in (aten.sort.default, aten.sort.stable):
        for node in graph.find_nodes(op="call_function", target=target):
            given = arguments(node)
            numbers = _how_many_numbers(given["self"])
            if numbers is None or given["descending"] or not _is_long_row(value(given["self"])):
                continue
            results = inline(node, partial(by_counting, numbers=numbers), [given["self"]])
            for getitem in list(node.users):
                if getitem.target is operator.getitem:
                    put(getitem, results[getitem.args[1]])
                    graph.erase_node(getitem)
            graph.erase_node(node)
            count += 1
    return count


def _is_long_row(x: torch.Tensor) -> bool:
    size = x.shape[0] if x.dim() == 1 else 0
    return not isinstance(size, int) or size > BLOCK


def _how_many_numbers(node: torch.fx.Node) -> int | None:
    """The length of the rows in which a topk found the places that a node holds, or None."""
    while node.target in SEEN_THROUGH:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not operator.getitem or node.args[1] != 1:
        return None
    topk = node.args[0]
    if not isinstance(topk, torch.fx.Node) or topk.target is not aten.topk.default:
        return None
    given = arguments(topk)
    scores = value(given["self"])
    size = scores.shape[given["dim"]] if scores.dim() else 1
    return size if isinstance(size, int) and size <= MAX_NUMBERS else None


def by_counting(x: torch.Tensor, *, numbers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers (S,) from 0 to `numbers` in order, and where each was."""
    each = torch.arange(numbers, device=x.device)
    upto = (x[:, None] == each).cumsum(0, dtype=torch.int32)
    count = upto[-1]
    start = count.cumsum(0, dtype=torch.int32) - count
    place = (start + upto - 1).gather(1, x[:, None])[:, 0].long()
    rows = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    order = torch.zeros_like(rows).scatter(0, place, rows).long()
    return x[order], order
