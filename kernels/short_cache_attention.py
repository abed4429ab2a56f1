"""A decoding step's attention over a short cache on Hopper, whose keys and values are read ahead.

    O = softmax(scale · q Kᵀ) V, with q and the new key rotated, and the new key and value put
    into the cache's slot first

With few keys, latencies are all the time there is. A split's keys and values are asked for at
once (cp.async), with EARLY before the kernel before has ended: of the caches, that kernel must not
have written anything. What it did write, and the position, are loaded together, in one round trip.

The tile may so hold the slot's old key and value. That column is hidden, and the split that has the
slot folds the new key in last, from registers: nothing is read back from the cache. What a boolean
mask hides, and the old value, may be NaN: such rows of V are zeroed as they leave shared memory.

Each warp attends to its own keys (a batched product), so that warps meet once, when their parts are
combined. Splits are combined as in `split_kv`, by the one that arrives last, in the order of the
splits, by the same rules of memory order; but what they leave is not normalised (m, l and acc).

EARLY also lets the kernel after this one start before this one has waited: in the chain of a decode
step on an H200 that took 5.5 µs a layer, 7.7 when it may start after the wait, 8.1 without EARLY.
That kernel may so begin before the kernel before this one has ended: what it touches before its own
wait, neither of them may write. Of two such attentions in a row, the second's caches must be ready
even before the kernel before the first.

Layouts: query (B, H, 1, D), key and value (B, H_kv, 1, D), caches (B, H_kv, L, D), a mask of
booleans (B, H, 1, L), by strides; head dimensions dense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.arrival import arrival_counters
from triton_only_backend.kernels.decode_attention import has_one_row
from triton_only_backend.kernels.dependent_launch import (
    launch_options,
    release_dependents,
    wait_for_producers,
)
from triton_only_backend.kernels.short_cache_configs import ShortCacheConfig, cut
from triton_only_backend.kernels.short_cache_tiles import (
    combine_splits,
    copy_first_tiles,
    copy_tile,
    keep,
    keys_of,
    load_shown,
    load_shown_to_rows,
    low_rows,
    padded_rows,
    partner,
    query_layout,
    turned,
    weights_of,
)
from triton_only_backend.kernels.sizes import next_power_of_2
from triton_only_backend.kernels.tma_ring import synchronize

if TYPE_CHECKING:
    from triton_only_backend.kernels.rope_cache import Rotation
    from triton_only_backend.kernels.rope_cache_ops import Inputs

Tensor = torch.Tensor

LOG2E = 1.4426950408889634


@gluon.jit
def short_cache_attention_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, position_ptr, k_cache_ptr, v_cache_ptr, mask_ptr,
    out_ptr, partial_ptr, stats_ptr, counter_ptr,
    q_strides, k_strides, v_strides, cos_strides, sin_strides, stride_position,
    k_cache_strides, v_cache_strides, mask_strides, out_strides,
    qk_scale, num_kv_heads, group_size, len_kv,
    D: gl.constexpr, GROUP: gl.constexpr, NK: gl.constexpr, WARP_KEYS: gl.constexpr,
    TILES: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, ROPE: gl.constexpr,
    ROTARY: gl.constexpr, MASK_ROWS: gl.constexpr, EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """GROUP: group_size, padded; EARLY: the kernel before wrote nothing of the caches."""
    W: gl.constexpr = gl.num_warps()
    HAS_MASK: gl.constexpr = mask_ptr is not None
    TILE_KEYS: gl.constexpr = W * WARP_KEYS
    ROWS: gl.constexpr = 8
    dtype: gl.constexpr = k_cache_ptr.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    dot_a: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    dot_b: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    heads: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [W, 1], [1, 0])
    by_lane: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [W, 1], [1, 0])
    keys: gl.constexpr = gl.SliceLayout(1, mma)
    v_keys: gl.constexpr = gl.SliceLayout(2, dot_b)
    C: gl.constexpr = gl.BlockedLayout(
        [W, 1, 4], [1, 32 // min(32, D // 4), min(32, D // 4)], [1, W, 1], [2, 1, 0]
    )
    flat: gl.constexpr = gl.SliceLayout(0, C)
    rows: gl.constexpr = gl.SliceLayout(1, flat)
    r = gl.arange(0, GROUP, rows)
    batch_head = gl.program_id(0)
    split = gl.program_id(1)
    b = (batch_head // num_kv_heads).to(gl.int64)
    kv_head = (batch_head % num_kv_heads).to(gl.int64)
    k_cache_ptr += b * k_cache_strides[0] + kv_head * k_cache_strides[1]
    v_cache_ptr += b * v_cache_strides[0] + kv_head * v_cache_strides[1]

    ring: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, W, NK, D], ring)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, W, NK, D], ring)
    q_rows = gl.allocate_shared_memory(dtype, [ROWS, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    new_scores = gl.allocate_shared_memory(
        gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    # Of each tile's keys, all bits where it is visible: of one row of a mask, or to any.
    bits: gl.tuple = ()
    for _ in gl.static_range(TILES):
        bits += (
            gl.allocate_shared_memory(gl.int16, [W, NK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])),
        )
    if EARLY:
        copy_first_tiles(
            k_ring, v_ring, k_cache_ptr, v_cache_ptr, k_cache_strides[2], v_cache_strides[2],
            split, len_kv, SPLITS, TILE_KEYS, STAGES, W, NK, WARP_KEYS, D,
        )  # fmt: skip

    # Addresses, while there is time.
    row = gl.arange(0, ROWS, gl.SliceLayout(1, heads))[:, None]
    d = gl.arange(0, D, gl.SliceLayout(0, heads))
    q_ptrs = q_ptr + b * q_strides[0] + (kv_head * group_size + row) * q_strides[1]
    q_valid = (row < group_size) & (d >= 0)[None, :]
    c = gl.arange(0, D, gl.SliceLayout(0, flat))
    position_ptr += b * stride_position
    k_ptr += b * k_strides[0] + kv_head * k_strides[1]
    v_ptrs = v_ptr + b * v_strides[0] + kv_head * v_strides[1] + c
    if ROPE != "none":
        turns = d < ROTARY
        other = partner(d, ROTARY, ROPE)
        angle = d if ROPE == "half" else d // 2
        first = d < ROTARY // 2 if ROPE == "half" else d % 2 == 0
        cos_ptrs = cos_ptr + b * cos_strides[0] + angle * cos_strides[2]
        sin_ptrs = sin_ptr + b * sin_strides[0] + angle * sin_strides[2]
        q_other_ptrs = q_ptrs + other[None, :]
        k_other_ptrs = k_ptr + other
    k_ptrs = k_ptr + d
    q_ptrs = q_ptrs + d[None, :]
    key, inside = keys_of(split * TILE_KEYS, W, NK, WARP_KEYS, by_lane)
    wide_key, wide_inside = keys_of(split * TILE_KEYS, W, NK, WARP_KEYS, keys)
    if HAS_MASK:
        mask_ptr += b * mask_strides[0] + kv_head * group_size * mask_strides[1]
        mask_ptrs = mask_ptr + key.to(gl.int64) * mask_strides[3]
        wide_mask_ptrs = mask_ptr + wide_key.to(gl.int64) * mask_strides[3]
        mask_step = (SPLITS * TILE_KEYS) * mask_strides[3]
    if EARLY:
        release_dependents(PDL)
        async_copy.wait_group(0 if TILES == STAGES else STAGES - 1)
        k = k_ring.index(0).permute((0, 2, 1)).load(dot_b)
        v = v_ring.index(0).load(dot_b)
    wait_for_producers(PDL)
    if not EARLY:
        release_dependents(PDL)

    # All that is small, at once.
    position = gl.load(position_ptr)
    q = gl.load(q_ptrs, mask=q_valid, other=0.0)
    new_k = gl.load(k_ptrs)
    if ROPE != "none":
        q_y = gl.load(q_other_ptrs, mask=q_valid & turns[None, :], other=0.0)
        k_y = gl.load(k_other_ptrs, mask=turns, other=0.0)
        cos = gl.load(cos_ptrs, mask=turns, other=1.0)
        sin = gl.load(sin_ptrs, mask=turns, other=0.0)
    new_v = gl.load(v_ptrs)
    shown: gl.tuple = ()
    row_shown: gl.tuple = ()
    if HAS_MASK:
        for i in gl.static_range(TILES):
            n = len_kv - i * (SPLITS * TILE_KEYS)
            shown += (
                load_shown(
                    mask_ptrs + i * mask_step, mask_strides[1], inside & (key < n), group_size,
                    MASK_ROWS,
                ),
            )  # fmt: skip
            if MASK_ROWS > 1:
                row_shown += (
                    load_shown_to_rows(
                        wide_mask_ptrs + i * mask_step, mask_strides[1],
                        wide_inside & (wide_key < n), group_size, mma,
                    ),
                )  # fmt: skip
    if not EARLY:
        copy_first_tiles(
            k_ring, v_ring, k_cache_ptr, v_cache_ptr, k_cache_strides[2], v_cache_strides[2],
            split, len_kv, SPLITS, TILE_KEYS, STAGES, W, NK, WARP_KEYS, D,
        )  # fmt: skip
        async_copy.wait_group(0 if TILES == STAGES else STAGES - 1)
        k = k_ring.index(0).permute((0, 2, 1)).load(dot_b)
        v = v_ring.index(0).load(dot_b)
    if ROPE != "none":
        cos = cos.to(gl.float32)
        sin = gl.where(first, -sin.to(gl.float32), sin.to(gl.float32))
        q = turned(q, q_y, cos[None, :], sin[None, :])
    q_rows.store(q)
    mine = False
    place = position.to(gl.int64)
    place = gl.where(place < 0, place + len_kv, place)  # as indexing does
    old_key = gl.where((place >= 0) & (place < len_kv), place, -1).to(gl.int32)
    for i in gl.static_range(TILES):
        after = old_key - (split + i * SPLITS) * TILE_KEYS
        mine = mine | ((after >= 0) & (after < TILE_KEYS) & (old_key >= 0))
    for i in gl.static_range(TILES):
        visible = inside & (key < len_kv - i * (SPLITS * TILE_KEYS))
        visible = visible & (key != old_key - i * (SPLITS * TILE_KEYS))
        if HAS_MASK:
            visible = visible & shown[i]
        bits[i].store(gl.where(visible, -1, 0).to(gl.int16))
    if HAS_MASK:
        new_mask_ptr = mask_ptr + old_key.to(gl.int64) * mask_strides[3]
        if MASK_ROWS > 1:
            valid = mine & (r < group_size)
            new_shown = gl.load(new_mask_ptr + r * mask_strides[1], mask=valid, other=0)
        else:
            new_shown = gl.load(new_mask_ptr, mask=mine, other=0)
    else:
        new_shown = mine
    tiles_shown = TILES
    if TILES > STAGES and HAS_MASK:
        seen = gl.zeros([W, NK], gl.int32, by_lane)
        for i in gl.static_range(TILES):
            seen = gl.where(shown[i], i + 1, seen)
        tiles_shown = gl.max(gl.max(seen, 1), 0)
    q_wide = padded_rows(q_rows.load(query_layout(D, W)), gl.SliceLayout(0, dot_a))
    q_wide, _ = gl.broadcast(gl.expand_dims(q_wide, 0), gl.zeros([W, 1, 1], dtype, dot_a))

    # From shared memory, so that it is not computed before it is time.
    if ROPE != "none":
        new_k = turned(new_k, k_y, cos, sin)
    new_score = gl.sum(q_rows.load(heads).to(gl.float32) * new_k.to(gl.float32)[None, :], 1)
    new_scores.store(new_score * qk_scale)

    old_max = None
    for i in gl.static_range(TILES):
        if i > 0:
            if TILES > STAGES:
                async_copy.wait_group(min(STAGES, TILES - i) - 1)
            k = k_ring.index(i % STAGES).permute((0, 2, 1)).load(dot_b)
            v = v_ring.index(i % STAGES).load(dot_b)
        scores = mma_v2(q_wide, k, gl.zeros([W, 16, NK], gl.float32, mma))
        visible = (wide_inside & (bits[i].load(keys) != 0))[:, None, :]
        if MASK_ROWS > 1:
            visible = visible & row_shown[i]
        scores = gl.where(visible, scores * qk_scale, float("-inf"))
        v = keep(v, bits[i].load(v_keys))
        tile_max = gl.max(scores, 2)
        if i == 0:
            row_max = tile_max
        else:
            row_max = gl.maximum(old_max, tile_max)
        shift = gl.where(row_max == float("-inf"), 0.0, row_max)
        p = gl.exp2(scores - shift[:, :, None])
        tile_sum = gl.sum(p, 2)
        p = padded_rows(low_rows(p).to(dtype), dot_a)
        if i == 0:
            row_sum = tile_sum
            acc = mma_v2(p, v, gl.zeros([W, 16, D], gl.float32, mma))
        else:
            alpha = gl.exp2(old_max - shift)
            row_sum = row_sum * alpha + tile_sum
            acc = mma_v2(p, v, acc * alpha[:, :, None])
        old_max = row_max
        if i + STAGES < TILES:
            copy_tile(
                k_ring.index(i % STAGES), v_ring.index(i % STAGES), k_cache_ptr, v_cache_ptr,
                k_cache_strides[2], v_cache_strides[2], (split + (i + STAGES) * SPLITS) * TILE_KEYS,
                len_kv, i + STAGES < tiles_shown, W, NK, WARP_KEYS, D,
            )  # fmt: skip
    slot = old_key.to(gl.int64)
    gl.store(k_cache_ptr + slot * k_cache_strides[2] + d, new_k, mask=(d >= 0) & mine)
    gl.store(v_cache_ptr + slot * v_cache_strides[2] + c, new_v, mask=(c >= 0) & mine)

    # The warps' parts.
    parts = gl.allocate_shared_memory(
        gl.float32, [W, ROWS, D], gl.SwizzledSharedLayout(8, 1, 4, [2, 1, 0])
    )
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    maxima = gl.allocate_shared_memory(gl.float32, [W, ROWS], plain)
    sums = gl.allocate_shared_memory(gl.float32, [W, ROWS], plain)
    parts.store(low_rows(acc))
    maxima.store(low_rows(row_max))
    sums.store(low_rows(row_sum))
    part = parts.slice(0, GROUP, 1).load(C)
    part_max = maxima.slice(0, GROUP, 1).load(gl.SliceLayout(2, C))
    part_sum = sums.slice(0, GROUP, 1).load(gl.SliceLayout(2, C))
    weight, top = weights_of(part_max)
    total = gl.convert_layout(gl.sum(weight * part_sum, 0), rows)
    top = gl.convert_layout(top, rows)
    value = gl.sum(weight[:, :, None] * part, 0)
    score = new_scores.slice(0, GROUP, 0).load(rows)
    score = gl.where((r >= 0) & new_shown, score, float("-inf"))
    new_top = gl.maximum(top, score)
    new_shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    new_weight = gl.exp2(score - new_shift)
    old_weight = gl.exp2(top - new_shift)
    shown_v = gl.where(mine, new_v.to(gl.float32), 0.0)
    value = value * old_weight[:, None] + new_weight[:, None] * shown_v[None, :]
    total = total * old_weight + new_weight
    top = new_top

    out_ptr += b * out_strides[0] + kv_head * group_size * out_strides[1]
    if SPLITS == 1:
        value = value / gl.where(total == 0, 1.0, total)[:, None]
        out_ptrs = out_ptr + r[:, None] * out_strides[1] + c[None, :]
        out_valid = (r < group_size)[:, None] & (c >= 0)[None, :]
        gl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=out_valid)
    else:
        partial_ptr += batch_head.to(gl.int64) * (SPLITS * GROUP * D)
        stats_ptr += batch_head.to(gl.int64) * (SPLITS * GROUP * 2)
        gl.store(partial_ptr + (split * GROUP + r)[:, None] * D + c[None, :], value)
        gl.store(stats_ptr + split * GROUP * 2 + r, top)
        gl.store(stats_ptr + split * GROUP * 2 + GROUP + r, total)
        synchronize()
        arrived = gl.atomic_add(counter_ptr + batch_head, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            combine_splits(
                partial_ptr, stats_ptr, out_ptr, out_strides[1], group_size, D, GROUP, SPLITS
            )
            gl.store(counter_ptr + batch_head, 0)


def short_cache_attention(
    x: Inputs,
    rotation: Rotation,
    slots: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    *,
    scale: float,
    config: ShortCacheConfig,
    caches_ready: bool,
) -> bool:
    """Writes attention's output to `out` and the new key and value into the caches.

    False where there are no counters to be had (see `arrival`): then nothing was done.

    Args:
        x: what `short_cache_configs.takes`.
        slots: (B,), the position of each sequence.
        attn_mask: boolean, (B, H, 1, L).
        caches_ready: the kernel launched last did not write the caches, and the one launched next
            may start before this one has waited.
    """
    query, key_cache = x.query, x.key_cache
    batch, num_heads, _, head_dim = query.shape
    num_kv_heads, length = key_cache.shape[1:3]
    group_size = num_heads // num_kv_heads
    group = max(4, next_power_of_2(group_size))
    groups = batch * num_kv_heads
    how = cut(length, config)
    one_mask_row = attn_mask is None or has_one_row(attn_mask, group_size)
    partial = stats = counters = None
    with hardware.guard(query):
        if how.splits > 1:
            counters = arrival_counters(groups, query.device)
            if counters is None:
                return False
            rows = groups * how.splits * group
            partial = torch.empty(rows * head_dim, dtype=torch.float32, device=query.device)
            stats = partial.new_empty(rows * 2)
        short_cache_attention_kernel[(groups, how.splits)](
            query, x.key, x.value, rotation.cos, rotation.sin, slots, key_cache, x.value_cache,
            attn_mask, out, partial, stats, counters,
            query.stride(), x.key.stride(), x.value.stride(), rotation.cos.stride(),
            rotation.sin.stride(), slots.stride(0), key_cache.stride(), x.value_cache.stride(),
            (0, 0, 0, 1) if attn_mask is None else attn_mask.stride(), out.stride(),
            scale * LOG2E, num_kv_heads, group_size, length,
            D=head_dim, GROUP=group, NK=config.warp_keys, WARP_KEYS=how.warp_keys,
            TILES=how.tiles, STAGES=how.stages, SPLITS=how.splits, ROPE=rotation.kind,
            ROTARY=rotation.width, MASK_ROWS=1 if one_mask_row else group, EARLY=caches_ready,
            num_warps=config.num_warps, **launch_options(hardware.of(query.device)),
        )  # fmt: skip
    return True
