"""What each fusion pass is worth: one decode step, with a pass more from bar to bar."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend import environment
from triton_only_backend.bench import generation, models
from triton_only_backend.bench.plots import plot_steps, require_drawable
from triton_only_backend.bench.providers import PROVIDERS, own_options
from triton_only_backend.bench.record import Record, markdown_table

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from triton_only_backend.bench.trial import Plan

# In the order in which they are switched on; the others always are.
PASSES = (
    "fold_kv_expand",
    "merge_linears",
    "fuse_epilogue",
    "fuse_norm",
    "fuse_rope_cache",
    "merge_counters",
    "split_argmax",
    "mark_ready_inputs",
)


def disabled_sets() -> list[tuple[str, tuple[str, ...]]]:
    """The label of each bar and the passes that it leaves out."""
    sets: list[tuple[str, tuple[str, ...]]] = [("none of them", PASSES)]
    for count, name in enumerate(PASSES, start=1):
        sets.append((f"+ {name}", PASSES[count:]))
    return sets


def run(
    plan: Plan,
    console: Console,
    json_path: Path | None,
    plot: Path | None,
    command: str,
) -> int:
    """Measures a step for every set of passes; prints, records and draws it.

    Args:
        plan: the model, its layers, dtype, batch and lengths.

    Raises:
        BenchmarkError: the plan cannot be carried out here.
    """
    if plot is not None:
        require_drawable(plot)
    device = generation.device_for(plan)
    layers = plan.shape.layers
    dtype = models.DTYPES[plan.dtype]
    model = models.build(plan.shape, dtype, device, plan.batch, plan.cache_length)
    record = Record(environment.collect(), command)
    record.summary["plan"] = dict(vars(plan))
    begin = time.perf_counter()
    for label, disabled in disabled_sets():
        provider = replace(
            PROVIDERS["triton_only"],
            options=lambda disabled=disabled: {  # type: ignore[misc]
                **own_options("reduce-overhead" if device.type != "cpu" else None),
                "disable_passes": list(disabled),
            },
        )
        row: dict[str, Any] = {"passes": label, "layers": layers}
        measured = generation.measure_provider(provider, model, plan, None)
        kept = ("ms_per_token", "kernels_per_step", "breakdown_decode", "compile_seconds")
        row.update({key: measured[key] for key in kept})
        record.rows.append(row)
        record.write(json_path)
        seconds = time.perf_counter() - begin
        console.print(f"[{seconds:6.1f} s] {label}: {row['ms_per_token']:.3f} ms", markup=False)
        torch.compiler.reset()
    columns = ["passes", "ms_per_token", "kernels_per_step"]
    console.print(markdown_table(record.rows, columns), markup=False, highlight=False)
    if plot is not None:
        plot_steps(record.rows, plot, f"{plan.model}, {layers} layers, a decode step")
    return 0
