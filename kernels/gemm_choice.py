"""Which GEMM kernel, tile and work decomposition for a problem: pure functions of integers.

`select_config` takes what was measured (see `tuned`), and else `heuristic_config`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.batch_choice import batched_config, short_gemv
from triton_only_backend.kernels.gemm_configs import (
    GEMV_MAX_ROWS,
    SKINNY_MAX_ROWS,
    GemmConfig,
    GemmProblem,
    streams_through_ring,
    supports,
    with_ring,
)
from triton_only_backend.kernels.hopper_choice import hopper_config
from triton_only_backend.kernels.realign_choice import should_realign, unaligned_gemv
from triton_only_backend.kernels.ring_configs import select_product_ring
from triton_only_backend.kernels.sizes import next_power_of_2

if TYPE_CHECKING:
    from triton_only_backend.kernels.hardware import Hardware


def select_config(problem: GemmProblem, hardware: Hardware) -> GemmConfig:
    """The configuration measured best, or else the heuristic's."""
    return tuned.select("gemm", problem, hardware, GemmConfig, supports, heuristic_config)


@functools.lru_cache(maxsize=4096)
def heuristic_config(problem: GemmProblem, hardware: Hardware) -> GemmConfig:
    """The configuration the heuristic chooses."""
    if streams_through_ring(problem):
        ring = select_product_ring(
            problem.M, problem.N, problem.K, problem.b_k_contiguous, hardware
        )
        if ring is not None:
            return with_ring(problem.M, ring)
    return general_config(problem, hardware)


@functools.lru_cache(maxsize=4096)
def general_config(problem: GemmProblem, hardware: Hardware) -> GemmConfig:
    """The same without the ring, which not every epilogue and output can have."""
    if hardware.is_interpreter:
        return _interpreted(problem)
    if not problem.aligned:
        return _unaligned(problem, hardware)
    if not _streams_in_tiles(problem, hardware):
        if problem.M <= GEMV_MAX_ROWS and problem.M <= problem.N:
            return _gemv(problem, hardware, swap=False)
        if problem.N <= GEMV_MAX_ROWS:
            return _gemv(problem.transposed, hardware, swap=True)
    if problem.ieee:
        return _ieee(problem, hardware)
    if _is_small(problem, hardware):
        return GemmConfig("gemm", 16, 32, 256, 1, 8, 4, 6)
    if _is_single(problem, hardware):
        config = hopper_config(problem, hardware)
        if config is not None:
            return config
    return batched_config(problem, hardware) or pointer_config(problem, hardware)


def _is_single(problem: GemmProblem, hardware: Hardware) -> bool:
    """One product of 16-bit operands, on Hopper."""
    return problem.batch == 1 and problem.element_size == 2 and hardware.has_wgmma


def _streams_in_tiles(problem: GemmProblem, hardware: Hardware) -> bool:
    """Whether a weight streams faster through the copy engine: one that is contiguous along N.

    Measured on an H200, bf16, one row, µs (the tiled kernels' of 8 rows, cuBLAS' of one): 10240 ×
    8192 61.9 by `gemv` (40.1, 44.2), 14336 × 4096 37.2 (29.1, 30.4), 57344 × 8192 209.9 (207.9,
    204.0); of one, in batches, 64 × 1 × 128 × 2048 14.0 (9.8, 10.6), 64 × 1 × 2048 × 128 15.9
    (12.8, 10.8).
    """
    along_n = not (problem.b_k_contiguous if problem.M <= problem.N else problem.a_k_contiguous)
    return along_n and problem.element_size == 2 and hardware.has_wgmma


def _is_small(problem: GemmProblem, hardware: Hardware) -> bool:
    """Whether so small tiles that each multiprocessor has one are best, with no second launch.

    Measured on an H200, bf16, 1024 × 1024, µs: 8 to 64 rows 4.0 to 4.2, 5 to 6 with K divided. 32 ×
    1024 × 1152 4.4 for 6.5, 64 × 320 × 1792 4.8 for 5.9, 128 × 448 × 1536 4.6 for 5.6.
    """
    blocks = math.ceil(problem.M / 16) * math.ceil(problem.N / 32)
    few = problem.M <= 2 * SKINNY_MAX_ROWS and blocks <= hardware.num_sms
    return few and 256 < problem.K <= 2048 and _is_single(problem, hardware)


