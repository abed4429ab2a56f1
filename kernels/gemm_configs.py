"""Which GEMM kernel, tile and work decomposition for a problem: pure functions of integers.

`select_config` takes what was measured (see `tuned`), and else `heuristic_config`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from triton_only_backend.kernels import tuned

if TYPE_CHECKING:
    from triton_only_backend.kernels.hardware import Hardware

GEMV_MAX_ROWS = 2
SKINNY_MAX_ROWS = 64


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

    def bucketed(self) -> GemmProblem:
        """Itself: M and N are rounded already, where it is made."""
        return self


@dataclass(frozen=True)
class GemmConfig:
    """How a product is computed.

    Attributes:
        kernel: "gemm" (tiles on the tensor cores), "gemm_tma" (the same on tensor descriptors,
            persistent) or "gemv" (multiply and reduce, M ≤ 2).
        swap_operands: compute outᵀ = bᵀ @ aᵀ; block_m and block_n then refer to outᵀ.
        reduce_block: elements a program of the split-K reduction sums.
        resident: blocks of the persistent kernel that share a multiprocessor.
        store_halves: the persistent kernel stores its tile in two halves, for half the staging
            memory and so a deeper pipeline.
        flatten: the persistent kernel loads a tile's operands while it writes the tile before.
    """

    kernel: Literal["gemm", "gemm_tma", "gemv"]
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


# Shared memory in which a tile of an epilogue's operands changes its layout.
OPERAND_BYTES = 32768


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def bucket(n: int) -> int:
    """Rounds a size up so that nearby sizes share a configuration (and its compiled kernel)."""
    return next_power_of_2(n) if n <= 64 else math.ceil(n / 64) * 64


def select_config(problem: GemmProblem, hardware: Hardware) -> GemmConfig:
    """The configuration measured best, or else the heuristic's."""
    return tuned.select("gemm", problem, hardware, GemmConfig, supports, heuristic_config)


def has_descriptors(hardware: Hardware) -> bool:
    """Whether `gemm_tma` runs there: tensor descriptors that the host makes."""
    return hardware.backend == "cuda" and int(hardware.arch.removeprefix("sm")) >= 90


def supports(problem: GemmProblem, config: GemmConfig, hardware: Hardware) -> bool:
    """Whether a configuration computes the problem at all, well or not, on this hardware."""
    seen = problem.transposed if config.swap_operands else problem
    if config.kernel == "gemv":
        return seen.M <= GEMV_MAX_ROWS
    stage = (config.block_m + config.block_n) * config.block_k * problem.element_size
    # On AMD the newest stage is in registers.
    held = config.num_stages - (hardware.backend == "hip")
    if config.num_stages > 1 and held * stage > hardware.shared_memory:
        return False
    if config.kernel == "gemm_tma":
        plain = problem.aligned and problem.element_size == 2 and problem.batch == 1
        return plain and has_descriptors(hardware)
    return config.kernel == "gemm"


@dataclass(frozen=True)
class EpilogueTraits:
    """What the registers and the shared memory of an epilogue depend on.

    Attributes:
        out_size: bytes of an element of the output.
        operand_size: bytes of the operands (full biases too) for each element of the output.
        out_aligned: the output's rows start at 16-byte boundaries, for tensor descriptors.
        operands_aligned: the operands' do, and Triton knows that they do.
        activated: there is an activation or a bias.
    """

    out_size: int
    operand_size: int = 0
    out_aligned: bool = True
    operands_aligned: bool = True
    activated: bool = False

    @property
    def is_awkward(self) -> bool:
        """Whether large tiles of the operands take many registers, and memory of their own."""
        aligned = self.out_aligned and self.operands_aligned
        return self.operand_size >= 4 or (self.operand_size > 0 and not aligned)

    @property
    def most_sums(self) -> int:
        """Sums that a thread may hold."""
        if self.is_awkward and not self.out_aligned:
            return 32
        pointers = self.activated and not self.out_aligned
        return 64 if self.is_awkward or self.out_size >= 4 or pointers else 128


