"""What the witnesses say of one compiled graph, or of all of a model's, in every form.

Graph and generated code are joined by `joining`; a profiled run can be added as the third witness.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_only_backend.audit import cudagraphs as cuda_graphs
from triton_only_backend.audit import pass_rows, reading, render
from triton_only_backend.audit.findings import Finding as Finding
from triton_only_backend.audit.findings import group
from triton_only_backend.audit.joining import join
from triton_only_backend.audit.kernel_report import KernelReport
from triton_only_backend.audit.operations import (
    Coverage,
    OpRow,
    count_by_provider,
    share,
)
from triton_only_backend.audit.pass_rows import PassRow
from triton_only_backend.audit.places import short_path
from triton_only_backend.audit.policy import Provider
from triton_only_backend.errors import AuditError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

    from triton_only_backend.audit.cudagraphs import CudaGraphs
    from triton_only_backend.audit.generated_code import CodeCall
    from triton_only_backend.audit.graph import GraphOp
    from triton_only_backend.audit.pass_rows import PassResult

SCHEMA = "triton_only_backend.audit"
SCHEMA_VERSION = 1
# A graph break's reason gives the file after "at", in a line of its own.
_BREAK_PLACE = re.compile(r"(?m)(?<=^  at )\S+(?=:\d+ in )")
_SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


@dataclass(frozen=True)
class AuditReport:
    """What one compiled graph, or all of a model's, is made of, and what runs outside Triton.

    Attributes:
        findings: the violations that nothing allows.
        allowed: the violations that an `allow` glob matched.
        operations: how many calls and launches go to each provider.
        graphs: the names of the graphs that were audited.
        graph_breaks: why Dynamo split the model; the code between graphs is not covered.
        environment: versions and GPU.
        listed: copies, fills and collectives: no violations, named all the same.
        notes: ops that a pass declined to rewrite, but that ended in Triton nevertheless.
        ops: every op of the graphs, with who runs it.
        cudagraphs: whether CUDA graphs are on and why some were skipped; None if not known.
        allow: the globs that were given.
        passes: what each pass did to each graph; the sweep after Inductor's own patterns, which a
            cached compilation does not repeat, is left out.
        run: a profiled run, see `with_run`.
    """

    findings: list[Finding] = field(default_factory=list)
    allowed: list[Finding] = field(default_factory=list)
    operations: dict[Provider, int] = field(default_factory=dict)
    graphs: list[str] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    listed: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    ops: list[OpRow] = field(default_factory=list)
    cudagraphs: CudaGraphs | None = None
    allow: list[str] = field(default_factory=list)
    passes: list[PassRow] = field(default_factory=list)
    run: KernelReport | None = None

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
        cudagraphs: CudaGraphs | None = None,
        refused: Iterable[GraphOp] = (),
        passes: Iterable[PassResult] = (),
    ) -> AuditReport:
        """The report on one graph; `calls` is None when there is no generated code to read.

        Args:
            allow: globs of ops, calls or providers, in any case: "aten.sort*", "cublas"; with
                "module.glob::" before it, in those modules only.
            graph_breaks: the reasons, or how often each of them split the model.
            refused: ops of an earlier state of the graph that a pass declined to rewrite and that
                were taken apart since; they become notes.
            passes: the results of the passes on this graph.
        """
        joined = join(graph_ops, calls, graph_name, refused)
        patterns = list(allow)
        found = [
            replace(f, allowed_by=next(filter(f.matches, patterns), "")) if patterns else f
            for f in joined.found
        ]
        return cls(
            findings=group(finding for finding in found if not finding.allowed_by),
            allowed=group(finding for finding in found if finding.allowed_by),
            operations=joined.operations,
            graphs=[graph_name],
            graph_breaks=_break_texts(graph_breaks),
            environment=dict(environment or {}),
            listed=group(joined.listed),
            notes=group(joined.notes),
            ops=joined.ops,
            cudagraphs=cudagraphs,
            allow=patterns,
            passes=pass_rows.rows_of(passes, graph_name),
        )

    @classmethod
    def merge(
        cls,
        reports: Iterable[AuditReport],
        *,
        graph_breaks: Iterable[str] | Mapping[str, int] = (),
        environment: Mapping[str, Any] | None = None,
        cudagraphs: CudaGraphs | None = None,
    ) -> AuditReport:
        """One report over all graphs of a model, with what is known of the model as a whole."""
        merged = cls(environment=dict(environment or {}))
        operations: Counter[Provider] = Counter()
        breaks = dict.fromkeys(_break_texts(graph_breaks))
        allow: dict[str, None] = {}
        states = [cudagraphs]
        run: KernelReport | None = None
        for report in reports:
            for name in ("findings", "allowed", "graphs", "listed", "notes", "ops", "passes"):
                getattr(merged, name).extend(getattr(report, name))
            merged.environment.update(report.environment)
            operations.update(report.operations)
            breaks.update(dict.fromkeys(report.graph_breaks))
            allow.update(dict.fromkeys(report.allow))
            states.append(report.cudagraphs)
            run = report.run or run
        return replace(
            merged,
            operations=dict(operations),
            graph_breaks=list(breaks),
            cudagraphs=cuda_graphs.merge(states),
            allow=list(allow),
            run=run,
        )

    def with_run(self, run: KernelReport) -> AuditReport:
        """The same report, joined with a profiled run, to which the `allow` globs apply too."""
        return replace(self, run=run.with_allow(self.allow))

    @property
    def is_triton_only(self) -> bool:
        """Whether at least one graph was audited, and every library call in it is allowed.

        A run that was joined must agree.
        """
        clean = bool(self.graphs) and not self.findings
        return clean and (self.run is None or self.run.is_triton_only)

    @property
    def violation_count(self) -> int:
        """The number of operations in all findings."""
        return sum(finding.count for finding in self.findings)

    @property
    def coverage(self) -> Coverage:
        """Triton's part of the ops, of the calls in the generated code and of the run's time."""
        return Coverage(
            ops=share(count_by_provider(self.ops)),
            calls=share(self.operations),
            time=None if self.run is None else self.run.triton_time_share,
        )

    def raise_for_violations(self) -> None:
        """Raises `AuditError`, whose message lists the findings, if there are any."""
        if self.findings or (self.run is not None and self.run.violations):
            raise AuditError(render.error_message(self), self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `schema_version` changes when a key changes its meaning."""
        coverage = self.coverage
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "is_triton_only": self.is_triton_only,
            "coverage": {"ops": coverage.ops, "calls": coverage.calls, "time": coverage.time},
            "graphs": list(self.graphs),
            "graph_breaks": list(self.graph_breaks),
            "cudagraphs": self.cudagraphs and {**self.cudagraphs},
            "allow": list(self.allow),
            "operations": {provider.value: n for provider, n in self.operations.items()},
            "findings": [finding.to_dict() for finding in self.findings],
            "allowed": [finding.to_dict() for finding in self.allowed],
            "listed": [finding.to_dict() for finding in self.listed],
            "notes": [finding.to_dict() for finding in self.notes],
            "ops": [row.to_dict() for row in self.ops],
            "passes": [row.to_dict() for row in self.passes],
            "run": self.run and self.run.to_dict(),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AuditReport:
        """The report that `to_dict` made `data` of.

        Raises:
            ReportFormatError: it is something else.
        """
        with reading.checked(data, SCHEMA, SCHEMA_VERSION):
            findings = {
                name: [Finding.from_dict(item) for item in data[name]]
                for name in ("findings", "allowed", "listed", "notes")
            }
            return cls(
                **findings,
                operations={Provider(name): n for name, n in data["operations"].items()},
                graphs=list(data["graphs"]),
                graph_breaks=list(data["graph_breaks"]),
                environment=dict(data["environment"]),
                ops=[OpRow.from_dict(item) for item in data["ops"]],
                cudagraphs=data["cudagraphs"],
                allow=list(data["allow"]),
                passes=[PassRow.from_dict(item) for item in data.get("passes", ())],
                run=None if data["run"] is None else KernelReport.from_dict(data["run"]),
            )

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON; values of `environment` that JSON lacks become text."""
        return json.dumps(self.to_dict(), indent=indent, default=str)

    @classmethod
    def from_json(cls, text: str) -> AuditReport:
        """The report that `to_json` wrote."""
        return cls.from_dict(reading.parse(text))

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """The JSON Schema (draft 2020-12) of `to_dict`."""
        schema: dict[str, Any] = json.loads(_SCHEMA_FILE.read_text(encoding="utf-8"))
        return schema

    def to_text(self, width: int = 100) -> str:
        """The report as plain text."""
        return render.to_text(self.__rich__(), width)

    def to_short_text(self) -> str:
        """The verdict and each finding in a few lines; what an `AuditError` says."""
        return render.error_message(self)

    def to_markdown(self, baseline: AuditReport | None = None) -> str:
        """The report as Markdown, for a pull request; with what changed since `baseline`."""
        from triton_only_backend.audit import markdown

        return markdown.audit_report(self, baseline)

    def to_html(self) -> str:
        """The report as one page of HTML that needs no network."""
        from triton_only_backend.audit import page

        return page.render(self, self.run)

    def to_sarif(self, baseline: AuditReport | None = None) -> dict[str, Any]:
        """The report as SARIF 2.1.0, by which code hosts show findings at their lines."""
        from triton_only_backend.audit import sarif

        return sarif.log_of(self, baseline)

    def __rich__(self) -> RenderableType:
        return render.audit_renderable(self)


def _break_texts(breaks: Iterable[str] | Mapping[str, int]) -> list[str]:
    if isinstance(breaks, Mapping):
        breaks = [f"{reason} (×{n})" if n > 1 else reason for reason, n in breaks.items()]
    return [_BREAK_PLACE.sub(lambda place: short_path(place[0]), str(text)) for text in breaks]
