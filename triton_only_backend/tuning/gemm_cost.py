"""A model of the time that a configuration of a product takes: it ranks, what wins is measured.

The model is one of rates: a multiprocessor takes a tile's operands from L2 and multiplies them, the
slower of both counts; it takes its tiles one after the other; the operands come from memory once;
split-K pays a second launch and its partial sums. Fitted to five tiles on an H200 it is within 10 %
of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from triton_only_backend.kernels.gemm_configs import GemmConfig, GemmProblem, shares
from triton_only_backend.kernels.hopper_rates import division_us
from triton_only_backend.kernels.realign_choice import realign_us
from triton_only_backend.kernels.sizes import fullness_of_waves

if TYPE_CHECKING:
    from triton_only_backend.kernels.hardware import Hardware

# Microseconds that a step along K takes beside its loads and products: barriers, addresses.
STEP_US = {"gemm": 0.04, "gemm_tma": 0.02, "gemm_hopper": 0.02}
# Loads in flight that hide the latency of memory, bytes a multiprocessor.
IN_FLIGHT = 40_000


@dataclass(frozen=True)
class Rates:
    """What hardware does in a microsecond: bytes from memory; a multiprocessor's from L2, and FLOP.

    `measured` ones of an H200; others are datasheets', scaled by what it reaches of its own.
    """

    memory: float
    l2: float
    flops: float


RATES = {
    "sm80": Rates(1.8e6, 0.09e6, 2.6e6),
    "sm89": Rates(0.8e6, 0.09e6, 1.2e6),
    "sm90": Rates(4.29e6, 0.12e6, 6.2e6),
    "sm100": Rates(7.0e6, 0.12e6, 12.0e6),
    "sm120": Rates(1.6e6, 0.12e6, 1.2e6),
    "gfx942": Rates(4.3e6, 0.10e6, 2.2e6),
    "gfx950": Rates(6.5e6, 0.10e6, 4.5e6),
}
# Of the tensor cores at 16 bits.
TF32_SHARE, IEEE_SHARE = 0.5, 0.08


def cost_us(problem: GemmProblem, config: GemmConfig, hardware: Hardware) -> float:
    """The model's time in microseconds: ranks, and is no promise."""
    if config.realign:
        copied = cost_us(problem.realigned, replace(config, realign=False), hardware)
        return realign_us(problem) + copied
    rates = _rates(problem, hardware)
    read = _bytes(problem) / rates.memory
    seen = problem.transposed if config.swap_operands else problem
    extra = 0.0
    if config.kernel == "gemm_hopper":
        share = shares(seen.batch, seen.M, seen.N, seen.K, config, hardware.num_sms)
        extra = division_us(share, _tiles(seen, config), config)
    elif config.split_k > 1 and config.kernel != "ring_linear":
        extra = 2.5 + 8 * config.split_k * problem.batch * problem.M * problem.N / rates.memory
    if config.kernel == "gemv":
        blocks = problem.batch * math.ceil(seen.N / config.block_n) * config.split_k
        idle = max(1.0, hardware.num_sms / blocks)
        return 2.0 + read * idle + extra
    if config.kernel == "ring_linear":
        tiles = math.ceil(problem.N / config.block_n)
        if config.split_k > 1:
            busy = min(1.0, tiles * config.split_k / hardware.num_sms)
        else:
            resident = config.resident if tiles > hardware.num_sms else 1
            busy = fullness_of_waves(tiles, hardware.num_sms * resident)
        # A multiprocessor can read a little more than its share of what memory gives.
        return 2.0 + read * max(1.0, 0.8 / busy) + (0.0 if config.split_k == 1 else 1.0)
    size = problem.element_size
    stage = (config.block_m + config.block_n) * config.block_k * size
    resident = _resident(config, stage, hardware)
    steps = math.ceil(seen.K / (config.block_k * config.split_k))
    step_us = STEP_US[config.kernel] + max(
        stage / rates.l2,
        2 * max(config.block_m, 64) * config.block_n * config.block_k / rates.flops,
    )
    flying = resident * (config.num_stages - 1) * stage
    compute = _tiles_each(seen, config, hardware, resident) * steps * step_us
    compute *= max(1.0, IN_FLIGHT / flying)
    if config.num_stages == 2:
        compute *= 1.08  # Each step waits for the one before it.
    accumulators = config.block_m * config.block_n // (32 * config.num_warps)
    if accumulators >= 64 and config.kernel == "gemm":
        compute *= 1.10  # Addresses compete for the registers.
    if not problem.aligned and problem.element_size == 2 and config.kernel == "gemm":
        compute *= 5.0  # An element a load: 64 × 5333 × 495 takes 14.6 µs of an H200.
    if accumulators >= 128 and config.block_m > 16 * config.num_warps:
        compute *= 1.05  # Two rows of products a warp group, one after the other.
    # Neither hides the other entirely.
    return 2.5 + math.sqrt(math.hypot(compute**2, read**2)) + extra


def bound_us(problem: GemmProblem, config: GemmConfig, hardware: Hardware) -> float:
    """A time that no run of the configuration can stay below: memory's, and its busiest tiles'."""
    rates = _rates(problem, hardware)
    read = _bytes(problem) / (1.15 * rates.memory)
    if config.kernel in ("gemv", "ring_linear"):
        return read
    seen = problem.transposed if config.swap_operands else problem
    tiles = _tiles_each(seen, config, hardware, 1)
    flops = 2 * config.block_m * config.block_n * seen.K / config.split_k
    return max(read, tiles * flops / (1.15 * rates.flops))


def _bytes(problem: GemmProblem) -> int:
    elements = (problem.M + problem.N) * problem.K + problem.M * problem.N
    return problem.batch * elements * problem.element_size


def rates_of(hardware: Hardware, element_size: int, *, ieee: bool) -> Rates:
    """The rates of an architecture, or of the slowest known where it is not."""
    rates = RATES.get(hardware.arch, RATES["sm80"])
    share = IEEE_SHARE if ieee else TF32_SHARE if element_size == 4 else 1.0
    return replace(rates, flops=rates.flops * share)


def _rates(problem: GemmProblem, hardware: Hardware) -> Rates:
    return rates_of(hardware, problem.element_size, ieee=problem.ieee)


def _resident(config: GemmConfig, stage: int, hardware: Hardware) -> int:
    if config.kernel in ("gemm_tma", "gemm_hopper"):
        return config.resident
    registers = (
        32 * config.num_warps * (config.block_m * config.block_n // (32 * config.num_warps) + 64)
    )
    memory = hardware.shared_memory // max(1, config.num_stages * stage)
    return max(1, min(memory, 65536 // registers, 4))


def _tiles(seen: GemmProblem, config: GemmConfig) -> int:
    return seen.batch * math.ceil(seen.M / config.block_m) * math.ceil(seen.N / config.block_n)


def _tiles_each(seen: GemmProblem, config: GemmConfig, hardware: Hardware, resident: int) -> float:
    """How many tiles the busiest multiprocessor computes."""
    tiles = _tiles(seen, config)
    if config.kernel == "gemm_hopper" and config.split_k == 1:
        share = shares(seen.batch, seen.M, seen.N, seen.K, config, hardware.num_sms)
        return share.tiles_each(tiles)
    rounds, rest = divmod(tiles * config.split_k, hardware.num_sms * resident)
    return rounds * resident + math.ceil(rest / hardware.num_sms)
