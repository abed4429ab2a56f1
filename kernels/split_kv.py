"""What the decoding kernels share: which tiles a split attends to, and how splits are combined.

The keys are cut into tiles of BLOCK_N, and split s of S attends to the tiles s, s + S, s + 2S, …:
however much of a cache is filled, and wherever a window lies, the splits have equal work. A split
leaves its normalised output and log-sum-exp,

    O_s = sum_j exp(S_j - m_s) V_j / l_s        L_s = m_s + log l_s        (j in split s)

and whoever combines them does it in the order of the splits, whatever order they ran in, so that
results are bitwise equal from run to run:

    O = sum_s w_s O_s / sum_s w_s        w_s = exp(L_s - max_s L_s)

A split in which a row sees no key has L_s = -inf, hence weight 0.

With counters (see `arrival`) the split that arrives last combines, in the same launch. Its reads
come after the others' writes: each program's writes are ordered before its thread 0's addition by
the barrier, that addition is a release and an acquire, and the barrier after it orders the reads.
They bypass the L1 cache (.cg), which no other multiprocessor's write reaches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_only_backend.kernels.attention_tiles import LN2, LOG2E
from triton_only_backend.kernels.dependent_launch import prefetch_to_l2
from triton_only_backend.kernels.online_softmax import attend_blocks


@triton.jit
def prefetch_tiles(
    k_ptr, v_ptr, split, num_splits, len_kv, head_dim, head_dim_v, stride_kn, stride_vn,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Asks for a split's first tiles of keys and values, where their head dimension is dense."""
    line: tl.constexpr = 1024 // k_ptr.dtype.element_ty.primitive_bitwidth
    for i in tl.static_range(0, TILES):
        offs_n = (split + i * num_splits) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_n = tl.minimum(offs_n, len_kv - 1).to(tl.int64)
        d = tl.minimum(tl.arange(0, (BLOCK_D + line - 1) // line) * line, head_dim - 1)
        prefetch_to_l2(k_ptr + offs_n[:, None] * stride_kn + d[None, :])
        d = tl.minimum(tl.arange(0, (BLOCK_DV + line - 1) // line) * line, head_dim_v - 1)
        prefetch_to_l2(v_ptr + offs_n[:, None] * stride_vn + d[None, :])


@triton.jit
def merge_ranges(first_a, end_a, first_b, end_b):
    return tl.minimum(first_a, first_b), tl.maximum(end_a, end_b)


@triton.jit
def tiles_to_visit(
    mask_rows, mask_valid, stride_mask_n, split, num_splits, len_q, len_kv, left, right,
    BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, SCAN_TILES: tl.constexpr,
):  # fmt: skip
    """The range [begin, end) of a split's tiles outside of which no row sees a key.

    With SCAN_TILES > 0 there is a boolean mask, of which that many tiles are read at a time: a byte
    a key, where the key and the value are hundreds.
    """
    begin = 0
    high = len_kv
    if left is not None:
        low = tl.maximum(left, 0)
        begin = tl.cdiv(tl.maximum(low // BLOCK_N, split) - split, num_splits)
        high = tl.minimum(high, tl.maximum(len_q + right, 0))
    elif IS_CAUSAL:
        high = tl.minimum(high, len_q)
    end = tl.cdiv(tl.maximum(tl.cdiv(high, BLOCK_N), split) - split, num_splits)
    if SCAN_TILES > 0:
        lane = tl.arange(0, SCAN_TILES * BLOCK_N)
        begin_seen = end
        end_seen = tl.minimum(end, 0)
        for start in tl.range(begin, end, SCAN_TILES):
            i = start + lane // BLOCK_N
            offs_n = (split + i * num_splits) * BLOCK_N + lane % BLOCK_N
            valid = (i < end) & (offs_n < len_kv)
            mask_ptrs = mask_rows[:, None] + offs_n.to(tl.int64)[None, :] * stride_mask_n
            seen = tl.load(mask_ptrs, mask=mask_valid[:, None] & valid[None, :], other=0)
            seen = tl.max(seen.to(tl.int32), 0) != 0
            # Reduced in the loop: after it, Triton 3.7 knows nothing of what depends on the result,
            # and no longer loads keys and values asynchronously where a mask guards them.
            first = tl.where(seen, i, end)
            last = tl.where(seen, i + 1, 0)
            first, last = tl.reduce((first, last), 0, merge_ranges)
            begin_seen = tl.minimum(begin_seen, first)
            end_seen = tl.maximum(end_seen, last)
        begin = begin_seen
        end = end_seen
    return tl.minimum(begin, end), end


@triton.jit
def attend_split(
    q, k_ptr, v_ptr, mask_rows, mask_valid, row_position, split, num_splits, begin, end, len_kv,
    head_dim, head_dim_v, stride_kn, stride_kd, stride_vn, stride_vd, stride_mask_n, scale,
    left, right, softcap,
    BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A split's normalised output and log-sum-exp, in units of log2, for the rows of q.

    `k_ptr` and `v_ptr` are the KV head's first key and value. `mask_rows` points at one row of the
    mask for each row of q, or at one for all.
    """
    BLOCK_G: tl.constexpr = q.shape[0]
    lanes = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_d = tl.arange(0, q.shape[1])
    offs_dv = tl.arange(0, BLOCK_DV)
    start = (split + begin * num_splits) * BLOCK_N
    stop = tl.minimum((split + end * num_splits) * BLOCK_N, len_kv)
    keys = start.to(tl.int64) + lanes
    k_ptrs = k_ptr + keys[:, None] * stride_kn + offs_d.to(tl.int64)[None, :] * stride_kd
    v_ptrs = v_ptr + keys[:, None] * stride_vn + offs_dv.to(tl.int64)[None, :] * stride_vd
    step = BLOCK_N * num_splits
    k_step = step.to(tl.int64) * stride_kn
    v_step = step.to(tl.int64) * stride_vn

    qk_scale = tl.full((), scale, tl.float32) * LOG2E
    q = tl.where(qk_scale < 0, -q, q)
    qk_scale = tl.abs(qk_scale)
    if softcap is not None:
        softcap = tl.full((), softcap, tl.float32)
        qk_scale = qk_scale / (softcap * LOG2E)
    acc = tl.zeros((BLOCK_G, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_G,), tl.float32)
    acc, row_max, row_sum = attend_blocks(
        acc, row_max, row_sum, q, k_ptrs, v_ptrs, 0, 0,
        mask_rows, stride_mask_n, row_position, mask_valid, start, stop, len_kv,
        k_step, v_step, qk_scale, offs_d < head_dim, offs_dv < head_dim_v,
        BLOCK_N, IS_CAUSAL or left is not None or not EVEN_N, IS_CAUSAL, HAS_MASK, MASK_IS_BOOL,
        EVEN_N, EVEN_D, EVEN_DV, False, PRECISION, left, right, softcap, n_step=step,
    )  # fmt: skip
    row_sum = tl.where(row_sum == 0, 1.0, row_sum)
    return acc / row_sum[:, None], row_max + tl.log2(row_sum)


@triton.jit
def store_rows(
    out, lse2, out_ptr, lse_ptr, b, h, m, row_valid, head_dim_v, out_strides, lse_strides,
):  # fmt: skip
    """Writes rows (b, h, m) of the output and, with `lse_ptr`, of the natural log-sum-exp."""
    offs_dv = tl.arange(0, out.shape[1])
    out_ptrs = out_ptr + b * out_strides[0] + h * out_strides[1] + m * out_strides[2]
    out_ptrs = out_ptrs[:, None] + offs_dv.to(tl.int64)[None, :] * out_strides[3]
    out_valid = row_valid[:, None] & (offs_dv < head_dim_v)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=out_valid)
    if lse_ptr is not None:
        lse_ptrs = lse_ptr + b * lse_strides[0] + h * lse_strides[1] + m * lse_strides[2]
        tl.store(lse_ptrs, lse2 * LN2, mask=row_valid)


@triton.jit
def combine_rows(
    partial_out_ptr, partial_lse_ptr, row, row_valid, num_splits, head_dim_v,
    BLOCK_C: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The output and log-sum-exp of query rows, from BLOCK_C splits at a time.

    Partial outputs are (rows, splits, D_v), so that one row's splits lie together.
    """
    BLOCK_R: tl.constexpr = row.shape[0]
    offs_dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_R, BLOCK_DV), tl.float32)
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in tl.range(0, num_splits, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        valid = row_valid[:, None] & (offs_c < num_splits)[None, :]
        partial = row[:, None] * num_splits + offs_c[None, :]
        tile_ptrs = partial_out_ptr + partial[:, :, None] * head_dim_v + offs_dv[None, None, :]
        tile_valid = valid[:, :, None] & (offs_dv < head_dim_v)[None, None, :]
        tile = tl.load(tile_ptrs, mask=tile_valid, other=0.0, cache_modifier=".cg")
        lse2 = tl.load(
            partial_lse_ptr + partial, mask=valid, other=float("-inf"), cache_modifier=".cg"
        )
        new_largest = tl.maximum(largest, tl.max(lse2, 1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weight = tl.exp2(lse2 - shift[:, None])
        alpha = tl.exp2(largest - shift)
        total = total * alpha + tl.sum(weight, 1)
        acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * tile, 1)
        largest = new_largest
    total = tl.where(total == 0, 1.0, total)
    return acc / total[:, None], largest + tl.log2(total)


@triton.jit
def combine_group(
    out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, b, kv_head, first_row, num_rows,
    num_splits, num_kv_heads, group_size, len_q, head_dim_v, out_strides, lse_strides,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Combines the splits of a KV head's rows from `first_row`; BLOCK_R hold all that are valid."""
    row = first_row + tl.arange(0, BLOCK_R)
    row_valid = row < num_rows
    h = kv_head * group_size + row // len_q
    m = (row % len_q).to(tl.int64)
    query_row = (b * num_kv_heads * group_size + h) * len_q + m
    out, lse2 = combine_rows(
        partial_out_ptr, partial_lse_ptr, query_row, row_valid, num_splits, head_dim_v,
        BLOCK_C, BLOCK_DV,
    )  # fmt: skip
    store_rows(
        out, lse2, out_ptr, lse_ptr, b, h, m, row_valid, head_dim_v, out_strides, lse_strides,
    )  # fmt: skip


@triton.jit
def finish_split(
    out, lse2, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, counter_ptr,
    b, kv_head, first_row, num_rows, split, num_splits,
    num_kv_heads, group_size, len_q, head_dim_v, out_strides, lse_strides,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Writes what a split computed: the output, or a part of it; the last of all parts combines.

    Row r of a KV head is query r % len_q of its head r // len_q. `counter_ptr` is that of these
    rows' splits, or None where another kernel combines.
    """
    row = first_row + tl.arange(0, out.shape[0])
    row_valid = row < num_rows
    h = kv_head * group_size + row // len_q
    m = (row % len_q).to(tl.int64)
    if IS_SPLIT:
        offs_dv = tl.arange(0, out.shape[1])
        heads = b * num_kv_heads * group_size
        partial = ((heads + h) * len_q + m) * num_splits + split
        partial_ptrs = partial_out_ptr + partial[:, None] * head_dim_v + offs_dv[None, :]
        tl.store(partial_ptrs, out, mask=row_valid[:, None] & (offs_dv < head_dim_v)[None, :])
        tl.store(partial_lse_ptr + partial, lse2, mask=row_valid)
        if counter_ptr is not None:
            tl.debug_barrier()
            arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
            if arrived == num_splits - 1:
                combine_group(
                    out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, b, kv_head, first_row,
                    num_rows, num_splits, num_kv_heads, group_size, len_q, head_dim_v,
                    out_strides, lse_strides, BLOCK_R, BLOCK_C, out.shape[1],
                )  # fmt: skip
                tl.store(counter_ptr, 0)
    else:
        store_rows(
            out, lse2, out_ptr, lse_ptr, b, h, m, row_valid, head_dim_v, out_strides, lse_strides,
        )  # fmt: skip
