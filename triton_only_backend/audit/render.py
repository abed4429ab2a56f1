"""Reports as text, Markdown and HTML. The content is the reports'; only the layout is here."""

from __future__ import annotations

import io
from textwrap import indent
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from triton_only_backend.audit.report import AuditReport, Finding
    from triton_only_backend.audit.runtime import KernelReport

_SHOWN = 20  # findings that an error message spells out


def error_message(report: AuditReport) -> str:
    """The text of an AuditError: how many operations, then each finding in a few lines."""
    total = report.violation_count
    noun = "operation" if total == 1 else "operations"
    blocks = [f"{total} {noun} would run outside Triton"]
    blocks += [finding_block(finding) for finding in report.findings[:_SHOWN]]
    hidden = len(report.findings) - _SHOWN
    if hidden > 0:
        blocks.append(f"… and {hidden} more findings; the report lists them all")
    return "\n\n".join(blocks)


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


def _headline(report: AuditReport) -> str:
    graphs = f"{len(report.graphs)} graph{'' if len(report.graphs) == 1 else 's'}"
    if report.findings:
        return f"{error_message(report).splitlines()[0]} ({graphs})"
    if not report.graphs:
        return "Nothing was compiled, so nothing was audited"
    allowed = sum(finding.count for finding in report.allowed)
    suffix = f", {allowed} allowed" if allowed else ""
    return f"Triton only: no library call in {graphs}{suffix}"


def _break_line(report: AuditReport) -> str:
    count = len(report.graph_breaks)
    return f"{count} graph break{'' if count == 1 else 's'}: the code between graphs is not audited"


def audit_renderable(report: AuditReport) -> RenderableType:
    """The report for a rich console."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    style = "bold green" if report.is_triton_only else "bold red"
    parts: list[RenderableType] = [Text(_headline(report), style=style)]
    if report.operations:
        table = Table(box=None, padding=(0, 2), header_style="bold")
        table.add_column("provider")
        table.add_column("operations", justify="right")
        for provider, count in sorted(report.operations.items(), key=lambda item: -item[1]):
            table.add_row(
                Text(provider.value, style="red" if provider.is_violation else ""), str(count)
            )
        parts += [Text(), table]
    for title, findings in (("Findings", report.findings), ("Allowed", report.allowed)):
        if findings:
            parts += [Text(), Text(title, style="bold")]
            parts += [Text(indent(finding_block(f), "  ") + "\n") for f in findings]
    if report.graph_breaks:
        parts += [Text(), Text(_break_line(report), style="yellow")]
        parts += [Text(f"  {reason}") for reason in report.graph_breaks]
    if report.environment:
        facts = ", ".join(f"{key} {value}" for key, value in report.environment.items())
        parts += [Text(), Text(facts, style="dim")]
    return Group(*parts)


def audit_markdown(report: AuditReport) -> str:
    """The report as Markdown."""
    lines = [f"**{_headline(report)}**", ""]
    if report.operations:
        lines += ["| provider | operations |", "|---|---:|"]
        ordered = sorted(report.operations.items(), key=lambda item: -item[1])
        lines += [f"| {provider.value} | {count} |" for provider, count in ordered]
        lines.append("")
    for title, findings in (("Findings", report.findings), ("Allowed", report.allowed)):
        if findings:
            lines += [
                f"### {title}",
                "",
                "| op | × | shapes | provider | where | why | do |",
            ]
            lines.append("|---|---:|---|---|---|---|---|")
            lines += [_markdown_row(finding) for finding in findings]
            lines.append("")
    if report.graph_breaks:
        lines += [_break_line(report), "", *(f"- {r}" for r in report.graph_breaks), ""]
    if report.environment:
        facts = (f"{key} {value}" for key, value in report.environment.items())
        lines += [", ".join(facts), ""]
    return "\n".join(lines)


def _markdown_row(finding: Finding) -> str:
    where = [finding.source_line and f"`{finding.source_line}`", finding.module_path, finding.graph]
    cells = [
        f"`{finding.op}`",
        str(finding.count),
        finding.shapes,
        finding.provider.value,
        "<br>".join(part for part in where if part),
        finding.why,
        finding.remedy,
    ]
    escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def kernel_renderable(report: KernelReport) -> RenderableType:
    """The run-time report for a rich console: one row a kernel, the longest first."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    share = f"{report.triton_time_share:.1%} of compute time in Triton"
    violations = len(report.violations)
    noun = "kernel" if violations == 1 else "kernels"
    verdict = f"{violations} {noun} outside Triton" if violations else "no kernel outside Triton"
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("kernel", max_width=60, overflow="ellipsis", no_wrap=True)
    table.add_column("provider")
    for heading in ("count", "µs", "share"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        style = "red" if row.is_violation else "dim" if not row.provider.is_compute else ""
        table.add_row(
            Text(row.name, style=style),
            row.provider.value,
            str(row.count),
            f"{row.time_us:.1f}",
            f"{row.share:.1%}" if row.provider.is_compute else "",
        )
    headline = Text(f"{share}; {verdict}; {report.launches} launches ({report.device})")
    headline.stylize("bold red" if violations else "bold green")
    return Group(headline, Text(), table)


def to_text(renderable: RenderableType, width: int) -> str:
    """Plain text, no colour codes."""
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(renderable, soft_wrap=True)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def to_html(renderable: RenderableType) -> str:
    """A page of HTML with the styles in it."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(renderable)
    return console.export_html(inline_styles=True)
