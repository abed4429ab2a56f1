"""Our matrix product against cuBLAS, and against Inductor's Triton templates, in one run.

Weights (N, K) are contiguous along K, as `nn.Linear` has them, or along N, in enough copies that
each call reads them from memory. Ours may read them before the kernel ahead has ended, as the
layers of a compiled graph may, whose inputs the weights are. All are checked against an fp64
product in the same run; memory that the output may be allocated in is filled with NaN first, so
that an element left unwritten shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from triton_only_backend import environment, inductor
from triton_only_backend.bench import providers
from triton_only_backend.bench.compile_ahead import compile_ahead
from triton_only_backend.bench.gemm_shapes import SHAPES as SHAPES
from triton_only_backend.bench.gemm_shapes import Product, products
from triton_only_backend.bench.models import DTYPES
from triton_only_backend.bench.record import Record, format_value
from triton_only_backend.timing import (
    ceilings,
    copies_for,
    measure_in_turn,
    poison,
    repetitions,
    require_gpu,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

    from triton_only_backend.timing import Ceilings

    Call = Callable[..., torch.Tensor]

# Ours may err this much more than cuBLAS: their sums differ in order, nothing else.
ERROR_FACTOR = 2.0
CHUNK = 1 << 26  # elements of the weight that are widened to fp64 at a time
OURS, CUBLAS, INDUCTOR = "ours", "cublas", "inductor-triton"
PROVIDERS = (OURS, CUBLAS, INDUCTOR)


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        shapes: a key of `SHAPES`, or "all".
        dtype: a key of `models.DTYPES`.
        rows: values of M, for products that do not say their own.
        providers: of `PROVIDERS`; ours and cuBLAS always run.
        k_contiguous: the weights' layout.
        weights_ready: ours may read the weights of "mm" early, as a compiled graph lets it.
    """

    shapes: str
    dtype: str
    rows: tuple[int, ...]
    providers: tuple[str, ...] = (OURS, CUBLAS)
    k_contiguous: bool = True
    weights_ready: bool = True

    def products(self) -> list[Product]:
        """Each product once."""
        return products(self.shapes)

    def rows_of(self, product: Product) -> tuple[int, ...]:
        """The values of M that a product runs with."""
        return self.rows if product.M is None else (product.M,)


def traffic(M: int, N: int, K: int, element_size: int, batch: int = 1) -> tuple[int, int]:
    """The fewest bytes a product moves, and its operations."""
    return batch * (M * K + N * K + M * N) * element_size, 2 * batch * M * N * K


