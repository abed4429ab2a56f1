"""wgmma of any multiple of 8 columns, by PTX, where Triton's tensors have powers of two.

A tile of 224 columns is one instruction a step of 16 along K, not three of 128, 64 and 32 that each
read the rows of `a` from shared memory again. Its accumulator is pieces of equal width, whose
registers one behind the other are those that the instruction takes: of each 8 columns a thread has
four.

Triton gives nobody the address of what it allocates in shared memory. `shared_addresses` finds it:
a tag that is written to the allocation is looked for.

Reference: PTX ISA, "wgmma.mma_async" and "Matrix descriptor".
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_only_backend.kernels.tma_ring import seen_as, synchronize

# Where an allocation may begin: what the copy engine swizzles by 128 bytes lies at multiples of
# 1024; and as many of those as a block may have.
_ALIGNMENT = gl.constexpr(1024)
_PLACES = gl.constexpr(256)
_TAG = gl.constexpr(0x5EED0000)
_TRIES = gl.constexpr(32)


@gluon.jit
def _words_at(offset):
    """The words of this block's shared memory at these offsets, 0 behind its end."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 at, size;
        .reg .pred inside;
        mov.u32 at, global_smem;
        mov.u32 size, %dynamic_smem_size;
        add.u32 at, at, $1;
        setp.lt.u32 inside, $1, size;
        mov.b32 $0, 0;
        @inside ld.volatile.shared.b32 $0, [at];
        }""",
        "=r,r", [offset], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _start():
    return gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _fail():
    gl.inline_asm_elementwise(
        "trap; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _tag(memory, tag):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    words = seen_as(memory, gl.int32, [128], plain)
    words.store(gl.full([128], tag, gl.int32, layout))


@gluon.jit
def shared_addresses(first, second):
    """The addresses in shared memory of two allocations, of which these are the first bytes.

    By four warps, before anything else is in them. What an earlier block left in shared memory may
    look like a tag, then the next is tried. Were an allocation anywhere else, all would fail, and
    the kernel end in an error.
    """
    # All warps look at all places, so that none has to be told by another.
    layout: gl.constexpr = gl.BlockedLayout([_PLACES // 32], [32], [4], [0])
    place = gl.arange(0, _PLACES, layout)
    # Each of a warp's threads at another bank.
    offset = place * _ALIGNMENT + place // (_PLACES // 32) * 4
    tag = gl.to_tensor(_TAG)
    ones = gl.to_tensor(0)
    twos = gl.to_tensor(0)
    while ((ones >> 16 != 1) | (twos >> 16 != 1)) & (tag < _TAG + 2 * _TRIES):
        tag += 2
        _tag(first, tag)
        _tag(second, tag + 1)
        synchronize()
        found = _words_at(offset)
        ones = gl.sum(gl.where(found == tag, 65536 + place, 0), axis=0)
        twos = gl.sum(gl.where(found == tag + 1, 65536 + place, 0), axis=0)
        synchronize()
    if (ones >> 16 != 1) | (twos >> 16 != 1):
        _fail()
    start = _start()
    return start + (ones & 65535) * _ALIGNMENT, start + (twos & 65535) * _ALIGNMENT


@gluon.constexpr_function
def columns_of_box(columns):
    """How many of a matrix's columns that lie side by side are swizzled together: 128 bytes, or 64
    where that would hold some that nobody multiplies."""
    return 64 if columns % 64 == 0 else 32


@gluon.constexpr_function
def _constraints(registers, copies):
    """Of asm that changes so many registers in place, and reads so many others."""
    outs = ["=f"] * registers
    ins = [str(i) for i in range(registers)]
    return ",".join(outs + ins + ["r"] * copies)


@gluon.constexpr_function
def _multiplication(rows, columns, pieces, block_k, dtype, a_k_major, b_k_major):
    name = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype}"
    layouts = f"1, 1, 1, {int(not a_k_major)}, {int(not b_k_major)}"
    each = rows * columns // 128 // pieces  # registers of a piece
    a, b = 2 * each * pieces, (2 * pieces + 1) * each
    # 8 of what lies across a matrix's 128-byte rows are 1024 bytes from the next 8; 64 columns that
    # lie along those rows 8192 from the next 64. Of 64-byte rows both are half.
    upper, b_upper, b_flags = 0x40000040, 0x40000040, 0 if b_k_major else 512 << 16
    a_step, b_step = (2 if a_k_major else 128), (2 if b_k_major else 128)  # 16 of K, 16 bytes each
    if not b_k_major and columns_of_box(columns) == 32:
        b_upper, b_flags, b_step = 0x80000020, 256 << 16, 64
    steps = block_k // 16
    lines = [
        "{",
        ".reg .b32 low;",
        f".reg .b64 a<{rows // 64 * steps}>, b<{steps}>;",
        f"mov.b64 a0, {{${a}, {upper}}};",
        f"add.u32 low, ${b}, {b_flags};",
        f"mov.b64 b0, {{low, {b_upper}}};",
    ]
    # Of 64 bits: lower halves alone ptxas computes in the same registers for each instruction,
    # which waits for the one before to have read them (16 × 128 × 256 × 4096: 45.8 µs for 42.3).
    lines += [f"add.s64 b{step}, b0, {step * b_step};" for step in range(1, steps)]
    for half in range(rows // 64):
        for step in range(steps):
            if half + step > 0:
                at = half * 512 + step * a_step
                lines.append(f"add.s64 a{half * steps + step}, a0, {at};")
    lines.append("wgmma.fence.sync.aligned;")
    for half in range(rows // 64):
        part = each * 64 // rows
        registers = ",".join(
            f"${piece * each + half * part + i}" for piece in range(pieces) for i in range(part)
        )
        for step in range(steps):
            lines.append(f"{name} {{{registers}}}, a{half * steps + step}, b{step}, {layouts};")
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "}"])


@gluon.constexpr_function
def _wait(pending):
    return f"wgmma.wait_group.sync.aligned {pending};"


@gluon.constexpr_function
def _times(dtype, count):
    return (dtype,) * count


@gluon.jit
def multiply_pieces(
    pieces, a_address, b_address, dtype: gl.constexpr, BLOCK_K: gl.constexpr,
    A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr,
):  # fmt: skip
    """Begins to add a · bᵀ to the pieces (ROWS, columns), side by side.

    Args:
        a_address: in shared memory, of ROWS of BLOCK_K, 64 or 128 of them, swizzled by 128 bytes.
        b_address: of as many rows as the pieces have columns, likewise.
        A_K_MAJOR: rows are contiguous along K; else there are BLOCK_K of 64, and then the next 64.
        B_K_MAJOR: likewise; else of 64, or of 32 swizzled by 64 bytes, see `columns_of_box`.
    """
    COUNT: gl.constexpr = len(pieces)
    ROWS: gl.constexpr = pieces[0].shape[0]
    COLUMNS: gl.constexpr = COUNT * pieces[0].shape[1]
    EACH: gl.constexpr = pieces[0].numel // 128
    name: gl.constexpr = "bf16" if dtype == gl.bfloat16 else "f16"
    return gl.inline_asm_elementwise(
        _multiplication(ROWS, COLUMNS, COUNT, BLOCK_K, name, A_K_MAJOR, B_K_MAJOR),
        _constraints(COUNT * EACH, 2 * EACH), pieces + (a_address >> 4, b_address >> 4),  # noqa: RUF005
        dtype=_times(gl.float32, COUNT), is_pure=False, pack=EACH,
    )  # fmt: skip


@gluon.jit
def wait_for_pieces(pieces, PENDING: gl.constexpr):
    """The pieces, when all but the last PENDING multiplications are done."""
    COUNT: gl.constexpr = len(pieces)
    EACH: gl.constexpr = pieces[0].numel // 128
    return gl.inline_asm_elementwise(
        _wait(PENDING), _constraints(COUNT * EACH, 0), pieces,
        dtype=_times(gl.float32, COUNT), is_pure=False, pack=EACH,
    )  # fmt: skip
