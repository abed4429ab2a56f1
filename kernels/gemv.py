"""Matrix product with one or two rows: multiply and reduce, no tensor cores.

    out[b, m, n] = activation(alpha · Σ_k a[b, m, k] · b[b, k, n] + beta · bias[b, m, n]) · …

(the rest as in `epilogue`). Reading the weight b once is all the time there is, and it is fastest
as a plain stream: each program owns BLOCK_N columns and adds up, in fp32, what each thread reads in
one piece of LANE elements, at every step; the threads' sums are reduced once, at the end. That
takes half the registers of a sum for each element of the tile, so twice the programs are resident.
The loop must ask for its pipeline itself (`tl.range(num_stages=…)`): for a loop with no `tl.dot`
Triton ignores the launch's num_stages.

`stream` is that loop, for `linear_gemv` too.
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
from triton_only_backend.kernels.epilogue import NO_EPILOGUE, Epilogue, apply_epilogue
from triton_only_backend.kernels.gemm import can_overflow_int32
from triton_only_backend.kernels.split_k import arrange, reduce_partials

if TYPE_CHECKING:
    import torch

    from triton_only_backend.kernels.gemm_configs import GemmConfig


@triton.jit
def stream(
    a_ptr, norm_ptr, norm_bias_ptr, statistics, b_ptrs, steps_b, offs_k, mask_n, K,
    stride_am, stride_ak, norm_offset,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEP_K: tl.constexpr,
    LANE: tl.constexpr, K_MAJOR: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Σ_k a[m, k] · (norm[k] + offset) · b[k, n], and with a norm also Σ_k a[m, k]².

    Args:
        statistics: each row's mean and rstd: a is normalised by them, and a norm's bias is added,
            before it is multiplied, and no squares are summed; or an empty tuple.
        b_ptrs: a tuple of (BLOCK_N, BLOCK_K) pointers, one to each matrix.
        steps_b: a tuple: how far each moves from step to step.
        LANE: elements along K that a thread adds up at a step.
        K_MAJOR: they are neighbours, read in one piece; else BLOCK_K // LANE apart, where a thread
            reads neighbours along N.

    Returns:
        A tuple of (BLOCK_N,) sums, rows inside matrices; a tuple of scalars, one a row.
    """
    a_ptrs = a_ptr + offs_k * stride_ak
    step_a = STEP_K * stride_ak
    if WIDE:
        step_a = tl.cast(stride_ak, tl.int64) * STEP_K
    accs: tl.tuple = ()
    for _ in tl.static_range(0, len(b_ptrs) * ROWS):
        accs += (tl.zeros((BLOCK_N, BLOCK_K // LANE), dtype=tl.float32),)
    squares: tl.tuple = ()
    if norm_ptr is not None:
        norm_ptrs = norm_ptr + offs_k
        if len(statistics) == 0:
            for _ in tl.static_range(0, ROWS):
                squares += (tl.zeros((BLOCK_K,), dtype=tl.float32),)
    if norm_bias_ptr is not None:
        norm_bias_ptrs = norm_bias_ptr + offs_k

    for k in tl.range(0, tl.cdiv(K, STEP_K), num_stages=STAGES):
        if EVEN_K:
            mask_k = tl.full((BLOCK_K,), True, tl.int1)
            mask = mask_n[:, None]
        else:
            mask_k = offs_k < K - k * STEP_K
            mask = mask_n[:, None] & mask_k[None, :]
        ws: tl.tuple = ()
        next_b: tl.tuple = ()
        for i in tl.static_range(0, len(b_ptrs)):
            ws += (tl.load(b_ptrs[i], mask=mask, other=0.0).to(tl.float32),)
            next_b += (b_ptrs[i] + steps_b[i],)
        b_ptrs = next_b
        xs: tl.tuple = ()
        for row in tl.static_range(0, ROWS):
            x = tl.load(a_ptrs + row * stride_am, mask=mask_k, other=0.0)
            xs += (x.to(tl.float32),)
        a_ptrs += step_a
        if norm_ptr is not None:
            g = tl.load(norm_ptrs, mask=mask_k, other=0.0).to(tl.float32) + norm_offset
            norm_ptrs += STEP_K
        if norm_bias_ptr is not None:
            h = tl.load(norm_bias_ptrs, mask=mask_k, other=0.0).to(tl.float32)
            norm_bias_ptrs += STEP_K
        normalised: tl.tuple = ()
        if len(statistics) > 0:
            for row in tl.static_range(0, ROWS):
                x = (xs[row] - statistics[row][0]) * statistics[row][1]
                if norm_ptr is not None:
                    x *= g
                if norm_bias_ptr is not None:
                    x += h
                normalised += (x,)
            xs = normalised
        elif norm_ptr is not None:
            next_squares: tl.tuple = ()
            for row in tl.static_range(0, ROWS):
                next_squares += (squares[row] + xs[row] * xs[row],)
                normalised += (xs[row] * g,)
            squares = next_squares
            xs = normalised
        next_accs: tl.tuple = ()
        for i in tl.static_range(0, len(ws)):
            for row in tl.static_range(0, ROWS):
                products = ws[i] * xs[row][None, :]
                if K_MAJOR:
                    products = tl.reshape(products, (BLOCK_N, BLOCK_K // LANE, LANE))
                    next_accs += (accs[i * ROWS + row] + tl.sum(products, axis=2),)
                else:
                    products = tl.reshape(products, (BLOCK_N, LANE, BLOCK_K // LANE))
                    next_accs += (accs[i * ROWS + row] + tl.sum(products, axis=1),)
        accs = next_accs

    sums: tl.tuple = ()
    for i in tl.static_range(0, len(accs)):
        sums += (tl.sum(accs[i], axis=1),)
    totals: tl.tuple = ()
    for row in tl.static_range(0, len(squares)):
        totals += (tl.sum(squares[row], axis=0),)
    return sums, totals


@triton.jit
def gemv_kernel(
    a_ptr, b_ptr, bias_ptr, c_ptr,
    N, K,
    stride_ab, stride_am, stride_ak,
    stride_bb, stride_bk, stride_bn,
    stride_sb, stride_sm, stride_sn,
    stride_cs, stride_cb, stride_cm, stride_cn,
    alpha, beta, epilogue,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    LANE: tl.constexpr, K_MAJOR: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, EIGHTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_producers(PDL)
    N, K = in_eights((N, K), EIGHTS)
    stride_ab, stride_am, stride_ak = in_eights((stride_ab, stride_am, stride_ak), EIGHTS >> 2)
    stride_bb, stride_bk, stride_bn = in_eights((stride_bb, stride_bk, stride_bn), EIGHTS >> 5)
    tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    pid_b = (pid // tiles).to(tl.int64)
    a_ptr += pid_b * stride_ab
    b_ptr += pid_b * stride_bb
    bias_ptr += pid_b * stride_sb
    c_ptr += split.to(tl.int64) * stride_cs + pid_b * stride_cb
    offs_n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    step_k: tl.constexpr = BLOCK_K * SPLIT_K
    step_b = step_k * stride_bk
    if WIDE:
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
        step_b = tl.cast(stride_bk, tl.int64) * step_k
    mask_n = offs_n < N
    b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_k[None, :] * stride_bk
    sums, _ = stream(
        a_ptr, None, None, (), (b_ptrs,), (step_b,), offs_k, mask_n, K, stride_am, stride_ak, 0.0,
        ROWS, BLOCK_N, BLOCK_K, step_k, LANE, K_MAJOR, EVEN_K, WIDE, STAGES,
    )  # fmt: skip

    release_dependents(PDL)
    c_ptrs = c_ptr + offs_n * stride_cn
    bias_ptrs = bias_ptr + offs_n * stride_sn
    for row in tl.static_range(0, ROWS):
        result = sums[row]
        if SPLIT_K == 1:
            result *= tl.cast(alpha, tl.float32)
            if HAS_BIAS:
                bias = tl.load(bias_ptrs + row * stride_sm, mask=mask_n, other=0.0)
                result += tl.cast(beta, tl.float32) * bias.to(tl.float32)
            result = apply_epilogue(result, row, offs_n, mask_n, epilogue, ACTIVATION)
        tl.store(c_ptrs + row * stride_cm, result.to(c_ptr.dtype.element_ty), mask=mask_n)


def lane(b: torch.Tensor) -> int:
    """Elements along K that a thread reads in one piece of 16 bytes from a (…, K, N) operand."""
    return 16 // b.element_size() if b.stride(-2) == 1 else 1


def _has_pieces(b: torch.Tensor) -> bool:
    """Whether each column of a (B, K, N) operand, contiguous along K, starts at 16 bytes."""
    steps = (b.stride(0) * (b.shape[0] > 1), b.stride(2) * (b.shape[2] > 1))
    return all(n % 16 == 0 for n in (b.data_ptr(), *(b.element_size() * step for step in steps)))


def gemv(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    config: GemmConfig,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Writes epilogue(alpha · a @ b + beta · bias) to `out`, for few rows in `a`.

    Args:
        a: (B, M, K), M ≤ 2, or 4 where b's rows are not aligned; fp16, bf16 or fp32, any strides.
        b: (B, K, N), a's dtype, any strides.
        bias: (B, M, N), any strides (0 where it broadcasts), or None.
        out: (B, M, N), any strides without overlap.
        alpha: factor of the product.
        beta: factor of the bias.
        config: block_n, block_k, split_k, num_warps and num_stages are used; with `swap_operands`
            the few rows are b's columns.
        epilogue: what follows; with operands only for B = 1.
    """
    product = arrange(a, b, bias, out, config, epilogue)
    a, b, bias, out, epilogue = product[:5]
    batch, M, K = a.shape
    N = b.shape[2]
    split_k = config.split_k
    along_k, k_major = lane(b), True
    if along_k > 1 and not _has_pieces(b):
        # Neighbouring threads read neighbouring elements, and each adds up its own of a step.
        along_k, k_major = max(1, config.block_k // (32 * config.num_warps)), False
    gemv_kernel[(triton.cdiv(N, config.block_n) * batch, split_k)](
        a, b, a if bias is None else bias, product.target,
        N, K,
        *a.stride(),
        *b.stride(),
        *((0, 0, 0) if bias is None else bias.stride()),
        *product.strides,
        float(alpha), float(beta), epilogue.arguments,
        ROWS=M, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLIT_K=split_k,
        LANE=along_k, K_MAJOR=k_major, EVEN_K=K % (config.block_k * split_k) == 0,
        HAS_BIAS=bias is not None and split_k == 1, ACTIVATION=epilogue.activation,
        WIDE=can_overflow_int32(a, b, out, *(() if bias is None else (bias,)), *epilogue.tensors),
        STAGES=config.num_stages, EIGHTS=eights(N, K, *a.stride(), *b.stride()),
        num_warps=config.num_warps,
        **launch_options(hardware.of(out.device)),
    )  # fmt: skip
    if split_k > 1:
        reduce_partials(product, alpha=alpha, beta=beta, block=config.reduce_block)
