"""The search: each problem's candidates compiled, checked, measured and kept, one by one.

Every result goes to the database at once, so a search may end at any time, by its budget or by
Ctrl-C, and goes on where it ended. Candidates whose least possible time is above the best measured
are left out.

All times of a problem are on one scale, that of the first candidate measured: each later one is
timed in turn with it, and its time is that one's, multiplied by the ratio. The chip's power sets
the pace of large products: what a candidate took by itself was up to 1.18 times as long as in
another moment (an H200, bf16, 256 × 6144 × 4096), right after the fp64 reference above all. The
fastest few are timed in turn once more, for longer, and only their order changes by it.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from triton.errors import TritonError

from triton_only_backend.database import MEASURED, Database, Trial
from triton_only_backend.kernels import tuned
from triton_only_backend.tuning import measuring, spaces
from triton_only_backend.tuning.compilation import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from triton_only_backend.kernels.hardware import Hardware
    from triton_only_backend.tuning import trial

log = logging.getLogger("triton_only")

# Noted before a candidate first runs, and replaced when it has: a fault of the GPU ends the
# process, and the next search must not meet the same fault.
STARTED = "ended the process that ran it"
FINALISTS, FINALIST_MARGIN = 4, 1.06


class Compiler(Protocol):
    """See `compilation.Pool`."""

    def submit(self, job: Job) -> None:
        """Puts a job behind those that wait."""

    def result(self, job: Job) -> str | None:
        """Waits for a job: why its candidate cannot be used, or None."""


class Progress(Protocol):
    """Told what happens; see `tune_report`."""

    def begin(self, candidates: int) -> None:
        """So many candidates are to be measured."""

    def advance(self, candidates: int) -> None:
        """So many of them are done or need not be."""

    def problem(self, found: Outcome) -> None:
        """A problem is done."""


@dataclass(frozen=True)
class Outcome:
    """What the search knows of a problem.

    Attributes:
        config: the best configuration, or None where none was measured.
        us: its microseconds a call.
        heuristic_us: the heuristic's, if measured.
        shipped_us: those of what runs without a database, if measured.
        measured: candidates measured, now or before.
        rejected: of each candidate that cannot win, why.
    """

    kind: str
    problem: Any
    config: Any = None
    us: float | None = None
    heuristic_us: float | None = None
    shipped_us: float | None = None
    measured: int = 0
    rejected: dict[str, str] = field(default_factory=dict)


@dataclass
class Search:
    """A search's means. `run` does it.

    Attributes:
        make_trial: a problem's operands on the device.
        limit: candidates of a problem at most, beside those measured before; 0 for all.
        budget: seconds after which no other candidate is begun.
    """

    hardware: Hardware
    database: Database
    compiler: Compiler
    make_trial: Callable[[str, Any], trial.Trial]
    progress: Progress
    limit: int = 24
    budget: float | None = None
    clock: Callable[[], float] = time.monotonic

    def run(self, problems: Sequence[tuple[str, Any]]) -> list[Outcome]:
        """Searches the problems in their order; those that the budget left out are not listed."""
        end = None if self.budget is None else self.clock() + self.budget
        jobs = [self._jobs(kind, problem) for kind, problem in problems]
        self.progress.begin(sum(len(found) for found in jobs))
        for found in jobs:
            for job in found:
                self.compiler.submit(job)
        outcomes = []
        for (kind, problem), found in zip(problems, jobs, strict=True):
            if end is not None and self.clock() >= end:
                break
            self._measure(kind, problem, found, end)
            outcome = self.outcome(kind, problem)
            outcomes.append(outcome)
            self.progress.problem(outcome)
        return outcomes

    def _jobs(self, kind: str, problem: Any) -> list[Job]:
        known = self._known(kind, problem)
        best = min((t.us for t in known.values() if t.us), default=math.inf)
        return [
            Job(kind, problem, config)
            for config in spaces.candidates(kind, problem, self.hardware, self.limit)
            if tuned.encode(config) not in known
            and spaces.bound_us(kind, problem, config, self.hardware) <= best
        ]

    def _known(self, kind: str, problem: Any) -> dict[str, Trial]:
        rows = self.database.trials_of(self._place(kind), kind, tuned.encode(problem))
        return {row.config: row for row in rows}

    def _measure(self, kind: str, problem: Any, jobs: list[Job], end: float | None) -> None:
        if not jobs:
            return
        scale = None
        best = None
        known = _fastest_first(self._known(kind, problem))
        if known:
            best, config = known[0]
            scale = (spaces.decode_config(kind, config), best)
        trial_of: trial.Trial | None = None
        for job in jobs:
            if end is not None and self.clock() >= end:
                break
            bound = spaces.bound_us(kind, problem, job.config, self.hardware)
            if best is not None and bound > best:
                self.progress.advance(1)
                continue
            cause = self.compiler.result(job)
            if cause is None:
                try:
                    trial_of = trial_of or self.make_trial(kind, problem)
                except torch.OutOfMemoryError as error:
                    log.warning("triton_only: %s is not tuned: %s", problem, error)
                    break
                us = self._one(job, trial_of, scale)
                if us is not None:
                    scale = scale or (job.config, us)
                    best = us if best is None else min(best, us)
            else:
                self._write(job, cause)
            self.progress.advance(1)
        if trial_of is not None:
            self._finals(kind, problem, trial_of)

    def _one(
        self, job: Job, trial_of: trial.Trial, scale: tuple[Any, float] | None
    ) -> float | None:
        """Checks and measures a candidate, and writes what came out.

        Args:
            scale: a configuration and its time, which the candidate's is to be comparable with.
        """
        self._write(job, STARTED)
        try:
            cause = trial_of.check(job.config)
            us = _time_us(job.config, trial_of, scale) if cause is None else None
        except KeyboardInterrupt:
            self.database.remove(self._place(job.kind), self._row(job, STARTED))
            raise
        except (TritonError, RuntimeError) as error:
            # A launch that is refused harms nothing; a fault leaves no working device.
            if not measuring.device_works():
                raise
            cause, us = f"does not run: {type(error).__name__}: {error}"[:200], None
        self._write(job, cause or MEASURED, us)
        return us

    def _finals(self, kind: str, problem: Any, trial_of: trial.Trial) -> None:
        """Orders the fastest anew, where they are close; their least time stays what it was."""
        rows = _fastest_first(self._known(kind, problem))
        close = [text for us, text in rows[:FINALISTS] if us <= FINALIST_MARGIN * rows[0][0]]
        if len(close) > 1:
            configs = [spaces.decode_config(kind, text) for text in close]
            times = trial_of.compare_us(configs, measuring.PRECISE_US)
            for config, us in zip(configs, times, strict=True):
                self._write(Job(kind, problem, config), MEASURED, us * rows[0][0] / min(times))

    def outcome(self, kind: str, problem: Any) -> Outcome:
        """What the database now holds of a problem."""
        known = self._known(kind, problem)
        rows = _fastest_first(known)
        heuristic, shipped = (
            known.get(tuned.encode(choose(kind, problem, self.hardware)))
            for choose in (spaces.heuristic, spaces.shipped)
        )
        return Outcome(
            kind,
            problem,
            spaces.decode_config(kind, rows[0][1]) if rows else None,
            rows[0][0] if rows else None,
            heuristic.us if heuristic is not None else None,
            shipped.us if shipped is not None else None,
            len(rows),
            {t.config: t.outcome for t in known.values() if t.outcome != MEASURED},
        )

    def _place(self, kind: str) -> Any:
        return tuned.place(kind, self.hardware)

    def _row(self, job: Job, outcome: str, us: float | None = None) -> Trial:
        return Trial(job.kind, tuned.encode(job.problem), tuned.encode(job.config), outcome, us)

    def _write(self, job: Job, outcome: str, us: float | None = None) -> None:
        self.database.add(self._place(job.kind), self._row(job, outcome, us))


def _fastest_first(known: Mapping[str, Trial]) -> list[tuple[float, str]]:
    """The times that were measured, and whose."""
    return sorted((t.us, t.config) for t in known.values() if t.us)


def _time_us(config: Any, trial_of: trial.Trial, scale: tuple[Any, float] | None) -> float:
    """A configuration's time, on the scale of another's where there is one; see `_one`."""
    if scale is None:
        return trial_of.compare_us([config], measuring.QUICK_US)[0]
    again, us = trial_of.compare_us([scale[0], config], measuring.QUICK_US)
    return us * scale[1] / again
