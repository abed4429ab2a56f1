"""Who computes which steps of which tiles of `ring_linear`, and how a tile's sums come together.

Whole tiles go round the programs: of P of them one has the tiles p, p + P, p + 2 P, … With DIVIDED
each has an equal run of all steps, tile after tile, which begins and ends in the middle of tiles:

    program     0              1              2
    steps       |──────────────|──────────────|──────────────|
    tiles       |         |         |         |         |    …

All programs then end at the same time, however many tiles there are. Runs that are a step longer
lie between the others, not all in front as in `stream_k`: of n programs for each tile each has an
n-th of one so, though n does not divide its steps. Those that share a tile write their sums to a
workspace, where a program has room for two, of the tile that it ends and of the one that it begins;
who finds all others done adds them in the order of K, the same bits in each run. Nobody waits for
anybody.

Reference: Stream-K (arXiv 2301.03598), with the reduction of split-K.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_only_backend.kernels.tma_ring import synchronize


@gluon.jit
def share_of(tiles, steps, DIVIDED: gl.constexpr):
    """A program's first tile and its step there, and how many steps it has."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    tile = program
    step = gl.to_tensor(0)
    count = gl.cdiv(tiles - program, programs) * steps
    if DIVIDED:
        begin = program * (tiles * steps) // programs
        tile = begin // steps
        step = begin % steps
        count = (program + 1) * (tiles * steps) // programs - begin
    return tile, step, count


@gluon.jit
def following(tile, step, steps, DIVIDED: gl.constexpr):
    """The tile and the step that a program copies next."""
    step += 1
    if step == steps:
        step = 0
        tile += 1 if DIVIDED else gl.num_programs(0)
    return tile, step


@gluon.jit
def program_with(step, total, programs):
    """Which of the programs has a step, of a product's `total`."""
    return gl.cdiv((step + 1) * programs, total) - 1


@gluon.jit
def sharers_of(tile, tiles, steps):
    """The first and the last program with steps of a tile, where tiles are divided."""
    total = tiles * steps
    first = program_with(tile * steps, total, gl.num_programs(0))
    return first, program_with(tile * steps + steps - 1, total, gl.num_programs(0))


@gluon.jit
def offsets_of_sums(TILE: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    offs_m = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    offs_n = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    return offs_m[None, :] * TILE + offs_n[:, None]


@gluon.jit
def room_of(begin, SIZE: gl.constexpr, workspace_ptr):
    """Where a program leaves its sums of a tile, from the step `begin` on.

    Its first room is for the tile that it ends, its second for the one that it begins.
    """
    room = gl.program_id(0) * 2 + (begin == 0).to(gl.int32)
    return workspace_ptr + room.to(gl.int64) * SIZE


@gluon.jit
def give(sums, room_ptr, layout: gl.constexpr):
    gl.store(room_ptr + offsets_of_sums(sums.shape[0], sums.shape[1], layout), sums)


@gluon.jit
def is_last_of(sharers, counter_ptr):
    """Says that a program's sums of a tile are in their room; whether all other sharers' are."""
    synchronize()  # thread 0's release is of all threads' writes
    is_last = gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == sharers - 1
    if is_last:
        gl.store(counter_ptr, 0)
    return is_last


@gluon.jit
def total_of(
    i, first, last, workspace_ptr,
    COUNT: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The sum of the i-th of COUNT values that each program from `first` to `last` has given."""
    SIZE: gl.constexpr = COUNT * TILE * ROWS
    ptrs = workspace_ptr + first.to(gl.int64) * (2 * SIZE) + i * (TILE * ROWS)
    ptrs += offsets_of_sums(TILE, ROWS, layout)
    # There are two at least: both on their way before one is waited for.
    total = gl.load(ptrs + SIZE)
    total += gl.load(ptrs + 2 * SIZE)
    for program in range(2, last - first + 1):
        total += gl.load(ptrs + program * (2 * SIZE))
    return total
