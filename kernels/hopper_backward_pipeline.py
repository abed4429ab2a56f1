"""The parts of a block of `flash_attention_backward_hopper`, which meet in shared memory.

A warp loads, one waits for turns, one passes them on; two groups of four warps sum dK and dV, and a
third sums dQ. Between them lie, each with barriers for full and empty: the ring of queries, STAGES
tiles of Q, dO and statistics; two tiles of dS, (keys, queries); two turns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma as mma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait as mma_wait

from triton_only_backend.kernels import hopper_backward_configs as configs
from triton_only_backend.kernels.hopper_backward_tiles import (
    first_tile,
    last_turn,
    next_tile,
    plus_tile,
    publish_count,
    put_tile,
    rounded,
    wait_for_count,
)
from triton_only_backend.kernels.tma_ring import (
    advance,
    load_tile,
    slot_before,
    store_tile,
    synchronize,
)

BLOCK_M = gl.constexpr(configs.BLOCK_M)
BLOCK_N = gl.constexpr(configs.BLOCK_N)
GROUP_KEYS = gl.constexpr(configs.GROUP_KEYS)
STAGES = gl.constexpr(configs.STAGES)
COLUMNS = gl.constexpr(64)  # of dQ that are summed at a time: as many as there are registers for
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def load_tiles(arguments, IS_CAUSAL: gl.constexpr):
    """The loading warp: keys and values, then queries in the order in which groups read them."""
    (
        q_desc, do_desc, k_desc, v_desc, stats_desc, k_smem, v_smem, q_smem, do_smem, stats_smem,
        kv_full, full, empty, start_n, part, query_tiles, parts_of_batch, group_size, splits,
    ) = arguments  # fmt: skip
    b = part // parts_of_batch
    part_of_batch = part % parts_of_batch
    kv_h = part_of_batch // splits
    mbarrier.expect(kv_full, 4 * k_desc.block_type.nbytes)
    for group in gl.static_range(2):
        row = start_n + group * GROUP_KEYS
        load_tile(k_desc, [b, kv_h, row, 0], kv_full, k_smem.index(group))
        load_tile(v_desc, [b, kv_h, row, 0], kv_full, v_smem.index(group))
    first = first_tile(start_n, query_tiles, IS_CAUSAL)
    head = part_of_batch * group_size
    tile = query_tiles - 1
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    for _ in range(group_size * (query_tiles - first)):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(
            full.index(stage), 2 * q_desc.block_type.nbytes + 2 * stats_desc.block_type.nbytes
        )
        row = tile * BLOCK_M
        statistics = ((b * parts_of_batch * group_size + head) * query_tiles + tile) * 2
        load_tile(q_desc, [b, head, row, 0], full.index(stage), q_smem.index(stage))
        load_tile(stats_desc, [statistics, 0], full.index(stage), stats_smem.index(2 * stage))
        load_tile(
            stats_desc, [statistics + 1, 0], full.index(stage), stats_smem.index(2 * stage + 1)
        )
        load_tile(do_desc, [b, head, row, 0], full.index(stage), do_smem.index(stage))
        stage, phase = advance(stage, phase, STAGES)
        head, tile = next_tile(head, tile, first, query_tiles)


@gluon.jit
def wait_for_turns(arguments, IS_CAUSAL: gl.constexpr):
    """The warp that waits until it is this block's turn to add to a tile of dQ, two tiles ahead."""
    turns_ptr, turn_come, turn_free, start_n, part, query_tiles, group_size = arguments
    turn = start_n // BLOCK_N
    first = first_tile(start_n, query_tiles, IS_CAUSAL)
    head = part * group_size
    tile = query_tiles - 1
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    for _ in range(group_size * (query_tiles - first)):
        mbarrier.wait(turn_free.index(slot), phase)
        wait_for_count(turns_ptr + (head * query_tiles + tile), turn)
        mbarrier.arrive(turn_come.index(slot))
        slot, phase = advance(slot, phase, 2)
        head, tile = next_tile(head, tile, first, query_tiles)


@gluon.jit
def pass_turns(arguments, IS_CAUSAL: gl.constexpr):
    """The warp that says whose turn is next, when this block has added to a tile of dQ."""
    (
        turns_ptr, turn_done, turn_free, start_n, part, query_tiles, key_tiles, group_size,
    ) = arguments  # fmt: skip
    turn = start_n // BLOCK_N
    first = first_tile(start_n, query_tiles, IS_CAUSAL)
    head = part * group_size
    tile = query_tiles - 1
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for _ in range(group_size * (query_tiles - first)):
        mbarrier.wait(turn_done.index(slot), phase)
        mbarrier.arrive(turn_free.index(slot))
        if turn != last_turn(tile, query_tiles, key_tiles, IS_CAUSAL):
            publish_count(turns_ptr + (head * query_tiles + tile), turn + 1)
        slot, phase = advance(slot, phase, 2)
        head, tile = next_tile(head, tile, first, query_tiles)


