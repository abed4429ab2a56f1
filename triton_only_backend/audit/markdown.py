"""Reports as Markdown for a pull request: the verdict and the findings, all else folded away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton_only_backend.audit import baseline as baselines
from triton_only_backend.audit import cudagraphs, render

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from triton_only_backend.audit.findings import Finding
    from triton_only_backend.audit.kernel_report import KernelReport
    from triton_only_backend.audit.report import AuditReport


def audit_report(report: AuditReport, baseline: AuditReport | None = None) -> str:
    """The report; with a baseline, what changed stands first."""
    blocks = [f"**{_escape(render.headline(report))}**"]
    facts = [render.coverage_line(report)]
    if report.cudagraphs is not None:
        facts.append(f"CUDA graphs: {cudagraphs.headline(report.cudagraphs)}")
    if report.graph_breaks:
        facts.append(render.break_line(report))
    blocks.append(" · ".join(fact for fact in facts if fact))
    if baseline is not None:
        difference = baselines.compare(baseline, report)
        lines = difference.to_text().splitlines()
        blocks.append(f"**{lines[0]}**")
        if len(lines) > 1:
            blocks.append(_fenced("\n".join(line[2:] for line in lines[1:]), "diff"))
    for title, findings in render.sections(report):
        table = _findings_table(findings)
        if findings is report.findings:
            blocks += [f"### {title}", table]
        else:
            blocks.append(_folded(f"{title} ({len(findings)})", table))
    blocks += [*_providers(report), *_passes(report), *_breaks(report), *_cudagraphs(report)]
    if report.run is not None:
        blocks.append(_folded("The run, kernel by kernel", _kernels(report.run)))
    if report.environment:
        blocks.append(_folded("Environment", _escape(render.facts_line(report.environment))))
    return "\n\n".join(block for block in blocks if block) + "\n"


def kernel_report(report: KernelReport) -> str:
    """A profiled run."""
    facts = _escape(render.facts_line(report.environment))
    return "\n\n".join(filter(None, [_kernels(report), facts])) + "\n"


def _kernels(report: KernelReport) -> str:
    rows = [
        (
            _code(row.name),
            row.provider.value + (" (allowed)" if report.is_allowed(row) else ""),
            str(row.count),
            f"{row.time_us:.1f}",
            f"{row.share:.1%}" if row.provider.is_compute else "",
        )
        for row in report.violations_first
    ]
    table = _table(("kernel", "provider", "×", "µs", "share"), "llrrr", rows)
    return f"**{_escape(render.kernel_headline(report))}**\n\n{table}"


def _providers(report: AuditReport) -> list[str]:
    rows = [
        (provider.value, str(ops), str(calls), f"{time_us:.1f}" if launched else "")
        for provider, ops, calls, (launched, time_us) in render.provider_rows(report)
    ]
    heads = ("provider", "ops", "calls and launches", "µs")
    if report.run is None:
        heads, rows = heads[:3], [row[:3] for row in rows]  # type: ignore[assignment,misc]
    return [_folded("Who runs what", _table(heads, "lrrr", rows))] if rows else []


def _passes(report: AuditReport) -> list[str]:
    rows = [(name, fired, _escape(why)) for name, fired, why in render.pass_table(report)]
    heads = ("pass", "fired", "declined")
    return [_folded("What the passes did", _table(heads, "lrl", rows))] if rows else []


def _breaks(report: AuditReport) -> list[str]:
    if not report.graph_breaks:
        return []
    title = render.plural(len(report.graph_breaks), "graph break")
    return [_folded(title, "\n\n".join(map(_fenced, report.graph_breaks)))]


def _cudagraphs(report: AuditReport) -> list[str]:
    if report.cudagraphs is None or not report.cudagraphs["skipped"]:
        return []
    items = []
    for reason in report.cudagraphs["skipped"]:
        remedy = cudagraphs.advice(reason)
        items += [_fenced(reason), _escape(f"What to do: {remedy}") if remedy else ""]
    return [_folded("CUDA graphs were skipped", "\n\n".join(filter(None, items)))]


def _findings_table(findings: Iterable[Finding]) -> str:
    rows = []
    for finding in findings:
        source = _code(finding.source_line) if finding.source_line else ""
        where = [source, _escape(finding.module_path), finding.graph]
        cells = (
            _code(finding.op),
            str(finding.count),
            _escape(finding.shapes),
            finding.provider.value,
            "<br>".join(part for part in where if part),
            _escape(finding.why),
            _escape(finding.remedy),
        )
        rows.append(cells)
    return _table(("op", "×", "shapes", "provider", "where", "why", "do"), "lrlllll", rows)


def _table(headings: Sequence[str], alignment: str, rows: Iterable[Sequence[str]]) -> str:
    rule = "|".join("---:" if side == "r" else "---" for side in alignment[: len(headings)])
    lines = [f"| {' | '.join(headings)} |", f"|{rule}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _fenced(text: str, language: str = "text") -> str:
    """Text of many lines, as it is."""
    return f"````{language}\n{text.strip()}\n````"


def _code(text: str) -> str:
    """Text in a code span inside a table: a backtick would end it, a bar the cell."""
    return f"`{_one_line(text).replace('`', chr(0x2BC)).replace('|', chr(92) + '|')}`"


def _escape(text: str) -> str:
    """Text that Markdown leaves as it is."""
    for sign in "\\`*|<":
        text = text.replace(sign, f"\\{sign}")
    return _one_line(text)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
