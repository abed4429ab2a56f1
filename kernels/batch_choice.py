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
from triton_only_backend.kernels.hopper_rates import BYTES_PER_US, STEP_US, division_us

if TYPE_CHECKING:
    from collections.abc import Iterator

    from triton_only_backend.kernels.hardware import Hardware

_TILES = ((128, 256), (256, 128), (128, 192), (128, 128))
_WRITE_US = 1.3  # that a multiprocessor takes for writing a tile of 128 × 256
_L2_BYTES_PER_US = 5.5e6
# Steps below which dividing tiles is not thought of.
_DIVISION_STEPS = 64
# What dividing must promise, whose cost was measured of single products.
_DIVISION_GAIN = 0.96
# Rows up to which another kernel puts the weight's rows on the tensor cores' M side: always, and
# from so much of K on, where reading the weights is all the time there is (8 × 64 × 14336 × 4096
# takes it 241 µs on an H200, this one 263).
_FEW_ROWS, _SOME_ROWS, _LONG_K = 32, 64, 1024
# Rows of which a weight is read once: there smaller tiles and a deeper ring are faster
# (64 × 128 × 2048 × 1408 107.9 µs, with 256 columns 109.6).
_ONE_TILE = (128, 128)


def batched_config(problem: GemmProblem, hardware: Hardware) -> GemmConfig | None:
    """A configuration of `gemm_hopper` for a batch; None where another kernel is to be taken."""
    if not hardware.has_gluon or not problem.aligned or problem.element_size != 2:
        return None
    if problem.batch == 1 or min(problem.M, problem.N) <= _FEW_ROWS:
        return None
    if problem.M <= _SOME_ROWS and problem.K >= _LONG_K:
        return None
    return min(_choices(problem, hardware), key=lambda choice: choice[0])[1]


def _choices(problem: GemmProblem, hardware: Hardware) -> Iterator[tuple[float, GemmConfig]]:
    """Configurations, and the time of each in µs."""
    steps = math.ceil(problem.K / 64)
    size, batch = problem.element_size, problem.batch
    moved = (problem.M + problem.N) * problem.K + problem.M * problem.N
    memory = batch * moved * size / BYTES_PER_US
    rows, columns = _ONE_TILE
    once = rows >= problem.M and 2 * steps > HOPPER_TILES[rows, columns]
    for block_m, block_n in _TILES:
        if once and (block_m, block_n) != (rows, columns):
            continue
        stages = HOPPER_TILES[block_m, block_n]
        alternate = 2 * steps <= stages
        tiles = batch * math.ceil(problem.M / block_m) * math.ceil(problem.N / block_n)
        from_l2 = tiles * (block_m + block_n) * problem.K * size / _L2_BYTES_PER_US
        compute, write = steps * STEP_US[block_m, block_n], _WRITE_US * block_m * block_n / 32768
        tile_us = max(compute, compute / 2 + write) if alternate else compute + write
        for stream_k in (False, True) if steps >= _DIVISION_STEPS else (False,):
            tile = (block_m, block_n, 64, 1, 16, 8, stages)
            config = GemmConfig("gemm_hopper", *tile, stream_k=stream_k, alternate=alternate)
            share = shares(batch, problem.M, problem.N, problem.K, config, hardware.num_sms)
            if share.divided != stream_k:
                continue
            busy = 2.5 + share.tiles_each(tiles) * tile_us + division_us(share, tiles, config)
            cost = math.hypot(busy, max(memory, from_l2))
            yield cost / _DIVISION_GAIN if stream_k else cost, config


def short_gemv(problem: GemmProblem, config: GemmConfig, hardware: Hardware) -> GemmConfig:
    """A configuration of `gemv` for a K that ends within a step: no pipeline, and more columns.

    Measured on an H200, bf16, 64 × 1 × 2048 × 128, µs: 13.9 of 16 columns and 4 stages, 12.0 of
    64, 9.5 of 64 without stages, 9.35 of 32, 10.1 of 128; cuBLAS 12.4.
    """
    columns = problem.batch * problem.N
    if not hardware.has_wgmma or config.split_k > 1 or not problem.b_k_contiguous:
        return config
    if config.block_k < problem.K:
        return config
    block_n = config.block_n
    while block_n * config.block_k < 4096 and columns >= 2 * block_n * 8 * hardware.num_sms:
        block_n *= 2
    return replace(config, block_n=block_n, num_stages=1)