def pointer_config(problem: GemmProblem, hardware: Hardware) -> GemmConfig:
    """Of the tiled kernel that reads through pointers, for aligned operands and any batch."""
    if problem.M <= SKINNY_MAX_ROWS and problem.M <= problem.N:
        return _skinny(problem.transposed, hardware, swap=True)
    if problem.N <= SKINNY_MAX_ROWS:
        return _skinny(problem, hardware, swap=False)
    return _large(problem, hardware)


def _interpreted(problem: GemmProblem) -> GemmConfig:
    # The interpreter's cost is per program and operation: one block for all, memory permitting.
    block_m = min(max(next_power_of_2(problem.M), 16), 256)
    block_n = min(max(next_power_of_2(problem.N), 16), 512)
    block_k = min(max(next_power_of_2(problem.K), 16), 1024)
    return GemmConfig("gemm", block_m, block_n, block_k, 1, 1, 4, 1, reduce_block=65536)


def split_k_for(blocks: int, k_iterations: int, target_blocks: int, minimum: int = 4) -> int:
    """The least power-of-two split that fills `target_blocks`, each with ≥ minimum iterations."""
    split_k = 1
    while blocks * split_k < target_blocks and k_iterations // (split_k * 2) >= minimum:
        split_k *= 2
    return split_k


def _unaligned(problem: GemmProblem, hardware: Hardware) -> GemmConfig:
    """Each element has a pointer of its own in registers: small blocks, or they spill."""
    gemv = unaligned_gemv(problem, hardware)
    if gemv is not None:
        return gemv
    config = _in_place(problem, hardware)
    if should_realign(problem, config.split_k, hardware):
        return replace(general_config(problem.realigned, hardware), realign=True)
    return config


