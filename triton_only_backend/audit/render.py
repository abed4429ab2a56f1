"""Reports as text, for terminals and errors, and the sentences that every form shares."""

from __future__ import annotations

import io
from textwrap import indent
from typing import TYPE_CHECKING

from triton_only_backend.audit import cudagraphs, pass_rows
from triton_only_backend.audit.operations import count_by_provider, percent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import RenderableType

    from triton_only_backend.audit.findings import Finding
    from triton_only_backend.audit.kernel_report import KernelReport, KernelRow
    from triton_only_backend.audit.policy import Provider
    from triton_only_backend.audit.report import AuditReport

_SHOWN = 20  # findings that an error message spells out
BREAKS_EXPLAINED = "the code between the graphs runs eagerly"


def plural(count: int, noun: str) -> str:
    """`1 graph`, `2 graphs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def error_message(report: AuditReport) -> str:
    """The report's short form, the text of an AuditError: each finding in a few lines."""
    blocks = [_verdict(report)]
    blocks += [finding_block(finding) for finding in report.findings[:_SHOWN]]
    hidden = len(report.findings) - _SHOWN
    if hidden > 0:
        blocks.append(f"… and {hidden} more findings; the report lists them all")
    if report.run is not None and report.run.violations:
        blocks.append("\n".join(kernel_line(row) for row in report.run.violations[:_SHOWN]))
    return "\n\n".join(blocks)


def _verdict(report: AuditReport) -> str:
    kernels = 0 if report.run is None else len(report.run.violations)
    if report.findings:
        text = f"{plural(report.violation_count, 'operation')} would run outside Triton"
        return text + (f"; {plural(kernels, 'kernel')} did" if kernels else "")
    if kernels:
        return f"{plural(kernels, 'kernel')} ran outside Triton"
    if not report.graphs:
        return "Nothing was compiled, so nothing was audited"
    if report.run is not None and not report.run.is_triton_only:
        return "No Triton kernel ran"
    return "Triton only: no library call"


def headline(report: AuditReport) -> str:
    """The verdict and how much it covers, in one line."""
    verdict = _verdict(report)
    if not report.graphs:
        return verdict
    graphs = plural(len(report.graphs), "graph")
    if not report.is_triton_only:
        return f"{verdict} ({graphs})"
    allowed = sum(finding.count for finding in report.allowed)
    return f"{verdict} in {graphs}" + (f", {allowed} allowed" if allowed else "")


def coverage_line(report: AuditReport) -> str:
    """`Triton runs 96.0% of the ops, 80.0% of …`, with what is known."""
    coverage = report.coverage
    parts = [
        (coverage.ops, "of the ops"),
        (coverage.calls, "of the calls and launches"),
        (coverage.time, time_label(report.run)),
    ]
    known = [f"{percent(part)} {label}" for part, label in parts if part is not None]
    return f"Triton runs {', '.join(known)}" if known else ""


def time_label(run: KernelReport | None) -> str:
    """What the time of a run is time of."""
    return "of the CPU time (interpreter)" if run and run.device != "gpu" else "of the GPU time"


def finding_block(finding: Finding) -> str:
    """`op ×count [shapes] → provider`, then where, why and what to do, a line each."""
    shapes = f"  [{finding.shapes}]" if finding.shapes else ""
    lines = [f"{finding.op} ×{finding.count}{shapes} → {finding.provider.value}"]
    lines += [f"  {label:<7}{text}" for label, text in _facts(finding)]
    return "\n".join(lines)


def _facts(finding: Finding) -> Iterator[tuple[str, str]]:
    if finding.source_line:
        yield "at", finding.source_line
    elif finding.call:
        yield "at", f"{finding.call}, line {finding.code_line} of the generated code"
    if finding.module_path:
        yield "module", finding.module_path
    if finding.graph:
        yield "graph", finding.graph
    if finding.why:
        yield "why", finding.why
    if finding.remedy:
        yield "do", finding.remedy


def kernel_line(row: KernelRow) -> str:
    """A kernel of a run in one line."""
    share = f", {row.share:.1%} of compute time" if row.provider.is_compute else ""
    return f"{row.name} ×{row.count} → {row.provider.value}{share}"


def break_line(report: AuditReport) -> str:
    """How many graph breaks, and what they mean."""
    return f"{plural(len(report.graph_breaks), 'graph break')}: {BREAKS_EXPLAINED}"


def sections(report: AuditReport) -> list[tuple[str, list[Finding]]]:
    """The report's lists with their titles; communication stands apart from copies and fills."""
    communication = [finding for finding in report.listed if finding.provider.name == "NCCL"]
    copies = [finding for finding in report.listed if finding.provider.name != "NCCL"]
    lists = [
        ("Findings", report.findings),
        ("Allowed", report.allowed),
        ("Notes: refused by a pass, Triton nevertheless", report.notes),
        ("Communication", communication),
        ("Copies and fills", copies),
    ]
    return [(title, findings) for title, findings in lists if findings]


