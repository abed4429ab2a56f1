"""Copies operands whose rows do not start at 16-byte boundaries to where they do.

    copy[b, r, c] = operand[b, r, c], 0 for the columns that fill a row up

Read element by element such a product is bound by its loads: 8192 × 5333 × 495 takes 612 µs on an
H200, of which multiplying is 60. The copy is read in 16-byte pieces, or through descriptors. One
launch copies both operands.
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
from triton_only_backend.kernels.gemm_configs import padded_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

# Rows of the copy start at lines of the cache.
LINE_BYTES = 128
# Elements a program copies.
TILE = 4096


@triton.jit
def _copy_tile(
    source_ptr, target_ptr, tile, all_rows, rows, columns, width, stride_b, stride_r, stride_c,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    offs_r = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_c = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    of_row = offs_r // rows * stride_b + offs_r % rows * stride_r
    source_ptrs = source_ptr + of_row[:, None] + offs_c.to(tl.int64)[None, :] * stride_c
    mask_r = offs_r < all_rows
    x = tl.load(source_ptrs, mask=mask_r[:, None] & (offs_c < columns)[None, :], other=0.0)
    target_ptrs = target_ptr + offs_r[:, None] * width + offs_c[None, :]
    tl.store(target_ptrs, x, mask=mask_r[:, None] & (offs_c < width)[None, :])


@triton.jit
def realign_kernel(
    a_ptr, a_copy_ptr, b_ptr, b_copy_ptr, tiles_a,
    all_rows_a, rows_a, columns_a, width_a, stride_ab, stride_ar, stride_ac,
    all_rows_b, rows_b, columns_b, width_b, stride_bb, stride_br, stride_bc,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_producers(PDL)
    pid = tl.program_id(0)
    if pid < tiles_a:
        _copy_tile(
            a_ptr, a_copy_ptr, pid, all_rows_a, rows_a, columns_a, width_a,
            stride_ab, stride_ar, stride_ac, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        _copy_tile(
            b_ptr, b_copy_ptr, pid - tiles_a, all_rows_b, rows_b, columns_b, width_b,
            stride_bb, stride_br, stride_bc, ROWS, COLUMNS,
        )  # fmt: skip
    release_dependents(PDL)


def realign(operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of one or two operands, with the dimension contiguous that is so, or else the last.

    Args:
        operands: (B, R, C) each, any strides, of one dtype, none without elements.

    Returns:
        (B, R, C) each, rows 128-byte aligned. What lies between a row's end and the next row's
        start is zeros.
    """
    flipped = [x.stride(1) == 1 and x.stride(2) != 1 for x in operands]
    sources = [x.mT if flip else x for x, flip in zip(operands, flipped, strict=True)]
    per_line = LINE_BYTES // sources[0].element_size()
    copies = [
        x.new_empty(x.shape[0], x.shape[1], triton.cdiv(x.shape[2], per_line) * per_line)
        for x in sources
    ]
    columns = min(512, triton.next_power_of_2(max(copy.shape[2] for copy in copies)))
    rows = TILE // columns
    tiles = [
        triton.cdiv(copy.shape[0] * copy.shape[1], rows) * triton.cdiv(copy.shape[2], columns)
        for copy in copies
    ]
    arguments = [
        (x.shape[0] * x.shape[1], x.shape[1], x.shape[2], copy.shape[2], *x.stride())
        for x, copy in zip(sources, copies, strict=True)
    ]
    realign_kernel[(sum(tiles),)](
        sources[0], copies[0], sources[-1], copies[-1], tiles[0],
        *arguments[0],
        *arguments[-1],
        ROWS=rows, COLUMNS=columns, num_warps=4,
        **launch_options(hardware.of(sources[0].device)),
    )  # fmt: skip
    return [
        (copy.mT if flip else copy)[:, : x.shape[1], : x.shape[2]]
        for x, copy, flip in zip(operands, copies, flipped, strict=True)
    ]


def realign_product(
    a: torch.Tensor, b: torch.Tensor, a_aligned: bool, b_aligned: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A product's operands (B, M, K) and (B, K, N), those copied that are not aligned.

    Where both are copied and contiguous along K, K comes back as a multiple of 16 with zeros, which
    masks of 16-byte pieces need.
    """
    if a_aligned or b_aligned:
        (copy,) = realign([b if a_aligned else a])
        return (a, copy) if a_aligned else (copy, b)
    a_copy, b_copy = realign([a, b])
    K = a.shape[2]
    if a_copy.stride(2) == 1 and b_copy.stride(1) == 1:
        batch, M, N = a.shape[0], a.shape[1], b.shape[2]
        K = padded_size(K)
        a_copy = a_copy.as_strided((batch, M, K), a_copy.stride())
        b_copy = b_copy.as_strided((batch, K, N), b_copy.stride())
    return a_copy, b_copy
