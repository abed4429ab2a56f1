"""The products' schemas, fake kernels and implementations: mm, addmm, bmm, baddbmm, linear_many."""

from __future__ import annotations

from typing import Any

import torch

from triton_only_backend.kernels.loading import load

Tensor = torch.Tensor

SCHEMAS = (
    "mm(Tensor a, Tensor b, *, ScalarType? out_dtype=None) -> Tensor",
    "addmm(Tensor bias, Tensor a, Tensor b, *, Scalar beta=1, Scalar alpha=1, "
    "ScalarType? out_dtype=None) -> Tensor",
    "bmm(Tensor a, Tensor b, *, ScalarType? out_dtype=None) -> Tensor",
    "baddbmm(Tensor bias, Tensor a, Tensor b, *, Scalar beta=1, Scalar alpha=1, "
    "ScalarType? out_dtype=None) -> Tensor",
    "linear_many(Tensor a, Tensor[] weights, Tensor[] biases) -> Tensor[]",
)


def _check_product(op: str, a: Tensor, b: Tensor, dim: int) -> None:
    load("matmul").check_operands(op, a, b)
    torch._check(
        a.dim() == dim and b.dim() == dim,
        lambda: (
            f"triton_only.{op}: operands must have {dim} dimensions, "
            f"got {list(a.shape)} and {list(b.shape)}"
        ),
    )
    torch._check(
        a.shape[-1] == b.shape[-2],
        lambda: (
            f"triton_only.{op}: {list(a.shape)} and {list(b.shape)} do not multiply; "
            "the last dimension of the first must equal the one before last of the second"
        ),
    )
    if dim == 3:
        torch._check(
            a.shape[0] == b.shape[0],
            lambda: f"triton_only.{op}: batch sizes {a.shape[0]} and {b.shape[0]} differ",
        )


def _product_like(a: Tensor, b: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    shape = (*a.shape[:-1], b.shape[-1])
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


# mm, addmm: (M, K) @ (K, N) is a batch of one


def _mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    _check_product("mm", a, b, 2)
    out = _product_like(a, b, out_dtype)
    load("matmul").matmul(a.unsqueeze(0), b.unsqueeze(0), None, out.unsqueeze(0))
    return out


def _addmm(
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_product("addmm", a, b, 2)
    out = _product_like(a, b, out_dtype)
    load("matmul").matmul(
        a.unsqueeze(0),
        b.unsqueeze(0),
        bias.expand(out.shape).unsqueeze(0),
        out.unsqueeze(0),
        alpha=alpha,
        beta=beta,
    )
    return out


def _bmm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    _check_product("bmm", a, b, 3)
    out = _product_like(a, b, out_dtype)
    load("matmul").matmul(a, b, None, out)
    return out


def _baddbmm(
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_product("baddbmm", a, b, 3)
    out = _product_like(a, b, out_dtype)
    load("matmul").matmul(a, b, bias.expand(out.shape), out, alpha=alpha, beta=beta)
    return out


def _fake_linear_many(a: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    for weight in weights:
        _check_product("linear_many", a, weight.T, 2)
    return [a.new_empty((a.shape[0], weight.shape[0])) for weight in weights]


def _linear_many(a: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    outs = _fake_linear_many(a, weights, biases)
    load("matmul").linear_many(a, weights, biases or None, outs)
    return outs


def _fake_mm(op: str, dim: int) -> Any:
    def fake(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        _check_product(op, a, b, dim)
        return _product_like(a, b, out_dtype)

    return fake


def _fake_addmm(op: str, dim: int) -> Any:
    def fake(
        bias: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        _check_product(op, a, b, dim)
        out = _product_like(a, b, out_dtype)
        bias.expand(out.shape)
        return out

    return fake


IMPLEMENTATIONS = {
    "mm": (_mm, _fake_mm("mm", 2)),
    "addmm": (_addmm, _fake_addmm("addmm", 2)),
    "bmm": (_bmm, _fake_mm("bmm", 3)),
    "baddbmm": (_baddbmm, _fake_addmm("baddbmm", 3)),
    "linear_many": (_linear_many, _fake_linear_many),
}
