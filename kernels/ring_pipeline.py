"""The parts of a block of `ring_linear`, which meet in shared memory: who copies, who multiplies.

`full[s]` says that a ring slot has arrived, `empty[s]` that it has been multiplied.
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
from triton_only_backend.kernels.tma_ring import advance, load_tile, seen_as


@gluon.jit
def copy_weights(
    weight_descs, columns, tile, step, ring, slot, arrived,
    FOLD: gl.constexpr, BOXES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Asks for a tile's two boxes at a step: one of each weight, or two neighbours along K."""
    TILE: gl.constexpr = 64 // FOLD
    if GATED:
        for i in gl.static_range(2):
            load_tile(
                weight_descs[i], [step * FOLD, tile * TILE, 0], arrived, ring.index(slot * 2 + i)
            )
    else:
        first = 0
        for i in gl.static_range(len(weight_descs)):
            tiles = gl.cdiv(columns[i], TILE)
            if tile >= first and tile < first + tiles:
                for j in gl.static_range(2):
                    load_tile(
                        weight_descs[i], [(step * BOXES + j) * FOLD, (tile - first) * TILE, 0],
                        arrived, ring.index(slot * 2 + j),
                    )  # fmt: skip
            first += tiles


@gluon.jit
def copy_x(x_desc, step, x_ring, slot, arrived, FOLD: gl.constexpr, BOXES: gl.constexpr):
    for j in gl.static_range(BOXES):
        box = x_ring.index(slot * BOXES + j)
        load_tile(x_desc, [(step * BOXES + j) * FOLD, 0, 0], arrived, box)


@gluon.jit
def copy(
    x_desc, weight_descs, columns, tiles, steps, ring, x_ring, full, empty,
    FOLD: gl.constexpr, BOXES: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
    GATED: gl.constexpr, HAS_X: gl.constexpr, EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The copying warp. HAS_X: x comes with the weights; else the consumers have all of it."""
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    total = gl.cdiv(tiles - pid, programs) * steps
    filled = gl.minimum(total, STAGES)
    if not EARLY:
        wait_for_producers(PDL)
    tile = pid
    step = 0
    for i in range(0, filled):
        mbarrier.expect(full.index(i), BYTES)
        copy_weights(weight_descs, columns, tile, step, ring, i, full.index(i), FOLD, BOXES, GATED)
        step += 1
        if step == steps:
            step = 0
            tile += programs
    if EARLY:
        wait_for_producers(PDL)
    if HAS_X:
        for i in range(0, filled):
            copy_x(x_desc, i % steps, x_ring, i, full.index(i), FOLD, BOXES)
    for i in range(filled, total):
        slot = i % STAGES
        arrived = full.index(slot)
        mbarrier.wait(empty.index(slot), (i // STAGES - 1) & 1)
        mbarrier.expect(arrived, BYTES)
        copy_weights(weight_descs, columns, tile, step, ring, slot, arrived, FOLD, BOXES, GATED)
        if HAS_X:
            copy_x(x_desc, step, x_ring, slot, arrived, FOLD, BOXES)
        step += 1
        if step == steps:
            step = 0
            tile += programs


@gluon.jit
def normalise(
    x_ptr, norm_ptr, x_boxes, M, K: gl.constexpr, stride_m, norm_eps, norm_offset,
    ROWS: gl.constexpr, CHUNK: gl.constexpr, RUN: gl.constexpr, EARLY: gl.constexpr,
    PDL: gl.constexpr,
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
    TILE: gl.constexpr = 64 // FOLD
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    buffer.store(acc)
    runs = seen_as(buffer, gl.float32, [FOLD, TILE, FOLD * ROWS], plain)
    total = runs.index(0).slice(0, ROWS, dim=1).load(layout)
    for j in gl.static_range(1, FOLD):
        total += runs.index(j).slice(j * ROWS, ROWS, dim=1).load(layout)
    return total


@gluon.jit
def write_tile(
    values, biases, out_ptr, tile, M, N, epilogue,
    ROWS: gl.constexpr, TILE: gl.constexpr, ACTIVATION: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    offs_m = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
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
def multiply(
    x_ptr, norm_ptr, biases, outs, columns, tiles, steps, M, K: gl.constexpr, stride_m,
    norm_eps, norm_offset, epilogue, ring, x_ring, buffers, full, empty,
    ROWS: gl.constexpr, FOLD: gl.constexpr, BOXES: gl.constexpr, STAGES: gl.constexpr,
    CHUNK: gl.constexpr, RUN: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The multiplying warps."""
    MATRICES: gl.constexpr = 2 if GATED else 1
    TILE: gl.constexpr = 64 // FOLD
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FOLD * ROWS, 16])
    out_layout: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [4, 1], [0, 1])
    if norm_ptr is not None:
        flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        dtype: gl.constexpr = x_ring.dtype
        x_boxes = seen_as(x_ring, dtype, [K // CHUNK, CHUNK // RUN * ROWS, RUN], flat)
        normalise(
            x_ptr, norm_ptr, x_boxes, M, K, stride_m, norm_eps, norm_offset,
            ROWS, CHUNK, RUN, EARLY, PDL,
        )  # fmt: skip
    else:
        wait_for_producers(PDL)
    release_dependents(PDL)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        accs: gl.tuple = ()
        for _ in gl.static_range(MATRICES):
            accs += (gl.zeros([64, FOLD * ROWS], gl.float32, acc_layout),)
        for step in range(0, steps):
            mbarrier.wait(full.index(slot), phase)
            running: gl.tuple = ()
            for i in gl.static_range(MATRICES):
                acc = accs[i]
                for j in gl.static_range(BOXES):
                    x = x_ring.index((slot if norm_ptr is None else step) * BOXES + j)
                    weight = ring.index(slot * 2 + (i if GATED else j))
                    acc = warpgroup_mma(weight, x.permute((1, 0)), acc, is_async=True)
                running += (acc,)
            accs = ()
            for i in gl.static_range(MATRICES):
                accs += (warpgroup_mma_wait(0, deps=[running[i]]),)
            mbarrier.arrive(empty.index(slot))
            slot, phase = advance(slot, phase, STAGES)

        values: gl.tuple = ()
        for i in gl.static_range(MATRICES):
            values += (collect(accs[i], buffers.index(i), FOLD, ROWS, out_layout),)
        if GATED:
            write_tile(
                values, biases, outs[0], tile, M, columns[0], epilogue,
                ROWS, TILE, ACTIVATION, out_layout,
            )  # fmt: skip
        else:
            first = 0
            for i in gl.static_range(len(outs)):
                count = gl.cdiv(columns[i], TILE)
                if tile >= first and tile < first + count:
                    write_tile(
                        values, None if biases is None else (biases[i],), outs[i], tile - first,
                        M, columns[i], epilogue, ROWS, TILE, ACTIVATION, out_layout,
                    )  # fmt: skip
                first += count
