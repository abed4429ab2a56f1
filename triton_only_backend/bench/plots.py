"""Plots of what the benchmarks found."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from triton_only_backend.bench.providers import PROVIDERS
from triton_only_backend.timing import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# What is drawn of a row of `bench model`, and how it is called.
PROVIDER_TIMES = {"ms_per_token": "ms a token", "prefill_ms": "prefill, ms"}


def require_drawable(path: Path) -> None:
    """Says before anything is measured that it could not be drawn.

    Raises:
        BenchmarkError: matplotlib is not installed, or does not write files with this suffix.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError(
            "triton_only: a plot needs matplotlib: pip install 'triton-only-backend[bench]'"
        )
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in known:
        raise BenchmarkError(
            f"triton_only: {path} cannot be drawn: its suffix is none of {', '.join(known)}"
        )


def plot_ratios(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws `speedup` over `M`, one line for each (op, batch, N, K), to a file by its suffix."""
    require_drawable(path)
    from matplotlib.figure import Figure

    lines: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for row in rows:
        key = (row.get("op", "mm"), row.get("batch", 1), row["N"], row["K"])
        lines.setdefault(key, []).append((row["M"], row["speedup"]))
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1.0, color="black", linewidth=0.8)
    for i, ((op, batch, N, K), points) in enumerate(lines.items()):
        what = f"{N} × {K}" if op == "mm" else f"{op} {batch} × {N} × {K}"
        x, y = zip(*sorted(points), strict=True)
        # The colours repeat after ten.
        axes.plot(x, y, ("-", "--", ":")[i // 10 % 3], marker="o", markersize=3, label=what)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["M"] for row in rows})
    axes.set_xticks(ticks, [str(M) for M in ticks])
    axes.set_xlabel("M, rows")
    axes.set_ylabel("ratio, above 1 is faster")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(title="N × K", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_attention(
    rows: Sequence[dict[str, Any]], providers: Sequence[str], path: Path, title: str
) -> None:
    """Draws each provider's rate over the length, a panel for each kind of case.

    Prefill and training in TFLOP/s; decoding in TB/s, a panel for each batch size.
    """
    require_drawable(path)
    from matplotlib.figure import Figure

    panels: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["kind"], row["batch"]), []).append(row)
    panels = {key: found for key, found in panels.items() if len(found) > 1} or panels
    figure = Figure(figsize=(4.5 * len(panels), 4.2), layout="constrained")
    for place, ((kind, batch), found) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        unit = "tb_per_second" if kind == "decode" else "tflop_per_second"
        for provider in providers:
            points = [
                (row["len_kv"], row[f"{provider}_{unit}"])
                for row in found
                if row.get(f"{provider}_{unit}") is not None
            ]
            if points:
                width = 2.2 if provider == "ours" else 1.0
                lengths, rates = zip(*sorted(points), strict=True)
                axes.plot(lengths, rates, marker="o", markersize=3, linewidth=width, label=provider)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["len_kv"] for row in found})
        axes.set_xticks(ticks, [str(length) for length in ticks], rotation=45)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("keys" if kind == "decode" else "length")
        axes.set_ylabel("TB/s" if kind == "decode" else "TFLOP/s")
        axes.set_title(f"{kind}, batch {batch}", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_steps(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws where the microseconds of a step go, a stacked bar for each of `rows`.

    What the step takes beyond its kernels is of the measured step: the profiler makes gaps.
    """
    require_drawable(path)
    from matplotlib.figure import Figure

    from triton_only_backend.bench.breakdown import GAPS, PARTS

    figure = Figure(figsize=(9, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    labels = [row["passes"] for row in rows]
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [row["breakdown_decode"][part] for row in rows]
        if part == GAPS:  # the last of them
            steps = [1e3 * row["ms_per_token"] for row in rows]
            widths = [max(0.0, step - end) for step, end in zip(steps, left, strict=True)]
        if any(widths):
            axes.barh(labels, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for label, end in zip(labels, left, strict=True):
        axes.text(end, label, f" {end:,.0f}", va="center", fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("µs")
    axes.margins(x=0.08)
    axes.set_title(title)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_providers(
    records: Sequence[tuple[str, Sequence[dict[str, Any]]]], path: Path, title: str
) -> None:
    """Draws the time of a token and of a prefill for each provider, a group for each model.

    Args:
        records: names of models and their rows, of which none is empty.
    """
    require_drawable(path)
    from matplotlib.figure import Figure

    found = {row["provider"] for _, rows in records for row in rows}
    order = [*PROVIDERS, *sorted(found - PROVIDERS.keys())]
    figure = Figure(figsize=(3 + 3 * len(records), 7.5), layout="constrained")
    panels = figure.subplots(len(PROVIDER_TIMES))
    width = 0.8 / max(len(rows) for _, rows in records)
    for axes, (key, unit) in zip(panels, PROVIDER_TIMES.items(), strict=True):
        bars: dict[str, list[tuple[float, float]]] = {provider: [] for provider in order}
        for group, (_, rows) in enumerate(records):
            ordered = sorted(rows, key=lambda row: order.index(row["provider"]))
            for i, row in enumerate(ordered):
                place = group + (i - (len(rows) - 1) / 2) * width
                bars[row["provider"]].append((place, row[key]))
        for i, (provider, drawn) in enumerate(bars.items()):
            if drawn:
                about = f": {PROVIDERS[provider].about}" if provider in PROVIDERS else ""
                places, times = zip(*drawn, strict=True)
                container = axes.bar(
                    places, times, width=width, color=f"C{i}", label=f"{provider}{about}"
                )
                axes.bar_label(container, fmt="%.3g", fontsize="x-small")
        axes.set_xticks(range(len(records)), [name for name, _ in records], fontsize="small")
        axes.set_xlim(-0.5, len(records) - 0.5)
        axes.set_axisbelow(True)
        axes.margins(y=0.1)
        axes.set_ylabel(unit)
        every = [row[key] for _, rows in records for row in rows]
        if max(every) > 20 * min(every):  # one that is bound by the host hides the rest
            axes.set_yscale("log")
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    columns = max(1, len(records) // 2)
    figure.legend(handles, labels, fontsize="small", ncols=columns, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
