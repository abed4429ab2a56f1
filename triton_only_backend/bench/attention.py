"""Our attention against every kernel behind `scaled_dot_product_attention` and FlexAttention.

The cases are in `attention_cases`.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import scaled_dot_product_attention

from triton_only_backend import environment
from triton_only_backend.bench import plots
from triton_only_backend.bench.attention_cases import HEADS, KINDS, Case, Operands, make_operands
from triton_only_backend.bench.attention_errors import gradient_errors, reference_errors
from triton_only_backend.bench.gemm import geomean
from triton_only_backend.bench.models import DTYPES
from triton_only_backend.bench.record import Record, format_value
from triton_only_backend.timing import (
    REPLAYS,
    capture,
    ceilings,
    poison,
    repetitions,
    replay_in_turn,
    require_gpu,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

    from triton_only_backend.bench.attention_cases import Plan
    from triton_only_backend.timing import Ceilings

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Longer than this, gradients are not compared with those in fp64.
MAX_CHECKED_GRADIENT = 4096
# Scores that PyTorch's math kernel may hold in memory at once.
MATH_SCORES = 1 << 31
# Ours may err this much more than the best library kernel: P is rounded once more or less.
ERROR_FACTOR = 2.0
# … and its gradients this much more than the best fused kernel's: PyTorch's math kernel, which has
# P in fp32, is no measure.
GRADIENT_FACTOR = 1.5


def library_call(case: Case, backend: SDPBackend) -> Callable[[Operands], torch.Tensor]:
    """scaled_dot_product_attention by one backend."""

    def call(operands: Operands) -> torch.Tensor:
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backend that does not run says why in warnings
            return scaled_dot_product_attention(
                *operands, is_causal=case.is_causal, enable_gqa=case.kv_heads != HEADS
            )

    return call


def flex_call(case: Case, device: torch.device) -> Callable[[Operands], torch.Tensor]:
    """flex_attention, compiled by Inductor, with the block mask of the case."""
    block_mask = None
    if case.is_causal:
        block_mask = flex.create_block_mask(
            lambda batch, head, query, key: query >= key,
            None, None, case.len_q, case.len_kv, device=device,
        )  # fmt: skip
    torch.compiler.reset()  # else flex runs in eager mode once it has been compiled eight times
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def call(operands: Operands) -> torch.Tensor:
        output: torch.Tensor = compiled(
            *operands, block_mask=block_mask, enable_gqa=case.kv_heads != HEADS
        )
        return output

    return call


def with_gradients(
    call: Callable[[Operands], torch.Tensor],
) -> Callable[[Operands], tuple[torch.Tensor, ...]]:
    """The call's output and the gradients of its operands, for the output as its own gradient."""

    def forward_and_backward(operands: Operands) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            output = call(operands)
            # Detached: a graph that lived on would tie the next backward, in a CUDA graph's
            # capture, to the stream of this one.
            gradient = output.detach()
            return gradient, *torch.autograd.grad(output, operands, gradient)

    return forward_and_backward


def our_call(case: Case) -> Callable[[Operands], torch.Tensor]:
    """triton_only::attention."""

    def call(operands: Operands) -> torch.Tensor:
        output: torch.Tensor = torch.ops.triton_only.attention(
            *operands, is_causal=case.is_causal, enable_gqa=case.kv_heads != HEADS
        )
        return output

    return call


