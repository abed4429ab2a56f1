"""Rewrites matrix products to our GEMM ops.

Why: Inductor lowers products to cuBLAS unless it autotunes, and has no split-K for decoding shapes.

Before:
    mm: "bf16[2, 4096]" = torch.ops.aten.mm.default(x, permute)
    addmm: "bf16[2, 512]" = torch.ops.aten.addmm.default(bias, mm, permute_1)
After:
    mm: "bf16[2, 4096]" = torch.ops.triton_only.mm.default(x, permute)
    addmm: "bf16[2, 512]" = torch.ops.triton_only.addmm.default(bias, mm, permute_1)

`linear`, `matmul` and `einsum` arrive here as these ops. Left alone, each with its reason: operands
of other dtypes than fp16, bf16 and fp32, of two dtypes, sparse operands, operands on a CPU beside a
GPU's.
"""

from __future__ import annotations

from typing import Any

import torch

from triton_only_backend.kernels.limits import DTYPES
from triton_only_backend.passes.graph_edit import arguments, describe, replace, value
from triton_only_backend.passes.refusal import Reason, Refusal, refuse

aten = torch.ops.aten
ours = torch.ops.triton_only

# aten overload -> (our op, names of the operands to multiply)
PRODUCTS: dict[Any, tuple[Any, tuple[str, str]]] = {
    aten.mm.default: (ours.mm.default, ("self", "mat2")),
    aten.mm.dtype: (ours.mm.default, ("self", "mat2")),
    aten.addmm.default: (ours.addmm.default, ("mat1", "mat2")),
    aten.addmm.dtype: (ours.addmm.default, ("mat1", "mat2")),
    aten.bmm.default: (ours.bmm.default, ("self", "mat2")),
    aten.bmm.dtype: (ours.bmm.default, ("self", "mat2")),
    aten.baddbmm.default: (ours.baddbmm.default, ("batch1", "batch2")),
    aten.baddbmm.dtype: (ours.baddbmm.default, ("batch1", "batch2")),
}


def can_rewrite(node: torch.fx.Node) -> Refusal | None:
    """None if our kernels compute the same product, else why not."""
    given = arguments(node)
    a, b = (value(given[name]) for name in PRODUCTS[node.target][1])
    facts = describe(*(given[name] for name in PRODUCTS[node.target][1]))
    if a.layout != torch.strided or b.layout != torch.strided:
        return Refusal(Reason.UNSUPPORTED_LAYOUT, facts, "convert the operand with .to_dense()")
    if a.dtype != b.dtype or a.dtype not in DTYPES:
        return Refusal(
            Reason.UNSUPPORTED_DTYPE, facts, "cast the operands to float32, bfloat16 or float16"
        )
    if a.device != b.device:
        return Refusal(
            Reason.UNSUPPORTED_DEVICE, facts, f"move both operands to one device, not "
            f"{a.device} and {b.device}"
        )  # fmt: skip
    return None


def rewrite_matmul(graph: torch.fx.Graph) -> int:
    """Rewrites every product in the graph; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in PRODUCTS:
            continue
        refusal = can_rewrite(node)
        if refusal is not None:
            refuse(node, refusal)
            continue
        given = arguments(node)
        target, (a, b) = PRODUCTS[node.target]
        operands = [given[a], given[b]]
        options = {k: given[k] for k in ("beta", "alpha") if given.get(k, 1) != 1}
        if "out_dtype" in given:
            options["out_dtype"] = given["out_dtype"]
        if target in (ours.addmm.default, ours.baddbmm.default):
            operands.insert(0, given["self"])
        replace(node, target, tuple(operands), options)
        count += 1
    return count
