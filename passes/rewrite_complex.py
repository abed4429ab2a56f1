"""Multiplies complex numbers by their parts, which Triton has, in place of a call of ATen.

Why: some models (DeepSeek-V2, Llama 4) rotate queries and keys as complex numbers; Triton has no
complex type, and Inductor calls ATen for each of their products.

Before:
    polar: "c64[2, 16, 32]" = aten.polar.default(magnitude, angle)
    mul: "c64[2, 4, 16, 32]" = aten.mul.Tensor(query, polar)
After:
    polar = aten.view_as_complex(aten.stack([magnitude · cos(angle), magnitude · sin(angle)], -1))
    mul = aten.view_as_complex(aten.stack([q0 · p0 − q1 · p1, q0 · p1 + q1 · p0], -1))

where q0, q1, p0, p1 are the parts, by `aten.view_as_real`; conjugates, as a gradient has them,
likewise. The views between the types launch nothing. Left alone: complex scalars, and what else is
complex.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from triton_only_backend.passes.graph_edit import inline, put, value

aten = torch.ops.aten
Tensor = torch.Tensor


def rewrite_complex(graph: torch.fx.Graph) -> int:
    """Rewrites every product of complex tensors in the graph; returns how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.polar.default):
        _replace(node, inline(node, polar, list(node.args)))
        count += 1
    for node in list(graph.nodes):
        if node.target not in (aten.mul.Tensor, aten.mul.Scalar):
            continue
        if not _is_complex(node) or any(isinstance(factor, complex) for factor in node.args):
            continue
        sources, conjugated = zip(*map(_without_conjugate, node.args), strict=True)
        numbers = [s if isinstance(s, float | int) else None for s in sources]
        operands = [s for s in sources if isinstance(s, torch.fx.Node)]
        function = partial(product, numbers=numbers, conjugated=conjugated)
        _replace(node, inline(node, function, operands))
        count += 1
    return count


def _replace(node: torch.fx.Node, results: list[torch.fx.Node]) -> None:
    if any(user.op == "output" for user in node.users):
        put(node, results[0])
    else:  # nobody sees the layout, and a copy of complex numbers would be ATen's
        node.replace_all_uses_with(results[0])
    node.graph.erase_node(node)


def _is_complex(node: Any) -> bool:
    return isinstance(value(node), Tensor) and value(node).is_complex()


def _without_conjugate(node: Any) -> tuple[Any, bool]:
    conjugated = False
    while isinstance(node, torch.fx.Node) and node.target in (
        aten._conj.default,
        aten.clone.default,
    ):
        conjugated ^= node.target is aten._conj.default
        node = node.args[0]
    return node, conjugated


def polar(magnitude: Tensor, angle: Tensor) -> tuple[Tensor]:
    """magnitude · exp(i angle)."""
    return (_complex(magnitude * angle.cos(), magnitude * angle.sin()),)


def product(
    *factors: Tensor, numbers: list[float | None], conjugated: tuple[bool, ...]
) -> tuple[Tensor]:
    """The product of two factors, tensors or numbers, real or complex, conjugated or not."""
    tensors = iter(factors)
    (a, b), (c, d) = (
        _parts(next(tensors) if number is None else number, flag)
        for number, flag in zip(numbers, conjugated, strict=True)
    )
    if b is None:
        (a, b), (c, d) = (c, d), (a, b)
    if d is None:
        return (_complex(a * c, b * c),)
    return (_complex(a * c - b * d, a * d + b * c),)


def _parts(factor: Any, conjugated: bool) -> tuple[Any, Any]:
    if not isinstance(factor, Tensor) or not factor.is_complex():
        return factor, None
    real, imaginary = torch.view_as_real(factor).unbind(-1)
    return real, -imaginary if conjugated else imaginary


def _complex(real: Tensor, imaginary: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack([real, imaginary], -1))
