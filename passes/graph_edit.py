"""What passes share: reading a node's value, and replacing a node without losing what it knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    for key in _PROVENANCE:
        if key in before.meta:
            node.meta[key] = before.meta[key]
    refresh(node)
    return node


def refresh(node: torch.fx.Node) -> None:
    """Computes a node's fake value from its arguments' (aten graphs only)."""
    operands = torch.fx.map_arg((node.args, node.kwargs), value)
    tensors = [v for v in _leaves(operands) if isinstance(v, torch._subclasses.FakeTensor)]
    if not tensors:
        return
    with tensors[0].fake_mode:
        node.meta["val"] = node.target(*operands[0], **operands[1])  # type: ignore[operator]


def _leaves(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


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


def arguments(node: torch.fx.Node) -> dict[str, Any]:
    """An aten node's arguments by their schema's names, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    filled = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    filled.update({a.name: arg for a, arg in zip(schema.arguments, node.args, strict=False)})
    filled.update(node.kwargs)
    return filled
