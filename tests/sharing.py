"""What a process of its own runs in a test: such a process can import this file, but no test."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from triton_only_backend import database as databases
from triton_only_backend.database import MEASURED, Place, Trial
from triton_only_backend.kernels import tuned

if TYPE_CHECKING:
    from pathlib import Path

    from triton_only_backend.kernels.gemm_configs import GemmConfig, GemmProblem


def write_rows(path: Path, problem: GemmProblem, config: GemmConfig, first: int) -> None:
    """Adds 50 trials of a problem, numbered from `first` on."""
    with databases.writing(path) as database:
        for number in range(first, first + 50):
            numbered = tuned.encode(dataclasses.replace(config, group_m=number))
            trial = Trial("gemm", tuned.encode(problem), numbered, MEASURED, float(number))
            database.add(Place("a", "b", "c", "d"), trial)
