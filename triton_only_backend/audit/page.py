"""Reports as one page of HTML: nothing is fetched, and everything can be read without a mouse."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_only_backend.audit import cudagraphs
from triton_only_backend.audit import render as texts
from triton_only_backend.audit.findings import module_pattern
from triton_only_backend.audit.operations import OpRow, count_by_provider, percent
from triton_only_backend.audit.policy import Provider

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from triton_only_backend.audit.kernel_report import KernelReport
    from triton_only_backend.audit.report import AuditReport

_FILES = Path(__file__).with_name("page_files")
_ABOUT = ("target", "gpu", "torch", "triton", "triton_only_backend", "date")


@dataclass(frozen=True)
class Tile:
    """One figure at the head of the page; `part`, 0 to 1, is drawn as a bar."""

    figure: str
    label: str
    part: float | None = None


@dataclass(frozen=True)
class Bar:
    """A bar of which each provider has a part; `text` says the same in words."""

    label: str
    parts: list[tuple[Provider, float]]

    @property
    def text(self) -> str:
        """`cuBLAS 12.0%, Triton (Inductor) 88.0%`."""
        return ", ".join(f"{provider.value} {percent(part)}" for provider, part in self.parts)


def render(audit: AuditReport | None, run: KernelReport | None) -> str:
    """The page of an audit, of a run, or of both."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FILES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"slug": slug, "percent": percent, "advice": cudagraphs.advice}
    context: dict[str, Any] = {"run": run, "allow": list(run.allow if run else ())}
    context |= _audit_context(audit)
    context |= _run_context(audit, run)
    facts = context["environment"]
    context["about"] = texts.facts_line({key: facts.get(key) for key in _ABOUT})
    return environment.get_template("page.html").render(context)


def slug(provider: Provider) -> str:
    """The provider's CSS class, without its prefix: "triton-ours"."""
    return provider.name.lower().replace("_", "-")


def _audit_context(audit: AuditReport | None) -> dict[str, Any]:
    if audit is None:
        empty: tuple[Any, ...] = ()
        names = ("tiles", "sections", "providers", "bars", "strips", "ops", "passes", "breaks")
        return dict.fromkeys(names, empty) | {"cudagraphs": None}
    state = audit.cudagraphs
    return {
        "kind": "triton-only audit",
        "title": f"triton-only audit: {texts.headline(audit)}",
        "verdict": texts.headline(audit),
        "clean": audit.is_triton_only,
        "environment": audit.environment,
        "tiles": _tiles(audit),
        "sections": texts.sections(audit),
        "providers": texts.provider_rows(audit),
        "bars": _bars(audit),
        "strips": _strips(audit.ops),
        "strip_providers": _violations_first({row.provider for row in audit.ops}),
        "ops": [_OpView.of(row) for row in sorted(audit.ops, key=_outside_first)],
        "passes": texts.pass_table(audit),
        "breaks": audit.graph_breaks,
        "breaks_line": texts.break_line(audit),
        "cudagraphs": state,
        "cudagraphs_line": "" if state is None else f"CUDA graphs: {cudagraphs.headline(state)}",
        "allow": audit.allow,
    }


def _run_context(audit: AuditReport | None, run: KernelReport | None) -> dict[str, Any]:
    if run is None:
        return {"timeline": None}
    line = texts.kernel_headline(run)
    context = {"run_line": line, "kernels": run.violations_first, "timeline": _timeline(run)}
    if audit is not None:
        return context
    alone = {
        "kind": "triton-only profile",
        "title": f"triton-only profile: {line}",
        "verdict": line,
        "clean": run.is_triton_only,
        "environment": run.environment,
    }
    return context | alone


