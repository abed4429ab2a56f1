"""Lets attention read grouped key and value heads in place, where the model repeats them first.

Why: repeating the key and value heads (`repeat_kv`, `repeat_interleave`) writes and reads the whole
KV cache group-size times over in every decode step: two 9 µs kernels a layer of Llama-3-8B at 768
tokens, where attention itself takes 9 µs. In training the repeated heads are kept for the backward.

Before:
    unsqueeze: "bf16[2, 8, 1, 768, 128]" = aten.unsqueeze.default(cache, 2)
    expand: "bf16[2, 8, 4, 768, 128]" = aten.expand.default(unsqueeze, [2, 8, 4, 768, 128])
    clone: "bf16[2, 8, 4, 768, 128]" = aten.clone.default(expand)
    key: "bf16[2, 32, 768, 128]" = aten.view.default(clone, [2, 32, 768, 128])
    out = triton_only.attention.default(query, key, value, mask)
After:
    out = triton_only.attention.default(query, cache, cache_v, mask, enable_gqa=True)

Also where the heads are repeated before the transpose that puts them second, and where one head is
expanded or repeated. In a joint graph the backward then gives the gradient of the heads themselves,
and what summed it over the repeats (aten.view, aten.sum) goes. Left alone: a forward whose backward
is in another graph or whose gradients something else than that sum reads, keys and values repeated
by different factors or by a symbolic one, repeats along another dimension.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch

from triton_only_backend.passes.graph_edit import VIEWS, insert, refresh, same_sizes, value

aten = torch.ops.aten
ours = torch.ops.triton_only
ATTENTION = ours.attention.default
FORWARD, BACKWARD = ours.attention_forward.default, ours.attention_backward.default
HEADS = 1


@dataclass(frozen=True)
class Repeat:
    """Heads that a node repeats.

    Attributes:
        base: the node before it.
        count: how often each head.
        dim: where the heads are in `base`.
        order: the permute after the repetition, if there is one.
        one_head: whether `base` has one head, which is expanded without a new dimension.
    """

    base: torch.fx.Node
    count: int
    dim: int
    order: list[int] | None = None
    one_head: bool = False


def repeated_heads(node: Any, dim: int = HEADS) -> Repeat | None:
    """What a node repeats along `dim`, if that is what it does."""
    if not isinstance(node, torch.fx.Node):
        return None
    args: tuple[Any, ...] = node.args
    if node.target is aten.permute.default:
        order: list[int] = [int(i) for i in args[1]]
        found = repeated_heads(args[0], order[dim] % len(order))
        if found is None or found.order:
            return None
        return Repeat(found.base, found.count, found.dim, order, found.one_head)
    if node.target in (aten.expand.default, aten.repeat.default):
        return _one_head(node, dim)
    if node.target not in VIEWS:
        return None
    expand = args[0]
    if isinstance(expand, torch.fx.Node) and expand.target is aten.clone.default:
        expand = expand.args[0]
    if not isinstance(expand, torch.fx.Node) or expand.target is not aten.expand.default:
        return None
    unsqueeze = expand.args[0]
    if not isinstance(unsqueeze, torch.fx.Node) or unsqueeze.target is not aten.unsqueeze.default:
        return None
    base: Any = unsqueeze.args[0]
    before, wide, after = value(base).shape, value(expand).shape, value(node).shape
    if len(wide) != len(before) + 1 or unsqueeze.args[1] % len(wide) != dim + 1:  # type: ignore[operator]
        return None
    repeats = wide[dim + 1]
    if not isinstance(repeats, int):
        return None
    expected = (*before[:dim], repeats * before[dim], *before[dim + 1 :])
    widened = (*before[: dim + 1], repeats, *before[dim + 1 :])
    if not same_sizes(wide, widened) or not same_sizes(after, expected):
        return None
    return Repeat(base, repeats, dim)


def _one_head(node: torch.fx.Node, dim: int) -> Repeat | None:
    """One head, expanded or repeated to several."""
    base: Any = node.args[0]
    before, after = value(base).shape, value(node).shape
    if len(before) != len(after) or not (isinstance(before[dim], int) and before[dim] == 1):
        return None
    count = after[dim]
    if not isinstance(count, int) or count == 1:
        return None
    rest = [i for i in range(len(before)) if i != dim]
    if not same_sizes([before[i] for i in rest], [after[i] for i in rest]):
        return None
    return Repeat(base, count, dim, one_head=True)


def fold_kv_expand(graph: torch.fx.Graph) -> int:
    """Folds repeated key and value heads into every attention of the graph; returns how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        pair = _pair(node, 1)
        if pair is not None:
            _read_in_place(node, 1, pair)
            count += 1
    for node in graph.find_nodes(op="call_function", target=FORWARD):
        pair = _pair(node, 1)
        backwards = _backwards_of(node)
        if pair is None or not backwards:
            continue
        sums = [_sums(backward, pair) for backward in backwards]
        if any(found is None for found in sums):
            continue
        _read_in_place(node, 1, pair)
        for backward, found in zip(backwards, sums, strict=True):
            _read_in_place(backward, 2, pair)
            _replace_sums(backward, pair, found or [])
        count += 1
    return count


