"""Prefill and decode of a whole model, eager, by Inductor and by this backend, in one run.

Every provider runs the same step function over the same weights, and greedy decoding through a
static cache. One eager prefill and step come first: a cache first touched inside a compiled region
would make PyTorch skip CUDA graphs without a word. Two graphs are compiled, one for the prefill and
one for the decode step; the first call of each counts as compilation.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from triton_only_backend import environment, interpreter
from triton_only_backend.bench import models, providers
from triton_only_backend.bench.breakdown import breakdown
from triton_only_backend.bench.comparison import compare, floors, shares
from triton_only_backend.bench.exclusive import exclusive
from triton_only_backend.bench.record import Record, format_value
from triton_only_backend.bench.trial import (
    COMPARED_STEPS,
    PROFILED_STEP,
    Plan,
    Stopwatch,
    Trial,
    make_tokens,
    synchronize,
)
from triton_only_backend.timing import BenchmarkError, ceilings, relative_error

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from triton_only_backend.audit import KernelReport
    from triton_only_backend.bench.providers import Provider

COLUMNS = {
    "provider": "provider",
    "prefill_ms": "prefill ms",
    "ms_per_token": "ms a token",
    "floor_share": "of the floor",
    "tokens_per_second": "tokens/s",
    "kernels_per_step": "kernels a step",
    "triton_share_decode": "Triton share, decode",
    "triton_share_prefill": "Triton share, prefill",
    "compile_seconds": "compile s",
    "peak_memory_gib": "peak GiB",
    "cudagraph_skips": "graph skips",
    "logits_error": "logits error",
}


@torch.no_grad()
def measure_provider(
    provider: Provider, model: torch.nn.Module, plan: Plan, reference: torch.Tensor | None
) -> dict[str, Any]:
    """A row of the benchmark.

    Args:
        reference: see `compared_logits`; None to leave the comparison out.
    """
    device = models.device_of(model)
    on_gpu = device.type != "cpu"
    providers.reset()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with exclusive(device):
        trial = Trial(model, provider, plan)
    row: dict[str, Any] = {"provider": provider.name}

    with exclusive(device) if provider.tunes else contextlib.nullcontext():
        begin = time.perf_counter()
        for _ in trial.decode(1):
            synchronize(trial.device)
        first_seconds = time.perf_counter() - begin
    row["compile_seconds"] = first_seconds if provider.is_compiled else None
    with exclusive(device):
        for _ in range(plan.warmup):
            trial.prefill()
        row.update(_measure(trial, provider, reference))
    row.update(providers.compilation_counts() if provider.is_compiled else {})
    if on_gpu:
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def _measure(trial: Trial, provider: Provider, reference: torch.Tensor | None) -> dict[str, Any]:
    """What is timed, compared and profiled of a warm trial."""
    plan = trial.plan
    row: dict[str, Any] = {}
    prefills = []
    for _ in range(plan.prefills):
        trial.decoder.reset()
        synchronize(trial.device)
        watch = Stopwatch(trial.device)
        watch.mark()
        trial.call(trial.prompt, trial.positions)
        watch.mark()
        prefills += watch.intervals_ms()
    row.update(_distribution("prefill_ms", prefills))

    most = plan.new_tokens if provider.is_compiled else plan.eager_tokens
    new_tokens = min(plan.new_tokens, most)
    watch = Stopwatch(trial.device)
    for _ in trial.decode(new_tokens - 1):
        watch.mark()
    # The intervals begin at the end of the prefill; the first steps still record CUDA graphs.
    intervals = watch.intervals_ms()
    intervals = intervals[min(plan.warmup + 1, len(intervals) // 2) :]
    row.update(_distribution("ms_per_token", intervals))
    row["tokens_per_second"] = plan.batch * 1e3 / statistics.mean(intervals)

    if reference is not None:
        logits = compared_logits(trial)
        row["logits_error"] = relative_error(logits, reference)
        row["logits_error_prefill"] = relative_error(logits[:, 0], reference[:, 0])
        row["logits_error_decode"] = relative_error(logits[:, 1:], reference[:, 1:])
        del logits
    row.update(_profiled("decode", profile_step(trial)))
    row.update(_profiled("prefill", profile_prefill(trial)))
    return row


def _distribution(name: str, values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        name: statistics.median(ordered),
        f"{name}_p20": ordered[round(0.2 * last)],
        f"{name}_p80": ordered[round(0.8 * last)],
    }


def compared_logits(trial: Trial) -> torch.Tensor:
    """Scores after the prompt and after each of the given tokens, fp32, shape (B, 1 + steps, V)."""
    given = trial.tokens[:, trial.plan.prompt :]
    steps = trial.decode(given.shape[1], given)
    # Copied: the next replay of a CUDA graph overwrites them.
    return torch.stack([logits.to(torch.float32, copy=True) for _, logits in steps], dim=1)


def profile_step(trial: Trial) -> KernelReport:
    """Every kernel of one decode step."""
    from triton_only_backend.audit import profile

    tokens = trial.prompt[:, :1]
    for next_tokens, _ in trial.decode(PROFILED_STEP):
        tokens = next_tokens.clone()
    positions = trial.positions[-1:] + 1 + PROFILED_STEP
    return profile(trial.call, tokens, positions, warmup=0)


def profile_prefill(trial: Trial) -> KernelReport:
    """Every kernel of one prefill."""
    from triton_only_backend.audit import profile

    trial.decoder.reset()
    return profile(trial.call, trial.prompt, trial.positions, warmup=0)


def _profiled(what: str, report: KernelReport) -> dict[str, Any]:
    name = {"decode": "kernels_per_step", "prefill": "kernels_per_prefill"}[what]
    return {
        name: sum(row.count for row in report.rows if row.provider.is_compute),
        f"triton_share_{what}": report.triton_time_share,
        f"kernel_ms_{what}": sum(row.time_us for row in report.rows) / 1e3,
        f"violations_{what}": [row.name for row in report.violations],
        f"breakdown_{what}": breakdown(report),
        # Without the single events: the sums say what a benchmark needs in a hundredth of the size.
        f"profile_{what}": {k: v for k, v in report.to_dict().items() if k != "events"},
    }


def run(plan: Plan, console: Console, json_path: Path | None, command: str) -> int:
    """Measures each provider, prints a table, and writes the record after every provider.

    Returns:
        The exit status: 1 if our backend ran a kernel outside Triton, else 0.

    Raises:
        BenchmarkError: the plan cannot be carried out here.
    """
    device = device_for(plan)
    shape = plan.shape
    if plan.cache_length > shape.max_length:
        raise BenchmarkError(
            f"triton_only: a cache of {plan.cache_length} tokens is longer than the "
            f"{shape.max_length} positions of {plan.model}; use a shorter --prompt or fewer "
            "--new-tokens"
        )
    begin = time.perf_counter()

    def log(text: str) -> None:
        seconds = time.perf_counter() - begin
        console.print(f"[{seconds:6.1f} s] {text}", markup=False, highlight=False)

    dtype = models.DTYPES[plan.dtype]
    model = models.build(shape, dtype, device, plan.batch, plan.cache_length)
    log(
        f"{plan.model}, {shape.layers} layers, {plan.dtype}, batch {plan.batch}, "
        f"{plan.prompt} tokens in, {plan.new_tokens} out, cache of {plan.cache_length}"
    )
    record = Record(environment.collect(), command)
    record.summary["plan"] = dict(vars(plan))
    if device.type != "cpu":
        record.summary.update(floors(model, plan, ceilings(dtype)))
    reference = None
    if plan.logits_error:
        tokens = make_tokens(plan, device)
        with exclusive(device):  # of the fp32 copies, twice the model's size, one at a time
            reference = models.reference_logits(model, tokens, COMPARED_STEPS + 1)
            if device.type != "cpu":
                torch.cuda.empty_cache()
        log("fp32 reference done")
    for name in plan.providers:
        row = measure_provider(providers.PROVIDERS[name], model, plan, reference)
        row.update(shares(row, record.summary))
        record.rows.append(row)
        record.summary.update(compare(record.rows))
        record.write(json_path)
        log(
            f"{name}: prefill {row['prefill_ms']:.2f} ms, {row['ms_per_token']:.3f} ms a token, "
            f"compiled in {format_value(row['compile_seconds'])} s"
        )
    _print(console, record)
    return int(any(outside_triton(row) for row in record.rows))


def outside_triton(row: dict[str, Any]) -> list[str]:
    """The kernels that this backend, compiled, ran outside Triton."""
    provider = providers.PROVIDERS[row["provider"]]
    if not (provider.is_ours and provider.is_compiled):
        return []
    return sorted({*row["violations_decode"], *row["violations_prefill"]})


def is_interpreted() -> bool:
    """Whether models run on the CPU in the Triton interpreter."""
    return interpreter.wanted()


def device_for(plan: Plan) -> torch.device:
    """The device that a plan runs on.

    Raises:
        BenchmarkError: there is none for this model.
    """
    if not is_interpreted():
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        raise BenchmarkError("triton_only: the model benchmark needs a CUDA or ROCm GPU")
    if plan.model not in models.INTERPRETABLE:
        raise BenchmarkError(
            f"triton_only: {plan.model} needs a CUDA or ROCm GPU; the Triton interpreter can run "
            f"{', '.join(models.INTERPRETABLE)}"
        )
    return torch.device("cpu")


def _print(console: Console, record: Record) -> None:
    table = Table(header_style="bold")
    for key, heading in COLUMNS.items():
        table.add_column(heading, justify="left" if key == "provider" else "right")
    for row in record.rows:
        table.add_row(*(format_value(row.get(key)) for key in COLUMNS))
    console.print(table)
    for key, value in record.summary.items():
        if key not in ("plan", "step_bytes", "prefill_flops"):
            console.print(f"{key}: {format_value(value)}", markup=False, highlight=False)
    for row in record.rows:
        for name in outside_triton(row):
            console.print(f"outside Triton: {name}", markup=False, highlight=False)
