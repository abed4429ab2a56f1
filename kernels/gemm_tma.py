"""Persistent tiled matrix product on tensor descriptors (TMA), for 16-bit operands on Hopper.

    out[b, m, n] = epilogue(alpha · Σ_k a[b, m, k] · b[b, k, n]  +  beta · bias[b, m, n])

The copy engine fills shared memory, so no thread computes addresses, rows past the end read as
zeros, and the pipeline costs no registers. One program a multiprocessor walks over its tiles; with
the loops flattened, the next tile's loads run while this tile's result is written.

Each operand is a matrix with one contiguous dimension: the descriptor of a K-major operand yields
(rows, K) tiles, that of the other kind (K, rows) tiles, transposed for the product by its layout
alone. The matrices of a batch lie STEP rows apart in one descriptor: a tile that reaches past the
rows of its matrix reads those of the next, and is written by pointers, which mask what it must not
overwrite. SPLIT_K > 1 cuts K into consecutive runs, each writing fp32 partials for
`reduce_partials`.

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
    M, N, K, batch, step_a, step_b, step_c,
    stride_sb, stride_sm, stride_sn, stride_cs, stride_cb, stride_cm, stride_cn,
    alpha, beta, epilogue,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, A_K_MAJOR: tl.constexpr, B_K_MAJOR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_OPERANDS: tl.constexpr, ACTIVATION: tl.constexpr,
    STORE_TMA: tl.constexpr, FLATTEN: tl.constexpr, STORE_HALVES: tl.constexpr,
    BATCHED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_producers(PDL)
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    tiles = grid_m * grid_n
    k_tiles = tl.cdiv(K, BLOCK_K)
    k_run = tl.cdiv(k_tiles, SPLIT_K)
    works = tiles * SPLIT_K
    if BATCHED:
        works *= batch
    for work in tl.range(tl.program_id(0), works, tl.num_programs(0), flatten=FLATTEN):
        split = work // tiles
        first_a = 0
        first_b = 0
        first_c = 0
        if BATCHED:
            matrix = work // tiles
            split = 0
            first_a = matrix * step_a
            first_b = matrix * step_b
            first_c = matrix * step_c
        pid_m, pid_n = grouped_tile(work % tiles, grid_m, grid_n, GROUP_M)
        row = pid_m * BLOCK_M
        column = pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(0, k_run):
            # A run past the end of K reads zeros.
            k = (split * k_run + step) * BLOCK_K
            if A_K_MAJOR:
                a = a_desc.load([first_a + row, k])
            else:
                a = a_desc.load([first_a + k, row]).T
            if B_K_MAJOR:
                b = b_desc.load([first_b + column, k]).T
            else:
                b = b_desc.load([first_b + k, column])
            acc = tl.dot(a, b, acc)
        if SPLIT_K == 1:
            acc *= tl.cast(alpha, tl.float32)
            if HAS_BIAS or HAS_OPERANDS:
                offs_m = row.to(tl.int64) + tl.arange(0, BLOCK_M)
                offs_n = column.to(tl.int64) + tl.arange(0, BLOCK_N)
                mask_m = offs_m < M
                mask_n = offs_n < N
                if HAS_BIAS:
                    bias_ptrs = bias_ptr
                    if BATCHED:
                        bias_ptrs += matrix.to(tl.int64) * stride_sb
                    bias = load_bias(
                        bias_ptrs, offs_m, offs_n, mask_m, mask_n, stride_sm, stride_sn
                    )
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
                c_desc.store([first_c + row, column], left.to(c_desc.dtype))
                c_desc.store([first_c + row, column + BLOCK_N // 2], right.to(c_desc.dtype))
            else:
                c_desc.store([first_c + row, column], acc.to(c_desc.dtype))
        else:
            offs_m = row + tl.arange(0, BLOCK_M)
            offs_n = column + tl.arange(0, BLOCK_N)
            mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            c_ptrs = (
                c_ptr + split.to(tl.int64) * stride_cs
                + offs_m.to(tl.int64)[:, None] * stride_cm
                + offs_n.to(tl.int64)[None, :] * stride_cn
            )  # fmt: skip
            if BATCHED:
                c_ptrs += matrix.to(tl.int64) * stride_cb
            tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask)
    release_dependents(PDL)


def has_aligned_rows(matrix: torch.Tensor) -> bool:
    """Whether rows are contiguous and start at 16-byte boundaries, as descriptors ask for."""
    row = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and row % 16 == 0 and matrix.data_ptr() % 16 == 0


def rows_between(matrices: torch.Tensor) -> int | None:
    """How many rows lie from one matrix of a batch to the next, or None: not a whole number.

    Args:
        matrices: (B, rows, columns), a unit stride along one of the two.
    """
    batch, rows, columns = matrices.stride()
    row = rows if columns == 1 else columns
    if matrices.shape[0] == 1:
        return 0
    return None if row == 0 or batch % row > 0 else batch // row


def _descriptor(matrices: torch.Tensor, block: tuple[int, int]) -> tuple[TensorDescriptor, bool]:
    """A descriptor yielding `block` tiles (or their transpose), and whether it is row-major.

    Args:
        matrices: (B, rows, columns) as `rows_between` allows.
    """
    if matrices.stride(2) != 1:
        return _descriptor(matrices.mT, (block[1], block[0]))[0], False
    batch, rows, columns = matrices.shape
    between = rows_between(matrices)
    assert between is not None
    rows += (batch - 1) * between
    whole = matrices.as_strided((rows, columns), matrices.stride()[1:])
    return TensorDescriptor.from_tensor(whole, list(block)), True


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
        a: (B, M, K), fp16 or bf16; a unit stride and 16-byte aligned rows; see `rows_between`.
        b: (B, K, N), a's dtype, likewise.
        bias: (B, M, N), any strides (0 where it broadcasts), or None.
        out: (B, M, N), any strides without overlap.
        alpha: factor of the product.
        beta: factor of the bias.
        config: tile sizes and work decomposition; a batch does not split K.
        num_sms: multiprocessors of the device.
        epilogue: what follows; with operands only for B = 1.
    """
    product = arrange(a, b, bias, out, config, epilogue)
    a, b, bias, out, epilogue = product[:5]
    batch, M, K = a.shape
    N = b.shape[2]
    split_k = config.split_k
    assert batch == 1 or split_k == 1
    a_desc, a_k_major = _descriptor(a, (config.block_m, config.block_k))
    b_desc, b_row_major = _descriptor(b, (config.block_k, config.block_n))
    whole = batch == 1 or (M % config.block_m == 0 and rows_between(out) is not None)
    store_tma = split_k == 1 and has_aligned_rows(out[0]) and whole
    store_block = (config.block_m, config.block_n // (1 + config.store_halves))
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n) * split_k * batch
    programs = min(tiles, num_sms * config.resident)
    gemm_tma_kernel[(programs,)](
        a_desc, b_desc, _descriptor(out, store_block)[0] if store_tma else None,
        a if bias is None else bias, product.target,
        M, N, K, batch,
        rows_between(a), rows_between(b), rows_between(out) if store_tma else 0,
        *bias_strides(bias),
        *product.strides,
        float(alpha), float(beta), epilogue.arguments,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP_M=config.group_m, SPLIT_K=split_k,
        A_K_MAJOR=a_k_major, B_K_MAJOR=not b_row_major,
        HAS_BIAS=bias is not None, HAS_OPERANDS=len(epilogue.tensors) > 0,
        ACTIVATION=epilogue.activation, STORE_TMA=store_tma,
        FLATTEN=config.flatten and programs < tiles, STORE_HALVES=config.store_halves,
        BATCHED=batch > 1, num_warps=config.num_warps, num_stages=config.num_stages,
        **launch_options(hardware.of(out.device)),
    )  # fmt: skip
    if split_k > 1:
        reduce_partials(product, alpha=alpha, beta=beta, block=config.reduce_block)
