"""Random products: what they are made of, and what they should give."""

from __future__ import annotations

import math
import random
from dataclasses import astuple, dataclass
from typing import Any

import torch

import triton_only_backend  # noqa: F401

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPS = ("mm", "addmm", "bmm", "baddbmm", "linear_fused")
LAYOUTS = ("row", "column", "sliced", "broadcast")
# Sizes of one row share their kernels: they have a bucket, and divisibility by 16, in common.
ROWS = ((1,), (2,), (3, 5, 7, 11, 13, 15), (16,), (33, 37, 47, 53, 63), (131, 150, 191), (256,))
COLUMNS = ((1,), (8,), (33, 40, 41, 56, 63), (129, 136, 151, 190), (256,), (449, 499, 511))
DEPTHS = ((1,), (8,), (33,), (100,), (256,), (1024,))
ACTIVATIONS = ("none", "relu", "sigmoid", "silu", "gelu", "gelu_tanh", "tanh")


@dataclass(frozen=True)
class Case:
    """One product. `extra` is the layout of addmm's bias, or which parts follow linear_fused."""

    op: str
    dtype: str
    layout_a: str
    layout_b: str
    extra: str
    activation: str
    K: int
    N: int
    M: int
    batch: int
    alpha: float
    beta: float
    seed: int


