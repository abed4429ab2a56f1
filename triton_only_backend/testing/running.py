"""Runs a pass on a copy of a graph, and graphs on real tensors."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from triton_only_backend.errors import TritonOnlyError
from triton_only_backend.testing import private
from triton_only_backend.testing.accuracy import widen
from triton_only_backend.testing.capturing import placeholder_values, to_device
from triton_only_backend.testing.rendering import render

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MODULE_NAMES = ("gm", "graph_module", "module", "mod", "model")


class RunError(TritonOnlyError):
    """A pass or graph cannot be run as it is given."""


@dataclass(frozen=True)
class PassRun:
    """A pass's work on a graph.

    Attributes:
        graph_pass: the pass.
        before: the graph as it was.
        after: a copy of it with the pass applied, dead code removed, nodes sorted.
        fired: how often the pass says it matched; 1 or 0, by whether the graph changed, where it
            says nothing.
    """

    graph_pass: Any
    before: torch.fx.GraphModule
    after: torch.fx.GraphModule
    fired: int

    @property
    def changed(self) -> bool:
        """Whether the graph is another one now."""
        return render(self.before) != render(self.after)


def takes_module(graph_pass: Any) -> bool:
    """Whether a pass takes the GraphModule rather than the Graph, by its first parameter."""
    if isinstance(graph_pass, private.graph_pass_class()):
        return False
    parameters = list(inspect.signature(graph_pass).parameters.values())
    if not parameters:
        raise RunError(f"{graph_pass!r} takes no graph; a pass takes a Graph or a GraphModule")
    annotation = str(parameters[0].annotation)
    if "Graph" in annotation:
        return "GraphModule" in annotation
    return parameters[0].name in MODULE_NAMES


def run_pass(graph_pass: Any, gm: torch.fx.GraphModule) -> PassRun:
    """Runs a pass on a copy of a graph, then does what Inductor does after all passes.

    Args:
        graph_pass: a function of a Graph or of a GraphModule (told by the annotation or the name of
            its parameter), that edits it in place or returns another GraphModule; a
            `CustomGraphPass`; a `PatternMatcherPass`.

    Raises:
        AssertionError: the graph is not valid afterwards.
    """
    if not isinstance(gm, torch.fx.GraphModule):
        raise RunError(f"run_pass takes a GraphModule, not a {type(gm).__name__}")
    before, after = private.copy_graph(gm.graph, gm), private.copy_graph(gm.graph, gm)
    run = graph_pass.apply if hasattr(graph_pass, "apply") else graph_pass
    result = run(after if takes_module(run) else after.graph)
    if isinstance(result, torch.fx.GraphModule):
        after = result
    try:
        private.sort_nodes(after.graph)
        after.graph.eliminate_dead_code()
        after.graph.lint()
    except (AssertionError, RuntimeError) as error:
        reason = str(error) or "a node reads itself, or a node that is not in the graph"
        raise AssertionError(f"the pass left a graph that is not valid: {reason}") from error
    after.recompile()
    changed = render(before) != render(after)
    counted = isinstance(result, int) and not isinstance(result, bool)
    return PassRun(graph_pass, before, after, result if counted else int(changed))


def sizes_of(gm: torch.fx.GraphModule) -> dict[str, int]:
    """The symbolic sizes of a graph's inputs, each with the size it was traced with."""
    found: dict[str, int] = {}
    for value in placeholder_values(gm):
        sizes = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
        for size in sizes:
            if isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols:
                    found.setdefault(str(symbol), _hint(size.node.shape_env, symbol))
    return found


def _hint(shape_env: Any, symbol: Any) -> int:
    table = getattr(shape_env, "backed_var_to_val", None) or shape_env.var_to_val
    return int(table[symbol])


def concrete(size: Any, sizes: Mapping[str, int]) -> Any:
    """A size with symbols replaced by numbers; anything else as it is."""
    if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return size
    expression = size.node.expr
    known = {
        symbol: sizes[str(symbol)] if str(symbol) in sizes else _hint(size.node.shape_env, symbol)
        for symbol in expression.free_symbols
    }
    number = expression.subs(known)
    return float(number) if isinstance(size, torch.SymFloat) else int(number)


