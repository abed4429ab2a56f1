"""How products of many matrices are computed on Hopper: pure functions of integers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from triton_only_backend.kernels.gemm_configs import (
    HOPPER_TILES,
    GemmConfig,
    GemmProblem,
    shares,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from triton_only_backend.kernels.hardware import Hardware

# µs that a multiprocessor takes for 64 of K on a tile, all of them at work, and for writing one of
# 128 × 256.
_STEP_US = {(128, 256): 0.655, (256, 128): 0.655, (128, 192): 0.525, (128, 128): 0.36}
_WRITE_US = 1.3
# Bytes a µs from memory, and from the L2 cache.
_MEMORY, _L2 = 4.2e6, 5.5e6
# µs that dividing tiles costs; steps below which it is not thought of.
_DIVISION_US, _DIVISION_STEPS = 22.0, 64
# Rows up to which the weight's rows are put on the tensor cores' M side, by another kernel.
_FEW_ROWS = 32


def batched_config(problem: GemmProblem, hardware: Hardware) -> GemmConfig | None:
    """A configuration of `gemm_hopper` for a batch; None where another kernel is to be taken."""
    if not hardware.has_gluon or not problem.aligned or problem.element_size != 2:
        return None
    if problem.batch == 1 or min(problem.M, problem.N) <= _FEW_ROWS:
        return None
    return min(_choices(problem, hardware), key=lambda choice: choice[0])[1]


def _choices(problem: GemmProblem, hardware: Hardware) -> Iterator[tuple[float, GemmConfig]]:
    """Configurations, and the time of each in µs."""
    steps = math.ceil(problem.K / 64)
    size, batch = problem.element_size, problem.batch
    moved = (problem.M + problem.N) * problem.K + problem.M * problem.N
    memory = batch * moved * size / _MEMORY
    for (block_m, block_n), step_us in _STEP_US.items():
        stages = HOPPER_TILES[block_m, block_n]
        alternate = 2 * steps <= stages
        tiles = batch * math.ceil(problem.M / block_m) * math.ceil(problem.N / block_n)
        from_l2 = tiles * (block_m + block_n) * problem.K * size / _L2
        compute, write = steps * step_us, _WRITE_US * block_m * block_n / 32768
        tile_us = max(compute, compute / 2 + write) if alternate else compute + write
        for stream_k in (False, True) if steps >= _DIVISION_STEPS else (False,):
            tile = (block_m, block_n, 64, 1, 16, 8, stages)
            config = GemmConfig("gemm_hopper", *tile, stream_k=stream_k, alternate=alternate)
            share = shares(batch, problem.M, problem.N, problem.K, config, hardware.num_sms)
            if share.divided != stream_k:
                continue
            each: float = math.ceil(share.whole / share.programs)
            if stream_k:
                each += (tiles - share.whole) / share.programs
            busy = 2.5 + each * tile_us + (_DIVISION_US if stream_k else 0.0)
            yield math.hypot(busy, max(memory, from_l2)), config


def short_gemv(problem: GemmProblem, config: GemmConfig, hardware: Hardware) -> GemmConfig:
    """A configuration of `gemv` with more columns a program where K ends within a step.

    64 × 1 × 2048 × 128 as 8192 programs of 16 columns takes 13.8 µs on an H200, cuBLAS 12.5.
    """
    columns = problem.batch * problem.N
    if not hardware.has_wgmma or config.split_k > 1 or not problem.b_k_contiguous:
        return config
    block_n = config.block_n
    while (
        config.block_k >= problem.K
        and block_n * config.block_k < 8192
        and columns >= 2 * block_n * 8 * hardware.num_sms
    ):
        block_n *= 2
    return replace(config, block_n=block_n)
