"""Whether `flash_attention_hopper` runs an attention, and how it divides the work.

`takes` asks the tensors, `select_hopper_flash` the sizes and the hardware: pure functions, the
latter of plain integers. Where either says no, `flash_attention` runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.flash_attention import L2_SECTION_BYTES
from triton_only_backend.kernels.tma_layout import tma_can_load

if TYPE_CHECKING:
    from triton_only_backend.kernels.attention_arguments import Operands, Options
    from triton_only_backend.kernels.attention_configs import AttentionProblem
    from triton_only_backend.kernels.hardware import Hardware

GROUP_ROWS = 64  # queries of a group of four warps: the rows of one wgmma
BLOCK_N = 128  # keys of a tile
HEAD_DIMS = (64, 128)
# Times log2(e) these are normal fp32 numbers: 0 times a hidden score would be no number.
LEAST_SCALE, MOST_SCALE = 2.0**-100, 2.0**100
SMALL_BYTES = 2048  # barriers, and a mask's words that change their layout: an upper bound


@dataclass(frozen=True)
class HopperFlashConfig:
    """How `flash_attention_hopper` divides its work.

    Attributes:
        groups: groups of four warps, 64 queries each; two or three.
        stages: tiles of keys and values in shared memory.
        registers: of a thread that computes.
        loading_registers: of the warp that loads; three warps beside it have as many.
        ordered: two groups take turns in starting products.
    """

    groups: int
    stages: int
    registers: int
    loading_registers: int
    ordered: bool

    @property
    def block_m(self) -> int:
        """Queries of a tile."""
        return self.groups * GROUP_ROWS


@dataclass(frozen=True)
class HopperFlashForm:
    """What of a problem decides what `flash_attention_hopper` is compiled to.

    Attributes:
        even_n: the last tile of keys is full.
        mask_aligned: keys of the mask are neighbours, and rows start at 16 bytes.
        store_tma: the copy engine can store the result.
    """

    is_causal: bool
    even_n: bool
    mask_aligned: bool
    has_lse: bool
    store_tma: bool


# D = 128, and 64 where there are few queries: two groups, whose turns were worth 1 to 2 % on an
# H200. D = 64 halves the products beside an exponential: three groups hide one another's better,
# 557 TFLOP/s of 16384 keys where two reached 442, but their tiles of 192 queries divide little work
# worse (1024 causal: 237 and 265).
TWO_GROUPS = {
    128: HopperFlashConfig(2, 5, 240, 24, True),
    64: HopperFlashConfig(2, 8, 240, 24, True),
}
THREE_GROUPS = HopperFlashConfig(3, 6, 160, 24, False)
# With 24 registers the loading warp would spill what it needs of a mask.
MASKED = {d: replace(two, registers=232, loading_registers=40) for d, two in TWO_GROUPS.items()}


def takes(x: Operands, options: Options) -> bool:
    """Whether `flash_attention_hopper` computes this: what its layouts and formulas presume."""
    query, key, value, mask, _ = x
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[3] == value.shape[3]
        and query.shape[3] in HEAD_DIMS
        and key.shape[2] > 0
        and LEAST_SCALE <= options.scale_of(query) <= MOST_SCALE
        and options.softcap == 0
        and options.dropout_p == 0
        and max(options.window_left, options.window_right) < 0
        and (mask is None or (mask.dtype == torch.bool and not options.is_causal))
        and all(map(tma_can_load, (query, key, value)))
    )


def select_hopper_flash(problem: AttentionProblem, hardware: Hardware) -> HopperFlashConfig | None:
    """How `flash_attention_hopper` runs a problem that it takes, or None where it should not."""
    if not hardware.has_gluon or tuned.is_forced("flash_attention"):
        return None
    two = (MASKED if problem.has_mask else TWO_GROUPS)[problem.head_dim]
    # Half of the multiprocessors would be idle, or half of a tile: the tiles of `flash_attention`
    # have half the rows.
    tiles = -(-problem.len_q // two.block_m) * problem.batch * problem.num_heads
    if problem.len_q <= GROUP_ROWS or 2 * tiles <= hardware.num_sms:
        return None
    many = 2048 if problem.is_causal else 1024
    if problem.head_dim == 64 and problem.len_q > many and not problem.has_mask:
        return THREE_GROUPS
    return two


def hopper_flash_shared_memory(config: HopperFlashConfig, head_dim: int) -> int:
    """An upper bound for the shared memory of `flash_attention_hopper`, in bytes.

    The ring, the queries of all groups and their results.
    """
    rows = config.stages * BLOCK_N + 2 * config.block_m
    return 2 * rows * head_dim + SMALL_BYTES


@functools.lru_cache(maxsize=4096)
def heads_of_section(tiles: int, heads: int, group_size: int, kv_bytes: int, programs: int) -> int:
    """How many query heads are shared out among the programs at a time.

    The keys and values of a section lie in the L2 cache together, and its tiles are dealt out in
    rounds, one to each program: what a last round lacks is lost, so the number of heads is, of
    those within half and one and a half times the bytes, the one that makes the fewest rounds.

    Args:
        tiles: of queries, of a head.
        heads: of all batches.
        group_size: query heads that share a KV head; they stay together.
        kv_bytes: a KV head's keys and values.
        programs: of the launch.
    """

    def rounds(count: int) -> int:
        sections, rest = divmod(heads, count)
        return sections * -(-tiles * count // programs) + -(-tiles * rest // programs)

    groups = heads // group_size
    wanted = max(L2_SECTION_BYTES // kv_bytes, -(-programs // (tiles * group_size)), 1)
    counts = range(max(1, min(groups, wanted) // 2), min(groups, wanted * 3 // 2) + 1)
    return group_size * min(counts, key=lambda n: (rounds(n * group_size), abs(n - wanted)))
