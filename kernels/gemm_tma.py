"""Persistent tiled matrix product on tensor descriptors (TMA), for 16-bit operands on Hopper.

    out[m, n] = epilogue(alpha · Σ_k a[m, k] · b[k, n]  +  beta · bias[m, n])

The copy engine fills shared memory, so no thread computes addresses, rows past the end read as
zeros, and the pipeline costs no registers. One program a multiprocessor walks over its tiles; with
the loops flattened, the next tile's loads run while this tile's result is written.

Each operand is a matrix with one contiguous dimension: the descriptor of a K-major operand yields
(rows, K) tiles, that of the other kind (K, rows) tiles, transposed for the product by its layout
alone. SPLIT_K > 1 cuts K into consecutive runs, each writing fp32 partials for `reduce_partials`.

Reference: the persistent descriptor kernel of Triton's tutorial 09. Without warp specialisation:
triton 3.6 miscompiles it for host descriptors with BLOCK_M = 128 (triton-lang/triton#11587).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.dependent_launch import (
    launch_options,
    release_dependents,
    wait_for_producers,
)
from triton_only_backend.kernels.epilogue import (
    NO_EPILOGUE,
    Epilogue,
    apply_epilogue,
    bias_strides,
    load_bias,
)
from triton_only_backend.kernels.gemm import grouped_tile
from triton_only_backend.kernels.split_k import arrange, reduce_partials

if TYPE_CHECKING:
    import torch

    from triton_only_backend.kernels.gemm_configs import GemmConfig


@triton.jit
def gemm_tma_kernel(
    a_desc, b_desc, c_desc, bias_ptr, c_ptr,
    M, N, K,
    stride_sm, stride_sn, stride_cs, stride_cm, stride_cn,
    alpha, beta, epilogue,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, A_K_MAJOR: tl.constexpr, B_K_MAJOR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_OPERANDS: tl.constexpr, ACTIVATION: tl.constexpr,
    STORE_TMA: tl.constexpr, FLATTEN: tl.constexpr, STORE_HALVES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_producers(PDL)
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    tiles = grid_m * grid_n
    k_tiles = tl.cdiv(K, BLOCK_K)
    k_run = tl.cdiv(k_tiles, SPLIT_K)
    for work in tl.range(tl.program_id(0), tiles * SPLIT_K, tl.num_programs(0), flatten=FLATTEN):
        split = work // tiles
        pid_m, pid_n = grouped_tile(work % tiles, grid_m, grid_n, GROUP_M)
        row = pid_m * BLOCK_M
        column = pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(0, k_run):
            # A run past the end of K reads zeros.
            k = (split * k_run + step) * BLOCK_K
            if A_K_MAJOR:
                a = a_desc.load([row, k])
            else:
                a = a_desc.load([k, row]).T
            if B_K_MAJOR:
                b = b_desc.load([column, k]).T
            else:
                b = b_desc.load([k, column])
            acc = tl.dot(a, b, acc)
        if SPLIT_K == 1:
            acc *= tl.cast(alpha, tl.float32)
            if HAS_BIAS or HAS_OPERANDS:
                offs_m = row.to(tl.int64) + tl.arange(0, BLOCK_M)
                offs_n = column.to(tl.int64) + tl.arange(0, BLOCK_N)
                mask_m = offs_m < M
                mask_n = offs_n < N
                if HAS_BIAS:
                    bias = load_bias(bias_ptr, offs_m, offs_n, mask_m, mask_n, stride_sm, stride_sn)
                    acc += tl.cast(beta, tl.float32) * bias
                acc = apply_epilogue(
                    acc, offs_m[:, None], offs_n[None, :], mask_m[:, None] & mask_n[None, :],
                    epilogue, ACTIVATION,
                )  # fmt: skip
            else:
                acc = apply_epilogue(acc, 0, 0, None, epilogue, ACTIVATION)
        if STORE_TMA:
            if STORE_HALVES:
                halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
                left, right = tl.split(halves)
                c_desc.store([row, column], left.to(c_desc.dtype))
                c_desc.store([row, column + BLOCK_N // 2], right.to(c_desc.dtype))
            else:
                c_desc.store([row, column], acc.to(c_desc.dtype))
        else:
            offs_m = row + tl.arange(0, BLOCK_M)
            offs_n = column + tl.arange(0, BLOCK_N)
            mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            c_ptrs = (
                c_ptr + split.to(tl.int64) * stride_cs
                + offs_m.to(tl.int64)[:, None] * stride_cm
                + offs_n.to(tl.int64)[None, :] * stride_cn
            )  # fmt: skip
            tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask)
    release_dependents(PDL)


def has_aligned_rows(matrix: torch.Tensor) -> bool:
    """Whether rows are contiguous and start at 16-byte boundaries, as descriptors ask for."""
    row = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and row % 16 == 0 and matrix.data_ptr() % 16 == 0


def _descriptor(matrix: torch.Tensor, block: tuple[int, int]) -> tuple[TensorDescriptor, bool]:
    """A descriptor yielding `block` tiles (or their transpose), and whether it is row-major."""
    if matrix.stride(1) == 1:
        return TensorDescriptor.from_tensor(matrix, list(block)), True
    return TensorDescriptor.from_tensor(matrix.T, [block[1], block[0]]), False


def gemm_tma(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    config: GemmConfig,
    num_sms: int,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Writes epilogue(alpha · a @ b + beta · bias) to `out`.

    Args:
        a: (M, K), fp16 or bf16; a unit stride and 16-byte aligned rows.
        b: (K, N), a's dtype, likewise.
        bias: (M, N), any strides (0 where it broadcasts), or None.
        out: (M, N), any strides without overlap.
        alpha: factor of the product.
        beta: factor of the bias.
        config: tile sizes and work decomposition.
        num_sms: multiprocessors of the device.
        epilogue: what follows.
    """
    product = arrange(a, b, bias, out, config, epilogue)
    a, b, bias, out, epilogue = product[:5]
    M, K = a.shape
    N = b.shape[1]
    split_k = config.split_k
    a_desc, a_k_major = _descriptor(a, (config.block_m, config.block_k))
    b_desc, b_row_major = _descriptor(b, (config.block_k, config.block_n))
    store_tma = split_k == 1 and has_aligned_rows(out)
    store_block = [config.block_m, config.block_n // (1 + config.store_halves)]
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n) * split_k
    programs = min(tiles, num_sms * config.resident)
    gemm_tma_kernel[(programs,)](
        a_desc, b_desc,
        TensorDescriptor.from_tensor(out, store_block) if store_tma else None,
        a if bias is None else bias, product.target,
        M, N, K,
        *bias_strides(bias)[-2:],
        *product.strides,
        float(alpha), float(beta), epilogue.arguments,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP_M=config.group_m, SPLIT_K=split_k,
        A_K_MAJOR=a_k_major, B_K_MAJOR=not b_row_major,
        HAS_BIAS=bias is not None, HAS_OPERANDS=len(epilogue.tensors) > 0,
        ACTIVATION=epilogue.activation, STORE_TMA=store_tma,
        FLATTEN=config.flatten and programs < tiles, STORE_HALVES=config.store_halves,
        num_warps=config.num_warps, num_stages=config.num_stages,
        **launch_options(hardware.of(out.device)),
    )  # fmt: skip
    if split_k > 1:
        reduce_partials(
            product._replace(target=product.target[:, None]),
            alpha=alpha,
            beta=beta,
            block=config.reduce_block,
        )
