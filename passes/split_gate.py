"""Takes a weight that holds gate and up together for the two weights it is.

Why: `fuse_epilogue` makes one kernel of act(x @ gateᵀ) * (x @ upᵀ); models that keep the two in one
weight (Phi-3, GLM, many checkpoints made for serving) compute one product and cut it.

Before:
    mm: "bf16[2, 28672]" = triton_only.mm.default(x, gate_up.T)
    gate, up = aten.split.Tensor(mm, 14336, -1)
    mul: "bf16[2, 14336]" = silu(gate) * up                       # in aten's own operations
After:
    gate: "bf16[2, 14336]" = triton_only.mm.default(x, gate_up[:14336].T)
    up: "bf16[2, 14336]" = triton_only.mm.default(x, gate_up[14336:].T)
    mul: "bf16[2, 14336]" = silu(gate) * up

The halves are views of the weight. Left alone: a product of which anything else is read, halves
that do not meet in a gate (merged q, k and v stay one product), symbolic sizes.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch

from triton_only_backend.passes.activations import as_activation
from triton_only_backend.passes.graph_edit import insert, value
from triton_only_backend.passes.linear_layer import Linear, Weight, as_linear, base_of, viewed_as

aten = torch.ops.aten
ours = torch.ops.triton_only
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


class Half(NamedTuple):
    """One of the two parts of a product's columns."""

    node: torch.fx.Node
    whole: torch.fx.Node
    start: int
    size: int


def as_half(node: Any) -> Half | None:
    """The half of a product that a node is, itself or viewed."""
    if not isinstance(node, torch.fx.Node):
        return None
    node = base_of(node)
    result = value(node)
    if not isinstance(result, torch.Tensor) or not all(isinstance(n, int) for n in result.shape):
        return None
    if node.target is operator.getitem and node.args[0].target in SPLITS:
        split, index = node.args
        whole, sizes, *dim = split.args
        start = sum(sizes[:index]) if isinstance(sizes, list) else sizes * index
        along = dim[0] if dim else 0
    elif node.target is aten.slice.Tensor and len(node.args) == 4:
        whole, along, start, _ = node.args
    else:
        return None
    last = value(whole).dim() - 1
    if along % (last + 1) != last or value(whole).shape[last] != 2 * result.shape[-1]:
        return None
    if start not in (0, result.shape[-1]):
        return None
    return Half(node, whole, start, result.shape[-1])


def split_gate(graph: torch.fx.Graph) -> int:
    """Splits every merged gate it finds; returns how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        count += _split(node)
    return count


def _split(node: torch.fx.Node) -> int:
    operands: tuple[Any, ...] = node.args[:2]
    for gate, up in (operands, operands[::-1]):
        other = as_half(up)
        is_node = isinstance(gate, torch.fx.Node)
        found = as_activation(gate) if other is not None and is_node else None
        half = None if found is None else as_half(found[1])
        if half is None or other is None or half.whole is not other.whole:
            continue
        linear = _merged(half, other)
        if linear is not None:
            for part in (half, other):
                _insert(part, linear)
            return 1
    return 0


def _merged(first: Half, second: Half) -> Linear | None:
    """The product that both are halves of, if nothing else is read of it."""
    whole = first.whole
    if first.start == second.start:
        return None
    parts = {first.node, second.node}
    for user in whole.users:
        if user not in parts and not (user.target in SPLITS and set(user.users) <= parts):
            return None
    base = base_of(whole)
    linear = as_linear(base) if base.op == "call_function" else None
    if linear is None or linear.options:
        return None
    node: Any = whole
    while node is not base:
        node = node.args[0]
        if len(node.users) != 1:
            return None
    return linear


def _insert(half: Half, linear: Linear) -> None:
    """The product with the half's columns of the weight, in the place of the half."""
    columns = (half.start, half.start + half.size)
    (whole,) = linear.weights
    part = insert(half.node, aten.slice.Tensor, (whole.node, int(whole.transposed), *columns))
    weight = Weight(part, whole.transposed).as_stored(half.node, transposed=True)
    operands: tuple[torch.fx.Node, ...] = (linear.x, weight)
    target = ours.mm.default
    if linear.biases:
        bias = insert(half.node, aten.slice.Tensor, (linear.biases[0], 0, *columns))
        operands, target = (bias, *operands), ours.addmm.default
    product = insert(half.node, target, operands)
    half.node.replace_all_uses_with(viewed_as(product, value(half.node).shape, half.node))
