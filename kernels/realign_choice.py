"""Products whose operands' rows are not aligned to 16 bytes: pure functions of integers.

Measured on an H200, bf16, N, K = 5333, 495, µs: read in place by the tiled kernel 10.2 with M = 8,
14.6 with 64, 29 with 256, 84 with 1024, 310 with 4096.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from triton_only_backend.kernels.gemm_configs import (
    UNALIGNED_GEMV_ROWS,
    GemmConfig,
    GemmProblem,
    can_realign,
)
from triton_only_backend.kernels.hopper_rates import BYTES_PER_US
from triton_only_backend.kernels.sizes import next_power_of_2

if TYPE_CHECKING:
    from triton_only_backend.kernels.hardware import Hardware

# Rates per µs: FLOP in place and of the kernels for aligned operands, bytes copied.
_IN_PLACE_FLOP, _ALIGNED_FLOP, _COPIED_BYTES = 70e6, 450e6, 3.0e6
_STEP_US, _REDUCTION_US = 0.45, 3.5  # of 32 along K, in place; of partial sums
# Rows: columns, elements along K and warps of `gemv`. 3.7, 4.1 and 5.3 µs of N, K = 5333, 495, and
# with 4 columns of 512 and a warp 4.5, 4.8 and 6.6.
_GEMV = {1: (8, 512, 2), 2: (8, 512, 1), 4: (4, 256, 1)}
# … of up to 2 rows and a longer K: 2 × 21056 × 1838 25.5 for 29.9; with fewer than two programs a
# multiprocessor: 1 × 1792 × 10393 15.5 for 26.8.
_GEMV_OF_LONG_ROWS, _GEMV_OF_FEWER = (8, 512, 4), (8, 1024, 8)
# … and where those would leave some idle: 2 × 448 × 5789 6.3 for 21.2.
_GEMV_OF_FEW_COLUMNS = (4, 1024, 8)


def realign_us(problem: GemmProblem) -> float:
    """How long copying takes, with both operands to copy."""
    elements = problem.batch * (problem.M + problem.N) * problem.K
    return 2.0 + 2 * elements * problem.element_size / _COPIED_BYTES


def should_realign(problem: GemmProblem, split_k: int, hardware: Hardware) -> bool:
    """Whether copying first is faster than reading in place, K split by `split_k`."""
    if not can_realign(problem, hardware):
        return False
    flop = 2 * problem.batch * problem.M * problem.N * problem.K
    steps = math.ceil(problem.K / 32 / split_k)
    in_place = 2.5 + _STEP_US * steps + flop / _IN_PLACE_FLOP
    if split_k > 1:
        in_place += _REDUCTION_US
    read = problem.batch * (problem.M + problem.N) * problem.K * problem.element_size
    aligned = 3.0 + math.hypot(flop / _ALIGNED_FLOP, read / BYTES_PER_US)
    return realign_us(problem) + aligned < in_place


def unaligned_gemv(problem: GemmProblem, hardware: Hardware) -> GemmConfig | None:
    """Multiply and reduce for few rows, each element a load of its own; None where it is not for.

    A few warps a program, which reads a few rows of the weight at once: neighbouring threads read
    neighbouring elements, and so many loads are in flight that none is waited for alone.
    """
    swap = problem.N < problem.M
    seen = problem.transposed if swap else problem
    few = 0 < seen.M <= UNALIGNED_GEMV_ROWS and seen.K > 0
    if not hardware.has_wgmma or not few or not seen.b_k_contiguous:
        return None
    block_n, block_k, warps = _GEMV[next_power_of_2(seen.M)]
    programs = seen.batch * math.ceil(seen.N / block_n)
    if seen.M <= 2 and seen.K > 1024:
        fewer = programs < 2 * hardware.num_sms
        block_n, block_k, warps = _GEMV_OF_FEWER if fewer else _GEMV_OF_LONG_ROWS
    if programs < hardware.num_sms:
        if seen.M > 2:
            return None  # 4 × 384 × 4735 takes 19.4 µs so, copied first 8.5.
        block_n, block_k, warps = _GEMV_OF_FEW_COLUMNS
    block_k = min(block_k, max(next_power_of_2(seen.K), 32))
    return GemmConfig("gemv", 1, block_n, block_k, 1, 1, warps, 2, swap)
