"""Replaces attention masks that are the same in every call by is_causal or a window.

Why: a mask that the graph builds from positions (torch.tril(torch.ones(L, L)), triu with -inf,
comparisons of aranges, what transformers' create_causal_mask leaves) is written to memory and read
by every head, and a kernel that does not know it to be causal visits twice the keys. At trace time
all of it is known: the mask's part of the graph has no input. It is computed, once, and compared.

Before:
    ones: "b8[1, 1, 512, 512]" = aten.full.default([1, 1, 512, 512], True, …)
    mask: "b8[1, 1, 512, 512]" = aten.tril.default(ones)
    out = triton_only.attention.default(q, k, v, mask)
After:
    out = triton_only.attention.default(q, k, v, None, is_causal=True)

A band around the diagonal becomes window_left and window_right; a mask that hides nothing goes.
What a boolean mask says, a float mask says with 0 and -inf, or, where each query sees a key, with
anything below -1e37 for -inf: the weight is exp(-1e37), 0 in any dtype. Left alone: masks that
depend on an input (padding, a cache's position), of symbolic lengths, of more than MAX_ELEMENTS
scores, any other shape of what is seen, and attention that has a window or is causal already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from triton_only_backend.passes.graph_edit import value

ours = torch.ops.triton_only
# Each attention op with the position of its mask.
MASK_OF = {
    ours.attention.default: 3,
    ours.attention_forward.default: 3,
    ours.attention_backward.default: 4,
}
# A mask is computed on the CPU when the graph is compiled; 16384² booleans are 256 MiB.
MAX_ELEMENTS = 1 << 28
# Below this, a float mask's value hides a key.
HIDDEN = -1e37


@dataclass(frozen=True)
class Visible:
    """The keys that query i sees: those with left <= j - i <= right; None for no bound."""

    left: int | None
    right: int | None

    def options(self, len_q: int, len_kv: int) -> dict[str, Any] | None:
        """The same as arguments of attention; None if they cannot say it."""
        shift = len_kv - len_q
        options: dict[str, Any] = {}
        if self.right == 0:
            options["is_causal"] = True
        elif self.right is not None:
            options["window_right"] = self.right - shift
        if self.left is not None:
            options["window_left"] = shift - self.left
        bounds = (options.get("window_left", 0), options.get("window_right", 0))
        return options if min(bounds) >= 0 else None


def fold_masks(graph: torch.fx.Graph) -> int:
    """Folds the constant masks of every attention of a graph; returns how many."""
    count = 0
    known: dict[tuple[torch.fx.Node, int, int], dict[str, Any] | None] = {}
    for target, position in MASK_OF.items():
        for node in graph.find_nodes(op="call_function", target=target):
            mask = node.args[position] if len(node.args) > position else None
            taken = {"is_causal", "window_left", "window_right"} & set(node.kwargs)
            if not isinstance(mask, torch.fx.Node) or taken:
                continue
            # A mask of one row or column is broadcast.
            len_q, len_kv = (value(node.args[position - i]).shape[-2] for i in (3, 2))
            if not isinstance(len_q, int) or not isinstance(len_kv, int):
                continue
            key = (mask, len_q, len_kv)
            if key not in known:
                known[key] = _arguments_of(*key)
            options = known[key]
            if options is not None:
                node.update_arg(position, None)
                node.kwargs = {**node.kwargs, **options}
                count += 1
    return count


def _arguments_of(mask: torch.fx.Node, len_q: int, len_kv: int) -> dict[str, Any] | None:
    """What to call attention with in place of a mask, if that is the same for all inputs."""
    shape = value(mask).shape
    if len(shape) < 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        return None
    if not 0 < len_q * len_kv <= MAX_ELEMENTS:
        return None
    with _disable_current_modes(), torch.no_grad():
        constant = evaluate(mask)
        full = (*shape[:-2], len_q, len_kv)
        visible = None if constant is None else visible_band(constant.expand(full))
    return None if visible is None else visible.options(len_q, len_kv)


def evaluate(node: torch.fx.Node) -> torch.Tensor | None:
    """The value of a node that depends on no input, computed on the CPU; None if it does depend."""
    order = _constants_before(node)
    if order is None:
        return None
    last_use = {source: n for n in order for source in n.all_input_nodes}
    values: dict[torch.fx.Node, Any] = {}
    for n in order:
        values[n] = _compute(n, values)
        for source in n.all_input_nodes:
            if last_use[source] is n:
                values.pop(source, None)
    result: torch.Tensor = values[node]
    return result


def _constants_before(node: torch.fx.Node) -> list[torch.fx.Node] | None:
    """The nodes that a node is computed from, in order, if all of them are constants."""
    order: list[torch.fx.Node] = []
    seen: set[torch.fx.Node] = set()
    stack = [(node, False)]
    while stack:
        current, is_ready = stack.pop()
        if is_ready:
            order.append(current)
        elif current not in seen:
            if not _is_constant(current):
                return None
            seen.add(current)
            stack.append((current, True))
            stack += [(source, False) for source in current.all_input_nodes]
    return order


def _is_constant(node: torch.fx.Node) -> bool:
    if node.op == "get_attr":
        # A number that the model's code wrote down, lifted into the graph: no parameter or buffer.
        literal = _attribute(node)
        return str(node.target).startswith("_tensor_constant") and type(literal) is torch.Tensor
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    returns = target._schema.returns
    sizes = getattr(value(node), "shape", ())
    return (
        target.namespace in ("aten", "prims")
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not target._schema.is_mutable
        and len(returns) == 1
        and all(isinstance(size, int) for size in sizes)
        and value(node) is not None
    )


def _attribute(node: torch.fx.Node) -> Any:
    return getattr(node.graph.owning_module, str(node.target), None)


def _compute(node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return _attribute(node).cpu()
    cpu = torch.device("cpu")

    def on_cpu(argument: Any) -> Any:
        return cpu if isinstance(argument, torch.device) else argument

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
    args, kwargs = torch.utils._pytree.tree_map(on_cpu, (args, kwargs))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def visible_band(mask: torch.Tensor) -> Visible | None:
    """The band around the diagonal that a mask is, the same for all batches and heads, if it is."""
    lead = [0 if step == 0 else slice(None) for step in mask.stride()[:-2]]
    flat = mask[(*lead, ...)]
    flat = flat.reshape(-1, *mask.shape[-2:])
    seen = flat[0] if flat.dtype == torch.bool else flat[0] == 0
    for one in flat:
        if mask.dtype == torch.bool:
            if not torch.equal(one, seen):
                return None
        elif not _hides_where(one, seen):
            return None
    len_q, len_kv = seen.shape
    distance = torch.arange(len_kv) - torch.arange(len_q)[:, None]
    inside = distance[seen]
    if inside.numel() == 0:
        return None
    left, right = int(inside.min()), int(inside.max())
    if not torch.equal(seen, (distance >= left) & (distance <= right)):
        return None
    return Visible(
        left=None if left == 1 - len_q else left,
        right=None if right == len_kv - 1 else right,
    )


def _hides_where(mask: torch.Tensor, seen: torch.Tensor) -> bool:
    """Whether a float mask is 0 for what is seen and hides the rest."""
    rest = mask[~seen]
    if not bool((mask[seen] == 0).all()):
        return False
    if bool((rest == float("-inf")).all()):
        return True
    return bool((rest < HIDDEN).all()) and bool(seen.any(-1).all())
