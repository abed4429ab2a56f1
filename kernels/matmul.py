"""The one way from a product's tensors to a kernel: describe the problem, choose, launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from triton_only_backend.errors import UnsupportedProblemError
from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.gemm import gemm
from triton_only_backend.kernels.gemm_configs import (
    GEMV_MAX_ROWS,
    GemmProblem,
    bucket,
    select_config,
    select_gemv,
)
from triton_only_backend.kernels.gemm_tma import gemm_tma
from triton_only_backend.kernels.gemv import gemv, gemv_many
from triton_only_backend.kernels.limits import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence


def float32_precision(device: torch.device) -> str:
    """How fp32 operands are multiplied: "ieee", or "tf32" where the user allowed it.

    Follows `torch.set_float32_matmul_precision`, as cuBLAS does.
    """
    if device.type != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def check_operands(op: str, *operands: torch.Tensor) -> None:
    """Refuses what the kernels do not multiply.

    Raises:
        UnsupportedProblemError: naming the op, the dtypes and shapes, and a remedy.
    """
    dtypes = {t.dtype for t in operands}
    if len(dtypes) == 1 and dtypes <= set(DTYPES):
        return
    described = ", ".join(f"{t.dtype}{list(t.shape)}" for t in operands)
    raise UnsupportedProblemError(
        f"triton_only.{op}: operands {described} are not supported; "
        "cast them to one of float16, bfloat16 or float32"
    )


def is_aligned(operand: torch.Tensor) -> bool:
    """Whether a (B, rows, columns) operand can be read in 16-byte pieces along its unit stride."""
    batch, rows, columns = operand.stride()
    if rows == 1:
        rows, columns = columns, rows
    size = operand.element_size()
    return (
        columns == 1
        and rows > 0
        and rows * size % 16 == 0
        and batch * size % 16 == 0
        and operand.data_ptr() % 16 == 0
    )


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> None:
    """Writes alpha · a @ b + beta · bias to `out`.

    Args:
        a: (B, M, K), fp16, bf16 or fp32, any strides.
        b: (B, K, N), a's dtype, any strides.
        bias: broadcastable to (B, M, N), or None. With beta = 0 it is not read, as in PyTorch.
        out: (B, M, N).
        alpha: factor of the product.
        beta: factor of the bias.

    Raises:
        DeviceError: tensors on a device that Triton cannot drive.
    """
    device = hardware.of(out.device)
    if out.numel() == 0:
        return
    batch, M, K = a.shape
    N = b.shape[2]
    bias = None if bias is None or beta == 0 else bias.expand(batch, M, N)
    precision = float32_precision(out.device) if a.dtype == torch.float32 else "ieee"
    problem = GemmProblem(
        batch=batch,
        M=bucket(M),
        N=bucket(N),
        K=K,
        element_size=a.element_size(),
        ieee=a.dtype == torch.float32 and precision == "ieee",
        a_k_contiguous=a.stride(2) == 1,
        b_k_contiguous=b.stride(1) == 1,
        aligned=is_aligned(a) and is_aligned(b),
    )
    config = select_config(problem, device)
    with hardware.guard(out):
        if config.kernel == "gemv":
            gemv(a, b, bias, out, alpha=alpha, beta=beta, config=config)
        elif config.kernel == "gemm_tma":
            gemm_tma(
                a[0], b[0], None if bias is None else bias[0], out[0],
                alpha=alpha, beta=beta, config=config, num_sms=device.num_sms,
            )  # fmt: skip
        else:
            gemm(a, b, bias, out, alpha=alpha, beta=beta, config=config, precision=precision)


def linear_many(
    a: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    outs: Sequence[torch.Tensor],
) -> None:
    """Writes a @ weightᵀ (+ bias) to each of `outs`: in one launch where that is faster.

    Args:
        a: (M, K), fp16, bf16 or fp32, any strides.
        weights: (N_i, K), a's dtype, any strides.
        biases: (N_i,) each, or None.
        outs: (M, N_i) each, contiguous.
    """
    M, K = a.shape
    device = hardware.of(a.device)
    one_launch = (
        0 < M <= GEMV_MAX_ROWS
        and 2 <= len(weights) <= 3
        and all(w.stride(1) == 1 and w.shape[0] > 0 and is_aligned(w[None]) for w in weights)
        and all(b.stride(0) == 1 for b in biases or ())
    )
    if not one_launch:
        for i, (weight, out) in enumerate(zip(weights, outs, strict=True)):
            bias = None if biases is None else biases[i]
            matmul(a[None], weight.T[None], bias, out[None])
        return
    problem = GemmProblem(
        batch=1,
        M=M,
        N=sum(w.shape[0] for w in weights),
        K=K,
        element_size=a.element_size(),
        ieee=a.dtype == torch.float32,
        a_k_contiguous=True,
        b_k_contiguous=True,
    )
    with hardware.guard(a):
        gemv_many(a, weights, biases, outs, config=select_gemv(problem, device))
