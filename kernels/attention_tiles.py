"""What the attention kernels share: loading tiles, the order of programs, masks, dropout, soft-cap.

Everything here works on one tile of scores: (BLOCK_M queries, BLOCK_N keys), or its transpose in
the kernel that holds keys. Scores are in units of log2: exponentials are powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LARGE = tl.constexpr(3e38)  # of which the natural logarithm's unit still fits fp32
LN2 = tl.constexpr(0.6931471805599453)
# Further from the diagonal than any key: half of int32, so that adding a position cannot overflow.
NO_BOUND = tl.constexpr(1 << 30)
# Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011: seven rounds of Philox4x32
# pass all of BigCrush.
PHILOX_ROUNDS = tl.constexpr(7)


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
    source, b, h, start, rows_valid, columns_valid, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS:
    tl.constexpr, USE_TMA: tl.constexpr, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
):  # fmt: skip
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
def sequence(cu_seqlens_ptr, index):
    """Where a packed sequence starts, and its length."""
    start = tl.load(cu_seqlens_ptr + index).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + index + 1).to(tl.int64) - start
    return start, length.to(tl.int32)


@triton.jit
def add_mask(scores, mask_ptrs, valid, MASK_IS_BOOL: tl.constexpr):
    """Adds a tile of the attention mask to scores that are in units of log2."""
    if MASK_IS_BOOL:
        scores += tl.where(tl.load(mask_ptrs, mask=valid, other=0) != 0, 0.0, float("-inf"))
    else:
        # The least finite number, which models write for "hidden", must not become -inf in units of
        # log2: a row of nothing else averages the values, as PyTorch's does.
        mask = tl.load(mask_ptrs, mask=valid, other=0.0).to(tl.float32)
        finite = tl.minimum(tl.maximum(mask * LOG2E, -LARGE), LARGE)
        scores += tl.where(tl.abs(mask) == float("inf"), mask, finite)
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
def band(window_left, window_right, len_q, len_kv, IS_CAUSAL: tl.constexpr):
    """The window as distances from the diagonal: query i sees j with left <= j - i <= right.

    A window is aligned to the bottom right, as in FlashAttention: query i stands at key
    i + len_kv - len_q. `is_causal`, aligned to the top left as in PyTorch, narrows it further.
    """
    shift = len_kv - len_q
    left = tl.where(window_left < 0, -NO_BOUND, shift - window_left)
    right = tl.where(window_right < 0, NO_BOUND, shift + window_right)
    if IS_CAUSAL:
        right = tl.minimum(right, 0)
    return left, right


@triton.jit
def keys_of_tile(
    start_m, len_kv, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Which keys the queries from `start_m` see: `full`, a multiple of BLOCK_N, and `stop`.

    None of them sees a key from `stop` on. Without a window (`left` and `right`, see `band`) all of
    them see the keys before `full`, with one none of them does.
    """
    if left is not None:
        stop = tl.minimum(tl.maximum(start_m + BLOCK_M + right, 0), len_kv)
        full = tl.minimum(tl.maximum(start_m + left, 0), stop) // BLOCK_N * BLOCK_N
    elif IS_CAUSAL:
        full = tl.minimum(start_m + 1, len_kv) // BLOCK_N * BLOCK_N
        stop = tl.minimum(start_m + BLOCK_M, len_kv)
    else:
        full = len_kv // BLOCK_N * BLOCK_N
        stop = len_kv
    return full, stop


@triton.jit
def tanh(x):
    """tanh to fp32's precision: a polynomial near 0, where 1 - exp(-2 |x|) would cancel."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = 1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * near, tl.where(x < 0, -far, far))


@triton.jit
def kept_by_dropout(
    seed,
    batch_head,
    offs_m,
    start_n,
    drop_below,
    BLOCK_N: tl.constexpr,
    KEYS_ARE_ROWS: tl.constexpr,
):
    """Which scores of a tile dropout keeps, (BLOCK_M, BLOCK_N) or, if keys are rows, transposed.

    Score (i, j) of a head has word j % 4 of Philox(seed; j // 4, i, head), whatever the tiles are,
    so that the backward sees what the forward did. It is kept if that word, of 32 bits, is not
    below `drop_below`.
    """
    quads = start_n // 4 + tl.arange(0, BLOCK_N // 4)
    if KEYS_ARE_ROWS:
        c0 = quads[:, None] + tl.zeros_like(offs_m)[None, :]
        c1 = offs_m[None, :] + tl.zeros_like(quads)[:, None]
    else:
        c0 = quads[None, :] + tl.zeros_like(offs_m)[:, None]
        c1 = offs_m[:, None] + tl.zeros_like(quads)[None, :]
    c2 = tl.zeros_like(c0) + batch_head.to(tl.int32)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0), PHILOX_ROUNDS)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    if KEYS_ARE_ROWS:
        words = tl.permute(words, (0, 2, 3, 1)).reshape(BLOCK_N, offs_m.shape[0])
    else:
        words = words.reshape(offs_m.shape[0], BLOCK_N)
    return words >= drop_below.to(tl.uint32)
