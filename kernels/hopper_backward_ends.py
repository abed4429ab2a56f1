"""What goes before and after `flash_attention_backward_hopper_kernel`, in plain Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["query_tiles", "num_heads", "len_q"])
def tile_statistics_kernel(
    out_ptr, grad_out_ptr, lse_ptr, stats_ptr, turns_ptr, stride_ob, stride_oh, stride_om,
    stride_od, stride_gob, stride_goh, stride_gom, stride_god, stride_lse_b, stride_lse_h,
    stride_lse_m, query_tiles, num_heads, len_q, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile's negated log-sum-exps in units of log2, and its deltas; resets the tile's turns.

    stats (B * H * tiles, 2, BLOCK_M) fp32. Rows beyond the last one get -inf, which makes P = 0, as
    do rows that saw no key.
    """
    program = tl.program_id(0)
    b = (program // query_tiles // num_heads).to(tl.int64)
    h = (program // query_tiles % num_heads).to(tl.int64)
    rows = program % query_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < len_q
    m = rows.to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + m[:, None] * stride_om + d * stride_od
    grad_ptrs = grad_out_ptr + b * stride_gob + h * stride_goh
    grad_ptrs = grad_ptrs + m[:, None] * stride_gom + d * stride_god
    lse_ptrs = lse_ptr + b * stride_lse_b + h * stride_lse_h + m * stride_lse_m
    lse = tl.load(lse_ptrs, mask=valid, other=float("-inf"))
    out = tl.load(out_ptrs, mask=valid[:, None], other=0.0)
    grad_out = tl.load(grad_ptrs, mask=valid[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    minus_lse2 = tl.where(lse == float("-inf"), float("-inf"), lse * -1.4426950408889634)
    stats_ptrs = stats_ptr + program.to(tl.int64) * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
    tl.store(stats_ptrs, minus_lse2)
    tl.store(stats_ptrs + BLOCK_M, delta)
    tl.store(turns_ptr + program, 0)


@triton.jit(do_not_specialize=["tiles", "num_heads", "length", "splits"])
def add_splits_kernel(
    dk_sums_ptr, dv_sums_ptr, dk_ptr, dv_ptr, stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd, scale, tiles, num_heads, length, splits,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of dK or dV, by the second program index, from the sums of each split.

    Sums lie as `put_tile` of `hopper_backward_tiles` puts them: (B * H_kv, splits, tiles) of them.
    """
    program = tl.program_id(0)
    head = program // tiles
    tile = program % tiles
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    n = rows.to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    sums_ptr = dk_sums_ptr
    ptrs = dk_ptr + b * stride_dkb + h * stride_dkh + n * stride_dkn + d * stride_dkd
    factor = tl.full((), scale, tl.float32)
    if tl.program_id(1) == 1:
        sums_ptr = dv_sums_ptr
        ptrs = dv_ptr + b * stride_dvb + h * stride_dvh + n * stride_dvn + d * stride_dvd
        factor = tl.full((), 1.0, tl.float32)
    TILE: tl.constexpr = ROWS * BLOCK_D
    sums = tl.zeros((TILE,), tl.float32)
    for split in range(splits):
        place = (head * splits + split).to(tl.int64) * tiles + tile
        sums += tl.load(sums_ptr + place * TILE + tl.arange(0, TILE))
    # Part of columns, warp, lane // 4, lane % 4, half, pair; rows are warp, half, lane // 4.
    sums = tl.reshape(sums, (BLOCK_D // 8, 4, 8, 4, 2, 2))
    sums = tl.permute(sums, (1, 4, 2, 0, 3, 5))
    gradient = tl.reshape(sums, (ROWS, BLOCK_D)) * factor
    tl.store(ptrs, gradient.to(dk_ptr.dtype.element_ty), mask=(rows < length)[:, None])
