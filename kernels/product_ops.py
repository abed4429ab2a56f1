"""The products' schemas, fake kernels and implementations: mm, addmm, bmm, baddbmm, linear_*."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from triton_only_backend.kernels.limits import ACTIVATIONS, DTYPES
from triton_only_backend.kernels.loading import load

if TYPE_CHECKING:
    from collections.abc import Callable

Tensor = torch.Tensor

SCHEMAS = (
    "mm(Tensor a, Tensor b, *, ScalarType? out_dtype=None, bool weights_ready=False) -> Tensor",
    "addmm(Tensor bias, Tensor a, Tensor b, *, Scalar beta=1, Scalar alpha=1, "
    "ScalarType? out_dtype=None, bool weights_ready=False) -> Tensor",
    "bmm(Tensor a, Tensor b, *, ScalarType? out_dtype=None) -> Tensor",
    "baddbmm(Tensor bias, Tensor a, Tensor b, *, Scalar beta=1, Scalar alpha=1, "
    "ScalarType? out_dtype=None) -> Tensor",
    "linear_many(Tensor a, Tensor[] weights, Tensor[] biases) -> Tensor[]",
    "linear_fused(Tensor input, Tensor[] weights, Tensor[] biases, *, Tensor? norm_weight=None, "
    'float norm_eps=0.0, float norm_offset=0.0, str activation="none", bool gated=False, '
    "Tensor? multiplier=None, float scale=1.0, Tensor? residual=None, bool norm_centered=False, "
    "Tensor? norm_bias=None, bool weights_ready=False) -> Tensor[]",
)


def _check(op: str, condition: bool, message: Callable[[], str]) -> None:
    torch._check(condition, lambda: f"triton_only.{op}: {message()}")


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
    _check_product("mm", a, b, 2)
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
    _check_product("addmm", a, b, 2)
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
    load("linear").linear(a, weights, biases or None, outs)
    return outs


class LinearOptions(NamedTuple):
    """What `linear_fused` is given by name.

    With a `norm_weight` the input is normalised by its root mean square, with `norm_centered` by
    mean and deviation (LayerNorm), of which weight and `norm_bias` may be absent. With
    `weights_ready` weights and norm may be read while the kernel launched last still runs: only a
    caller that knows the order of kernels may say so (see the pass `mark_ready_inputs`).
    """

    norm_weight: Tensor | None = None
    norm_eps: float = 0.0
    norm_offset: float = 0.0
    activation: str = "none"
    gated: bool = False
    multiplier: Tensor | None = None
    scale: float = 1.0
    residual: Tensor | None = None
    norm_centered: bool = False
    norm_bias: Tensor | None = None
    weights_ready: bool = False

    @property
    def norm(self) -> bool:
        """Whether the input is normalised."""
        return self.norm_centered or self.norm_weight is not None


def check_linear_fused(
    input: Tensor, weights: list[Tensor], biases: list[Tensor], options: LinearOptions
) -> None:
    """Refuses arguments that `linear_fused` does not take.

    Raises:
        UnsupportedProblemError: operands of other dtypes.
        RuntimeError: naming the argument, its shape and a remedy.
    """
    _, _, _, activation, gated, multiplier, scale, residual, *_ = options
    for weight in weights:
        _check_product("linear_fused", input, weight.mT, 2)
    check = functools.partial(_check, "linear_fused")
    check(len(weights) > 0, lambda: "no weights; give at least one")
    check(
        activation in ACTIVATIONS,
        lambda: f"unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}",
    )
    columns = [w.shape[0] for w in weights]
    check(
        not gated or (len(weights) == 2 and columns[0] == columns[1]),
        lambda: f"gated takes two weights with as many rows each, got {columns} rows",
    )
    check(
        not biases or [list(b.shape) for b in biases] == [[n] for n in columns],
        lambda: (
            f"weights with {columns} rows take biases of those lengths, or none; "
            f"got {[list(b.shape) for b in biases]}"
        ),
    )
    _check_norm(input, options)
    check(
        len(weights) == 1 or gated or (multiplier is None and residual is None and scale == 1),
        lambda: "multiplier, scale and residual need a single output; give one weight, or gated",
    )
    parts = {
        name: getattr(options, name)
        for name in ("norm_weight", "norm_bias", "multiplier", "residual")
    }
    parts |= {f"biases[{i}]": bias for i, bias in enumerate(biases)}
    refused = {k: part.dtype for k, part in parts.items() if part is not None}
    refused = {k: dtype for k, dtype in refused.items() if dtype not in DTYPES}
    check(
        not refused,
        lambda: "; ".join(
            f"{name} is {dtype}; cast it to one of float16, bfloat16 or float32"
            for name, dtype in refused.items()
        ),
    )
    for part in (multiplier, residual):
        if part is not None:
            part.expand(input.shape[0], columns[0])


def _check_norm(input: Tensor, options: LinearOptions) -> None:
    check = functools.partial(_check, "linear_fused")
    vectors = {"norm_weight": options.norm_weight, "norm_bias": options.norm_bias}
    unfit = {k: list(v.shape) for k, v in vectors.items() if v is not None}
    unfit = {k: shape for k, shape in unfit.items() if shape != list(input.shape[1:])}
    check(
        not unfit,
        lambda: "; ".join(
            f"{name} {shape} does not fit the input's {input.shape[1]} columns"
            for name, shape in unfit.items()
        ),
    )
    check(
        options.norm_centered or options.norm_bias is None,
        lambda: (
            "norm_bias without norm_centered: RMSNorm adds none; give norm_centered=True "
            "for LayerNorm, or add norm_bias @ weight.T to the layer's bias"
        ),
    )
    check(
        options.norm_weight is not None or options.norm_offset == 0,
        lambda: f"norm_offset {options.norm_offset} without a norm_weight that it is added to",
    )
    check(
        options.norm or options.norm_eps == 0,
        lambda: (
            f"norm_eps {options.norm_eps} without a norm; give norm_weight for RMSNorm, "
            "norm_centered=True for LayerNorm"
        ),
    )


def _fake_linear_fused(
    input: Tensor, weights: list[Tensor], biases: list[Tensor], **options: Any
) -> list[Tensor]:
    chosen = LinearOptions(**options)
    check_linear_fused(input, weights, biases, chosen)
    outputs = weights[:1] if chosen.gated else weights
    return [input.new_empty((input.shape[0], weight.shape[0])) for weight in outputs]


def _linear_fused(
    input: Tensor, weights: list[Tensor], biases: list[Tensor], **options: Any
) -> list[Tensor]:
    outs = _fake_linear_fused(input, weights, biases, **options)
    chosen = LinearOptions(**options)
    linear = load("linear")
    norm = None
    if chosen.norm:
        norm = linear.Norm(
            chosen.norm_weight,
            chosen.norm_eps,
            chosen.norm_offset,
            chosen.norm_centered,
            chosen.norm_bias,
        )
    shape = outs[0].shape
    epilogue = linear.Epilogue(
        chosen.activation,
        None if chosen.multiplier is None else chosen.multiplier.expand(shape),
        chosen.scale,
        None if chosen.residual is None else chosen.residual.expand(shape),
    )
    linear.linear(
        input, weights, biases or None, outs, norm=norm, gated=chosen.gated, epilogue=epilogue,
        weights_ready=chosen.weights_ready,
    )  # fmt: skip
    return outs


def _fake_mm(op: str, dim: int) -> Any:
    def fake(
        a: Tensor,
        b: Tensor,
        *,
        out_dtype: torch.dtype | None = None,
        weights_ready: bool = False,
    ) -> Tensor:
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
        weights_ready: bool = False,
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
    "linear_fused": (_linear_fused, _fake_linear_fused),
}
