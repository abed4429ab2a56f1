"""Scaled dot-product attention of few queries over many keys: split-KV flash decoding.

The L_q queries of all heads that share a KV head are packed into the rows of one tile (row r is
query r % L_q of the group's head r // L_q), so that keys and values are read once. The keys are
cut into splits that run at the same time; split s leaves its normalised output and log-sum-exp,

    O_s = sum_j exp(S_j - m_s) V_j / l_s        L_s = m_s + log l_s        (j in split s)

and a second kernel combines them in the order of the splits, whatever order they ran in, so that
results are bitwise equal from run to run:

    O = sum_s w_s O_s / sum_s w_s        w_s = exp(L_s - max_s L_s)

A split in which a row sees no key has L_s = -inf, hence weight 0. With one split the first kernel
writes the output itself. Layouts and masking are those of `flash_attention`.

Reference: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference", 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from triton_only_backend.kernels.flash_attention import (
    LN2,
    LOG2E,
    attend_blocks,
    load_tile,
    padded_head_dim,
)

if TYPE_CHECKING:
    from triton_only_backend.kernels.attention_configs import DecodeConfig


# Splits that one step of the combining kernel loads at once: their latencies overlap.
COMBINE_CHUNK = 32


@triton.jit(do_not_specialize=["len_q", "len_kv", "num_splits", "split_size"])
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    stride_ob,
    stride_oh,
    stride_om,
    stride_od,
    stride_lse_b,
    stride_lse_h,
    stride_lse_m,
    scale,
    num_kv_heads,
    group_size,
    len_q,
    len_kv,
    head_dim,
    head_dim_v,
    num_splits,
    split_size,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr,
    HAS_LSE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_rows = group_size * len_q
    row_blocks = tl.cdiv(num_rows, BLOCK_G)
    pid = tl.program_id(0)
    split = pid % num_splits
    row_block = pid // num_splits % row_blocks
    batch_head = pid // (num_splits * row_blocks)
    b = (batch_head // num_kv_heads).to(tl.int64)
    kv_head = (batch_head % num_kv_heads).to(tl.int64)

    row = row_block * BLOCK_G + tl.arange(0, BLOCK_G)
    row_valid = row < num_rows
    position = row % len_q
    m = position.to(tl.int64)
    h = kv_head * group_size + row // len_q
    lanes = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    d_valid = offs_d < head_dim
    dv_valid = offs_dv < head_dim_v

    start = split * split_size
    stop = tl.minimum(start + split_size, len_kv)
    if IS_CAUSAL:
        stop = tl.minimum(stop, len_q)
    first_key = start.to(tl.int64)
    q_ptrs = q_ptr + b * stride_qb + h[:, None] * stride_qh + m[:, None] * stride_qm
    q_ptrs += offs_d.to(tl.int64)[None, :] * stride_qd
    k_ptrs = k_ptr + b * stride_kb + kv_head * stride_kh + first_key * stride_kn
    k_ptrs += lanes[:, None] * stride_kn + offs_d.to(tl.int64)[None, :] * stride_kd
    v_ptrs = v_ptr + b * stride_vb + kv_head * stride_vh + first_key * stride_vn
    v_ptrs += lanes[:, None] * stride_vn + offs_dv.to(tl.int64)[None, :] * stride_vd
    mask_rows = mask_ptr + b * stride_mask_b + h * stride_mask_h + m * stride_mask_m
    k_step = tl.full((), BLOCK_N, tl.int64) * stride_kn
    v_step = tl.full((), BLOCK_N, tl.int64) * stride_vn

    qk_scale = tl.full((), scale, tl.float32) * LOG2E
    q = load_tile(q_ptrs, row_valid, d_valid, False, EVEN_D)
    q = tl.where(qk_scale < 0, -q, q)
    qk_scale = tl.abs(qk_scale)

    acc = tl.zeros((BLOCK_G, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_G,), tl.float32)
    acc, row_max, row_sum = attend_blocks(
        acc,
        row_max,
        row_sum,
        q,
        k_ptrs,
        v_ptrs,
        0,
        0,
        mask_rows,
        stride_mask_n,
        position,
        row_valid,
        start,
        stop,
        len_kv,
        k_step,
        v_step,
        qk_scale,
        d_valid,
        dv_valid,
        BLOCK_N,
        IS_CAUSAL or not EVEN_N,
        IS_CAUSAL,
        HAS_MASK,
        MASK_IS_BOOL,
        EVEN_N,
        EVEN_D,
        EVEN_DV,
        False,
        PRECISION,
    )

    row_sum = tl.where(row_sum == 0, 1.0, row_sum)
    out = acc / row_sum[:, None]
    lse2 = row_max + tl.log2(row_sum)
    out_valid = row_valid[:, None] & dv_valid[None, :]
    if IS_SPLIT:
        # Partial outputs are (B, H, L_q, splits, D_v), so that one row's splits lie together.
        query_row = (b * num_kv_heads * group_size + h) * len_q + m
        partial = query_row * num_splits + split
        partial_ptrs = partial_out_ptr + partial[:, None] * head_dim_v + offs_dv[None, :]
        tl.store(partial_ptrs, out, mask=out_valid)
        tl.store(partial_lse_ptr + partial, lse2, mask=row_valid)
    else:
        out_ptrs = out_ptr + b * stride_ob + h[:, None] * stride_oh + m[:, None] * stride_om
        out_ptrs += offs_dv.to(tl.int64)[None, :] * stride_od
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=out_valid)
        if HAS_LSE:
            lse_ptrs = lse_ptr + b * stride_lse_b + h * stride_lse_h + m * stride_lse_m
            tl.store(lse_ptrs, lse2 * LN2, mask=row_valid)


@triton.jit(do_not_specialize=["num_rows", "len_q", "num_splits"])
def combine_splits_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    stride_ob,
    stride_oh,
    stride_om,
    stride_od,
    stride_lse_b,
    stride_lse_h,
    stride_lse_m,
    num_rows,
    num_heads,
    len_q,
    head_dim_v,
    num_splits,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    row_valid = row < num_rows
    offs_dv = tl.arange(0, BLOCK_DV)
    valid = row_valid[:, None] & (offs_dv < head_dim_v)[None, :]

    offs_s = tl.arange(0, BLOCK_S)
    split_valid = row_valid[:, None] & (offs_s < num_splits)[None, :]
    splits = row[:, None] * num_splits + offs_s[None, :]
    lse2 = tl.load(partial_lse_ptr + splits, mask=split_valid, other=float("-inf"))
    largest = tl.max(lse2, 1)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2(lse2 - shift[:, None]), 1)

    acc = tl.zeros((BLOCK_R, BLOCK_DV), tl.float32)
    for start in tl.range(0, num_splits, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        chunk_valid = row_valid[:, None] & (offs_c < num_splits)[None, :]
        splits = row[:, None] * num_splits + offs_c[None, :]
        lse2 = tl.load(partial_lse_ptr + splits, mask=chunk_valid, other=float("-inf"))
        weight = tl.exp2(lse2 - shift[:, None])
        tile_ptrs = partial_out_ptr + splits[:, :, None] * head_dim_v + offs_dv[None, None, :]
        tile = tl.load(tile_ptrs, mask=chunk_valid[:, :, None] & valid[:, None, :], other=0.0)
        acc += tl.sum(weight[:, :, None] * tile, 1)

    total = tl.where(total == 0, 1.0, total)
    out = acc / total[:, None]
    b = row // (num_heads * len_q)
    h = row // len_q % num_heads
    m = row % len_q
    out_ptrs = out_ptr + b[:, None] * stride_ob + h[:, None] * stride_oh + m[:, None] * stride_om
    out_ptrs += offs_dv.to(tl.int64)[None, :] * stride_od
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=valid)
    if HAS_LSE:
        lse_ptrs = lse_ptr + b * stride_lse_b + h * stride_lse_h + m * stride_lse_m
        tl.store(lse_ptrs, (largest + tl.log2(total)) * LN2, mask=row_valid)


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
    """
    batch, num_heads, len_q, head_dim = query.shape
    num_kv_heads, len_kv, head_dim_v = value.shape[1:]
    if out.numel() == 0:
        return
    mask = query if attn_mask is None else attn_mask
    group_size = num_heads // num_kv_heads
    num_rows = batch * num_heads * len_q
    block_d, block_dv = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    # A split is a whole number of key tiles, hence there may be fewer of them than asked for.
    split_size = max(1, triton.cdiv(triton.cdiv(len_kv, config.num_splits), config.block_n))
    split_size *= config.block_n
    num_splits = max(1, triton.cdiv(len_kv, split_size))
    is_split = num_splits > 1
    partial_out = partial_lse = out
    if is_split:
        partial_lse = torch.empty(num_rows * num_splits, dtype=torch.float32, device=out.device)
        partial_out = partial_lse.new_empty(num_rows * num_splits * head_dim_v)
    final_lse = lse if lse is not None else partial_lse
    lse_strides = lse.stride() if lse is not None else (0, 0, 0)
    row_blocks = triton.cdiv(group_size * len_q, config.block_g)

    decode_attention_kernel[(batch * num_kv_heads * row_blocks * num_splits,)](
        query,
        key,
        value,
        mask,
        out,
        final_lse,
        partial_out,
        partial_lse,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *mask.stride(),
        *out.stride(),
        *lse_strides,
        scale,
        num_kv_heads,
        group_size,
        len_q,
        len_kv,
        head_dim,
        head_dim_v,
        num_splits,
        split_size,
        BLOCK_G=config.block_g,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        IS_CAUSAL=is_causal,
        HAS_MASK=attn_mask is not None,
        MASK_IS_BOOL=mask.dtype == torch.bool,
        HAS_LSE=lse is not None,
        IS_SPLIT=is_split,
        EVEN_N=len_kv % config.block_n == 0,
        EVEN_D=head_dim == block_d,
        EVEN_DV=head_dim_v == block_dv,
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if not is_split:
        return
    block_r, block_s = config.combine_rows, triton.next_power_of_2(num_splits)
    combine_splits_kernel[(triton.cdiv(num_rows, block_r),)](
        partial_out,
        partial_lse,
        out,
        final_lse,
        *out.stride(),
        *lse_strides,
        num_rows,
        num_heads,
        len_q,
        head_dim_v,
        num_splits,
        BLOCK_R=block_r,
        BLOCK_S=block_s,
        BLOCK_C=min(block_s, COMBINE_CHUNK),
        BLOCK_DV=block_dv,
        HAS_LSE=lse is not None,
        num_warps=4,
    )
