"""The products' schemas, fake kernels and implementations: mm, addmm, bmm, baddbmm."""

from __future__ import annotations

from typing import Any

import torch

from triton_only_backend.kernels.loading import load

Tensor = torch.Tensor

SCHEMAS = (
    "mm(Tensor a, Tensor b, *, ScalarType? out_dtype=None, bool weights_ready=False) -> Tensor",
    "addmm(Tensor bias, Tensor a, Tensor b, *, Scalar beta=1, Scalar alpha=1, "
    "ScalarType? out_dtype=None, bool weights_ready=False) -> Tensor",
    "bmm(Tensor a, Tensor b, *, ScalarType? out_dtype=None) -> Tensor",
    "baddbmm(Tensor bias, Tensor a, Tensor b, *, Scalar beta=1, Scalar alpha=1, "
    "ScalarType? out_dtype=None) -> Tensor",
)


def check_product(op: str, a: Tensor, b: Tensor, dim: int) -> None:
    """Refuses operands of `dim` dimensions that an op cannot multiply.

    Raises:
        UnsupportedProblemError: operands of other dtypes.
        RuntimeError: naming the op and the shapes.
    """
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


# mm, addmm: (M, K) @ (K, N) is a batch of one. With `weights_ready` `b` may be read while the
# kernel launched last still runs: only a caller that knows the order of kernels may say so (see the
# pass `mark_ready_inputs`).


def _mm(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    weights_ready: bool = False,
) -> Tensor:
    check_product("mm", a, b, 2)
    out = _product_like(a, b, out_dtype)
    load("matmul").matmul(
        a.unsqueeze(0), b.unsqueeze(0), None, out.unsqueeze(0), b_ready=weights_ready
    )
    return out


def _addmm(
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out_dtype: torch.dtype | None = None,
    weights_ready: bool = False,
) -> Tensor:
    check_product("addmm", a, b, 2)
    out = _product_like(a, b, out_dtype)
    load("matmul").matmul(
        a.unsqueeze(0),
        b.unsqueeze(0),
        bias.expand(out.shape).unsqueeze(0),
        out.unsqueeze(0),
        alpha=alpha,
        beta=beta,
        b_ready=weights_ready,
    )
    return out


def _bmm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    check_product("bmm", a, b, 3)
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
    check_product("baddbmm", a, b, 3)
    out = _product_like(a, b, out_dtype)
    load("matmul").matmul(a, b, bias.expand(out.shape), out, alpha=alpha, beta=beta)
    return out


def _fake_mm(op: str, dim: int) -> Any:
    def fake(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        check_product(op, a, b, dim)
        return _product_like(a, b, out_dtype)

    return fake


def _fake_addmm(op: str, dim: int) -> Any:
    def fake(
        bias: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **_: Any
    ) -> Tensor:
        check_product(op, a, b, dim)
        out = _product_like(a, b, out_dtype)
        bias.expand(out.shape)
        return out

    return fake


IMPLEMENTATIONS = {
    "mm": (_mm, _fake_mm("mm", 2)),
    "addmm": (_addmm, _fake_addmm("addmm", 2)),
    "bmm": (_bmm, _fake_mm("bmm", 3)),
    "baddbmm": (_baddbmm, _fake_addmm("baddbmm", 3)),
}
