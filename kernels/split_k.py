"""Adds up the partial products of a split-K GEMM, in a fixed order, and applies its epilogue.

    out[b, m, n] = epilogue(alpha · ((p[0] + p[1]) + p[2] + …)[b, m, n]  +  beta · bias[b, m, n])

A kernel of its own rather than atomics: the order of the sums, and so every bit of the result, is
the same in each run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.dependent_launch import (
    launch_options,
    wait_for_producers,
)
from triton_only_backend.kernels.epilogue import NO_EPILOGUE, Epilogue, apply_epilogue

if TYPE_CHECKING:
    from triton_only_backend.kernels.gemm_configs import GemmConfig


class Product(NamedTuple):
    """A product's operands as a kernel takes them, and where it writes.

    `target` is `out` itself, or the fp32 workspace (split_k, B, M, N) for the partial products;
    `strides` are the target's, with the split's first.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    out: torch.Tensor
    epilogue: Epilogue
    target: torch.Tensor
    strides: tuple[int, ...]


def arrange(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: GemmConfig,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Product:
    """Exchanges the operands, where the configuration says so, and makes the workspace."""
    if config.swap_operands:
        a, b, out, epilogue = b.mT, a.mT, out.mT, epilogue.transposed
        bias = None if bias is None else bias.mT
    if config.split_k == 1:
        return Product(a, b, bias, out, epilogue, out, (0, *out.stride()))
    target = torch.empty((config.split_k, *out.shape), dtype=torch.float32, device=out.device)
    return Product(a, b, bias, out, epilogue, target, target.stride())


@triton.jit
def reduce_partials_kernel(
    partial_ptr, bias_ptr, out_ptr,
    M, N, numel,
    stride_ps,
    stride_sb, stride_sm, stride_sn,
    stride_ob, stride_om, stride_on,
    alpha, beta, epilogue,
    SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_producers(PDL)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.load(partial_ptr + offs, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLIT_K):
        acc += tl.load(partial_ptr + split * stride_ps + offs, mask=mask, other=0.0)
    acc *= tl.cast(alpha, tl.float32)
    n = offs % N
    row = offs // N
    m = row % M
    b = row // M
    if HAS_BIAS:
        bias = tl.load(
            bias_ptr + b * stride_sb + m * stride_sm + n * stride_sn, mask=mask, other=0.0
        )
        acc += tl.cast(beta, tl.float32) * bias.to(tl.float32)
    acc = apply_epilogue(acc, m, n, mask, epilogue, ACTIVATION)
    out_ptrs = out_ptr + b * stride_ob + m * stride_om + n * stride_on
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def reduce_partials(product: Product, *, alpha: float, beta: float, block: int) -> None:
    """Writes epilogue(alpha · target.sum(0) + beta · bias) to `out`.

    Args:
        product: as `arrange` made it; the target holds the partial products.
        alpha: factor of the sum.
        beta: factor of the bias.
        block: elements a program sums.
    """
    partial, bias, out, epilogue = product.target, product.bias, product.out, product.epilogue
    if out.dim() == 2:
        out, bias = out[None], None if bias is None else bias[None]
    M, N = out.shape[1:]
    numel = out.numel()
    reduce_partials_kernel[(triton.cdiv(numel, block),)](
        partial, partial if bias is None else bias, out,
        M, N, numel,
        partial.stride(0),
        *((0, 0, 0) if bias is None else bias.stride()),
        *out.stride(),
        float(alpha), float(beta), epilogue.arguments,
        SPLIT_K=partial.shape[0], HAS_BIAS=bias is not None, ACTIVATION=epilogue.activation,
        BLOCK=block, num_warps=4,
        **launch_options(hardware.of(out.device)),
    )  # fmt: skip
