"""Finds the graph of a plain PyTorch function inside a graph.

A template is written as the function a model would contain, and traced with the decompositions that
Inductor uses; what it finds therefore follows PyTorch's own decompositions from version to version:

    silu = Template(torch.nn.functional.silu)
    found = silu.match(node)        # node gives what silu gives for found["input"]

Operands of add and mul are tried in both orders. A float argument of the function stands for any
number: `match` returns the one it met. Nodes inside a match may have users outside it; they stay.
"""

from __future__ import annotations

import functools
import inspect
import operator
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend import inductor
from triton_only_backend.passes.graph_edit import VIEWS, arguments, value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

aten = torch.ops.aten
COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)
# Stands for a float argument in a trace; no model has exactly this number.
_ANY_NUMBER = 0.3141592741012573

Found = dict[str, Any]


class Template:
    """A function of tensors, to be found by its last node.

    Args:
        function: its positional parameters are tensors, its keyword-only ones numbers.
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        """Nothing is traced before the first match."""
        self.function = function
        parameters = inspect.signature(function).parameters.values()
        self.tensors = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        self.numbers = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

    def match(self, node: torch.fx.Node, like: Sequence[torch.Tensor]) -> Found | None:
        """What the function's parameters are where `node` is its result, or None.

        Args:
            node: the candidate for the function's last operation.
            like: for each tensor parameter one of its dtype and, where the function's operations
                depend on sizes, its sizes.
        """
        # A function may decompose in another way on another device.
        device = value(node).device.type
        signature = tuple((tuple(t.shape), t.dtype, device) for t in like)
        if not all(isinstance(size, int) for shape, *_ in signature for size in shape):
            return None
        traced = _trace(self, signature)
        result = traced.output_node().args[0]
        if not isinstance(result, torch.fx.Node) or result.target is not node.target:
            return None
        found = _match(result, node, {})
        if found is None:
            return None
        names = [n.name for n in traced.find_nodes(op="placeholder")]
        bound = {
            parameter: found[name]
            for parameter, name in zip(self.tensors, names, strict=True)
            if name in found
        }
        return {**bound, **{n: found[n] for n in self.numbers if n in found}}


@functools.lru_cache(maxsize=256)
def _trace(template: Template, signature: tuple[Any, ...]) -> torch.fx.Graph:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        inputs = [torch.empty(s, dtype=dtype, device=device) for s, dtype, device in signature]
    numbers = {name: _ANY_NUMBER + i for i, name in enumerate(template.numbers)}
    places = {number: _Number(name) for name, number in numbers.items()}
    # Functional, as the graphs of AOTAutograd are.
    function = torch.func.functionalize(functools.partial(template.function, **numbers))
    traced = inductor.decompose(function, inputs)
    for node in traced.graph.nodes:
        node.args = torch.fx.node.map_aggregate(
            node.args, lambda arg: places.get(arg, arg) if isinstance(arg, float) else arg
        )
    return traced.graph


class _Number(float):
    """The place of a number that `match` returns by name."""

    name: str

    def __new__(cls, name: str) -> _Number:
        number = super().__new__(cls, 0.0)
        number.name = name
        return number


def _match(pattern: Any, node: Any, found: Found) -> Found | None:
    """`found` and what matching one argument adds to it."""
    if isinstance(pattern, torch.fx.Node):
        if not isinstance(node, torch.fx.Node):
            return None
        if pattern.name in found:
            return found if found[pattern.name] is node else None
        if pattern.op == "placeholder":
            return {**found, pattern.name: node}
        if pattern.op != node.op or pattern.target != node.target:
            return None
        if pattern.kwargs != node.kwargs:
            return None
        wanted, given = _arguments(pattern), _arguments(node)
        found = {**found, pattern.name: node}
        matched = _match_all(wanted, given, found)
        if matched is None and pattern.target in COMMUTATIVE:
            first, second, *rest = given
            matched = _match_all(wanted, (second, first, *rest), found)
        return matched
    if isinstance(pattern, _Number):
        return {**found, pattern.name: node} if isinstance(node, int | float) else None
    if isinstance(pattern, list | tuple):
        return _match_all(pattern, node, found) if isinstance(node, list | tuple) else None
    return found if operator.eq(pattern, node) and type(pattern) is type(node) else None


def _arguments(node: torch.fx.Node) -> tuple[Any, ...]:
    """A node's arguments, however its sizes and dimensions were written (-1, or counted)."""
    args: tuple[Any, ...] = node.args
    if node.target in VIEWS:
        return (args[0], [str(size) for size in value(node).shape])
    if node.target in (aten.slice.Tensor, aten.select.int, aten.mean.dim):
        given = arguments(node)
        dims = given.pop("dim")
        rank = value(args[0]).dim()
        counted = [d % rank for d in dims] if isinstance(dims, list | tuple) else [dims % rank]
        if "end" in given:
            given["end"] = min(given["end"], value(args[0]).shape[counted[0]])
        return (*given.values(), counted)
    if node.target is aten.cat.default:
        given = arguments(node)
        return (given["tensors"], given["dim"] % value(node).dim())
    if node.target is aten.unsqueeze.default:
        return (args[0], args[1] % value(node).dim())
    return args


def _match_all(patterns: Sequence[Any], nodes: Sequence[Any], found: Found) -> Found | None:
    if len(patterns) != len(nodes):
        return None
    matched: Found | None = found
    for pattern, node in zip(patterns, nodes, strict=True):
        if matched is None:
            return None
        matched = _match(pattern, node, matched)
    return matched
