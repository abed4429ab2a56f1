"""What passes share: reading a node's value, and replacing a node without losing what it knows."""

from __future__ import annotations

import contextlib
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend import inductor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# The same elements in another shape, as AOTAutograd and our own edits spell it.
VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
)
# Provenance that a replacement inherits; values are computed anew.
_PROVENANCE = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "original_aten",
    "from_node",
    "seq_nr",
    "partitioner_tag",
    "recompute",
    "ac_graph_id",
    "custom",
)


def value(node: Any) -> Any:
    """The fake value of an aten or Dynamo node; a constant argument as it is."""
    if isinstance(node, torch.fx.Node):
        return node.meta.get("val", node.meta.get("example_value"))
    return node


def describe(*nodes: Any) -> str:
    """Dtypes and shapes for a message: "torch.float64[2, 3]"."""
    values = [value(n) for n in nodes]
    return ", ".join(f"{v.dtype}{list(v.shape)}" for v in values if isinstance(v, torch.Tensor))


def insert(
    before: torch.fx.Node,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> torch.fx.Node:
    """A new call before a node, with the node's provenance and a fake value of its own."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(target, args, dict(kwargs or {}))
    _inherit(node, before)
    refresh(node)
    return node


def _inherit(node: torch.fx.Node, origin: torch.fx.Node) -> None:
    node.meta.update({key: origin.meta[key] for key in _PROVENANCE if key in origin.meta})


def inline(
    before: torch.fx.Node, function: Callable[..., Any], operands: Sequence[torch.fx.Node | None]
) -> list[torch.fx.Node]:
    """Traces a function into aten ops before a node; returns the nodes of what it returns."""
    given = [operand for operand in operands if operand is not None]

    def of_given(*tensors: Any) -> Any:
        remaining = iter(tensors)
        return function(*(None if operand is None else next(remaining) for operand in operands))

    traced = inductor.decompose(of_given, [value(operand) for operand in given])
    inlined = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
    for node in traced.graph.nodes:
        if node.op == "call_function":
            with before.graph.inserting_before(before):
                inlined[node] = before.graph.node_copy(node, inlined.__getitem__)
            _inherit(inlined[node], before)
    return [inlined[node] for node in traced.graph.output_node().args[0]]  # type: ignore[union-attr]


def refresh(node: torch.fx.Node) -> None:
    """Computes a node's fake value from its arguments' (aten graphs only)."""
    node.meta["val"] = fake_call(node.target, node.args, node.kwargs)


def fake_call(target: Any, args: Any, kwargs: Any) -> Any:
    """What an op gives for the fake values of nodes, without a gradient."""
    args, kwargs = torch.fx.map_arg((args, kwargs), value)
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    modes = [leaf.fake_mode for leaf in leaves if isinstance(leaf, torch._subclasses.FakeTensor)]
    with modes[0] if modes else contextlib.nullcontext(), torch.no_grad():
        return target(*args, **kwargs)


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two lists of sizes are equal whatever their symbols are: asking so adds no guard."""
    a, b = list(a), list(b)
    return len(a) == len(b) and all(map(_same_size, a, b))


def _same_size(a: Any, b: Any) -> bool:
    if str(a) == str(b):
        return True
    if not isinstance(a, torch.SymInt) or not isinstance(b, torch.SymInt):
        return False
    # s * (s + 1) and s * s + s: strides and products of sizes are written both ways
    return bool((a.node.expr - b.node.expr).expand() == 0)


def is_contiguous(tensor: torch.Tensor) -> bool:
    """Whether a tensor is row-major whatever its symbols are: asking so adds no guard."""
    strides: list[Any] = [1]
    floored: list[Any] = [1]  # as PyTorch counts a size that may be 0
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * size)
        floored.insert(0, floored[0] * torch.sym_max(size, 1))
    return _same_strides(tensor, strides) or _same_strides(tensor, floored)


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape have the same strides whatever their symbols are."""
    return _same_strides(a, b.stride())


def _same_strides(tensor: torch.Tensor, strides: Sequence[Any]) -> bool:
    matter = [not (isinstance(size, int) and size == 1) for size in tensor.shape]
    return same_sizes(compress(tensor.stride(), matter), compress(strides, matter))


def replace(
    node: torch.fx.Node,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> torch.fx.Node:
    """Replaces a node by a call to another op."""
    new = insert(node, target, args, kwargs)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def put(old: torch.fx.Node, new: torch.fx.Node) -> None:
    """Puts a new value in the place of an old, and lays it out as that: a copy that fuses."""
    if not same_layout(value(new), value(old)):
        aten = torch.ops.aten
        order = _slowest_first(value(old))
        back = sorted(range(len(order)), key=order.__getitem__)
        is_row_major = order == sorted(order)
        form = {"memory_format": torch.contiguous_format}
        new = new if is_row_major else insert(old, aten.permute.default, (new, order))
        new = insert(old, aten.clone.default, (new,), form)
        new = new if is_row_major else insert(old, aten.permute.default, (new, back))
    old.replace_all_uses_with(new)


def _slowest_first(tensor: torch.Tensor) -> list[int]:
    """The dimensions as they lie in memory; symbolic ones are row-major or have channels last."""
    dims = list(range(tensor.dim()))
    if is_contiguous(tensor):
        return dims
    strides = list(tensor.stride())
    if all(isinstance(stride, int) for stride in strides):
        return sorted(dims, key=lambda dim: -strides[dim])
    return [0, *dims[2:], 1]


def arguments(node: torch.fx.Node) -> dict[str, Any]:
    """An aten node's arguments by their schema's names, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    filled = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    filled.update({a.name: arg for a, arg in zip(schema.arguments, node.args, strict=False)})
    filled.update(node.kwargs)
    return filled
