"""Patterns on Inductor's matcher, with errors that say how near the closest miss was."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend.testing import private
from triton_only_backend.testing.rendering import render, target_name
from triton_only_backend.testing.running import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


aten = torch.ops.aten
# Patterns take operands as they are written.
COMMUTATIVE = frozenset({
    aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default,
    operator.add, operator.mul, torch.add, torch.mul,
})  # fmt: skip


@dataclass(frozen=True)
class Miss:
    """How far a pattern reached into a graph.

    Attributes:
        matched: nodes of the pattern that found their counterpart.
        total: nodes of the pattern.
        reason: why it ended there; empty where all matched.
        node: the name of the graph's node at which it ended, as in the graph.
    """

    matched: int
    total: int
    reason: str
    node: str = ""

    def __str__(self) -> str:
        text = f"matched {self.matched} of {self.total} nodes"
        return f"{text}; {self.reason}" if self.reason else text


def make_pattern(
    search: Callable[..., Any], example_inputs: Sequence[Any], *, training: bool = False
) -> Any:
    """A function as a pattern of aten ops.

    Args:
        search: a function of tensors. Its parameters' names stand for any node; constants of type
            int, float, dtype and device in it match any.
        example_inputs: tensors to trace it with; their sizes do not matter to the pattern.
        training: the pattern of a joint graph: forward and backward.
    """
    names = list(inspect.signature(search).parameters)
    return private.trace_pattern(search, example_inputs, names, training)


def closest_miss(pattern: Any, gm: torch.fx.Graph | torch.fx.GraphModule) -> Miss:
    """Where in a graph a pattern came nearest to a match.

    Args:
        pattern: of `make_pattern`, or any of Inductor's `CallFunction(…)` expressions.
    """
    graph = gm.graph if isinstance(gm, torch.fx.GraphModule) else gm
    best = _farthest(pattern, graph)
    ends = [node for node in graph.nodes if node.name == best.node]
    readers = [user for end in ends for user in end.users]
    for node in ends + readers:
        if node.target in COMMUTATIVE and len(node.args) > 1:
            first, second, *rest = node.args
            node.args = (second, first, *rest)
            again = _farthest(pattern, graph)
            node.args = (first, second, *rest)
            if again.matched > best.matched:
                hint = f"; with the operands of `{node}` exchanged it reaches farther"
                return dataclasses.replace(best, reason=best.reason + hint)
    return best


def _farthest(pattern: Any, graph: torch.fx.Graph) -> Miss:
    best: Miss | None = None
    for part in _parts(pattern):
        for node in graph.nodes:
            if node.op not in ("placeholder", "output", "get_attr") and _same_call(part, node):
                miss = _reach(pattern, part, node)
                if best is None or miss.matched > best.matched:
                    best = miss
    if best is not None:
        return best
    wanted = ", ".join(dict.fromkeys(_name(part) for part in _parts(pattern)))
    return Miss(0, len(_parts(pattern)), f"the graph calls none of {wanted}")


def assert_matches(
    pattern: Any, gm: torch.fx.Graph | torch.fx.GraphModule, *, times: int | None = None
) -> int:
    """Asserts that a pattern matches in a graph, and returns how often."""
    graph = gm.graph if isinstance(gm, torch.fx.GraphModule) else gm
    roots = _roots(pattern)
    count = sum(
        bool(pattern.match(node))
        for node in graph.nodes
        if node.op.startswith("call") and any(_same_call(root, node) for root in roots)
    )
    if count == 0 or (times is not None and count != times):
        wanted = "match" if times is None else f"match {times} times"
        miss = closest_miss(pattern, graph)
        raise AssertionError(
            f"the pattern should {wanted}, matched {count} times; closest miss: {miss}\n"
            f"{render(graph)}"
        )
    return count


def _roots(pattern: Any) -> list[Any]:
    matcher = private.pattern_classes()
    if isinstance(pattern, matcher.MultiOutputPattern):
        return [output for output in pattern.outputs if _is_call(output)]
    if not _is_call(pattern):
        raise RunError(f"{pattern!r} is no call; a pattern needs one to start from")
    return [pattern]


def _is_call(pattern: Any) -> bool:
    return isinstance(pattern, private.pattern_classes()._TargetExpr)


def _children(pattern: Any) -> list[Any]:
    return list(pattern.flat_args_kwargs[0]) if hasattr(pattern, "flat_args_kwargs") else []


def _parts(pattern: Any) -> list[Any]:
    """The pattern's calls, each once, the roots first."""
    found: list[Any] = []
    waiting = _roots(pattern)
    while waiting:
        part = waiting.pop(0)
        if not any(part is known for known in found):
            found.append(part)
            waiting += [child for child in _children(part) if _is_call(child)]
    return found


