"""Rewrites products of groups, as of a mixture of experts, to our op.

Why: Inductor calls CUTLASS for a grouped product unless it autotunes; transformers, where PyTorch
compiles none (fp32), calls one cuBLAS product an expert, after waiting for their lengths.

Before:
    up: "bf16[64, 1536]" = aten._grouped_mm.default(tokens, experts, offs)       # (128, 2048, 1536)
After:
    up: "bf16[64, 1536]" = triton_only.grouped_mm.default(tokens, experts, offs)

Likewise `transformers.grouped_mm_fallback` and its gradient. Without groups it is a `bmm`. Left
alone, each with its reason: a bias (PyTorch takes none so far), other dtypes than fp16, bf16, fp32.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend.kernels.limits import DTYPES
from triton_only_backend.passes.graph_edit import arguments, describe, inline, put, value
from triton_only_backend.passes.refusal import Reason, Refusal, refuse

if TYPE_CHECKING:
    from collections.abc import Callable

Tensor = torch.Tensor
ours = torch.ops.triton_only


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None, out_dtype: Any = None) -> tuple[Tensor]:
    if offs is None:
        return (ours.bmm(a, b, out_dtype=out_dtype),)
    return (ours.grouped_mm(a, b, offs.to(torch.int32), out_dtype=out_dtype),)


def _gradients(a: Tensor, b: Tensor, offs: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of the operands of rows times their group's matrix."""
    ends = offs.to(torch.int32)
    return ours.grouped_mm(grad, b.mT, ends), ours.grouped_mm(a.mT, grad, ends)


# By name: transformers need not be there.
PRODUCTS: dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[str, ...]]] = {
    "aten._grouped_mm.default": (_grouped, ("self", "mat2", "offs")),
    "transformers.grouped_mm_fallback.default": (_grouped, ("input", "weight", "offs")),
    "transformers.grouped_mm_fallback_backward.default": (
        _gradients,
        ("input", "weight", "offs", "grad_output"),
    ),
}


def rewrite_grouped_mm(graph: torch.fx.Graph) -> int:
    """Rewrites every grouped product in the graph; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or str(node.target) not in PRODUCTS:
            continue
        function, names = PRODUCTS[str(node.target)]
        given = arguments(node)
        operands = [given[name] for name in names]
        refusal = can_rewrite(node, operands)
        if refusal is not None:
            refuse(node, refusal)
            continue
        if given.get("out_dtype") is not None:
            operands.append(given["out_dtype"])
        results = inline(node, function, operands)
        if isinstance(value(node), torch.Tensor):
            put(node, results[0])
        for getitem in list(node.users):
            if getitem.target is operator.getitem:
                put(getitem, results[getitem.args[1]])
                graph.erase_node(getitem)
        graph.erase_node(node)
        count += 1
    return count


def can_rewrite(node: torch.fx.Node, operands: list[Any]) -> Refusal | None:
    """None if our kernel computes the same product, else why not."""
    a, b = value(operands[0]), value(operands[1])
    facts = describe(*operands)
    if a.dtype != b.dtype or a.dtype not in DTYPES:
        return Refusal(
            Reason.UNSUPPORTED_DTYPE, facts, "cast the operands to float32, bfloat16 or float16"
        )
    if arguments(node).get("bias") is not None:
        return Refusal(Reason.GROUPED_BIAS, facts, "add the bias to the product")
    return None