def errors(
    a: torch.Tensor,
    weight: torch.Tensor,
    outputs: dict[str, torch.Tensor],
    bias: torch.Tensor | None = None,
) -> dict[str, float]:
    """‖output − reference‖ / ‖reference‖ of each output, against a · weightᵀ + bias in fp64.

    Args:
        a: (…, M, K).
        weight: (…, N, K).
        outputs: (…, M, N), by name.
        bias: (…, M, N), or None.
    """
    wide = a.double()
    norm = 0.0
    differences = dict.fromkeys(outputs, 0.0)
    step = max(1, CHUNK * weight.shape[-2] // weight.numel())
    for start in range(0, weight.shape[-2], step):
        columns = slice(start, start + step)
        reference = wide @ weight[..., columns, :].double().mT
        if bias is not None:
            reference += bias[..., columns]
        norm += float(reference.square().sum())
        for name, output in outputs.items():
            difference = output[..., columns].double() - reference
            differences[name] += float(difference.square().sum())
    return {name: math.sqrt(total / norm) for name, total in differences.items()}


def calls(op: str, names: tuple[str, ...], *, weights_ready: bool) -> dict[str, Call]:
    """A product's function (a, b, bias) by provider."""
    with_bias = op == "baddbmm"

    ready = {"weights_ready": weights_ready} if op == "mm" else {}

    def of(namespace: Any, **options: bool) -> Call:
        function = getattr(namespace, op)
        return (
            (lambda a, b, bias: function(bias, a, b, **options))
            if with_bias
            else lambda a, b, _: function(a, b, **options)
        )

    found = {OURS: of(torch.ops.triton_only, **ready), CUBLAS: of(torch)}
    if INDUCTOR in names:
        # `measure` captures the graph itself.
        options = {
            **inductor.mode_options()["max-autotune-no-cudagraphs"],
            "max_autotune_gemm_backends": "TRITON",
        }
        found[INDUCTOR] = torch.compile(of(torch), dynamic=False, options=options)
    return found


@torch.no_grad()
def measure_product(
    product: Product,
    a: torch.Tensor,
    weights: list[torch.Tensor],
    limits: Ceilings,
    functions: dict[str, Call],
) -> dict[str, Any]:
    """A row of the benchmark: (…, M, K) times the transpose of each (…, N, K) weight."""
    M, (N, K), batch = a.shape[-2], weights[0].shape[-2:], product.batch
    bytes_moved, flops = traffic(M, N, K, a.element_size(), batch)
    shape = (*a.shape[:-1], N)
    bias = torch.randn_like(a[..., :1]).expand(shape) if product.op == "baddbmm" else None
    floor = limits.floor_us(bytes_moved, flops)
    reps = repetitions(floor, len(weights))
    outputs = {}
    for name, function in functions.items():
        poison(shape, a)
        outputs[name] = function(a, weights[0].mT, bias)
    error = errors(a, weights[0], outputs, bias)
    outputs.clear()
    times = measure_in_turn(
        {
            name: [lambda w=w, f=f: f(a, w.mT, bias) for w in weights]  # type: ignore[misc]
            for name, f in functions.items()
        },
        reps=reps,
    )
    inductor_us = times.get(INDUCTOR)
    return {
        "op": product.op,
        "batch": batch,
        "M": M,
        "N": N,
        "K": K,
        "ours_us": times[OURS],
        "cublas_us": times[CUBLAS],
        "inductor_us": inductor_us,
        "speedup": times[CUBLAS] / times[OURS],
        "speedup_over_inductor": None if inductor_us is None else inductor_us / times[OURS],
        "floor_us": floor,
        "floor_share": floor / times[OURS],
        "cublas_floor_share": floor / times[CUBLAS],
        "tb_per_second": bytes_moved / times[OURS] * 1e-6,
        "tflop_per_second": flops / times[OURS] * 1e-6,
        "error": error[OURS],
        "cublas_error": error[CUBLAS],
        "correct": error[OURS] <= ERROR_FACTOR * error[CUBLAS],
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and least of the speedups, by M and overall, and how many rows are wrong."""
    by_rows: dict[int, list[float]] = {}
    for row in rows:
        by_rows.setdefault(row["M"], []).append(row["speedup"])
    speedups = [row["speedup"] for row in rows]
    over_inductor = [x for row in rows if (x := row.get("speedup_over_inductor")) is not None]
    return {
        "geomean speedup": geomean(speedups),
        "least speedup": min(speedups, default=math.nan),
        "rows slower than cuBLAS": sum(speedup < 1 for speedup in speedups),
        "wrong rows": sum(not row["correct"] for row in rows),
        "geomean speedup by M": {M: geomean(values) for M, values in sorted(by_rows.items())},
        **({"geomean speedup over Inductor": geomean(over_inductor)} if over_inductor else {}),
    }


def geomean(values: list[float]) -> float:
    """The geometric mean; NaN of nothing."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else math.nan


def make_weights(product: Product, dtype: torch.dtype, *, k_contiguous: bool) -> list[torch.Tensor]:
    """Random (batch, N, K) weights, or (N, K) where there is one; in enough copies to rotate."""
    device = require_gpu()
    rows, columns = (product.N, product.K) if k_contiguous else (product.K, product.N)
    shape = (rows, columns) if product.op == "mm" else (product.batch, rows, columns)
    copies = copies_for(product.batch * product.N * product.K * dtype.itemsize)
    made = [
        torch.randn(shape, device=device, dtype=dtype).mul_(product.K**-0.5) for _ in range(copies)
    ]
    return made if k_contiguous else [weight.mT for weight in made]


COLUMNS = ("M", "ours µs", "cuBLAS µs", "Inductor µs", "speedup", "of the floor", "cuBLAS of it",
           "TB/s", "TFLOP/s", "error", "cuBLAS error")  # fmt: skip


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the printed table."""
    return (
        *(format_value(row[key]) for key in ("M", "ours_us", "cublas_us", "inductor_us")),
        f"{row['speedup']:.3f}",
        f"{row['floor_share']:.0%}",
        f"{row['cublas_floor_share']:.0%}",
        *(format_value(row[key]) for key in ("tb_per_second", "tflop_per_second")),
        f"{row['error']:.1e}" if row["correct"] else f"[bold red]{row['error']:.1e}",
        f"{row['cublas_error']:.1e}",
    )


def run(
    plan: Plan,
    console: Console,
    json_path: Path | None,
    command: str,
    plot_path: Path | None = None,
) -> int:
    """Measures each product at each M, prints a table, and writes the record after every product.

    Returns:
        The exit status: 1 if a result was wrong, else 0.

    Raises:
        BenchmarkError: there is no GPU, or --plot without matplotlib.
    """
    device, dtype = require_gpu(), DTYPES[plan.dtype]
    if plot_path is not None:
        from triton_only_backend.bench import plots

        plots.require_drawable(plot_path)
    limits = ceilings(dtype)
    record = Record(environment.collect(), command)
    torch.manual_seed(0)
    compile_ahead(plan, device)
    for product in plan.products():
        batch = f", batch {product.batch}, {product.op}" if product.op != "mm" else ""
        title = f"{product.name}: N = {product.N}, K = {product.K}, {plan.dtype}{batch}"
        table = Table(title=title, title_justify="left")
        for heading in COLUMNS:
            table.add_column(heading, justify="right")
        weights = make_weights(product, dtype, k_contiguous=plan.k_contiguous)
        for M in plan.rows_of(product):
            providers.reset()
            shape = (M, product.K) if product.op == "mm" else (product.batch, M, product.K)
            a = torch.randn(shape, device=device, dtype=dtype)
            functions = calls(product.op, plan.providers, weights_ready=plan.weights_ready)
            row = measure_product(product, a, weights, limits, functions)
            record.rows.append({"layer": product.name, **row})
            table.add_row(*cells(row))
        del weights
        torch.cuda.empty_cache()
        console.print(table)
        layout = "K" if plan.k_contiguous else "N"
        facts = {
            "dtype": plan.dtype,
            "weights contiguous along": layout,
            "weights read early": plan.weights_ready,
            "floor": limits.source,
        }
        record.summary = {**summarise(record.rows), **facts}
        record.write(json_path)
    if plot_path is not None:
        where = f"{record.environment['gpu']}, {plan.dtype}"
        plots.plot_ratios(record.rows, plot_path, f"cuBLAS' time / ours, {where}")
    for key, value in record.summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v:.3f}" for k, v in value.items())
        console.print(f"{key}: {format_value(value)}", markup=False, highlight=False)
    return int(record.summary["wrong rows"] > 0)
