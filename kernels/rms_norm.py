"""Root-mean-square normalisation of rows, for products on tensor cores.

    out[m, k] = x[m, k] · rsqrt(mean_k(x²) + eps) · (weight[k] + offset)

in fp32, rounded once to the output's dtype. Products of one or two rows do this in their own loop
(see `linear_gemv`); tensor cores take operands that are normalised already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.dependent_launch import (
    launch_options,
    wait_for_producers,
)
from triton_only_backend.kernels.eights import eights, in_eights
from triton_only_backend.kernels.sizes import next_power_of_2

if TYPE_CHECKING:
    import torch

# Columns of a row that are read at once.
BLOCK = 4096


class Norm(NamedTuple):
    """How rows are normalised: by their root mean square or, centred, by mean and deviation.

    Attributes:
        weight: (K,), fp16, bf16 or fp32; centred, also None.
        eps: added to the mean square, or to the variance.
        offset: added to the weight (1 in Gemma's norms).
        centered: the mean is subtracted: LayerNorm.
        bias: (K,), likewise, added at the end, or None; of a centred norm.
    """

    weight: torch.Tensor | None
    eps: float
    offset: float
    centered: bool = False
    bias: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The operands that are there."""
        return tuple(t for t in (self.weight, self.bias) if t is not None)


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr,
    K, stride_xm, stride_xk, stride_w, stride_om,
    eps, offset,
    BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, EIGHTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_producers(PDL)
    K, stride_xm, stride_om = in_eights((K, stride_xm, stride_om), EIGHTS)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    x_ptrs = x_ptr + row * stride_xm + offs.to(tl.int64) * stride_xk
    step = tl.cast(stride_xk, tl.int64) * BLOCK
    squares = tl.zeros((BLOCK,), tl.float32)
    x = squares
    for k in range(0, tl.cdiv(K, BLOCK)):
        x = tl.load(x_ptrs + k * step, mask=offs < K - k * BLOCK, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    for k in range(0, tl.cdiv(K, BLOCK)):
        columns = k * BLOCK + offs
        mask = columns < K
        if not ONE_BLOCK:
            x = tl.load(x_ptrs + k * step, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + columns * stride_w, mask=mask, other=0.0).to(tl.float32)
        out = x * rstd * (w + offset)
        tl.store(out_ptr + row * stride_om + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, norm: Norm, out: torch.Tensor) -> None:
    """Writes the normalised rows of x to `out`.

    Args:
        x: (M, K), fp16, bf16 or fp32, any strides.
        norm: weight, of any stride, eps and offset; not centred (see `layer_norm`).
        out: (M, K), row-major.
    """
    assert norm.weight is not None
    M, K = x.shape
    device = hardware.of(x.device)
    block = min(next_power_of_2(K), 65536 if device.is_interpreter else BLOCK)
    rms_norm_kernel[(M,)](
        x, norm.weight, out,
        K, *x.stride(), norm.weight.stride(0), out.stride(0),
        float(norm.eps), float(norm.offset),
        BLOCK=block, ONE_BLOCK=block >= K, EIGHTS=eights(K, x.stride(0), out.stride(0)),
        num_warps=8 if block >= 2048 else 4,
        **launch_options(device),
    )  # fmt: skip
