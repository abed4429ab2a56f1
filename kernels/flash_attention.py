"""Scaled dot-product attention of many queries: one pass over the keys with an online softmax.

For one head and one tile of BLOCK_M queries, with S = scale * Q K^T + mask:

    m_i = max_j S_ij        l_i = sum_j exp(S_ij - m_i)        O_i = sum_j exp(S_ij - m_i) V_j / l_i

The keys come in tiles of BLOCK_N; whenever a row's running maximum m grows, what l and O have so
far is scaled by exp(m_old - m_new). Exponentials are powers of two: log2(e) is folded into the
scale and into the mask. A row that sees no key has l = 0 and yields 0, with log-sum-exp -inf.

Layouts: query (B, H, L_q, D), key (B, H_kv, L_kv, D), value (B, H_kv, L_kv, D_v) by strides, so
that transposed and expanded tensors need no copy; query head h reads KV head h // (H / H_kv).
Causal masking is aligned to the top left, as in PyTorch: query i sees the keys j <= i.

Reference: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
arXiv:2307.08691.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_only_backend.kernels.attention_configs import next_power_of_2, without_tma

if TYPE_CHECKING:
    from triton_only_backend.kernels.attention_configs import FlashConfig

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Heads whose keys and values together fit this many bytes run at the same time, so that their
# query tiles find them in the L2 cache (40 MB on A100, 50 MB on H100 and H200).
L2_SECTION_BYTES = 16 << 20


@triton.jit
def load_tile(ptrs, rows_valid, columns_valid, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A two-dimensional tile, zero outside; no predicate along a dimension that is even."""
    if EVEN_ROWS and EVEN_COLUMNS:
        tile = tl.load(ptrs)
    elif EVEN_ROWS:
        tile = tl.load(ptrs, mask=columns_valid[None, :], other=0.0)
    elif EVEN_COLUMNS:
        tile = tl.load(ptrs, mask=rows_valid[:, None], other=0.0)
    else:
        tile = tl.load(ptrs, mask=rows_valid[:, None] & columns_valid[None, :], other=0.0)
    return tile


@triton.jit
def load_rows(
    source,
    b,
    h,
    start,
    rows_valid,
    columns_valid,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
):
    """A tile of rows from `start`: `source` is a (B, H, L, D) descriptor or the tile's pointers."""
    if USE_TMA:
        tile = source.load([b, h, start, 0]).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        tile = load_tile(source, rows_valid, columns_valid, EVEN_ROWS, EVEN_COLUMNS)
    return tile


@triton.jit
def tile_and_head(pid, num_tiles, heads, section_heads):
    """The order of programs: tile by tile through a section of heads, section after section.

    The heads of a section share the L2 cache; the caller puts the tiles with most work first.
    """
    section = pid // (num_tiles * section_heads)
    first_head = section * section_heads
    heads_here = tl.minimum(heads - first_head, section_heads)
    within = pid - first_head * num_tiles
    return within // heads_here, first_head + within % heads_here


@triton.jit
def add_mask(scores, mask_ptrs, valid, MASK_IS_BOOL: tl.constexpr):
    """Adds a tile of the attention mask to scores that are in units of log2."""
    if MASK_IS_BOOL:
        scores += tl.where(tl.load(mask_ptrs, mask=valid, other=0) != 0, 0.0, float("-inf"))
    else:
        scores += tl.load(mask_ptrs, mask=valid, other=0.0).to(tl.float32) * LOG2E
    return scores


@triton.jit
def visible_end(mask_rows, row_valid, stride_mask_n, stop):
    """One past the last key below `stop` that a boolean mask lets any of these rows see.

    The keys after it are not read: a causal mask, or a static cache that is not full yet, costs by
    what is visible. Reading a byte of the mask a score is little beside computing the score.
    """
    SCAN: tl.constexpr = 128
    end = tl.zeros((), tl.int32)
    for start_n in tl.range(0, stop, SCAN):
        offs_n = start_n + tl.arange(0, SCAN)
        mask_ptrs = mask_rows[:, None] + offs_n.to(tl.int64)[None, :] * stride_mask_n
        valid = row_valid[:, None] & (offs_n < stop)[None, :]
        seen = tl.max(tl.load(mask_ptrs, mask=valid, other=0).to(tl.int32), 0)
        end = tl.maximum(end, tl.max(tl.where(seen != 0, offs_n + 1, 0), 0))
    return end


