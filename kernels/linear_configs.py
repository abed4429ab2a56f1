"""How linear layers with fused norm, gate and epilogue are computed: pure functions of integers."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from triton_only_backend.kernels.epilogue_traits import OPERAND_BYTES, EpilogueTraits
from triton_only_backend.kernels.gemm_choice import fit_stages
from triton_only_backend.kernels.gemm_configs import SKINNY_MAX_ROWS, GemmProblem
from triton_only_backend.kernels.hopper_choice import hopper_choice
from triton_only_backend.kernels.sizes import next_power_of_2

if TYPE_CHECKING:
    from triton_only_backend.kernels.hardware import Hardware


@dataclass(frozen=True)
class GemvConfig:
    """How few rows are multiplied.

    Attributes:
        block_n: columns of an output that a program computes.
        block_k: of K a step.
        k_major: the weights are contiguous along K, as `nn.Linear`'s; else along N.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    k_major: bool = True

    def lane(self, element_size: int) -> int:
        """Elements along K that a thread, which reads 16 bytes at once, adds up at a step."""
        piece = 16 // element_size
        if self.k_major:
            return piece
        threads = 32 * self.num_warps
        return max(1, self.block_n * self.block_k // (piece * threads))


@functools.lru_cache(maxsize=1024)
def select_linear_gemv(
    N: int, K: int, element_size: int, gated: bool, hardware: Hardware, k_major: bool = True
) -> GemvConfig:
    """The configuration for N columns in all (of one of the two weights, if gated).

    Measured on an H200, bf16, M = 1 and 2: 16 rows of weights × 256 of K a step are level or best
    for N ≥ 4096; with fewer than 16 columns a multiprocessor, 4 × 1024. In a whole decode step, a
    stage more for two weights took off 10 µs of 4120, and 8 × 512 for K = 14336 another 20.
    """
    if hardware.is_interpreter:
        return GemvConfig(256, min(max(next_power_of_2(K), 16), 1024), 4, 1, k_major)
    if not k_major:
        return _n_major_gemv(N, K, element_size, gated, hardware)
    block_n, block_k, stages = 16, 512 // element_size, 4
    if 16 * hardware.num_sms > N:
        block_n, block_k = 4, 2048 // element_size
    elif gated:
        stages = 5
    elif K >= 8192:
        block_n, block_k, stages = 8, 1024 // element_size, 3
    if gated:
        block_n //= 2
    block_k = min(block_k, max(next_power_of_2(K), 32))
    return GemvConfig(block_n, block_k, 4, stages)


def _n_major_gemv(N: int, K: int, element_size: int, gated: bool, hardware: Hardware) -> GemvConfig:
    """Of each of K a program reads a sector of 32 bytes, or two where there are programs enough.

    256 of K a step: as many a thread of a are read asynchronously (4 bytes), fewer are waited for
    at each step. Programs that leave multiprocessors without one have twice the stages in flight,
    64 kB, which is 0.6 µs of what one multiprocessor reads. Reckoned, not measured.
    """
    row = N * element_size
    wide = row >= 2 * 64 * hardware.num_sms and not gated
    stages = 8 if row < 32 * hardware.num_sms and not gated else 4
    block_k = min(256, max(next_power_of_2(K), 32))
    return GemvConfig((64 if wide else 32) // element_size, block_k, 4, stages, k_major=False)


@dataclass(frozen=True)
class GatedConfig:
    """How two weights, one gating the other, are multiplied with one input on tensor cores.

    Attributes:
        tma: through tensor descriptors, persistently; with `swap`.
        block_m: rows of the input.
        block_n: rows of each weight.
        swap: the weights' rows are the tensor cores' M side.
        resident: blocks of the persistent kernel that share a multiprocessor.
    """

    tma: bool
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    swap: bool = False
    resident: int = 1


@dataclass(frozen=True)
class SkinnyConfig:
    """How few rows are multiplied on Hopper.

    Attributes:
        block_m: at least the input's rows; without `swap` at least 64.
        block_n: rows of each weight a program; with `swap` at least 64.
        swap: the weights' rows are the tensor cores' M side.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = True


@functools.lru_cache(maxsize=1024)
def select_gated(M: int, N: int, K: int, hardware: Hardware) -> GatedConfig | None:
    """The configuration for 16-bit operands; None where two products are better.

    Two products can split K, which few tiles need to fill the GPU.
    """
    if hardware.is_interpreter:
        block_m, block_n = (min(max(next_power_of_2(n), 16), 256) for n in (M, N))
        block_k = min(max(next_power_of_2(K), 16), 1024)
        return GatedConfig(False, block_m, block_n, block_k, 1, 4, 1)
    if M <= SKINNY_MAX_ROWS:
        config = _skinny_gated(M, N, hardware)
    elif hardware.has_wgmma:
        return None  # see `select_pair`
    else:
        # mma.sync keeps operands in registers beside the two accumulators.
        stages = fit_stages(hardware, 128, 128, 32, 2, most=4, blocks=1)
        config = GatedConfig(False, 128, 64, 32, 8, 8, stages)
    tiles = math.ceil(M / config.block_m) * math.ceil(N / config.block_n)
    return config if tiles >= hardware.num_sms // 2 else None


def _skinny_gated(M: int, N: int, hardware: Hardware) -> GatedConfig:
    block_m = max(next_power_of_2(M), 16)
    resident = 1 if math.ceil(N / 64) <= hardware.num_sms else 2
    block_k = 64 if resident == 2 else 128
    stages = fit_stages(hardware, block_m, 128, block_k, 2, most=5, blocks=resident)
    return GatedConfig(
        hardware.has_wgmma, block_m, 64, block_k, 8, 4, max(stages, 2), True, resident
    )  # fmt: skip


@dataclass(frozen=True)
class PairConfig:
    """How two weights of one shape are multiplied with one input on Hopper.

    Attributes:
        block_m: rows of the input.
        block_n: rows of each weight.
        flatten: a tile's operands are loaded while the tile before is written.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    flatten: bool = True


@functools.lru_cache(maxsize=1024)
def select_pair(
    M: int, N: int, K: int, traits: EpilogueTraits, hardware: Hardware
) -> PairConfig | None:
    """The configuration for 16-bit operands; None where two products are better.

    The tiles are those of a product of 2 N columns. Two products can split K, and choose tiles of
    their own; gated, the second reads what the first wrote.
    What the epilogue reads, and what goes to rows that are not aligned, changes the layout of a
    tile in shared memory; see `gemm_configs.with_staging`.
    """
    few = M <= SKINNY_MAX_ROWS or N <= SKINNY_MAX_ROWS
    if not hardware.has_wgmma or few or traits.out_size > 2:
        return None
    problem = GemmProblem(1, M, N, K, 2, False, True, True)
    apart_us = 2 * hopper_choice(problem, hardware)[0]
    twice = GemmProblem(1, M, 2 * N, K, 2, False, True, True)
    together_us, config = hopper_choice(twice, hardware, may_split=False)
    if together_us >= apart_us:
        return None
    block_n = config.block_n // 2
    pointers = traits.operand_size > 0 or not traits.out_aligned
    staging = config.block_m * block_n * traits.out_size + pointers * OPERAND_BYTES
    stage = (config.block_m + config.block_n) * config.block_k * 2
    stages = min(config.num_stages, (hardware.shared_memory - staging - 1024) // stage)
    return PairConfig(
        config.block_m, block_n, config.block_k, config.group_m, config.num_warps, stages,
        flatten=not traits.is_awkward,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def select_skinny(
    M: int, N: int, weights: int, gated: bool, normed: bool, hardware: Hardware
) -> SkinnyConfig | None:
    """The configuration for N columns in all; None where a launch a weight is better.

    That is off Hopper, for one weight alone, where 64 columns a program leave most of the
    multiprocessors idle, and where they are more than run at once: the other kernels split K and
    persist.
    """
    tiles = math.ceil(N / 64)
    alone = weights == 1 and not normed
    few, many = tiles < hardware.num_sms // 3, tiles > 2 * hardware.num_sms
    if not hardware.has_wgmma or alone or few or many:
        return None
    block_m = max(next_power_of_2(M), 16)
    block_n = 128 if gated else 64  # of both weights
    resident = 1 if tiles <= hardware.num_sms else 2
    block_k = 128 if resident == 1 else 64
    stages = fit_stages(hardware, block_m, block_n, block_k, 2, most=6, blocks=resident)
    return SkinnyConfig(block_m, 64, block_k, 4, stages)
