"""Runs the linear layers that share an input (q, k, v; gate, up) together.

Why: with few rows a product is a stream of its weight, and each launch has a start and a tail
during which the memory idles: k and v of Llama-3-8B read 8 MB each at 1.6 TB/s of 4.3, and q, k and
v of 32 rows take 26 µs apart and 15 together. With many rows two weights of one shape are one
product on Hopper, whose tiles fill the GPU better: k and v of 1024 rows take 31 µs and 25.

Before:
    mm: "bf16[2, 4096]" = triton_only.mm.default(x, q_weight.T)
    mm_1: "bf16[2, 1024]" = triton_only.mm.default(x, k_weight.T)
    mm_2: "bf16[2, 1024]" = triton_only.mm.default(x, v_weight.T)
After:
    many = triton_only.linear_many.default(x, [q_weight, k_weight, v_weight], [])
    mm: "bf16[2, 4096]" = many[0];  mm_1: "bf16[2, 1024]" = many[1];  mm_2 = many[2]

The weights stay where they are. Left alone: more than 64 rows where no two weights are alike, more
than two of weights that are stored (K, N), for which no kernel takes several, symbolic numbers of
rows, weights that are not parameters of the graph, products of other dtypes than the input's, addmm
with alpha, beta or a bias of more than one dimension.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from triton_only_backend.passes.graph_edit import insert, value
from triton_only_backend.passes.linear_layer import Linear, Weight, as_linear, base_of, rows
from triton_only_backend.passes.refusal import decline

ours = torch.ops.triton_only
PRODUCTS = (ours.mm.default, ours.addmm.default)
MAX_ROWS = 64  # of a stream of weights
MAX_ROWS_TRANSPOSED = 2
MAX_WEIGHTS = 3


def merge_linears(graph: torch.fx.Graph) -> int:
    """Merges linear layers with a common input; returns the number of groups."""
    groups: dict[tuple[Any, ...], list[Linear]] = {}
    for node in graph.nodes:
        linear = as_linear(node) if node.target in PRODUCTS else None
        if linear is not None:
            (weight,) = linear.weights
            shape = str(list(value(linear.x).shape))
            key = (base_of(linear.x), shape, len(linear.biases), weight.transposed)
            groups.setdefault(key, []).append(linear)
    count = 0
    for group in groups.values():
        refusal = _refusal(group)
        if refusal is not None:
            if len(group) > 1:
                decline(group[0].node, f"{len(group)} layers that share an input have {refusal}")
            continue
        for start in range(0, len(group) - 1, MAX_WEIGHTS):
            members = group[start : start + MAX_WEIGHTS]
            if len(members) > 1:
                _merge(members)
                count += 1
    return count


def _refusal(group: list[Linear]) -> str | None:
    """Why layers that share an input stay apart, or None."""
    number = rows(group[0])
    if number is None:
        return "a symbolic number of rows"
    transposed = group[0].weights[0].transposed
    if 0 < number <= (MAX_ROWS_TRANSPOSED if transposed else MAX_ROWS):
        return None
    if transposed:
        return f"{number} rows: 1 to {MAX_ROWS_TRANSPOSED} are merged of weights stored (K, N)"
    shapes = [linear.weights[0].shape for linear in group]
    if number == 0 or len(set(shapes)) == len(shapes):
        return f"{number} rows: 1 to {MAX_ROWS} are merged, or more with two weights of one shape"
    return None


def _available(parameter: torch.fx.Node, at: torch.fx.Node) -> torch.fx.Node:
    """A parameter, or some of its rows, to be read at a node: cut anew where it is cut later."""
    if parameter < at:
        return parameter
    sources = {source: _available(source, at) for source in parameter.all_input_nodes}
    with at.graph.inserting_before(at):
        return at.graph.node_copy(parameter, sources.__getitem__)


def _merge(members: list[Linear]) -> None:
    first = members[0]
    weights = [
        Weight(_available(weight.node, first.node), weight.transposed).as_stored(
            first.node, transposed=False
        )
        for m in members
        for weight in m.weights
    ]
    biases = [_available(bias, first.node) for m in members for bias in m.biases]
    many = insert(first.node, ours.linear_many.default, (first.x, weights, biases))
    outputs = [insert(first.node, operator.getitem, (many, i)) for i in range(len(members))]
    for member, output in zip(members, outputs, strict=True):
        output.meta.update(
            {k: v for k, v in member.node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        )
        member.node.replace_all_uses_with(output)
        member.node.graph.erase_node(member.node)
