"""Which tiles, split and kernel a single product takes on Hopper: pure functions of integers."""

from __future__ import annotations

import functools
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
from triton_only_backend.kernels.sizes import fullness_of_waves, next_power_of_2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from triton_only_backend.kernels.hardware import Hardware

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, halves of the store; µs that one multiprocessor of an
# H200 takes for such a tile with K = 4096, bf16 (one full wave, less 2.5 µs for launch and fill).
# Of 64 × 256 more than the 22.5 that a wave by itself takes: 64 × 57344 × 8192 takes 241 so, 235
# in tiles of 64 × 128, and 2048 × 832 × 5376 50, in tiles of 128 × 128 31.
_HOPPER_TILES = (
    (64, 32, 256, 4, 4, False, 6.8),
    (64, 64, 128, 4, 6, False, 8.4),
    (64, 128, 128, 4, 4, False, 14.3),
    (64, 256, 64, 4, 5, True, 29.0),
    (128, 128, 64, 8, 6, True, 22.6),
    (128, 256, 64, 8, 4, True, 42.0),
)
_HOPPER_REDUCTION_US = 2.0
# A second launch must promise as much. With more rows it lost up to 9 % for all that it promised:
# there the power limit sets the pace, and multiprocessors without work raise the others' clocks.
_WHOLE_WAVES_GAIN, _WHOLE_WAVES_ROWS = 0.98, 512


def hopper_config(problem: GemmProblem, hardware: Hardware) -> GemmConfig | None:
    """Descriptor kernels on Hopper; None where another kernel measured better."""
    if min(problem.M, problem.N) <= 32:
        if problem.M <= problem.N:
            return _hopper_skinny(problem.transposed, hardware, swap=True)
        return _hopper_skinny(problem, hardware, swap=False)
    choices = [hopper_choice(problem, hardware)]
    if hardware.has_gluon:
        choices += _warp_specialised(problem, hardware)
    if problem.M <= _WHOLE_WAVES_ROWS:
        choices += _in_whole_waves(problem, hardware)
    return min(choices, key=lambda choice: choice[0])[1]


# A single wave as full as this is not divided: 112 tiles of 256 × 14336 × 4096 took 47.0 µs whole,
# 50.4 divided, an H200. Nor are tiles of so few rows, which wait for memory: 128 × 8192 × 8192 38.7
# by `gemm_tma`, 47 divided.
_NEARLY_FULL, _UNDIVIDED_ROWS = 0.8, 128
# Tiles of `gemm_hopper`, the parts of K, and whether the last wave's are divided. Its other tiles
# are level with `gemm_tma`'s.
_WARP_SPECIALISED = (
    ((128, 96), 1, False),
    ((128, 128), 1, False),
    ((128, 160), 1, False),
    ((128, 192), 1, False),
    ((128, 224), 1, False),
    ((128, 96), 2, False),
    ((128, 128), 2, False),
    ((128, 160), 2, False),
    ((128, 128), 1, True),
    ((128, 256), 1, True),
)


def _warp_specialised(
    problem: GemmProblem, hardware: Hardware
) -> Iterator[tuple[float, GemmConfig]]:
    """Configurations of `gemm_hopper`, and the time of each in µs.

    Measured on an H200, bf16, µs (cuBLAS, `gemm_tma`): 512 × 6144 × 4096 36.4 (35.4, 41.9) in one
    wave of 128 × 192; 256 × 10240 × 8192 67.8 (62.0, 81), 256 × 57344 × 8192 330 (328, 349) and
    4096 × 57344 × 8192 5628 (5839, 6032) of 128 × 256, the last wave divided; 512 × 2560 × 10240
    42.9 (37.2, 44.3) of 128 × 128, all divided.
    """
    read = (problem.M + problem.N) * problem.K * problem.element_size / BYTES_PER_US
    steps = math.ceil(problem.K / 64)
    for (block_m, block_n), split_k, stream_k in _WARP_SPECIALISED:
        stages = HOPPER_TILES[block_m, block_n]
        config = GemmConfig(
            "gemm_hopper", block_m, block_n, 64, split_k, 16, 8, stages, stream_k=stream_k
        )
        share = shares(problem.batch, problem.M, problem.N, problem.K, config, hardware.num_sms)
        tiles = math.ceil(problem.M / block_m) * math.ceil(problem.N / block_n)
        full = fullness_of_waves(tiles, hardware.num_sms) > _NEARLY_FULL
        nearly_full = full and tiles <= hardware.num_sms
        if stream_k and (not share.divided or nearly_full or problem.M <= _UNDIVIDED_ROWS):
            continue
        # Halves in one wave, and of no fewer steps than hide the exchange.
        if split_k == 2 and (share.programs > hardware.num_sms or steps < 2 * stages):
            continue
        # Of the busiest program.
        each = math.ceil(share.whole / share.programs) * math.ceil(steps / split_k)
        if stream_k:
            each += math.ceil((tiles - share.whole) * steps / share.programs)
        busy = 2.5 + division_us(share, tiles, config) + each * STEP_US[block_m, block_n]
        yield math.hypot(busy, read), config


