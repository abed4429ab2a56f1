"""The graph of a function at the stage where a pass would see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

from triton_only_backend.errors import TritonOnlyError, nearest
from triton_only_backend.testing import private

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Stage = Literal["dynamo", "joint", "post_grad"]
Part = Literal["forward", "backward"]


class CaptureError(TritonOnlyError):
    """There is no graph of the kind asked for."""


def capture(
    fn: Callable[..., Any],
    *args: Any,
    stage: Stage = "post_grad",
    device: str | torch.device | None = None,
    dynamic: bool = False,
    training: bool = False,
    part: Part = "forward",
    backend: str | Callable[..., Any] = "inductor",
    kwargs: Mapping[str, Any] | None = None,
) -> torch.fx.GraphModule:
    """Traces `fn(*args)` up to a stage of `torch.compile` and returns the graph there.

    Neither the function nor any code generator runs, so that arguments stay as they are, and no GPU
    is needed.

    Args:
        fn: a module or function without graph breaks.
        stage: "dynamo": before AOTAutograd, torch functions in any place.
            "joint": aten, forward and backward in one graph (with `training`), where
            `joint_custom_pre_pass` runs.
            "post_grad": aten, forward and backward apart, where `post_grad_custom_pre_pass` runs.
        device: the device that the graph's tensors shall be on, by default that of the arguments.
            Another one than theirs need not be there: the function is traced where the arguments
            are, then each tensor and device in the graph is replaced. What PyTorch chooses by
            device (the kernel of attention, once it is lowered; a branch on `x.is_cuda`) stays as
            it was chosen.
        dynamic: sizes of the arguments are symbols.
        training: a backward is to come; floating arguments then get a gradient.
        part: with `training` at stage "post_grad", which of the two graphs.
        backend: whose graphs: "inductor", or another that compiles through Inductor, whose own
            passes have then run at the stages before.
        kwargs: keyword arguments of `fn`.

    Raises:
        CaptureError: the function has no such graph.
        torch._dynamo.exc.Unsupported: a graph break, which names the line.
    """
    for name, given, known in (("stage", stage, Stage), ("part", part, Part)):
        if given not in get_args(known):
            raise CaptureError(
                f"capture: {name} {given!r} is not known{nearest(str(given), get_args(known))} "
                f"(one of {', '.join(get_args(known))})"
            )
    if part == "backward" and (stage != "post_grad" or not training):
        raise CaptureError(
            'capture: a graph of the backward alone is there with stage="post_grad" and '
            'training=True; stage="joint" shows both in one'
        )
    if training:
        args, kwargs = tree_map(_with_gradient, (args, dict(kwargs or {})))
    with torch.enable_grad() if training else torch.no_grad():
        graphs = private.stages(
            fn, args, kwargs or {}, stage=stage, dynamic=dynamic, backend=backend
        )
    found = [graph for kind, graph in graphs if kind == part]
    if not found:
        name = getattr(fn, "__name__", type(fn).__name__)
        remedy = (
            "no output depends on an argument or parameter that needs a gradient"
            if part == "backward"
            else "it holds no tensor operation, or the backend does not compile through Inductor"
        )
        raise CaptureError(f"capture: {name} has no {part} graph at stage {stage!r}: {remedy}")
    gm = found[0]
    return gm if device is None else to_device(gm, device)


def _with_gradient(leaf: Any) -> Any:
    differentiable = isinstance(leaf, torch.Tensor) and (
        leaf.is_floating_point() or leaf.is_complex()
    )
    return leaf.detach().requires_grad_() if differentiable else leaf


def to_device(gm: torch.fx.GraphModule, device: str | torch.device) -> torch.fx.GraphModule:
    """A copy of a graph whose tensors, fake values and device arguments are on another device."""
    device = torch.device(device)
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, 0)
    copy = private.copy_graph(gm.graph, gm)

    def moved(argument: Any) -> Any:
        if isinstance(argument, torch.device) and argument.type != "meta":
            return device
        return argument

    for node in copy.graph.nodes:
        node.args = tree_map(moved, node.args)
        node.kwargs = tree_map(moved, node.kwargs)
        for key in ("val", "example_value"):
            if key in node.meta:
                node.meta[key] = tree_map(lambda v: _moved_value(v, device), node.meta[key])
    copy.recompile()
    return copy


def _moved_value(value: Any, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor) or value.device.type == "meta":
        return value
    mode = getattr(value, "fake_mode", None) or FakeTensorMode()
    with mode, torch.no_grad():
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.requires_grad_(value.requires_grad)


def placeholder_values(gm: torch.fx.GraphModule) -> list[Any]:
    """The fake values of a graph's inputs, in their order.

    Raises:
        CaptureError: an input has none.
    """
    values = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val", node.meta.get("example_value"))
        if value is None:
            raise CaptureError(
                f"the input {node.name} has no fake value in meta['val']; build the graph with "
                "GraphBuilder, or take it from capture"
            )
        values.append(value)
    return values
