"""Scaled dot-product attention of many queries: one pass over the keys with an online softmax.

For one head and one tile of BLOCK_M queries, with S = scale * Q K^T + mask:

    m_i = max_j S_ij        l_i = sum_j exp(S_ij - m_i)        O_i = sum_j exp(S_ij - m_i) V_j / l_i

The keys come in tiles of BLOCK_N; whenever a row's running maximum m grows, what l and O have so
far is scaled by exp(m_old - m_new). Exponentials are powers of two: log2(e) is folded into the
scale and into the mask. A row that sees no key has l = 0 and yields 0, with log-sum-exp -inf.

Layouts: query (B, H, L_q, D), key (B, H_kv, L_kv, D), value (B, H_kv, L_kv, D_v) by strides, so
that transposed and expanded tensors need no copy; query head h reads KV head h // (H / H_kv).
Causal masking is aligned to the top left, as in PyTorch: query i sees the keys j <= i.

A window, a soft-cap, dropout and packed sequences are in `attention_modifiers`. Blocks of keys that
causality, the window or a boolean mask's end hide from all of a tile's queries are not read.

Reference: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
arXiv:2307.08691.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from triton_only_backend.kernels import attention_modifiers
from triton_only_backend.kernels.attention_configs import without_tma
from triton_only_backend.kernels.attention_tiles import (
    LN2,
    LOG2E,
    band,
    keys_of_tile,
    load_tile,
    sequence,
    tile_and_head,
    visible_end,
)
from triton_only_backend.kernels.eights import eights_of_heads, in_eights
from triton_only_backend.kernels.mask_spans import broadcast_mask_spans, span_of_tile
from triton_only_backend.kernels.online_softmax import attend_blocks
from triton_only_backend.kernels.sizes import next_power_of_2, padded_head_dim
from triton_only_backend.kernels.tma_layout import tma_can_load, tma_descriptor

if TYPE_CHECKING:
    from triton_only_backend.kernels.attention_configs import FlashConfig
    from triton_only_backend.kernels.attention_modifiers import Modifiers

# Heads whose keys and values together fit this many bytes run at the same time, so that their
# query tiles find them in the L2 cache (40 MB on A100, 50 MB on H100 and H200).
L2_SECTION_BYTES = 16 << 20
# Arguments whose value must not decide what is compiled.
LENGTHS = ("len_q", "len_kv", "section_heads", "window_left", "window_right", "drop_below")
SMALL_TENSORS = ("seed_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr")


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SMALL_TENSORS)
def flash_attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_ob, stride_oh, stride_om,
    stride_od, stride_lse_b, stride_lse_h, stride_lse_m, scale, batch_heads, num_heads, group_size,
    len_q, len_kv, head_dim, head_dim_v, section_heads, BLOCK_M: tl.constexpr, BLOCK_N:
    tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK:
    tl.constexpr, MASK_IS_BOOL: tl.constexpr, HAS_LSE: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D:
    tl.constexpr, EVEN_DV: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    window_left=None, window_right=None, softcap=None, seed_ptr=None, drop_below=None,
    keep_scale=None, cu_seqlens_q_ptr=None, cu_seqlens_k_ptr=None,
    spans_ptr=None, spans_strides=None, SPAN_CHUNKS: tl.constexpr = 1, EIGHTS: tl.constexpr = 0,
):  # fmt: skip
    head_dim, head_dim_v = in_eights((head_dim, head_dim_v), EIGHTS)
    stride_qb, stride_qh, stride_qm = in_eights((stride_qb, stride_qh, stride_qm), EIGHTS >> 2)
    stride_kb, stride_kh, stride_kn = in_eights((stride_kb, stride_kh, stride_kn), EIGHTS >> 6)
    stride_vb, stride_vh, stride_vn = in_eights((stride_vb, stride_vh, stride_vn), EIGHTS >> 10)
    stride_ob, stride_oh, stride_om = in_eights((stride_ob, stride_oh, stride_om), EIGHTS >> 14)
    num_tiles = tl.cdiv(len_q, BLOCK_M)
    tile, batch_head = tile_and_head(tl.program_id(0), num_tiles, batch_heads, section_heads)
    start_m = (num_tiles - 1 - tile) * BLOCK_M
    b = (batch_head // num_heads).to(tl.int64)
    h = (batch_head % num_heads).to(tl.int64)
    kv_head = h // group_size
    if cu_seqlens_q_ptr is not None:
        first_q, len_q = sequence(cu_seqlens_q_ptr, b)
        first_k, len_kv = sequence(cu_seqlens_k_ptr, b)
        b *= 0
        q_ptr += first_q * stride_qm
        k_ptr += first_k * stride_kn
        v_ptr += first_k * stride_vn
        out_ptr += first_q * stride_om
        lse_ptr += first_q * stride_lse_m

    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows = offs_m.to(tl.int64)
    lanes = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_valid = offs_m < len_q
    d_valid = offs_d < head_dim
    dv_valid = offs_dv < head_dim_v

    q_ptrs = q_ptr + b * stride_qb + h * stride_qh
    q_ptrs = q_ptrs + rows[:, None] * stride_qm + offs_d.to(tl.int64)[None, :] * stride_qd
    if USE_TMA:
        k_source = k_ptr
        v_source = v_ptr
    else:
        k_source = k_ptr + b * stride_kb + kv_head * stride_kh
        k_source += lanes[:, None] * stride_kn + offs_d.to(tl.int64)[None, :] * stride_kd
        v_source = v_ptr + b * stride_vb + kv_head * stride_vh
        v_source += lanes[:, None] * stride_vn + offs_dv.to(tl.int64)[None, :] * stride_vd
    mask_rows = mask_ptr + b * stride_mask_b + h * stride_mask_h + rows * stride_mask_m
    k_step = tl.full((), BLOCK_N, tl.int64) * stride_kn
    v_step = tl.full((), BLOCK_N, tl.int64) * stride_vn

    qk_scale = tl.full((), scale, tl.float32) * LOG2E
    q = load_tile(q_ptrs, row_valid, d_valid, False, EVEN_D)
    q = tl.where(qk_scale < 0, -q, q)
    qk_scale = tl.abs(qk_scale)
    if softcap is not None:
        softcap = tl.full((), softcap, tl.float32)
        qk_scale = qk_scale / (softcap * LOG2E)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    left = None
    right = None
    if window_left is not None:
        left, right = band(window_left, window_right, len_q, len_kv, IS_CAUSAL)
    full, stop = keys_of_tile(start_m, len_kv, left, right, BLOCK_M, BLOCK_N, IS_CAUSAL)
    # Keys before `full` need no mask where its spans are known.
    MASK_FULL: tl.constexpr = HAS_MASK and spans_ptr is None
    if spans_ptr is not None:
        first_hidden, stop = span_of_tile(
            spans_ptr, spans_strides, b, h, start_m, len_q, stop, BLOCK_M, SPAN_CHUNKS
        )
        full = tl.minimum(full, tl.minimum(first_hidden, stop) // BLOCK_N * BLOCK_N)
    elif HAS_MASK and MASK_IS_BOOL:
        stop = visible_end(mask_rows, row_valid, stride_mask_n, stop)
        full = tl.minimum(full, tl.cdiv(stop, BLOCK_N) * BLOCK_N)
    if cu_seqlens_q_ptr is not None:
        stop = tl.where(start_m < len_q, stop, 0)
        full = tl.minimum(full, stop // BLOCK_N * BLOCK_N)
    if window_left is None:
        acc, row_max, row_sum = attend_blocks(
            acc, row_max, row_sum, q, k_source, v_source, b.to(tl.int32), kv_head.to(tl.int32),
            mask_rows, stride_mask_n, offs_m, row_valid, 0, full, len_kv, k_step, v_step, qk_scale,
            d_valid, dv_valid, BLOCK_N, False, IS_CAUSAL, MASK_FULL, MASK_IS_BOOL, EVEN_N, EVEN_D,
            EVEN_DV, USE_TMA, PRECISION, left, right, softcap, seed, drop_below, batch_head,
        )  # fmt: skip
    if IS_CAUSAL or not EVEN_N or window_left is not None or spans_ptr is not None:
        if not USE_TMA:
            k_source += full.to(tl.int64) * stride_kn
            v_source += full.to(tl.int64) * stride_vn
        acc, row_max, row_sum = attend_blocks(
            acc, row_max, row_sum, q, k_source, v_source, b.to(tl.int32), kv_head.to(tl.int32),
            mask_rows, stride_mask_n, offs_m, row_valid, full, stop, len_kv, k_step, v_step,
            qk_scale, d_valid, dv_valid, BLOCK_N, True, IS_CAUSAL, HAS_MASK, MASK_IS_BOOL, EVEN_N,
            EVEN_D, EVEN_DV, USE_TMA, PRECISION, left, right, softcap, seed, drop_below, batch_head,
        )  # fmt: skip

    row_sum = tl.where(row_sum == 0, 1.0, row_sum)
    out = acc / row_sum[:, None]
    if keep_scale is not None:
        out *= tl.full((), keep_scale, tl.float32)
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh
    out_ptrs = out_ptrs + rows[:, None] * stride_om + offs_dv.to(tl.int64)[None, :] * stride_od
    out_valid = row_valid[:, None] & dv_valid[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=out_valid)
    if HAS_LSE:
        lse_ptrs = lse_ptr + b * stride_lse_b + h * stride_lse_h + rows * stride_lse_m
        tl.store(lse_ptrs, (row_max + tl.log2(row_sum)) * LN2, mask=row_valid)


def heads_in_cache(bytes_of_group: int, group_size: int, num_heads: int) -> int:
    """How many of `num_heads` heads run at the same time: groups whose tensors share the cache."""
    return min(num_heads, max(1, L2_SECTION_BYTES // max(1, bytes_of_group)) * group_size)


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    config: FlashConfig,
    precision: str,
    modifiers: Modifiers = attention_modifiers.NONE,
    spans: torch.Tensor | None = None,
) -> None:
    """Writes softmax(scale * query @ key^T + attn_mask) @ value to `out`, and its log-sum-exp.

    Args:
        query: (B, H, L_q, D) fp16, bf16 or fp32, any strides.
        key: (B, H_kv, L_kv, D) of query's dtype, any strides; H_kv divides H.
        value: (B, H_kv, L_kv, D_v) of query's dtype, any strides.
        attn_mask: None or a (B, H, L_q, L_kv) view (stride 0 where it is broadcast): bool, True
            where a query attends, or a floating dtype, added to the scaled scores.
        out: (B, H, L_q, D_v) of query's dtype, any strides.
        lse: None or (B, H, L_q) fp32: the natural logarithm of each row's sum of exponentials.
        is_causal: query i sees the keys j <= i only.
        precision: how fp32 products are computed, "ieee" or "tf32".
        modifiers: soft-cap, window, dropout and packed sequences, where there are any.
        spans: (B, H, tiles, chunks, 2) int32, `mask_spans` of a boolean mask (stride 0 where it is
            broadcast), where they are known already.
    """
    batch, num_heads, len_q, head_dim = query.shape
    num_kv_heads, len_kv, head_dim_v = value.shape[1:]
    if out.numel() == 0:
        return
    use_tma = config.tma and tma_can_load(key) and tma_can_load(value)
    if modifiers.cu_seqlens_q is not None:
        # A descriptor's tile would reach into the next sequence, whose NaN times 0 is NaN.
        use_tma = False
        batch = modifiers.cu_seqlens_q.numel() - 1
        len_q, len_kv = modifiers.max_q, modifiers.max_k
    mask = query if attn_mask is None else attn_mask
    group_size = num_heads // num_kv_heads
    block_d, block_dv = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    if config.tma and not use_tma:
        config = without_tma(config, max(block_d, block_dv))
    kv_bytes = len_kv * (head_dim + head_dim_v) * key.element_size()
    section_heads = heads_in_cache(kv_bytes, group_size, batch * num_heads)
    if mask.dtype != torch.bool or modifiers.is_packed or modifiers.has_window:
        spans = None
    elif spans is None:
        spans = broadcast_mask_spans(mask)
    grid = (triton.cdiv(len_q, config.block_m) * batch * num_heads,)
    flash_attention_kernel[grid](
        query, tma_descriptor(key, config.block_n, block_d) if use_tma else key,
        tma_descriptor(value, config.block_n, block_dv) if use_tma else value, mask, out, lse if lse
        is not None else out, *query.stride(), *key.stride(), *value.stride(), *mask.stride(),
        *out.stride(), *(lse.stride() if lse is not None else (0, 0, 0)), scale, batch * num_heads,
        num_heads, group_size, len_q, len_kv, head_dim, head_dim_v, section_heads,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
        IS_CAUSAL=is_causal, HAS_MASK=attn_mask is not None, MASK_IS_BOOL=mask.dtype == torch.bool,
        HAS_LSE=lse is not None, EVEN_N=len_kv % config.block_n == 0 and not modifiers.is_packed,
        EVEN_D=head_dim == block_d, EVEN_DV=head_dim_v == block_dv, USE_TMA=use_tma,
        PRECISION=precision, **modifiers.kernel_arguments(), spans_ptr=spans,
        spans_strides=None if spans is None else spans.stride()[:4],
        SPAN_CHUNKS=1 if spans is None else next_power_of_2(spans.shape[3]),
        EIGHTS=eights_of_heads((head_dim, head_dim_v), query, key, value, out),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