@triton.jit
def attend_blocks(
    acc,
    row_max,
    row_sum,
    q,
    k_source,
    v_source,
    b,
    kv_head,
    mask_rows,
    stride_mask_n,
    row_position,
    row_valid,
    start,
    stop,
    len_kv,
    k_step,
    v_step,
    qk_scale,
    d_valid,
    dv_valid,
    BLOCK_N: tl.constexpr,
    CHECK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Folds the keys of [start, stop) into acc, row_max and row_sum.

    `k_source` and `v_source` are tensor descriptors (USE_TMA) or the pointers of the tile at start.
    CHECK says that some of these keys may be hidden by causality or lie beyond the last one.
    """
    lanes = tl.arange(0, BLOCK_N)
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_DV: tl.constexpr = acc.shape[1]
    for start_n in tl.range(start, stop, BLOCK_N):
        offs_n = start_n + lanes
        n_valid = offs_n < len_kv
        k = load_rows(
            k_source,
            b,
            kv_head,
            start_n,
            n_valid,
            d_valid,
            BLOCK_N,
            BLOCK_D,
            USE_TMA,
            EVEN_N or not CHECK,
            EVEN_D,
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CHECK or HAS_MASK:
            scores *= qk_scale
            if HAS_MASK:
                mask_ptrs = mask_rows[:, None] + offs_n.to(tl.int64)[None, :] * stride_mask_n
                mask_valid = row_valid[:, None] & n_valid[None, :]
                scores = add_mask(scores, mask_ptrs, mask_valid, MASK_IS_BOOL)
            if CHECK and IS_CAUSAL:
                hidden = offs_n[None, :] > row_position[:, None]
                scores = tl.where(hidden, float("-inf"), scores)
            if CHECK and not EVEN_N:
                scores = tl.where(n_valid[None, :], scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(scores - shift[:, None])
        else:
            # One fused multiply-add per score, which is why qk_scale is made non-negative.
            new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale)
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(scores * qk_scale - shift[:, None])
        alpha = tl.exp2(row_max - shift)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max
        acc *= alpha[:, None]
        v = load_rows(
            v_source,
            b,
            kv_head,
            start_n,
            n_valid,
            dv_valid,
            BLOCK_N,
            BLOCK_DV,
            USE_TMA,
            EVEN_N or not CHECK,
            EVEN_DV,
        )
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        if not USE_TMA:
            k_source += k_step
            v_source += v_step
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["len_q", "len_kv", "section_heads"])
def flash_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
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
    batch_heads,
    num_heads,
    group_size,
    len_q,
    len_kv,
    head_dim,
    head_dim_v,
    section_heads,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr,
    HAS_LSE: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_tiles = tl.cdiv(len_q, BLOCK_M)
    tile, batch_head = tile_and_head(tl.program_id(0), num_tiles, batch_heads, section_heads)
    start_m = (num_tiles - 1 - tile) * BLOCK_M
    b = (batch_head // num_heads).to(tl.int64)
    h = (batch_head % num_heads).to(tl.int64)
    kv_head = h // group_size

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

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    if IS_CAUSAL:
        full = tl.minimum(start_m + 1, len_kv) // BLOCK_N * BLOCK_N
        stop = tl.minimum(start_m + BLOCK_M, len_kv)
    else:
        full = len_kv // BLOCK_N * BLOCK_N
        stop = len_kv
    if HAS_MASK and MASK_IS_BOOL:
        stop = visible_end(mask_rows, row_valid, stride_mask_n, stop)
        full = tl.minimum(full, tl.cdiv(stop, BLOCK_N) * BLOCK_N)
    acc, row_max, row_sum = attend_blocks(
        acc,
        row_max,
        row_sum,
        q,
        k_source,
        v_source,
        b.to(tl.int32),
        kv_head.to(tl.int32),
        mask_rows,
        stride_mask_n,
        offs_m,
        row_valid,
        0,
        full,
        len_kv,
        k_step,
        v_step,
        qk_scale,
        d_valid,
        dv_valid,
        BLOCK_N,
        False,
        IS_CAUSAL,
        HAS_MASK,
        MASK_IS_BOOL,
        EVEN_N,
        EVEN_D,
        EVEN_DV,
        USE_TMA,
        PRECISION,
    )
    if IS_CAUSAL or not EVEN_N:
        if not USE_TMA:
            k_source += full.to(tl.int64) * stride_kn
            v_source += full.to(tl.int64) * stride_vn
        acc, row_max, row_sum = attend_blocks(
            acc,
            row_max,
            row_sum,
            q,
            k_source,
            v_source,
            b.to(tl.int32),
            kv_head.to(tl.int32),
            mask_rows,
            stride_mask_n,
            offs_m,
            row_valid,
            full,
            stop,
            len_kv,
            k_step,
            v_step,
            qk_scale,
            d_valid,
            dv_valid,
            BLOCK_N,
            True,
            IS_CAUSAL,
            HAS_MASK,
            MASK_IS_BOOL,
            EVEN_N,
            EVEN_D,
            EVEN_DV,
            USE_TMA,
            PRECISION,
        )

    row_sum = tl.where(row_sum == 0, 1.0, row_sum)
    out = acc / row_sum[:, None]
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh
    out_ptrs = out_ptrs + rows[:, None] * stride_om + offs_dv.to(tl.int64)[None, :] * stride_od
    out_valid = row_valid[:, None] & dv_valid[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=out_valid)
    if HAS_LSE:
        lse_ptrs = lse_ptr + b * stride_lse_b + h * stride_lse_h + rows * stride_lse_m
        tl.store(lse_ptrs, (row_max + tl.log2(row_sum)) * LN2, mask=row_valid)


def padded_head_dim(head_dim: int) -> int:
    """The tile width that holds a head dimension: a power of two that `tl.dot` takes."""
    return max(16, next_power_of_2(head_dim))


def heads_in_cache(bytes_of_group: int, group_size: int, num_heads: int) -> int:
    """How many of `num_heads` heads run at the same time: groups whose tensors share the cache."""
    return min(num_heads, max(1, L2_SECTION_BYTES // max(1, bytes_of_group)) * group_size)


def tma_can_load(tensor: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator takes this layout: dense last dimension, 16-byte steps.

    An expanded dimension is refused: cuTensorMapEncode does not document strides of 0.
    """
    alignment = 16 // tensor.element_size()
    return (
        tensor.data_ptr() % 16 == 0
        and tensor.numel() > 0
        and tensor.stride(-1) == 1
        and all(
            step > 0 and step % alignment == 0
            for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
            if size > 1
        )
    )


def tma_descriptor(tensor: torch.Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """A descriptor of (B, H, L, D) that loads tiles of `block_rows` x `block_columns`."""
    alignment = 16 // tensor.element_size()
    strides = [
        step if size > 1 else triton.cdiv(step, alignment) * alignment
        for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    strides[-1] = 1
    return TensorDescriptor(tensor, list(tensor.shape), strides, [1, 1, block_rows, block_columns])


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
    """
    batch, num_heads, len_q, head_dim = query.shape
    num_kv_heads, len_kv, head_dim_v = value.shape[1:]
    if out.numel() == 0:
        return
    mask = query if attn_mask is None else attn_mask
    group_size = num_heads // num_kv_heads
    block_d, block_dv = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    use_tma = config.tma and tma_can_load(key) and tma_can_load(value)
    if config.tma and not use_tma:
        config = without_tma(config, max(block_d, block_dv))
    kv_bytes = len_kv * (head_dim + head_dim_v) * key.element_size()
    section_heads = heads_in_cache(kv_bytes, group_size, batch * num_heads)
    grid = (triton.cdiv(len_q, config.block_m) * batch * num_heads,)
    flash_attention_kernel[grid](
        query,
        tma_descriptor(key, config.block_n, block_d) if use_tma else key,
        tma_descriptor(value, config.block_n, block_dv) if use_tma else value,
        mask,
        out,
        lse if lse is not None else out,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *mask.stride(),
        *out.stride(),
        *(lse.stride() if lse is not None else (0, 0, 0)),
        scale,
        batch * num_heads,
        num_heads,
        group_size,
        len_q,
        len_kv,
        head_dim,
        head_dim_v,
        section_heads,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        IS_CAUSAL=is_causal,
        HAS_MASK=attn_mask is not None,
        MASK_IS_BOOL=mask.dtype == torch.bool,
        HAS_LSE=lse is not None,
        EVEN_N=len_kv % config.block_n == 0,
        EVEN_D=head_dim == block_d,
        EVEN_DV=head_dim_v == block_dv,
        USE_TMA=use_tma,
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
