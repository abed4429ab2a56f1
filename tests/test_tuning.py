"""The search for configurations: what is measured, what may win, what is kept, how it ends."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from triton_only_backend import cli, cli_tune
from triton_only_backend import database as databases
from triton_only_backend.database import MEASURED
from triton_only_backend.kernels import hardware, tuned
from triton_only_backend.kernels.attention_configs import AttentionProblem, select_flash_config
from triton_only_backend.kernels.gemm_configs import (
    GemmConfig,
    GemmProblem,
    heuristic_config,
    select_config,
    supports,
)
from triton_only_backend.kernels.hardware import Hardware
from triton_only_backend.tuning import (
    attention_trial,
    gemm_space,
    measuring,
    problems,
    spaces,
    tables,
    trial,
)
from triton_only_backend.tuning.compilation import Job, compiled_as
from triton_only_backend.tuning.search import STARTED, Search

if TYPE_CHECKING:
    from pathlib import Path

H200 = Hardware("NVIDIA H200", "cuda", "sm90", 132, 232448)
A100 = Hardware("A100", "cuda", "sm80", 108, 166912)
MI300X = Hardware("MI300X", "hip", "gfx942", 304, 65536)
PROBLEM = GemmProblem(1, 64, 4096, 4096, 2, False, True, True)
SOME = [
    PROBLEM,
    GemmProblem(1, 1, 6144, 4096, 2, False, True, True),
    GemmProblem(1, 512, 6144, 4096, 2, False, True, False),
    GemmProblem(8, 128, 128, 512, 2, False, True, True),
    GemmProblem(1, 128, 512, 495, 2, False, True, True, aligned=False),
    GemmProblem(1, 256, 256, 1024, 4, True, True, True),
    GemmProblem(1, 4096, 2, 4096, 2, False, True, True),
]


class FakeTrial:
    """Times by a rule; notes what ran."""

    def __init__(self, times: Any, wrong: Any = ()) -> None:
        self.times, self.wrong, self.ran = times, wrong, []

    def check(self, config: GemmConfig) -> str | None:
        return "error 1.0" if config in self.wrong else None

    def time_us(self, config: GemmConfig, *, precise: bool = False) -> float:
        self.ran.append((config, precise))
        return self.times(config)


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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tuning.db"


@pytest.fixture(autouse=True)
def fresh_lookups():
    tuned.forget()
    yield
    tuned.forget()


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


CANDIDATES = gemm_space.candidates(PROBLEM, H200, 12)
SLOW = 100.0


# The space


@pytest.mark.parametrize("device", [H200, A100, MI300X], ids=lambda h: h.arch)
@pytest.mark.parametrize("problem", SOME, ids=str)
def test_candidates_compute_the_problem_and_fit(problem: GemmProblem, device: Hardware) -> None:
    found = gemm_space.candidates(problem, device, 24)
    assert found[0] == heuristic_config(problem, device)
    assert len(found) == len(set(found)) and 4 <= len(found) <= 24
    for config in found[1:]:
        assert supports(problem, config, device)
        stage = (config.block_m + config.block_n) * config.block_k * problem.element_size
        if config.kernel != "gemv":
            held = config.num_stages - (device.backend == "hip" and config.num_stages > 1)
            assert held * stage * config.resident <= device.shared_memory
            assert config.block_m * config.block_n <= 128 * 32 * config.num_warps
        assert gemm_space.bound_us(problem, config, device) > 0
        assert gemm_space.cost_us(problem, config, device) > 0


@pytest.mark.parametrize("device", [H200, A100], ids=lambda h: h.arch)
@pytest.mark.parametrize("problem", SOME, ids=str)
def test_no_bound_is_above_the_model(problem: GemmProblem, device: Hardware) -> None:
    for config in gemm_space.candidates(problem, device):
        bound = gemm_space.bound_us(problem, config, device)
        assert bound <= gemm_space.cost_us(problem, config, device)


# Tile, warps, stages, resident, halves, split, exchanged; µs on an H200, bf16, K-contiguous
# weights, of the best that a sweep over some 60 configurations a shape found.
SWEPT = [
    ((32, 4096, 4096), ("gemm_tma", 64, 32, 256, 1, 4, True)),
    ((32, 4096, 14336), ("gemm_tma", 64, 32, 128, 1, 4, True)),
    ((64, 14336, 4096), ("gemm_tma", 64, 128, 128, 1, 4, False)),
    ((128, 6144, 4096), ("gemm_tma", 64, 128, 128, 1, 4, False)),
    ((256, 6144, 4096), ("gemm_tma", 128, 128, 64, 1, 8, False)),
    ((1024, 4096, 14336), ("gemm_tma", 128, 256, 64, 1, 8, False)),
    ((4096, 4096, 4096), ("gemm_tma", 128, 256, 64, 1, 8, False)),
]


@pytest.mark.parametrize(("shape", "best"), SWEPT, ids=str)
def test_what_a_sweep_found_best_is_among_the_candidates(shape: Any, best: Any) -> None:
    _kind, problem = problems.product(1, *shape)
    found = gemm_space.candidates(problem, H200, 24)
    assert best in {
        (c.kernel, c.block_m, c.block_n, c.block_k, c.split_k, c.num_warps, c.swap_operands)
        for c in found
    }


def test_jobs_of_one_kernel_compile_once() -> None:
    config = GemmConfig("gemm_tma", 64, 64, 64, 1, 8, 4, 4)
    wide = dataclasses.replace(PROBLEM, N=14336)
    assert compiled_as(Job("gemm", wide, config), 132) == compiled_as(
        Job("gemm", dataclasses.replace(wide, N=28672), config), 132
    )
    few = dataclasses.replace(PROBLEM, N=1024)  # every tile has a program: another loop
    deeper = dataclasses.replace(config, num_stages=5)
    for other in (Job("gemm", few, config), Job("gemm", wide, deeper)):
        assert compiled_as(Job("gemm", wide, config), 132) != compiled_as(other, 132)


# The search


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
    assert spilled not in {config for config, _ in a_trial.ran}


def test_close_finalists_are_measured_again_and_the_second_time_counts(path: Path) -> None:
    lucky, better, far = CANDIDATES[3:6]
    times = {(lucky, False): 50.0, (better, False): 51.0, (far, False): 60.0,
             (lucky, True): 52.0, (better, True): 50.5}  # fmt: skip
    a_trial = FakeTrial(None)
    a_trial.time_us = lambda config, precise=False: times.get((config, precise), SLOW)
    (outcome,), _ = search(path, a_trial)
    assert (outcome.config, outcome.us) == (better, 50.5)


def test_candidates_that_cannot_win_are_left_out(path: Path) -> None:
    _, large = problems.product(1, 512, 6144, 4096)
    found = gemm_space.candidates(large, H200, 40)
    bounds = {c: gemm_space.bound_us(large, c, H200) for c in found}
    fast = min(bounds.values()) * 1.001
    a_trial = FakeTrial(lambda c: fast)
    (_,), progress = search(path, a_trial, problem=large, limit=40)
    ran = {config for config, precise in a_trial.ran if not precise}
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
    assert [c for c, precise in rest.ran if not precise] == CANDIDATES[4:]
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
    assert CANDIDATES[2] not in {config for config, _ in a_trial.ran}
    assert outcome.rejected == {tuned.encode(CANDIDATES[2]): STARTED}


def test_the_budget_ends_the_search(path: Path) -> None:
    now = iter(range(1000))
    a_trial = FakeTrial(lambda c: SLOW)
    search(path, a_trial, budget=4.5, clock=lambda: next(now))
    assert 0 < len([1 for _, precise in a_trial.ran if not precise]) < len(CANDIDATES)
    assert search(path, a_trial, budget=0.0, clock=lambda: 0.0)[0] == []


@pytest.mark.parametrize("seed", range(3))
def test_the_winner_is_never_slower_than_the_heuristic(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    times = {c: 30 + 70 * torch.rand((), generator=generator).item() for c in CANDIDATES}
    (outcome,), _ = search(path, FakeTrial(times.__getitem__))
    assert outcome.us <= outcome.heuristic_us
    assert outcome.us == min(times[c] for c in CANDIDATES if times[c] >= outcome.us)


# Trials, with the kernels themselves


@pytest.mark.parametrize(
    "problem",
    [
        GemmProblem(1, 16, 64, 96, 2, False, True, True),
        GemmProblem(2, 16, 64, 96, 2, False, True, False),
        GemmProblem(1, 16, 32, 33, 2, False, False, True, aligned=False),
        GemmProblem(1, 16, 32, 64, 4, True, True, True),
        GemmProblem(1, 2, 64, 96, 2, False, True, True),
    ],
    ids=str,
)
def test_a_trial_has_the_problem_it_was_made_for(problem: GemmProblem, device: str) -> None:
    a_trial = trial.GemmTrial(problem, torch.device(device))
    config = heuristic_config(problem, hardware.of(torch.device(device)))
    with tuned.recording() as recorded:
        assert a_trial.check(config) is None
    assert list(recorded) == [("gemm", problem)]


def test_a_wrong_configuration_is_caught(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = GemmProblem(1, 16, 64, 96, 2, False, True, True)
    a_trial = trial.GemmTrial(problem, torch.device(device))
    config = heuristic_config(problem, hardware.of(torch.device(device)))
    matmul = trial.load("matmul")
    right = matmul.matmul

    def one_missing(a: Any, b: Any, bias: Any, out: Any) -> None:
        right(a, b, bias, out)
        out[0, 3, 5] = torch.nan

    def inaccurate(a: Any, b: Any, bias: Any, out: Any) -> None:
        right(a, b, bias, out)
        out[0, :8] *= 1.02

    def unsteady(a: Any, b: Any, bias: Any, out: Any) -> None:
        right(a, b, bias, out)
        out[0, 0, 0] *= 1 + torch.rand(()).item() * 2**-4

    for faulty, cause in ((one_missing, "error nan"), (inaccurate, "error"), (unsteady, "bits")):
        monkeypatch.setattr(matmul, "matmul", faulty)
        assert cause in (a_trial.check(config) or "")


def test_forced_configurations_are_what_runs(device: str) -> None:
    config = GemmConfig("gemm", 16, 16, 16, 3, 1, 4, 1)
    with tuned.forcing("gemm", config):
        assert select_config(PROBLEM, H200) is config
    assert select_config(PROBLEM, H200) != config


@pytest.mark.gpu
def test_tune_on_the_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, table = tmp_path / "tuning.db", tmp_path / "table.json"
    arguments = ["tune", "--shape", "16,64x512x1024", "--candidates", "4", "--database", str(path)]
    for _ in range(2):
        cli_main([*arguments, "--export", str(table), "--json", str(tmp_path / "found.json")])
        found = json.loads((tmp_path / "found.json").read_text())
        assert [outcome["problem"]["M"] for outcome in found] == [16, 64]
        assert all(outcome["us"] <= outcome["heuristic_us"] * 1.05 for outcome in found)
    chosen = tuned.Sources(database=str(path))
    device = hardware.of(torch.device("cuda"))
    assert len(tuned.measured("gemm", device, str(path))) == 2
    with tuned.using(chosen):
        _, problem = problems.product(1, 16, 512, 1024)
        assert tuned.encode(select_config(problem, device)) in table.read_text()


# Attention

PREFILL = AttentionProblem(2, 4, 2, 64, 64, 32, 32, 2, True, False)
DECODE = AttentionProblem(2, 4, 2, 1, 64, 32, 32, 2, False, True)
LARGE = AttentionProblem(2, 32, 8, 2048, 2048, 128, 128, 2, True, False)
STEP = AttentionProblem(8, 32, 8, 1, 4096, 128, 128, 2, False, False)


@pytest.mark.parametrize("device", [H200, A100, MI300X], ids=lambda h: h.arch)
@pytest.mark.parametrize(
    ("kind", "problem"), [("flash_attention", LARGE), ("decode_attention", STEP)], ids=str
)
def test_attention_candidates(kind: str, problem: AttentionProblem, device: Hardware) -> None:
    found = spaces.candidates(kind, problem, device, 16)
    assert found[0] == spaces.heuristic(kind, problem, device)
    assert len(found) == len(set(found)) and 6 <= len(found) <= 16
    assert spaces.bound_us(kind, problem, found[0], device) > 0
    for config in found:
        assert spaces.decode_config(kind, tuned.encode(config)) == config
    assert spaces.decode_problem(kind, tuned.encode(problem)) == problem


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("flash_attention", PREFILL),
        ("flash_attention", dataclasses.replace(PREFILL, has_mask=True, is_causal=False)),
        ("decode_attention", DECODE),
        ("decode_attention", dataclasses.replace(DECODE, has_mask=False)),
    ],
    ids=str,
)
def test_an_attention_trial(
    kind: str, problem: AttentionProblem, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_trial = trial.make_trial(kind, problem, torch.device(device))
    config = spaces.heuristic(kind, problem, hardware.of(torch.device(device)))
    with tuned.recording() as recorded:
        assert a_trial.check(config) is None
    assert list(recorded) == [(kind, problem)]
    right = attention_trial.attend
    monkeypatch.setattr(attention_trial, "attend", lambda x, p: right(x, p).mul_(1.01))
    assert "error" in (a_trial.check(config) or "")


def test_lengths_are_rounded_and_modified_attention_is_not_tuned() -> None:
    near = dataclasses.replace(LARGE, batch=2, len_q=1500, len_kv=1100)
    assert near.bucketed() == LARGE
    capped = dataclasses.replace(LARGE, has_softcap=True)

    def run() -> None:
        for problem in (near, LARGE, capped):
            select_flash_config(problem, H200)

    assert problems.recorded(run) == [("flash_attention", LARGE)]


# Workers


# Without the guard that scripts need whose processes are started anew.
WORKER = """
import json
from triton_only_backend.kernels.gemm_configs import GemmConfig, GemmProblem, heuristic_config
from triton_only_backend.kernels.hardware import Hardware
from triton_only_backend.tuning.compilation import Job, Pool
from triton_only_backend.tuning.cross_compile import Target

