"""What `flash_attention_backward_hopper` does beside its products: tiles, turns, sums.

Sums for dQ, and for dK and dV where query heads are split among blocks, lie in memory in fp32 as
tiles of 64 rows, each in the order in which the registers of four warps have it: for every four
registers of a thread 16 bytes, threads side by side. A tile is so written, added to and read by
whole lines with no exchange among threads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_only_backend.kernels import hopper_backward_configs as configs

BLOCK_M = gl.constexpr(configs.BLOCK_M)
BLOCK_N = gl.constexpr(configs.BLOCK_N)


@gluon.jit
def first_tile(start_n, query_tiles, IS_CAUSAL: gl.constexpr):
    """The first tile of queries that a block visits: at least the last tile, and adds 0 there."""
    first = start_n * 0
    if IS_CAUSAL:
        first = gl.minimum(start_n // BLOCK_M, query_tiles - 1)
    return first


@gluon.jit
def last_turn(tile, query_tiles, key_tiles, IS_CAUSAL: gl.constexpr):
    """The tile of keys whose block is the last to add to a tile of queries."""
    last = key_tiles - 1
    if IS_CAUSAL:
        seen = gl.minimum(tile * BLOCK_M // BLOCK_N, last)
        last = gl.where(tile == query_tiles - 1, last, seen)
    return last


@gluon.jit
def next_tile(head, tile, first, query_tiles):
    """The tile of queries after this one: towards the head's first one, then the next head's."""
    done = tile == first
    return gl.where(done, head + 1, head), gl.where(done, query_tiles - 1, tile - 1)


@gluon.jit
def wait_for_count(ptr, count):
    """Waits until the number at ptr, which only grows, has reached the count.

    An acquiring load empties the first-level cache, so only the last one acquires.
    """
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred before;
        .reg .s32 reached;
        again:
        ld.relaxed.gpu.global.s32 reached, [$1];
        setp.lt.s32 before, reached, $2;
        @before bra again;
        ld.acquire.gpu.global.s32 $0, [$1];
        }
        """,
        "=r,l,r", [ptr, count], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def publish_count(ptr, count):
    """Writes the count, after everything that this thread knows to have been written."""
    gl.inline_asm_elementwise(
        "fence.acq_rel.gpu; st.relaxed.gpu.global.s32 [$1], $2; mov.b32 $0, 0;",
        "=r,l,r", [ptr, count], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def put_assembly(instruction, registers):
    """`instruction` for every four registers of a thread, 2 KiB apart."""
    return "".join(
        f"{instruction} [${registers}+{512 * i}], "
        f"{{${2 * registers + i}, ${2 * registers + i + 1}, "
        f"${2 * registers + i + 2}, ${2 * registers + i + 3}}};"
        for i in range(0, registers, 4)
    )


@gluon.constexpr_function
def put_constraints(registers):
    return ",".join(["=r"] * registers + ["l"] * registers + ["f"] * registers)


@gluon.constexpr_function
def sum_assembly(registers):
    """Adds what lies in memory to every four registers of a thread, past the first-level cache."""
    lines = []
    for i in range(0, registers, 4):
        address = f"[${registers}+{512 * i}]"
        lines.append(
            f"ld.relaxed.gpu.global.v4.f32 {{${i}, ${i + 1}, ${i + 2}, ${i + 3}}}, {address};"
        )
    lines += [f"add.f32 ${i}, ${i}, ${2 * registers + i};" for i in range(registers)]
    return "".join(lines)


@gluon.constexpr_function
def sum_constraints(registers):
    return ",".join(["=&f"] * registers + ["l"] * registers + ["f"] * registers)


@gluon.jit
def by_threads(tile):
    """A group's tile of 64 rows as (registers of a thread / 4, threads, 4)."""
    COLUMNS: gl.constexpr = tile.shape[1]
    # Rows are warp, half, lane // 4; columns are part, lane % 4, pair.
    tile = tile.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5))
    return tile.reshape([COLUMNS // 8, 128, 4])


@gluon.jit
def addresses_of(ptr, like):
    """Where a thread's registers of a tile that is laid out `by_threads` start in memory."""
    threads = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, like.type.layout)))
    return (ptr.to(gl.int64) + threads * 16)[None, :, None]


@gluon.jit
def put_tile(INSTRUCTION: gl.constexpr, ptr, tile):
    """Writes, or adds, a group's tile of sums."""
    REGISTERS: gl.constexpr = tile.shape[1] // 2
    values = by_threads(tile)
    gl.inline_asm_elementwise(
        put_assembly(INSTRUCTION, REGISTERS), put_constraints(REGISTERS),
        [addresses_of(ptr, values), values], gl.int32, is_pure=False, pack=REGISTERS,
    )  # fmt: skip


@gluon.jit
def plus_tile(ptr, tile):
    """A group's tile and the sums at ptr."""
    COLUMNS: gl.constexpr = tile.shape[1]
    values = by_threads(tile)
    values = gl.inline_asm_elementwise(
        sum_assembly(COLUMNS // 2), sum_constraints(COLUMNS // 2),
        [addresses_of(ptr, values), values], gl.float32, is_pure=False, pack=COLUMNS // 2,
    )  # fmt: skip
    values = values.reshape([COLUMNS // 8, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5))
    return gl.convert_layout(values.reshape([64, COLUMNS]), tile.type.layout)


@gluon.jit
def rounded(x, dtype: gl.constexpr):
    """x in 16 bits, two at a time: LLVM converts one by one what is used in pairs and alone."""
    if dtype == gl.bfloat16:
        y = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], gl.bfloat16, is_pure=False, pack=2
        )
    else:
        y = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], gl.float16, is_pure=False, pack=2
        )
    return y
