"""The warps of `ring_linear` that multiply, and write; what they wait for is in `ring_copies`.

Which tiles, or parts of tiles, a program works on is in `ring_shares`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_only_backend.kernels.dependent_launch import release_dependents, wait_for_producers
from triton_only_backend.kernels.epilogue import activate, apply_epilogue
from triton_only_backend.kernels.ring_copies import RUN, matrices_of, runs_of
from triton_only_backend.kernels.ring_shares import (
    give,
    is_last_of,
    room_of,
    share_of,
    sharers_of,
    total_of,
)
from triton_only_backend.kernels.tma_ring import advance, seen_as, slot_before


@gluon.jit
def normalise(
    x_ptr, norm_ptr, x_boxes, M, K: gl.constexpr, stride_m, norm_eps, norm_offset,
    ROWS: gl.constexpr, CHUNK: gl.constexpr, EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Writes the normalised rows to shared memory, run by run of K, as they are multiplied."""
    LINES: gl.constexpr = CHUNK // RUN * ROWS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    line = gl.arange(0, LINES, gl.SliceLayout(1, layout))
    lane = gl.arange(0, RUN, gl.SliceLayout(0, layout))
    row = line % ROWS
    offs_k = (line // ROWS * RUN)[:, None] + lane[None, :]
    if not EARLY:
        wait_for_producers(PDL)
    gains: gl.tuple = ()
    for c in gl.static_range(K // CHUNK):
        gains += (gl.load(norm_ptr + c * CHUNK + offs_k),)
    if EARLY:
        wait_for_producers(PDL)
    x_ptrs = x_ptr + (row * stride_m)[:, None] + offs_k
    valid = (row < M)[:, None] & (lane >= 0)[None, :]
    xs: gl.tuple = ()
    for c in gl.static_range(K // CHUNK):
        xs += (gl.load(x_ptrs + c * CHUNK, mask=valid, other=0.0),)
    squares = gl.zeros([LINES, RUN], gl.float32, layout)
    for c in gl.static_range(K // CHUNK):
        x = xs[c].to(gl.float32)
        squares += x * x
    by_line = gl.sum(squares, axis=1)
    rstd = gl.zeros([LINES], gl.float32, gl.SliceLayout(1, layout))
    for r in gl.static_range(ROWS):
        total = gl.sum(gl.where(row == r, by_line, 0.0), axis=0)
        rstd = gl.where(row == r, gl.rsqrt(total / K + norm_eps), rstd)
    for c in gl.static_range(K // CHUNK):
        x = xs[c].to(gl.float32) * rstd[:, None] * (gains[c].to(gl.float32) + norm_offset)
        x_boxes.index(c).store(x.to(x_boxes.dtype))
    fence_async_shared()


@gluon.jit
def collect(acc, buffer, FOLD: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    """The sum of a product's blocks on the diagonal: (64, FOLD · ROWS) to (64 / FOLD, ROWS)."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    if FOLD == 1:
        total = gl.convert_layout(acc, layout)
    else:
        buffer.store(acc)
        runs = seen_as(buffer, gl.float32, [FOLD, 64 // FOLD, FOLD * ROWS], plain)
        total = runs.index(0).slice(0, ROWS, dim=1).load(layout)
        for j in gl.static_range(1, FOLD):
            total += runs.index(j).slice(j * ROWS, ROWS, dim=1).load(layout)
    return total


@gluon.jit
def write_tile(
    values, biases, out_ptr, first_row, tile, M, N, epilogue,
    ROWS: gl.constexpr, TILE: gl.constexpr, ACTIVATION: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    offs_m = first_row + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    offs_n = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, layout))
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_m < M)[None, :]
    if biases is not None:
        biased: gl.tuple = ()
        for i in gl.static_range(len(values)):
            bias = gl.load(biases[i] + offs_n, mask=mask_n, other=0.0)
            biased += (values[i] + bias.to(gl.float32)[:, None],)
        values = biased
    if len(values) == 2:
        result = activate(values[0], ACTIVATION) * values[1]
        result = apply_epilogue(result, offs_m[None, :], offs_n[:, None], mask, epilogue, "none")
    else:
        result = apply_epilogue(
            values[0], offs_m[None, :], offs_n[:, None], mask, epilogue, ACTIVATION
        )
    out_ptrs = out_ptr + offs_m.to(gl.int64)[None, :] * N + offs_n[:, None]
    gl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def computed_here(x):
    """An integer that LLVM takes for another each time: what is computed from it stays where it is,
    and its registers are not kept through the loop over K, which would spill."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.to_tensor(x)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def multiply(
    x_ptr, norm_ptr, biases, outs, columns, tiles, steps, M, K: gl.constexpr, stride_m,
    norm_eps, norm_offset, epilogue, workspace_ptr, counters_ptr, ring, x_ring, buffers, full,
    empty, ROWS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr,
    GATED: gl.constexpr, K_MAJOR: gl.constexpr, ACTIVATION: gl.constexpr, DIVIDED: gl.constexpr,
    EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The multiplying warps."""
    FOLD: gl.constexpr = runs_of(TILE)
    MATRICES: gl.constexpr = matrices_of(TILE, GATED)
    BOXES: gl.constexpr = 2 // MATRICES
    # Two products of a step each: with few rows they take so little time that a slot which is free
    # at once is worth more.
    OVERLAP: gl.constexpr = ROWS >= 32
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FOLD * ROWS, 16])
    out_layout: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [4, 1], [0, 1])
    if norm_ptr is not None:
        flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        dtype: gl.constexpr = x_ring.dtype
        x_boxes = seen_as(x_ring, dtype, [K // CHUNK, CHUNK // RUN * ROWS, RUN], flat)
        normalise(
            x_ptr, norm_ptr, x_boxes, M, K, stride_m, norm_eps, norm_offset,
            ROWS, CHUNK, EARLY, PDL,
        )  # fmt: skip
    else:
        wait_for_producers(PDL)
    release_dependents(PDL)
    slot = 0
    phase = 0
    tile, begin, left = share_of(tiles, steps, DIVIDED)
    while left > 0:
        end = gl.minimum(begin + left, steps)
        accs: gl.tuple = ()
        for _ in gl.static_range(MATRICES):
            accs += (gl.zeros([64, FOLD * ROWS], gl.float32, acc_layout),)
        for step in range(begin, end):
            mbarrier.wait(full.index(slot), phase)
            running: gl.tuple = ()
            for i in gl.static_range(MATRICES):
                acc = accs[i]
                for j in gl.static_range(BOXES):
                    x = x_ring.index((slot if norm_ptr is None else step) * BOXES + j)
                    weight = ring.index(slot * 2 + i * BOXES + j)
                    if not K_MAJOR:
                        weight = weight.permute((1, 0))
                    acc = warpgroup_mma(weight, x.permute((1, 0)), acc, is_async=True)
                running += (acc,)
            accs = ()
            for i in gl.static_range(MATRICES):
                accs += (warpgroup_mma_wait(2 if OVERLAP else 0, deps=[running[i]]),)
            if OVERLAP:
                # The step before has been multiplied.
                mbarrier.arrive(empty.index(slot_before(slot, STAGES)), pred=step > begin)
            else:
                mbarrier.arrive(empty.index(slot))
            slot, phase = advance(slot, phase, STAGES)
        if OVERLAP:
            finished: gl.tuple = ()
            for i in gl.static_range(MATRICES):
                finished += (warpgroup_mma_wait(0, deps=[accs[i]]),)
            accs = finished
            mbarrier.arrive(empty.index(slot_before(slot, STAGES)))

        if DIVIDED or TILE > 64:
            HEIGHT: gl.constexpr = TILE // MATRICES
            first_part = tile * MATRICES
            # Apart, so that nobody keeps sums for the other's sake.
            if end - begin == steps:
                for i in gl.static_range(MATRICES):
                    value = collect(accs[i], buffers.index(0), FOLD, ROWS, out_layout)
                    write_tile(
                        (value,), biases, outs[0], computed_here(0), first_part + i, M, columns[0],
                        epilogue, ROWS, HEIGHT, ACTIVATION, out_layout,
                    )  # fmt: skip
            elif DIVIDED:
                first, last = sharers_of(tile, tiles, steps)
                sharers = last - first + 1
                room_ptr = room_of(begin, MATRICES * HEIGHT * ROWS, workspace_ptr)
                for i in gl.static_range(MATRICES):
                    value = collect(accs[i], buffers.index(0), FOLD, ROWS, out_layout)
                    give(value, room_ptr + i * (HEIGHT * ROWS), out_layout)
                if is_last_of(sharers, counters_ptr + tile):
                    for i in gl.static_range(MATRICES):
                        total = total_of(
                            i, first, last, workspace_ptr, MATRICES, HEIGHT, ROWS, out_layout
                        )
                        write_tile(
                            (total,), biases, outs[0], computed_here(0), first_part + i, M,
                            columns[0], epilogue, ROWS, HEIGHT, ACTIVATION, out_layout,
                        )  # fmt: skip
        elif GATED:
            values: gl.tuple = ()
            for i in gl.static_range(2):
                values += (collect(accs[i], buffers.index(i), FOLD, ROWS, out_layout),)
            write_tile(
                values, biases, outs[0], 0, tile, M, columns[0], epilogue,
                ROWS, TILE, ACTIVATION, out_layout,
            )  # fmt: skip
        else:
            value = collect(accs[0], buffers.index(0), FOLD, ROWS, out_layout)
            first = 0
            for i in gl.static_range(len(outs)):
                count = gl.cdiv(columns[i], TILE)
                if tile >= first and tile < first + count:
                    write_tile(
                        (value,), None if biases is None else (biases[i],), outs[i], 0,
                        tile - first, M, columns[i], epilogue, ROWS, TILE, ACTIVATION, out_layout,
                    )  # fmt: skip
                first += count
        left -= end - begin
        tile += 1 if DIVIDED else gl.num_programs(0)
        begin = gl.to_tensor(0)
