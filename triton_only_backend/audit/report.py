"""Joins what the graph knows with what the generated code does, and says it clearly.

The generated code is the authority: a library call in it is a finding, described by the graph op
that it came from; an op that the policy flagged, but that Inductor turned into Triton, is none.
Where no code was seen, the graph's flags count.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from triton_only_backend.audit import render
from triton_only_backend.audit.findings import Finding as Finding
from triton_only_backend.audit.findings import from_call, from_op, group, link
from triton_only_backend.audit.policy import Provider
from triton_only_backend.errors import AuditError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

    from triton_only_backend.audit.generated_code import CodeCall
    from triton_only_backend.audit.graph import GraphOp

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class AuditReport:
    """What one compiled graph, or all of a model's, runs outside Triton.

    Attributes:
        findings: the violations that nothing allows.
        allowed: the violations that an `allow` glob matched.
        operations: how many calls and launches go to each provider.
        graphs: the names of the graphs that were audited.
        graph_breaks: why Dynamo split the model; the code between graphs is not covered.
        environment: versions and GPU.
    """

    findings: list[Finding] = field(default_factory=list)
    allowed: list[Finding] = field(default_factory=list)
    operations: dict[Provider, int] = field(default_factory=dict)
    graphs: list[str] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_graph(
        cls,
        graph_ops: Sequence[GraphOp],
        calls: Sequence[CodeCall] | None,
        *,
        graph_name: str = "graph",
        allow: Iterable[str] = (),
        graph_breaks: Iterable[str] | Mapping[str, int] = (),
        environment: Mapping[str, Any] | None = None,
    ) -> AuditReport:
        """The report on one graph; `calls` is None when there is no generated code to read.

        Args:
            allow: globs of ops, calls or providers, in any case: "aten.sort*", "cublas".
            graph_breaks: the reasons, or how often each of them split the model.
        """
        if calls is None:
            found = [from_op(op, graph_name) for op in graph_ops if op.is_violation]
            operations = Counter(op.provider for op in graph_ops)
        else:
            violations = [call for call in calls if call.is_violation]
            linked = link(violations, graph_ops)
            found = [from_call(c, o, graph_name) for c, o in zip(violations, linked, strict=True)]
            operations = Counter()
            for call in calls:
                operations[call.provider] += call.count
        operations.pop(Provider.NONE, None)
        patterns = list(allow)
        findings = group(found)
        return cls(
            findings=[f for f in findings if not any(map(f.matches, patterns))],
            allowed=[f for f in findings if any(map(f.matches, patterns))],
            operations=dict(operations),
            graphs=[graph_name],
            graph_breaks=_break_texts(graph_breaks),
            environment=dict(environment or {}),
        )

    @classmethod
    def merge(
        cls,
        reports: Iterable[AuditReport],
        *,
        graph_breaks: Iterable[str] | Mapping[str, int] = (),
        environment: Mapping[str, Any] | None = None,
    ) -> AuditReport:
        """One report over all graphs of a model, with what is known of the model as a whole."""
        merged = cls(environment=dict(environment or {}))
        operations: Counter[Provider] = Counter()
        breaks = dict.fromkeys(_break_texts(graph_breaks))
        for report in reports:
            merged.findings.extend(report.findings)
            merged.allowed.extend(report.allowed)
            merged.graphs.extend(report.graphs)
            merged.environment.update(report.environment)
            operations.update(report.operations)
            breaks.update(dict.fromkeys(report.graph_breaks))
        return replace(merged, operations=dict(operations), graph_breaks=list(breaks))

    @property
    def is_triton_only(self) -> bool:
        """Whether at least one graph was audited, and every library call in it is allowed."""
        return bool(self.graphs) and not self.findings

    @property
    def violation_count(self) -> int:
        """The number of operations in all findings."""
        return sum(finding.count for finding in self.findings)

    def raise_for_violations(self) -> None:
        """Raises `AuditError`, whose message lists the findings, if there are any."""
        if self.findings:
            raise AuditError(render.error_message(self), self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `schema_version` changes when a key changes its meaning."""
        return {
            "schema": "triton_only_backend.audit",
            "schema_version": SCHEMA_VERSION,
            "is_triton_only": self.is_triton_only,
            "graphs": list(self.graphs),
            "graph_breaks": list(self.graph_breaks),
            "operations": {provider.value: n for provider, n in self.operations.items()},
            "findings": [finding.to_dict() for finding in self.findings],
            "allowed": [finding.to_dict() for finding in self.allowed],
            "environment": dict(self.environment),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON; values of `environment` that JSON lacks become text."""
        return json.dumps(self.to_dict(), indent=indent, default=str)

    def to_text(self, width: int = 100) -> str:
        """The report as plain text."""
        return render.to_text(self.__rich__(), width)

    def to_markdown(self) -> str:
        """The report as Markdown, for a pull request."""
        return render.audit_markdown(self)

    def to_html(self) -> str:
        """The report as a page of HTML."""
        return render.to_html(self.__rich__())

    def __rich__(self) -> RenderableType:
        return render.audit_renderable(self)


def _break_texts(breaks: Iterable[str] | Mapping[str, int]) -> list[str]:
    if isinstance(breaks, Mapping):
        return [f"{reason} (×{n})" if n > 1 else str(reason) for reason, n in breaks.items()]
    return [str(reason) for reason in breaks]
