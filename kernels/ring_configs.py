"""How few rows go through the ring of `ring_linear`: pure functions of integers."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from triton_only_backend.kernels.limits import RING_MAX_ROWS
from triton_only_backend.kernels.sizes import next_power_of_2

if TYPE_CHECKING:
    from triton_only_backend.kernels.hardware import Hardware


@dataclass(frozen=True)
class RingConfig:
    """How few rows are multiplied with weights that stream through a ring.

    Attributes:
        fold: runs of K that lie above one another as the 64 rows of wgmma's A, 2 or 4: a tile is
            64 / fold rows of a weight.
        stages: of the ring, 16 kB of weights each.
        resident: programs a multiprocessor.
    """

    fold: int
    stages: int
    resident: int = 1

    def rows(self, M: int) -> int:
        """The input's rows as the kernel pads them: wgmma's B has at least 8 columns."""
        return max(8 // self.fold, next_power_of_2(M))


# Rows of a product that the ring can take, where that was measured to be best.
RING_PRODUCT_ROWS = 32
# Elements of normalised rows that a program keeps in shared memory, and once in registers.
RING_NORM_ELEMENTS = 16384
# What the ring leaves of the shared memory for the sums, barriers and what the compiler adds.
_RING_RESERVE = 10 << 10


@functools.lru_cache(maxsize=1024)
def select_ring(
    M: int, columns: tuple[int, ...], K: int, gated: bool, normed: bool, hardware: Hardware
) -> RingConfig | None:
    """The configuration for 16-bit operands and an output of each of `columns`; None where another
    kernel is to be taken.

    Measured on an H200, bf16, µs (cuBLAS, `linear_gemv`): 4096 × 4096 8.6 (13.5, 10.4) and 4096 ×
    14336 27.2 (34.0, 29.3) with M = 2; 9.1 (13.4) and 27.8 (34.3) with M = 8. With M = 16 the other
    kernels are level or faster. A program with two tiles or fewer is better off as two: one begins
    where the other ends. Deeper rings read faster (q, k, v and gate, up of 7 stages 13.0 and 55.5,
    of 11 12.6 and 53.9), but q, k and v leave the room in which attention's programs start (a whole
    step 3866 and 3954).
    """
    if not hardware.has_gluon or M > RING_MAX_ROWS:
        return None
    fold = 4 if M <= 4 else 2
    config = RingConfig(fold, 0)
    rows, boxes = config.rows(M), 1 if gated else 2
    tiles = sum(math.ceil(n / (64 // fold)) for n in columns)
    if K % (64 * fold * boxes) > 0 or tiles < hardware.num_sms:
        return None
    if normed and (K % 1024 > 0 or K * rows > RING_NORM_ELEMENTS):
        return None
    x_bytes = 0 if normed else boxes * fold * rows * 128  # of a stage
    resident = 2 if tiles <= 2 * hardware.num_sms and len(columns) == 1 and M <= 4 else 1
    most = 5 if resident == 2 else 8 if len(columns) > 1 else 12
    kept = 2 * K * rows if normed else 0
    return RingConfig(fold, min(most, _stages(x_bytes, kept, resident, hardware)), resident)


def _stages(x_bytes: int, kept: int, resident: int, hardware: Hardware) -> int:
    """How many stages of weights, each with `x_bytes` of x, fit beside what a program keeps."""
    room = hardware.shared_memory // resident - _RING_RESERVE - kept
    return room // (16384 + x_bytes)


# Bytes of a weight up to which the ring is as fast as the tiles of `gemm_tma` with 9 to 16 rows.
_RING_BYTES = 128 << 20


@functools.lru_cache(maxsize=1024)
def select_product_ring(M: int, N: int, K: int, hardware: Hardware) -> RingConfig | None:
    """The same of a plain product, which nothing is fused with, and whose weight is read early.

    Measured on an H200, bf16, µs. Of 1024 columns (64 tiles) with 4 and 8 rows 4.7 and 5.5, the
    other kernels 6.4 and 6.5; with 16 6.5 for 8.8. Up to 2 rows of fewer than 4096 columns `gemv`
    is faster: 2560 × 10240 14.3 for 18.9. From 5 rows on, against `gemm_tma`: 8 × 14336 × 4096
    1.08 times as fast, 16 × 6144 × 4096 1.13, 32 × 4096 × 14336 1.05. Two runs above one another
    are better than four where there are tiles enough; and all that K = 4864 has room for, 4 × 3712
    × 4864 8.9, 11.8 by `gemm_tma`.
    """
    if not hardware.has_gluon or M > RING_PRODUCT_ROWS or K % 256 > 0:
        return None
    sms = hardware.num_sms
    tiles = {fold: math.ceil(N / (64 // fold)) for fold in (2, 4)}
    fills = tiles[2] >= 0.85 * sms
    if M <= 2 and (K % 512 > 0 or tiles[4] < 1.9 * sms):
        return None
    if M > RING_MAX_ROWS:
        once = tiles[2] <= sms if fills else M <= 16 and tiles[4] <= sms and K > 2048
        if 2 * N * K > _RING_BYTES or not (once or (fills and M <= 16)):
            return None
    fold = 2 if K % 512 > 0 or (M > 4 and fills) else 4
    if fold == 2 and not fills:
        return None
    resident = 2 if M <= 4 and 1.5 * sms < tiles[4] <= 2 * sms and fold == 4 else 1
    x_bytes = 2 * fold * RingConfig(fold, 0).rows(M) * 128
    most_stages = 5 if resident == 2 else 12
    return RingConfig(fold, min(most_stages, _stages(x_bytes, 0, resident, hardware)), resident)


def ring_fits(M: int, K: int, config: RingConfig, hardware: Hardware) -> bool:
    """Whether the ring computes a product with one weight so: wgmma's shapes, and the memory."""
    if config.fold not in (2, 4) or not 0 < M <= RING_PRODUCT_ROWS or K % (128 * config.fold) > 0:
        return False
    columns = config.fold * config.rows(M)
    used = config.stages * (16384 + 256 * columns) + 256 * columns + 1024
    return config.stages >= 2 and config.resident * used <= hardware.shared_memory
