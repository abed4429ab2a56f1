"""What `triton-only tune` shows: progress, a line a problem, how far off the defaults were."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from triton_only_backend.tuning.search import Outcome


class Bar:
    """A progress bar with the time left, and a line above it for each problem that is done."""

    def __init__(self, terminal: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.outcomes: list[Outcome] = []
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("candidates", total=None)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, candidates: int) -> None:
        """So many candidates are to be measured."""
        self._progress.update(self._task, total=candidates)

    def advance(self, candidates: int) -> None:
        """So many of them are done or need not be."""
        self._progress.advance(self._task, candidates)

    def problem(self, found: Outcome) -> None:
        """Prints a problem's result."""
        self.outcomes.append(found)
        line = f"{describe(found.kind, found.problem)}: "
        if found.us is None:
            causes = sorted(set(found.rejected.values())) or ["nothing was measured"]
            line += f"no candidate can be used ({'; '.join(causes)})"
        else:
            line += f"{found.us:.1f} µs"
            if found.heuristic_us:
                gain = found.heuristic_us / found.us
                line += f", {gain:.2f} × the heuristic ({found.heuristic_us:.1f})"
            line += f", of {found.measured}: {describe_config(found.config)}"
        self._progress.console.print(line, markup=False, highlight=False)


def describe(kind: str, problem: Any) -> str:
    """A problem in a few words."""
    fields = vars(problem)
    if kind == "gemm":
        shape = "x".join(str(fields[key]) for key in ("M", "N", "K"))
        batch = f"{problem.batch}x" if problem.batch > 1 else ""
        flags = ("" if problem.b_k_contiguous else " n-contiguous") + (
            "" if problem.aligned else " unaligned"
        )
        return f"{batch}{shape} {8 * problem.element_size}-bit{flags}"
    return f"{kind} {', '.join(f'{key} {value}' for key, value in fields.items())}"


def describe_config(config: Any) -> str:
    """A configuration's fields that are not at their default."""
    parts = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            parts.append(str(value) if field.name == "kernel" else f"{field.name} {value}")
    return ", ".join(parts)


def slower(outcome: Outcome, us: float | None) -> float | None:
    """How many times as long as the best a choice takes; None where either was not measured."""
    return us / outcome.us if us and outcome.us else None


def summary(outcomes: list[Outcome]) -> list[str]:
    """How far from the best the heuristic's choices are, and those that are shipped."""
    lines = []
    for name, key in (("the heuristic", "heuristic_us"), ("what is shipped", "shipped_us")):
        found = [slower(outcome, getattr(outcome, key)) for outcome in outcomes]
        times = [ratio for ratio in found if ratio is not None]
        if times:
            lines.append(
                f"{name} takes {statistics.geometric_mean(times):.3f} × the best in geometric "
                f"mean of {len(times)}, {max(times):.2f} × at most"
            )
    return lines


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """An outcome for JSON."""
    found = dataclasses.asdict(outcome)
    found["speedup over the heuristic"] = slower(outcome, outcome.heuristic_us)
    found["speedup over what is shipped"] = slower(outcome, outcome.shipped_us)
    return found