def _tiles(audit: AuditReport) -> list[Tile]:
    coverage = audit.coverage
    tiles = [
        Tile(percent(part), f"{label} in Triton", part)
        for part, label in (
            (coverage.ops, "of the ops"),
            (coverage.calls, "of the calls and launches"),
            (coverage.time, texts.time_label(audit.run)),
        )
        if part is not None
    ]
    for count, noun, rest in (
        (audit.violation_count, "operation", " outside Triton"),
        (len(audit.graph_breaks), "graph break", ""),
    ):
        tiles.append(Tile(str(count), f"{texts.plural(count, noun).split(' ', 1)[1]}{rest}"))
    if audit.cudagraphs is not None:
        tiles.append(Tile(cudagraphs.headline(audit.cudagraphs).split(" for ")[0], "CUDA graphs"))
    return tiles


def _bars(audit: AuditReport) -> list[Bar]:
    run = {} if audit.run is None else {p: time for p, (_, time) in audit.run.totals().items()}
    sources: list[tuple[str, Mapping[Provider, float]]] = [
        ("ops", count_by_provider(audit.ops)),
        ("calls and launches", audit.operations),
        ("time", run),
    ]
    return [Bar(label, _parts(amounts)) for label, amounts in sources if sum(amounts.values())]


def _parts(amounts: Mapping[Provider, float]) -> list[tuple[Provider, float]]:
    total = sum(amounts.values())
    return [(p, amounts[p] / total) for p in _violations_first(amounts) if amounts[p]]


def _violations_first(providers: Iterable[Provider]) -> list[Provider]:
    order = list(Provider)
    return sorted(providers, key=lambda p: (not p.is_violation, order.index(p)))


def _outside_first(row: OpRow) -> tuple[bool, bool]:
    return not row.provider.is_violation, row.provider is Provider.NONE


@dataclass(frozen=True)
class _OpView:
    """A row of the table of ops, with the names that the template shares with findings."""

    op: str
    count: int
    provider: Provider
    note: str
    shapes: str
    source_line: str
    module_path: str
    graph: str
    call: str = ""

    @classmethod
    def of(cls, row: OpRow) -> _OpView:
        known = row.inputs or row.outputs
        shapes = f"{', '.join(row.inputs)} → {', '.join(row.outputs)}".strip() if known else ""
        return cls(
            op=row.op,
            count=row.count,
            provider=row.provider,
            note=row.note,
            shapes=shapes,
            source_line=row.source_line,
            module_path=module_pattern(row.modules),
            graph=row.graph,
        )


def _strips(rows: Iterable[OpRow]) -> list[dict[str, Any]]:
    """Each graph's ops, one by one, in their order."""
    graphs: dict[str, list[tuple[int, OpRow]]] = {}
    for row in rows:
        graphs.setdefault(row.graph, []).extend((position, row) for position in row.positions)
    strips = []
    for graph, places in graphs.items():
        boxes = [row for _, row in sorted(places, key=lambda place: place[0])]
        counts = {p: sum(row.provider is p for row in boxes) for p in {r.provider for r in boxes}}
        told = (f"{counts[p]} {p.value}" for p in _violations_first(counts))
        strips.append({"graph": graph, "boxes": boxes, "text": f"{graph}: {', '.join(told)}"})
    return strips


def _timeline(run: KernelReport) -> dict[str, Any] | None:
    """The launches as bars, a lane for each provider, those outside Triton on top."""
    if not run.events:
        return None
    lanes = _violations_first({event.provider for event in run.events})
    names = {name: number for number, name in enumerate(dict.fromkeys(e.name for e in run.events))}
    bars = [
        {
            "provider": event.provider,
            "x": round(event.start_us, 3),
            "width": round(event.time_us, 3),
            "lane": lanes.index(event.provider),
            "kernel": names[event.name],
        }
        for event in run.events
    ]
    span = max(event.start_us + event.time_us for event in run.events)
    shown, launches = len(run.events), run.launches
    about = f"{launches} launch{'' if launches == 1 else 'es'} in {span:,.0f} µs"
    if shown < launches:
        about += f"; {shown} are shown: those outside Triton, then the longest"
    told = ", ".join(f"{lane.value} {run.totals()[lane][1]:,.0f} µs" for lane in lanes)
    return {
        "about": about,
        "text": f"Timeline of one step. {told}",
        "lanes": lanes,
        "bars": bars,
        "span": max(round(span, 3), 0.001),
        "kernels": list(names),
    }