@gluon.jit
def differentiate_queries(arguments, IS_CAUSAL: gl.constexpr):
    """The group that sums dQ, 64 columns at a time, and adds it in its turn.

    What it adds to lies in memory; the block whose turn is last writes the result instead.
    """
    (
        sums_ptr, dq_desc, k_smem, ds_smem, dq_smem, kv_full, ds_full, ds_empty, turn_come,
        turn_done, start_n, part, query_tiles, key_tiles, parts_of_batch, group_size, scale,
    ) = arguments  # fmt: skip
    BLOCK_D: gl.constexpr = k_smem.shape[4]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    scale = gl.cast(scale, gl.float32)
    k_first = k_smem.index(0).reshape([GROUP_KEYS, BLOCK_D])
    k_second = k_smem.index(1).reshape([GROUP_KEYS, BLOCK_D])
    out = dq_smem.index(0).reshape([BLOCK_M, BLOCK_D])
    no_sums = gl.zeros([BLOCK_M, COLUMNS], gl.float32, LAYOUT)
    b = part // parts_of_batch
    turn = start_n // BLOCK_N
    first = first_tile(start_n, query_tiles, IS_CAUSAL)
    head = part * group_size
    tile = query_tiles - 1
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    mbarrier.wait(kv_full, 0)
    for _ in range(group_size * (query_tiles - first)):
        is_last = turn == last_turn(tile, query_tiles, key_tiles, IS_CAUSAL)
        tile_ptr = sums_ptr + (head.to(gl.int64) * query_tiles + tile) * (BLOCK_M * BLOCK_D)
        ds_first = ds_smem.index(slot).slice(0, GROUP_KEYS, 0).permute((1, 0))
        ds_second = ds_smem.index(slot).slice(GROUP_KEYS, GROUP_KEYS, 0).permute((1, 0))
        mbarrier.wait(ds_full.index(slot), phase)
        for column in gl.static_range(0, BLOCK_D, COLUMNS):
            token = mma(
                ds_first, k_first.slice(column, COLUMNS, 1), no_sums, use_acc=False, is_async=True
            )
            token = mma(ds_second, k_second.slice(column, COLUMNS, 1), token, is_async=True)
            dq = mma_wait(0, deps=[token])
            if column + COLUMNS == BLOCK_D:
                mbarrier.arrive(ds_empty.index(slot))
            if column == 0:
                mbarrier.wait(turn_come.index(slot), phase)
            columns_ptr = tile_ptr + column * BLOCK_M
            if is_last:
                if turn > 0:
                    dq = plus_tile(columns_ptr, dq)
                if column == 0:
                    tma.store_wait(0)
                out.slice(column, COLUMNS, 1).store((dq * scale).to(out.dtype))
            elif turn == 0:
                put_tile("st.relaxed.gpu.global.v4.f32", columns_ptr, dq)
            else:
                put_tile("red.relaxed.gpu.global.add.v4.f32", columns_ptr, dq)
        if is_last:
            fence_async_shared()
            h = head - b * parts_of_batch * group_size
            store_tile(dq_desc, [b, h, tile * BLOCK_M, 0], dq_smem.index(0))
        synchronize()
        mbarrier.arrive(turn_done.index(slot))
        slot, phase = advance(slot, phase, 2)
        head, tile = next_tile(head, tile, first, query_tiles)
    tma.store_wait(0)


@gluon.jit
def hide(p, first_key, first_query, len_kv, IS_CAUSAL: gl.constexpr, EVEN_N: gl.constexpr):
    """Probabilities (keys, queries) with 0 where a query does not see a key."""
    keys = first_key + gl.arange(0, GROUP_KEYS, gl.SliceLayout(1, p.type.layout))
    if IS_CAUSAL:
        queries = first_query + gl.arange(0, BLOCK_M, gl.SliceLayout(0, p.type.layout))
        p = gl.where(keys[:, None] <= queries[None, :], p, 0.0)
    if not EVEN_N:
        p = gl.where((keys < len_kv)[:, None], p, 0.0)
    return p


@gluon.jit
def write_gradient(desc, gradient, smem, b, kv_h, first_key):
    """Writes a group's rows of dK or dV through its place in shared memory."""
    smem.reshape(gradient.shape).store(gradient.to(smem.dtype))
    fence_async_shared()
    store_tile(desc, [b, kv_h, first_key, 0], smem)
    tma.store_wait(0)


