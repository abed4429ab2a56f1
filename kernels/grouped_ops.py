"""Schema, fake kernel and implementation of `grouped_mm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.limits import DTYPES
from triton_only_backend.kernels.loading import load

if TYPE_CHECKING:
    from collections.abc import Callable

Tensor = torch.Tensor

SCHEMAS = ("grouped_mm(Tensor a, Tensor b, Tensor offs, *, ScalarType? out_dtype=None) -> Tensor",)


def _check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: f"triton_only.grouped_mm: {message}")


def _fake_grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    shapes = f"{list(a.shape)} and {list(b.shape)}"
    ranks = (a.dim(), b.dim())
    _check(ranks in ((2, 3), (3, 2), (2, 2)), f"operands of 2 or 3 dimensions, got {shapes}")
    _check(
        a.dtype == b.dtype and a.dtype in DTYPES,
        f"operands of one dtype of float16, bfloat16 and float32, got {a.dtype} and {b.dtype}",
    )
    _check(
        offs.dtype == torch.int32 and offs.dim() == 1,
        f"offs must be int32 of one dimension, got {offs.dtype}{list(offs.shape)}",
    )
    _check(
        a.device == b.device == offs.device,
        f"operands on one device, got {a.device}, {b.device} and {offs.device}",
    )
    _check(a.shape[-1] == b.shape[-2], f"{shapes} do not multiply")
    shape: tuple[int, ...]
    if ranks == (2, 2):
        shape = (offs.shape[0], a.shape[0], b.shape[1])
    else:
        matrices = b if ranks == (2, 3) else a
        _check(
            matrices.shape[0] == offs.shape[0],
            f"{offs.shape[0]} groups for {matrices.shape[0]} matrices",
        )
        shape = (a.shape[-2], b.shape[-1])
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    out = _fake_grouped_mm(a, b, offs, out_dtype=out_dtype)
    if out.numel() == 0:
        return out
    if a.numel() == 0 or offs.numel() == 0:
        return out.zero_()
    device = hardware.of(out.device)
    kernels = load("grouped_gemm")
    offs = offs.contiguous()
    precision = load("matmul").precision_of(a)
    with hardware.guard(out):
        if out.dim() == 3:
            config = kernels.select_config(a.shape[0], a.element_size(), device)
            kernels.grouped_inner(a, b, offs, out, config=config, precision=precision)
            return out
        # (G, M, K) @ (K, groups of N) is the transpose of (groups of N, K) @ (G, K, M).
        rows, matrices, result = (a, b, out) if a.dim() == 2 else (b.mT, a.mT, out.mT)
        each = rows.shape[0] // matrices.shape[0]
        config = kernels.select_config(each, a.element_size(), device)
        kernels.grouped_rows(rows, matrices, offs, result, config=config, precision=precision)
    return out


IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "grouped_mm": (_grouped_mm, _fake_grouped_mm),
}
