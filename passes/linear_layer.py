"""Linear layers in a graph: x @ weightᵀ (+ bias), however far their fusion has come.

The weight is stored (N, K), as `nn.Linear` does, or (K, N), as GPT-2's `Conv1D`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from triton_only_backend.passes.graph_edit import VIEWS, insert, same_sizes, value

aten = torch.ops.aten
ours = torch.ops.triton_only
FUSED = ours.linear_fused.default
TRANSPOSES = (aten.permute.default, aten.t.default)


class Weight(NamedTuple):
    """A parameter of the graph, or a part of one, that linear layers multiply by.

    Attributes:
        node: (N, K); transposed, (K, N).
        transposed: how it is stored.
    """

    node: torch.fx.Node
    transposed: bool

    @property
    def shape(self) -> Any:
        """(N, K)."""
        shape = value(self.node).shape
        return shape[::-1] if self.transposed else shape

    @property
    def strides(self) -> tuple[Any, ...]:
        """Those of (N, K)."""
        strides: tuple[Any, ...] = value(self.node).stride()
        return strides[::-1] if self.transposed else strides

    def as_stored(self, before: torch.fx.Node, *, transposed: bool) -> torch.fx.Node:
        """The weight as (N, K) or, transposed, as (K, N): itself or a view."""
        if self.transposed == transposed:
            return self.node
        return insert(before, aten.permute.default, (self.node, [1, 0]))

    @classmethod
    def of(cls, operand: Any, *, transposed: bool) -> Weight | None:
        """The weight that an (N, K) or, transposed, a (K, N) operand is."""
        if isinstance(operand, torch.fx.Node) and operand.target in TRANSPOSES:
            operand, *order = operand.args
            if order not in ([], [[1, 0]]):
                return None
            transposed = not transposed
        return cls(operand, transposed) if _is_parameter(operand) else None


@dataclass(frozen=True)
class Linear:
    """A product x @ weightᵀ (+ bias) with what is fused into it.

    Attributes:
        node: its result, (M, N).
        x: the input, (M, K).
        weights: one, or gate and up.
        biases: (N,) each, parameters of the graph, or none.
        options: keyword arguments of `triton_only.linear_fused`.
    """

    node: torch.fx.Node
    x: torch.fx.Node
    weights: list[Weight]
    biases: list[torch.fx.Node]
    options: dict[str, Any] = field(default_factory=dict)

    def operands(self, before: torch.fx.Node) -> tuple[Any, ...]:
        """The positional arguments of `triton_only.linear_fused`."""
        weights = [weight.as_stored(before, transposed=False) for weight in self.weights]
        return self.x, weights, self.biases


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
    x, operand = args
    weight = Weight.of(operand, transposed=True)
    if weight is None or (biases and value(biases[0]).shape[0] != weight.shape[0]):
        return None
    return Linear(node, x, [weight], biases)


def _as_fused(node: torch.fx.Node) -> Linear | None:
    fused, index = node.args
    if not isinstance(fused, torch.fx.Node) or fused.target is not FUSED or index != 0:
        return None
    if len(value(fused)) != 1:
        return None
    args: tuple[Any, ...] = fused.args
    x, operands, biases = args
    weights = [Weight.of(operand, transposed=False) for operand in operands]
    if not all(weights):
        return None
    return Linear(node, x, weights, list(biases), dict(fused.kwargs))  # type: ignore[arg-type]


def _is_parameter(node: Any) -> bool:
    """Whether a node is an input of the graph, or some of its rows or columns."""
    if not isinstance(node, torch.fx.Node):
        return False
    if node.target is aten.slice.Tensor and node.args[1] in (0, 1):
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


def producer(node: Any, *, shared: bool = False) -> torch.fx.Node | None:
    """What a node is a view of, if nothing else uses it or the views between.

    Args:
        node: of any graph; a number has no producer.
        shared: the node itself may have several users.
    """
    while isinstance(node, torch.fx.Node) and (shared or len(node.users) == 1):
        if node.target not in VIEWS:
            return node
        node, shared = node.args[0], False
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
    fused = insert(anchor, FUSED, linear.operands(anchor), options)
    result = insert(anchor, operator.getitem, (fused, 0))
    result = viewed_as(result, value(anchor).shape, anchor)
    anchor.replace_all_uses_with(result)
    anchor.graph.erase_node(anchor)