def _in_place(problem: GemmProblem, hardware: Hardware) -> GemmConfig:
    """Measured on an H200, bf16, µs, with 64 rows of the weight and K in as few parts as fill the
    GPU once, and as here: 8 × 5952 × 1099 19.1 and 11.7, 16 × 14784 × 889 28.4 and 21.4.
    """
    swap = problem.M < problem.N
    if swap:
        problem = problem.transposed
    steps = math.ceil(problem.K / 32)
    long = steps >= 24 and 32 * hardware.num_sms <= problem.M
    if problem.N <= 16 and long and _is_single(problem, hardware):
        blocks = math.ceil(problem.M / 128)
        split_k = split_k_for(blocks, steps, 5 * hardware.num_sms // 2)
        return GemmConfig("gemm", 128, 16, 32, split_k, 8, 4, 3, swap)
    block_m = min(64, max(next_power_of_2(problem.M), 16))
    block_n = min(32, max(next_power_of_2(problem.N), 16))
    blocks = problem.batch * math.ceil(problem.M / block_m) * math.ceil(problem.N / block_n)
    split_k = split_k_for(blocks, steps, hardware.num_sms)
    return GemmConfig("gemm", block_m, block_n, 32, split_k, 8, 4, 2, swap)


def _gemv(problem: GemmProblem, hardware: Hardware, *, swap: bool) -> GemmConfig:
    """Measured on an H200, bf16, M = 1 and 2: 16 columns of 256 are level or best for N ≥ 4096."""
    if not problem.b_k_contiguous:
        block_n, block_k = 256 // problem.element_size, 64
    elif problem.batch * problem.N >= 31 * hardware.num_sms:
        block_n, block_k = 16, 512 // problem.element_size
    else:
        # Too few columns to fill the GPU twice with 16 each: N = 1024 takes 4.9 µs with 4, 6.3 with
        # 16, and M × N × K = 2 × 2560 × 10240 15.4 with 4 or 8, 19 through the ring.
        block_n, block_k = 4, 2048 // problem.element_size
    block_k = min(block_k, max(next_power_of_2(problem.K), 32))
    blocks = problem.batch * math.ceil(problem.N / block_n)
    split_k = split_k_for(blocks, problem.K // block_k, hardware.num_sms)
    config = GemmConfig("gemv", 1, block_n, block_k, split_k, 1, 4, 4, swap)
    return short_gemv(problem, config, hardware)


def _skinny(problem: GemmProblem, hardware: Hardware, *, swap: bool) -> GemmConfig:
    """The problem comes with its long side as M: the weight's rows on the tensor cores' M side.

    Measured on an H200, bf16: 64 rows of the weight × 128 of K, 5 stages deep; 128 rows once there
    are three blocks a multiprocessor. Splitting K pays only where less than half of the
    multiprocessors would work, or where K is long enough to hide the reduction's launch.
    """
    block_n = max(next_power_of_2(problem.N), 16)
    block_m = 128 if problem.batch * problem.M >= 3 * 64 * hardware.num_sms else 64
    block_k = min(256 // problem.element_size, max(next_power_of_2(problem.K), 16))
    blocks = problem.batch * math.ceil(problem.M / block_m)
    k_iterations = math.ceil(problem.K / block_k)
    target = 2 * hardware.num_sms if k_iterations >= 64 else hardware.num_sms // 2
    split_k = split_k_for(blocks, k_iterations, target)
    resident = 1 if blocks * split_k <= hardware.num_sms else 2
    stages = fit_stages(
        hardware, block_m, block_n, block_k, problem.element_size, most=5, blocks=resident
    )
    return GemmConfig("gemm", block_m, block_n, block_k, split_k, 8, 4, max(stages, 2), swap)


def _ieee(problem: GemmProblem, hardware: Hardware) -> GemmConfig:
    # No tensor cores: fused multiply-adds, register-bound; 64 × 64 keeps 4 warps free of spills.
    block_m = min(64, max(next_power_of_2(problem.M), 16))
    block_n = min(64, max(next_power_of_2(problem.N), 16))
    blocks = problem.batch * math.ceil(problem.M / block_m) * math.ceil(problem.N / block_n)
    split_k = split_k_for(blocks, math.ceil(problem.K / 32), hardware.num_sms)
    stages = fit_stages(hardware, block_m, block_n, 32, 4, most=2, blocks=1)
    return GemmConfig("gemm", block_m, block_n, 32, split_k, 8, 4, stages)


def fit_stages(
    hardware: Hardware,
    block_m: int,
    block_n: int,
    block_k: int,
    element_size: int,
    *,
    most: int,
    blocks: int,
) -> int:
    """The deepest pipeline with which `blocks` blocks share one multiprocessor's memory."""
    stage = (block_m + block_n) * block_k * element_size
    memory = hardware.shared_memory // blocks
    if hardware.backend == "hip":  # the newest stage is in registers
        return max(1, min(most, memory // stage + 1))
    return max(1, min(most, (memory - 1024) // stage))


# Tile, warps, blocks that share a multiprocessor, relative speed of the tensor cores on it.
_LARGE_TILES = (
    (128, 256, 8, 1, 1.00),
    (256, 128, 8, 1, 0.95),
    (128, 128, 8, 1, 0.85),
    (128, 64, 4, 2, 0.75),
    (64, 128, 4, 2, 0.75),
    (64, 64, 4, 2, 0.55),
)


def _large(problem: GemmProblem, hardware: Hardware) -> GemmConfig:
    """The tile and split with the least time by a model: waves × work of a tile + reduction."""
    best: tuple[float, GemmConfig] | None = None
    block_k = 128 // problem.element_size
    for block_m, block_n, warps, resident, speed in _LARGE_TILES:
        if block_m * block_n > 16384 and not hardware.has_wgmma:
            continue  # mma.sync keeps operands in registers too, and spills.
        stages = fit_stages(
            hardware, block_m, block_n, block_k, problem.element_size, most=4, blocks=resident
        )
        if stages < 2:
            continue
        tiles = math.ceil(problem.M / block_m) * math.ceil(problem.N / block_n) * problem.batch
        k_iterations = math.ceil(problem.K / block_k)
        for split_k in (1, 2, 4, 8):
            if split_k > 1 and k_iterations // split_k < 8:
                break
            waves = math.ceil(tiles * split_k / (hardware.num_sms * resident)) * resident
            # In units of one 128 × 256 × block_k step of one multiprocessor (≈ 0.75 µs on an H200).
            work = waves * math.ceil(k_iterations / split_k) * block_m * block_n / 32768 / speed
            reduce = 0.0
            if split_k > 1:
                bytes_moved = problem.batch * problem.M * problem.N * 4 * 2 * split_k
                reduce = 5.0 + bytes_moved / (hardware.num_sms * 20_000)
            cost = work + waves * 2.0 + reduce
            config = GemmConfig(
                "gemm", block_m, block_n, block_k, split_k, 8, warps, stages
            )  # fmt: skip
            if best is None or cost < best[0]:
                best = (cost, config)
    if best is None:
        return GemmConfig("gemm", 32, 32, 32, 1, 8, 4, 2)
    return best[1]
