"""Our matrix product against cuBLAS, on the shapes of a model's linear layers.

Weights lie as `nn.Linear` has them, (N, K) with K contiguous, in enough copies that each call reads
them from memory. Both are checked against an fp64 product in the same run; memory that the output
may be allocated in is filled with NaN first, so that an element left unwritten shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from triton_only_backend import environment
from triton_only_backend.bench.models import DTYPES
from triton_only_backend.bench.record import Record, format_value
from triton_only_backend.bench.timing import (
    ceilings,
    copies_for,
    measure,
    poison,
    repetitions,
    require_gpu,
)

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from triton_only_backend.bench.timing import Ceilings

# Layers: (N, K) of the weight.
_LAYERS = {
    "qkv": (6144, 4096),
    "q, o": (4096, 4096),
    "k, v": (1024, 4096),
    "gate, up": (14336, 4096),
    "gate + up": (28672, 4096),
    "down": (4096, 14336),
}
SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "llama3-8b": {**_LAYERS, "lm_head": (128256, 4096)},
    "granite-8b": {**_LAYERS, "lm_head": (49152, 4096)},
}
# Ours may err this much more than cuBLAS: their sums differ in order, nothing else.
ERROR_FACTOR = 2.0
CHUNK = 16384  # columns of the weight that are widened to fp64 at a time


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        shapes: a key of `SHAPES`, or "all".
        dtype: a key of `models.DTYPES`.
        rows: values of M.
    """

    shapes: str
    dtype: str
    rows: tuple[int, ...]

    def layers(self) -> list[tuple[str, int, int]]:
        """Name, N and K of each layer, each shape once."""
        models = SHAPES if self.shapes == "all" else {self.shapes: SHAPES[self.shapes]}
        found = {size: name for layers in models.values() for name, size in layers.items()}
        return [(name, n, k) for (n, k), name in found.items()]


def traffic(M: int, N: int, K: int, element_size: int) -> tuple[int, int]:
    """The fewest bytes a product moves, and its operations."""
    return (M * K + N * K + M * N) * element_size, 2 * M * N * K


def errors(
    a: torch.Tensor, weight: torch.Tensor, outputs: dict[str, torch.Tensor]
) -> dict[str, float]:
    """‖output − reference‖ / ‖reference‖ of each output, against a · weightᵀ in fp64.

    Args:
        a: (M, K).
        weight: (N, K).
        outputs: (M, N), by name.
    """
    wide = a.double()
    norm = 0.0
    differences = dict.fromkeys(outputs, 0.0)
    for start in range(0, weight.shape[0], CHUNK):
        columns = slice(start, start + CHUNK)
        reference = wide @ weight[columns].double().t()
        norm += float(reference.square().sum())
        for name, output in outputs.items():
            differences[name] += float((output[:, columns].double() - reference).square().sum())
    return {name: math.sqrt(total / norm) for name, total in differences.items()}


@torch.no_grad()
def measure_product(
    a: torch.Tensor, weights: list[torch.Tensor], limits: Ceilings
) -> dict[str, Any]:
    """A row of the benchmark: (M, K) times the transpose of each (N, K) weight."""
    (M, K), N = a.shape, weights[0].shape[0]
    bytes_moved, flops = traffic(M, N, K, a.element_size())
    floor = limits.floor_us(bytes_moved, flops)
    reps = repetitions(floor, len(weights))
    ours_mm = torch.ops.triton_only.mm
    poison((M, N), a)
    ours = ours_mm(a, weights[0].t())
    poison((M, N), a)
    theirs = torch.mm(a, weights[0].t())
    error = errors(a, weights[0], {"ours": ours, "cublas": theirs})
    del ours, theirs
    ours_us = measure([lambda w=w: ours_mm(a, w.t()) for w in weights], reps=reps)  # type: ignore[misc]
    cublas_us = measure([lambda w=w: torch.mm(a, w.t()) for w in weights], reps=reps)  # type: ignore[misc]
    return {
        "M": M,
        "N": N,
        "K": K,
        "ours_us": ours_us,
        "cublas_us": cublas_us,
        "speedup": cublas_us / ours_us,
        "floor_us": floor,
        "floor_share": floor / ours_us,
        "cublas_floor_share": floor / cublas_us,
        "tb_per_second": bytes_moved / ours_us * 1e-6,
        "tflop_per_second": flops / ours_us * 1e-6,
        "error": error["ours"],
        "cublas_error": error["cublas"],
        "correct": error["ours"] <= ERROR_FACTOR * error["cublas"],
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and least of the speedups, by M and overall, and how many rows are wrong."""
    by_rows: dict[int, list[float]] = {}
    for row in rows:
        by_rows.setdefault(row["M"], []).append(row["speedup"])
    speedups = [row["speedup"] for row in rows]
    return {
        "geomean speedup": geomean(speedups),
        "least speedup": min(speedups, default=math.nan),
        "rows slower than cuBLAS": sum(speedup < 1 for speedup in speedups),
        "wrong rows": sum(not row["correct"] for row in rows),
        "geomean speedup by M": {M: geomean(values) for M, values in sorted(by_rows.items())},
    }


def geomean(values: list[float]) -> float:
    """The geometric mean; NaN of nothing."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else math.nan


def run(plan: Plan, console: Console, json_path: Path | None, command: str) -> int:
    """Measures each layer at each M, prints a table, and writes the record after every layer.

    Returns:
        The exit status: 1 if a result was wrong, else 0.

    Raises:
        BenchmarkError: there is no GPU.
    """
    device, dtype = require_gpu(), DTYPES[plan.dtype]
    limits = ceilings(dtype)
    record = Record(environment.collect(), command)
    torch.manual_seed(0)
    for name, N, K in plan.layers():
        table = Table(title=f"{name}: N = {N}, K = {K}, {plan.dtype}", title_justify="left")
        for heading in ("M", "ours µs", "cuBLAS µs", "speedup", "of the floor", "cuBLAS of it",
                        "TB/s", "TFLOP/s", "error", "cuBLAS error"):  # fmt: skip
            table.add_column(heading, justify="right")
        copies = copies_for(N * K * dtype.itemsize)
        weights = [
            torch.randn(N, K, device=device, dtype=dtype).mul_(K**-0.5) for _ in range(copies)
        ]
        for M in plan.rows:
            a = torch.randn(M, K, device=device, dtype=dtype)
            row = {"layer": name, **measure_product(a, weights, limits)}
            record.rows.append(row)
            table.add_row(
                *(format_value(row[key]) for key in ("M", "ours_us", "cublas_us")),
                f"{row['speedup']:.3f}",
                f"{row['floor_share']:.0%}",
                f"{row['cublas_floor_share']:.0%}",
                *(format_value(row[key]) for key in ("tb_per_second", "tflop_per_second")),
                f"{row['error']:.1e}" if row["correct"] else f"[bold red]{row['error']:.1e}",
                f"{row['cublas_error']:.1e}",
            )
        del weights
        torch.cuda.empty_cache()
        console.print(table)
        record.summary = {**summarise(record.rows), "dtype": plan.dtype, "floor": limits.source}
        record.write(json_path)
    for key, value in record.summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v:.3f}" for k, v in value.items())
        console.print(f"{key}: {format_value(value)}", markup=False, highlight=False)
    return int(record.summary["wrong rows"] > 0)