def _name(part: Any) -> str:
    node = torch.fx.Graph().create_node(part.op, part.fns[0], (), {})
    return target_name(node)


def _same_call(part: Any, node: torch.fx.Node) -> bool:
    return bool(node.op == part.op and part._match_fns(node))


class _Walk:
    """Follows a pattern down from a node; keeps the first thing that did not fit."""

    def __init__(self) -> None:
        self.bound: dict[int, torch.fx.Node] = {}
        self.names: dict[str, Any] = {}
        self.reason = ""
        self.place = ""

    def miss(self, node: torch.fx.Node | None, reason: str) -> None:
        if not self.reason:
            self.reason = reason
            self.place = node.name if node is not None else ""

    def down(self, part: Any, found: Any, reader: torch.fx.Node | None) -> None:
        matcher = private.pattern_classes()
        if isinstance(part, matcher.Arg | matcher.Ignored):
            return
        if isinstance(part, matcher.KeywordArg | matcher.ExclusiveKeywordArg):
            known = self.names.setdefault(part.name, found)
            if known is not found and known != found:
                self.miss(
                    reader, f"`{part.name}` is `{known}` in one place and `{found}` in another"
                )
            return
        if not _is_call(part):
            if isinstance(found, torch.fx.Node) or found != part:
                self.miss(reader, f"`{reader}` has {found!r} where the pattern has {part!r}")
            return
        if not isinstance(found, torch.fx.Node):
            self.miss(reader, f"`{reader}` has {found!r} where the pattern calls {_name(part)}")
            return
        if id(part) in self.bound:
            if self.bound[id(part)] is not found:
                self.miss(
                    reader,
                    f"`{reader}` reads `{found}` where the pattern reads "
                    f"`{self.bound[id(part)]}` once more",
                )
            return
        if not _same_call(part, found):
            is_call = found.op.startswith("call")
            there = target_name(found) if is_call else f"an {_kind(found)}"
            by = f"`{reader}` reads " if reader is not None else ""
            self.miss(found, f"{by}`{found}`, {there}, where the pattern calls {_name(part)}")
            return
        self.bound[id(part)] = found
        self.arguments(part, found)

    def arguments(self, part: Any, node: torch.fx.Node) -> None:
        if not hasattr(part, "flat_args_kwargs"):
            return
        # Inductor ignores arguments by name that a pattern does not name; the rewriter does not.
        strict = getattr(part, "is_strict", False)
        kwargs = {k: v for k, v in node.kwargs.items() if strict or k in part.kwargs}
        items, spec = part.flatten(node.args, kwargs)
        if len(node.args) != len(part.args) or spec != part.flat_args_kwargs[1]:
            self.miss(
                node,
                f"`{node}` has {len(node.args)} arguments and {sorted(node.kwargs)}, the pattern "
                f"{len(part.args)} and {sorted(part.kwargs)}",
            )
            return
        for child, item in zip(_children(part), items, strict=True):
            self.down(child, item, node)


def _kind(node: torch.fx.Node) -> str:
    return {"placeholder": "input", "get_attr": "attribute"}.get(node.op, node.op)


def _name_reader(walk: _Walk, reader: Any, node: torch.fx.Node) -> None:
    """All below fits: why does what reads it not?"""
    for user in node.users:
        if _same_call(reader, user):
            above = _Walk()
            above.down(reader, user, None)
            walk.miss(user, above.reason)
    users = [
        f"`{user}`, {'the output' if user.op == 'output' else target_name(user)}"
        for user in node.users
    ]
    walk.miss(
        node,
        f"`{node}` is read by {', '.join(users) or 'nothing'}, where the pattern calls "
        f"{_name(reader)}",
    )


def _reach(pattern: Any, start: Any, node: torch.fx.Node) -> Miss:
    """How much of the pattern fits if this call of it is this node of the graph."""
    walk = _Walk()
    walk.down(start, node, None)
    parts = _parts(pattern)
    roots = _roots(pattern)
    if not any(start is root for root in roots) and not walk.reason:
        _name_reader(walk, next(p for p in parts if any(c is start for c in _children(p))), node)
    for part in parts:
        # Users are checked last: that the ops are right is the nearer miss.
        found = walk.bound.get(id(part))
        if found is None or any(part is root for root in roots) or not isinstance(part.users, int):
            continue
        if len(found.users) > part.users:
            inside = set(walk.bound.values())
            others = [f"`{u}`" for u in found.users if u not in inside] or ["the same call again"]
            ordinal = "a second user" if part.users == 1 else f"more than {part.users} users"
            walk.miss(found, f"`{found}` has {ordinal}, {', '.join(others)}")
            del walk.bound[id(part)]
            break
    return Miss(len(walk.bound), len(parts), walk.reason, walk.place)
