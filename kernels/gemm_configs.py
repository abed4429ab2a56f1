"""What a product is, and how it may be computed.

Pure functions of integers; which configuration a problem gets is in `gemm_choice`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from triton_only_backend.kernels.ring_configs import RingConfig, ring_fits
from triton_only_backend.kernels.sizes import next_power_of_2

if TYPE_CHECKING:
    from triton_only_backend.kernels.hardware import Hardware

GEMV_MAX_ROWS = 2
# … where each element is a load of its own.
UNALIGNED_GEMV_ROWS = 4
SKINNY_MAX_ROWS = 64
# Elements to whose multiple copies fill K up: Triton knows of an integer whether 16 divides it.
PADDING = 16


@dataclass(frozen=True)
class GemmProblem:
    """A batched product (batch, M, K) @ (batch, K, N).

    Attributes:
        element_size: bytes of an operand's element.
        ieee: fp32 operands multiplied exactly, without the tensor cores.
        a_k_contiguous: a's K stride is 1 (row-major a).
        b_k_contiguous: b's K stride is 1 (an `nn.Linear` weight, transposed).
        aligned: both operands have a unit stride and rows that start at 16-byte boundaries, so that
            they can be read in 16-byte pieces or through tensor descriptors.
    """

    batch: int
    M: int
    N: int
    K: int
    element_size: int
    ieee: bool
    a_k_contiguous: bool
    b_k_contiguous: bool
    aligned: bool = True

    @property
    def transposed(self) -> GemmProblem:
        """The same product seen as bᵀ @ aᵀ."""
        return replace(
            self,
            M=self.N,
            N=self.M,
            a_k_contiguous=self.b_k_contiguous,
            b_k_contiguous=self.a_k_contiguous,
        )

    @property
    def realigned(self) -> GemmProblem:
        """The product of copies with aligned rows; see `realign.realign_product`."""
        whole = self.a_k_contiguous and self.b_k_contiguous
        return replace(self, K=padded_size(self.K) if whole else self.K, aligned=True)

    def bucketed(self) -> GemmProblem:
        """Itself: M and N are rounded already, where it is made."""
        return self


@dataclass(frozen=True)
class GemmConfig:
    """How a product is computed.

    Attributes:
        kernel: "gemm" (tiles on the tensor cores), "gemm_tma" (the same on tensor descriptors,
            persistent), "gemm_hopper" (the same with warps that only copy; num_warps counts those
            that multiply), "ring_linear" (few rows, the weight through a ring; see `ring_of`) or
            "gemv" (multiply and reduce, M ≤ 2).
        split_k: parts of K that are summed apart; of a tile of `gemm_hopper` two programs each
            compute one half, and exchange their sums; of `ring_linear` see `RingConfig`.
        swap_operands: compute outᵀ = bᵀ @ aᵀ; block_m and block_n then refer to outᵀ.
        reduce_block: elements a program of the split-K reduction sums.
        resident: blocks of the persistent kernel that share a multiprocessor.
        store_halves: the persistent kernel stores its tile in two halves, for half the staging
            memory and so a deeper pipeline.
        flatten: the persistent kernel loads a tile's operands while it writes the tile before.
        columns: the first columns are computed so, whose tiles come in whole waves, and those that
            would leave a wave half empty by a launch of their own with smaller tiles; 0: all are.
        stream_k: `gemm_hopper` divides the tiles that would leave a wave half empty.
        alternate: of the two groups of warps of `gemm_hopper` one multiplies while the other
            writes, where the ring holds all of a tile's operands.
        realign: operands without aligned rows are copied to where they have them, and the copies
            are multiplied, as the other fields say.
    """

    kernel: Literal["gemm", "gemm_tma", "gemm_hopper", "ring_linear", "gemv"]
    block_m: int
    block_n: int
    block_k: int
    split_k: int
    group_m: int
    num_warps: int
    num_stages: int
    swap_operands: bool = False
    reduce_block: int = 512
    resident: int = 1
    store_halves: bool = False
    flatten: bool = True
    columns: int = 0
    stream_k: bool = False
    alternate: bool = False
    realign: bool = False


# Tiles of `gemm_hopper` (rows, columns), and the slots of the ring that fit beside the result's.
HOPPER_TILES = {
    (128, 256): 4, (256, 128): 4, (128, 224): 4, (128, 192): 5, (128, 160): 6, (128, 128): 6,
    (128, 96): 7,
}  # fmt: skip
# Sums of its tiles of which two programs can have a half each.
MOST_HALVED_SUMS = 128 * 192
# Warpgroups of it that multiply, each half of a tile's rows.
HOPPER_CONSUMERS = 2


def bucket(n: int) -> int:
    """Rounds a size up so that nearby sizes share a configuration (and its compiled kernel)."""
    return next_power_of_2(n) if n <= 64 else math.ceil(n / 64) * 64


def padded_size(size: int) -> int:
    """The next multiple of 16."""
    return math.ceil(size / PADDING) * PADDING


def can_realign(problem: GemmProblem, hardware: Hardware) -> bool:
    """Whether a product is one whose operands may be copied first."""
    return (
        not problem.aligned
        and hardware.has_wgmma
        and problem.element_size == 2
        and problem.M * problem.N * problem.K > 0
    )


def has_descriptors(hardware: Hardware) -> bool:
    """Whether `gemm_tma` runs there: tensor descriptors that the host makes."""
    return hardware.backend == "cuda" and int(hardware.arch.removeprefix("sm")) >= 90


def supports(problem: GemmProblem, config: GemmConfig, hardware: Hardware) -> bool:
    """Whether a configuration computes the problem at all, well or not, on this hardware."""
    if config.realign:
        # K is filled up only if both operands are copied, and the ring takes no other.
        can = can_realign(problem, hardware) and config.kernel != "ring_linear"
        return can and supports(problem.realigned, replace(config, realign=False), hardware)
    seen = problem.transposed if config.swap_operands else problem
    if config.kernel == "gemv":
        most = GEMV_MAX_ROWS if problem.aligned else UNALIGNED_GEMV_ROWS
        return most >= seen.M
    if config.kernel == "ring_linear":
        return (
            streams_through_ring(problem)
            and hardware.has_gluon
            and not config.swap_operands
            and (problem.b_k_contiguous or config.block_n >= 64)
            and ring_fits(problem.M, problem.K, ring_of(config), hardware)
        )
    stage = (config.block_m + config.block_n) * config.block_k * problem.element_size
    # On AMD the newest stage is in registers.
    held = config.num_stages - (hardware.backend == "hip")
    if config.num_stages > 1 and held * stage > hardware.shared_memory:
        return False
    plain = problem.aligned and problem.element_size == 2
    if config.kernel == "gemm_tma":
        return plain and problem.batch == 1 and has_descriptors(hardware)
    if config.kernel == "gemm_hopper":
        slots = HOPPER_TILES.get((config.block_m, config.block_n), 0)
        fits = config.num_stages <= slots and config.block_k == 64
        if config.split_k > 1:
            fits = fits and config.split_k == 2 and config.block_k < problem.K
            # More sums spill, when those of the other half are added.
            fits = fits and config.block_m * config.block_n <= MOST_HALVED_SUMS
            fits = fits and not config.stream_k and not config.alternate
        return plain and fits and not config.swap_operands and hardware.has_gluon
    return config.kernel == "gemm"


def streams_through_ring(problem: GemmProblem) -> bool:
    """Whether the operands lie as `ring_linear` reads them."""
    plain = problem.aligned and problem.element_size == 2 and problem.batch == 1
    return plain and problem.a_k_contiguous


def with_ring(M: int, ring: RingConfig) -> GemmConfig:
    """A product of up to M rows through the ring."""
    tile = (ring.rows(M), ring.tile, ring.step)
    return GemmConfig("ring_linear", *tile, ring.split_k, 1, 4, ring.stages, resident=ring.resident)


def ring_of(config: GemmConfig) -> RingConfig:
    """What `with_ring` was given."""
    return RingConfig(config.block_n, config.num_stages, config.resident, config.split_k)


class Shares(NamedTuple):
    """Who works on what in a launch of `gemm_hopper`.

    Attributes:
        programs: how many there are.
        whole: the first tiles, each computed by one program; with `split_k` all halves of tiles.
        lanes: programs that together are one of the workers that have equal shares of the steps
            along K of the other tiles.
        divided: whether there are others, or halves.
    """

    programs: int
    whole: int
    lanes: int
    divided: bool

    def tiles_each(self, tiles: int) -> float:
        """How many of a product's `tiles` the busiest program computes."""
        return math.ceil(self.whole / self.programs) + (tiles - self.whole) / self.programs


