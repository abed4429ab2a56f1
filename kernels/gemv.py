"""Matrix product with very few rows: multiply and reduce, no tensor cores.

    out[b, m, n] = alpha · Σ_k a[b, m, k] · b[b, k, n]  +  beta · bias[b, m, n],   M ≤ 2

Reading the weight b once is all the time there is, and it is fastest as a plain stream: each
program owns BLOCK_N columns, keeps ROWS × BLOCK_N × BLOCK_K fp32 sums in registers and reduces them
once, at the end. The loop must ask for its pipeline itself (`tl.range(num_stages=…)`): for a loop
with no `tl.dot` Triton ignores the launch's num_stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from triton_only_backend.kernels.gemm import can_overflow_int32
from triton_only_backend.kernels.split_k import arrange, reduce_partials

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from triton_only_backend.kernels.gemm_configs import GemmConfig


@triton.jit
def gemv_tile(
    a_ptr, b_ptr, bias_ptr, c_ptr,
    tile, split, N, K,
    stride_am, stride_ak, stride_bk, stride_bn,
    stride_sm, stride_sn, stride_cm, stride_cn,
    alpha, beta,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of the product of one matrix."""
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    if WIDE:
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    mask_n = offs_n < N
    a_ptrs = a_ptr + offs_k * stride_ak
    b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_k[None, :] * stride_bk
    step_k: tl.constexpr = BLOCK_K * SPLIT_K
    step_a = step_k * stride_ak
    step_b = step_k * stride_bk
    if WIDE:
        step_a = tl.cast(stride_ak, tl.int64) * step_k
        step_b = tl.cast(stride_bk, tl.int64) * step_k

    acc0 = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    acc1 = acc0
    for k in tl.range(0, tl.cdiv(K, step_k), num_stages=STAGES):
        if EVEN_K:
            mask_k = tl.full((BLOCK_K,), True, tl.int1)
            w = tl.load(b_ptrs, mask=mask_n[:, None], other=0.0).to(tl.float32)
        else:
            mask_k = offs_k < K - k * step_k
            w = tl.load(b_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
        acc0 += w * tl.load(a_ptrs, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        if ROWS > 1:
            x = tl.load(a_ptrs + stride_am, mask=mask_k, other=0.0)
            acc1 += w * x.to(tl.float32)[None, :]
        a_ptrs += step_a
        b_ptrs += step_b

    c_ptrs = c_ptr + offs_n * stride_cn
    bias_ptrs = bias_ptr + offs_n * stride_sn
    for row in tl.static_range(0, ROWS):
        if row == 0:
            result = tl.sum(acc0, axis=1)
        else:
            result = tl.sum(acc1, axis=1)
        if SPLIT_K == 1:
            result *= tl.cast(alpha, tl.float32)
            if HAS_BIAS:
                bias = tl.load(bias_ptrs + row * stride_sm, mask=mask_n, other=0.0)
                result += tl.cast(beta, tl.float32) * bias.to(tl.float32)
        tl.store(c_ptrs + row * stride_cm, result.to(c_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def gemv_kernel(
    a_ptr, b_ptr, bias_ptr, c_ptr,
    N, K,
    stride_ab, stride_am, stride_ak,
    stride_bb, stride_bk, stride_bn,
    stride_sb, stride_sm, stride_sn,
    stride_cs, stride_cb, stride_cm, stride_cn,
    alpha, beta,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    pid_b = (pid // tiles).to(tl.int64)
    gemv_tile(
        a_ptr + pid_b * stride_ab, b_ptr + pid_b * stride_bb, bias_ptr + pid_b * stride_sb,
        c_ptr + split.to(tl.int64) * stride_cs + pid_b * stride_cb,
        pid % tiles, split, N, K,
        stride_am, stride_ak, stride_bk, stride_bn,
        stride_sm, stride_sn, stride_cm, stride_cn, alpha, beta,
        ROWS, BLOCK_N, BLOCK_K, SPLIT_K, EVEN_K, HAS_BIAS, WIDE, STAGES,
    )  # fmt: skip


@triton.jit
def gemv_many_kernel(
    a_ptr, w0_ptr, w1_ptr, w2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, c0_ptr, c1_ptr, c2_ptr,
    N0, N1, N2, K,
    stride_am, stride_ak, stride_w0, stride_w1, stride_w2,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A branch a matrix, rather than a chosen pointer: Triton keeps what it knows of each
    # argument's alignment, and with it the 16-byte loads.
    pid = tl.program_id(0)
    tiles0 = tl.cdiv(N0, BLOCK_N)
    tiles1 = tl.cdiv(N1, BLOCK_N)
    if pid < tiles0:
        gemv_tile(
            a_ptr, w0_ptr, bias0_ptr, c0_ptr, pid, 0, N0, K,
            stride_am, stride_ak, 1, stride_w0, 0, 1, N0, 1, 1.0, 1.0,
            ROWS, BLOCK_N, BLOCK_K, 1, EVEN_K, HAS_BIAS, WIDE, STAGES,
        )  # fmt: skip
    elif pid < tiles0 + tiles1:
        gemv_tile(
            a_ptr, w1_ptr, bias1_ptr, c1_ptr, pid - tiles0, 0, N1, K,
            stride_am, stride_ak, 1, stride_w1, 0, 1, N1, 1, 1.0, 1.0,
            ROWS, BLOCK_N, BLOCK_K, 1, EVEN_K, HAS_BIAS, WIDE, STAGES,
        )  # fmt: skip
    else:
        gemv_tile(
            a_ptr, w2_ptr, bias2_ptr, c2_ptr, pid - tiles0 - tiles1, 0, N2, K,
            stride_am, stride_ak, 1, stride_w2, 0, 1, N2, 1, 1.0, 1.0,
            ROWS, BLOCK_N, BLOCK_K, 1, EVEN_K, HAS_BIAS, WIDE, STAGES,
        )  # fmt: skip


def gemv(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    config: GemmConfig,
) -> None:
    """Writes alpha · a @ b + beta · bias to `out`, for at most 2 rows in `a`.

    Args:
        a: (B, M, K), M ≤ 2, fp16, bf16 or fp32, any strides.
        b: (B, K, N), a's dtype, any strides.
        bias: (B, M, N), any strides (0 where it broadcasts), or None.
        out: (B, M, N), any strides without overlap.
        alpha: factor of the product.
        beta: factor of the bias.
        config: block_n, block_k, split_k, num_warps and num_stages are used; with `swap_operands`
            the few rows are b's columns.
    """
    a, b, bias, out, target, target_strides = arrange(a, b, bias, out, config)
    batch, M, K = a.shape
    N = b.shape[2]
    split_k = config.split_k
    gemv_kernel[(triton.cdiv(N, config.block_n) * batch, split_k)](
        a, b, a if bias is None else bias, target,
        N, K,
        *a.stride(),
        *b.stride(),
        *((0, 0, 0) if bias is None else bias.stride()),
        *target_strides,
        float(alpha), float(beta),
        ROWS=M, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLIT_K=split_k,
        EVEN_K=K % (config.block_k * split_k) == 0,
        HAS_BIAS=bias is not None and split_k == 1,
        WIDE=can_overflow_int32(a, b, out, *(() if bias is None else (bias,))),
        STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    if split_k > 1:
        reduce_partials(target, bias, out, alpha=alpha, beta=beta, block=config.reduce_block)


def gemv_many(
    a: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    outs: Sequence[torch.Tensor],
    *,
    config: GemmConfig,
) -> None:
    """Writes a @ weightᵀ (+ bias) to each of `outs`, in one launch.

    Args:
        a: (M, K), M ≤ 2, fp16, bf16 or fp32, any strides.
        weights: two or three of (N_i, K), a's dtype, K-contiguous.
        biases: as many of (N_i,), contiguous, or None.
        outs: as many of (M, N_i), contiguous.
        config: block_n, block_k, num_warps and num_stages are used.
    """
    M, K = a.shape
    # The kernel has three places; the third of two is never reached: it has no columns.
    w, c, s = ([*x, x[0]][:3] for x in (weights, outs, biases or outs))
    columns = [*(weight.shape[0] for weight in weights), 0][:3]
    tiles = sum(triton.cdiv(n, config.block_n) for n in columns)
    gemv_many_kernel[(tiles,)](
        a, *w, *s, *c,
        *columns, K,
        *a.stride(), *(weight.stride(0) for weight in w),
        ROWS=M, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        EVEN_K=K % config.block_k == 0, HAS_BIAS=biases is not None,
        WIDE=can_overflow_int32(a, *weights), STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip
