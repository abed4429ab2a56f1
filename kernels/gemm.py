"""Tiled matrix product, data-parallel or split along K.

    out[b, m, n] = epilogue(alpha · Σ_k a[b, m, k] · b[b, k, n]  +  beta · bias[b, m, n])

Every operand comes with its strides, so any layout (transposed, sliced, broadcast with stride 0) is
read in place. Products accumulate in fp32. With SPLIT_K > 1 each program sums a slice of K and
writes its fp32 partial to a workspace of shape (SPLIT_K, B, M, N), which `split_k.reduce_partials`
adds up in a fixed order: the same bits every run.

`swap_operands` computes outᵀ = bᵀ · aᵀ by exchanging the roles of the operands' strides. It puts
the long side of a skinny product (the weight's N) on the tensor cores' 64-row side and the short
side on the 8-column side, so that a product with M = 8 wastes no rows.

Reference: the grouped tile order of Triton's matrix multiplication tutorial; split-K as in
"Accelerating a Triton Fused Kernel for W4A16 Quantized Inference with SplitK Work Decomposition"
(arXiv 2402.00025).
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
from triton_only_backend.kernels.eights import eights, in_eights
from triton_only_backend.kernels.epilogue import (
    NO_EPILOGUE,
    Epilogue,
    apply_epilogue,
    bias_strides,
    load_bias,
)
from triton_only_backend.kernels.split_k import arrange, reduce_partials

if TYPE_CHECKING:
    import torch

    from triton_only_backend.kernels.gemm_configs import GemmConfig

INT32_MAX = 2**31 - 1


def can_overflow_int32(*tensors: torch.Tensor) -> bool:
    """Whether an element offset into any of the tensors exceeds 32 bits."""
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        > INT32_MAX
        for t in tensors
    )


@triton.jit
def grouped_tile(tile, grid_m, grid_n, GROUP_M: tl.constexpr):
    """Tile coordinates in an order that keeps GROUP_M rows of tiles in L2 together."""
    width = GROUP_M * grid_n
    group = tile // width
    rows = min(grid_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + (tile % width) % rows
    pid_n = (tile % width) // rows
    return pid_m, pid_n


@triton.jit
def gemm_kernel(
    a_ptr, b_ptr, bias_ptr, c_ptr,
    M, N, K,
    stride_ab, stride_am, stride_ak,
    stride_bb, stride_bk, stride_bn,
    stride_sb, stride_sm, stride_sn,
    stride_cs, stride_cb, stride_cm, stride_cn,
    alpha, beta, epilogue,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, EIGHTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_producers(PDL)
    M, N, K = in_eights((M, N, K), EIGHTS)
    stride_ab, stride_am, stride_ak = in_eights((stride_ab, stride_am, stride_ak), EIGHTS >> 3)
    stride_bb, stride_bk, stride_bn = in_eights((stride_bb, stride_bk, stride_bn), EIGHTS >> 6)
    stride_cb, stride_cm, stride_cn = in_eights((stride_cb, stride_cm, stride_cn), EIGHTS >> 9)
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    tiles = grid_m * grid_n
    pid = tl.program_id(0)
    split = tl.program_id(1)
    pid_b = (pid // tiles).to(tl.int64)
    pid_m, pid_n = grouped_tile(pid % tiles, grid_m, grid_n, GROUP_M)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    if WIDE:
        offs_m = offs_m.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N

    a_ptrs = a_ptr + pid_b * stride_ab + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + pid_b * stride_bb + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
    step_k: tl.constexpr = BLOCK_K * SPLIT_K
    step_a = step_k * stride_ak
    step_b = step_k * stride_bk
    if WIDE:
        step_a = tl.cast(stride_ak, tl.int64) * step_k
        step_b = tl.cast(stride_bk, tl.int64) * step_k

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, step_k)):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=mask_m[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k * step_k
            a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += step_a
        b_ptrs += step_b

    release_dependents(PDL)
    mask = mask_m[:, None] & mask_n[None, :]
    if SPLIT_K == 1:
        acc *= tl.cast(alpha, tl.float32)
        if HAS_BIAS:
            bias_ptr += pid_b * stride_sb
            bias = load_bias(bias_ptr, offs_m, offs_n, mask_m, mask_n, stride_sm, stride_sn)
            acc += tl.cast(beta, tl.float32) * bias
        acc = apply_epilogue(acc, offs_m[:, None], offs_n[None, :], mask, epilogue, ACTIVATION)
    c_ptrs = (
        c_ptr + split.to(tl.int64) * stride_cs + pid_b * stride_cb
        + offs_m[:, None] * stride_cm + offs_n[None, :] * stride_cn
    )  # fmt: skip
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask)


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    config: GemmConfig,
    precision: str,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Writes epilogue(alpha · a @ b + beta · bias) to `out`.

    Args:
        a: (B, M, K), fp16, bf16 or fp32, any strides.
        b: (B, K, N), a's dtype, any strides.
        bias: (B, M, N), any float dtype, any strides (0 where it broadcasts), or None.
        out: (B, M, N), fp16, bf16 or fp32, any strides without overlap.
        alpha: factor of the product.
        beta: factor of the bias.
        config: tile sizes and work decomposition.
        precision: "ieee" or "tf32": how fp32 operands are multiplied.
        epilogue: what follows; with operands only for B = 1.
    """
    product = arrange(a, b, bias, out, config, epilogue)
    a, b, bias, out, epilogue = product[:5]
    batch, M, K = a.shape
    N = b.shape[2]
    split_k = config.split_k
    operands = (a, b, out, *(() if bias is None else (bias,)), *epilogue.tensors)
    # Of those along which something lies; rows come in any number, each of which would compile.
    lengths = (
        M if 1 in (a.stride(1), product.strides[2]) else 0,
        N if 1 in (b.stride(2), product.strides[3]) else 0,
        K,
    )
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    gemm_kernel[(tiles * batch, split_k)](
        a, b, a if bias is None else bias, product.target,
        M, N, K,
        *a.stride(),
        *b.stride(),
        *bias_strides(bias),
        *product.strides,
        float(alpha), float(beta), epilogue.arguments,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP_M=config.group_m, SPLIT_K=split_k, EVEN_K=K % (config.block_k * split_k) == 0,
        HAS_BIAS=bias is not None and split_k == 1, ACTIVATION=epilogue.activation,
        WIDE=can_overflow_int32(*operands), PRECISION=precision,
        EIGHTS=eights(*lengths, *a.stride(), *b.stride(), *product.strides[1:]),
        num_warps=config.num_warps, num_stages=config.num_stages,
        **launch_options(hardware.of(out.device)),
    )  # fmt: skip
    if split_k > 1:
        reduce_partials(product, alpha=alpha, beta=beta, block=config.reduce_block)
