"""What `short_cache_attention` is made of: tiles of a cache, masks, rotation, and sums of parts.

Tiles are (W, NK, D): each of the W warps has NK keys of its own, of which the first WARP_KEYS are
the tile's. Scores are (W, 16, NK), of which eight rows are queries, which share registers with none
of the other eight.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from triton_only_backend.kernels.sizes import next_power_of_2

# Triton 3.9 renamed it.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


power_of_2 = gluon.constexpr_function(next_power_of_2)


@gluon.jit
def keys_of(first_key, W: gl.constexpr, NK: gl.constexpr, WARP_KEYS: gl.constexpr, layout):
    """A tile's keys (W, NK): the first WARP_KEYS of each warp's NK are the tile's."""
    warp = gl.arange(0, W, gl.SliceLayout(1, layout))[:, None]
    lane = gl.arange(0, NK, gl.SliceLayout(0, layout))[None, :]
    return first_key + warp * WARP_KEYS + lane, (lane < WARP_KEYS) & (warp >= 0)


@gluon.jit
def copy_tile(
    k_tile, v_tile, k_ptr, v_ptr, stride_kn, stride_vn, first_key, len_kv, wanted,
    W: gl.constexpr, NK: gl.constexpr, WARP_KEYS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Asks for a tile; zeros where there is no key, or none is wanted."""
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [1, 32 // (D // 8), D // 8], [W, 1, 1], [2, 1, 0]
    )
    key, inside = keys_of(first_key, W, NK, WARP_KEYS, gl.SliceLayout(2, layout))
    valid = (inside & (key < len_kv) & wanted)[:, :, None]
    d = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, :][:, None, :]
    valid = valid & (d >= 0)
    at = key.to(gl.int64)[:, :, None]
    copy_to_shared(k_tile, k_ptr + at * stride_kn + d, mask=valid)
    copy_to_shared(v_tile, v_ptr + at * stride_vn + d, mask=valid)
    async_copy.commit_group()


@gluon.jit
def copy_first_tiles(
    k_ring, v_ring, k_ptr, v_ptr, stride_kn, stride_vn, split, len_kv,
    SPLITS: gl.constexpr, TILE_KEYS: gl.constexpr, STAGES: gl.constexpr,
    W: gl.constexpr, NK: gl.constexpr, WARP_KEYS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Fills the ring with the first of a split's tiles."""
    for i in gl.static_range(STAGES):
        copy_tile(
            k_ring.index(i), v_ring.index(i), k_ptr, v_ptr, stride_kn, stride_vn,
            (split + i * SPLITS) * TILE_KEYS, len_kv, True, W, NK, WARP_KEYS, D,
        )  # fmt: skip


@gluon.jit
def partner(d, ROTARY: gl.constexpr, ROPE: gl.constexpr):
    """The element that each of a head's turns with."""
    if ROPE == "half":
        other = gl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2)
    else:
        other = d ^ 1
    return other


@gluon.jit
def turned(x, y, cos, sin):
    """`rotate` of rope_cache, rounded two at a time (one: a fourth of the rate)."""
    return rounded(x.to(gl.float32) * cos + y.to(gl.float32) * sin, x.dtype)


@gluon.jit
def rounded(x, dtype: gl.constexpr):
    """x, whose threads hold pairs of neighbours, in a 16-bit dtype."""
    if dtype == gl.bfloat16:
        y = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        y = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )
    return y


@gluon.jit
def load_shown(ptrs, stride_h, inside, group_size, MASK_ROWS: gl.constexpr):
    """Which keys the mask shows to any row."""
    shown = gl.load(ptrs, mask=inside, other=0)
    for r in gl.static_range(1, MASK_ROWS):
        shown = shown | gl.load(ptrs + r * stride_h, mask=inside & (r < group_size), other=0)
    return shown


@gluon.jit
def load_shown_to_rows(ptrs, stride_h, inside, group_size, layout: gl.constexpr):
    """What the mask shows of keys (W, NK) to rows (W, 16, NK)."""
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :][:, :, None]
    valid = inside[:, None, :] & (row < group_size)
    return gl.load(ptrs[:, None, :] + row * stride_h, mask=valid, other=0)


