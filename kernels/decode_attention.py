"""Scaled dot-product attention of few queries over many keys: split-KV flash decoding.

The L_q queries of all heads that share a KV head are packed into the rows of one tile (row r is
query r % L_q of the group's head r // L_q), so that keys and values are read once. The keys are
cut into splits that run at the same time, and the last of them to arrive combines what they left:
one launch. See `split_kv` for the mathematics; results are bitwise equal from run to run.

A boolean mask is scanned first: tiles of which it hides every key are not read, so that a static
cache costs by what is filled. Layouts and masking are those of `flash_attention`.

Reference: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference", 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from triton_only_backend.kernels import attention_modifiers, hardware
from triton_only_backend.kernels.arrival import arrival_counters
from triton_only_backend.kernels.attention_tiles import band, load_tile
from triton_only_backend.kernels.dependent_launch import (
    launch_options,
    release_dependents,
    wait_for_producers,
)
from triton_only_backend.kernels.eights import eights_of_heads, in_eights
from triton_only_backend.kernels.sizes import next_power_of_2, padded_head_dim
from triton_only_backend.kernels.split_kv import (
    attend_split,
    combine_rows,
    finish_split,
    prefetch_tiles,
    store_rows,
    tiles_to_visit,
)

if TYPE_CHECKING:
    from triton_only_backend.kernels.attention_modifiers import Modifiers
    from triton_only_backend.kernels.decode_configs import DecodeConfig
    from triton_only_backend.kernels.hardware import Hardware

# Partial outputs that a program combines in one step, per warp: their latencies overlap.
COMBINE_ELEMENTS = 4096
# More partial outputs than this, per program that would combine them, take a launch of their own,
# with a program a row: one multiprocessor reads some 60 bytes a cycle.
MAX_ARRIVAL_ELEMENTS = 1 << 16
# Bytes of a mask that a program reads in one step.
SCAN_BYTES = 2048


@triton.jit(do_not_specialize=["len_kv"])
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, counter_ptr,
    q_strides, k_strides, v_strides, mask_strides, out_strides, lse_strides, scale,
    num_kv_heads, group_size, len_q, len_kv, head_dim, head_dim_v,
    window_left, window_right, softcap,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SCAN_TILES: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, MASK_IS_BOOL: tl.constexpr,
    ONE_MASK_ROW: tl.constexpr, IS_SPLIT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr, EIGHTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head_dim, head_dim_v = in_eights((head_dim, head_dim_v), EIGHTS)
    q_strides = in_eights(q_strides, EIGHTS >> 2)
    k_strides = in_eights(k_strides, EIGHTS >> 6)
    v_strides = in_eights(v_strides, EIGHTS >> 10)
    out_strides = in_eights(out_strides, EIGHTS >> 14)
    num_rows = group_size * len_q
    batch_head = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    row_block = tl.program_id(2)
    b = (batch_head // num_kv_heads).to(tl.int64)
    kv_head = (batch_head % num_kv_heads).to(tl.int64)
    first_row = row_block * BLOCK_G
    row = first_row + tl.arange(0, BLOCK_G)
    row_valid = row < num_rows
    m = row % len_q
    h = kv_head * group_size + row // len_q
    k_ptr += b * k_strides[0] + kv_head * k_strides[1]
    v_ptr += b * v_strides[0] + kv_head * v_strides[1]
    if PREFETCH > 0:
        prefetch_tiles(
            k_ptr, v_ptr, split, num_splits, len_kv, head_dim, head_dim_v,
            k_strides[2], v_strides[2], BLOCK_N, BLOCK_D, BLOCK_DV, PREFETCH,
        )  # fmt: skip
    wait_for_producers(PDL)

    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + b * q_strides[0] + h * q_strides[1] + m.to(tl.int64) * q_strides[2]
    q_ptrs = q_ptrs[:, None] + offs_d.to(tl.int64)[None, :] * q_strides[3]
    q = load_tile(q_ptrs, row_valid, offs_d < head_dim, False, EVEN_D)

    if ONE_MASK_ROW:
        mask_rows = b * mask_strides[0] + kv_head * group_size * mask_strides[1]
        mask_rows = mask_ptr + mask_rows + tl.zeros((1,), tl.int64)
        mask_valid = tl.full((1,), True, tl.int1)
    else:
        mask_rows = mask_ptr + b * mask_strides[0] + h * mask_strides[1]
        mask_rows += m.to(tl.int64) * mask_strides[2]
        mask_valid = row_valid
    left = None
    right = None
    if window_left is not None:
        left, right = band(window_left, window_right, len_q, len_kv, IS_CAUSAL)
    begin, end = tiles_to_visit(
        mask_rows, mask_valid, mask_strides[3], split, num_splits, len_q, len_kv, left, right,
        BLOCK_N, IS_CAUSAL, SCAN_TILES,
    )  # fmt: skip
    out, lse2 = attend_split(
        q, k_ptr, v_ptr, mask_rows, mask_valid, m, split, num_splits, begin, end, len_kv,
        head_dim, head_dim_v, k_strides[2], k_strides[3], v_strides[2], v_strides[3],
        mask_strides[3], scale, left, right, softcap,
        BLOCK_N, BLOCK_DV, IS_CAUSAL, HAS_MASK, MASK_IS_BOOL, EVEN_N, EVEN_D, EVEN_DV, PRECISION,
    )  # fmt: skip
    release_dependents(PDL)
    if counter_ptr is not None:
        counter_ptr += batch_head * tl.num_programs(2) + row_block
    finish_split(
        out, lse2, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, counter_ptr,
        b, kv_head, first_row, num_rows, split, num_splits,
        num_kv_heads, group_size, len_q, head_dim_v, out_strides, lse_strides,
        BLOCK_R, BLOCK_C, IS_SPLIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "len_q", "num_splits"])
def combine_splits_kernel(
    partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, out_strides, lse_strides,
    num_rows, num_heads, len_q, head_dim_v, num_splits,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_DV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_producers(PDL)
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    row_valid = row < num_rows
    out, lse2 = combine_rows(
        partial_out_ptr, partial_lse_ptr, row, row_valid, num_splits, head_dim_v, BLOCK_C, BLOCK_DV
    )
    store_rows(
        out, lse2, out_ptr, lse_ptr, row // (num_heads * len_q), row // len_q % num_heads,
        row % len_q, row_valid, head_dim_v, out_strides, lse_strides,
    )  # fmt: skip


class Splits(NamedTuple):
    """How a launch is cut: its grid, where splits leave their parts, and who combines them."""

    num_splits: int
    grid: tuple[int, int, int]
    partial_out: torch.Tensor | None
    partial_lse: torch.Tensor | None
    counters: torch.Tensor | None
    combine_rows: int
    combine_splits: int


def arrange_splits(
    query: torch.Tensor, num_kv_heads: int, len_kv: int, head_dim_v: int, config: DecodeConfig
) -> Splits:
    """The splits of a launch over `len_kv` keys, and their workspace.

    As many as the configuration asks for, or fewer where those would have as many tiles each.
    """
    batch, num_heads, len_q, _ = query.shape
    group_rows = num_heads // num_kv_heads * len_q
    tiles = triton.cdiv(len_kv, config.block_n)
    tiles_a_split = max(1, triton.cdiv(tiles, max(1, config.num_splits)))
    count = max(1, triton.cdiv(tiles, tiles_a_split))
    row_blocks = triton.cdiv(group_rows, config.block_g)
    grid = (batch * num_kv_heads, count, row_blocks)
    rows = min(config.block_g, next_power_of_2(group_rows))
    if count == 1:
        return Splits(1, grid, None, None, None, rows, 1)
    num_rows = batch * num_heads * len_q
    partial_lse = torch.empty(num_rows * count, dtype=torch.float32, device=query.device)
    partial_out = partial_lse.new_empty(num_rows * count * head_dim_v)
    block_dv = padded_head_dim(head_dim_v)
    counters = None
    if rows * count * block_dv <= MAX_ARRIVAL_ELEMENTS:
        counters = arrival_counters(batch * num_kv_heads * row_blocks, query.device)
    at_once = max(1, COMBINE_ELEMENTS * config.num_warps // (rows * block_dv))
    at_once = min(next_power_of_2(count), at_once)
    return Splits(count, grid, partial_out, partial_lse, counters, rows, at_once)


def scan_tiles(
    mask: torch.Tensor | None, one_row: bool, len_kv: int, count: int, config: DecodeConfig
) -> int:
    """How many of a split's tiles of a boolean mask are read at a time; 0 where there is none."""
    if mask is None or mask.dtype != torch.bool:
        return 0
    tiles = next_power_of_2(triton.cdiv(triton.cdiv(len_kv, config.block_n), count))
    rows = 1 if one_row else config.block_g
    return max(1, min(tiles, SCAN_BYTES // (config.block_n * rows)))


def prefetch(key: torch.Tensor, value: torch.Tensor, config: DecodeConfig, device: Hardware) -> int:
    """How many of a split's tiles are prefetched: where the device can, and lines hold one key."""
    dense = key.stride(3) == 1 and value.stride(3) == 1 and key.shape[2] > 0
    return config.prefetch if dense and device.backend == "cuda" else 0


def has_one_row(mask: torch.Tensor | None, group_size: int) -> bool:
    """Whether the queries of a KV head all have the same row of a (B, H, L_q, L_kv) mask."""
    if mask is None:
        return False
    one_head = group_size == 1 or mask.stride(1) == 0
    return one_head and (mask.shape[2] == 1 or mask.stride(2) == 0)


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    config: DecodeConfig,
    precision: str,
    modifiers: Modifiers = attention_modifiers.NONE,
) -> None:
    """Writes what `flash_attention` writes, from the same arguments, with the keys split.

    Args:
        query: (B, H, L_q, D) fp16, bf16 or fp32, any strides; L_q * H / H_kv should be small.
        key: (B, H_kv, L_kv, D) of query's dtype, any strides; H_kv divides H.
        value: (B, H_kv, L_kv, D_v) of query's dtype, any strides.
        attn_mask: None or a (B, H, L_q, L_kv) view (stride 0 where it is broadcast): bool, True
            where a query attends, or a floating dtype, added to the scaled scores.
        out: (B, H, L_q, D_v) of query's dtype, any strides.
        lse: None or (B, H, L_q) fp32: the natural logarithm of each row's sum of exponentials.
        is_causal: query i sees the keys j <= i only.
        precision: how fp32 products are computed, "ieee" or "tf32".
        modifiers: soft-cap and window; dropout and packed sequences are left to `flash_attention`.
    """
    _, num_heads, len_q, head_dim = query.shape
    num_kv_heads, len_kv, head_dim_v = value.shape[1:]
    if out.numel() == 0:
        return
    group_size = num_heads // num_kv_heads
    block_d, block_dv = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    device = hardware.of(query.device)
    splits = arrange_splits(query, num_kv_heads, len_kv, head_dim_v, config)
    one_mask_row = has_one_row(attn_mask, group_size)
    mask = query if attn_mask is None else attn_mask
    lse_strides = (0, 0, 0) if lse is None else lse.stride()
    window_left, window_right = modifiers.window if modifiers.has_window else (None, None)
    decode_attention_kernel[splits.grid](
        query, key, value, mask, out, lse, splits.partial_out, splits.partial_lse, splits.counters,
        query.stride(), key.stride(), value.stride(), mask.stride(), out.stride(), lse_strides,
        scale, num_kv_heads, group_size, len_q, len_kv, head_dim, head_dim_v,
        window_left, window_right, modifiers.softcap or None,
        BLOCK_G=config.block_g, BLOCK_N=config.block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
        BLOCK_R=splits.combine_rows, BLOCK_C=splits.combine_splits,
        SCAN_TILES=scan_tiles(attn_mask, one_mask_row, len_kv, splits.num_splits, config),
        IS_CAUSAL=is_causal, HAS_MASK=attn_mask is not None, MASK_IS_BOOL=mask.dtype == torch.bool,
        ONE_MASK_ROW=one_mask_row, IS_SPLIT=splits.num_splits > 1,
        EVEN_N=len_kv % config.block_n == 0, EVEN_D=head_dim == block_d,
        EVEN_DV=head_dim_v == block_dv, PRECISION=precision,
        PREFETCH=prefetch(key, value, config, device),
        EIGHTS=eights_of_heads((head_dim, head_dim_v), query, key, value, out),
        num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(device),
    )  # fmt: skip
    if splits.num_splits > 1 and splits.counters is None:
        combine_splits(splits, out, lse, config)


def combine_splits(
    splits: Splits, out: torch.Tensor, lse: torch.Tensor | None, config: DecodeConfig
) -> None:
    """Combines what the splits of a launch without counters left."""
    _, num_heads, len_q, head_dim_v = out.shape
    num_rows, block_dv = out.numel() // head_dim_v, padded_head_dim(head_dim_v)
    rows = config.combine_rows
    at_once = max(1, COMBINE_ELEMENTS * 4 // (rows * block_dv))
    combine_splits_kernel[(triton.cdiv(num_rows, rows),)](
        splits.partial_out, splits.partial_lse, out, lse,
        out.stride(), (0, 0, 0) if lse is None else lse.stride(),
        num_rows, num_heads, len_q, head_dim_v, splits.num_splits,
        BLOCK_R=rows, BLOCK_C=min(next_power_of_2(splits.num_splits), at_once),
        BLOCK_DV=block_dv, num_warps=4, **launch_options(hardware.of(out.device)),
    )  # fmt: skip
