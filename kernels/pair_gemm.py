"""Two linear layers of one input and of one shape as one product of twice the columns, on Hopper.

    out_i = epilogue(x @ weight_iᵀ + bias_i)
    gated: out = epilogue(activation(x @ gateᵀ + bias) · (x @ upᵀ + bias))

One tensor descriptor spans both weights, wherever they lie in memory: its outermost dimension has
two steps, from the one's address to the other's. So a tile holds BLOCK_N rows of each, side by side
in shared memory, and is one operand of the tensor cores' widest instruction (m64n256k16), whose
reading of x serves both; two accumulators of half the width read x twice, which shared memory
cannot feed (600 of 790 TFLOP/s on an H200). Of the result a thread holds the columns n of both
weights, so that the gate is applied in registers. Else as `gemm_tma`: persistent, pipelined.
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
from triton_only_backend.kernels.epilogue import NO_EPILOGUE, Epilogue, apply_epilogue
from triton_only_backend.kernels.gated_gemm import gate_tile
from triton_only_backend.kernels.gemm import grouped_tile
from triton_only_backend.kernels.gemm_tma import has_aligned_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from triton_only_backend.kernels.linear_configs import PairConfig

# Bytes. What cuTensorMapEncodeTiled checks of strides, beside multiples of 16; that each be one of
# the stride before, as the CUDA driver's documentation has it, no layout with heads in rows heeds.
MAX_STRIDE = 1 << 40


@triton.jit
def store_tile(
    result, desc, ptr, row, column, M, N, stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    if desc is not None:
        desc.store([row, column], result.to(desc.dtype))
    else:
        offs_m = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        offs_n = column + tl.arange(0, BLOCK_N)
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        ptrs = ptr + offs_m[:, None] * stride_m + offs_n[None, :]
        tl.store(ptrs, result.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def pair_gemm_kernel(
    x_desc, pair_desc, out0_desc, out1_desc, biases, outs,
    M, N, K, stride_om, epilogue,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    GATE: tl.constexpr, ACTIVATION: tl.constexpr, FLATTEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GATE: which of the pair is the gate, or None."""
    wait_for_producers(PDL)
    out_descs = (out0_desc, out1_desc)
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), grid_m * grid_n, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = grouped_tile(tile, grid_m, grid_n, GROUP_M)
        row = pid_m * BLOCK_M
        column = pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
        for step in range(0, tl.cdiv(K, BLOCK_K)):
            x = x_desc.load([row, step * BLOCK_K])
            pair = pair_desc.load([0, column, step * BLOCK_K])
            acc = tl.dot(x, tl.reshape(pair, (2 * BLOCK_N, BLOCK_K)).T, acc)
        halves = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
        if GATE is not None:
            result, _, _, _ = gate_tile(
                halves[GATE], halves[1 - GATE],
                None if biases is None else biases[GATE],
                None if biases is None else biases[1 - GATE],
                row, column, M, N, epilogue, BLOCK_M, BLOCK_N, ACTIVATION, False,
            )  # fmt: skip
            store_tile(
                result, out_descs[0], outs[0], row, column, M, N, stride_om, BLOCK_M, BLOCK_N
            )
        else:
            offs_n = column + tl.arange(0, BLOCK_N)
            for i in tl.static_range(0, 2):
                result = halves[i]
                if biases is not None:
                    bias = tl.load(biases[i] + offs_n, mask=offs_n < N, other=0.0)
                    result += bias.to(tl.float32)[None, :]
                result = apply_epilogue(result, 0, 0, None, epilogue, ACTIVATION)
                store_tile(
                    result, out_descs[i], outs[i], row, column, M, N, stride_om, BLOCK_M, BLOCK_N
                )
    release_dependents(PDL)


def is_pair(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether one descriptor spans two (N, K) weights: alike, and not too far from each other."""
    distance = abs(second.data_ptr() - first.data_ptr())
    alike = first.shape == second.shape and first.stride() == second.stride()
    return alike and 0 < distance < MAX_STRIDE and distance % 16 == 0


def pair_gemm(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    outs: Sequence[torch.Tensor],
    *,
    config: PairConfig,
    num_sms: int,
    gated: bool = False,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Writes epilogue(x @ weightᵀ (+ bias)) to each of two `outs`, or gated to one.

    Args:
        x: (M, K), fp16 or bf16, K-contiguous, 16-byte aligned rows.
        weights: two of (N, K), likewise, for which `is_pair` holds; gated, the gate first.
        biases: two of (N,), contiguous, or None.
        outs: (M, N) each, contiguous, of one dtype.
        config: tile sizes, of x's rows and of each weight's.
        num_sms: multiprocessors of the device.
        gated: the activation of the first product times the second.
        epilogue: what follows; with operands only for one output.
    """
    M, K = x.shape
    N = weights[0].shape[0]
    low, high = sorted((0, 1), key=lambda i: weights[i].data_ptr())
    first, second = weights[low], weights[high]
    distance = (second.data_ptr() - first.data_ptr()) // first.element_size()
    pair = TensorDescriptor(
        first, [2, N, K], [distance, *first.stride()], [2, config.block_n, config.block_k]
    )
    if not gated:
        outs = (outs[low], outs[high])
    store = all(has_aligned_rows(out) for out in outs)
    out_block = [config.block_m, config.block_n]
    descriptors = [TensorDescriptor.from_tensor(out, out_block) for out in outs] if store else []
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    programs = min(tiles, num_sms)
    pair_gemm_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]), pair,
        *[*descriptors, None, None][:2],
        (biases[low], biases[high]) if biases else None, tuple(outs),
        M, N, K, outs[0].stride(0), epilogue.arguments,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP_M=config.group_m, GATE=low if gated else None, ACTIVATION=epilogue.activation,
        FLATTEN=config.flatten and programs < tiles,
        num_warps=config.num_warps, num_stages=config.num_stages,
        **launch_options(hardware.of(x.device)),
    )  # fmt: skip
