"""Copies of matrices with rows that start at 16-byte boundaries, for kernels that need them.

    out[b, r, c] = x[b, r, c]

The copy engine and 16-byte loads want aligned rows. A matrix of, say, 495 columns of 16 bits has
none, and read element by element by every tile that needs it, it keeps the tensor cores waiting: at
4096 × 5333 × 495 for 310 µs of an H200, cuBLAS's kernels for such rows for 214. So what is read
often is copied once: of that product 9 MB, both operands in one launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.dependent_launch import (
    launch_options,
    release_dependents,
    wait_for_producers,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

BLOCK_ROWS, BLOCK_COLUMNS = 16, 256


@triton.jit
def copy_block(
    x, block, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    x_ptr, out_ptr, rows, columns, stride_xb, stride_xr, stride_xc, stride_ob, stride_or = x
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    down = tl.cdiv(rows, BLOCK_ROWS)
    matrix = (block // (across * down)).to(tl.int64)
    block = block % (across * down)
    offs_r = (block // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    offs_c = block % across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]
    x_ptrs = x_ptr + matrix * stride_xb + offs_r[:, None] * stride_xr
    x_ptrs += offs_c.to(tl.int64)[None, :] * stride_xc
    out_ptrs = out_ptr + matrix * stride_ob + offs_r[:, None] * stride_or + offs_c[None, :]
    tl.store(out_ptrs, tl.load(x_ptrs, mask=mask, other=0.0), mask=mask)


@triton.jit
def pack_kernel(
    first, second, blocks, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs below `blocks` copy blocks of the first, the others of the second."""
    wait_for_producers(PDL)
    pid = tl.program_id(0)
    if second is None:
        copy_block(first, pid, BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        if pid < blocks:
            copy_block(first, pid, BLOCK_ROWS, BLOCK_COLUMNS)
        else:
            copy_block(second, pid - blocks, BLOCK_ROWS, BLOCK_COLUMNS)
    release_dependents(PDL)


def pack(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies one or two (B, R, C), any strides, so that each row starts at a 16-byte boundary.

    What is contiguous stays so: columns of which the stride is 1 are made rows' neighbours.
    """
    outs, arguments, counts = [], [], []
    for x in matrices:
        turned = x.stride(2) != 1 and x.stride(1) == 1
        seen = x.mT if turned else x
        batch, rows, columns = seen.shape
        pitch = triton.cdiv(columns, 64) * 64
        out = seen.new_empty((batch, rows, pitch))[:, :, :columns]
        outs.append(out.mT if turned else out)
        arguments.append((seen, out, rows, columns, *seen.stride(), *out.stride()[:2]))
        counts.append(batch * triton.cdiv(rows, BLOCK_ROWS) * triton.cdiv(columns, BLOCK_COLUMNS))
    pack_kernel[(sum(counts),)](
        *arguments, *[None] * (2 - len(arguments)), counts[0],
        BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=4,
        **launch_options(hardware.of(matrices[0].device)),
    )  # fmt: skip
    return outs
