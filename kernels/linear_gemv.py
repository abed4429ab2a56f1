"""One or two rows through up to three linear layers in one launch, with the norm before them.

    x = a · rsqrt(mean_k(a²) + eps) · (norm + offset), or a itself
    centred: x = (a - mean_k(a)) · rsqrt(var_k(a) + eps) · (norm + offset) + norm_bias
    out_i = activation(x @ weight_iᵀ + bias_i) · …          (the rest as in `epilogue`)
    gated: out = activation(x @ weight_0ᵀ + bias_0) · (x @ weight_1ᵀ + bias_1) · …

The loop of `gemv`, over weights of which a thread reads 16 bytes along K (`nn.Linear`'s) or along N
(stored transposed, as GPT-2's are). RMSNorm costs no pass: a row's Σ a² is gathered beside its
products with the weights, which it then scales. LayerNorm takes a look at the row before: the mean
must be gone before anything is multiplied, or a large one leaves nothing of the digits. Gated, a
program streams the same rows of both weights, so the intermediate of a SwiGLU never leaves its
registers.
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
    activate,
    apply_epilogue,
)
from triton_only_backend.kernels.gemm import can_overflow_int32
from triton_only_backend.kernels.gemv import stream
from triton_only_backend.kernels.layer_norm import block_of_row, row_statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from triton_only_backend.kernels.linear_configs import GemvConfig
    from triton_only_backend.kernels.rms_norm import Norm


@triton.jit
def linear_gemv_tile(
    a_ptr, norm_ptr, norm_bias_ptr, weights, biases, out_ptr,
    tile, N, K,
    stride_am, stride_ak, strides_w,
    norm_eps, norm_offset, epilogue,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LANE: tl.constexpr,
    K_MAJOR: tl.constexpr, EVEN_K: tl.constexpr, ROW_BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one output, from one weight or, gated, from two."""
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    wait_for_producers(PDL)
    statistics: tl.tuple = ()
    if ROW_BLOCK is not None:
        for row in tl.static_range(0, ROWS):
            row_ptr = a_ptr + row * stride_am
            statistics += (row_statistics(row_ptr, K, stride_ak, norm_eps, ROW_BLOCK, ONE_BLOCK),)

    if WIDE:
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    mask_n = offs_n < N
    ptrs: tl.tuple = ()
    steps: tl.tuple = ()
    for i in tl.static_range(0, len(weights)):
        if K_MAJOR:
            ptrs += (weights[i] + offs_n[:, None] * strides_w[i] + offs_k[None, :],)
            steps += (BLOCK_K,)
        else:
            ptrs += (weights[i] + offs_n[:, None] + offs_k[None, :] * strides_w[i],)
            steps += ((tl.cast(strides_w[i], tl.int64) if WIDE else strides_w[i]) * BLOCK_K,)
    sums, squares = stream(
        a_ptr, norm_ptr, norm_bias_ptr, statistics, ptrs, steps, offs_k, mask_n, K,
        stride_am, stride_ak, norm_offset,
        ROWS, BLOCK_N, BLOCK_K, BLOCK_K, LANE, K_MAJOR, EVEN_K, WIDE, STAGES,
    )  # fmt: skip

    release_dependents(PDL)
    for row in tl.static_range(0, ROWS):
        values: tl.tuple = ()
        for i in tl.static_range(0, len(weights)):
            value = sums[i * ROWS + row]
            if norm_ptr is not None and ROW_BLOCK is None:
                value *= tl.rsqrt(squares[row] / K + norm_eps)
            if biases is not None:
                value += tl.load(biases[i] + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            values += (value,)
        if GATED:
            result = activate(values[0], ACTIVATION) * values[1]
            result = apply_epilogue(result, row, offs_n, mask_n, epilogue, "none")
        else:
            result = apply_epilogue(values[0], row, offs_n, mask_n, epilogue, ACTIVATION)
        tl.store(out_ptr + row * N + offs_n, result.to(out_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def linear_gemv_kernel(
    a_ptr, norm_ptr, norm_bias_ptr, weights, biases, outs, columns, K,
    stride_am, stride_ak, strides_w,
    norm_eps, norm_offset, epilogue,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LANE: tl.constexpr,
    K_MAJOR: tl.constexpr, EVEN_K: tl.constexpr, ROW_BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
    EIGHTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    K, stride_am = in_eights((K, stride_am), EIGHTS)
    strides_w = in_eights(strides_w, EIGHTS >> 2)
    columns = in_eights(columns, EIGHTS >> 2 + len(strides_w))
    if GATED:
        linear_gemv_tile(
            a_ptr, norm_ptr, norm_bias_ptr, weights, biases, outs[0], pid, columns[0], K,
            stride_am, stride_ak, strides_w, norm_eps, norm_offset, epilogue,
            ROWS, BLOCK_N, BLOCK_K, LANE, K_MAJOR, EVEN_K, ROW_BLOCK, ONE_BLOCK, True,
            ACTIVATION, WIDE, STAGES, PDL,
        )  # fmt: skip
    else:
        # A branch a matrix, rather than a chosen pointer: Triton keeps what it knows of each
        # argument's alignment, and with it the 16-byte loads.
        first = 0
        for i in tl.static_range(0, len(weights)):
            tiles = tl.cdiv(columns[i], BLOCK_N)
            if pid >= first and pid < first + tiles:
                linear_gemv_tile(
                    a_ptr, norm_ptr, norm_bias_ptr,
                    (weights[i],), None if biases is None else (biases[i],), outs[i],
                    pid - first, columns[i], K,
                    stride_am, stride_ak, (strides_w[i],), norm_eps, norm_offset, epilogue,
                    ROWS, BLOCK_N, BLOCK_K, LANE, K_MAJOR, EVEN_K, ROW_BLOCK, ONE_BLOCK, False,
                    ACTIVATION, WIDE, STAGES, PDL,
                )  # fmt: skip
            first += tiles


def linear_gemv(
    a: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    outs: Sequence[torch.Tensor],
    *,
    config: GemvConfig,
    norm: Norm | None = None,
    gated: bool = False,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Writes epilogue(norm(a) @ weightᵀ (+ bias)) to each of `outs`, in one launch.

    Args:
        a: (M, K), M ≤ 2, fp16, bf16 or fp32, any strides.
        weights: one to three of (N_i, K), a's dtype, all K-contiguous or all N-contiguous.
        biases: as many of (N_i,), contiguous, or None.
        outs: as many of (M, N_i), contiguous; gated, one.
        config: tile sizes, warps and stages, for weights of this layout.
        norm: normalises a's rows; its weight and bias are contiguous.
        gated: of two weights, the activation of the first product times the second.
        epilogue: what follows; with operands only for one output.
    """
    M, K = a.shape
    tiles = sum(triton.cdiv(out.shape[1], config.block_n) for out in outs)
    device = hardware.of(a.device)
    row_block = block_of_row(K, device) if norm is not None and norm.centered else None
    strides = tuple(weight.stride(0 if config.k_major else 1) for weight in weights)
    columns = tuple(out.shape[1] for out in outs)
    linear_gemv_kernel[(tiles,)](
        a, *((None, None) if norm is None else (norm.weight, norm.bias)),
        tuple(weights), tuple(biases) if biases else None,
        tuple(outs), columns, K,
        *a.stride(), strides,
        0.0 if norm is None else float(norm.eps), 0.0 if norm is None else float(norm.offset),
        epilogue.arguments,
        ROWS=M, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        LANE=config.lane(a.element_size()), K_MAJOR=config.k_major, EVEN_K=K % config.block_k == 0,
        ROW_BLOCK=row_block, ONE_BLOCK=row_block is not None and row_block >= K,
        GATED=gated, ACTIVATION=epilogue.activation,
        WIDE=can_overflow_int32(a, *weights, *epilogue.tensors), STAGES=config.num_stages,
        EIGHTS=eights(K, a.stride(0), *strides, *columns), num_warps=config.num_warps,
        **launch_options(device),
    )  # fmt: skip
