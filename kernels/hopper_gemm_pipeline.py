"""The parts of a block of `gemm_hopper`, which meet in shared memory: who copies, who multiplies.

`full[s]` says that a ring slot has arrived, `empty[s]` that both who multiply have read it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from triton_only_backend.kernels.dependent_launch import release_dependents, wait_for_producers
from triton_only_backend.kernels.epilogue import apply_epilogue, load_bias
from triton_only_backend.kernels.stream_k import (
    CONSUMERS,
    add_other_half,
    copy_sums,
    give,
    item_at,
    items_of,
    layout_of_piece,
    others_of,
    place_of,
    take_piece,
)
from triton_only_backend.kernels.tma_ring import advance, load_tile, slot_before, store_tile
from triton_only_backend.kernels.wide_mma import columns_of_box, multiply_pieces, wait_for_pieces


@gluon.constexpr_function
def piece_of(BLOCK_N):
    """The columns of a tile that are written at a time."""
    return 64 if BLOCK_N % 64 == 0 else 32


@gluon.constexpr_function
def box_of(BLOCK_N, K_MAJOR):
    """The columns of a tile that are copied at a time: a power of two, 128 or 64 bytes where they
    lie side by side."""
    return BLOCK_N & -BLOCK_N if K_MAJOR else columns_of_box(BLOCK_N)


@gluon.constexpr_function
def boxes_of(BLOCK_N, K_MAJOR):
    """How many boxes a tile's columns take."""
    return BLOCK_N // box_of(BLOCK_N, K_MAJOR)


@gluon.jit
def copy_box(desc, matrix, row, k, arrived, buffer, K_MAJOR: gl.constexpr):
    if K_MAJOR:
        load_tile(desc, [matrix, row, k], arrived, buffer)
    else:
        load_tile(desc, [matrix, k, row], arrived, buffer)


@gluon.jit
def expect_step(full, slot, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr):
    """Says how much is to arrive in a slot."""
    mbarrier.expect(full.index(slot), (BLOCK_M + BLOCK_N) * BLOCK_K * 2)


@gluon.jit
def copy_a(desc, ring, full, slot, matrix, pid_m, k, BLOCK_M: gl.constexpr, K_MAJOR: gl.constexpr):
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    for c in gl.static_range(CONSUMERS):
        buffer = ring.index(slot * CONSUMERS + c)
        copy_box(desc, matrix, pid_m * BLOCK_M + c * ROWS, k, full.index(slot), buffer, K_MAJOR)


@gluon.jit
def copy_b(desc, ring, full, slot, matrix, pid_n, k, BLOCK_N: gl.constexpr, K_MAJOR: gl.constexpr):
    BOX: gl.constexpr = box_of(BLOCK_N, K_MAJOR)
    BOXES: gl.constexpr = boxes_of(BLOCK_N, K_MAJOR)
    for i in gl.static_range(BOXES):
        buffer = ring.index(slot * BOXES + i)
        copy_box(desc, matrix, pid_n * BLOCK_N + i * BOX, k, full.index(slot), buffer, K_MAJOR)


