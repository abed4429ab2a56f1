"""Gradients of attention for queries: a program holds one tile of queries, and goes over all keys.

The mathematics are in `flash_attention_backward`; the order of the keys is the forward's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_only_backend.kernels.attention_tiles import (
    LOG2E,
    add_mask,
    band,
    kept_by_dropout,
    keys_of_tile,
    load_rows,
    load_tile,
    sequence,
    tanh,
    tile_and_head,
)
from triton_only_backend.kernels.eights import in_eights
from triton_only_backend.kernels.flash_attention import LENGTHS, SMALL_TENSORS


@triton.jit
def accumulate_query_gradients(
    dq, q, grad_out, lse2, delta, k_source, v_source, b, kv_head, mask_rows, stride_mask_n, k_step,
    v_step, offs_m, m_valid, start, stop, len_kv, qk_scale, d_valid, dv_valid, BLOCK_N:
    tl.constexpr, CHECK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr, left=None, right=None, softcap=None, seed=None,
    drop_below=None, keep_scale=None, batch_head=None,
):  # fmt: skip
    """Adds what the keys of [start, stop) give to dq; CHECK as in `attend_blocks`."""
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_DV: tl.constexpr = grad_out.shape[1]
    for start_n in tl.range(start, stop, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        n_valid = offs_n < len_kv
        k = load_rows(
            k_source, b, kv_head, start_n, n_valid, d_valid, BLOCK_N, BLOCK_D, USE_TMA, EVEN_N or
            not CHECK, EVEN_D,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
        if softcap is not None:
            capped = tanh(scores)
            scores = capped * (softcap * LOG2E)
        if HAS_MASK:
            mask_ptrs = mask_rows[:, None] + offs_n.to(tl.int64)[None, :] * stride_mask_n
            mask_valid = m_valid[:, None] & n_valid[None, :]
            scores = add_mask(scores, mask_ptrs, mask_valid, MASK_IS_BOOL)
        p = tl.exp2(scores - lse2[:, None])
        if CHECK and left is not None:
            distance = offs_n[None, :] - offs_m[:, None]
            p = tl.where((distance < left) | (distance > right), 0.0, p)
        elif CHECK and IS_CAUSAL:
            p = tl.where(offs_n[None, :] > offs_m[:, None], 0.0, p)
        if CHECK and not EVEN_N:
            p = tl.where(n_valid[None, :], p, 0.0)
        v = load_rows(
            v_source, b, kv_head, start_n, n_valid, dv_valid, BLOCK_N, BLOCK_DV, USE_TMA, EVEN_N or
            not CHECK, EVEN_DV,
        )  # fmt: skip
        dp = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        if seed is not None:
            kept = kept_by_dropout(seed, batch_head, offs_m, start_n, drop_below, BLOCK_N, False)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if softcap is not None:
            ds *= 1.0 - capped * capped
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        if not USE_TMA:
            k_source += k_step
            v_source += v_step
    return dq


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SMALL_TENSORS)
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, grad_out_ptr, lse2_ptr, delta_ptr, dq_ptr, stride_qb, stride_qh,
    stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh,
    stride_vn, stride_vd, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_gob,
    stride_goh, stride_gom, stride_god, stride_dqb, stride_dqh, stride_dqm, stride_dqd, scale,
    batch_heads, num_heads, group_size, len_q, len_kv, head_dim, head_dim_v, section_heads, BLOCK_M:
    tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, IS_CAUSAL:
    tl.constexpr, HAS_MASK: tl.constexpr, MASK_IS_BOOL: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D:
    tl.constexpr, EVEN_DV: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    window_left=None, window_right=None, softcap=None, seed_ptr=None, drop_below=None,
    keep_scale=None, cu_seqlens_q_ptr=None, cu_seqlens_k_ptr=None, total_q=None,
    EIGHTS: tl.constexpr = 0,
):  # fmt: skip
    head_dim, head_dim_v = in_eights((head_dim, head_dim_v), EIGHTS)
    stride_qb, stride_qh, stride_qm = in_eights((stride_qb, stride_qh, stride_qm), EIGHTS >> 2)
    stride_kb, stride_kh, stride_kn = in_eights((stride_kb, stride_kh, stride_kn), EIGHTS >> 6)
    stride_vb, stride_vh, stride_vn = in_eights((stride_vb, stride_vh, stride_vn), EIGHTS >> 10)
    stride_gob, stride_goh, stride_gom = in_eights(
        (stride_gob, stride_goh, stride_gom), EIGHTS >> 14
    )
    stride_dqb, stride_dqh, stride_dqm = in_eights(
        (stride_dqb, stride_dqh, stride_dqm), EIGHTS >> 18
    )
    num_tiles = tl.cdiv(len_q, BLOCK_M)
    tile, batch_head = tile_and_head(tl.program_id(0), num_tiles, batch_heads, section_heads)
    start_m = (num_tiles - 1 - tile) * BLOCK_M
    b = (batch_head // num_heads).to(tl.int64)
    h = (batch_head % num_heads).to(tl.int64)
    kv_head = h // group_size
    head_rows = len_q
    if cu_seqlens_q_ptr is not None:
        first_q, len_q = sequence(cu_seqlens_q_ptr, b)
        first_k, len_kv = sequence(cu_seqlens_k_ptr, b)
        b *= 0
        head_rows = total_q
        lse2_ptr += first_q
        delta_ptr += first_q
        q_ptr += first_q * stride_qm
        grad_out_ptr += first_q * stride_gom
        dq_ptr += first_q * stride_dqm
        k_ptr += first_k * stride_kn
        v_ptr += first_k * stride_vn

    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows = offs_m.to(tl.int64)
    queries = rows[:, None]
    keys = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    m_valid = offs_m < len_q
    d_valid = offs_d < head_dim
    dv_valid = offs_dv < head_dim_v
    d = offs_d.to(tl.int64)[None, :]
    d_v = offs_dv.to(tl.int64)[None, :]

    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + queries * stride_qm + d * stride_qd
    grad_out_ptrs = grad_out_ptr + b * stride_gob + h * stride_goh
    grad_out_ptrs += queries * stride_gom + d_v * stride_god
    if USE_TMA:
        k_source = k_ptr
        v_source = v_ptr
    else:
        k_source = k_ptr + b * stride_kb + kv_head * stride_kh + keys * stride_kn + d * stride_kd
        v_source = v_ptr + b * stride_vb + kv_head * stride_vh + keys * stride_vn + d_v * stride_vd
    mask_rows = mask_ptr + b * stride_mask_b + h * stride_mask_h + rows * stride_mask_m
    k_step = tl.full((), BLOCK_N, tl.int64) * stride_kn
    v_step = tl.full((), BLOCK_N, tl.int64) * stride_vn
    qk_scale = tl.full((), scale, tl.float32) * LOG2E
    if softcap is not None:
        softcap = tl.full((), softcap, tl.float32)
        qk_scale = qk_scale / (softcap * LOG2E)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        keep_scale = tl.full((), keep_scale, tl.float32)

    q = load_tile(q_ptrs, m_valid, d_valid, False, EVEN_D)
    grad_out = load_tile(grad_out_ptrs, m_valid, dv_valid, False, EVEN_DV)
    statistics = (b * num_heads + h) * head_rows + rows
    lse2 = tl.load(lse2_ptr + statistics, mask=m_valid, other=float("inf"))
    delta = tl.load(delta_ptr + statistics, mask=m_valid, other=0.0)

    left = None
    right = None
    if window_left is not None:
        left, right = band(window_left, window_right, len_q, len_kv, IS_CAUSAL)
    full, stop = keys_of_tile(start_m, len_kv, left, right, BLOCK_M, BLOCK_N, IS_CAUSAL)
    if cu_seqlens_q_ptr is not None:
        stop = tl.where(start_m < len_q, stop, 0)
        full = tl.minimum(full, stop // BLOCK_N * BLOCK_N)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if window_left is None:
        dq = accumulate_query_gradients(
            dq, q, grad_out, lse2, delta, k_source, v_source, b.to(tl.int32), kv_head.to(tl.int32),
            mask_rows, stride_mask_n, k_step, v_step, offs_m, m_valid, 0, full, len_kv, qk_scale,
            d_valid, dv_valid, BLOCK_N, False, IS_CAUSAL, HAS_MASK, MASK_IS_BOOL, EVEN_N, EVEN_D,
            EVEN_DV, USE_TMA, PRECISION, left, right, softcap, seed, drop_below, keep_scale,
            batch_head,
        )  # fmt: skip
    if IS_CAUSAL or not EVEN_N or window_left is not None:
        if not USE_TMA:
            k_source += full.to(tl.int64) * stride_kn
            v_source += full.to(tl.int64) * stride_vn
        dq = accumulate_query_gradients(
            dq, q, grad_out, lse2, delta, k_source, v_source, b.to(tl.int32), kv_head.to(tl.int32),
            mask_rows, stride_mask_n, k_step, v_step, offs_m, m_valid, full, stop, len_kv, qk_scale,
            d_valid, dv_valid, BLOCK_N, True, IS_CAUSAL, HAS_MASK, MASK_IS_BOOL, EVEN_N, EVEN_D,
            EVEN_DV, USE_TMA, PRECISION, left, right, softcap, seed, drop_below, keep_scale,
            batch_head,
        )  # fmt: skip

    dq *= tl.full((), scale, tl.float32)
    dq_ptrs = dq_ptr + b * stride_dqb + h * stride_dqh + queries * stride_dqm + d * stride_dqd
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=m_valid[:, None] & d_valid[None, :])
