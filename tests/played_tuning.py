"""A search whose clock and compiler are played, for tests without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton_only_backend import database as databases
from triton_only_backend.kernels.gemm_configs import GemmConfig, GemmProblem
from triton_only_backend.kernels.hardware import Hardware
from triton_only_backend.tuning import measuring, spaces
from triton_only_backend.tuning.search import Search

if TYPE_CHECKING:
    from pathlib import Path

    from triton_only_backend.tuning.compilation import Job


H200 = Hardware("NVIDIA H200", "cuda", "sm90", 132, 232448)
A100 = Hardware("A100", "cuda", "sm80", 108, 166912)
MI300X = Hardware("MI300X", "hip", "gfx942", 304, 65536)
PROBLEM = GemmProblem(1, 64, 4096, 4096, 2, False, True, True)


class FakeTrial:
    """Times by a rule; notes what ran."""

    def __init__(self, times: Any, wrong: Any = ()) -> None:
        self.times, self.wrong, self.ran = times, wrong, []

    def check(self, config: GemmConfig) -> str | None:
        return "error 1.0" if config in self.wrong else None

    def compare_us(self, configs: Any, work_us: float) -> list[float]:
        if work_us == measuring.QUICK_US:
            self.ran.append(configs[-1])
        return [self.times(config) for config in configs]


class FakeCompiler:
    def __init__(self, refused: Any = ()) -> None:
        self.refused, self.submitted = refused, []

    def submit(self, job: Job) -> None:
        self.submitted.append(job)

    def result(self, job: Job) -> str | None:
        return "spills 64 bytes" if job.config in self.refused else None


class Quiet:
    def __init__(self) -> None:
        self.total = self.done = 0

    def begin(self, candidates: int) -> None:
        self.total += candidates

    def advance(self, candidates: int) -> None:
        self.done += candidates

    def problem(self, found: Any) -> None:
        pass


def search(
    path: Path,
    a_trial: FakeTrial,
    compiler: Any = None,
    problem: GemmProblem = PROBLEM,
    **options: Any,
) -> Any:
    with databases.writing(path) as database:
        progress = Quiet()
        found = Search(
            H200, database, compiler or FakeCompiler(), lambda kind, problem: a_trial, progress,
            **{"limit": 12, **options},
        )  # fmt: skip
        outcomes = found.run([("gemm", problem)])
        return outcomes, progress


def rows(path: Path) -> list[databases.Trial]:
    with databases.reading(path) as database:
        return [row for _, row in database.trials()]


CANDIDATES = spaces.candidates("gemm", PROBLEM, H200, 12)
SLOW = 100.0
