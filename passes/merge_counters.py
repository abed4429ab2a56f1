"""Advances all counters of a model in one kernel.

Why: transformers' StaticCache counts its tokens once a layer, in a tensor of one element each; the
counters are inputs of the graph that it increments, and Inductor makes a kernel of each: 32
launches a step of Llama-3-8B, about 1.3 µs each.

Before:
    add: "i64[]" = aten.add.Tensor(counter, 1);  add_1: "i64[]" = aten.add.Tensor(counter_1, 1)
    aten.copy_.default(counter, add);  aten.copy_.default(counter_1, add_1)
After:
    many = aten._foreach_add.Scalar([counter, counter_1], 1)
    aten.copy_.default(counter, many[0]);  aten.copy_.default(counter_1, many[1])

Inductor lowers a `_foreach` operation to one kernel. Left alone: results that anything but the
copy reads, different increments (a group each), tensors of more than one element.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from triton_only_backend.passes.graph_edit import insert, same_sizes, value

aten = torch.ops.aten


def merge_counters(graph: torch.fx.Graph) -> int:
    """Merges the increments of counters; returns how many groups."""
    groups: dict[Any, list[torch.fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        key = _increment(node)
        if key is not None:
            groups.setdefault(key, []).append(node)
    merged = [group for group in groups.values() if len(group) > 1]
    for group in merged:
        # After the last of them all their inputs are there, and their copies come at the end.
        last = group[-1]
        counters = [node.args[0] for node in group]
        many = insert(last, aten._foreach_add.Scalar, (counters, last.args[1]))
        for index, node in enumerate(group):
            new = insert(last, operator.getitem, (many, index))
            node.replace_all_uses_with(new)
        for node in group:
            graph.erase_node(node)
    return len(merged)


def _increment(node: torch.fx.Node) -> tuple[Any, ...] | None:
    """What counters must share to be merged; None where a node is no counter's increment."""
    counter, step = node.args[:2]
    if node.kwargs or not isinstance(counter, torch.fx.Node) or counter.op != "placeholder":
        return None
    shape = value(counter).shape
    if not isinstance(step, int | float) or not same_sizes(shape, [1] * len(shape)):
        return None
    users = list(node.users)
    if (
        len(users) != 1
        or users[0].target is not aten.copy_.default
        or users[0].args[0] is not counter
    ):
        return None
    return (type(step), step, value(counter).dtype, value(counter).device, tuple(shape))