@functools.lru_cache(maxsize=4096)
def shares(batch: int, M: int, N: int, K: int, config: GemmConfig, num_sms: int) -> Shares:
    """What `gemm_hopper` gives to whom.

    With `stream_k` the tiles of the last one to two waves are divided, or all if there are fewer.
    The programs of a worker have neighbouring rows of tiles and read the same of b at the same
    time: the least number from four on that divides the rows and leaves few multiprocessors idle.
    """
    rows = math.ceil(M / config.block_m)
    tiles = batch * rows * math.ceil(N / config.block_n)
    if config.split_k == 2:
        return Shares(2 * tiles, 2 * tiles, 1, divided=True)
    if not config.stream_k or tiles % num_sms == 0:
        return Shares(min(tiles, num_sms), tiles, 1, divided=False)
    fitting = [d for d in range(1, 17) if rows % d == 0 and num_sms // d * d >= 0.95 * num_sms]
    lanes = max(fitting, key=lambda d: (min(d, 4), -d))
    programs = num_sms // lanes * lanes
    whole = max(0, tiles // programs - 1) * programs
    steps = (tiles - whole) // lanes * math.ceil(K / config.block_k)
    # A run has a few steps at least.
    programs = min(programs, lanes * max(1, steps // 4))
    return Shares(programs, whole, lanes, divided=True)