def _pair(node: torch.fx.Node, position: int) -> tuple[Repeat, Repeat] | None:
    """How key and value of an attention are repeated, if both are, equally often."""
    if node.kwargs.get("enable_gqa") or len(value(node.args[0]).shape) != 4:
        return None
    heads = [value(node.args[i]).shape[HEADS] for i in (position - 1, position)]
    if not same_sizes(heads[:1], heads[1:]):  # one query head, which is broadcast
        return None
    key, val = (repeated_heads(node.args[position + i]) for i in range(2))
    return None if key is None or val is None or key.count != val.count else (key, val)


def _read_in_place(node: torch.fx.Node, position: int, pair: tuple[Repeat, Repeat]) -> None:
    for index, repeat in enumerate(pair):
        base = repeat.base
        if repeat.order is not None:
            base = insert(node, aten.permute.default, (base, repeat.order))
        node.update_arg(position + index, base)
    node.update_kwarg("enable_gqa", True)


# The gradient


def _getitems(node: torch.fx.Node) -> dict[int, list[torch.fx.Node]]:
    found: dict[int, list[torch.fx.Node]] = {}
    for user in node.users:
        if user.target is operator.getitem:
            found.setdefault(int(user.args[1]), []).append(user)  # type: ignore[arg-type]
    return found


def _backwards_of(forward: torch.fx.Node) -> list[torch.fx.Node]:
    """The backwards, in the same graph, of a forward with the same key and value."""
    users = {u for items in _getitems(forward).values() for item in items for u in item.users}
    mine = [u for u in users if u.target is BACKWARD and u.args[1:4] == forward.args[:3]]
    return sorted(mine)


Sum = tuple[torch.fx.Node, int]


def _sums(backward: torch.fx.Node, pair: tuple[Repeat, Repeat]) -> list[Sum] | None:
    """What sums the gradients over the repeats, each with the output's index; None if not all."""
    found: list[Sum] = []
    items = _getitems(backward)
    for index, repeat in enumerate(pair, start=1):
        for item in items.get(index, []):
            for user in item.users:
                summed = _sum_over(user, repeat)
                if summed is None:
                    return None
                found.append((summed, index))
    return found


def _sum_over(user: torch.fx.Node, repeat: Repeat) -> torch.fx.Node | None:
    """The sum over the repeats that a gradient's reader begins."""
    node: torch.fx.Node | None = user
    if repeat.order is not None:
        back = [repeat.order.index(i) for i in range(len(repeat.order))]
        if user.target is not aten.permute.default or list(user.args[1]) != back:  # type: ignore[arg-type]
            return None
        node = _only_user(user)
    dim = repeat.dim
    if not repeat.one_head and node is not None:
        before = value(repeat.base).shape
        wide = (*before[: dim + 1], repeat.count, *before[dim + 1 :])
        if node.target not in VIEWS or not same_sizes(value(node).shape, wide):
            return None
        node = _only_user(node)
        dim += 1
    if node is None or node.target is not aten.sum.dim_IntList or list(node.args[1]) != [dim]:  # type: ignore[arg-type]
        return None
    keeps = len(node.args) > 2 and bool(node.args[2])
    same_dtype = value(node).dtype == value(repeat.base).dtype
    return node if same_dtype and keeps == (keeps or not repeat.one_head) else None


def _only_user(node: torch.fx.Node) -> torch.fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replace_sums(backward: torch.fx.Node, pair: tuple[Repeat, Repeat], sums: list[Sum]) -> None:
    refresh(backward)
    for node, index in sums:
        repeat = pair[index - 1]
        grad = insert(node, operator.getitem, (backward, index))
        if repeat.order is not None:
            back = [repeat.order.index(i) for i in range(len(repeat.order))]
            grad = insert(node, aten.permute.default, (grad, back))
        if not repeat.one_head and len(node.args) > 2 and node.args[2]:
            grad = insert(node, aten.unsqueeze.default, (grad, repeat.dim + 1))
        node.replace_all_uses_with(grad)
