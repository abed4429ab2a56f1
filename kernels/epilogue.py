"""What a product's kernel does to its fp32 sums before it rounds them, once, to the output's dtype.

    out = activation(alpha · Σ_k a·b + beta · bias) · multiplier · scale + residual

`Epilogue` says what on the host; `apply_epilogue` does it in the kernel that holds the sums, or in
the reduction of a split-K product. A part that is None costs nothing: it is a constant when the
kernel is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch


class EpilogueArguments(NamedTuple):
    """An `Epilogue` as a kernel takes it."""

    multiplier: Any
    residual: Any
    stride_mm: int
    stride_mn: int
    stride_rm: int
    stride_rn: int
    scale: float | None


@dataclass(frozen=True)
class Epilogue:
    """What follows a product (M, N).

    Attributes:
        activation: one of `limits.ACTIVATIONS`.
        multiplier: (M, N), any float dtype, any strides (0 where it broadcasts), or None.
        scale: a factor.
        residual: (M, N), likewise, or None.
    """

    activation: str = "none"
    multiplier: torch.Tensor | None = None
    scale: float = 1.0
    residual: torch.Tensor | None = None

    @property
    def transposed(self) -> Epilogue:
        """The same for the transposed product."""
        multiplier = None if self.multiplier is None else self.multiplier.mT
        residual = None if self.residual is None else self.residual.mT
        return Epilogue(self.activation, multiplier, self.scale, residual)

    def of_columns(self, columns: slice) -> Epilogue:
        """The same for some columns of the product."""
        multiplier = None if self.multiplier is None else self.multiplier[:, columns]
        residual = None if self.residual is None else self.residual[:, columns]
        return Epilogue(self.activation, multiplier, self.scale, residual)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The operands that are there."""
        return tuple(t for t in (self.multiplier, self.residual) if t is not None)

    @property
    def arguments(self) -> EpilogueArguments:
        """The kernels' argument `epilogue`; ACTIVATION goes with it."""
        stride_mm, stride_mn = (0, 0) if self.multiplier is None else self.multiplier.stride()
        stride_rm, stride_rn = (0, 0) if self.residual is None else self.residual.stride()
        return EpilogueArguments(
            self.multiplier,
            self.residual,
            stride_mm,
            stride_mn,
            stride_rm,
            stride_rn,
            None if self.scale == 1 else float(self.scale),
        )


NO_EPILOGUE = Epilogue()


def bias_strides(bias: torch.Tensor | None) -> tuple[int | None, ...]:
    """A bias's strides for `load_bias`: None for the rows or columns that all share one."""
    if bias is None:
        return (0,) * 3
    *batch, rows, columns = bias.stride()
    if rows == 0:
        return (*batch, None, columns)
    return (*batch, rows, columns or None)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    tl.static_assert(
        ACTIVATION == "none" or ACTIVATION == "relu" or ACTIVATION == "sigmoid"
        or ACTIVATION == "silu" or ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh"
        or ACTIVATION == "tanh"
    )  # fmt: skip
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    elif ACTIVATION == "silu":
        x *= tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x *= 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    elif ACTIVATION == "gelu_tanh":
        # ½ (1 + tanh u) = sigmoid(2u), without the cancellation.
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "tanh":
        # Near 0 the difference would lose what its series keeps: an error of 5e-8 at 0.3.
        z = x * x
        series = x + x * z * (-1 / 3 + z * (2 / 15 + z * (-17 / 315 + z * (62 / 2835))))
        x = tl.where(tl.abs(x) < 0.3, series, 2 * tl.sigmoid(2 * x) - 1)
    return x


@triton.jit
def load_bias(bias_ptr, offs_m, offs_n, mask_m, mask_n, stride_m, stride_n):
    """A bias's tile in fp32, to be broadcast: along a dimension whose stride is None it is one."""
    if stride_m is None:
        bias = tl.load(bias_ptr + offs_n * stride_n, mask=mask_n, other=0.0)[None, :]
    elif stride_n is None:
        bias = tl.load(bias_ptr + offs_m * stride_m, mask=mask_m, other=0.0)[:, None]
    else:
        ptrs = bias_ptr + offs_m[:, None] * stride_m + offs_n[None, :] * stride_n
        bias = tl.load(ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
    return bias.to(tl.float32)


@triton.jit
def apply_epilogue(acc, offs_m, offs_n, mask, epilogue, ACTIVATION: tl.constexpr):
    """activation(acc) · multiplier · scale + residual; offs_m and offs_n broadcast to acc."""
    acc = activate(acc, ACTIVATION)
    if epilogue.multiplier is not None:
        ptrs = epilogue.multiplier + offs_m * epilogue.stride_mm + offs_n * epilogue.stride_mn
        acc *= tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if epilogue.scale is not None:
        acc *= epilogue.scale
    if epilogue.residual is not None:
        ptrs = epilogue.residual + offs_m * epilogue.stride_rm + offs_n * epilogue.stride_rn
        acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return acc