@gluon.jit
def copy(
    a_desc, b_desc, a_ring, b_ring, full, empty, partial_desc, flags_ptr,
    batch, M, N, steps, whole, lanes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr,
    STREAM_K: gl.constexpr, HALVES: gl.constexpr, EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The partition of the warp that copies; with EARLY it does not wait before it fills the ring
    with `b`."""
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    grid_m = gl.cdiv(M, BLOCK_M)
    grid_n = gl.cdiv(N, BLOCK_N)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)  # a new barrier's wait for parity 1 returns: every slot begins empty
    tiles = batch * grid_m * grid_n
    count, begin, end = items_of(tiles, whole, lanes, steps, STREAM_K)
    filled = gl.to_tensor(0)
    if EARLY:
        tile, first, last = item_at(0, count, begin, end, whole, lanes, steps, STREAM_K, HALVES)
        matrix, pid_m, pid_n = place_of(tile, grid_m, grid_n, GROUP_M)
        filled = gl.minimum(last - first, STAGES)
        for i in range(0, filled):
            expect_step(full, i, BLOCK_M, BLOCK_N, BLOCK_K)
            k = (first + i) * BLOCK_K
            copy_b(b_desc, b_ring, full, i, matrix, pid_n, k, BLOCK_N, B_K_MAJOR)
    wait_for_producers(PDL)
    for i in range(0, count + gl.cdiv(end, steps) - begin // steps):
        tile, first, last = item_at(i, count, begin, end, whole, lanes, steps, STREAM_K, HALVES)
        matrix, pid_m, pid_n = place_of(tile, grid_m, grid_n, GROUP_M)
        for step in range(first, last):
            k = step * BLOCK_K
            mbarrier.wait(empty.index(slot), phase)
            if not EARLY or filled == 0:
                expect_step(full, slot, BLOCK_M, BLOCK_N, BLOCK_K)
            copy_a(a_desc, a_ring, full, slot, matrix, pid_m, k, BLOCK_M, A_K_MAJOR)
            if not EARLY or filled == 0:
                copy_b(b_desc, b_ring, full, slot, matrix, pid_n, k, BLOCK_N, B_K_MAJOR)
            if EARLY:
                filled = gl.maximum(filled - 1, 0)
            slot, phase = advance(slot, phase, STAGES)
        if STREAM_K:
            others = gl.where(first > 0, 0, others_of(tile, last, tiles, whole, lanes, steps))
            slot, phase = copy_sums(
                others, lanes, partial_desc, flags_ptr, a_ring, full, empty, slot, phase,
                ROWS, BLOCK_N, STAGES,
            )  # fmt: skip
    release_dependents(PDL)


@gluon.jit
def zero_pieces(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """An accumulator of (ROWS, COLUMNS), as a tuple of what is written at a time."""
    WIDTH: gl.constexpr = piece_of(COLUMNS)
    layout: gl.constexpr = layout_of_piece(WIDTH)
    pieces: gl.tuple = ()
    for _ in gl.static_range(COLUMNS // WIDTH):
        pieces += (gl.zeros([ROWS, WIDTH], gl.float32, layout),)
    return pieces


@gluon.constexpr_function
def behind_last_use(i, PIECES, BUFFERS):
    """How many stores are behind the last of the buffer that a tile's i-th piece takes, at least:
    in its first round that was in the tile before, whose last round may not have taken all."""
    return BUFFERS - 1 if i >= BUFFERS else (PIECES - 1) % BUFFERS


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
    layout: gl.constexpr = layout_of_piece(WIDTH)
    for i in gl.static_range(len(pieces)):
        x = pieces[i]
        if STREAM_K:
            sums, slot, phase = take_piece(
                others, a_ring, full, empty, slot, phase, INDEX, ROWS, WIDTH, STAGES
            )
            x += sums
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
        tma.store_wait(pendings=behind_last_use(i, len(pieces), BUFFERS))
        buffer.reshape([ROWS, WIDTH]).store(x.to(c_desc.dtype))
        fence_async_shared()
        store_tile(c_desc, [matrix, row, start], buffer)
    return slot, phase


@gluon.jit
def multiply(
    INDEX: gl.constexpr, a_ring, a_address, b_address, full, empty, turns, c_desc, staging,
    bias_ptr, workspace_ptr, flags_ptr, batch, M, N, steps, whole, lanes,
    stride_sb, stride_sm, stride_sn, alpha, beta, epilogue,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, BUFFERS: gl.constexpr, A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_OPERANDS: gl.constexpr, ACTIVATION: gl.constexpr,
    STREAM_K: gl.constexpr, HALVES: gl.constexpr, ALTERNATE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The partition of the warpgroup that has a tile's INDEX-th rows.

    With ALTERNATE the ring must hold all of a tile: a slot is free when both have had their turn.
    """
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    grid_m = gl.cdiv(M, BLOCK_M)
    grid_n = gl.cdiv(N, BLOCK_N)
    tiles = batch * grid_m * grid_n
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    turn = gl.to_tensor(1 - INDEX)  # the first may multiply at once
    mine = gl.program_id(0) * CONSUMERS + INDEX
    partial_ptr = workspace_ptr
    flag_ptr = flags_ptr
    if HALVES:
        # What is kept is the other program's to give.
        mine = gl.where(gl.program_id(0) % 2 == INDEX, mine ^ CONSUMERS, mine)
    if STREAM_K or HALVES:
        partial_ptr += mine.to(gl.int64) * (ROWS * BLOCK_N)
        flag_ptr += mine
    wait_for_producers(PDL)
    count, begin, end = items_of(tiles, whole, lanes, steps, STREAM_K)
    for i in range(0, count + gl.cdiv(end, steps) - begin // steps):
        tile, first, last = item_at(i, count, begin, end, whole, lanes, steps, STREAM_K, HALVES)
        matrix, pid_m, pid_n = place_of(tile, grid_m, grid_n, GROUP_M)
        row = pid_m * BLOCK_M + INDEX * ROWS
        column = pid_n * BLOCK_N
        pieces = zero_pieces(ROWS, BLOCK_N)
        keeps = True
        if ALTERNATE:
            mbarrier.wait(turns.index(INDEX), turn)
            turn ^= 1
        if HALVES:
            keeps = gl.program_id(0) % 2 == INDEX
            # The slot before this step's is not free yet, so one less than all.
            rest = gl.maximum(last - (STAGES - 1), first)
        for step in range(first, last):
            if HALVES:
                mbarrier.wait(turns.index(INDEX), 0, pred=keeps & (step == rest))
            mbarrier.wait(full.index(slot), phase)
            pieces = multiply_pieces(
                pieces, a_address + (slot * CONSUMERS + INDEX) * (ROWS * BLOCK_K * 2),
                b_address + slot * (BLOCK_N * BLOCK_K * 2), a_ring.dtype, BLOCK_K, A_K_MAJOR,
                B_K_MAJOR,
            )  # fmt: skip
            # The step before has been multiplied: its slot may be filled again.
            pieces = wait_for_pieces(pieces, 1)
            mbarrier.arrive(empty.index(slot_before(slot, STAGES)), pred=step > first)
            slot, phase = advance(slot, phase, STAGES)
        if HALVES:
            mbarrier.arrive(turns.index(1 - INDEX), pred=keeps == 0)
        pieces = wait_for_pieces(pieces, 0)
        mbarrier.arrive(empty.index(slot_before(slot, STAGES)))
        if ALTERNATE:
            mbarrier.arrive(turns.index(1 - INDEX))
        others = 0
        if STREAM_K:
            others = others_of(tile, last, tiles, whole, lanes, steps)
            keeps = first == 0
        if keeps:
            sums = pieces
            if HALVES:
                sums = add_other_half(pieces, partial_ptr, flag_ptr)
            slot, phase = write(
                sums, matrix, row, column, others, a_ring, full, empty, slot, phase, c_desc,
                staging, bias_ptr, M, N, stride_sb, stride_sm, stride_sn, alpha, beta, epilogue,
                INDEX, STAGES, BUFFERS, HAS_BIAS, HAS_OPERANDS, ACTIVATION, STREAM_K,
            )  # fmt: skip
        elif STREAM_K or HALVES:
            give(pieces, partial_ptr, flag_ptr, STREAM_K)
    tma.store_wait(pendings=0)