@gluon.jit
def keep(v, bits):
    """v, with the rows zeroed whose bits are, whatever they hold: two at a time."""
    _, bits = gl.broadcast(v, bits[:, :, None])
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r", [v, bits], dtype=v.dtype, is_pure=True, pack=2
    )


@gluon.jit
def low_rows(x):
    """The first eight of sixteen rows (W, 16, …), which are registers of their own."""
    W: gl.constexpr = x.shape[0]
    if len(x.shape) == 3:
        low, _ = gl.split(x.reshape([W, 2, 8, x.shape[2]]).permute((0, 2, 3, 1)))
    else:
        low, _ = gl.split(x.reshape([W, 2, 8]).permute((0, 2, 1)))
    return low


@gluon.jit
def padded_rows(low, layout: gl.constexpr):
    """Eight rows (…, 8, N) and eight of zeros, as an operand of mma."""
    pair = gl.join(low, gl.zeros_like(low))
    if len(low.shape) == 3:
        wide = pair.permute((0, 3, 1, 2)).reshape([low.shape[0], 16, low.shape[2]])
    else:
        wide = pair.permute((2, 0, 1)).reshape([16, low.shape[1]])
    return gl.convert_layout(wide, layout)


@gluon.constexpr_function
def query_layout(D, W):
    """The first eight rows of mma's operand (16, D), the same in all warps."""
    registers = [[0, 1], *([0, n] for n in (8, 16, 32, 64) if n < D)]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * (W.bit_length() - 1), [], [8, D])


@gluon.jit
def weights_of(largest):
    """exp2(m_i - max m) along the first axis, 0 where m_i is -inf; and the maximum."""
    top = gl.max(largest, 0)
    shift = gl.where(top == float("-inf"), 0.0, top)
    return gl.exp2(largest - shift[None, :]), top


@gluon.jit
def combine_splits(
    partial_ptr, stats_ptr, out_ptr, stride_h, group_size,
    D: gl.constexpr, GROUP: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """Writes a KV head's output from all that its splits left, read at once, past the L1 cache."""
    W: gl.constexpr = gl.num_warps()
    PADDED: gl.constexpr = power_of_2(SPLITS)
    C: gl.constexpr = gl.BlockedLayout(
        [PADDED, 1, 4], [1, 32 // min(32, D // 4), min(32, D // 4)], [1, W, 1], [2, 1, 0]
    )
    by_row: gl.constexpr = gl.SliceLayout(2, C)
    s = gl.arange(0, PADDED, gl.SliceLayout(1, by_row))[:, None]
    r = gl.arange(0, GROUP, gl.SliceLayout(0, by_row))[None, :]
    c = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(0, C)))
    valid = (s < SPLITS) & (r >= 0)
    at = stats_ptr + s * (GROUP * 2) + r
    largest = gl.load(at, mask=valid, other=float("-inf"), cache_modifier=".cg")
    sums = gl.load(at + GROUP, mask=valid, other=0.0, cache_modifier=".cg")
    part_ptrs = partial_ptr + ((s * GROUP + r) * D)[:, :, None] + c[None, :][None, :, :]
    part_valid = valid[:, :, None] & (c >= 0)[None, :][None, :, :]
    part = gl.load(part_ptrs, mask=part_valid, other=0.0, cache_modifier=".cg")
    weight, _ = weights_of(largest)
    total = gl.sum(weight * sums, 0)
    total = gl.convert_layout(
        gl.where(total == 0, 1.0, total), gl.SliceLayout(1, gl.SliceLayout(0, C))
    )
    value = gl.sum(weight[:, :, None] * part, 0) / total[:, None]
    row = gl.arange(0, GROUP, gl.SliceLayout(1, gl.SliceLayout(0, C)))
    out_ptrs = out_ptr + row[:, None] * stride_h + c[None, :]
    out_valid = (row < group_size)[:, None] & (c >= 0)[None, :]
    gl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=out_valid)
