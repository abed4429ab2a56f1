"""Warp-specialised persistent matrix product for 16-bit operands on Hopper, in Gluon.

    out[b, m, n] = epilogue(alpha · Σ_k a[b, m, k] · b[b, k, n]  +  beta · bias[b, m, n])

One warp copies tiles of both operands to a ring in shared memory (TMA); two warpgroups multiply
(wgmma), one step of K always in flight, and each writes its own rows of the result through a small
staging buffer (TMA again). The copying warp runs ahead into the next tile while a result is
written. `full[s]` says that a ring slot has arrived, `empty[s]` that both have read it.

Tensors' sides are powers of two, so 192 columns are two accumulators of 128 and 64, that share the
slot of `a`; 160 are 128 and 32, and 96 are 64 and 32. What bounds a tile: 64 × n × 16
multiplications take n / 2 cycles, in which shared memory moves 64 · n bytes; two consumers'
operands are 2048 + 32 · n each such step, and what is copied comes on top. By that 128 × 256 is
just even, smaller tiles are bound by shared memory.

Of few steps a tile's result takes as long to write as to compute. With ALTERNATE the consumers take
turns: one multiplies while the other writes, instead of both doing the same at the same time.

With STREAM_K the tiles that would leave a wave half empty are not given out whole. LANES programs,
which compute neighbouring rows of tiles at the same time and so read the same of `b` together, are
a worker, and each worker takes an equal run of the (tile, step of K)s, which begins and ends in the
middle of tiles:

    worker      0              1              2
    steps       |──────────────|──────────────|──────────────|
    tiles       |         |         |         |         |    …

Who has a tile's first steps owns it. The others write their sums to a workspace, one tile a
program, since only a run's first tile can begin elsewhere, and set a flag; the owner, when it has
multiplied, waits for the flags, and adds in the order of the steps: the same bits in each run. An
owner waits only for programs with lower ids, whose first deed of the run is that tile: they started
before it, and wait for none. A flag has one writer and one reader, who sets it back to zero.

Reference: "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on
the GPU" (arXiv 2301.03598); the pipeline is that of Triton's Gluon tutorials 07 and 08.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_only_backend.kernels.arrival import arrival_counters
from triton_only_backend.kernels.dependent_launch import (
    launch_options,
    release_dependents,
    wait_for_producers,
)
from triton_only_backend.kernels.epilogue import (
    NO_EPILOGUE,
    Epilogue,
    apply_epilogue,
    bias_strides,
    load_bias,
)
from triton_only_backend.kernels.flash_attention import tma_strides
from triton_only_backend.kernels.gemm import grouped_tile
from triton_only_backend.kernels.gemm_configs import HOPPER_CONSUMERS, shares
from triton_only_backend.kernels.tma_ring import (
    advance,
    load_tile,
    slot_before,
    store_tile,
    synchronize,
)

if TYPE_CHECKING:
    from triton_only_backend.kernels.gemm_configs import GemmConfig
    from triton_only_backend.kernels.hardware import Hardware

# Warpgroups that multiply.
CONSUMERS = gl.constexpr(HOPPER_CONSUMERS)
# Columns that are written at a time, of tiles whose columns it divides.
PIECE = gl.constexpr(64)


@gluon.constexpr_function
def first_columns(BLOCK_N):
    """The columns of a tile's first accumulator."""
    return 1 << (BLOCK_N.bit_length() - 1)


@gluon.constexpr_function
def piece_of(BLOCK_N):
    """The columns of a tile that are written at a time."""
    return PIECE.value if BLOCK_N % PIECE.value == 0 else PIECE.value // 2


