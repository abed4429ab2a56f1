"""Moves RMSNorm and LayerNorm into the linear layers that read them, where few rows stream weights.

Why: a decode step of Llama-3-8B normalises 65 times, a kernel of about 2 µs and a launch each, for
8 kB of input. A product of one or two rows can do it as it goes: each program reads the whole row
anyway. RMSNorm takes no pass of its own: the row's squares are summed beside the products, and the
sums scaled by its rstd at the end. LayerNorm looks at the row before, for its mean.

Before:
    mul: "bf16[2, 1, 4096]" = norm_weight * (x / rms(x))          # in aten's own operations
    view: "bf16[2, 4096]" = aten.view.default(mul, [2, 4096])
    many = triton_only.linear_many.default(view, [q, k, v], [])
After:
    view: "bf16[2, 4096]" = aten.view.default(x, [2, 4096])
    fused = triton_only.linear_fused.default(view, [q, k, v], [], norm_weight=…, norm_eps=…)

and for LayerNorm the same with `norm_centered=True, norm_bias=…`. Found as the models write it:
Llama's, Gemma's (1 + weight), `nn.RMSNorm`, and in one dtype; `nn.LayerNorm` with weight and bias,
weight or neither, Nemotron's (1 + weight), Cohere's. Left alone: more rows than two, a normalised
value that anything but linear layers reads (BERT's, which is the residual too).
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


def _layer(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _nemotron(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight + 1, bias, eps)


def _layer_without_bias(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, None, eps)


def _layer_alone(x: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), None, None, eps)


def _cohere(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).pow(2).mean(-1, keepdim=True)
    return (weight.float() * ((wide - mean) * torch.rsqrt(variance + eps))).to(x.dtype)


# Whether the mean is subtracted, and what is added to the weight; first the ones whose weight
# another would take for a sum, and those with more of a weight and a bias.
TEMPLATES = (
    (Template(_gemma), False, 1.0),
    (Template(_llama), False, 0.0),
    (Template(_gpt_fast), False, 0.0),
    (Template(_widened_once), False, 0.0),
    (Template(_torch), False, 0.0),
    (Template(_nemotron), True, 1.0),
    (Template(_layer), True, 0.0),
    (Template(_cohere), True, 0.0),
    (Template(_layer_without_bias), True, 0.0),
    (Template(_layer_alone), True, 0.0),
)
# What one of them can end in, and what lies between an rsqrt and that end: four steps at most.
LAST = (aten.mul.Tensor, aten.add.Tensor, torch.ops.prims.convert_element_type.default)
STEPS = 4


class Norm(NamedTuple):
    """x normalised: its input, and how; the options as `triton_only.linear_fused` names them."""

    x: torch.fx.Node
    options: dict[str, Any]


def as_norm(node: torch.fx.Node) -> Norm | None:
    """The RMSNorm or LayerNorm whose result a node is, or None."""
    result = value(node)
    if node.target not in LAST or not isinstance(result, Tensor) or result.dim() < 2:
        return None
    x = torch.empty((2,) * (result.dim() - 1) + (4,), dtype=result.dtype, device="meta")
    for dtype in dict.fromkeys((result.dtype, torch.float32)):
        vector = torch.empty(4, dtype=dtype, device="meta")
        for template, centered, offset in TEMPLATES:
            _, *vectors = template.tensors
            found = template.match(node, [x, *([vector] * len(vectors))])
            if found is None or not _fits(found["x"], result.shape, result.dtype):
                continue
            if all(_fits(found[name], result.shape[-1:], dtype) for name in vectors):
                options = {f"norm_{name}": found[name] for name in vectors}
                options["norm_eps"] = float(found["eps"])
                options |= {"norm_offset": offset} if offset else {}
                options |= {"norm_centered": True} if centered else {}
                return Norm(found["x"], options)
    return None


def _fits(node: torch.fx.Node, shape: Any, dtype: torch.dtype) -> bool:
    """Whether a tensor is of this dtype and, without being broadcast, of this shape."""
    return same_sizes(value(node).shape, shape) and value(node).dtype == dtype


def fuse_norm(graph: torch.fx.Graph) -> int:
    """Moves norms into the linear layers after them; returns how many norms went."""
    count = 0
    for root in graph.find_nodes(op="call_function", target=aten.rsqrt.default):
        fused = _fuse(root)
        count += fused
        if not fused and root.users:
            refusal = _refusal(root)
            if refusal is not None:
                decline(root, refusal)
    return count


def _fuse(root: torch.fx.Node) -> int:
    """Moves the norms that an rsqrt scales; returns how many."""
    count = 0
    for node in _ends(root):
        readers, others = _readers(node)
        norm = as_norm(node) if readers and not others else None
        if norm is not None:
            for reader in readers:
                _absorb(reader, norm)
            count += 1
    return count


def _refusal(root: torch.fx.Node) -> str | None:
    """Why the norm that an rsqrt belongs to stays, or None where it belongs to none."""
    rows = value(root).numel()
    if not (isinstance(rows, int) and rows <= MAX_ROWS):
        return f"a norm of {rows} rows: at most {MAX_ROWS} are taken into a product"
    for node in reversed(_ends(root)):
        if as_norm(node) is not None:
            _, others = _readers(node)
            names = ", ".join(sorted({str(other.target) for other in others}))
            return f"a norm that {names} reads, not only as a linear layer's input"
    return None


def _ends(root: torch.fx.Node) -> list[torch.fx.Node]:
    """What may be the end of a norm that an rsqrt scales, in the order of the graph."""
    found: dict[torch.fx.Node, None] = {}
    front = [root]
    for _ in range(STEPS):
        front = [user for node in front for user in node.users if user.target in LAST]
        found.update(dict.fromkeys(front))
    return sorted(found)


def _readers(node: torch.fx.Node) -> tuple[list[torch.fx.Node], list[torch.fx.Node]]:
    """The linear layers that read a node and can take its norm in, and what else reads it."""
    result = value(node)
    readers: list[torch.fx.Node] = []
    others: list[torch.fx.Node] = []
    for user in node.users:
        if user.target in VIEWS and same_sizes(value(user).shape[-1:], result.shape[-1:]):
            inner, outer = _readers(user)
            readers += inner
            others += outer
        elif result.dim() == 2 and _is_linear_of(user, node):
            readers.append(user)
        else:
            others.append(user)
    return readers, others


def _is_linear_of(user: torch.fx.Node, x: torch.fx.Node) -> bool:
    if user.op != "call_function":
        return False
    rows = value(x).shape[0]
    if not isinstance(rows, int) or not 0 < rows <= MAX_ROWS:
        return False
    if user.target in (ours.linear_many.default, FUSED):
        given, weights = user.args[0], list(user.args[1])  # type: ignore[arg-type]
        normed = {"norm_weight", "norm_centered"} & set(user.kwargs)
        if given is not x or normed or x in user.kwargs.values():
            return False
        strides = [value(weight).stride() for weight in weights]
    else:
        linear = as_linear(user)
        if linear is None or linear.x is not x:
            return False
        strides = [weight.strides for weight in linear.weights]
    contiguous = any(all(stride[dim] == 1 for stride in strides) for dim in (1, 0))
    return len(strides) <= MAX_WEIGHTS and contiguous


def _absorb(reader: torch.fx.Node, norm: Norm) -> None:
    options: dict[str, Any] = {**reader.kwargs, **norm.options}
    if reader.target in (ours.linear_many.default, FUSED):
        given, weights, biases = reader.args
        x = viewed_as(norm.x, value(given).shape, reader)
        new = insert(reader, FUSED, (x, weights, biases), options)
    else:
        linear = as_linear(reader)
        assert linear is not None
        _, weights, biases = linear.operands(reader)
        x = viewed_as(norm.x, value(linear.x).shape, reader)
        fused = insert(reader, FUSED, (x, weights, biases), options)
        new = insert(reader, operator.getitem, (fused, 0))
    reader.replace_all_uses_with(new)
    reader.graph.erase_node(reader)