device = Hardware("NVIDIA H200", "cuda", "sm90", 132, 232448)
problem = GemmProblem(1, 64, 4096, 4096, 2, False, True, True)
good = heuristic_config(problem, device)
spills = GemmConfig("gemm", 256, 256, 64, 1, 8, 4, 2)
no_tile = GemmConfig("gemm", 24, 64, 64, 1, 8, 4, 2)
with Pool(Target("cuda", 90, 32), device, processes=1) as pool:
    jobs = [Job("gemm", problem, config) for config in (good, spills, no_tile)]
    for job in jobs:
        pool.submit(job)
    print(json.dumps([pool.result(job) for job in jobs]))
"""
CRASHING = """
import os

def crash_on(job, shared_memory):
    if job.config == "crash":
        os.abort()
"""
CRASHES = """
import crashing
from triton_only_backend.kernels.hardware import INTERPRETER
from triton_only_backend.tuning import compilation
from triton_only_backend.tuning.compilation import Job, Pool

compilation.compile_job = crashing.crash_on
compilation.begin = print
with Pool(None, INTERPRETER, processes=1) as pool:
    jobs = [Job("x", i, c) for i, c in enumerate(["a", "b", "crash", "d", "e"])]
    for job in jobs:
        pool.submit(job)
    print([pool.result(job) for job in jobs])