@functools.lru_cache(maxsize=4096)
def with_staging(
    config: GemmConfig, problem: GemmProblem, traits: EpilogueTraits, hardware: Hardware
) -> GemmConfig:
    """The configuration with the registers and the shared memory that its epilogue leaves.

    Beside its pipeline `gemm_tma` stages the tile of the output. Operands that the epilogue reads
    change the layout of what they meet: in the pipeline's memory, or where the loop over the tiles
    is flattened in more, 32 kB for a 16-bit operand with aligned rows, else a tile in fp32.

    Measured by compiling for sm90: 128 × 256 with a residual takes 65568 bytes beside its stages if
    stored whole, 65560 in halves and flattened, 98328 whole and flattened. With 128 sums a thread
    it spills 136 bytes with an output in fp32, 64 to 500 with an fp32 operand, two operands or
    rows that are not aligned; so do 64 sums flattened, and if the output's rows are those. Measured
    on an H200: one tile a program is faster whole with 3 stages than in halves with 4
    (4096 × 14336, M = 1024: 164 and 172 µs).
    """
    if config.kernel != "gemm_tma" or config.split_k > 1:
        return config
    sums = config.block_m * config.block_n // (32 * config.num_warps)  # of a thread
    flatten = config.flatten and (sums < 64 or not traits.is_awkward)
    if sums > traits.most_sums:
        config = replace(config, block_n=config.block_n * traits.most_sums // sums)
    rows, columns = (problem.N, problem.M) if config.swap_operands else (problem.M, problem.N)
    tiles = math.ceil(rows / config.block_m) * math.ceil(columns / config.block_n)
    flattened = flatten and tiles > hardware.num_sms * config.resident
    halves = config.store_halves
    if traits.operand_size > 0:
        halves = flattened and config.block_n >= 128
    staging = config.block_m * config.block_n * traits.out_size // (1 + halves)
    staging += OPERAND_BYTES if traits.operand_size > 0 and flattened else 0
    stage = (config.block_m + config.block_n) * config.block_k * problem.element_size
    room = hardware.shared_memory // config.resident - staging - 1024
    stages = max(1, min(config.num_stages, room // stage))
    return replace(config, num_stages=stages, store_halves=halves, flatten=flatten)


@functools.lru_cache(maxsize=4096)
def heuristic_config(problem: GemmProblem, hardware: Hardware) -> GemmConfig:
    """The configuration the heuristic chooses."""
    if hardware.is_interpreter:
        return _interpreted(problem)
    if not problem.aligned:
        return _unaligned(problem, hardware)
    if problem.M <= GEMV_MAX_ROWS and problem.M <= problem.N:
        return _gemv(problem, hardware, swap=False)
    if problem.N <= GEMV_MAX_ROWS:
        return _gemv(problem.transposed, hardware, swap=True)
    if problem.ieee:
        return _ieee(problem, hardware)
    if problem.element_size == 2 and hardware.has_wgmma and problem.batch == 1:
        config = _hopper(problem, hardware)
        if config is not None:
            return config
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
    swap = problem.M < problem.N
    if swap:
        problem = problem.transposed
    block_m = min(64, max(next_power_of_2(problem.M), 16))
    block_n = min(32, max(next_power_of_2(problem.N), 16))
    blocks = problem.batch * math.ceil(problem.M / block_m) * math.ceil(problem.N / block_n)
    split_k = split_k_for(blocks, math.ceil(problem.K / 32), hardware.num_sms)
    return GemmConfig("gemm", block_m, block_n, 32, split_k, 8, 4, 2, swap)


def _gemv(problem: GemmProblem, hardware: Hardware, *, swap: bool) -> GemmConfig:
    """Measured on an H200, bf16, M = 1 and 2: 16 columns of 256 are level or best for N ≥ 4096."""
    if not problem.b_k_contiguous:
        block_n, block_k = 256 // problem.element_size, 64
    elif problem.batch * problem.N >= 16 * hardware.num_sms:
        block_n, block_k = 16, 512 // problem.element_size
    else:
        # Too few columns to fill the GPU with 16 each: N = 1024 takes 4.9 µs with 4, 6.3 with 16.
        block_n, block_k = 4, 2048 // problem.element_size
    block_k = min(block_k, max(next_power_of_2(problem.K), 32))
    blocks = problem.batch * math.ceil(problem.N / block_n)
    split_k = split_k_for(blocks, problem.K // block_k, hardware.num_sms)
    return GemmConfig("gemv", 1, block_n, block_k, split_k, 1, 4, 4, swap)


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


# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, halves of the store; µs that one multiprocessor of an
# H200 takes for such a tile with K = 4096, bf16 (one full wave, less 2.5 µs for launch and fill).
_HOPPER_TILES = (
    (64, 64, 128, 4, 6, False, 8.4),
    (64, 128, 128, 4, 4, False, 14.3),
    (64, 256, 64, 4, 5, True, 22.5),
    (128, 128, 64, 8, 6, True, 22.6),
    (128, 256, 64, 8, 4, True, 42.0),
)
_HOPPER_BYTES_PER_US = 4.2e6
_HOPPER_REDUCTION_US = 5.0


def _hopper(problem: GemmProblem, hardware: Hardware) -> GemmConfig | None:
    """Descriptor kernels on Hopper; None where another kernel measured better."""
    if min(problem.M, problem.N) <= 32:
        if problem.M <= problem.N:
            return _hopper_skinny(problem.transposed, hardware, swap=True)
        return _hopper_skinny(problem, hardware, swap=False)
    return hopper_choice(problem, hardware)[1]


def hopper_choice(
    problem: GemmProblem, hardware: Hardware, *, may_split: bool = True
) -> tuple[float, GemmConfig]:
    """The tiles and split of the persistent kernel with the least time, and that time in µs."""
    read = (problem.M + problem.N) * problem.K * problem.element_size / _HOPPER_BYTES_PER_US
    best: tuple[float, GemmConfig] | None = None
    for block_m, block_n, block_k, warps, stages, halves, tile_us in _HOPPER_TILES:
        tiles = math.ceil(problem.M / block_m) * math.ceil(problem.N / block_n)
        for split_k in (1, 2, 4) if may_split else (1,):
            if split_k > 1 and problem.K // split_k < 8 * block_k:
                break
            waves = math.ceil(tiles * split_k / hardware.num_sms)
            compute = 2.5 + waves * tile_us * problem.K / split_k / 4096
            if split_k > 1:
                partials = 8 * split_k * problem.M * problem.N / _HOPPER_BYTES_PER_US
                compute += _HOPPER_REDUCTION_US + partials
            # Neither hides the other entirely.
            cost = math.hypot(compute, read)
            if best is None or cost < best[0]:
                many = waves >= 5 and block_m * block_n == 32768
                config = GemmConfig(
                    "gemm_tma", block_m, block_n, block_k, split_k, 16, warps,
                    3 if many else stages, store_halves=halves and not many,
                )  # fmt: skip
                best = (cost, config)
    assert best is not None
    return best


def _hopper_skinny(problem: GemmProblem, hardware: Hardware, *, swap: bool) -> GemmConfig | None:
    """The problem comes with its long side, the weight's rows, as M; N ≤ 32."""
    block_n = max(next_power_of_2(problem.N), 16)
    blocks = math.ceil(problem.M / 64)
    if blocks < hardware.num_sms // 3:
        return None  # Too few rows to fill the GPU: split-K of the pointer kernel is faster.
    if blocks >= 3 * hardware.num_sms:
        shape = (128, block_n, 128, 4)
    elif problem.K >= 8192:
        shape = (64, block_n, 128, 8)
    else:
        shape = (64, block_n, 256, 4)
    block_m, block_n, block_k, stages = shape
    return GemmConfig("gemm_tma", block_m, block_n, block_k, 1, 8, 4, stages, swap)


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
