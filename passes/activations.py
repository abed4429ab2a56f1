"""The activations that our kernels' epilogues compute, as models write them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from triton_only_backend.passes.graph_edit import value
from triton_only_backend.passes.template import Template

if TYPE_CHECKING:
    from collections.abc import Callable

Tensor = torch.Tensor


def _gelu_tanh(input: Tensor) -> Tensor:
    return F.gelu(input, approximate="tanh")


def _silu_by_hand(input: Tensor) -> Tensor:
    return input * torch.sigmoid(input)


def _gelu_new(input: Tensor) -> Tensor:
    inner = math.sqrt(2.0 / math.pi) * (input + 0.044715 * torch.pow(input, 3.0))
    return 0.5 * input * (1.0 + torch.tanh(inner))


def _gelu_fast(input: Tensor) -> Tensor:
    inner = input * 0.7978845608028654 * (1.0 + 0.044715 * input * input)
    return 0.5 * input * (1.0 + torch.tanh(inner))


# The op's name of each; several ways to write one.
_WRITTEN: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("silu", F.silu),
    ("silu", _silu_by_hand),
    ("gelu", F.gelu),
    ("gelu_tanh", _gelu_tanh),
    ("gelu_tanh", _gelu_new),
    ("gelu_tanh", _gelu_fast),
    ("relu", F.relu),
    ("sigmoid", torch.sigmoid),
    ("tanh", torch.tanh),
)


def _as_template(function: Callable[[Tensor], Tensor]) -> Template:
    def activation(input: Tensor) -> Tensor:
        return function(input)

    return Template(activation)


TEMPLATES = tuple((name, _as_template(function)) for name, function in _WRITTEN)
# What one of them can end in: asked first, for every node of a graph is a candidate.
aten = torch.ops.aten
LAST = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    torch.ops.prims.convert_element_type.default,
)


def as_activation(node: torch.fx.Node) -> tuple[str, torch.fx.Node] | None:
    """The activation that a node is the result of, and what it is applied to."""
    result = value(node)
    if node.target not in LAST or not result.is_floating_point():
        return None
    like = torch.empty((2, 2), dtype=result.dtype, device="meta")
    for name, template in TEMPLATES:
        found = template.match(node, [like])
        if found is not None:
            return name, found["input"]
    return None