@functools.lru_cache(maxsize=4096)
def hopper_choice(
    problem: GemmProblem, hardware: Hardware, *, may_split: bool = True
) -> tuple[float, GemmConfig]:
    """The tiles and split of the persistent kernel with the least time, and that time in µs."""
    read = (problem.M + problem.N) * problem.K * problem.element_size / BYTES_PER_US
    best: tuple[float, GemmConfig] | None = None
    for block_m, block_n, block_k, warps, stages, halves, tile_us in _HOPPER_TILES:
        tiles = math.ceil(problem.M / block_m) * math.ceil(problem.N / block_n)
        for split_k in (1, 2, 3, 4) if may_split else (1,):
            if split_k > 1 and (problem.K // split_k < 8 * block_k or 2 * tiles > hardware.num_sms):
                break
            waves = math.ceil(tiles * split_k / hardware.num_sms)
            compute = 2.5 + waves * tile_us * problem.K / split_k / 4096
            # Neither hides the other entirely.
            cost = math.hypot(compute, read)
            if split_k > 1:
                partials = 8 * split_k * problem.M * problem.N / BYTES_PER_US
                cost += _HOPPER_REDUCTION_US + partials
            if best is None or cost < best[0]:
                # 1024 × 4096 × 14336, one wave: 146 µs with 3 stages, 175 with 4.
                large = block_m * block_n == 32768
                depth = 3 if large and (waves == 1 or waves >= 5) else stages
                config = GemmConfig(
                    "gemm_tma", block_m, block_n, block_k, split_k, 16, warps, depth,
                    store_halves=halves and not (large and waves >= 5),
                )  # fmt: skip
                best = (cost, config)
    assert best is not None
    return best


def _in_whole_waves(problem: GemmProblem, hardware: Hardware) -> Iterator[tuple[float, GemmConfig]]:
    """The largest tiles in whole waves, what is left in smaller ones; nothing if there is no gain.

    Measured on an H200, bf16, µs in one launch, so, and cuBLAS: 512 × 28672 × 4096 162, 155, 153;
    512 × 10240 × 8192 134, 114, 115; 256 × 57344 × 8192 368, 358, 318.
    """
    block_m, block_n = 128, 256
    rows = math.ceil(problem.M / block_m)
    waves = rows * math.ceil(problem.N / block_n) // hardware.num_sms
    columns = waves * hardware.num_sms // rows * block_n
    if not 0 < columns < problem.N:
        return
    cost, config = hopper_choice(replace(problem, N=columns), hardware, may_split=False)
    rest, _ = hopper_choice(replace(problem, N=problem.N - columns), hardware, may_split=False)
    if cost + rest <= _WHOLE_WAVES_GAIN * hopper_choice(problem, hardware)[0]:
        yield cost + rest, replace(config, columns=columns)


# Of `_hopper_skinny`, by the padded rows of the other operand and the weight's rows in a tile: K of
# a step and stages. Measured on an H200, bf16.
_SKINNY_TILES = {
    16: {64: (256, 5), 128: (256, 3), 256: (128, 3)},
    32: {64: (256, 4), 128: (128, 5), 256: (128, 3)},
}
# Larger tiles read faster, if their last wave is about as full as that of the smallest, µs: 16 ×
# 10240 × 8192 51.4 in 160 tiles of 64 rows, 40.9 in 80 of 128; 32 × 57344 × 8192 219 in tiles of
# 64 or 128, 212 in 224 of 256; 32 × 49152 × 4096 has only 192 of these: 95 in tiles of 128.
_FULL_ENOUGH = 0.85


def _hopper_skinny(problem: GemmProblem, hardware: Hardware, *, swap: bool) -> GemmConfig | None:
    """The problem comes with its long side, the weight's rows, as M; N ≤ 32."""
    block_n = max(next_power_of_2(problem.N), 16)
    if math.ceil(problem.M / 64) < hardware.num_sms // 3:
        return None  # Too few tiles of 64 rows: split-K of the pointer kernel is faster.

    def fullness(block_m: int) -> float:
        return fullness_of_waves(math.ceil(problem.M / block_m), hardware.num_sms)

    enough = _FULL_ENOUGH * fullness(64)
    # Of a weight that lies along N the largest were not measured.
    sizes = (64, 128, 256) if problem.a_k_contiguous else (64, 128)
    block_m = max(rows for rows in sizes if fullness(rows) >= enough)
    block_k, stages = _SKINNY_TILES[block_n][block_m]
    blocks = math.ceil(problem.M / block_m)
    if block_n == 32 and blocks <= hardware.num_sms // 2 and problem.K >= 8192:
        block_k, stages = 128, 8  # 32 × 4096 × 14336 30.7 µs, with 4 stages of 256 31.3
    if block_m == 256:
        # 8 × 57344 × 8192 209 µs, by `gemm_tma` 232.
        return GemmConfig("gemm", block_m, block_n, block_k, 1, 8, 8, stages, swap)
    return GemmConfig("gemm_tma", block_m, block_n, block_k, 1, 8, 4, stages, swap)
