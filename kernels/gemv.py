"""Matrix product with very few rows: multiply and reduce, no tensor cores.

    out[b, m, n] = alpha · Σ_k a[b, m, k] · b[b, k, n]  +  beta · bias[b, m, n],   M ≤ 2

Reading the weight b once is all the time there is, and it is fastest as a plain stream: each program
owns BLOCK_N columns, keeps ROWS × BLOCK_N × BLOCK_K fp32 sums in registers and reduces them once, at
the end. The loop must ask for its pipeline itself (`tl.range(num_stages=…)`): for a loop with no
`tl.dot` Triton ignores the launch's num_stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from triton_only_backend.kernels.gemm import can_overflow_int32
from triton_only_backend.kernels.split_k import reduce_partials

if TYPE_CHECKING:
    from triton_only_backend.kernels.gemm_configs import GemmConfig


@triton.jit
def gemv_kernel(
    a_ptr, b_ptr, bias_ptr, c_ptr,
    N, K, batch,
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
    offs_n = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    if WIDE:
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    mask_n = offs_n < N
    a_ptrs = a_ptr + pid_b * stride_ab + offs_k * stride_ak
    b_ptrs = b_ptr + pid_b * stride_bb + offs_n[:, None] * stride_bn + offs_k[None, :] * stride_bk
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

    c_ptrs = c_ptr + split.to(tl.int64) * stride_cs + pid_b * stride_cb + offs_n * stride_cn
    bias_ptrs = bias_ptr + pid_b * stride_sb + offs_n * stride_sn
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
    if config.swap_operands:
        a, b, out = b.mT, a.mT, out.mT
        bias = None if bias is None else bias.mT
    batch, M, K = a.shape
    N = b.shape[2]
    split_k = config.split_k
    target = out
    target_strides = (0, *out.stride())
    if split_k > 1:
        target = torch.empty((split_k, batch, M, N), dtype=torch.float32, device=out.device)
        target_strides = target.stride()
    gemv_kernel[(triton.cdiv(N, config.block_n) * batch, split_k)](
        a, b, a if bias is None else bias, target,
        N, K, batch,
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
        reduce_partials(
            target, bias, out, alpha=alpha, beta=beta, block=config.reduce_block
        )
