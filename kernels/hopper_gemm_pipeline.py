"""The parts of a block of `gemm_hopper`, which meet in shared memory: who copies, who multiplies.

`full[s]` says that a ring slot has arrived, `empty[s]` that both who multiply have read it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_only_backend.kernels.dependent_launch import release_dependents, wait_for_producers
from triton_only_backend.kernels.epilogue import apply_epilogue, load_bias
from triton_only_backend.kernels.stream_k import (
    CONSUMERS,
    PIECE,
    copy_sums,
    give,
    item_at,
    items_of,
    others_of,
    piece_of_sums,
    place_of,
    take_sums,
)
from triton_only_backend.kernels.tma_ring import advance, load_tile, slot_before, store_tile


@gluon.constexpr_function
def first_columns(BLOCK_N):
    """The columns of a tile's first accumulator."""
    return 1 << (BLOCK_N.bit_length() - 1)


@gluon.constexpr_function
def piece_of(BLOCK_N):
    """The columns of a tile that are written at a time."""
    return PIECE.value if BLOCK_N % PIECE.value == 0 else PIECE.value // 2


@gluon.jit
def copy(
    a_desc, b_desc, more_desc, a_ring, b_ring, more_ring, full, empty, partial_desc,
    flags_ptr, batch, M, N, steps, whole, lanes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr,
    STREAM_K: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The partition of the warp that copies."""
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    COLUMNS: gl.constexpr = first_columns(BLOCK_N)
    wait_for_producers(PDL)
    grid_m = gl.cdiv(M, BLOCK_M)
    grid_n = gl.cdiv(N, BLOCK_N)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)  # a new barrier's wait for parity 1 returns: every slot begins empty
    tiles = batch * grid_m * grid_n
    count, begin, end = items_of(tiles, whole, lanes, steps, STREAM_K)
    for i in range(0, count + gl.cdiv(end, steps) - begin // steps):
        tile, first, last = item_at(i, count, begin, end, whole, lanes, steps, STREAM_K)
        matrix, pid_m, pid_n = place_of(tile, grid_m, grid_n, GROUP_M)
        row = pid_m * BLOCK_M
        column = pid_n * BLOCK_N
        for step in range(first, last):
            k = step * BLOCK_K
            arrived = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(arrived, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            for c in gl.static_range(CONSUMERS):
                buffer = a_ring.index(slot * CONSUMERS + c)
                if A_K_MAJOR:
                    load_tile(a_desc, [matrix, row + c * ROWS, k], arrived, buffer)
                else:
                    load_tile(a_desc, [matrix, k, row + c * ROWS], arrived, buffer)
            if B_K_MAJOR:
                load_tile(b_desc, [matrix, column, k], arrived, b_ring.index(slot))
            else:
                load_tile(b_desc, [matrix, k, column], arrived, b_ring.index(slot))
            if COLUMNS < BLOCK_N:
                if B_K_MAJOR:
                    load_tile(
                        more_desc, [matrix, column + COLUMNS, k], arrived, more_ring.index(slot)
                    )
                else:
                    load_tile(
                        more_desc, [matrix, k, column + COLUMNS], arrived, more_ring.index(slot)
                    )
            slot, phase = advance(slot, phase, STAGES)
        if STREAM_K:
            others = gl.where(first > 0, 0, others_of(tile, last, tiles, whole, lanes, steps))
            slot, phase = copy_sums(
                others, lanes, partial_desc, flags_ptr, a_ring, full, empty, slot, phase,
                ROWS, BLOCK_N, STAGES,
            )  # fmt: skip
    release_dependents(PDL)


@gluon.jit
def operand_of(slot, AS_IT_LIES: gl.constexpr):
    """What wgmma takes of a ring's slot (1, rows, columns): that, or its transpose."""
    x = slot.reshape([slot.shape[1], slot.shape[2]])
    if not AS_IT_LIES:
        x = x.permute((1, 0))
    return x


@gluon.jit
def pieces_of(acc, WIDTH: gl.constexpr):
    """A tile's columns, WIDTH at a time, as a tuple; no thread moves anything."""
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    if COLUMNS == WIDTH:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
        pieces = (gl.convert_layout(acc, layout, assert_trivial=True),)
    else:
        left, right = acc.reshape([ROWS, 2, COLUMNS // 2]).permute(0, 2, 1).split()
        pieces = pieces_of(left, WIDTH) + pieces_of(right, WIDTH)
    return pieces


@gluon.jit
def write(
    pieces, matrix, row, column, others, a_ring, full, empty, slot, phase, c_desc, staging,
    bias_ptr, M, N, stride_sb, stride_sm, stride_sn, alpha, beta, epilogue,
    INDEX: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_OPERANDS: gl.constexpr, ACTIVATION: gl.constexpr, STREAM_K: gl.constexpr,
):  # fmt: skip
    """Adds the sums of `others` to a tile's, applies the epilogue, and writes it piece by piece.

    Returns the ring's state, by which the sums come.
    """
    ROWS: gl.constexpr = pieces[0].shape[0]
    WIDTH: gl.constexpr = pieces[0].shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    for i in gl.static_range(len(pieces)):
        x = pieces[i]
        if STREAM_K:
            first, slot, phase = take_sums(
                others, a_ring, full, empty, slot, phase, INDEX, ROWS, STAGES
            )
            second, slot, phase = take_sums(
                others, a_ring, full, empty, slot, phase, INDEX, ROWS, STAGES
            )
            x += piece_of_sums(first, second, ROWS)
        x *= gl.cast(alpha, gl.float32)
        start = column + i * WIDTH
        if HAS_BIAS or HAS_OPERANDS:
            offs_m = row.to(gl.int64) + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
            offs_n = start.to(gl.int64) + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
            mask_m = offs_m < M
            mask_n = offs_n < N
        if HAS_BIAS:
            bias_ptrs = bias_ptr + matrix.to(gl.int64) * stride_sb
            bias = load_bias(bias_ptrs, offs_m, offs_n, mask_m, mask_n, stride_sm, stride_sn)
            x += gl.cast(beta, gl.float32) * bias
        if HAS_OPERANDS:
            mask = mask_m[:, None] & mask_n[None, :]
            x = apply_epilogue(x, offs_m[:, None], offs_n[None, :], mask, epilogue, ACTIVATION)
        else:
            x = apply_epilogue(x, 0, 0, None, epilogue, ACTIVATION)
        buffer = staging.index(INDEX * BUFFERS + i % BUFFERS)
        # What was written from this buffer last has been read from it.
        tma.store_wait(pendings=BUFFERS - 1)
        buffer.reshape([ROWS, WIDTH]).store(x.to(c_desc.dtype))
        fence_async_shared()
        store_tile(c_desc, [matrix, row, start], buffer)
    return slot, phase


@gluon.jit
def multiply(
    INDEX: gl.constexpr, a_ring, b_ring, more_ring, full, empty, turns, c_desc, staging, bias_ptr,
    workspace_ptr, flags_ptr, batch, M, N, steps, whole, lanes, stride_sb, stride_sm, stride_sn,
    alpha, beta, epilogue,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, BUFFERS: gl.constexpr, A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_OPERANDS: gl.constexpr, ACTIVATION: gl.constexpr,
    STREAM_K: gl.constexpr, ALTERNATE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The partition of the warpgroup that has a tile's INDEX-th rows.

    With ALTERNATE the ring must hold all of a tile: a slot is free when both have had their turn.
    """
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    COLUMNS: gl.constexpr = first_columns(BLOCK_N)
    MORE: gl.constexpr = BLOCK_N - COLUMNS
    WIDTH: gl.constexpr = piece_of(BLOCK_N)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    grid_m = gl.cdiv(M, BLOCK_M)
    grid_n = gl.cdiv(N, BLOCK_N)
    tiles = batch * grid_m * grid_n
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    turn = gl.to_tensor(1 - INDEX)  # the first may multiply at once
    mine = gl.program_id(0) * CONSUMERS + INDEX
    partial_ptr = workspace_ptr
    flag_ptr = flags_ptr
    if STREAM_K:
        partial_ptr += mine.to(gl.int64) * (ROWS * BLOCK_N)
        flag_ptr += mine
    wait_for_producers(PDL)
    count, begin, end = items_of(tiles, whole, lanes, steps, STREAM_K)
    for i in range(0, count + gl.cdiv(end, steps) - begin // steps):
        tile, first, last = item_at(i, count, begin, end, whole, lanes, steps, STREAM_K)
        matrix, pid_m, pid_n = place_of(tile, grid_m, grid_n, GROUP_M)
        row = pid_m * BLOCK_M + INDEX * ROWS
        column = pid_n * BLOCK_N
        acc = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        if MORE > 0:
            more_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MORE, 16])
            more = gl.zeros([ROWS, MORE], gl.float32, more_layout)
        if ALTERNATE:
            mbarrier.wait(turns.index(INDEX), turn)
            turn ^= 1
        for step in range(first, last):
            mbarrier.wait(full.index(slot), phase)
            a = operand_of(a_ring.index(slot * CONSUMERS + INDEX), A_K_MAJOR)
            b = operand_of(b_ring.index(slot), not B_K_MAJOR)
            acc = warpgroup_mma(a, b, acc, is_async=True)
            # The step before has been multiplied: its slot may be filled again.
            if MORE > 0:
                b = operand_of(more_ring.index(slot), not B_K_MAJOR)
                more = warpgroup_mma(a, b, more, is_async=True)
                acc, more = warpgroup_mma_wait(num_outstanding=2, deps=[acc, more])
            else:
                acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
            mbarrier.arrive(empty.index(slot_before(slot, STAGES)), pred=step > first)
            slot, phase = advance(slot, phase, STAGES)
        if MORE > 0:
            acc, more = warpgroup_mma_wait(num_outstanding=0, deps=[acc, more])
            pieces = pieces_of(acc, WIDTH) + pieces_of(more, WIDTH)
        else:
            pieces = pieces_of(warpgroup_mma_wait(num_outstanding=0, deps=[acc]), WIDTH)
        mbarrier.arrive(empty.index(slot_before(slot, STAGES)))
        if ALTERNATE:
            mbarrier.arrive(turns.index(1 - INDEX))
        if STREAM_K:
            others = others_of(tile, last, tiles, whole, lanes, steps)
            if first > 0:
                give(pieces, partial_ptr, flag_ptr)
            else:
                slot, phase = write(
                    pieces, matrix, row, column, others, a_ring, full, empty, slot, phase, c_desc,
                    staging, bias_ptr, M, N, stride_sb, stride_sm, stride_sn, alpha, beta, epilogue,
                    INDEX, STAGES, BUFFERS, HAS_BIAS, HAS_OPERANDS, ACTIVATION, STREAM_K,
                )  # fmt: skip
        else:
            write(
                pieces, matrix, row, column, 0, a_ring, full, empty, slot, phase, c_desc, staging,
                bias_ptr, M, N, stride_sb, stride_sm, stride_sn, alpha, beta, epilogue,
                INDEX, STAGES, BUFFERS, HAS_BIAS, HAS_OPERANDS, ACTIVATION, STREAM_K,
            )  # fmt: skip
    tma.store_wait(pendings=0)