@torch.no_grad()
def measure_case(
    case: Case, dtype: torch.dtype, limits: Ceilings, providers: Sequence[str]
) -> dict[str, Any]:
    """A row of the benchmark."""
    device = require_gpu()
    copies = make_operands(case, dtype, device)
    if case.is_training:
        for operands in copies:
            for operand in operands:
                operand.requires_grad_()
    candidates: dict[str, Callable[[Operands], torch.Tensor]] = {"ours": our_call(case)}
    candidates |= {name: library_call(case, backend) for name, backend in BACKENDS.items()}
    candidates["flex"] = flex_call(case, device)
    calls: dict[str, Callable[[Operands], Any]] = {}
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    not_run: dict[str, str] = {}
    poison((case.batch, case.len_q, HEADS, case.head_dim), copies[0][0].detach())
    for name in providers:
        call: Callable[[Operands], Any] = candidates[name]
        scores = case.batch * HEADS * case.len_q * case.len_kv
        if name == "math" and scores * (2 if case.is_training else 1) > MATH_SCORES:
            not_run[name] = f"it would hold {scores:,} scores in memory"
            continue
        if case.is_training:
            call = with_gradients(call)
        try:
            result = call(copies[0])
        except RuntimeError as refusal:  # the only sign that a backend does not cover a case
            if name == "ours":
                raise
            not_run[name] = str(refusal).splitlines()[0]
            continue
        found[name] = result if case.is_training else (result,)
        calls[name] = call
    errors = reference_errors(case, copies[0], {name: out[0] for name, out in found.items()})
    gradients: dict[str, float] = {}
    if case.is_training and case.len_q <= MAX_CHECKED_GRADIENT:
        gradients = gradient_errors(case, copies[0], found)
    found.clear()
    floor = limits.floor_us(case.bytes_moved(dtype.itemsize), case.flops)
    captured = [
        capture(
            [functools.partial(call, operands) for operands in copies],
            reps=repetitions(floor if name != "math" else 20 * floor, len(copies)),
        )
        for name, call in calls.items()
    ]
    times = dict(zip(calls, replay_in_turn(captured, replays=REPLAYS), strict=True))
    library = {name: us for name, us in times.items() if name in BACKENDS}
    best = min(library, key=library.__getitem__)
    ours = times["ours"]
    moved = case.bytes_moved(dtype.itemsize)
    correct = errors["ours"] <= ERROR_FACTOR * min(errors[name] for name in library)
    if gradients:
        fused = [gradients[name] for name in BACKENDS if name in gradients and name != "math"]
        bound = GRADIENT_FACTOR * min(fused) if fused else ERROR_FACTOR * gradients["math"]
        correct = correct and gradients["ours"] <= bound
    return {
        "kind": case.kind,
        "batch": case.batch,
        "len_q": case.len_q,
        "len_kv": case.len_kv,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        **{f"{name}_us": us for name, us in times.items()},
        "best_library": best,
        "speedup": library[best] / ours,
        "speedup_over_flash": library["flash"] / ours if "flash" in library else None,
        "speedup_over_cudnn": library["cudnn"] / ours if "cudnn" in library else None,
        "speedup_over_flex": times["flex"] / ours if "flex" in times else None,
        "floor_us": floor,
        "floor_share": floor / ours,
        "tb_per_second": moved / ours * 1e-6,
        "tflop_per_second": case.flops / ours * 1e-6,
        **{f"{name}_tb_per_second": moved / us * 1e-6 for name, us in times.items()},
        **{f"{name}_tflop_per_second": case.flops / us * 1e-6 for name, us in times.items()},
        "best_tflop_per_second": case.flops / library[best] * 1e-6,
        "error": errors["ours"],
        **{f"{name}_error": errors[name] for name in times if name != "ours"},
        **{f"{name}_gradient_error": error for name, error in gradients.items()},
        "correct": correct,
        "not_run": not_run,
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and least of the speedups over the best library kernel, by kind."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        speedups = [row["speedup"] for row in rows if row["kind"] == kind]
        if speedups:
            found[f"{kind}: geomean speedup over the best library kernel"] = geomean(speedups)
            found[f"{kind}: least speedup"] = min(speedups)
        for name, title in (("cudnn", "cuDNN"), ("flash", "FlashAttention-2"), ("flex", "flex")):
            over = [row.get(f"speedup_over_{name}") for row in rows if row["kind"] == kind]
            measured = [speedup for speedup in over if speedup is not None]
            if measured:
                found[f"{kind}: geomean speedup over {title}"] = geomean(measured)
                found[f"{kind}: least speedup over {title}"] = min(measured)
    found["wrong rows"] = sum(not row["correct"] for row in rows)
    return found


def run(
    plan: Plan, console: Console, json_path: Path | None, command: str, plot: Path | None = None
) -> int:
    """Measures each case, prints a table, and writes the record after every case.

    Args:
        plot: where to draw the rates of all providers over the lengths; its suffix says how.

    Returns:
        The exit status: 1 if a result was wrong, else 0.

    Raises:
        BenchmarkError: there is no GPU.
    """
    require_gpu()
    if plot is not None:
        plots.require_drawable(plot)
    dtype = DTYPES[plan.dtype]
    limits = ceilings(dtype)
    record = Record(environment.collect(), command)
    torch.manual_seed(0)
    title = f"attention, 32 heads of {plan.head_dim}, {plan.kv_heads} KV heads, {plan.dtype}"
    table = Table(title=title)
    for heading in ("kind", "B", "Lq", "Lkv", *(f"{p} µs" for p in plan.providers), "speedup",
                    "of the floor", "TB/s", "TFLOP/s", "error", "library error"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for case in plan.cases():
        row = measure_case(case, dtype, limits, plan.providers)
        record.rows.append(row)
        record.summary = {**summarise(record.rows), "dtype": plan.dtype, "floor": limits.source}
        record.write(json_path)
        keys = ("kind", "batch", "len_q", "len_kv", *(f"{p}_us" for p in plan.providers))
        table.add_row(
            *(format_value(row.get(key)) for key in keys),
            f"{row['speedup']:.3f}",
            f"{row['floor_share']:.0%}",
            *(format_value(row[key]) for key in ("tb_per_second", "tflop_per_second")),
            f"{row['error']:.1e}" if row["correct"] else f"[bold red]{row['error']:.1e}",
            f"{row[row['best_library'] + '_error']:.1e}",
        )
        torch.cuda.empty_cache()
    console.print(table)
    for key, value in record.summary.items():
        console.print(f"{key}: {format_value(value)}", markup=False, highlight=False)
    reasons = {(name, why) for row in record.rows for name, why in row["not_run"].items()}
    for name, why in sorted(reasons):
        console.print(f"{name} did not run: {why}", markup=False, highlight=False)
    if plot is not None:
        plots.plot_attention(
            record.rows, plan.providers, plot, f"{title}, {record.environment['gpu']}"
        )
    return int(record.summary["wrong rows"] > 0)
