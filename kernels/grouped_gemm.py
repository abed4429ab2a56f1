"""Products of groups of rows, each with a matrix of its own: the experts of a mixture.

    rows:   out[i, n] = Σ_k a[i, k] · b[g, k, n]      for the rows i of group g
    inner:  out[g, m, n] = Σ_i a[m, i] · b[i, n]      over the rows i of group g

Group g has the rows offs[g − 1] … offs[g]; the numbers stay on the device. Rows after the last
group give 0. Every operand comes with its strides; products accumulate in fp32, each sum in one
program: the same bits every run.

A tile of `rows` belongs to one group. As many programs start as there can be tiles, whatever the
lengths: each group's last tile may be partial, so ⌊M / BLOCK_M⌋ and one a group. A program counts
the groups' tiles to find its own; what is left over ends at once.

Reference: torch.nn.functional.grouped_mm; the persistent grouped product of Triton's tutorial 08
looks for its tile in a like way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from triton_only_backend.kernels.eights import eights, in_eights

if TYPE_CHECKING:
    import torch

    from triton_only_backend.kernels.hardware import Hardware


@dataclass(frozen=True)
class GroupedConfig:
    """Tile sizes: of out's rows and columns, and of the dimension that is summed."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def select_config(rows: int, element_size: int, device: Hardware) -> GroupedConfig:
    """Tiles for an operand of that many rows a group."""
    if device.is_interpreter:
        return GroupedConfig(32, 128, 128, 4, 1)
    block_m = min(max(triton.next_power_of_2(rows), 16), 128)
    if element_size > 2:
        # 32 of the summed dimension in 2 stages spilled 88 bytes (sm80, triton 3.9).
        return GroupedConfig(min(block_m, 64), 64, 16, 4, 3)
    stages = 2 if device.backend == "hip" else 3
    return GroupedConfig(block_m, 128, 64, 8 if block_m == 128 else 4, stages)


@triton.jit
def tile_of_group(pid, offs_ptr, M, G, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """Group (G for the rows after the last, more for none), its tile's first row, its end."""
    groups = tl.arange(0, BLOCK_G)
    ends = tl.load(offs_ptr + groups, mask=groups < G, other=M)
    before = (groups > 0) & (groups <= G)
    starts = tl.load(offs_ptr + groups - 1, mask=before, other=0)
    starts = tl.where(groups > G, M, starts)
    tiles = tl.cdiv(tl.maximum(ends - starts, 0), BLOCK_M)
    group = tl.sum((tl.cumsum(tiles, 0) <= pid).to(tl.int32), 0)
    first = tl.sum(tl.where(groups < group, tiles, 0), 0)
    start = tl.sum(tl.where(groups == group, starts, 0), 0)
    end = tl.sum(tl.where(groups == group, ends, 0), 0)
    return group, start + (pid - first) * BLOCK_M, tl.minimum(end, M)


@triton.jit
def grouped_rows_kernel(
    a_ptr, b_ptr, offs_ptr, c_ptr,
    M, N, K, G,
    stride_am, stride_ak,
    stride_bg, stride_bk, stride_bn,
    stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
    PRECISION: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    N, K, stride_am, stride_ak = in_eights((N, K, stride_am, stride_ak), EIGHTS)
    stride_bg, stride_bk, stride_bn = in_eights((stride_bg, stride_bk, stride_bn), EIGHTS >> 4)
    stride_cm, stride_cn = in_eights((stride_cm, stride_cn), EIGHTS >> 7)
    group, row, end = tile_of_group(tl.program_id(0), offs_ptr, M, G, BLOCK_M, BLOCK_G)
    if group > G:
        return
    offs_m = row.to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < end
    mask_n = offs_n < N
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + group.to(tl.int64) * stride_bg
    b_ptrs += offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    steps = tl.where(group < G, tl.cdiv(K, BLOCK_K), 0)
    for step in range(0, steps):
        mask_k = offs_k < K - step * BLOCK_K
        a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K * tl.cast(stride_ak, tl.int64)
        b_ptrs += BLOCK_K * tl.cast(stride_bk, tl.int64)
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :] * stride_cn
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grouped_inner_kernel(
    a_ptr, b_ptr, offs_ptr, c_ptr,
    M, N, K,
    stride_am, stride_ak,
    stride_bk, stride_bn,
    stride_cg, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    grid_n = tl.cdiv(N, BLOCK_N)
    start = tl.load(offs_ptr + group - 1, mask=group > 0, other=0)
    end = tl.minimum(tl.load(offs_ptr + group), K)
    offs_m = (tl.program_id(0) // grid_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % grid_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(tl.maximum(end - start, 0), BLOCK_K)):
        offs_k = start.to(tl.int64) + step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
        a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    c_ptrs = c_ptr + group.to(tl.int64) * stride_cg
    c_ptrs += offs_m[:, None] * stride_cm + offs_n[None, :] * stride_cn
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask)


def grouped_rows(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor,
    out: torch.Tensor,
    *,
    config: GroupedConfig,
    precision: str,
) -> None:
    """Writes each group's rows of a times its matrix to `out`, and 0 after the last group.

    Args:
        a: (M, K), fp16, bf16 or fp32, any strides.
        b: (G, K, N), a's dtype, any strides.
        offs: (G,) int32, contiguous: where the groups end, in order.
        out: (M, N), any strides without overlap.
        precision: "ieee" or "tf32": how fp32 operands are multiplied.
    """
    M, K = a.shape
    G, _, N = b.shape
    grid = (M // config.block_m + G + 1, triton.cdiv(N, config.block_n))
    grouped_rows_kernel[grid](
        a, b, offs, out,
        M, N, K, G,
        *a.stride(), *b.stride(), *out.stride(),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_G=triton.next_power_of_2(G + 2), PRECISION=precision,
        EIGHTS=eights(N, K, *a.stride(), *b.stride(), *out.stride()),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def grouped_inner(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor,
    out: torch.Tensor,
    *,
    config: GroupedConfig,
    precision: str,
) -> None:
    """Writes each group's columns of a times its rows of b to `out`.

    Args:
        a: (M, K), fp16, bf16 or fp32, any strides.
        b: (K, N), a's dtype, any strides.
        offs: (G,) int32, contiguous: where the groups of K end, in order.
        out: (G, M, N), any strides without overlap.
        precision: "ieee" or "tf32": how fp32 operands are multiplied.
    """
    M, K = a.shape
    G, _, N = out.shape
    grid = (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n), G)
    grouped_inner_kernel[grid](
        a, b, offs, out,
        M, N, K,
        *a.stride(), *b.stride(), *out.stride(),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        PRECISION=precision, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
