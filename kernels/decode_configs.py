"""The blocks and splits of attention for few queries: pure functions of plain integers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.attention_configs import (
    MAX_DECODE_ROWS,
    AttentionProblem,
    FlashConfig,
    flash_shared_memory,
)
from triton_only_backend.kernels.sizes import next_power_of_2

if TYPE_CHECKING:
    from triton_only_backend.kernels.hardware import Hardware

# A split shorter than this costs more to launch and combine than it saves.
MIN_SPLIT_KEYS = 32
# Keys and values of this many bytes are read about as fast as splits of them are combined.
SMALL_CACHE_BYTES = 16 << 20
# Bounds the workspace and the work of the combining kernel.
MAX_SPLITS = 128


@dataclass(frozen=True)
class DecodeConfig:
    """Blocks of `decode_attention`; `block_g` rows are packed, `combine_rows` rows a combine.

    `prefetch` tiles of a split's keys and values are on their way to the L2 cache while the kernel
    waits for the one before it, and for the mask that says which of them are needed (NVIDIA).
    """

    block_n: int
    num_splits: int
    num_warps: int
    num_stages: int
    block_g: int
    combine_rows: int = 1
    prefetch: int = 0


def select_decode_config(problem: AttentionProblem, hardware: Hardware) -> DecodeConfig:
    """The configuration of `decode_attention` for a problem: what was measured best, or else."""
    return tuned.select(
        "decode_attention", problem, hardware, DecodeConfig, decode_fits, heuristic_decode_config
    )


def select_rope_cache_config(problem: AttentionProblem, hardware: Hardware) -> DecodeConfig:
    """The same for `rope_cache_attention`, between linear layers."""
    return tuned.select(
        "decode_attention", problem, hardware, DecodeConfig, decode_fits, _beside_linear_layers
    )


def decode_fits(problem: AttentionProblem, config: DecodeConfig, hardware: Hardware) -> bool:
    """Whether a configuration's tiles fit the shared memory."""
    return decode_shared_memory(problem, config, hardware) <= hardware.shared_memory


def heuristic_decode_config(problem: AttentionProblem, hardware: Hardware) -> DecodeConfig:
    """The configuration that the sizes suggest.

    The number of splits follows from the sizes alone, so that a captured CUDA graph stays right.
    """
    rows = max(1, problem.len_q * problem.group_size)
    width = max(problem.block_d, problem.block_dv)
    # More rows than these spill registers (sm90: 176 bytes in fp32, 256 at head dimension 256).
    most_rows = 16 if problem.element_size == 4 else MAX_DECODE_ROWS if width <= 128 else 32
    block_g = min(MAX_DECODE_ROWS, max(16, next_power_of_2(rows)))
    if hardware.is_interpreter:
        block_n = min(256, max(16, next_power_of_2(problem.len_kv)))
        return DecodeConfig(block_n, 1, 4, 1, block_g, combine_rows=64)
    block_g = min(block_g, most_rows)
    num_warps = 8 if block_g * width > 32 * 128 or problem.element_size == 4 else 4
    groups = max(1, problem.batch * problem.num_kv_heads * -(-rows // block_g))
    if hardware.has_wgmma and problem.element_size == 2 and block_g == 16 and width <= 128:
        return _decode_on_hopper(problem, groups, width, hardware)
    key_bytes = (problem.head_dim + problem.head_dim_v) * problem.element_size
    # Two programs a multiprocessor hide each other's latencies, but more splits cost more to
    # combine: where there is little to read, one.
    a_multiprocessor = 1 if groups * problem.len_kv * key_bytes <= SMALL_CACHE_BYTES else 2
    wanted = a_multiprocessor * hardware.num_sms // groups
    num_splits = max(1, min(wanted, MAX_SPLITS, problem.len_kv // MIN_SPLIT_KEYS))
    tiles: tuple[tuple[int, int], ...] = ((32, 3), (32, 2), (32, 1), (16, 1))
    if problem.element_size < 4:
        # Few keys a split: finer tiles, so that all of them are on their way at once.
        few_keys = problem.len_kv < 128 * num_splits
        tiles = ((32, 4), *tiles) if few_keys else ((64, 3), (64, 2), *tiles)
    for block_n, num_stages in tiles:
        config = DecodeConfig(block_n, num_splits, num_warps, num_stages, block_g)
        if decode_fits(problem, config, hardware):
            return config
    return config


def _decode_on_hopper(
    problem: AttentionProblem, groups: int, width: int, hardware: Hardware
) -> DecodeConfig:
    """Up to 16 rows a group, 16-bit, head dimensions to 128; measured on an H200.

    One program a multiprocessor with three tiles of 128 keys on their way reads fastest (131072
    keys: 125 µs, 133 in tiles of 64), if it has two tiles or more. Fewer keys take finer tiles, and
    two programs once each still has one; those of a short split are asked for while the kernel
    before ends (768 keys, batch 2: 6.4 µs, 7.1 without). At head dimension 64 a tile has half the
    bytes: two programs.
    """
    num_splits = max(1, hardware.num_sms // groups)
    if num_splits == 1:
        if groups > hardware.num_sms and problem.len_kv <= 1024:
            return DecodeConfig(32, 1, 2, 4, 16)
        if groups <= hardware.num_sms:
            return DecodeConfig(64, 1, 4, 4, 16)
        return DecodeConfig(128, 1, 4, 3, 16)
    if problem.len_kv >= 256 * num_splits:
        if width <= 64 and num_splits >= 4:
            num_splits *= 2
        return DecodeConfig(128, num_splits, 4, 3, 16)
    tiles = -(-problem.len_kv // 64)
    if tiles >= 2 * num_splits:
        return DecodeConfig(64, 2 * num_splits, 4, 4, 16)
    return DecodeConfig(64, max(1, min(num_splits, tiles)), 4, 3, 16, prefetch=1)


def _beside_linear_layers(problem: AttentionProblem, hardware: Hardware) -> DecodeConfig:
    """Few keys in tiles so small that programs start while the layer before still fills the rest.

    Alone, tiles of 64 keys are faster (8.2 and 7.5 µs, 768 keys, batch 2, H200); in a decode step
    they cost 1 to 2 µs more a layer.
    """
    config = heuristic_decode_config(problem, hardware)
    if not hardware.has_gluon or problem.len_kv >= 256 * config.num_splits or config.block_n < 64:
        return config
    groups = problem.batch * problem.num_kv_heads
    num_splits = max(1, min(hardware.num_sms // groups, -(-problem.len_kv // 32)))
    return replace(config, block_n=32, num_splits=num_splits, num_stages=4, prefetch=0)


def decode_shared_memory(
    problem: AttentionProblem, config: DecodeConfig, hardware: Hardware
) -> int:
    """An upper bound for the shared memory of `decode_attention`, in bytes."""
    flash = FlashConfig(config.block_g, config.block_n, config.num_warps, config.num_stages)
    # On AMD fp32 weights go through shared memory on their way to the second product.
    through = hardware.backend == "hip" and problem.element_size == 4
    exchanged = 4 * config.block_g * config.block_n if through else 0
    return flash_shared_memory(problem, flash, hardware) + exchanged
