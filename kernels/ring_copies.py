"""The warp of `ring_linear` that copies: which boxes of the operands a step has.

`full[s]` says that a ring slot has arrived, `empty[s]` that it has been multiplied.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from triton_only_backend.kernels.dependent_launch import wait_for_producers
from triton_only_backend.kernels.ring_shares import following, share_of
from triton_only_backend.kernels.tma_ring import load_tile

RUN = gl.constexpr(64)  # of K: 128 bytes, the swizzle of wgmma's operands


@gluon.constexpr_function
def runs_of(TILE):
    """How many runs of K lie above one another in wgmma's A, of so many rows of a weight."""
    return max(1, 64 // TILE)


@gluon.constexpr_function
def matrices_of(TILE, GATED):
    """Of the two A's of wgmma that a step has, how many are at the same K: of two weights, or of 64
    rows each; else they are neighbours along K."""
    return 2 if GATED or TILE == 128 else 1


@gluon.jit
def load_runs(desc, run, row, arrived, buffer, FOLD: gl.constexpr):
    """Asks for FOLD runs of K of as many rows as the descriptor `lines_of` has."""
    if FOLD == 1:
        load_tile(desc, [0, row, run * RUN], arrived, buffer)
    else:
        load_tile(desc, [run, row, 0], arrived, buffer)


@gluon.jit
def copy_weights(
    weight_descs, columns, tile, step, ring, slot, arrived,
    TILE: gl.constexpr, GATED: gl.constexpr, K_MAJOR: gl.constexpr,
):  # fmt: skip
    """Asks for a tile's two boxes at a step: one of each weight, or neighbours along N or K.

    Of one run alone the last may end behind K, and is filled up with zeros.
    """
    FOLD: gl.constexpr = runs_of(TILE)
    BOXES: gl.constexpr = 2 // matrices_of(TILE, GATED)
    if GATED:
        for i in gl.static_range(2):
            buffer = ring.index(slot * 2 + i)
            load_runs(weight_descs[i], step * FOLD, tile * TILE, arrived, buffer, FOLD)
    elif TILE > 64 or not K_MAJOR:
        for i in gl.static_range(2):
            run = step * BOXES + i % BOXES
            row = tile * TILE + i // BOXES * 64
            buffer = ring.index(slot * 2 + i)
            if K_MAJOR:
                load_runs(weight_descs[0], run, row, arrived, buffer, FOLD)
            else:
                load_tile(weight_descs[0], [0, run * RUN, row], arrived, buffer)
    else:
        first = 0
        for i in gl.static_range(len(weight_descs)):
            tiles = gl.cdiv(columns[i], TILE)
            if tile >= first and tile < first + tiles:
                for j in gl.static_range(2):
                    run, row = (step * BOXES + j) * FOLD, (tile - first) * TILE
                    load_runs(weight_descs[i], run, row, arrived, ring.index(slot * 2 + j), FOLD)
            first += tiles


@gluon.jit
def copy_x(x_desc, step, x_ring, slot, arrived, FOLD: gl.constexpr, BOXES: gl.constexpr):
    for j in gl.static_range(BOXES):
        box = x_ring.index(slot * BOXES + j)
        load_runs(x_desc, (step * BOXES + j) * FOLD, 0, arrived, box, FOLD)


@gluon.jit
def copy(
    x_desc, weight_descs, columns, tiles, steps, ring, x_ring, full, empty,
    TILE: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr, GATED: gl.constexpr,
    K_MAJOR: gl.constexpr, HAS_X: gl.constexpr, DIVIDED: gl.constexpr, EARLY: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The copying warp. HAS_X: x comes with the weights; else the consumers have all of it."""
    FOLD: gl.constexpr = runs_of(TILE)
    BOXES: gl.constexpr = 2 // matrices_of(TILE, GATED)
    start_tile, start, total = share_of(tiles, steps, DIVIDED)
    filled = gl.minimum(total, STAGES)
    if not EARLY:
        wait_for_producers(PDL)
    tile = start_tile
    step = start
    for i in range(0, filled):
        mbarrier.expect(full.index(i), BYTES)
        copy_weights(
            weight_descs, columns, tile, step, ring, i, full.index(i), TILE, GATED, K_MAJOR
        )
        tile, step = following(tile, step, steps, DIVIDED)
    if EARLY:
        wait_for_producers(PDL)
    if HAS_X:
        x_step = start
        for i in range(0, filled):
            copy_x(x_desc, x_step, x_ring, i, full.index(i), FOLD, BOXES)
            _, x_step = following(start_tile, x_step, steps, DIVIDED)
    for i in range(filled, total):
        slot = i % STAGES
        arrived = full.index(slot)
        mbarrier.wait(empty.index(slot), (i // STAGES - 1) & 1)
        mbarrier.expect(arrived, BYTES)
        copy_weights(weight_descs, columns, tile, step, ring, slot, arrived, TILE, GATED, K_MAJOR)
        if HAS_X:
            copy_x(x_desc, step, x_ring, slot, arrived, FOLD, BOXES)
        tile, step = following(tile, step, steps, DIVIDED)
