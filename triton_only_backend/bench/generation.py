"""Prefill and decode of a whole model, eager, by Inductor and by this backend, in one run.

Every provider runs the same step function over the same weights, and greedy decoding through a
static cache. One eager prefill and step come first: a cache first touched inside a compiled region
would make PyTorch skip CUDA graphs without a word. Two graphs are compiled, one for the prefill and
one for the decode step; the first call of each counts as compilation.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from triton_only_backend import environment, interpreter
from triton_only_backend.bench import models, providers
from triton_only_backend.bench.record import Record, format_value
from triton_only_backend.bench.timing import BenchmarkError, Ceilings, ceilings, relative_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console
    from transformers import LlamaForCausalLM

    from triton_only_backend.audit import KernelReport
    from triton_only_backend.bench.providers import Provider
    from triton_only_backend.demo.generate import StaticDecoder

CACHE_MULTIPLE = 16
# Decode steps on given tokens, besides the prefill, over which logits are compared.
COMPARED_STEPS = 4
# Steps before the profiled one: CUDA graphs have been recorded by then.
PROFILED_STEP = 2

COLUMNS = {
    "provider": "provider",
    "prefill_ms": "prefill ms",
    "ms_per_token": "ms a token",
    "tokens_per_second": "tokens/s",
    "kernels_per_step": "kernels a step",
    "triton_share_decode": "Triton share, decode",
    "triton_share_prefill": "Triton share, prefill",
    "compile_seconds": "compile s",
    "peak_memory_gib": "peak GiB",
    "cudagraph_skips": "graph skips",
    "logits_error": "logits error",
}


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        model: a key of `models.MODELS`.
        dtype: a key of `models.DTYPES`.
        batch: sequences.
        prompt: tokens in each.
        new_tokens: tokens to generate for each, the first of which the prefill gives.
        providers: keys of `providers.PROVIDERS`.
        logits_error: whether to compare logits with those of an fp32 model.
        prefills: timed prefills.
        warmup: prefills and steps after the first, untimed: CUDA graphs need two to be recorded.
        eager_tokens: upper bound of `new_tokens` for a provider that does not compile.
    """

    model: str
    dtype: str
    batch: int
    prompt: int
    new_tokens: int
    providers: tuple[str, ...]
    logits_error: bool
    prefills: int = 7
    warmup: int = 3
    eager_tokens: int = 64

    def for_interpreter(self) -> Plan:
        """The same with as little repetition as can be: the interpreter takes a second a step."""
        return replace(self, prefills=1, warmup=0)

    @property
    def cache_length(self) -> int:
        """Tokens that the cache holds: at least those that are generated, compared, profiled."""
        steps = max(self.new_tokens, COMPARED_STEPS + 1, PROFILED_STEP + 2)
        return -(-(self.prompt + steps) // CACHE_MULTIPLE) * CACHE_MULTIPLE


class Stopwatch:
    """Marks moments on the device's own time line without waiting for it; on a CPU, the host's."""

    def __init__(self, device: torch.device) -> None:
        """Starts without a mark."""
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Marks the end of what was launched so far."""
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def intervals_ms(self) -> list[float]:
        """Milliseconds between successive marks."""
        synchronize(self._device)
        pairs = itertools.pairwise(self._marks)
        if self._device.type == "cpu":
            return [(end - begin) * 1e3 for begin, end in pairs]
        return [begin.elapsed_time(end) for begin, end in pairs]


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def make_tokens(plan: Plan, device: torch.device) -> torch.Tensor:
    """The prompt and the tokens on which logits are compared: (B, prompt + COMPARED_STEPS)."""
    generator = torch.Generator().manual_seed(1)
    size = (plan.batch, plan.prompt + COMPARED_STEPS)
    vocabulary = models.MODELS[plan.model].vocabulary
    return torch.randint(0, vocabulary, size, generator=generator).to(device)


class Trial:
    """One provider's step function over its own cache.

    Attributes:
        decoder: owner of the cache.
        step: (tokens (B, S), positions (S,)) to the next tokens (B, 1) and their scores (B, V);
            overwritten by the next call where CUDA graphs are on.
    """

    def __init__(self, model: LlamaForCausalLM, provider: Provider, plan: Plan) -> None:
        """Makes the cache, and runs a prefill and a step uncompiled."""
        from triton_only_backend.demo.generate import StaticDecoder

        self.plan = plan
        self.decoder: StaticDecoder = StaticDecoder(model, plan.cache_length, plan.batch)
        self.device = torch.device(model.device)
        self.tokens = make_tokens(plan, self.device)
        self.prompt = self.tokens[:, : plan.prompt].contiguous()
        self.positions = torch.arange(plan.prompt, device=self.device)
        self.step: Callable[..., Any] = self._step
        for _ in self.decode(1):
            pass
        self.step = provider.prepare(self._step, on_gpu=self.device.type != "cpu")

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.decoder.logits(tokens, positions)
        return logits.argmax(dim=-1, keepdim=True), logits

    def call(
        self, tokens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One call of the step function, a new iteration for CUDA graphs."""
        torch.compiler.cudagraph_mark_step_begin()
        next_tokens, logits = self.step(tokens, positions)
        return next_tokens, logits

    def prefill(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt through an empty cache."""
        self.decoder.reset()
        synchronize(self.device)
        return self.call(self.prompt, self.positions)

    def decode(
        self, steps: int, given: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A prefill and `steps` greedy steps; or, with tokens (B, steps) given, steps on those."""
        tokens, logits = self.prefill()
        yield tokens, logits
        positions = self.positions[-1:] + 1
        for i in range(steps):
            tokens = tokens.clone() if given is None else given[:, i : i + 1].contiguous()
            tokens, logits = self.call(tokens, positions)
            yield tokens, logits
            positions = positions + 1


@torch.no_grad()
def measure_provider(
    provider: Provider, model: LlamaForCausalLM, plan: Plan, reference: torch.Tensor | None
) -> dict[str, Any]:
    """A row of the benchmark.

    Args:
        reference: see `compared_logits`; None to leave the comparison out.
    """
    on_gpu = model.device.type != "cpu"
    providers.reset()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trial = Trial(model, provider, plan)
    row: dict[str, Any] = {"provider": provider.name}

    begin = time.perf_counter()
    for _ in trial.decode(1):
        synchronize(trial.device)
    first_seconds = time.perf_counter() - begin
    row["compile_seconds"] = first_seconds if provider.is_compiled else None
    for _ in range(plan.warmup):
        trial.prefill()

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
    row.update(providers.compilation_counts() if provider.is_compiled else {})
    if on_gpu:
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
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
        # Without the single events: the sums say what a benchmark needs in a hundredth of the size.
        f"profile_{what}": {k: v for k, v in report.to_dict().items() if k != "events"},
    }


def floors(model: LlamaForCausalLM, plan: Plan, limits: Ceilings) -> dict[str, Any]:
    """The least time of a token and of a prefill, in milliseconds, and what bounds them."""
    shape = models.MODELS[plan.model]
    length = plan.prompt + plan.new_tokens // 2
    step_bytes = models.step_floor_bytes(model, shape, plan.batch, length)
    flops = models.prefill_floor_flops(model, shape, plan.batch, plan.prompt)
    weights = models.step_floor_bytes(model, shape, plan.batch, 0)
    return {
        "floor_ms_per_token": limits.floor_us(step_bytes, 0) / 1e3,
        "floor_prefill_ms": limits.floor_us(weights, flops) / 1e3,
        "step_bytes": step_bytes,
        "prefill_flops": flops,
        "ceilings": limits.source,
    }


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How our provider stands to each other: times its speed, and the ratio of logits errors."""
    ours = next((row for row in rows if row["provider"] == "triton_only"), None)
    if ours is None:
        return {}
    found: dict[str, Any] = {}
    for row in rows:
        if row is ours:
            continue
        found[f"prefill speedup over {row['provider']}"] = row["prefill_ms"] / ours["prefill_ms"]
        found[f"decode speedup over {row['provider']}"] = row["ms_per_token"] / ours["ms_per_token"]
        if row.get("logits_error") and ours.get("logits_error"):
            ratio = ours["logits_error"] / row["logits_error"]
            found[f"logits error over that of {row['provider']}"] = ratio
    return found


def run(plan: Plan, console: Console, json_path: Path | None, command: str) -> int:
    """Measures each provider, prints a table, and writes the record after every provider.

    Returns:
        The exit status: 1 if our provider ran a kernel outside Triton, else 0.

    Raises:
        BenchmarkError: the plan cannot be carried out here.
    """
    device = _device(plan)
    shape = models.MODELS[plan.model]
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

    model = models.build(shape, models.DTYPES[plan.dtype], device)
    log(
        f"{plan.model}, {plan.dtype}, batch {plan.batch}, {plan.prompt} tokens in, "
        f"{plan.new_tokens} out, cache of {plan.cache_length}"
    )
    record = Record(environment.collect(), command)
    record.summary["plan"] = dict(vars(plan))
    if device.type != "cpu":
        record.summary.update(floors(model, plan, ceilings(models.DTYPES[plan.dtype])))
    reference = None
    if plan.logits_error:
        tokens = make_tokens(plan, device)
        reference = models.reference_logits(model, tokens, COMPARED_STEPS + 1)
        log("fp32 reference done")
    for name in plan.providers:
        row = measure_provider(providers.PROVIDERS[name], model, plan, reference)
        record.rows.append(row)
        record.summary.update(compare(record.rows))
        record.write(json_path)
        log(
            f"{name}: prefill {row['prefill_ms']:.2f} ms, {row['ms_per_token']:.3f} ms a token, "
            f"compiled in {format_value(row['compile_seconds'])} s"
        )
    _print(console, record)
    ours = [row for row in record.rows if row["provider"] == "triton_only"]
    return int(any(row["violations_decode"] or row["violations_prefill"] for row in ours))


def is_interpreted() -> bool:
    """Whether models run on the CPU in the Triton interpreter."""
    return interpreter.wanted()


def _device(plan: Plan) -> torch.device:
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
        if row["provider"] == "triton_only":
            outside = sorted({*row["violations_decode"], *row["violations_prefill"]})
            for name in outside:
                console.print(f"outside Triton: {name}", markup=False, highlight=False)
