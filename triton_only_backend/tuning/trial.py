"""One problem on the device: runs a configuration, checks its numbers, takes its time."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, Protocol

import torch

from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.loading import load
from triton_only_backend.timing import copies_for
from triton_only_backend.tuning import attention_trial
from triton_only_backend.tuning.measuring import (
    Turns,
    error_bound,
    forced,
    relative_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from triton_only_backend.kernels.gemm_configs import GemmProblem

REFERENCE_CHUNK = 1 << 28  # products of fp64 elements at a time: 2 GiB


class Trial(Protocol):
    """A problem with its operands on the device."""

    def check(self, config: Any) -> str | None:
        """What is wrong with the results of a configuration; None if nothing is."""

    def compare_us(self, configs: Sequence[Any], work_us: float) -> list[float]:
        """Microseconds a call, in turn, by graphs of about so much work; see `measuring.Turns`."""


def call(kind: str, problem: Any, device: torch.device) -> Callable[[], Any]:
    """A call of the kernels on new, uninitialised operands: to compile what it launches."""
    if kind == "gemm":
        a, b, out = gemm_operands(problem, device)
        return functools.partial(multiply, a, b, out)
    x = attention_trial.operands(problem, device)
    return lambda: attention_trial.attend(x, problem)


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b, as a compiled graph launches it: the weights of a product are its inputs."""
    load("matmul").matmul(a, b, None, out, b_ready=a.shape[0] == 1)


def gemm_dtype(problem: GemmProblem) -> torch.dtype:
    """bf16 stands for both 16-bit types: their kernels differ in nothing that takes time."""
    return torch.bfloat16 if problem.element_size == 2 else torch.float32


def gemm_operands(
    problem: GemmProblem, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a (B, M, K), b (B, K, N) and out (B, M, N) as the problem describes them, uninitialised."""
    dtype, batch = gemm_dtype(problem), problem.batch

    def matrix(rows: int, columns: int, row_major: bool) -> torch.Tensor:
        if not row_major:
            return matrix(columns, rows, True).mT
        # An element before each row puts the rows off their 16 bytes.
        off = 0 if problem.aligned or columns * dtype.itemsize % 16 else 1
        whole = torch.empty(batch, rows, columns + off, dtype=dtype, device=device)
        return whole[:, :, off:]

    return (
        matrix(problem.M, problem.K, problem.a_k_contiguous),
        matrix(problem.K, problem.N, not problem.b_k_contiguous),
        torch.empty(batch, problem.M, problem.N, dtype=dtype, device=device),
    )


@contextlib.contextmanager
def fp32_precision(problem: Any) -> Iterator[None]:
    """fp32 operands multiplied as the problem says, where it says so."""
    before = torch.get_float32_matmul_precision()
    if problem.element_size == 4 and hasattr(problem, "ieee"):
        torch.set_float32_matmul_precision("highest" if problem.ieee else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class GemmTrial:
    """A product of random matrices, in enough copies that each call reads them from memory."""

    def __init__(self, problem: GemmProblem, device: torch.device) -> None:
        self.problem = problem
        elements = problem.batch * problem.K * (problem.M + problem.N)
        rotates = device.type == "cuda"
        copies = copies_for(elements * problem.element_size) if rotates else 1
        self.operands = [gemm_operands(problem, device) for _ in range(copies)]
        for a, b, _ in self.operands:
            a.normal_()
            b.normal_().mul_(problem.K**-0.5)
        a, b, out = self.operands[0]
        self.reference = reference_product(a, b)
        with fp32_precision(problem):
            library = relative_error(torch.bmm(a, b), self.reference)
        self.bound = error_bound(library, out.dtype)
        self.turns = Turns(self._calls)

    def check(self, config: Any) -> str | None:
        """See `Trial.check`: every element written, as near to fp64 as the library, repeatable."""
        a, b, out = self.operands[0]
        with tuned.forcing("gemm", config), fp32_precision(self.problem):
            out.fill_(torch.nan)
            multiply(a, b, out)
            error = relative_error(out, self.reference)
            if not error <= self.bound:
                return f"error {error:.1e} above {self.bound:.1e}"
            again = torch.full_like(out, torch.nan)
            multiply(a, b, again)
            return None if torch.equal(out, again) else "a repetition gave other bits"

    def compare_us(self, configs: Sequence[Any], work_us: float) -> list[float]:
        """See `Trial.compare_us`."""
        with fp32_precision(self.problem):
            return self.turns.times_us(configs, work_us)

    def _calls(self, config: Any) -> list[Callable[[], Any]]:
        return [
            forced("gemm", config, functools.partial(multiply, a, b, out))
            for a, b, out in self.operands
        ]


def reference_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp64, kept in fp32 where the operands have 16 bits; in chunks of b's columns."""
    kept = torch.float64 if a.dtype == torch.float32 else torch.float32
    wide = a.double()
    columns = max(1, REFERENCE_CHUNK // max(1, a.shape[0] * max(a.shape[1], a.shape[2])))
    parts = [(wide @ part.double()).to(kept) for part in b.split(columns, dim=2)]
    return torch.cat(parts, dim=2)


def make_trial(kind: str, problem: Any, device: torch.device) -> Trial:
    """The operands of a problem on a device."""
    if kind == "gemm":
        return GemmTrial(problem, device)
    return attention_trial.AttentionTrial(kind, problem, device)
