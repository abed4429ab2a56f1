"""Moves RMSNorm into the linear layers that read it, where few rows make them streams of weights.

Why: a decode step of Llama-3-8B normalises 65 times, a kernel of about 2 µs and a launch each, for
8 kB of input. A product of one or two rows can do it as it goes: each program reads the whole row
anyway, sums its squares beside the products, and scales the sums by the row's rstd at the end.

Before:
    mul: "bf16[2, 1, 4096]" = norm_weight * (x / rms(x))          # in aten's own operations
    view: "bf16[2, 4096]" = aten.view.default(mul, [2, 4096])
    many = triton_only.linear_many.default(view, [q, k, v], [])
After:
    view: "bf16[2, 4096]" = aten.view.default(x, [2, 4096])
    fused = triton_only.linear_fused.default(view, [q, k, v], [], norm_weight=…, norm_eps=…)

Found as the models write it: Llama's, Gemma's (1 + weight), `nn.RMSNorm`, and in one dtype. Left
alone: more rows than two, a normalised value that anything but linear layers reads, LayerNorm.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from triton_only_backend.passes.graph_edit import VIEWS, insert, same_sizes, value
from triton_only_backend.passes.linear_layer import (
    FUSED,
    as_linear,
    viewed_as,
)
from triton_only_backend.passes.refusal import decline
from triton_only_backend.passes.template import Template

aten = torch.ops.aten
ours = torch.ops.triton_only
Tensor = torch.Tensor
MAX_ROWS = 2
MAX_WEIGHTS = 3


def _llama(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _gpt_fast(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    rms = torch.rsqrt(torch.mean(x.float() * x.float(), dim=-1, keepdim=True) + eps)
    return (x.float() * rms).type_as(x) * weight


def _widened_once(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _gemma(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.float())).type_as(x)


def _torch(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


# With what is added to the weight; first the one whose weight another would take for a sum.
TEMPLATES = (
    (Template(_gemma), 1.0),
    (Template(_llama), 0.0),
    (Template(_gpt_fast), 0.0),
    (Template(_widened_once), 0.0),
    (Template(_torch), 0.0),
)
LAST = (aten.mul.Tensor, torch.ops.prims.convert_element_type.default)


class Norm(NamedTuple):
    """x normalised: its input, weight, epsilon and what is added to the weight."""

    x: torch.fx.Node
    weight: torch.fx.Node
    eps: float
    offset: float


def as_norm(node: torch.fx.Node) -> Norm | None:
    """The RMSNorm whose result a node is, or None."""
    result = value(node)
    if node.target not in LAST or not isinstance(result, Tensor) or result.dim() < 2:
        return None
    x = torch.empty((2,) * (result.dim() - 1) + (4,), dtype=result.dtype, device="meta")
    for dtype in dict.fromkeys((result.dtype, torch.float32)):
        weight = torch.empty(4, dtype=dtype, device="meta")
        for template, offset in TEMPLATES:
            found = template.match(node, [x, weight])
            if found is None:
                continue
            given, scale = value(found["x"]), value(found["weight"])
            broadcasts = not (
                same_sizes(given.shape, result.shape) and same_sizes(scale.shape, result.shape[-1:])
            )
            if not broadcasts and given.dtype == result.dtype and scale.dtype == dtype:
                return Norm(found["x"], found["weight"], float(found["eps"]), offset)
    return None


def fuse_norm(graph: torch.fx.Graph) -> int:
    """Moves norms into the linear layers after them; returns how many norms went."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in LAST:
            continue
        readers = _linear_readers(node)
        norm = as_norm(node) if readers else None
        if norm is None or not readers:
            continue
        for reader in readers:
            _absorb(reader, norm)
        count += 1
    for node in graph.find_nodes(op="call_function", target=aten.rsqrt.default):
        rows = value(node).numel()
        if node.users and not (isinstance(rows, int) and rows <= MAX_ROWS):
            decline(node, f"a norm of {rows} rows: at most {MAX_ROWS} are taken into a product")
    return count


def _linear_readers(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The linear layers that read a node, if nothing else does and each can take its norm in."""
    result = value(node)
    if not isinstance(result, Tensor):
        return []
    readers: list[torch.fx.Node] = []
    for user in node.users:
        if user.target in VIEWS and same_sizes(value(user).shape[-1:], result.shape[-1:]):
            inner = _linear_readers(user)
            if not inner:
                return []
            readers += inner
        elif result.dim() == 2 and _is_linear_of(user, node):
            readers.append(user)
        else:
            return []
    return readers


def _is_linear_of(user: torch.fx.Node, x: torch.fx.Node) -> bool:
    if user.op != "call_function":
        return False
    rows = value(x).shape[0]
    if not isinstance(rows, int) or not 0 < rows <= MAX_ROWS:
        return False
    if user.target in (ours.linear_many.default, FUSED):
        given, weights = user.args[0], list(user.args[1])  # type: ignore[arg-type]
        operands = [a for a in user.all_input_nodes if a is x]
        takes = "norm_weight" not in user.kwargs and x not in user.kwargs.values()
        if given is not x or len(operands) != 1 or not takes:
            return False
    else:
        linear = as_linear(user)
        if linear is None or linear.x is not x:
            return False
        weights = linear.weights
    return len(weights) <= MAX_WEIGHTS and all(value(w).stride(1) == 1 for w in weights)


def _absorb(reader: torch.fx.Node, norm: Norm) -> None:
    options: dict[str, Any] = dict(reader.kwargs)
    options.update(norm_weight=norm.weight, norm_eps=norm.eps)
    if norm.offset:
        options["norm_offset"] = norm.offset
    if reader.target in (ours.linear_many.default, FUSED):
        given, weights, biases = reader.args
        x = viewed_as(norm.x, value(given).shape, reader)
        new = insert(reader, FUSED, (x, weights, biases), options)
    else:
        linear = as_linear(reader)
        assert linear is not None
        x = viewed_as(norm.x, value(linear.x).shape, reader)
        fused = insert(reader, FUSED, (x, linear.weights, linear.biases), options)
        new = insert(reader, operator.getitem, (fused, 0))
    reader.replace_all_uses_with(new)
    reader.graph.erase_node(reader)
