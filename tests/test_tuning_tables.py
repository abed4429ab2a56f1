"""Tables of configurations: written, read back, and those that the package ships."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
from played_tuning import CANDIDATES, PROBLEM, SLOW, FakeTrial, search
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from triton_only_backend import database as databases
from triton_only_backend.kernels import shipped_tables, tuned
from triton_only_backend.kernels.gemm_configs import supports
from triton_only_backend.kernels.hardware import Hardware
from triton_only_backend.tuning import spaces, tables

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tuning.db"


@pytest.fixture(autouse=True)
def fresh_lookups():
    tuned.forget()
    yield
    tuned.forget()


def test_a_table_holds_the_best_and_is_read_back(path: Path, tmp_path: Path) -> None:
    best = CANDIDATES[4]
    search(path, FakeTrial(lambda c: 50.0 if c == best else SLOW))
    table = tmp_path / "tables" / "nvidia-h200.json"
    with databases.reading(path) as database:
        assert tables.export(database, table) == 1
        with pytest.raises(databases.DatabaseError, match=r"on NVIDIA H200 .*one GPU"):
            tables.export(database, table, gpu="another")
    found = shipped_tables.read_table(table)
    assert (found["gpu"], found["arch"]) == ("NVIDIA H200", "sm90")
    assert found["entries"] == {"gemm": {tuned.encode(PROBLEM): tuned.encode(best)}}
    lines = table.read_text().splitlines()
    assert sum("problem" in line for line in lines) == 1
    assert spaces.decode_problem("gemm", tuned.encode(PROBLEM)) == PROBLEM


def test_nothing_measured_is_no_table(path: Path, tmp_path: Path) -> None:
    with (
        databases.writing(path) as database,
        pytest.raises(databases.DatabaseError, match="nothing"),
    ):
        tables.export(database, tmp_path / "table.json")


def test_every_shipped_table_is_of_configurations_that_compute_their_problems() -> None:
    for table in shipped_tables.shipped_tables():
        device = Hardware(table["gpu"], "cuda", table["arch"], 132, 232448)
        for kind, found in table["entries"].items():
            for problem, config in found.items():
                chosen = spaces.decode_config(kind, config)
                a_problem = spaces.decode_problem(kind, problem)
                assert tuned.encode(a_problem) == problem
                assert kind != "gemm" or supports(a_problem, chosen, device)


@pytest.mark.parametrize("kind", tuned.SOURCES)
def test_all_sources_of_a_kinds_kernels_are_hashed(kind: str) -> None:
    """Also those of the functions that its kernels call."""
    files = tuned.SOURCES[kind]
    for name in files:
        values = vars(importlib.import_module(f"triton_only_backend.kernels.{name}")).values()
        called = {value.fn.__module__.split(".")[-1] for value in values if is_jit(value)}
        assert called <= {*files}, name


def is_jit(value: Any) -> bool:
    return isinstance(value, JITFunction | InterpretedFunction)
