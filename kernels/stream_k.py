"""Stream-K: who computes which steps of which tiles, and how the sums of a tile come together.

With STREAM_K the tiles that would leave a wave half empty are not given out whole. LANES programs,
which compute neighbouring rows of tiles at the same time and so read the same of `b` together, are
a worker, and each worker takes an equal run of the (tile, step of K)s, which begins and ends in the
middle of tiles:

    worker      0              1              2
    steps       |──────────────|──────────────|──────────────|
    tiles       |         |         |         |         |    …

Who has a tile's first steps owns it. The others write their sums to a workspace, one tile a
program, since only a run's first tile can begin elsewhere, and set a flag. The owner's copying
warp, when it has brought the operands of all its steps, waits for the flags and brings the sums by
the same ring: what holds 64 columns of `a`, 16 bits each, holds 32 of sums in fp32. They are added
in the order of the steps: the same bits in each run. An owner waits only for programs with lower
ids, whose first deed of the run is that tile: they started before it, and wait for none. A flag has
one writer and one reader, who sets it back to zero.

With HALVES two programs share each tile, neighbours, one half of the steps each: of the two groups
of warps each keeps the rows of one, and gives its sums of the other's, so that giving and taking go
on at the same time. Who gives multiplies all that is left in the ring first, and its sums are on
their way while the other does. The programs wait for each other; since blocks start in the order of
their ids, at most one of a launch waits for one that has not started, and that is the next to
start.

Measured on an H200, bf16, µs, by the ring and by loads of the warps that multiply, each of which
waits for the one before: 256 × 57344 × 8192 330 and 360, 512 × 10240 × 8192 116 and 122, 512 × 2560
× 10240 46 and 49.

Reference: "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on
the GPU" (arXiv 2301.03598).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from triton_only_backend.kernels.gemm import grouped_tile
from triton_only_backend.kernels.gemm_configs import HOPPER_CONSUMERS
from triton_only_backend.kernels.tma_ring import advance, load_tile, seen_as, synchronize

# Warpgroups that multiply.
CONSUMERS = gl.constexpr(HOPPER_CONSUMERS)
# Of sums on their way, four neighbours a thread.
_SUMS = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0]))


@gluon.constexpr_function
def layout_of_piece(WIDTH):
    """How the accumulators have so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])


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
    """How many tiles, or halves, a program works on by itself, and the run of steps that it has of
    the others."""
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
def item_at(
    i, count, begin, end, whole, lanes, steps, STREAM_K: gl.constexpr, HALVES: gl.constexpr
):
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
    if HALVES:
        # `tile` is that of halves so far, of which a program has one. Were it not written as if
        # there were more, LLVM would move the epilogue's addresses to before the loop, and spill.
        is_first = tile % 2 == 0
        first = gl.where(is_first, 0, steps // 2)
        last = gl.where(is_first, steps // 2, steps)
        tile = tile // 2
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
def offsets_of(LINES: gl.constexpr):
    """Where a piece's elements lie in the workspace, as `store_partial` sees it."""
    offs_m = gl.arange(0, LINES, layout=gl.SliceLayout(1, _SUMS))
    offs_n = gl.arange(0, 512, layout=gl.SliceLayout(0, _SUMS))
    return offs_m[:, None] * 512 + offs_n[None, :]


@gluon.jit
def store_partial(x, partial_ptr):
    """Writes a piece so that each thread's elements are neighbours, by four: 16 bytes a store.

    A thread has, of 64 rows and 8 columns, 2 columns of each of two rows that are 8 apart.
    """
    ROWS: gl.constexpr = x.shape[0]
    LINES: gl.constexpr = x.numel // 512
    x = x.reshape([ROWS // 64, 4, 2, 8, x.shape[1] // 8, 4, 2]).permute(0, 4, 1, 3, 5, 2, 6)
    x = gl.convert_layout(x.reshape([LINES, 512]), _SUMS, assert_trivial=True)
    gl.store(partial_ptr + offsets_of(LINES), x)


@gluon.jit
def order_with_copies():
    """Orders the writes to global memory that a thread knows of before what it, or who is told of
    them, has the copy engine read."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def give(pieces, partial_ptr, flag_ptr, TO_COPIES: gl.constexpr):
    """Writes a program's sums that another adds to its own, and then its flag.

    TO_COPIES: the copy engine reads them.
    """
    for i in gl.static_range(len(pieces)):
        store_partial(pieces[i], partial_ptr + i * pieces[i].numel)
    if TO_COPIES:
        order_with_copies()
    synchronize()  # thread 0's release is of all threads' writes
    gl.atomic_xchg(flag_ptr, 1, sem="release", scope="gpu")


@gluon.jit
def take_flag(flag_ptr):
    """Waits until a flag is set, and sets it back."""
    seen = gl.atomic_cas(flag_ptr, 1, 0, sem="acquire", scope="gpu")
    while seen == 0:
        seen = gl.atomic_cas(flag_ptr, 1, 0, sem="acquire", scope="gpu")


@gluon.jit
def copy_sums(
    others, lanes, partial_desc, flags_ptr, a_ring, full, empty, slot, phase,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings the sums that `others` have of a tile, 32 columns a slot; the ring's new state."""
    PARTS: gl.constexpr = BLOCK_N // 32
    as_copied: gl.constexpr = gl.NVMMASharedLayout(0, 32, 2)
    mine = gl.program_id(0) * CONSUMERS
    for n in range(1, others + 1):
        for c in gl.static_range(CONSUMERS):
            take_flag(flags_ptr + (mine - n * lanes * CONSUMERS + c))
    order_with_copies()
    for part in range(PARTS):
        for n in range(1, others + 1):
            arrived = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(arrived, CONSUMERS * ROWS * 128)
            for c in gl.static_range(CONSUMERS):
                theirs = mine - n * lanes * CONSUMERS + c
                row = (theirs * PARTS + part) * (ROWS // 8)
                buffer = a_ring.index(slot * CONSUMERS + c)
                buffer = seen_as(buffer, gl.float32, [ROWS // 8, 256], as_copied)
                load_tile(partial_desc, [row, 0], arrived, buffer)
            slot, phase = advance(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def take_sums(
    others, a_ring, full, empty, slot, phase,
    INDEX: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sum of what a slot holds over `others`, in their order; and the ring's state."""
    linear: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    total = gl.zeros([ROWS // 16, 512], gl.float32, _SUMS)
    for _ in range(others):
        mbarrier.wait(full.index(slot), phase)
        buffer = a_ring.index(slot * CONSUMERS + INDEX)
        total += seen_as(buffer, gl.float32, [ROWS // 16, 512], linear).load(_SUMS)
        # What this thread reads must not meet what is copied there next: without the fence sums
        # of 304 × 1352 × 712 were wrong in 227 of 300 launches on an H200.
        fence_async_shared()
        mbarrier.arrive(empty.index(slot))
        slot, phase = advance(slot, phase, STAGES)
    return total, slot, phase


@gluon.jit
def as_piece(x, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """What `store_partial` wrote, as the accumulators have it; no thread moves anything."""
    x = x.reshape([ROWS // 64, WIDTH // 8, 4, 8, 4, 2, 2]).permute(0, 2, 5, 3, 1, 4, 6)
    return gl.convert_layout(x.reshape([ROWS, WIDTH]), layout_of_piece(WIDTH), assert_trivial=True)


@gluon.jit
def take_piece(
    others, a_ring, full, empty, slot, phase,
    INDEX: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sums of a piece of 32 or 64 columns over `others`; and the ring's state."""
    x, slot, phase = take_sums(others, a_ring, full, empty, slot, phase, INDEX, ROWS, STAGES)
    if WIDTH == 64:
        more, slot, phase = take_sums(others, a_ring, full, empty, slot, phase, INDEX, ROWS, STAGES)
        x = gl.join(x, more).permute(2, 0, 1)
    return as_piece(x, ROWS, WIDTH), slot, phase


@gluon.jit
def add_other_half(pieces, partial_ptr, flag_ptr):
    """Waits for the sums that the program with a tile's other half has given, and adds them."""
    ROWS: gl.constexpr = pieces[0].shape[0]
    WIDTH: gl.constexpr = pieces[0].shape[1]
    LINES: gl.constexpr = pieces[0].numel // 512
    take_flag(flag_ptr)
    sums: gl.tuple = ()
    for i in gl.static_range(len(pieces)):
        other = gl.load(partial_ptr + i * pieces[i].numel + offsets_of(LINES))
        sums += (pieces[i] + as_piece(other, ROWS, WIDTH),)
    return sums
