"""Did the pass match, and what became of the ops: functions that raise AssertionError."""

from __future__ import annotations

import fnmatch
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend.errors import nearest
from triton_only_backend.testing.rendering import render, target_name
from triton_only_backend.testing.running import PassRun, run_pass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

REFUSAL_KEY = "triton_only_refusal"


def count_ops(graph: torch.fx.Graph | torch.fx.GraphModule) -> Counter[str]:
    """How often each op is called, in nested graphs too, by the names that `render` shows."""
    graphs = [graph] if isinstance(graph, torch.fx.Graph) else graphs_of(graph)
    return Counter(target_name(n) for g in graphs for n in g.nodes if n.op.startswith("call"))


def graphs_of(gm: torch.fx.GraphModule) -> list[torch.fx.Graph]:
    """A module's graph and those nested in it: branches, loops' bodies, checkpoints."""
    return [m.graph for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]


def op_name(op: Any) -> str:
    """An op, a function or a name as `render` shows it; a name may be a glob (`aten.*mm`)."""
    if isinstance(op, str):
        return op.removesuffix(".default")
    if isinstance(op, torch._ops.OpOverloadPacket):
        return str(op)
    node = torch.fx.Graph().call_function(op)
    return target_name(node)


def _count(counts: Counter[str], name: str) -> int:
    """`aten.mul` stands for all its overloads."""
    names = (name, f"{name}.*")
    return sum(n for op, n in counts.items() if any(fnmatch.fnmatchcase(op, m) for m in names))


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{op} {n}" for op, n in sorted(counts.items())) or "no calls"


def assert_ops(
    run: PassRun | torch.fx.GraphModule,
    *,
    appear: Mapping[Any, int] | Iterable[Any] = (),
    vanish: Iterable[Any] = (),
    stay: Mapping[Any, int] | Iterable[Any] = (),
) -> None:
    """Asserts what a pass did to the ops of a graph.

    Args:
        run: of `run_pass`; or a graph, of which only `appear` can be asked.
        appear: ops that are there afterwards, so many times, and were fewer before; without a
            number, at least once.
        vanish: ops that were there before and are not afterwards.
        stay: ops that are there as often as before; with a number, that often.
    """
    after = count_ops(run.after if isinstance(run, PassRun) else run)
    before = count_ops(run.before) if isinstance(run, PassRun) else Counter[str]()
    if (vanish or stay) and not isinstance(run, PassRun):
        raise TypeError("assert_ops: only a PassRun (of run_pass) tells what was there before")
    for op in appear:
        name, had, has = _around(op, before, after)
        wanted = appear[op] if isinstance(appear, dict) else None
        if has != wanted and (wanted is not None or has == 0):
            times = "at least once" if wanted is None else f"{wanted} times"
            raise AssertionError(
                f"{name} should appear {times}, is there {has} times"
                f"{nearest(name, after)}: {_listed(after)}"
            )
        if isinstance(run, PassRun) and had >= has:
            raise AssertionError(f"{name} was there {had} times before the pass, {has} after it")
    for op in vanish:
        name, had, has = _around(op, before, after)
        if not had:
            raise AssertionError(
                f"{name} should vanish but was not in the graph{nearest(name, before)}: "
                f"{_listed(before)}"
            )
        if has:
            raise AssertionError(f"{name} should vanish, is still there {has} times of {had}")
    for op in stay:
        name, had, has = _around(op, before, after)
        wanted = stay[op] if isinstance(stay, dict) else max(had, 1)
        if not had == has == wanted:
            raise AssertionError(
                f"{name} should stay {wanted} times, was there {had} times and is {has} times"
            )


def _around(op: Any, before: Counter[str], after: Counter[str]) -> tuple[str, int, int]:
    name = op_name(op)
    return name, _count(before, name), _count(after, name)


def assert_fired(
    graph_pass: Any, gm: torch.fx.GraphModule, *, times: int | None = None, pattern: Any = None
) -> PassRun:
    """Runs a pass and asserts that it matched, so many times where a number is given.

    Args:
        pattern: what it looks for (see `triton_only_backend.testing.patterns`): the error then says
            how near the closest miss was.
    """
    run = run_pass(graph_pass, gm)
    if run.fired and (times is None or run.fired == times) and run.changed:
        return run
    pattern = getattr(graph_pass, "pattern", None) if pattern is None else pattern
    wanted = "match" if times is None else f"match {times} times"
    happened = f"matched {run.fired} times" if run.fired else "did not match"
    if run.fired and not run.changed:
        happened += " but left the graph as it was"
    message = f"the pass should {wanted}; it {happened}"
    if pattern is not None:
        from triton_only_backend.testing.patterns import closest_miss

        miss = closest_miss(pattern, gm)
        message += f"; closest miss: {miss}"
        if not miss.reason:
            message += ", all of the pattern: a check of the pass's own refused it"
    raise AssertionError(f"{message}\n{render(gm)}")


def refusals(gm: torch.fx.GraphModule, key: str = REFUSAL_KEY) -> list[str]:
    """The reasons that a pass left on nodes, under a key of their meta."""
    reasons = []
    for node in (node for graph in graphs_of(gm) for node in graph.nodes):
        if key in node.meta:
            left = node.meta[key]
            reason = left.get("reason", left) if isinstance(left, dict) else left
            reasons.append(str(getattr(reason, "name", reason)))
    return reasons


def assert_refused(
    graph_pass: Any,
    gm: torch.fx.GraphModule,
    reason: Any = None,
    *,
    key: str = REFUSAL_KEY,
) -> PassRun:
    """Asserts that a pass leaves a graph alone and, where one is given, for this reason.

    Args:
        reason: a text or an enum's value; the pass leaves it in `node.meta[key]`, as it is or as a
            dict's "reason".
    """
    run = run_pass(graph_pass, gm)
    if run.fired or run.changed:
        raise AssertionError(
            f"the pass should refuse the graph, but changed it\n{render(run.after)}"
        )
    if reason is not None:
        wanted, found = str(getattr(reason, "name", reason)), refusals(run.after, key)
        if wanted not in found:
            raise AssertionError(
                f"the pass should refuse with {wanted}, gave {found or 'no reason'}"
            )
    return run


def assert_idempotent(graph_pass: Any, gm: torch.fx.GraphModule) -> PassRun:
    """Asserts that a second run of a pass that fired finds nothing and changes nothing."""
    once = assert_fired(graph_pass, gm)
    twice = run_pass(graph_pass, once.after)
    if twice.changed or twice.fired:
        raise AssertionError(
            f"a second run fired {twice.fired} times; after the first:\n{render(twice.before)}\n"
            f"after the second:\n{render(twice.after)}"
        )
    return once
