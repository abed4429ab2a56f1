"""Layer normalisation of rows, for products on tensor cores, and its statistics for few rows.

    out[m, k] = (x[m, k] - mean_k(x)) · rsqrt(var_k(x) + eps) · (weight[k] + offset) + bias[k]

in fp32, rounded once to the output's dtype. The variance is gathered about the mean, in a second
pass over what the first has read: a difference of sums would lose what a large mean has in common.
Products of one or two rows take mean and deviation from `row_statistics` before their loop (see
`linear_gemv`); tensor cores take operands that are normalised already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.dependent_launch import (
    launch_options,
    wait_for_producers,
)
from triton_only_backend.kernels.eights import eights, in_eights
from triton_only_backend.kernels.sizes import next_power_of_2

if TYPE_CHECKING:
    import torch

    from triton_only_backend.kernels.hardware import Hardware
    from triton_only_backend.kernels.rms_norm import Norm

# Columns of a row that are read at once: 32 registers a thread of 4 warps.
BLOCK = 4096


@triton.jit
def row_statistics(
    x_ptr, K, stride_xk, eps, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr
):  # fmt: skip
    """The mean of the row that begins at x_ptr, and rsqrt(its variance + eps)."""
    offs = tl.arange(0, BLOCK)
    x_ptrs = x_ptr + offs.to(tl.int64) * stride_xk
    if ONE_BLOCK:
        mask = offs < K
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=0) / K
        difference = tl.where(mask, x - mean, 0.0)
        squares = difference * difference
    else:
        step = tl.cast(stride_xk, tl.int64) * BLOCK
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK)):
            mask = offs < K - k * BLOCK
            total += tl.load(x_ptrs + k * step, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(total, axis=0) / K
        squares = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK)):
            mask = offs < K - k * BLOCK
            x = tl.load(x_ptrs + k * step, mask=mask, other=0.0).to(tl.float32)
            difference = tl.where(mask, x - mean, 0.0)
            squares += difference * difference
    return mean, tl.rsqrt(tl.sum(squares, axis=0) / K + eps)


@triton.jit
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr,
    K, stride_xm, stride_xk, stride_w, stride_b, stride_om,
    eps, offset,
    BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, EIGHTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_producers(PDL)
    K, stride_xm, stride_om = in_eights((K, stride_xm, stride_om), EIGHTS)
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    mean, rstd = row_statistics(x_ptr, K, stride_xk, eps, BLOCK, ONE_BLOCK)
    for k in range(0, tl.cdiv(K, BLOCK)):
        columns = k * BLOCK + tl.arange(0, BLOCK)
        mask = columns < K
        x = tl.load(x_ptr + columns.to(tl.int64) * stride_xk, mask=mask, other=0.0).to(tl.float32)
        out = (x - mean) * rstd
        if weight_ptr is not None:
            w = tl.load(weight_ptr + columns * stride_w, mask=mask, other=0.0)
            out *= w.to(tl.float32) + offset
        if bias_ptr is not None:
            b = tl.load(bias_ptr + columns * stride_b, mask=mask, other=0.0)
            out += b.to(tl.float32)
        tl.store(out_ptr + row * stride_om + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


def block_of_row(K: int, device: Hardware) -> int:
    """Columns of a row of K that `row_statistics` reads at once."""
    return min(next_power_of_2(K), 65536 if device.is_interpreter else BLOCK)


def layer_norm(x: torch.Tensor, norm: Norm, out: torch.Tensor) -> None:
    """Writes the normalised rows of x to `out`.

    Args:
        x: (M, K), fp16, bf16 or fp32, any strides.
        norm: weight and bias, of any stride, or None; eps and offset.
        out: (M, K), row-major.
    """
    M, K = x.shape
    device = hardware.of(x.device)
    block = block_of_row(K, device)
    layer_norm_kernel[(M,)](
        x, norm.weight, norm.bias, out,
        K, *x.stride(), *(0 if t is None else t.stride(0) for t in (norm.weight, norm.bias)),
        out.stride(0),
        float(norm.eps), float(norm.offset),
        BLOCK=block, ONE_BLOCK=block >= K, EIGHTS=eights(K, x.stride(0), out.stride(0)),
        num_warps=8 if block >= 2048 else 4,
        **launch_options(device),
    )  # fmt: skip
