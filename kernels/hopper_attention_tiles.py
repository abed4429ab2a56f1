"""What `flash_attention_hopper` does beside its pipeline: the order of the work, turns, masks.

Work items are the tiles of queries of all heads. A section of heads, whose keys and values share
the L2 cache, is dealt out to the programs in rounds; every other round goes backwards, so that of a
causal section, whose tiles with most keys come first, each program gets as much as the others.
Rounds begin anew with each section. Dealt out as one sequence, the sections' ends drift along the
rounds, and some programs get the longest tile of many sections: 32 KV heads, 2048 keys causal,
took 1.5 times as long on an H200.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_only_backend.kernels.hopper_attention_configs import BLOCK_N as KEYS_OF_TILE
from triton_only_backend.kernels.mask_spans import NO_KEY, SPAN_CHUNK, SPAN_ROWS

# Hardware barriers, of 16, beyond Triton's: it takes two and one for every part of a block.
TURN_BARRIER = gl.constexpr(14)
BLOCK_N = gl.constexpr(KEYS_OF_TILE)
NO_KEYS = gl.constexpr(NO_KEY.value)
ROWS_OF_SPAN = gl.constexpr(SPAN_ROWS.value)
KEYS_OF_SPAN = gl.constexpr(SPAN_CHUNK.value)
# A tile of the mask, of 64 queries and 128 keys, as (64, 4, 32): as it is loaded, the four lanes
# that have a row of wgmma's result having 32 keys of it each, and as that result lies in registers.
ROWS_OF_LANES = [[1, 0, 0], [2, 0, 0], [4, 0, 0]]
ROWS_OF_WARPS = [[16, 0, 0], [32, 0, 0]]
LOADED = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 0, 16], [8, 0, 0]],
        [[0, 1, 0], [0, 2, 0], *ROWS_OF_LANES], ROWS_OF_WARPS, [], [64, 4, 32],
    )
)  # fmt: skip
SCORED = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]],
        [[0, 0, 2], [0, 0, 4], *ROWS_OF_LANES], ROWS_OF_WARPS, [], [64, 4, 32],
    )
)  # fmt: skip


@gluon.jit
def rounds_of_section(section, num_tiles, heads, section_heads):
    """How many items of a section this program has, and how many rounds went before."""
    programs = gl.num_programs(0)
    before = section * gl.cdiv(num_tiles * section_heads, programs)
    items = num_tiles * gl.minimum(heads - section * section_heads, section_heads)
    rounds = items // programs
    has_last = rounds * programs + place_in_round(before + rounds) < items
    return gl.where(has_last, rounds + 1, rounds), before


@gluon.jit
def place_in_round(number):
    """Which item of a round is this program's."""
    program = gl.program_id(0)
    return gl.where(number % 2 == 0, program, gl.num_programs(0) - 1 - program)


