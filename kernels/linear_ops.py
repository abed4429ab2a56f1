"""The linear layers' schemas, fake kernels and implementations: linear_many, linear_fused."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from triton_only_backend.kernels.limits import ACTIVATIONS, DTYPES
from triton_only_backend.kernels.loading import load
from triton_only_backend.kernels.product_ops import check_product

if TYPE_CHECKING:
    from collections.abc import Callable

Tensor = torch.Tensor

SCHEMAS = (
    "linear_many(Tensor a, Tensor[] weights, Tensor[] biases) -> Tensor[]",
    "linear_fused(Tensor input, Tensor[] weights, Tensor[] biases, *, Tensor? norm_weight=None, "
    'float norm_eps=0.0, float norm_offset=0.0, str activation="none", bool gated=False, '
    "Tensor? multiplier=None, float scale=1.0, Tensor? residual=None, bool norm_centered=False, "
    "Tensor? norm_bias=None, bool weights_ready=False) -> Tensor[]",
)


def _check(op: str, condition: bool, message: Callable[[], str]) -> None:
    torch._check(condition, lambda: f"triton_only.{op}: {message()}")


def _fake_linear_many(a: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    for weight in weights:
        check_product("linear_many", a, weight.T, 2)
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
        check_product("linear_fused", input, weight.mT, 2)
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


IMPLEMENTATIONS = {
    "linear_many": (_linear_many, _fake_linear_many),
    "linear_fused": (_linear_fused, _fake_linear_fused),
}
