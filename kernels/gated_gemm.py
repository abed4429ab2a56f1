"""Two linear layers of one input, of which the first gates the second, in one kernel.

    out[m, n] = epilogue(activation(Σ_k x[m, k] · gate[n, k] + …) · (Σ_k x[m, k] · up[n, k] + …))

A program keeps two accumulators and reads x once for both, so neither product is ever written: the
same work as a product of twice the columns, without the pass over its output. For 16-bit operands
with K contiguous in all three, on tensor cores: through pointers, or on Hopper, for few rows in x,
persistently through tensor descriptors (for more see `pair_gemm`). SWAP computes the transposed
tile: with few rows in x, the weights go to the tensor cores' 64-row side.
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
from triton_only_backend.kernels.eights import eights, in_eights
from triton_only_backend.kernels.epilogue import (
    NO_EPILOGUE,
    Epilogue,
    activate,
    apply_epilogue,
)
from triton_only_backend.kernels.gemm import can_overflow_int32, grouped_tile

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from triton_only_backend.kernels.linear_configs import GatedConfig


@triton.jit
def gate_tile(
    gate, up, gate_bias_ptr, up_bias_ptr, first_m, first_n, M, N, epilogue,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """What the two sums of a tile come to, the tile's row and column numbers, and its mask."""
    rows = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
    columns = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    if SWAP:
        offs_m = rows[None, :]
        offs_n = columns[:, None]
    else:
        offs_m = rows[:, None]
        offs_n = columns[None, :]
    mask = (offs_m < M) & (offs_n < N)
    if gate_bias_ptr is not None:
        gate_bias = tl.load(gate_bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        up_bias = tl.load(up_bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        gate += tl.expand_dims(gate_bias, 1 if SWAP else 0)
        up += tl.expand_dims(up_bias, 1 if SWAP else 0)
    result = activate(gate, ACTIVATION) * up
    result = apply_epilogue(result, offs_m, offs_n, mask, epilogue, "none")
    return result, offs_m, offs_n, mask


@triton.jit
def gated_gemm_kernel(
    x_ptr, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, out_ptr,
    M, N, K,
    stride_xm, stride_gn, stride_un, stride_om,
    epilogue,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, ACTIVATION: tl.constexpr, SWAP: tl.constexpr, WIDE: tl.constexpr,
    EIGHTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_producers(PDL)
    K, stride_xm, stride_gn, stride_un = in_eights((K, stride_xm, stride_gn, stride_un), EIGHTS)
    N, stride_om = in_eights((N, stride_om), EIGHTS >> 4)
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = grouped_tile(tl.program_id(0), grid_m, grid_n, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    mask_m = rows < M
    mask_n = columns < N
    # The long side's tiles are (rows, K), the other's (K, rows): the layouts of the MMA's operands.
    if SWAP:
        x_ptrs = x_ptr + rows[None, :] * stride_xm + offs_k[:, None]
        gate_ptrs = gate_ptr + columns[:, None] * stride_gn + offs_k[None, :]
        up_ptrs = up_ptr + columns[:, None] * stride_un + offs_k[None, :]
        gate = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
        gate_ptrs = gate_ptr + columns[None, :] * stride_gn + offs_k[:, None]
        up_ptrs = up_ptr + columns[None, :] * stride_un + offs_k[:, None]
        gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = gate
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        mask_k = offs_k < K - k * BLOCK_K
        if SWAP:
            mask_x = mask_m[None, :]
            mask_w = mask_n[:, None]
            if not EVEN_K:
                mask_x = mask_x & mask_k[:, None]
                mask_w = mask_w & mask_k[None, :]
        else:
            mask_x = mask_m[:, None]
            mask_w = mask_n[None, :]
            if not EVEN_K:
                mask_x = mask_x & mask_k[None, :]
                mask_w = mask_w & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        g = tl.load(gate_ptrs, mask=mask_w, other=0.0)
        u = tl.load(up_ptrs, mask=mask_w, other=0.0)
        if SWAP:
            gate = tl.dot(g, x, gate)
            up = tl.dot(u, x, up)
        else:
            gate = tl.dot(x, g, gate)
            up = tl.dot(x, u, up)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    release_dependents(PDL)
    result, offs_m, offs_n, mask = gate_tile(
        gate, up, gate_bias_ptr, up_bias_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, epilogue,
        BLOCK_M, BLOCK_N, ACTIVATION, SWAP,
    )  # fmt: skip
    out_ptrs = out_ptr + offs_m * stride_om + offs_n
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_gemm_tma_kernel(
    x_desc, gate_desc, up_desc, gate_bias_ptr, up_bias_ptr, out_ptr,
    M, N, K, stride_om, epilogue,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr, FLATTEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Transposed tiles: the weights' rows are the tensor cores' M side."""
    wait_for_producers(PDL)
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), grid_m * grid_n, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = grouped_tile(tile, grid_m, grid_n, GROUP_M)
        row = pid_m * BLOCK_M
        column = pid_n * BLOCK_N
        gate = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for step in range(0, tl.cdiv(K, BLOCK_K)):
            k = step * BLOCK_K
            x = x_desc.load([row, k])
            gate = tl.dot(gate_desc.load([column, k]), x.T, gate)
            up = tl.dot(up_desc.load([column, k]), x.T, up)
        result, offs_m, offs_n, mask = gate_tile(
            gate, up, gate_bias_ptr, up_bias_ptr, row, column, M, N, epilogue,
            BLOCK_M, BLOCK_N, ACTIVATION, True,
        )  # fmt: skip
        out_ptrs = out_ptr + offs_m * stride_om + offs_n
        tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=mask)
    release_dependents(PDL)


def gated_gemm(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    out: torch.Tensor,
    *,
    config: GatedConfig,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Writes epilogue(activation(x @ gateᵀ + bias) · (x @ upᵀ + bias)) to `out`.

    Args:
        x: (M, K), fp16 or bf16, K-contiguous; for descriptors with 16-byte aligned rows.
        weights: gate and up, (N, K) each, likewise.
        biases: theirs, (N,) each, contiguous, or None.
        out: (M, N), contiguous.
        config: tile sizes, of x's rows and of each weight's; the kernel.
        epilogue: what follows; its activation is the gate's.
    """
    M, K = x.shape
    N = out.shape[1]
    device = hardware.of(x.device)
    gate_bias, up_bias = biases or (None, None)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    if not config.tma:
        strides = (x.stride(0), *(weight.stride(0) for weight in weights))
        gated_gemm_kernel[(tiles,)](
            x, *weights, gate_bias, up_bias, out,
            M, N, K,
            *strides, out.stride(0),
            epilogue.arguments,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            GROUP_M=config.group_m, EVEN_K=K % config.block_k == 0,
            ACTIVATION=epilogue.activation, SWAP=config.swap,
            WIDE=can_overflow_int32(x, *weights), EIGHTS=eights(K, *strides, N, out.stride(0)),
            num_warps=config.num_warps, num_stages=config.num_stages,
            **launch_options(device),
        )  # fmt: skip
        return
    weight_block = [config.block_n, config.block_k]
    programs = min(tiles, device.num_sms * config.resident)
    gated_gemm_tma_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        *(TensorDescriptor.from_tensor(weight, weight_block) for weight in weights),
        gate_bias, up_bias, out,
        M, N, K, out.stride(0), epilogue.arguments,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP_M=config.group_m, ACTIVATION=epilogue.activation, FLATTEN=programs < tiles,
        num_warps=config.num_warps, num_stages=config.num_stages,
        **launch_options(device),
    )  # fmt: skip