@gluon.jit
def work_item(section, turn, before, num_tiles, heads, section_heads, BLOCK_M: gl.constexpr):
    """The first query, and the head among all batches' heads, of this program's turn."""
    first_head = section * section_heads
    heads_here = gl.minimum(heads - first_head, section_heads)
    item = turn * gl.num_programs(0) + place_in_round(before + turn)
    return (num_tiles - 1 - item // heads_here) * BLOCK_M, first_head + item % heads_here


@gluon.jit
def hardware_barrier(INSTRUCTION: gl.constexpr, number):
    """`bar.sync` or `bar.arrive` of two groups on one of the barriers that Triton does not use."""
    gl.inline_asm_elementwise(
        INSTRUCTION + " $1, 256; mov.b32 $0, 0;", "=r,r", [number], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def take_turn(GROUP: gl.constexpr):
    """Waits until the other group has started its products."""
    hardware_barrier("bar.sync", TURN_BARRIER + GROUP)


@gluon.jit
def pass_turn(GROUP: gl.constexpr):
    """Lets the other group start its products."""
    hardware_barrier("bar.arrive", TURN_BARRIER + 1 - GROUP)


@gluon.jit
def opaque(x):
    """x, from an exchange of each lane with itself: ptxas leaves what needs it behind a wait."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 0, 31, -1;", "=f,f", [x], gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def hide(scores, row, column, len_kv, IS_CAUSAL: gl.constexpr, EVEN_N: gl.constexpr):
    """Scores of queries from `row` on and keys from `column` on; hidden ones become -inf."""
    ROWS: gl.constexpr = scores.shape[0]
    COLUMNS: gl.constexpr = scores.shape[1]
    columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, scores.type.layout))
    if IS_CAUSAL:
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, scores.type.layout))
        scores = gl.where(columns[None, :] <= rows[:, None], scores, float("-inf"))
    if not EVEN_N:
        scores = gl.where((columns < len_kv)[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def visible_keys(
    mask, b, h, start_m, len_q, len_kv, BLOCK_M: gl.constexpr, NUM_WARPS: gl.constexpr
):
    """The keys before the first that some of a tile's queries does not see, and all that any sees.

    `mask` is (mask_ptr, its strides, spans_ptr, its strides), the spans those of `mask_spans`.
    """
    # Each warp has all of it, so that none waits for another.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    spans_ptr = mask[2]
    strides = mask[3]
    spans_ptr += b.to(gl.int64) * strides[0] + h.to(gl.int64) * strides[1]
    first_hidden = gl.full([32], NO_KEYS, gl.int32, LAYOUT)
    last_seen = gl.zeros([32], gl.int32, LAYOUT)
    chunks = gl.cdiv(len_kv, KEYS_OF_SPAN)
    for start in range(0, chunks, 32):
        lanes = start + gl.arange(0, 32, LAYOUT)
        for row in gl.static_range(0, BLOCK_M, ROWS_OF_SPAN):
            tile = (start_m + row) // ROWS_OF_SPAN
            ptrs = spans_ptr + tile * strides[2] + lanes * strides[3]
            valid = (lanes < chunks) & (start_m + row < len_q)
            first_hidden = gl.minimum(first_hidden, gl.load(ptrs, mask=valid, other=NO_KEYS))
            last_seen = gl.maximum(last_seen, gl.load(ptrs + 1, mask=valid, other=0))
    stop = gl.minimum(gl.max(last_seen, 0), len_kv)
    return gl.minimum(gl.min(first_hidden, 0), stop), stop


@gluon.jit
def tiles_of_keys(
    mask, b, h, start_m, len_q, len_kv, BLOCK_M: gl.constexpr, NUM_WARPS: gl.constexpr, IS_CAUSAL:
    gl.constexpr,
):  # fmt: skip
    """How many tiles of keys a tile of queries has, and how many before the first that is masked.

    One that no query sees anything in still has one, and finds all of it hidden.
    """
    stop = len_kv
    masked = 0
    if mask[0] is not None:
        first_hidden, stop = visible_keys(mask, b, h, start_m, len_q, len_kv, BLOCK_M, NUM_WARPS)
        stop = gl.maximum(stop, 1)
        masked = first_hidden // BLOCK_N
    if IS_CAUSAL:
        stop = gl.minimum(start_m + BLOCK_M, len_kv)
    return gl.cdiv(stop, BLOCK_N), masked


@gluon.jit
def load_mask(mask, b, h, row, column, len_q, len_kv, EVEN_N: gl.constexpr, ALIGNED: gl.constexpr):
    """A group's tile of the mask, (64, 4, 32): 32 neighbours a lane, by 16 bytes if `ALIGNED`."""
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LOADED))
    WORDS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LOADED))
    BITS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LOADED))
    mask_ptr = mask[0]
    strides = mask[1]
    rows = row + gl.arange(0, 64, ROWS)
    words = column + 32 * gl.arange(0, 4, WORDS)
    columns = words[None, :, None] + gl.arange(0, 32, BITS)[None, None, :]
    ptrs = mask_ptr + b.to(gl.int64) * strides[0] + h.to(gl.int64) * strides[1]
    ptrs = ptrs + rows.to(gl.int64)[:, None, None] * strides[2]
    ptrs = ptrs + columns.to(gl.int64) * strides[3]
    valid = (rows < len_q)[:, None, None]
    if not EVEN_N:
        valid = valid & (columns < len_kv)
    if ALIGNED:
        # In the second group's part of the block Triton 3.6 knows nothing of the arguments.
        ptrs = gl.max_contiguous(gl.multiple_of(ptrs, [1, 1, 16]), [1, 1, 16])
    return gl.load(ptrs, mask=valid, other=0)


@gluon.jit
def pack(tile):
    """A tile of the mask as (64, 4) words: of 32 neighbours a bit each."""
    bits = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, LOADED)))
    return gl.sum((tile != 0).to(gl.int32) << bits[None, None, :], 2)


@gluon.jit
def hide_by_mask(scores, words):
    """Scores whose bit is set, -inf elsewhere."""
    words = gl.convert_layout(words, gl.SliceLayout(2, SCORED))
    bits = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, SCORED)))
    seen = ((words[:, :, None] >> bits[None, None, :]) & 1) != 0
    seen = gl.convert_layout(seen.reshape(scores.shape), scores.type.layout)
    return gl.where(seen, scores, float("-inf"))
