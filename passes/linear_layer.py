"""Linear layers in a graph: x @ weightᵀ (+ bias), however far their fusion has come."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch

from triton_only_backend.passes.graph_edit import VIEWS, insert, same_sizes, value

aten = torch.ops.aten
ours = torch.ops.triton_only
FUSED = ours.linear_fused.default


@dataclass(frozen=True)
class Linear:
    """A product x @ weightᵀ (+ bias) with what is fused into it.

    Attributes:
        node: its result, (M, N).
        x: the input, (M, K).
        weights: (N, K) each, parameters of the graph: one, or gate and up.
        biases: (N,) each, parameters of the graph, or none.
        options: keyword arguments of `triton_only.linear_fused`.
    """

    node: torch.fx.Node
    x: torch.fx.Node
    weights: list[torch.fx.Node]
    biases: list[torch.fx.Node]
    options: dict[str, Any] = field(default_factory=dict)


def as_linear(node: torch.fx.Node) -> Linear | None:
    """The linear layer whose result a node is, or None."""
    if node.target is operator.getitem:
        return _as_fused(node)
    args: tuple[Any, ...] = node.args
    biases: list[torch.fx.Node] = []
    if node.target is ours.addmm.default:
        bias, *args = args  # type: ignore[assignment]
        if not _is_parameter(bias) or value(bias).dim() != 1:
            return None
        biases.append(bias)
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
    if order not in ([], [[1, 0]]) or not _is_parameter(weight):
        return None
    if biases and value(biases[0]).shape[0] != value(weight).shape[0]:
        return None
    return Linear(node, x, [weight], biases)  # type: ignore[list-item]


def _as_fused(node: torch.fx.Node) -> Linear | None:
    fused, index = node.args
    if not isinstance(fused, torch.fx.Node) or fused.target is not FUSED or index != 0:
        return None
    if len(value(fused)) != 1:
        return None
    x, weights, biases = fused.args
    return Linear(node, x, list(weights), list(biases), dict(fused.kwargs))  # type: ignore[arg-type]


def _is_parameter(node: Any) -> bool:
    """Whether a node is an input of the graph, or some of its rows."""
    if not isinstance(node, torch.fx.Node):
        return False
    if node.target is aten.slice.Tensor and node.args[1] == 0:
        return _is_parameter(node.args[0])
    return node.op in ("placeholder", "get_attr")


def rows(linear: Linear) -> int | None:
    """M where it is a number, None where it is symbolic."""
    size = value(linear.node).shape[0]
    return size if isinstance(size, int) else None


def base_of(x: torch.fx.Node, views: tuple[Any, ...] = VIEWS) -> torch.fx.Node:
    """What a node is a view of: each linear layer views the same activation for itself."""
    while x.target in views:
        x = x.args[0]  # type: ignore[assignment]
    return x


def producer(node: Any) -> torch.fx.Node | None:
    """What a node is a view of, if nothing else uses it or the views between."""
    while isinstance(node, torch.fx.Node) and len(node.users) == 1:
        if node.target not in VIEWS:
            return node
        node = node.args[0]
    return None


def can_be_viewed_as(shape: Any) -> bool:
    """Whether `viewed_as` can spell a shape: one size may be symbolic, if none is zero."""
    known = [size for size in shape if isinstance(size, int)]
    return len(known) == len(shape) or (len(known) == len(shape) - 1 and 0 not in known)


def viewed_as(node: torch.fx.Node, shape: Any, before: torch.fx.Node) -> torch.fx.Node:
    """A node in another shape of as many elements; a symbolic size follows from the others."""
    if same_sizes(value(node).shape, shape):
        return node
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return insert(before, aten.reshape.default, (node, sizes))


def emit(anchor: torch.fx.Node, linear: Linear, options: dict[str, Any]) -> None:
    """Puts a linear layer with these options in the place of `anchor`, in anchor's shape."""
    fused = insert(anchor, FUSED, (linear.x, linear.weights, linear.biases), options)
    result = insert(anchor, operator.getitem, (fused, 0))
    result = viewed_as(result, value(anchor).shape, anchor)
    anchor.replace_all_uses_with(result)
    anchor.graph.erase_node(anchor)