def provider_rows(report: AuditReport) -> list[tuple[Provider, int, int, tuple[int, float]]]:
    """For each provider its ops, its calls and launches, and its part of the run."""
    ops = count_by_provider(report.ops)
    run = {} if report.run is None else report.run.totals()
    providers = {*ops, *report.operations, *run}
    rows = [
        (p, ops.get(p, 0), report.operations.get(p, 0), run.get(p, (0, 0.0))) for p in providers
    ]
    return sorted(rows, key=lambda row: (not row[0].is_violation, -row[2], -row[1], row[0].name))


def pass_table(report: AuditReport) -> list[tuple[str, str, str]]:
    """For each pass, over all graphs: its name, how often it fired, what it declined and why."""
    return [
        (
            row.name,
            str(row.fired),
            "; ".join(f"{count} × {reason}" for reason, count in row.declined.items()),
        )
        for row in pass_rows.totals(report.passes)
    ]


def facts_line(environment: dict[str, object]) -> str:
    """Versions and GPU in one line; what is not there is left out."""
    return ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None)


def audit_renderable(report: AuditReport) -> RenderableType:
    """The report for a rich console."""
    from rich.console import Group
    from rich.text import Text

    style = "bold green" if report.is_triton_only else "bold red"
    parts: list[RenderableType] = [Text(headline(report), style=style)]
    if coverage_line(report):
        parts.append(Text(coverage_line(report)))
    if report.cudagraphs is not None:
        parts += [Text(line) for line in _cudagraph_lines(report)]
    rows = provider_rows(report)
    if rows:
        parts += [Text(), _provider_table(rows, with_run=report.run is not None)]
    for title, findings in sections(report):
        parts += [Text(), Text(title, style="bold")]
        parts += [Text(indent(finding_block(f), "  ") + "\n") for f in findings]
    if report.passes:
        parts += [Text(), _pass_table(report)]
    if report.graph_breaks:
        parts += [Text(), Text(break_line(report), style="yellow")]
        parts += [Text(indent(reason, "  ")) for reason in report.graph_breaks]
    if report.run is not None:
        parts += [Text(), kernel_renderable(report.run)]
    if report.environment:
        parts += [Text(), Text(facts_line(report.environment), style="dim")]
    return Group(*parts)


def _cudagraph_lines(report: AuditReport) -> Iterator[str]:
    if report.cudagraphs is None:
        return
    yield f"CUDA graphs: {cudagraphs.headline(report.cudagraphs)}"
    for reason in report.cudagraphs["skipped"]:
        yield f"  {reason}"
        if cudagraphs.advice(reason):
            yield f"    do {cudagraphs.advice(reason)}"


def _provider_table(
    rows: Iterable[tuple[Provider, int, int, tuple[int, float]]], *, with_run: bool
) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("provider")
    headings = ["ops", "calls and launches", *(["launched", "µs"] if with_run else [])]
    for heading in headings:
        table.add_column(heading, justify="right")
    for provider, ops, calls, (launched, time_us) in rows:
        cells = [str(ops), str(calls), *([str(launched), f"{time_us:.1f}"] if with_run else [])]
        table.add_row(Text(provider.value, style="red" if provider.is_violation else ""), *cells)
    return table


def _pass_table(report: AuditReport) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("pass")
    table.add_column("fired", justify="right")
    table.add_column("declined")
    for name, fired, declined in pass_table(report):
        table.add_row(name, fired, Text(declined))
    return table


def kernel_headline(report: KernelReport) -> str:
    """Triton's share of the time and the verdict, in one line."""
    count = len(report.violations)
    verdict = f"{plural(count, 'kernel')} outside Triton" if count else "no kernel outside Triton"
    if report.allowed:
        verdict += f" ({len(report.allowed)} allowed)"
    return (
        f"{percent(report.triton_time_share)} of compute time in Triton; {verdict}; "
        f"{report.launches} launches ({report.device})"
    )


def kernel_renderable(report: KernelReport) -> RenderableType:
    """The run-time report for a rich console: a row a kernel, those outside Triton first."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("kernel", max_width=60, overflow="ellipsis", no_wrap=True)
    table.add_column("provider", no_wrap=True)
    for heading in ("count", "µs", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.violations_first:
        outside = "yellow" if report.is_allowed(row) else "red"
        style = outside if row.is_violation else "dim" if not row.provider.is_compute else ""
        table.add_row(
            Text(row.name, style=style),
            row.provider.value,
            str(row.count),
            f"{row.time_us:.1f}",
            f"{row.share:.1%}" if row.provider.is_compute else "",
        )
    line = Text(kernel_headline(report))
    line.stylize("bold green" if report.is_triton_only else "bold red")
    return Group(line, Text(), table)


def to_text(renderable: RenderableType, width: int) -> str:
    """Plain text, no colour codes."""
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(renderable, soft_wrap=True)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
