"""Joins what the graph knows with what the generated code does.

The generated code is the authority: a library call in it is a finding, described by the graph op
that it came from; an op that the policy flagged, but that Inductor turned into Triton, is none.
Where no code was seen, the graph's flags count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from triton_only_backend.audit.findings import Finding, from_call, from_op, link
from triton_only_backend.audit.operations import OpRow, lowered_ops, rows_of
from triton_only_backend.audit.policy import Provider

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from triton_only_backend.audit.generated_code import CodeCall
    from triton_only_backend.audit.graph import GraphOp


@dataclass(frozen=True)
class Joined:
    """What is known of one graph; the attributes are those of `AuditReport`, none grouped yet.

    Attributes:
        found: the violations, before anything is allowed.
    """

    found: list[Finding]
    listed: list[Finding]
    notes: list[Finding]
    operations: dict[Provider, int]
    ops: list[OpRow]


def join(
    graph_ops: Sequence[GraphOp],
    calls: Sequence[CodeCall] | None,
    graph: str,
    refused: Iterable[GraphOp] = (),
) -> Joined:
    """What `graph_ops` became; `calls` is None when there is no generated code to read.

    Args:
        refused: ops of an earlier state of the graph that a pass declined to rewrite and that were
            taken apart since; they become notes.
    """
    linked: list[GraphOp | None] = []
    violations: list[CodeCall] = []
    operations: Counter[Provider]
    if calls is None:
        found = [from_op(op, graph) for op in graph_ops if op.is_violation]
        listed = [from_op(op, graph) for op in graph_ops if op.provider.is_listed]
        operations = Counter(op.provider for op in graph_ops)
    else:
        violations = [call for call in calls if call.is_violation]
        linked = link(violations, graph_ops)
        found = [from_call(c, o, graph) for c, o in zip(violations, linked, strict=True)]
        listed = [from_call(c, None, graph) for c in calls if c.provider.is_listed]
        operations = Counter()
        for call in calls:
            operations[call.provider] += call.count
    operations.pop(Provider.NONE, None)
    declined = [op for op in graph_ops if op.refused and not op.is_violation]
    if calls is not None:
        declined += [op for op in lowered_ops(graph_ops, violations, linked) if op.refused]
    notes = [_note(op, graph, Provider.TRITON_INDUCTOR) for op in declined]
    notes += [_note(op, graph, Provider.NONE) for op in refused]
    ops = rows_of(graph_ops, None if calls is None else violations, linked, graph)
    return Joined(found, listed, notes, dict(operations), ops)


def _note(op: GraphOp, graph: str, provider: Provider) -> Finding:
    """A refusal that ended well; an op that was taken apart runs no kernel of its own."""
    return replace(from_op(op, graph), provider=op.provider if op.provider.is_triton else provider)
