"""Gradients of attention for keys and values: a program holds one tile of keys.

It goes over all queries of all query heads that share the KV head, so that each gradient is summed
by one program, in a fixed order. The mathematics are in `flash_attention_backward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_only_backend.kernels.attention_tiles import (
    LOG2E,
    add_mask,
    band,
    kept_by_dropout,
    load_tile,
    sequence,
    tanh,
    tile_and_head,
)
from triton_only_backend.kernels.eights import in_eights
from triton_only_backend.kernels.flash_attention import LENGTHS, SMALL_TENSORS


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SMALL_TENSORS)
def key_value_gradient_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, grad_out_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, stride_qb,
    stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_vb,
    stride_vh, stride_vn, stride_vd, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_gob, stride_goh, stride_gom, stride_god, stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd, scale, batch_kv_heads, num_kv_heads, group_size,
    len_q, len_kv, head_dim, head_dim_v, section_heads, BLOCK_M: tl.constexpr, BLOCK_N:
    tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK:
    tl.constexpr, MASK_IS_BOOL: tl.constexpr, EVEN_M: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV:
    tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr, window_left=None,
    window_right=None, softcap=None, seed_ptr=None, drop_below=None, keep_scale=None,
    cu_seqlens_q_ptr=None, cu_seqlens_k_ptr=None, total_q=None, EIGHTS: tl.constexpr = 0,
):  # fmt: skip
    head_dim, head_dim_v = in_eights((head_dim, head_dim_v), EIGHTS)
    stride_qb, stride_qh, stride_qm = in_eights((stride_qb, stride_qh, stride_qm), EIGHTS >> 2)
    stride_kb, stride_kh, stride_kn = in_eights((stride_kb, stride_kh, stride_kn), EIGHTS >> 6)
    stride_vb, stride_vh, stride_vn = in_eights((stride_vb, stride_vh, stride_vn), EIGHTS >> 10)
    stride_gob, stride_goh, stride_gom = in_eights(
        (stride_gob, stride_goh, stride_gom), EIGHTS >> 14
    )
    stride_dkb, stride_dkh, stride_dkn = in_eights(
        (stride_dkb, stride_dkh, stride_dkn), EIGHTS >> 18
    )
    stride_dvb, stride_dvh, stride_dvn = in_eights(
        (stride_dvb, stride_dvh, stride_dvn), EIGHTS >> 22
    )
    # Under a causal mask the first keys are seen by most queries; their tiles go first.
    tile, batch_head = tile_and_head(
        tl.program_id(0), tl.cdiv(len_kv, BLOCK_N), batch_kv_heads, section_heads
    )
    start_n = tile * BLOCK_N
    b = (batch_head // num_kv_heads).to(tl.int64)
    kv_head = (batch_head % num_kv_heads).to(tl.int64)
    sequence_heads = b * num_kv_heads * group_size
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
        k_ptr += first_k * stride_kn
        v_ptr += first_k * stride_vn
        dk_ptr += first_k * stride_dkn
        dv_ptr += first_k * stride_dvn

    offs_n = start_n + tl.arange(0, BLOCK_N)
    keys = offs_n.to(tl.int64)[:, None]
    queries = tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    n_valid = offs_n < len_kv
    d_valid = offs_d < head_dim
    dv_valid = offs_dv < head_dim_v
    d = offs_d.to(tl.int64)[None, :]
    d_v = offs_dv.to(tl.int64)[None, :]

    k_ptrs = k_ptr + b * stride_kb + kv_head * stride_kh + keys * stride_kn + d * stride_kd
    v_ptrs = v_ptr + b * stride_vb + kv_head * stride_vh + keys * stride_vn + d_v * stride_vd
    k = load_tile(k_ptrs, n_valid, d_valid, False, EVEN_D)
    v = load_tile(v_ptrs, n_valid, dv_valid, False, EVEN_DV)
    q_tile = q_ptr
    grad_out_tile = grad_out_ptr
    if not USE_TMA:
        q_tile += b * stride_qb + queries * stride_qm + d * stride_qd
        grad_out_tile += b * stride_gob + queries * stride_gom + d_v * stride_god
    lse2_ptr += b * num_kv_heads * group_size * head_rows
    delta_ptr += b * num_kv_heads * group_size * head_rows
    mask_columns = mask_ptr + b * stride_mask_b + offs_n.to(tl.int64) * stride_mask_n
    qk_scale = tl.full((), scale, tl.float32) * LOG2E
    if softcap is not None:
        softcap = tl.full((), softcap, tl.float32)
        qk_scale = qk_scale / (softcap * LOG2E)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        keep_scale = tl.full((), keep_scale, tl.float32)

    # One loop over the queries of all heads of the group. Tiles are keys by queries; keys beyond
    # the last one need no mask, as their rows of dk and dv are not stored. A loop of its own for
    # the tiles off the diagonal spilled 72 bytes (head dimension 128, sm90, triton 3.7.1).
    end = len_q
    if window_left is not None:
        left, right = band(window_left, window_right, len_q, len_kv, IS_CAUSAL)
        first = tl.maximum(start_n - right, 0) // BLOCK_M * BLOCK_M
        end = tl.minimum(start_n + BLOCK_N - left, len_q)
    else:
        first = start_n // BLOCK_M * BLOCK_M if IS_CAUSAL else start_n * 0
    if cu_seqlens_q_ptr is not None:
        end = tl.where(start_n < len_kv, end, 0)
    steps = tl.cdiv(tl.maximum(end - first, 0), BLOCK_M)
    start_m = first
    h = kv_head * group_size
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for _ in tl.range(0, group_size * steps):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        rows = offs_m.to(tl.int64)
        m_valid = offs_m < len_q
        if USE_TMA:
            index = [b.to(tl.int32), h.to(tl.int32), start_m, 0]
            q = q_tile.load(index).reshape(BLOCK_M, BLOCK_D)
            grad_out = grad_out_tile.load(index).reshape(BLOCK_M, BLOCK_DV)
        else:
            m = start_m.to(tl.int64)
            q_ptrs = q_tile + (h * stride_qh + m * stride_qm)
            q = load_tile(q_ptrs, m_valid, d_valid, EVEN_M, EVEN_D)
            grad_out_ptrs = grad_out_tile + (h * stride_goh + m * stride_gom)
            grad_out = load_tile(grad_out_ptrs, m_valid, dv_valid, EVEN_M, EVEN_DV)
        lse2 = tl.load(lse2_ptr + h * head_rows + rows, mask=m_valid, other=float("inf"))
        delta = tl.load(delta_ptr + h * head_rows + rows, mask=m_valid, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale
        if softcap is not None:
            capped = tanh(scores)
            scores = capped * (softcap * LOG2E)
        if HAS_MASK:
            mask_ptrs = (mask_columns + h * stride_mask_h)[:, None]
            mask_ptrs = mask_ptrs + rows[None, :] * stride_mask_m
            mask_valid = n_valid[:, None] & m_valid[None, :]
            scores = add_mask(scores, mask_ptrs, mask_valid, MASK_IS_BOOL)
        p = tl.exp2(scores - lse2[None, :])
        if window_left is not None:
            distance = offs_n[:, None] - offs_m[None, :]
            p = tl.where((distance < left) | (distance > right), 0.0, p)
        elif IS_CAUSAL:
            p = tl.where(offs_n[:, None] > offs_m[None, :], 0.0, p)
        weights = p
        if seed is not None:
            kept = kept_by_dropout(
                seed, sequence_heads + h, offs_m, start_n, drop_below, BLOCK_N, True
            )
            weights = tl.where(kept, p * keep_scale, 0.0)
        dv = tl.dot(weights.to(grad_out.dtype), grad_out, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        if seed is not None:
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[None, :])
        if softcap is not None:
            ds *= 1.0 - capped * capped
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        start_m += BLOCK_M
        is_last = start_m >= end
        start_m = tl.where(is_last, first, start_m)
        h += is_last.to(tl.int64)

    dk *= tl.full((), scale, tl.float32)
    dk_ptrs = dk_ptr + b * stride_dkb + kv_head * stride_dkh + keys * stride_dkn + d * stride_dkd
    dv_ptrs = dv_ptr + b * stride_dvb + kv_head * stride_dvh + keys * stride_dvn
    dv_ptrs += d_v * stride_dvd
    dk_valid = n_valid[:, None] & d_valid[None, :]
    tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=dk_valid)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=n_valid[:, None] & dv_valid[None, :])