def random_inputs(
    gm: torch.fx.GraphModule, *, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> list[Any]:
    """Random inputs with the dtypes, shapes and strides that a graph's inputs have.

    Integers are 0 or 1, which is a valid index of most things; give inputs of your own where it is
    not. An input with an expanded dimension is one too.

    Args:
        sizes: numbers for the symbols of `sizes_of`, by default those they were traced with.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return concrete(value, sizes or {})
        shape = [concrete(s, sizes or {}) for s in value.shape]
        strides = [concrete(s, sizes or {}) for s in value.stride()]
        reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        length = reach if all(shape) else 0
        if value.dtype.is_floating_point or value.dtype.is_complex:
            kind = torch.complex64 if value.dtype.is_complex else torch.float32
            flat = torch.randn(length, generator=generator, dtype=kind).to(value.dtype)
        else:
            flat = torch.randint(0, 2, (length,), generator=generator).to(value.dtype)
        made = flat.as_strided(shape, strides)
        device = value.device if _is_there(value.device) else "cpu"
        return made if made.device == torch.device(device) else _copy_to(made, device)

    return [make(value) for value in placeholder_values(gm)]


def _copy_to(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    reach = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = tensor.as_strided((reach,), (1,)).to(device)
    return flat.as_strided(tensor.shape, tensor.stride())


def _is_there(device: torch.device) -> bool:
    return device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.is_available()
    ) or (device.type == "xpu" and torch.xpu.is_available())  # fmt: skip


def runnable(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph itself, or a copy on the CPU where its device is not there."""
    devices = {v.device for v in placeholder_values(gm) if isinstance(v, torch.Tensor)}
    return gm if all(map(_is_there, devices)) else to_device(gm, "cpu")


def clone(inputs: Sequence[Any]) -> list[Any]:
    """Copies of inputs with their strides; those that share memory share it afterwards."""
    copies: dict[int, torch.Tensor] = {}

    def cloned(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in copies:
            flat = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage)
            copies[storage.data_ptr()] = flat.clone()
        flat = copies[storage.data_ptr()].view(value.dtype)
        copy = flat.as_strided(value.shape, value.stride(), value.storage_offset())
        return copy.detach().requires_grad_(value.requires_grad)

    return [cloned(value) for value in inputs]


def flat_outputs(result: Any) -> list[Any]:
    """A graph's result as a list."""
    return list(tree_flatten(result)[0])


def run_graph(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Runs a graph on real tensors; returns its outputs as a list."""
    return flat_outputs(torch.fx.Interpreter(runnable(gm)).run(*inputs))


class _Wide(torch.fx.Interpreter):
    """Runs a graph in fp64: inputs, constants and every dtype that the graph names."""

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op == "get_attr":
            return widen(super().run_node(n))
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: torch.fx.Node) -> Any:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tree_map(_wide_dtype, args), tree_map(_wide_dtype, kwargs)


def _wide_dtype(argument: Any) -> Any:
    narrow = isinstance(argument, torch.dtype) and argument.is_floating_point
    return torch.float64 if narrow else argument


def run_wide(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Runs a graph on fp64 inputs, whatever its own dtypes; returns its outputs as a list."""
    return flat_outputs(_Wide(runnable(gm)).run(*inputs))


def random_like(outputs: Sequence[Any], seed: int = 0) -> list[Any]:
    """A random cotangent for each output that can have one, None for the others."""
    generator = torch.Generator().manual_seed(seed)

    def make(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return None
        flat = torch.randn(value.shape, generator=generator, dtype=torch.float32)
        return flat.to(value.device, value.dtype)

    return [make(value) for value in outputs]


def gradients(
    run: Callable[[Sequence[Any]], list[Any]], inputs: Sequence[Any], cotangents: Sequence[Any]
) -> list[torch.Tensor]:
    """The gradients of a run's floating inputs, zeros where there is none."""
    leaves = [
        t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in inputs
    ]
    with torch.enable_grad():
        # An operation in place must not meet a leaf.
        passed = [
            t.view_as(t) if isinstance(t, torch.Tensor) and t.requires_grad else t for t in leaves
        ]
        outputs = run(passed)
    ends = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if cotangent is not None and output.requires_grad
    ]
    if not pairs:
        raise RunError("no output depends on a floating input in a way that has a gradient")
    starts, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(starts, ends, grads, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(ends, found, strict=True)]
