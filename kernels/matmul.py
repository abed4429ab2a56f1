"""The one way from a product's tensors to a kernel: describe the problem, choose, launch."""

from __future__ import annotations

from dataclasses import replace

import torch

from triton_only_backend.errors import UnsupportedProblemError
from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.epilogue import NO_EPILOGUE, Epilogue
from triton_only_backend.kernels.epilogue_traits import EpilogueTraits, with_registers, with_staging
from triton_only_backend.kernels.gemm import gemm
from triton_only_backend.kernels.gemm_choice import (
    general_config,
    heuristic_config,
    pointer_config,
    select_config,
)
from triton_only_backend.kernels.gemm_configs import GemmConfig, GemmProblem, bucket, ring_of
from triton_only_backend.kernels.gemm_tma import gemm_tma, has_aligned_rows
from triton_only_backend.kernels.gemv import gemv
from triton_only_backend.kernels.hopper_choice import hopper_choice
from triton_only_backend.kernels.limits import DTYPES
from triton_only_backend.kernels.realign import realign_product


def precision_of(operand: torch.Tensor) -> str:
    """How an operand is multiplied: "ieee", or "tf32" in fp32 where the user allowed it.

    Follows `torch.set_float32_matmul_precision`, as cuBLAS does.
    """
    if operand.dtype != torch.float32 or operand.device.type != "cuda":
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


def problem_of(a: torch.Tensor, b: torch.Tensor) -> GemmProblem:
    """What a configuration is chosen by, of operands (B, M, K) and (B, K, N)."""
    batch, M, K = a.shape
    return GemmProblem(
        batch=batch,
        M=bucket(M),
        N=bucket(b.shape[2]),
        K=K,
        element_size=a.element_size(),
        ieee=a.dtype == torch.float32 and precision_of(a) == "ieee",
        a_k_contiguous=a.stride(2) == 1,
        b_k_contiguous=b.stride(1) == 1,
        aligned=K > 0 and is_aligned(a) and is_aligned(b),  # no descriptor is of no element
    )


def has_steps(tensor: torch.Tensor) -> bool:
    """Whether a descriptor goes from matrix to matrix of a (B, rows, columns) tensor."""
    step = tensor.stride(0) * tensor.element_size()
    return tensor.shape[0] == 1 or (step > 0 and step % 16 == 0)


def epilogue_traits(
    out: torch.Tensor, bias: torch.Tensor | None, epilogue: Epilogue
) -> EpilogueTraits:
    """What the choice of a tile must know of an output (M, N), its bias and what follows."""
    operands = epilogue.tensors
    if bias is not None and 0 not in bias.stride():
        operands += (bias,)
    return EpilogueTraits(
        out.element_size(),
        sum(t.element_size() for t in operands),
        has_aligned_rows(out),
        # Triton knows of a stride whether 16 divides it.
        all(has_aligned_rows(t) and t.stride(0) % 16 == 0 for t in operands),
        epilogue.activation != "none" or bias is not None,
    )


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    epilogue: Epilogue = NO_EPILOGUE,
    b_ready: bool = False,
) -> None:
    """Writes epilogue(alpha · a @ b + beta · bias) to `out`.

    Args:
        a: (B, M, K), fp16, bf16 or fp32, any strides.
        b: (B, K, N), a's dtype, any strides.
        bias: broadcastable to (B, M, N), or None. With beta = 0 it is not read, as in PyTorch.
        out: (B, M, N).
        alpha: factor of the product.
        beta: factor of the bias.
        epilogue: what follows; with operands only for B = 1.
        b_ready: `b` may be read before the kernel launched last has finished.

    Raises:
        DeviceError: tensors on a device that Triton cannot drive.
    """
    device = hardware.of(out.device)
    if out.numel() == 0:
        return
    batch, M, _ = a.shape
    N = b.shape[2]
    bias = None if bias is None or beta == 0 else bias.expand(batch, M, N)
    problem = problem_of(a, b)
    config = select_config(problem, device)
    with hardware.guard(out):
        if config.realign:
            a, b = realign_product(a, b, is_aligned(a), is_aligned(b))
            problem, b_ready = problem_of(a, b), False
        if not 0 < config.columns < N:
            launch(a, b, bias, out, alpha, beta, epilogue, problem, config, b_ready)
            return
        first, rest = slice(0, config.columns), slice(config.columns, N)
        rest_problem = replace(problem, N=bucket(N - config.columns))
        for columns, part, chosen in (
            (first, replace(problem, N=config.columns), config),
            (rest, rest_problem, heuristic_config(rest_problem, device)),
        ):
            launch(
                a, b[:, :, columns], None if bias is None else bias[:, :, columns],
                out[:, :, columns], alpha, beta, epilogue.of_columns(columns), part, chosen,
                b_ready,
            )  # fmt: skip


def is_linear(bias: torch.Tensor | None, out: torch.Tensor, alpha: float, beta: float) -> bool:
    """Whether a product is what `ring_linear` computes: of weight, vector for bias, whole output.

    Args:
        bias: (1, M, N) or None.
        out: (1, M, N).
    """
    if bias is not None:
        one_row = bias.stride(1) == 0 or bias.shape[1] == 1
        if beta != 1 or not one_row or bias.stride(2) != 1:
            return False
    return alpha == 1 and out.is_contiguous()


def launch(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    alpha: float,
    beta: float,
    epilogue: Epilogue,
    problem: GemmProblem,
    config: GemmConfig,
    b_ready: bool = False,
) -> None:
    """The kernel that `config` names, on operands as `matmul` takes them, the bias expanded."""
    device = hardware.of(out.device)
    if config.kernel == "ring_linear":
        if is_linear(bias, out, alpha, beta):
            # Gluon is there only with Triton for Hopper.
            from triton_only_backend.kernels.ring_linear import ring_linear

            ring_linear(
                a[0], [b[0].T], None if bias is None else [bias[0, 0]], [out[0]],
                config=ring_of(config), epilogue=epilogue, early=b_ready,
            )  # fmt: skip
            return
        config = general_config(problem, device)
    if config.kernel == "gemm_hopper":
        row_bias = None if bias is None else bias[0]
        fitting = with_registers(config, epilogue_traits(out[0], row_bias, epilogue))
        even = bias is None or bias.stride(0) % 16 == 0
        if fitting is not None and even and all(has_steps(t) for t in (a, b, out)):
            # Gluon is there only with Triton for Hopper.
            from triton_only_backend.kernels.gemm_hopper import gemm_hopper

            gemm_hopper(
                a, b, bias, out,
                alpha=alpha, beta=beta, config=fitting, device=device, epilogue=epilogue,
                early=b_ready,
            )  # fmt: skip
            return
        if problem.batch == 1:
            config = replace(hopper_choice(problem, device)[1], realign=config.realign)
        else:
            config = pointer_config(problem, device)
    if config.kernel == "gemv":
        gemv(a, b, bias, out, alpha=alpha, beta=beta, config=config, epilogue=epilogue)
    elif config.kernel == "gemm_tma":
        row_bias = None if bias is None else bias[0]
        config = with_staging(config, problem, epilogue_traits(out[0], row_bias, epilogue), device)
        gemm_tma(
            a[0], b[0], row_bias, out[0],
            alpha=alpha, beta=beta, config=config, num_sms=device.num_sms, epilogue=epilogue,
        )  # fmt: skip
    else:
        gemm(
            a, b, bias, out,
            alpha=alpha, beta=beta, config=config, precision=precision_of(a), epilogue=epilogue,
        )  # fmt: skip
