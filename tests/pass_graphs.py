"""Graphs for the tests of the passes: how they are traced and read."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

import triton_only_backend  # noqa: F401
from triton_only_backend.passes.refusal import META_KEY

aten = torch.ops.aten
ours = torch.ops.triton_only


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
