"""The loop over a tile's keys that prefill and decoding share: the online softmax.

See `flash_attention` for the mathematics, `attention_tiles` for what is done to a tile of scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_only_backend.kernels.attention_tiles import (
    LOG2E,
    add_mask,
    kept_by_dropout,
    load_rows,
    tanh,
)


@triton.jit
def attend_blocks(
    acc, row_max, row_sum, q, k_source, v_source, b, kv_head, mask_rows, stride_mask_n,
    row_position, row_valid, start, stop, len_kv, k_step, v_step, qk_scale, d_valid, dv_valid,
    BLOCK_N: tl.constexpr, CHECK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr, left=None, right=None, softcap=None, seed=None,
    drop_below=None, batch_head=None, n_step=None,
):  # fmt: skip
    """Folds the keys of [start, stop) into acc, row_max and row_sum.

    `k_source` and `v_source` are tensor descriptors (USE_TMA) or the pointers of the tile at start.
    CHECK says that some of these keys may be hidden by causality or by the window `left`, `right`
    (see `band`), or lie beyond the last one. What is None costs nothing. Tiles start `n_step`
    keys apart, BLOCK_N where it is None; `k_step` and `v_step` are as far in memory.
    """
    lanes = tl.arange(0, BLOCK_N)
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_DV: tl.constexpr = acc.shape[1]
    for start_n in tl.range(start, stop, BLOCK_N if n_step is None else n_step):
        offs_n = start_n + lanes
        n_valid = offs_n < len_kv
        k = load_rows(
            k_source, b, kv_head, start_n, n_valid, d_valid, BLOCK_N, BLOCK_D, USE_TMA, EVEN_N or
            not CHECK, EVEN_D,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CHECK or HAS_MASK or softcap is not None:
            scores *= qk_scale
            if softcap is not None:
                scores = tanh(scores) * (softcap * LOG2E)
            if HAS_MASK:
                mask_ptrs = mask_rows[:, None] + offs_n.to(tl.int64)[None, :] * stride_mask_n
                mask_valid = row_valid[:, None] & n_valid[None, :]
                scores = add_mask(scores, mask_ptrs, mask_valid, MASK_IS_BOOL)
            if CHECK and left is not None:
                distance = offs_n[None, :] - row_position[:, None]
                hidden = (distance < left) | (distance > right)
                scores = tl.where(hidden, float("-inf"), scores)
            elif CHECK and IS_CAUSAL:
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
        if seed is not None:
            kept = kept_by_dropout(
                seed, batch_head, row_position, start_n, drop_below, BLOCK_N, False
            )
            p = tl.where(kept, p, 0.0)
        acc *= alpha[:, None]
        v = load_rows(
            v_source, b, kv_head, start_n, n_valid, dv_valid, BLOCK_N, BLOCK_DV, USE_TMA, EVEN_N or
            not CHECK, EVEN_DV,
        )  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        if not USE_TMA:
            k_source += k_step
            v_source += v_step
    return acc, row_max, row_sum
