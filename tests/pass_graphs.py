"""Graphs for the tests of the passes: how they are traced, shown and read."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

import triton_only_backend  # noqa: F401
from triton_only_backend.passes.refusal import META_KEY

aten = torch.ops.aten
ours = torch.ops.triton_only
SHORT = {
    "torch.float32": "f32",
    "torch.bfloat16": "bf16",
    "torch.bool": "bool",
    "torch.int64": "i64",
}


def show(graph: torch.fx.Graph) -> str:
    """One line a call: `mm: f32[2, 4] = triton_only.mm.default(a, b)`."""
    lines = []
    for node in graph.nodes:
        val = node.meta.get("val", node.meta.get("example_value"))
        typed = isinstance(val, torch.Tensor) and f": {SHORT[str(val.dtype)]}{list(val.shape)}"
        if node.op.startswith("call"):
            call = node.format_node().partition("target=")[2].replace("torch.ops.", "")
            target, _, arguments = call.partition("](args = (")
            arguments, _, options = arguments.partition("), kwargs = {")
            inside = ", ".join(x for x in (arguments.rstrip(","), options.rstrip("})")) if x)
            lines.append(f"{node.name}{typed or ''} = {target}({inside})")
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
    return "\n".join(lines)


def trace(function, *args) -> torch.fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*args)


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def refusals(graph: torch.fx.Graph) -> list[str]:
    return [node.meta[META_KEY]["reason"] for node in graph.nodes if META_KEY in node.meta]


def heads(*shape: int, **options) -> torch.Tensor:
    """(batch, heads, length, head_dim), in memory (batch, length, heads, head_dim)."""
    batch, count, length, dim = shape
    return torch.randn(batch, length, count, dim, **options).transpose(1, 2)
