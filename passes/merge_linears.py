"""Runs the linear layers that share an input (q, k, v; gate, up) in one launch when decoding.

Why: with one or two rows a product is a stream of its weight, and each launch has a start and a
tail during which the memory idles: k and v of Llama-3-8B read 8 MB each at 1.6 TB/s of 4.3.

Before:
    mm: "bf16[2, 4096]" = triton_only.mm.default(x, q_weight.T)
    mm_1: "bf16[2, 1024]" = triton_only.mm.default(x, k_weight.T)
    mm_2: "bf16[2, 1024]" = triton_only.mm.default(x, v_weight.T)
After:
    many = triton_only.linear_many.default(x, [q_weight, k_weight, v_weight], [])
    mm: "bf16[2, 4096]" = many[0];  mm_1: "bf16[2, 1024]" = many[1];  mm_2 = many[2]

The weights stay where they are. Left alone: more rows than two (each product fills the GPU by
itself), symbolic numbers of rows, weights that are not parameters of the graph, products of other
dtypes than the input's, addmm with alpha, beta or a bias of more than one dimension.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch

from triton_only_backend.passes.graph_edit import insert, value

aten = torch.ops.aten
ours = torch.ops.triton_only
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
MAX_ROWS = 2
MAX_WEIGHTS = 3


class Linear(NamedTuple):
    """A product x @ weightᵀ (+ bias) found in the graph."""

    node: torch.fx.Node
    x: torch.fx.Node
    weight: torch.fx.Node
    bias: torch.fx.Node | None


def _is_parameter(node: Any) -> bool:
    return isinstance(node, torch.fx.Node) and node.op in ("placeholder", "get_attr")


def as_linear(node: torch.fx.Node) -> Linear | None:
    """The linear layer that a product is, or None."""
    args: tuple[Any, ...] = node.args
    bias: Any = None
    if node.target is ours.addmm.default:
        bias, *args = args  # type: ignore[assignment]
        if not _is_parameter(bias) or value(bias).dim() != 1:
            return None
    elif node.target is not ours.mm.default:
        return None
    if node.kwargs:
        return None
    x, transposed = args
    if not isinstance(transposed, torch.fx.Node):
        return None
    if transposed.target not in (aten.permute.default, aten.t.default):
        return None
    weight, *order = transposed.args
    if order not in ([], [[1, 0]]):
        return None
    rows = value(x).shape[0]
    if not _is_parameter(weight) or not isinstance(rows, int) or not 0 < rows <= MAX_ROWS:
        return None
    if bias is not None and value(bias).shape[0] != value(weight).shape[0]:
        return None
    return Linear(node, x, weight, bias)  # type: ignore[arg-type]


def _source(x: torch.fx.Node) -> tuple[Any, ...]:
    """What identifies an input: each linear layer views the same activation for itself."""
    while x.target in VIEWS:
        x = x.args[0]  # type: ignore[assignment]
    return (x,)


def merge_linears(graph: torch.fx.Graph) -> int:
    """Merges linear layers with a common input; returns the number of groups."""
    groups: dict[tuple[Any, ...], list[Linear]] = {}
    for node in graph.nodes:
        linear = as_linear(node) if node.op == "call_function" else None
        if linear is not None:
            key = (*_source(linear.x), str(list(value(linear.x).shape)), linear.bias is None)
            groups.setdefault(key, []).append(linear)
    count = 0
    for group in groups.values():
        for start in range(0, len(group) - 1, MAX_WEIGHTS):
            members = group[start : start + MAX_WEIGHTS]
            if len(members) > 1:
                _merge(members)
                count += 1
    return count


def _merge(members: list[Linear]) -> None:
    first = members[0]
    weights = [m.weight for m in members]
    biases = [m.bias for m in members if m.bias is not None]
    many = insert(first.node, ours.linear_many.default, (first.x, weights, biases))
    # At the first product all that is needed, the input and parameters, is there already.
    outputs = [insert(first.node, operator.getitem, (many, i)) for i in range(len(members))]
    for member, output in zip(members, outputs, strict=True):
        output.meta.update(
            {k: v for k, v in member.node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        )
        member.node.replace_all_uses_with(output)
        member.node.graph.erase_node(member.node)
