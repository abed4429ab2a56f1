"""How few rows go through the ring of `ring_linear`: pure functions of integers."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from triton_only_backend.kernels.limits import RING_MAX_ROWS
from triton_only_backend.kernels.sizes import fullness_of_waves, next_power_of_2

if TYPE_CHECKING:
    from triton_only_backend.kernels.hardware import Hardware


@dataclass(frozen=True)
class RingConfig:
    """How few rows are multiplied with weights that stream through a ring.

    Attributes:
        tile: rows of a weight: 16, 32, 64 or, of a plain product, 128.
        stages: of the ring, 16 kB of weights each.
        resident: programs a multiprocessor.
        split_k: of a plain product of one weight: there are as many programs as tiles times this,
            or as have room, and each has an equal part of all steps.
    """

    tile: int
    stages: int
    resident: int = 1
    split_k: int = 1

    @property
    def fold(self) -> int:
        """Runs of K that lie above one another as the 64 rows of wgmma's A."""
        return max(1, 64 // self.tile)

    @property
    def step(self) -> int:
        """How much of K a step is: boxes of 64 rows two side by side, or above one another."""
        return 64 if self.tile > 64 else 128 * self.fold

    def registers(self, M: int) -> int:
        """Of a thread, on average: those that multiply have more, the warp that copies less.

        64 rows of 64 of a weight spill 8 bytes with a residual in 128, and 256 with all else too.
        """
        return 168 if self.tile * self.rows(M) >= 4096 and self.resident == 1 else 128

    def rows(self, M: int) -> int:
        """The input's rows as the kernel pads them: wgmma's B has at least 8 columns."""
        return max(8 // self.fold, next_power_of_2(M))


# Rows of a product that the ring can take, where that was measured to be best.
RING_PRODUCT_ROWS = 64
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
    tile = 16 if M <= 4 else 32
    config = RingConfig(tile, 0)
    fold, rows, boxes = config.fold, config.rows(M), 1 if gated else 2
    tiles = sum(math.ceil(n / tile) for n in columns)
    if K % (64 * fold * boxes) > 0 or tiles < hardware.num_sms:
        return None
    if normed and (K % 1024 > 0 or K * rows > RING_NORM_ELEMENTS):
        return None
    x_bytes = 0 if normed else boxes * fold * rows * 128  # of a stage
    resident = 2 if tiles <= 2 * hardware.num_sms and len(columns) == 1 and M <= 4 else 1
    most = 5 if resident == 2 else 8 if len(columns) > 1 else 12
    kept = 2 * K * rows if normed else 0
    return RingConfig(tile, min(most, _stages(x_bytes, kept, resident, hardware)), resident)


def _stages(x_bytes: int, kept: int, resident: int, hardware: Hardware) -> int:
    """How many stages of weights, each with `x_bytes` of x, fit beside what a program keeps."""
    room = hardware.shared_memory // resident - _RING_RESERVE - kept
    return room // (16384 + x_bytes)


# Bytes of a weight above which more than 32 rows are left to `gemm_tma`, which is level.
_RING_BYTES = 128 << 20
# Steps of K that hide what it costs to add the sums of a tile's parts, and parts that do not cost
# more than they bring.
_PART_STEPS, _MOST_PARTS = 8, 3
# Of a weight and its input, which few programs, one tile each, still read sooner than others do
# that divide K and launch a second time.
_PROGRAM_BYTES = 256 << 10


@functools.lru_cache(maxsize=1024)
def select_product_ring(
    M: int, N: int, K: int, k_contiguous: bool, hardware: Hardware
) -> RingConfig | None:
    """The same of a plain product, which nothing is fused with, and whose weight is read early."""
    if not hardware.has_gluon or M > RING_PRODUCT_ROWS or N < 16:
        return None
    sms = hardware.num_sms
    config = _folded(M, N, K, sms) if k_contiguous else None
    if config is None and not (k_contiguous and M <= 2):
        config = _unfolded(M, N, K, sms)
    return None if config is None else deepest_ring(M, K, config, hardware)


def _folded(M: int, N: int, K: int, sms: int) -> RingConfig | None:
    """Tiles of 16 or 32 rows of a weight, of which only M ≤ 16 leaves the tensor cores time.

    Measured on an H200, bf16, µs: 2 × 2560 × 10240 12.9 in tiles of 16 (`gemv` 15.1), 2 × 10240 ×
    8192 37.5 (41.1), 2 × 1024 × 4096 3.5 (4.7), 2 × 1024 × 1024 2.1 (2.7). With 8 rows tiles of 32
    are better where there are enough: 4096 × 4096 8.8, 14336 × 4096 26.9; but 10240 × 8192, of
    which they would leave a wave half empty, 39.0 in tiles of 16, 40.6 in tiles of 32. 16 × 4096 ×
    4096 9.7 in tiles of 32, 10.1 in halves of tiles of 64.
    """
    if M > 16 or K % 256 > 0:
        return None
    sixteens, pairs = math.ceil(N / 16), math.ceil(N / 32)
    if 3 * sixteens < sms and 32 * K > _PROGRAM_BYTES:
        return None
    takes_sixteens, fills = K % 512 == 0, pairs >= 0.85 * sms
    # One of two starts where the other ends; more than a wave of each is one too many.
    resident = 2 if sixteens <= sms or 1.5 * sms < sixteens <= 2 * sms else 1
    if M > RING_MAX_ROWS:
        return RingConfig(32, 0) if fills and pairs <= sms else None
    if takes_sixteens and M <= 4:
        return RingConfig(16, 0, resident)
    if fills and M > 2:
        fuller = fullness_of_waves(sixteens, sms) > 0.1 + fullness_of_waves(pairs, sms)
        return RingConfig(16 if takes_sixteens and fuller and pairs > 2 * sms else 32, 0)
    if M <= 2 or sixteens > sms:
        return None
    small = 64 * K <= _PROGRAM_BYTES or not takes_sixteens
    return RingConfig(32 if small else 16, 0, resident)


def _unfolded(M: int, N: int, K: int, sms: int) -> RingConfig | None:
    """Tiles of 64 rows of a weight, divided where they leave multiprocessors without work.

    Measured on an H200, bf16, µs (others): 32 × 4096 × 4096 10.4 (11.2) in halves, 32 × 2560 ×
    10240 14.9 (19.3) in thirds, 32 × 1024 × 4096 5.1 (7.3), 64 × 6144 × 4096 14.7 (16.0) and 64 ×
    8192 × 8192 33.5 (35.4) whole, for all that the first are only 96: divided 15.8. Of a weight
    that lies along N: 8 × 4096 × 4096 9.8 (11.2), 8 × 2560 × 10240 14.2 (18.3), 8 × 14336 × 4096
    27.5 (29.5), two programs a multiprocessor.
    """
    tiles, steps = math.ceil(N / 64), math.ceil(K / 128)
    if M > 32 and 2 * N * K > _RING_BYTES:
        return None
    split_k = max(1, min(sms // tiles, steps // _PART_STEPS, _MOST_PARTS))
    if 3 * tiles * split_k < sms and _PROGRAM_BYTES * split_k < 2 * (64 + M) * K:
        return None
    if 0.5 * sms < tiles < 0.6 * sms:
        split_k = 2
    if tiles > sms and fullness_of_waves(tiles, sms) < 0.8:
        if M > 32:
            return None
        # Of few steps a half costs more than the last wave: 32 × 26048 × 376 7.5 µs whole, 11.3 in
        # halves, 4 × 20160 × 3264, of 26, 31.7 and 33.6.
        split_k = 2 if steps >= 4 * _PART_STEPS else 1
    shared = 4 * tiles <= sms or sms < tiles <= 2 * sms
    return RingConfig(64, 0, 2 if M <= 16 and shared else 1, min(split_k, steps))


def deepest_ring(M: int, K: int, config: RingConfig, hardware: Hardware) -> RingConfig | None:
    """The configuration with as many stages as fit; None where not even three do."""
    for stages in range(12, 2, -1):
        if ring_fits(M, K, replace(config, stages=stages), hardware):
            return replace(config, stages=stages)
    return None


def ring_fits(M: int, K: int, config: RingConfig, hardware: Hardware) -> bool:
    """Whether the ring computes a product with one weight so: wgmma's shapes, and the memory."""
    if config.tile not in (16, 32, 64, 128) or not 0 < M <= RING_PRODUCT_ROWS:
        return False
    # Runs that lie above one another must end where K does; of one alone the last is filled up.
    if config.fold > 1 and K % config.step > 0:
        return False
    if not 0 < config.split_k <= math.ceil(K / config.step):
        return False
    columns = config.fold * config.rows(M)
    x_bytes = 2 * config.step * config.rows(M)
    sums = 256 * columns if config.fold > 1 else 0
    used = config.stages * (16384 + x_bytes) + sums + (1024 if config.fold > 1 else 3072)
    # Two programs a multiprocessor, the sums of 128 rows of a weight spill.
    most = 128 if config.split_k == 1 or config.resident == 1 else 64
    return (
        columns <= 64
        and config.tile <= most
        and config.stages >= 2
        and config.resident * used <= hardware.shared_memory
    )
