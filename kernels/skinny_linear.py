"""Few rows through up to three linear layers in one launch, with the norm before them, on Hopper.

    x = a · rsqrt(mean_k(a²) + eps) · (norm + offset), or a itself
    out_i = activation(x @ weight_iᵀ + bias_i) · …          (the rest as in `epilogue`)
    gated: out = activation(x @ weight_0ᵀ + bias_0) · (x @ weight_1ᵀ + bias_1) · …

`linear_gemv` for 3 to 64 rows, on tensor cores with tensor descriptors. A weight's rows are their
64-row side (SWAP), or a's are, which wastes those that a has not, but takes tiles of 32 weight rows
where tiles of 64 would leave multiprocessors without one. A tile of a is multiplied by the norm's
weight and rounded on its way to the tensor cores, while its Σ a² is gathered; what a row is to be
scaled with is known at the end, and the sums are scaled. That leaves the range to a: for bfloat16,
where fp16 could overflow.
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
    activate,
    apply_epilogue,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from triton_only_backend.kernels.linear_configs import SkinnyConfig
    from triton_only_backend.kernels.rms_norm import Norm


@triton.jit
def skinny_linear_tile(
    a_desc, norm_ptr, weights, biases, out_ptr,
    tile, M, N, K, norm_eps, norm_offset, epilogue,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one output, from one weight or, gated, from two."""
    column = tile * BLOCK_N
    accs: tl.tuple = ()
    for _ in tl.static_range(0, len(weights)):
        if SWAP:
            accs += (tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32),)
        else:
            accs += (tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),)
    squares = tl.zeros((BLOCK_M, BLOCK_K // 8), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K
        a = a_desc.load([0, k])
        if norm_ptr is not None:
            offs_k = k + tl.arange(0, BLOCK_K)
            g = tl.load(norm_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32) + norm_offset
            wide = a.to(tl.float32)
            squares += tl.sum(tl.reshape(wide * wide, (BLOCK_M, BLOCK_K // 8, 8)), axis=2)
            a = (wide * g[None, :]).to(a.dtype)
        next_accs: tl.tuple = ()
        for i in tl.static_range(0, len(weights)):
            w = weights[i].load([column, k])
            if SWAP:
                next_accs += (tl.dot(w, a.T, accs[i]),)
            else:
                next_accs += (tl.dot(a, w.T, accs[i]),)
        accs = next_accs

    rows = tl.expand_dims(tl.arange(0, BLOCK_M), 0 if SWAP else 1)
    columns = tl.expand_dims(column + tl.arange(0, BLOCK_N), 1 if SWAP else 0)
    values: tl.tuple = ()
    for i in tl.static_range(0, len(weights)):
        value = accs[i]
        if norm_ptr is not None:
            rstd = tl.rsqrt(tl.sum(squares, axis=1) / K + norm_eps)
            value *= tl.expand_dims(rstd, 0 if SWAP else 1)
        if biases is not None:
            value += tl.load(biases[i] + columns, mask=columns < N, other=0.0).to(tl.float32)
        values += (value,)
    mask = (rows < M) & (columns < N)
    if GATED:
        result = activate(values[0], ACTIVATION) * values[1]
        result = apply_epilogue(result, rows, columns, mask, epilogue, "none")
    else:
        result = apply_epilogue(values[0], rows, columns, mask, epilogue, ACTIVATION)
    tl.store(out_ptr + rows * N + columns, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def skinny_linear_kernel(
    a_desc, norm_ptr, w0_desc, w1_desc, w2_desc, biases, outs, columns, M, K,
    norm_eps, norm_offset, epilogue,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, SWAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_producers(PDL)
    pid = tl.program_id(0)
    if GATED:
        skinny_linear_tile(
            a_desc, norm_ptr, (w0_desc, w1_desc), biases, outs[0],
            pid, M, columns[0], K, norm_eps, norm_offset, epilogue,
            BLOCK_M, BLOCK_N, BLOCK_K, True, ACTIVATION, SWAP,
        )  # fmt: skip
    else:
        first = 0
        weights = (w0_desc, w1_desc, w2_desc)
        for i in tl.static_range(0, len(outs)):
            tiles = tl.cdiv(columns[i], BLOCK_N)
            if pid >= first and pid < first + tiles:
                skinny_linear_tile(
                    a_desc, norm_ptr, (weights[i],), None if biases is None else (biases[i],),
                    outs[i], pid - first, M, columns[i], K, norm_eps, norm_offset, epilogue,
                    BLOCK_M, BLOCK_N, BLOCK_K, False, ACTIVATION, SWAP,
                )  # fmt: skip
            first += tiles
    release_dependents(PDL)


def skinny_linear(
    a: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    outs: Sequence[torch.Tensor],
    *,
    config: SkinnyConfig,
    norm: Norm | None = None,
    gated: bool = False,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Writes epilogue(norm(a) @ weightᵀ (+ bias)) to each of `outs`, in one launch.

    Args:
        a: (M, K), M ≤ 64, fp16 or bf16 (with a norm bf16), K-contiguous, 16-byte aligned rows.
        weights: one to three of (N_i, K), likewise.
        biases: as many of (N_i,), contiguous, or None.
        outs: as many of (M, N_i), contiguous; gated, one.
        config: tile sizes, warps and stages; block_m ≥ M.
        norm: normalises a's rows; its weight is contiguous.
        gated: of two weights, the activation of the first product times the second.
        epilogue: what follows; with operands only for one output.
    """
    M, K = a.shape
    tiles = sum(triton.cdiv(out.shape[1], config.block_n) for out in outs)
    block = [config.block_n, config.block_k]
    descriptors = [TensorDescriptor.from_tensor(weight, block) for weight in weights]
    skinny_linear_kernel[(tiles,)](
        TensorDescriptor.from_tensor(a, [config.block_m, config.block_k]),
        None if norm is None else norm.weight, *[*descriptors, None, None][:3],
        tuple(biases) if biases else None, tuple(outs), tuple(out.shape[1] for out in outs), M, K,
        0.0 if norm is None else float(norm.eps), 0.0 if norm is None else float(norm.offset),
        epilogue.arguments,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GATED=gated, ACTIVATION=epilogue.activation, SWAP=config.swap,
        num_warps=config.num_warps, num_stages=config.num_stages,
        **launch_options(hardware.of(a.device)),
    )  # fmt: skip