@gluon.jit
def differentiate_keys(
    arguments, results, GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr,
    EVEN_N: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """A group that sums dK and dV of 64 keys, over all queries, and hands dS on."""
    (
        k_smem, v_smem, q_smem, do_smem, stats_smem, ds_smem, kv_full, full, empty, ds_full,
        ds_empty, start_n, part, query_tiles, parts_of_batch, group_size, len_kv, scale,
    ) = arguments  # fmt: skip
    BLOCK_D: gl.constexpr = k_smem.shape[4]
    dtype: gl.constexpr = k_smem.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    scale = gl.cast(scale, gl.float32)
    qk_scale = scale * LOG2E
    first_key = start_n + GROUP * GROUP_KEYS
    k = k_smem.index(GROUP).reshape([GROUP_KEYS, BLOCK_D])
    v = v_smem.index(GROUP).reshape([GROUP_KEYS, BLOCK_D])
    first = first_tile(start_n, query_tiles, IS_CAUSAL)
    steps = group_size * (query_tiles - first)
    tile = query_tiles - 1
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    slot = gl.to_tensor(0)
    slot_phase = gl.to_tensor(1)
    no_scores = gl.zeros([GROUP_KEYS, BLOCK_M], gl.float32, S_LAYOUT)
    dk = gl.zeros([GROUP_KEYS, BLOCK_D], gl.float32, LAYOUT)
    dv = gl.zeros([GROUP_KEYS, BLOCK_D], gl.float32, LAYOUT)
    ds_smem.index(1).slice(GROUP * GROUP_KEYS, GROUP_KEYS, 0).store(
        gl.zeros([GROUP_KEYS, BLOCK_M], dtype, S_LAYOUT)
    )
    fence_async_shared()
    synchronize()
    mbarrier.wait(kv_full, 0)
    for count in range(steps):
        q = q_smem.index(stage).reshape([BLOCK_M, BLOCK_D])
        grad_out = do_smem.index(stage).reshape([BLOCK_M, BLOCK_D])
        before = gl.where(count == 0, stage, slot_before(stage, STAGES))
        q_before = q_smem.index(before).reshape([BLOCK_M, BLOCK_D])
        mbarrier.wait(full.index(stage), phase)
        s_token = mma(k, q.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        dk_token = mma(
            ds_smem.index(slot ^ 1).slice(GROUP * GROUP_KEYS, GROUP_KEYS, 0),
            q_before,
            dk,
            is_async=True,
        )
        scores = mma_wait(1, deps=[s_token])
        minus_lse2 = stats_smem.index(2 * stage).reshape([BLOCK_M]).load(QUERIES)
        p = gl.exp2(gl.fma(scores, qk_scale, minus_lse2[None, :]))
        if IS_CAUSAL or not EVEN_N:
            masked = False
            if IS_CAUSAL:
                masked = tile * BLOCK_M < first_key + GROUP_KEYS
            if not EVEN_N:
                masked = masked | (first_key + GROUP_KEYS > len_kv)
            if masked:
                p = hide(p, first_key, tile * BLOCK_M, len_kv, IS_CAUSAL, EVEN_N)
        p = rounded(p, dtype)
        # Passed already: the end of a basic block, beyond which ptxas does not move the rounding.
        mbarrier.wait(full.index(stage), phase)
        dk = mma_wait(0, deps=[dk_token])
        mbarrier.arrive(empty.index(before), pred=count > 0)
        dv_token = mma(gl.convert_layout(p, OPERAND), grad_out, dv, is_async=True)
        dp_token = mma(v, grad_out.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        dp, dv = mma_wait(0, deps=[dp_token, dv_token])
        delta = stats_smem.index(2 * stage + 1).reshape([BLOCK_M]).load(QUERIES)
        ds = p.to(gl.float32) * (dp - delta[None, :])
        mbarrier.wait(ds_empty.index(slot), slot_phase)
        ds_smem.index(slot).slice(GROUP * GROUP_KEYS, GROUP_KEYS, 0).store(rounded(ds, dtype))
        # Before the products read ds, and before the statistics' slot is filled anew.
        fence_async_shared()
        synchronize()
        mbarrier.arrive(ds_full.index(slot))
        stage, phase = advance(stage, phase, STAGES)
        slot, slot_phase = advance(slot, slot_phase, 2)
        tile = gl.where(tile == first, query_tiles - 1, tile - 1)
    q_last = q_smem.index(slot_before(stage, STAGES)).reshape([BLOCK_M, BLOCK_D])
    dk_token = mma(
        ds_smem.index(slot ^ 1).slice(GROUP * GROUP_KEYS, GROUP_KEYS, 0), q_last, dk, is_async=True
    )
    dk = mma_wait(0, deps=[dk_token])
    if SPLIT:
        dk_sums_ptr, dv_sums_ptr = results
        key_tiles = gl.cdiv(len_kv, BLOCK_N)
        place = (part.to(gl.int64) * key_tiles * 2 + first_key // GROUP_KEYS) * GROUP_KEYS
        put_tile("st.relaxed.gpu.global.v4.f32", dk_sums_ptr + place * BLOCK_D, dk)
        put_tile("st.relaxed.gpu.global.v4.f32", dv_sums_ptr + place * BLOCK_D, dv)
    else:
        dk_desc, dv_desc = results
        b = part // parts_of_batch
        kv_h = part % parts_of_batch
        # Only this group reads its values, and has done with them.
        write_gradient(dv_desc, dv, v_smem.index(GROUP), b, kv_h, first_key)
        write_gradient(dk_desc, dk * scale, v_smem.index(GROUP), b, kv_h, first_key)
