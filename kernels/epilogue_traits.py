"""What an epilogue leaves of registers and shared memory for the tiles of its product."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_only_backend.kernels.gemm_configs import GemmConfig, GemmProblem
    from triton_only_backend.kernels.hardware import Hardware

# Shared memory in which a tile of an epilogue's operands changes its layout.
OPERAND_BYTES = 32768


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


def with_registers(config: GemmConfig, traits: EpilogueTraits) -> GemmConfig | None:
    """A configuration of `gemm_hopper` with the registers that its epilogue leaves.

    None where another kernel does better: what is not 16-bit and aligned cannot be written by the
    copy engine, or spills. So do 256 × 128 with an operand, by 120 to 212 bytes, and 128 × 224 with
    one behind an activation, by 32 to 48, which 128 × 256 do not.
    """
    if traits.out_size != 2 or not traits.out_aligned or traits.is_awkward:
        return None
    spills = config.block_m == 256 or (config.block_n == 224 and traits.activated)
    if spills and traits.operand_size > 0:
        return replace(config, block_m=128, block_n=256)
    return config


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
    (4096 × 14336, M = 1024: 164 and 172 µs). Split along K and flattened, the partials' tile in
    fp32 changes its layout beside the stages. Of copied operands, whose output's rows are often not
    aligned either, 128 sums a thread spill 72 bytes with Triton 3.7.
    """
    if config.kernel != "gemm_tma":
        return config
    stage = (config.block_m + config.block_n) * config.block_k * problem.element_size
    if config.split_k > 1:
        used = config.num_stages * stage + config.block_m * config.block_n * 4 + 1024
        return replace(
            config, flatten=config.flatten and config.resident * used <= hardware.shared_memory
        )
    sums = config.block_m * config.block_n // (32 * config.num_warps)  # of a thread
    flatten = config.flatten and (sums < 64 or not traits.is_awkward)
    most = traits.most_sums
    if config.realign and not traits.out_aligned:
        most = min(most, 64)
    if sums > most:
        config = replace(config, block_n=config.block_n * most // sums)
    rows, columns = (problem.N, problem.M) if config.swap_operands else (problem.M, problem.N)
    tiles = math.ceil(rows / config.block_m) * math.ceil(columns / config.block_n)
    flattened = flatten and tiles > hardware.num_sms * config.resident
    halves = config.store_halves
    if traits.operand_size > 0:
        halves = flattened and config.block_n >= 128
    # Rows that are not aligned are written through pointers, and whole.
    staging = config.block_m * config.block_n * traits.out_size
    staging //= 1 + (halves and traits.out_aligned)
    staging += OPERAND_BYTES if traits.operand_size > 0 and flattened else 0
    room = hardware.shared_memory // config.resident - staging - 1024
    stages = max(1, min(config.num_stages, room // stage))
    return replace(config, num_stages=stages, store_halves=halves, flatten=flatten)
