"""The configurations that are worth measuring: they compute the problem, and hold the best."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from played_tuning import A100, H200, MI300X, PROBLEM

from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.attention_configs import AttentionProblem, select_flash_config
from triton_only_backend.kernels.gemm_choice import heuristic_config
from triton_only_backend.kernels.gemm_configs import GemmConfig, GemmProblem, supports
from triton_only_backend.kernels.shipped_tables import shipped_tables
from triton_only_backend.tuning import gemm_cost, gemm_space, problems, spaces
from triton_only_backend.tuning.compilation import Job, compiled_as

if TYPE_CHECKING:
    from triton_only_backend.kernels.hardware import Hardware


SOME = [
    PROBLEM,
    GemmProblem(1, 1, 6144, 4096, 2, False, True, True),
    GemmProblem(1, 512, 6144, 4096, 2, False, True, False),
    GemmProblem(8, 128, 128, 512, 2, False, True, True),
    GemmProblem(1, 128, 512, 495, 2, False, True, True, aligned=False),
    GemmProblem(1, 256, 256, 1024, 4, True, True, True),
    GemmProblem(1, 4096, 2, 4096, 2, False, True, True),
]


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
        assert gemm_cost.bound_us(problem, config, device) > 0
        assert gemm_cost.cost_us(problem, config, device) > 0


@pytest.mark.parametrize("device", [H200, A100], ids=lambda h: h.arch)
@pytest.mark.parametrize("problem", SOME, ids=str)
def test_no_bound_is_above_the_model(problem: GemmProblem, device: Hardware) -> None:
    for config in gemm_space.candidates(problem, device):
        bound = gemm_cost.bound_us(problem, config, device)
        assert bound <= gemm_cost.cost_us(problem, config, device)


# Tile, warps, stages, resident, halves, split, exchanged; µs on an H200, bf16, K-contiguous
# weights, of the best that a sweep over some 60 configurations a shape found.
SWEPT = [
    ((32, 4096, 4096), ("gemm_tma", 64, 32, 256, 1, 4, True)),
    ((32, 4096, 14336), ("ring_linear", 32, 32, 256, 1, 4, False)),
    ((64, 14336, 4096), ("gemm_tma", 64, 128, 128, 1, 4, False)),
    ((128, 6144, 4096), ("gemm_tma", 64, 128, 128, 1, 4, False)),
    ((128, 10240, 8192), ("gemm_hopper", 128, 160, 64, 2, 8, False)),
    ((256, 6144, 4096), ("gemm_tma", 128, 128, 64, 1, 8, False)),
    ((256, 14336, 4096), ("gemm_hopper", 128, 224, 64, 1, 8, False)),
    ((512, 2560, 10240), ("gemm_hopper", 128, 160, 64, 2, 8, False)),
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


def test_what_is_shipped_is_among_the_candidates() -> None:
    (table,) = (t for t in shipped_tables() if t["gpu"] == H200.name)
    differs = 0
    for text, config in table["entries"]["gemm"].items():
        problem = spaces.decode_problem("gemm", text)
        found = spaces.candidates("gemm", problem, H200, 4)
        assert len(found) == len(set(found)) == 4
        assert found[0] == heuristic_config(problem, H200)
        assert spaces.decode_config("gemm", config) == spaces.shipped("gemm", problem, H200)
        assert spaces.shipped("gemm", problem, H200) in found
        differs += found[0] != found[1] == spaces.shipped("gemm", problem, H200)
    assert differs


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


def test_lengths_are_rounded_and_modified_attention_is_not_tuned() -> None:
    near = dataclasses.replace(LARGE, batch=2, len_q=1500, len_kv=1100)
    assert near.bucketed() == LARGE
    capped = dataclasses.replace(LARGE, has_softcap=True)

    def run() -> None:
        for problem in (near, LARGE, capped):
            select_flash_config(problem, H200)

    assert problems.recorded(run) == [("flash_attention", LARGE)]
