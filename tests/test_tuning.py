"""The search for configurations: what is measured, what may win, what is kept, how it ends."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from played_tuning import (
    CANDIDATES,
    H200,
    PROBLEM,
    SLOW,
    FakeCompiler,
    FakeTrial,
    Quiet,
    rows,
    search,
)

from triton_only_backend import database as databases
from triton_only_backend.database import MEASURED
from triton_only_backend.kernels import tuned
from triton_only_backend.tuning import gemm_cost, gemm_space, measuring, problems
from triton_only_backend.tuning.search import STARTED, Search

if TYPE_CHECKING:
    from pathlib import Path

    from triton_only_backend.kernels.gemm_configs import GemmConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tuning.db"


@pytest.fixture(autouse=True)
def fresh_lookups():
    tuned.forget()
    yield
    tuned.forget()


def test_the_fastest_correct_candidate_wins(path: Path) -> None:
    fastest, wrong, spilled = CANDIDATES[5], CANDIDATES[6], CANDIDATES[7]
    times = {fastest: 50.0, wrong: 10.0, spilled: 20.0}
    a_trial = FakeTrial(lambda c: times.get(c, SLOW), wrong=(wrong,))
    (outcome,), progress = search(path, a_trial, FakeCompiler(refused=(spilled,)))
    assert (outcome.config, outcome.us, outcome.heuristic_us) == (fastest, 50.0, SLOW)
    assert outcome.rejected == {
        tuned.encode(wrong): "error 1.0",
        tuned.encode(spilled): "spills 64 bytes",
    }
    assert outcome.measured == len(CANDIDATES) - 2
    assert progress.done == progress.total == len(CANDIDATES)
    assert spilled not in set(a_trial.ran)


def test_close_finalists_are_measured_again_and_the_second_time_decides(path: Path) -> None:
    """On the scale of the first times, so that who was not among them cannot win by it."""
    lucky, better, far = CANDIDATES[3:6]
    quick, precise = {lucky: 50.0, better: 51.0, far: 54.0}, {lucky: 60.0, better: 57.0}
    a_trial = FakeTrial(lambda config: quick.get(config, SLOW))
    briefly = a_trial.compare_us
    compared: list[Any] = []

    def compare(configs: Any, work_us: float) -> list[float]:
        if work_us == measuring.QUICK_US:
            return briefly(configs, work_us)
        compared.extend(configs)
        return [precise[config] for config in configs]

    a_trial.compare_us = compare
    (outcome,), _ = search(path, a_trial)
    assert (outcome.config, outcome.us) == (better, 50.0)
    assert compared == [lucky, better]
    of = {row.config: row.us for row in rows(path)}
    assert of[tuned.encode(lucky)] == pytest.approx(50.0 * 60 / 57)
    assert of[tuned.encode(far)] == 54.0


def test_a_hot_chip_counts_against_none(path: Path) -> None:
    """Each is timed beside the first: that all take longer in a moment changes no ratio."""
    best = CANDIDATES[3]
    a_trial = FakeTrial(lambda config: 50.0 if config == best else 60.0)
    heat = itertools.cycle([1.0, 1.3, 1.1])
    cold = a_trial.compare_us

    def compare(configs: Any, work_us: float) -> list[float]:
        factor = next(heat)
        return [factor * us for us in cold(configs, work_us)]

    a_trial.compare_us = compare
    (outcome,), _ = search(path, a_trial)
    assert outcome.config == best
    times = {row.config: row.us for row in rows(path)}
    assert times.pop(tuned.encode(best)) == pytest.approx(50.0)
    assert list(times.values()) == pytest.approx([60.0] * len(times))


def test_candidates_that_cannot_win_are_left_out(path: Path) -> None:
    _, large = problems.product(1, 512, 6144, 4096)
    found = gemm_space.candidates(large, H200, 40)
    bounds = {c: gemm_cost.bound_us(large, c, H200) for c in found}
    fast = min(bounds.values()) * 1.001
    a_trial = FakeTrial(lambda c: fast)
    (_,), progress = search(path, a_trial, problem=large, limit=40)
    ran = set(a_trial.ran)
    assert ran == {found[0]} | {c for c in found if bounds[c] <= fast}
    assert len(ran) < len(found)
    assert progress.done == progress.total


def test_an_interrupted_search_goes_on_where_it_ended(path: Path) -> None:
    def stop_at_fourth(config: GemmConfig) -> float:
        if config == CANDIDATES[4]:
            raise KeyboardInterrupt
        return SLOW

    with pytest.raises(KeyboardInterrupt):
        search(path, FakeTrial(stop_at_fourth))
    assert {row.config for row in rows(path)} == {tuned.encode(c) for c in CANDIDATES[:4]}
    rest = FakeTrial(lambda c: SLOW)
    (outcome,), progress = search(path, rest)
    assert rest.ran == CANDIDATES[4:]
    assert progress.total == len(CANDIDATES) - 4
    assert outcome.measured == len(CANDIDATES)


def test_a_launch_that_is_refused_costs_one_candidate(path: Path) -> None:
    def refuse(config: GemmConfig) -> float:
        if config == CANDIDATES[2]:
            raise RuntimeError("Triton Error [CUDA]: invalid argument")
        return SLOW

    (outcome,), _ = search(path, FakeTrial(refuse))
    (cause,) = outcome.rejected.values()
    assert cause == "does not run: RuntimeError: Triton Error [CUDA]: invalid argument"
    assert outcome.measured == len(CANDIDATES) - 1


def test_a_problem_too_large_for_the_device_is_left_out(path: Path, caplog: Any) -> None:
    def too_large(kind: str, problem: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    with databases.writing(path) as database:
        found = Search(H200, database, FakeCompiler(), too_large, Quiet(), limit=4)
        (outcome,) = found.run([("gemm", PROBLEM)])
    assert outcome.us is None and "is not tuned: no memory" in caplog.text


def test_a_candidate_that_ended_the_process_is_not_run_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "device_works", lambda: False)

    def fault(config: GemmConfig) -> float:
        if config == CANDIDATES[2]:
            raise RuntimeError("an illegal memory access was encountered")
        return SLOW

    with pytest.raises(RuntimeError, match="illegal memory"):
        search(path, FakeTrial(fault))
    a_trial = FakeTrial(lambda c: SLOW)
    (outcome,), _ = search(path, a_trial)
    assert CANDIDATES[2] not in set(a_trial.ran)
    assert outcome.rejected == {tuned.encode(CANDIDATES[2]): STARTED}


def test_the_budget_ends_the_search(path: Path) -> None:
    now = iter(range(1000))
    a_trial = FakeTrial(lambda c: SLOW)
    search(path, a_trial, budget=4.5, clock=lambda: next(now))
    assert 0 < len(a_trial.ran) < len(CANDIDATES)
    assert search(path, a_trial, budget=0.0, clock=lambda: 0.0)[0] == []


@pytest.mark.parametrize("seed", range(3))
def test_the_winner_is_never_slower_than_the_heuristic(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    times = {c: 30 + 70 * torch.rand((), generator=generator).item() for c in CANDIDATES}
    (outcome,), _ = search(path, FakeTrial(times.__getitem__))
    assert outcome.us <= outcome.heuristic_us
    assert outcome.us == min(times[c] for c in CANDIDATES if times[c] >= outcome.us)


def test_measured_rows_are_in_the_database(path: Path) -> None:
    search(path, FakeTrial(lambda c: SLOW))
    assert {row.outcome for row in rows(path)} == {MEASURED}