"""


def run_script(tmp_path: Path, source: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(source)
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environ, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()[-1]


def test_workers_compile_and_say_what_cannot_be_used(tmp_path: Path) -> None:
    good, spills, no_tile = json.loads(run_script(tmp_path, WORKER))
    assert good is None
    assert spills.startswith("spills") or "shared memory" in spills
    assert no_tile.startswith("does not compile")


def test_a_crash_of_the_compiler_costs_one_candidate(tmp_path: Path) -> None:
    (tmp_path / "crashing.py").write_text(CRASHING)
    found = run_script(tmp_path, CRASHES)
    assert found == str([None, None, "the compiler crashed", None, None])


# Problems


def test_shapes_are_read() -> None:
    (one,) = problems.parse_shape("32x6144x4096", "bf16", True)
    assert one == ("gemm", GemmProblem(1, 32, 6144, 4096, 2, False, True, True))
    many = problems.parse_shape(" 8x1,65x128x64 ", "fp32", False)
    assert [p.M for _, p in many] == [1, 128]
    assert all(p.batch == 8 and p.ieee and not p.b_k_contiguous for _, p in many)
    ((_, odd),) = problems.parse_shape("64x5333x495", "fp16", True)
    assert not odd.aligned and odd.N == 5376


@pytest.mark.parametrize("text", ["", "32x6144", "0x2x3", "1x2x3x4x5", "ax2x3", "1,x2x3", "1x-2x3"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(problems.ShapeError, match="is no shape; write MxNxK"):
        problems.parse_shape(text, "bf16", True)


def test_a_file_of_shapes(tmp_path: Path) -> None:
    path = tmp_path / "shapes.txt"
    path.write_text("# q, k, v\n1,2x6144x4096\n\n1x6144x4096  # again\n")
    found = problems.read_shapes(path, "bf16", True)
    assert [p.M for _, p in found] == [1, 2]
    path.write_text("1x2x3\nnonsense\n")
    with pytest.raises(problems.ShapeError, match="line 2: 'nonsense'"):
        problems.read_shapes(path, "bf16", True)


def test_presets_begin_with_what_matters_most() -> None:
    llama = problems.preset("llama")
    first = {(p.M, p.N, p.K) for _, p in llama[:35]}
    assert first == {(M, N, K) for M in problems.MAIN_ROWS for N, K in problems.LLAMA3_8B}
    everything = problems.preset("all")
    assert everything[: len(llama)] == llama
    assert len(set(everything)) == len(everything)
    assert {p.K for _, p in everything} >= {495, 1024, 4096, 8192, 10240, 14336, 28672}


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def make_two() -> Any:
    return Two(), (torch.randn(5, 64),)


@pytest.mark.cpu
def test_the_problems_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "two_layers.py"
    module.write_text(
        "import torch\n"
        "def make():\n"
        "    up, down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)\n"
        "    return torch.nn.Sequential(up, torch.nn.ReLU(), down), (torch.randn(5, 64),)\n"
    )
    found = cli_tune._of_model(f"{module}:make", no_grad=True)
    assert [(p.M, p.N, p.K) for kind, p in found if kind == "gemm"] == [(8, 128, 64), (8, 64, 96)]
    with_backward = cli_tune._of_model(f"{module}:make", no_grad=False)
    assert set(found) < set(with_backward)


@pytest.mark.cpu
def test_the_problems_of_a_saved_graph(tmp_path: Path) -> None:
    model, args = make_two()
    path = tmp_path / "two.pt2"
    torch.export.save(torch.export.export(model, args), path)
    found = cli_tune._of_model(str(path), no_grad=True)
    assert [(p.N, p.K) for _, p in found] == [(128, 64), (64, 96)]
    path.write_bytes(b"nothing")
    with pytest.raises(cli_tune.UsageError, match="cannot load"):
        cli_tune.load_exported(str(path))


# The command


def cli_main(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert not stopped.value.code, stopped.value.code


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    cli_main(["tune", "--dry-run", "--shape", "16x512x1024", "--candidates", "5"])
    assert "16x512x1024 16-bit: 5 candidates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to tune"),
        (["--preset", "nothing"], "--preset 'nothing' is none of llama, all"),
        (["--shape", "3"], "'3' is no shape"),
        (["--shape", "1x2x3", "--dtype", "int8"], "--dtype 'int8' is none of"),
        (["--shape", "1x2x3", "--layout", "m"], "--layout 'm' is neither k nor n"),
        (["no_such_module:f", "--dry-run"], "cannot import no_such_module"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", *arguments, "--database", str(path)])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not path.exists()


@pytest.mark.cpu
def test_tuning_needs_a_gpu(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", "--shape", "1x2x3", "--database", str(path)])
    assert stopped.value.code == 2
    assert "need a CUDA or ROCm GPU" in capsys.readouterr().err


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An H200 whose clock and compiler are played; sets what candidates do."""
    from triton_only_backend import timing
    from triton_only_backend.tuning import compilation

    class Pool(FakeCompiler):
        def __init__(self, *_: Any) -> None:
            super().__init__()

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(timing, "require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(cli_tune, "of_current", lambda: torch.device("cpu"))
    monkeypatch.setattr(hardware, "of", lambda device: H200)
    monkeypatch.setattr(compilation, "Pool", Pool)
    monkeypatch.setattr(compilation, "current_target", lambda: None)

    def play(times: Any) -> FakeTrial:
        a_trial = FakeTrial(times)
        monkeypatch.setattr(trial, "make_trial", lambda *_: a_trial)
        return a_trial

    return play


def test_the_command_tunes_exports_and_goes_on(
    played: Any, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, found = tmp_path / "table.json", tmp_path / "found.json"
    arguments = ["tune", "--shape", "32,64x4096x4096", "--candidates", "5", "--database", str(path)]
    a_trial = played(lambda c: 40.0 + c.num_stages)
    cli_main([*arguments, "--export", str(table), "--json", str(found)])
    assert f"2 problems tuned, in {path}" in " ".join(capsys.readouterr().out.split())
    outcomes = json.loads(found.read_text())
    assert [outcome["measured"] for outcome in outcomes] == [5, 5]
    assert all(o["speedup over the heuristic"] >= 1 for o in outcomes)
    assert len(tuned.read_table(table)["entries"]["gemm"]) == 2
    ran = len(a_trial.ran)
    cli_main(arguments)
    assert len(a_trial.ran) == ran
    only = tmp_path / "only.json"
    cli_main(["tune", "--database", str(path), "--export", str(only)])
    assert only.read_text() == table.read_text()


def test_the_command_stopped_by_hand(
    played: Any, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(config: GemmConfig) -> float:
        if len(a_trial.ran) > 9:  # five, three of them again, and of the next problem two
            raise KeyboardInterrupt
        return 50.0

    a_trial = played(stop)
    with pytest.raises(SystemExit) as stopped:
        cli.main(
            ["tune", "--shape", "32,64x4096x4096", "--candidates", "5", "--database", str(path)]
        )
    assert stopped.value.code == 130
    assert "1 are left: the same command goes on" in " ".join(capsys.readouterr().out.split())
    assert {row.outcome for row in rows(path)} == {MEASURED}


def test_a_foreign_database_ends_the_command(
    played: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "precious.db"
    path.write_bytes(b"precious" * 100)
    played(lambda c: 1.0)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", "--shape", "1x2x3", "--database", str(path)])
    assert stopped.value.code == 2
    assert "it is left as it is" in " ".join(capsys.readouterr().err.split())
    assert path.read_bytes() == b"precious" * 100


def test_the_bar_prints_a_line_a_problem(path: Path) -> None:
    from rich.console import Console

    text = io.StringIO()
    with cli_tune.Bar(Console(file=text, width=300)) as bar, databases.writing(path) as database:
        times = {CANDIDATES[3]: 50.0}
        Search(
            H200, database, FakeCompiler(), lambda *_: FakeTrial(lambda c: times.get(c, SLOW)), bar,
            limit=6,
        ).run([("gemm", PROBLEM)])  # fmt: skip
    assert "64x4096x4096 16-bit: 50.0 µs, 2.00 × the heuristic (100.0), of 6: " in text.getvalue()
    assert "6/6" in text.getvalue()


# Tables


def test_a_table_holds_the_best_and_is_read_back(path: Path, tmp_path: Path) -> None:
    best = CANDIDATES[4]
    search(path, FakeTrial(lambda c: 50.0 if c == best else SLOW))
    table = tmp_path / "tables" / "nvidia-h200.json"
    with databases.reading(path) as database:
        assert tables.export(database, table) == 1
        with pytest.raises(databases.DatabaseError, match=r"on NVIDIA H200 .*one GPU"):
            tables.export(database, table, gpu="another")
    found = tuned.read_table(table)
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
    for table in tuned.shipped_tables():
        device = Hardware(table["gpu"], "cuda", table["arch"], 132, 232448)
        for kind, found in table["entries"].items():
            for problem, config in found.items():
                chosen = spaces.decode_config(kind, config)
                a_problem = spaces.decode_problem(kind, problem)
                assert tuned.encode(a_problem) == problem
                assert kind != "gemm" or supports(a_problem, chosen, device)


def test_the_kernel_sources_that_are_hashed_are_there() -> None:
    for names in tuned.SOURCES.values():
        assert all((tuned.KERNELS / name).is_file() for name in names)


def test_measured_rows_are_in_the_database(path: Path) -> None:
    search(path, FakeTrial(lambda c: SLOW))
    assert {row.outcome for row in rows(path)} == {MEASURED}