@gluon.jit
def run_start(worker, total, workers):
    """The first of a worker's share of `total` steps: the first workers have one more."""
    return worker * (total // workers) + gl.minimum(worker, total % workers)


@gluon.jit
def first_run_behind(step, total, workers):
    """The first worker whose run starts at a step or behind it."""
    share = total // workers
    longer = total % workers
    among_longer = gl.cdiv(step, share + 1)
    behind_them = longer + gl.cdiv(step - longer * (share + 1), share)
    return gl.where(step <= longer * (share + 1), among_longer, behind_them)


@gluon.jit
def items_of(tiles, whole, lanes, steps, STREAM_K: gl.constexpr):
    """How many tiles a program works on whole, and the run of steps that it has of the others."""
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    begin = gl.to_tensor(0)
    end = gl.to_tensor(0)
    if STREAM_K:
        workers = programs // lanes
        worker = workers - 1 - pid // lanes
        total = (tiles - whole) // lanes * steps
        begin = run_start(worker, total, workers)
        end = run_start(worker + 1, total, workers)
    return gl.cdiv(whole - pid, programs), begin, end


@gluon.jit
def item_at(i, count, begin, end, whole, lanes, steps, STREAM_K: gl.constexpr):
    """A program's i-th tile, and which of its steps are this program's."""
    tile = gl.program_id(0) + i * gl.num_programs(0)
    first = gl.to_tensor(0)
    last = steps
    if STREAM_K:
        divided = i >= count
        unit = begin // steps + i - count
        tile = gl.where(divided, whole + unit * lanes + gl.program_id(0) % lanes, tile)
        first = gl.where(divided, gl.maximum(begin - unit * steps, 0), 0)
        last = gl.where(divided, gl.minimum(end - unit * steps, steps), steps)
    return tile, first, last


@gluon.jit
def others_of(tile, last, tiles, whole, lanes, steps):
    """How many workers have what is left of a tile, of which this program has the first steps."""
    workers = gl.num_programs(0) // lanes
    worker = workers - 1 - gl.program_id(0) // lanes
    total = (tiles - whole) // lanes * steps
    tile_end = ((tile - whole) // lanes + 1) * steps
    behind = first_run_behind(tile_end, total, workers)
    return gl.where(last < steps, behind - 1 - worker, 0)


@gluon.jit
def place_of(tile, grid_m, grid_n, GROUP_M: gl.constexpr):
    """The matrix of the batch that a tile is in, and its coordinates there."""
    each = grid_m * grid_n
    pid_m, pid_n = grouped_tile(tile % each, grid_m, grid_n, GROUP_M)
    return tile // each, pid_m, pid_n


@gluon.jit
def copy(
    a_desc, b_desc, more_desc, a_ring, b_ring, more_ring, full, empty, batch, M, N,
    steps, whole, lanes,
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
    count, begin, end = items_of(batch * grid_m * grid_n, whole, lanes, steps, STREAM_K)
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
def offsets_of(ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Where a piece's elements lie in the workspace, as `store_partial` sees it."""
    offs_m = gl.arange(0, ROWS * PIECE // 512, layout=gl.SliceLayout(1, LAYOUT))
    offs_n = gl.arange(0, 512, layout=gl.SliceLayout(0, LAYOUT))
    return offs_m[:, None] * 512 + offs_n[None, :]


@gluon.jit
def store_partial(x, partial_ptr):
    """Writes a piece so that each thread's elements are neighbours, by four: 16 bytes a store.

    A thread has, of 64 rows and 8 columns, 2 columns of each of two rows that are 8 apart.
    """
    ROWS: gl.constexpr = x.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    x = x.reshape([ROWS // 64, 4, 2, 8, PIECE // 8, 4, 2]).permute(0, 4, 1, 3, 5, 2, 6)
    x = gl.convert_layout(x.reshape([ROWS * PIECE // 512, 512]), layout, assert_trivial=True)
    gl.store(partial_ptr + offsets_of(ROWS, layout), x)


@gluon.jit
def load_partial(partial_ptr, ROWS: gl.constexpr):
    """What `store_partial` wrote; past the L1 cache, which others' writes do not reach."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    x = gl.load(partial_ptr + offsets_of(ROWS, layout), cache_modifier=".cg")
    x = x.reshape([ROWS // 64, PIECE // 8, 4, 8, 4, 2, 2]).permute(0, 2, 5, 3, 1, 4, 6)
    of_piece: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    return gl.convert_layout(x.reshape([ROWS, PIECE]), of_piece, assert_trivial=True)


@gluon.jit
def give(pieces, partial_ptr, flag_ptr):
    """Writes a program's sums of a tile that it does not own, and then its flag."""
    for i in gl.static_range(len(pieces)):
        store_partial(pieces[i], partial_ptr + i * (pieces[i].shape[0] * PIECE))
    synchronize()  # thread 0's release is of all threads' writes
    gl.atomic_xchg(flag_ptr, 1, sem="release", scope="gpu")


@gluon.jit
def take_flag(flag_ptr):
    """Waits until a flag is set, and sets it back."""
    seen = gl.atomic_cas(flag_ptr, 1, 0, sem="acquire", scope="gpu")
    while seen == 0:
        seen = gl.atomic_cas(flag_ptr, 1, 0, sem="acquire", scope="gpu")


@gluon.jit
def write(
    pieces, matrix, row, column, others, lanes, c_desc, staging, bias_ptr, partial_ptr, flag_ptr,
    M, N, stride_sb, stride_sm, stride_sn, alpha, beta, epilogue,
    INDEX: gl.constexpr, BUFFERS: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_OPERANDS: gl.constexpr, ACTIVATION: gl.constexpr, STREAM_K: gl.constexpr,
):  # fmt: skip
    """Adds the sums of `others` to a tile's, applies the epilogue, and writes it piece by piece."""
    ROWS: gl.constexpr = pieces[0].shape[0]
    WIDTH: gl.constexpr = pieces[0].shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    stride = lanes * (CONSUMERS * ROWS * WIDTH * len(pieces))  # to the next worker's sums
    if STREAM_K:
        for n in range(1, others + 1):
            take_flag(flag_ptr - n * lanes * CONSUMERS)
    for i in gl.static_range(len(pieces)):
        x = pieces[i]
        if STREAM_K:
            theirs = partial_ptr + i * (ROWS * WIDTH)
            for n in range(1, others + 1):
                x += load_partial(theirs - n * stride, ROWS)
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
                write(
                    pieces, matrix, row, column, others, lanes, c_desc, staging, bias_ptr,
                    partial_ptr, flag_ptr, M, N, stride_sb, stride_sm, stride_sn, alpha, beta,
                    epilogue, INDEX, BUFFERS, HAS_BIAS, HAS_OPERANDS, ACTIVATION, STREAM_K,
                )  # fmt: skip
        else:
            write(
                pieces, matrix, row, column, 0, lanes, c_desc, staging, bias_ptr, partial_ptr,
                flag_ptr, M, N, stride_sb, stride_sm, stride_sn, alpha, beta, epilogue,
                INDEX, BUFFERS, HAS_BIAS, HAS_OPERANDS, ACTIVATION, STREAM_K,
            )  # fmt: skip
    tma.store_wait(pendings=0)


@gluon.jit
def consume(INDEX: gl.constexpr, work):
    multiply(INDEX, *work)


@gluon.jit
def produce(copies):
    copy(*copies)


@gluon.jit
def specialize(work, copies):
    """Starts those who multiply with `work`, and the warp that copies with `copies`.

    As arguments, since an assigned tuple's constants would become values. Of 384 threads' 168
    registers each, a thread that multiplies has 232: with 24 left, one that copies would spill.
    """
    gl.warp_specialize(
        [(consume, (0, work)), (consume, (1, work)), (produce, (copies,))],
        [4, 1],
        [232, 40],
    )


@gluon.jit
def slots_of(desc, COUNT: gl.constexpr):
    """Shared memory for some of a descriptor's tiles."""
    shape: gl.constexpr = [COUNT] + desc.block_type.shape  # noqa: RUF005
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


# Sizes differ from call to call, and no address is computed from them.
@gluon.jit(do_not_specialize=["batch", "M", "N", "steps", "whole", "lanes"])
def gemm_hopper_kernel(
    a_desc, b_desc, more_desc, c_desc, bias_ptr, workspace_ptr, flags_ptr,
    batch, M, N, steps, whole, lanes, stride_sb, stride_sm, stride_sn, alpha, beta, epilogue,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, BUFFERS: gl.constexpr, A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_OPERANDS: gl.constexpr, ACTIVATION: gl.constexpr,
    STREAM_K: gl.constexpr, ALTERNATE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    a_ring = slots_of(a_desc, STAGES * CONSUMERS)
    b_ring = slots_of(b_desc, STAGES)
    if more_desc is None:
        more_ring: gl.constexpr = None
    else:
        more_ring = slots_of(more_desc, STAGES)
    staging = slots_of(c_desc, CONSUMERS * BUFFERS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    specialize(
        (
            a_ring, b_ring, more_ring, full, empty, turns, c_desc, staging, bias_ptr,
            workspace_ptr, flags_ptr, batch, M, N, steps, whole, lanes,
            stride_sb, stride_sm, stride_sn, alpha, beta, epilogue,
            BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, BUFFERS, A_K_MAJOR, B_K_MAJOR,
            HAS_BIAS, HAS_OPERANDS, ACTIVATION, STREAM_K, ALTERNATE, PDL,
        ),
        (
            a_desc, b_desc, more_desc, a_ring, b_ring, more_ring, full, empty,
            batch, M, N, steps, whole, lanes, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M,
            A_K_MAJOR, B_K_MAJOR, STREAM_K, PDL,
        ),
    )  # fmt: skip


def _descriptor(matrices: torch.Tensor, rows: int, block_k: int) -> tuple[TensorDescriptor, bool]:
    """A descriptor of a (B, rows, K) operand's tiles, and whether they are contiguous along K."""
    if matrices.stride(2) == 1:
        return _tiles_of(matrices, rows, block_k), True
    return _tiles_of(matrices.mT, block_k, rows), False


def _tiles_of(matrices: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    block = [1, rows, columns]
    # 16-bit elements, all of them; the layout needs only their width.
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(matrices, list(matrices.shape), tma_strides(matrices), block, layout)


def staged_pieces(config: GemmConfig, shared_memory: int) -> int:
    """Pieces of a consumer's result that fit beside the ring; they divide a tile's.

    Else a tile's first piece would go to where one of the last ones may still be read from.
    """
    slot = (config.block_m + config.block_n) * config.block_k * 2
    room = shared_memory - config.num_stages * slot - 1024
    width = piece_of(config.block_n)
    most = room // (config.block_m * width * 2)
    pieces = config.block_n // width
    return max(n for n in range(1, pieces + 1) if pieces % n == 0 and (n <= most or n == 1))


def gemm_hopper(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    config: GemmConfig,
    device: Hardware,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Writes epilogue(alpha · a @ b + beta · bias) to `out`.

    Args:
        a: (B, M, K), fp16 or bf16; of M and K one with stride 1, the other strides positive
            multiples of 16 bytes, and so the address.
        b: (B, K, N), a's dtype, likewise.
        bias: (B, M, N), any strides (0 where it broadcasts), or None.
        out: (B, M, N), fp16 or bf16, as a, and contiguous along N.
        alpha: factor of the product.
        beta: factor of the bias.
        config: the tile and the ring, and whether the last tiles are divided.
        device: where.
        epilogue: what follows; with operands only for B = 1.
    """
    batch, M, K = a.shape
    N = b.shape[2]
    rows = config.block_m // HOPPER_CONSUMERS
    columns = first_columns(config.block_n)
    more_columns = config.block_n - columns
    a_desc, a_k_major = _descriptor(a, rows, config.block_k)
    b_desc, b_k_major = _descriptor(b.mT, columns, config.block_k)
    more_desc = None
    if more_columns > 0:
        more_desc, _ = _descriptor(b.mT, more_columns, config.block_k)
    share = shares(batch, M, N, K, config, device.num_sms)
    flags = workspace = None
    if share.divided:
        flags = arrival_counters(share.programs * HOPPER_CONSUMERS, out.device)
    if flags is None:
        share = shares(batch, M, N, K, replace(config, stream_k=False), device.num_sms)
    else:
        sums = share.programs * config.block_m * config.block_n
        workspace = torch.empty(sums, dtype=torch.float32, device=out.device)
    gemm_hopper_kernel[(share.programs,)](
        a_desc, b_desc, more_desc, _tiles_of(out, rows, piece_of(config.block_n)),
        a if bias is None else bias, workspace, flags,
        batch, M, N, triton.cdiv(K, config.block_k), share.whole, share.lanes,
        *bias_strides(bias),
        float(alpha), float(beta), epilogue.arguments,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        STAGES=config.num_stages, GROUP_M=config.group_m,
        BUFFERS=staged_pieces(config, device.shared_memory),
        A_K_MAJOR=a_k_major, B_K_MAJOR=b_k_major,
        HAS_BIAS=bias is not None, HAS_OPERANDS=len(epilogue.tensors) > 0,
        ACTIVATION=epilogue.activation, STREAM_K=flags is not None,
        ALTERNATE=config.alternate and triton.cdiv(K, config.block_k) <= config.num_stages,
        num_warps=4,  # of the first partition
        **launch_options(device),
    )  # fmt: skip
