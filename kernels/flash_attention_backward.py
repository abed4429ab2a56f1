"""Gradients of scaled dot-product attention, by tiles, from the forward's log-sum-exp.

With P = exp(scale * Q K^T + mask - lse), which is what the forward normalised, and dO the gradient
of the output O = P V:

    delta_i = sum_d O_id dO_id        dP = dO V^T        dS_ij = P_ij (dP_ij - delta_i)
    dV = P^T dO                       dQ = scale * dS K                dK = scale * dS^T Q

Three kernels: delta, and the log-sum-exp in units of log2, with +inf, which makes P = 0, for rows
that saw no key; dK and dV, each program one tile of keys, over all queries of all query heads
that share the KV head; dQ, each program one tile of queries, over all keys. Every gradient is
summed by one program in a fixed order: no atomics, bitwise equal from run to run, grouped heads
included.

Layouts, masking and modifiers are those of `flash_attention`; dropout is drawn again from its seed,
and a soft-cap's derivative 1 - tanh^2 multiplies dS. The mask itself gets no gradient.

Reference: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from triton_only_backend.kernels import attention_modifiers
from triton_only_backend.kernels.attention_configs import backward_without_tma
from triton_only_backend.kernels.attention_tiles import (
    LOG2E,
    add_mask,
    band,
    kept_by_dropout,
    load_rows,
    load_tile,
    sequence,
    tanh,
    tile_and_head,
)
from triton_only_backend.kernels.flash_attention import (
    LENGTHS,
    SMALL_TENSORS,
    heads_in_cache,
    padded_head_dim,
    tma_can_load,
    tma_descriptor,
)

if TYPE_CHECKING:
    from triton_only_backend.kernels.attention_configs import BackwardConfig
    from triton_only_backend.kernels.attention_modifiers import Modifiers


@triton.jit(do_not_specialize=["num_rows", "len_q"])
def row_statistics_kernel(
    out_ptr, grad_out_ptr, lse_ptr, delta_ptr, lse2_ptr, stride_ob, stride_oh, stride_om, stride_od,
    stride_gob, stride_goh, stride_gom, stride_god, stride_lse_b, stride_lse_h, stride_lse_m,
    num_rows, num_heads, len_q, head_dim_v, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_dv = tl.arange(0, BLOCK_DV).to(tl.int64)
    row_valid = row < num_rows
    valid = row_valid[:, None] & (offs_dv < head_dim_v)[None, :]
    b = row // (num_heads * len_q)
    h = row // len_q % num_heads
    m = row % len_q
    out_ptrs = out_ptr + (b * stride_ob + h * stride_oh + m * stride_om)[:, None]
    grad_ptrs = grad_out_ptr + (b * stride_gob + h * stride_goh + m * stride_gom)[:, None]
    out = tl.load(out_ptrs + offs_dv[None, :] * stride_od, mask=valid, other=0.0)
    grad_out = tl.load(grad_ptrs + offs_dv[None, :] * stride_god, mask=valid, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=row_valid)
    lse_ptrs = lse_ptr + b * stride_lse_b + h * stride_lse_h + m * stride_lse_m
    lse = tl.load(lse_ptrs, mask=row_valid, other=0.0)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    tl.store(lse2_ptr + row, lse2, mask=row_valid)


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
    cu_seqlens_q_ptr=None, cu_seqlens_k_ptr=None, total_q=None,
):  # fmt: skip
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
):  # fmt: skip
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
        stop = tl.minimum(tl.maximum(start_m + BLOCK_M + right, 0), len_kv)
        full = tl.minimum(tl.maximum(start_m + left, 0), stop) // BLOCK_N * BLOCK_N
    elif IS_CAUSAL:
        full = tl.minimum(start_m + 1, len_kv) // BLOCK_N * BLOCK_N
        stop = tl.minimum(start_m + BLOCK_M, len_kv)
    else:
        full = len_kv // BLOCK_N * BLOCK_N
        stop = len_kv
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


def flash_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    *,
    is_causal: bool,
    scale: float,
    config: BackwardConfig,
    precision: str,
    modifiers: Modifiers = attention_modifiers.NONE,
) -> None:
    """Writes the gradients of `flash_attention` and `decode_attention` for query, key and value.

    Args:
        grad_out: (B, H, L_q, D_v) of query's dtype, any strides.
        query: (B, H, L_q, D), as the forward had it; so are `key`, `value` and `attn_mask`.
        key: (B, H_kv, L_kv, D).
        value: (B, H_kv, L_kv, D_v).
        attn_mask: None or (B, H, L_q, L_kv), bool or floating.
        out: (B, H, L_q, D_v), the forward's output.
        lse: (B, H, L_q) fp32, the forward's log-sum-exp.
        grad_query: (B, H, L_q, D), any strides; written, not added to, as are the other two.
        grad_key: (B, H_kv, L_kv, D), summed over the query heads of each KV head.
        grad_value: (B, H_kv, L_kv, D_v), likewise.
        is_causal: query i sees the keys j <= i only.
        precision: how fp32 products are computed, "ieee" or "tf32".
        modifiers: soft-cap, window, dropout and packed sequences, as the forward had them.
    """
    batch, num_heads, len_q, head_dim = query.shape
    num_kv_heads, len_kv, head_dim_v = value.shape[1:]
    use_tma = config.tma and all(map(tma_can_load, (query, key, value, grad_out)))
    use_tma = use_tma and not modifiers.is_packed
    if config.tma and not use_tma:
        config = backward_without_tma(config)
    mask = query if attn_mask is None else attn_mask
    group_size = num_heads // num_kv_heads if num_kv_heads else 1
    num_rows = batch * num_heads * len_q
    block_d, block_dv = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    row_bytes = (head_dim + head_dim_v) * query.element_size()

    delta = torch.empty(num_rows, dtype=torch.float32, device=query.device)
    lse2 = torch.empty_like(delta)
    if num_rows > 0:
        row_statistics_kernel[(triton.cdiv(num_rows, config.block_delta),)](
            out, grad_out, lse, delta, lse2, *out.stride(), *grad_out.stride(), *lse.stride(),
            num_rows, num_heads, len_q, head_dim_v, BLOCK_M=config.block_delta, BLOCK_DV=block_dv,
            num_warps=4,
        )  # fmt: skip

    total_q = None
    if modifiers.cu_seqlens_q is not None:
        batch, total_q = modifiers.cu_seqlens_q.numel() - 1, len_q
        len_q, len_kv = modifiers.max_q, modifiers.max_k
    input_strides = (
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *mask.stride(),
        *grad_out.stride(),
    )
    sizes = (group_size, len_q, len_kv, head_dim, head_dim_v)
    flags = {
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "IS_CAUSAL": is_causal,
        "HAS_MASK": attn_mask is not None,
        "MASK_IS_BOOL": mask.dtype == torch.bool,
        "EVEN_D": head_dim == block_d,
        "EVEN_DV": head_dim_v == block_dv,
        "USE_TMA": use_tma,
        "PRECISION": precision,
        **modifiers.kernel_arguments(),
        "total_q": total_q,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if grad_key.numel() + grad_value.numel() > 0:
        key_tiles = triton.cdiv(len_kv, config.block_n1)
        key_value_gradient_kernel[(key_tiles * batch * num_kv_heads,)](
            tma_descriptor(query, config.block_m1, block_d) if use_tma else query, key, value, mask,
            tma_descriptor(grad_out, config.block_m1, block_dv) if use_tma else grad_out, lse2,
            delta, grad_key, grad_value, *input_strides, *grad_key.stride(), *grad_value.stride(),
            scale, batch * num_kv_heads, num_kv_heads, *sizes, heads_in_cache(group_size * len_q *
            row_bytes, 1, batch * num_kv_heads), BLOCK_M=config.block_m1, BLOCK_N=config.block_n1,
            EVEN_M=len_q % config.block_m1 == 0 and not modifiers.is_packed, **flags,
        )  # fmt: skip
    if grad_query.numel() > 0:
        query_tiles = triton.cdiv(len_q, config.block_m2)
        query_gradient_kernel[(query_tiles * batch * num_heads,)](
            query, tma_descriptor(key, config.block_n2, block_d) if use_tma else key,
            tma_descriptor(value, config.block_n2, block_dv) if use_tma else value, mask, grad_out,
            lse2, delta, grad_query, *input_strides, *grad_query.stride(), scale, batch * num_heads,
            num_heads, *sizes, heads_in_cache(len_kv * row_bytes, group_size, batch * num_heads),
            BLOCK_M=config.block_m2, BLOCK_N=config.block_n2, EVEN_N=len_kv % config.block_n2 == 0
            and not modifiers.is_packed, **flags,
        )  # fmt: skip
