"""Rewrites convolutions to products and sums that Triton runs.

Why: Inductor calls cuDNN for a convolution unless it autotunes. The patch embedding of a vision
model (a kernel as wide as its stride) is a linear layer of each patch, a convolution of 1 × 1 one
of each pixel, and a depthwise convolution (Mamba's) a short sum that fuses with what is around it.

Before:
    convolution: "f32[2, 64, 4, 4]" = aten.convolution(image, weight, bias, [8, 8], [0, 0], …)
After:
    unfold_1: "f32[2, 3, 4, 4, 8, 8]" = aten.unfold(aten.unfold(image, 2, 8, 8), 3, 8, 8)
    rows: "f32[32, 192]" = aten.reshape(aten.permute(unfold_1, [0, 2, 3, 1, 4, 5]), [32, 192])
    addmm: "f32[32, 64]" = aten.addmm.default(bias, rows, aten.t(aten.reshape(weight, [64, 192])))
    convolution = aten.permute(aten.view(addmm, [2, 4, 4, 64]), [0, 3, 1, 2])

So go, in one to three dimensions, forward and backward: convolutions of one group, also
transposed, whose windows read each number of the input MAX_COPIES times at most, and depthwise ones
of at most MAX_TAPS weights a channel. The formulas are in `convolution_math`. Left alone, each with
its reason: windows that overlap more (copied out they are so many times the input), other groups,
dilated products, other dtypes than fp16, bf16 and fp32. For most of those mode="max-autotune" has a
Triton template of Inductor's.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from triton_only_backend.kernels.limits import DTYPES
from triton_only_backend.passes import convolution_math
from triton_only_backend.passes.convolution_math import Window
from triton_only_backend.passes.graph_edit import (
    arguments,
    describe,
    inline,
    put,
    value,
)
from triton_only_backend.passes.refusal import Reason, Refusal, refuse

aten = torch.ops.aten
FORWARD = aten.convolution.default
BACKWARD = aten.convolution_backward.default
# The first layers of Whisper and wav2vec2 copy 1.5 to 3 times; a 3 × 3 convolution would 9 times.
MAX_COPIES = 4
MAX_TAPS = 64
_TEMPLATE = 'mode="max-autotune" uses Inductor\'s Triton convolution template on a GPU'


def rewrite_convolution(graph: torch.fx.Graph) -> int:
    """Rewrites every convolution and every gradient of one; returns how many."""
    count = 0
    for target, rewrite in ((FORWARD, _rewrite_forward), (BACKWARD, _rewrite_backward)):
        for node in graph.find_nodes(op="call_function", target=target):
            refusal = can_rewrite(node)
            if refusal is not None:
                refuse(node, refusal)
                continue
            rewrite(node)
            count += 1
    return count


def can_rewrite(node: torch.fx.Node) -> Refusal | None:
    """None if this convolution is one of the forms above, else why not."""
    given = arguments(node)
    x, weight = value(given["input"]), value(given["weight"])
    facts = describe(given["input"], given["weight"])
    if x.dtype != weight.dtype or x.dtype not in DTYPES:
        return Refusal(
            Reason.UNSUPPORTED_DTYPE, facts, "cast the operands to float32, bfloat16 or float16"
        )
    if x.device != weight.device:
        return Refusal(
            Reason.UNSUPPORTED_DEVICE, facts, f"move both operands to one device, not "
            f"{x.device} and {weight.device}"
        )  # fmt: skip
    window = _window(given)
    if window.depthwise:
        if window.taps > MAX_TAPS:
            return _refusal(f"{facts}; {window.taps} weights a channel")
        return None
    if given["groups"] != 1:
        return _refusal(f"{facts}; {given['groups']} groups")
    dilated = any(d > 1 and k > 1 for d, k in zip(window.dilation, window.kernel, strict=True))
    if dilated:
        return _refusal(f"{facts}; dilation {list(window.dilation)}")
    copies = math.prod(k / s for k, s in zip(window.kernel, window.stride, strict=True) if k > s)
    if copies > MAX_COPIES or (window.overlaps and window.taps > MAX_TAPS):
        stride = list(window.stride)
        return _refusal(f"{facts}; stride {stride} reads the input {copies:.3g} times")
    return None


def _refusal(facts: str) -> Refusal:
    return Refusal(Reason.CONVOLUTION, facts, _TEMPLATE)


def _window(given: dict[str, Any]) -> Window:
    weight = value(given["weight"])
    channels = value(given["input"]).shape[1]
    groups = given["groups"]
    depthwise = groups > 1 and groups == channels and weight.shape[1] == 1
    # each place of the kernel is a step of its own: a symbolic size is guarded, as Inductor does
    kernel = tuple(int(size) for size in weight.shape[2:])
    stride, padding, dilation = (_each(given, n) for n in ("stride", "padding", "dilation"))
    return Window(kernel, stride, padding, dilation, depthwise)


def _each(given: dict[str, Any], name: str) -> tuple[int, ...]:
    """An argument of one number a dimension, or of one for all."""
    numbers = list(given[name])
    dims = value(given["weight"]).dim() - 2
    return tuple(numbers * dims if len(numbers) == 1 else numbers)


def _rewrite_forward(node: torch.fx.Node) -> None:
    given = arguments(node)
    window = _window(given)
    operands = [given["input"], given["weight"], given["bias"]]
    if given["transposed"]:
        more = _each(given, "output_padding")
        function = partial(convolution_math.transposed, window=window, more=more)
    else:
        function = partial(convolution_math.forward, window=window)
    (new,) = inline(node, function, operands)
    put(node, new)
    node.graph.erase_node(node)


def _rewrite_backward(node: torch.fx.Node) -> None:
    given = arguments(node)
    window = _window(given)
    grad, x, weight = given["grad_output"], given["input"], given["weight"]
    for getitem in list(node.users):
        if not getitem.users:
            continue
        index = getitem.args[1]
        if index == 2:
            (new,) = inline(node, convolution_math.of_bias, [grad])
        elif index == 1:
            g, read = (x, grad) if given["transposed"] else (grad, x)
            (new,) = inline(node, partial(convolution_math.of_weight, window=window), [g, read])
        elif given["transposed"]:
            function = partial(convolution_math.forward, window=window)
            (new,) = inline(node, function, [grad, weight, None])
        else:
            function = partial(convolution_math.of_input, window=window)
            (new,) = inline(node, function, [grad, weight, x])
        put(getitem, new)
    for getitem in list(node.users):
        node.graph.erase_node(getitem)
    node.graph.erase_node(node)