def make_cases(seed: int, count: int, largest: int = 1 << 30, alike: int = 1) -> list[Case]:
    """`count` cases, those that launch like kernels beside each other; no size above `largest`.

    `alike` cases each share what a kernel is compiled for, and differ in sizes, factors and values.
    """
    draw = random.Random(seed)

    def size_class(classes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        return draw.choice([some for some in classes if max(some) <= largest])

    found = []
    for number in range(count):
        if number % alike == 0:
            op = draw.choice(OPS)
            fused = op == "linear_fused"
            plain = draw.random() < 0.75
            shared: dict[str, Any] = dict(
                op=op,
                dtype=draw.choice(list(DTYPES)),
                layout_a="row" if plain else draw.choice(LAYOUTS),
                layout_b="column" if plain else draw.choice(LAYOUTS),
                extra=draw.choice(
                    ("none", "bias", "multiplier", "residual", "bias+residual", "gated")
                )
                if fused
                else draw.choice(("vector", "matrix", "column")),
                activation=draw.choice(ACTIVATIONS) if fused else "none",
                batch=draw.choice((1, 2, 5)) if op in ("bmm", "baddbmm") else 1,
            )
            depths, columns, rows = map(size_class, (DEPTHS, COLUMNS, ROWS))
        found.append(
            Case(
                **shared,
                K=draw.choice(depths),
                N=draw.choice(columns),
                M=draw.choice(rows),
                alpha=draw.choice((1.0, 0.5, -2.0, 0.3)),
                beta=draw.choice((0.0, 1.0, -0.7, 2.0)),
                seed=number,
            )
        )
    return sorted(found, key=astuple)


def matrix(rows: int, columns: int, layout: str, batch: int, like: Any, draw: Any) -> torch.Tensor:
    """(batch, rows, columns) in a layout; `draw` gives the values of a shape."""
    if layout == "column":
        return draw((batch, columns, rows)).to(**like).mT
    if layout == "sliced":
        return draw((batch, rows * 2 + 1, columns * 3 + 2)).to(**like)[:, 1::2, 2::3]
    if layout == "broadcast":
        return draw((batch, rows, 1)).to(**like).expand(batch, rows, columns)
    return draw((batch, rows, columns)).to(**like)


def make_operands(case: Case, device: str, *, empty: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a case: random, or only as large."""
    if empty:
        draw: Any = torch.empty
    else:
        generator = torch.Generator(device).manual_seed(case.seed)

        def draw(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

    like = {"dtype": DTYPES[case.dtype]}
    M, N, K, batch = case.M, case.N, case.K, case.batch
    found = {
        "a": matrix(M, K, case.layout_a, batch, like, draw),
        "b": matrix(K, N, case.layout_b, batch, like, draw),
    }
    if case.op in ("addmm", "baddbmm"):
        shape = {"vector": (N,), "matrix": (M, N), "column": (M, 1)}[case.extra]
        found["bias"] = draw(shape).to(**like)
    if case.op == "linear_fused":
        if "bias" in case.extra:
            found["bias"] = draw((N,)).to(**like)
        for part in ("multiplier", "residual"):
            if part in case.extra:
                found[part] = draw((M, N)).to(**like)
        if case.extra == "gated":
            found["second"] = matrix(K, N, case.layout_b, batch, like, draw)
    return found if batch > 1 or case.op.startswith("b") else _two_dimensional(found)


def _two_dimensional(operands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t[0] if t.dim() == 3 else t for name, t in operands.items()}


def run(case: Case, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """The case by our op."""
    ours = torch.ops.triton_only
    if case.op in ("mm", "bmm"):
        return getattr(ours, case.op)(x["a"], x["b"])
    if case.op in ("addmm", "baddbmm"):
        return getattr(ours, case.op)(x["bias"], x["a"], x["b"], alpha=case.alpha, beta=case.beta)
    weights = [x[name].mT for name in ("b", "second") if name in x]
    (out,) = ours.linear_fused(
        x["a"], weights, [x["bias"]] if "bias" in x else [],
        activation=case.activation, gated=case.extra == "gated", scale=case.alpha,
        multiplier=x.get("multiplier"), residual=x.get("residual"),
    )  # fmt: skip
    return out


def reference(case: Case, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """The case by PyTorch, in its operands' dtype: the library's own error, or with fp64 none."""
    if case.op in ("mm", "bmm"):
        return x["a"] @ x["b"]
    if case.op in ("addmm", "baddbmm"):
        op = getattr(torch, case.op)
        return op(x["bias"], x["a"], x["b"], alpha=case.alpha, beta=case.beta)
    out = torch.nn.functional.linear(x["a"], x["b"].mT, x.get("bias"))
    out = activate(out, case.activation)
    if "second" in x:
        out = out * (x["a"] @ x["second"])
    if "multiplier" in x:
        out = out * x["multiplier"]
    out = out * case.alpha
    return out + x["residual"] if "residual" in x else out


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """One of ACTIVATIONS."""
    if name == "none":
        return x
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    return getattr(torch.nn.functional, name)(x)


def errors(case: Case, x: dict[str, torch.Tensor]) -> tuple[float, float, bool]:
    """‖error‖ / ‖exact‖ of our op, what it may be, and whether a repetition gave the same bits.

    It may be half as much again as PyTorch's own on the same input, of a handful of elements, whose
    sums may all but cancel, thrice as much. PyTorch's may be zero, or next to it, by luck: of one
    element, or where all sums are exact. So what rounding alone must cost is granted to both: half a unit in the last place of the output, once, and of the fp32 sums as many
    as a random walk of K roundings reaches; of a sum with a residual, which may cancel most of it,
    as much as of both its terms.
    """
    exact = reference(case, {name: t.double() for name, t in x.items()})
    ours = run(case, x)
    again = run(case, x)
    norm = exact.norm().item() or 1.0
    error, own = (
        (output.double() - exact).norm().item() / norm for output in (ours, reference(case, x))
    )
    unit = torch.finfo(DTYPES[case.dtype]).eps / 2
    floor = unit + torch.finfo(torch.float32).eps / 2 * math.sqrt(case.K)
    if "residual" in x:
        residual = x["residual"].double()
        floor *= ((exact - residual).norm() + residual.norm()).item() / norm
    assert ours.shape == exact.shape and ours.dtype == DTYPES[case.dtype]
    factor = 1.5 if exact.numel() > 4 else 3
    return error, factor * max(own, floor), torch.equal(ours, again)
