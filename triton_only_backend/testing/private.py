"""What the kit needs of private torch._inductor and torch._dynamo: stages, cache key, patterns."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from triton_only_backend import inductor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


class _Done(BaseException):
    """The graph is there: nothing of it needs to run."""


def copy_graph(graph: torch.fx.Graph, owner: torch.nn.Module | None = None) -> torch.fx.GraphModule:
    """A copy of a graph and those nested in it; parameters shared, nodes' meta in new dicts."""
    copy = torch.fx.Graph()
    nodes: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.nodes:
        nodes[node] = copy.node_copy(node, nodes.__getitem__)
        if node.op == "output":
            nodes[node].meta = dict(node.meta)
    root = owner if owner is not None else graph.owning_module
    module = torch.fx.GraphModule(torch.nn.Module() if root is None else root, copy)
    for name, nested in list(module.named_children()):
        if isinstance(nested, torch.fx.GraphModule):  # a branch, a loop's body, a checkpoint
            setattr(module, name, copy_graph(nested.graph, nested))
    module.meta = dict(getattr(root, "meta", {}))
    return module


def stages(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    stage: str,
    dynamic: bool,
    backend: str | Callable[..., Any],
) -> list[tuple[str, torch.fx.GraphModule]]:
    """Compiles up to a stage; returns ("forward", graph) and, where there is one, ("backward", …).

    The code generator never runs, nor does the function itself.
    """
    from torch._dynamo import config as dynamo_config
    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx, config

    found: list[tuple[str, torch.fx.GraphModule]] = []

    def keep(graph: torch.fx.Graph) -> None:
        if not found:
            found.append(("forward", copy_graph(graph)))

    def inner_compile(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        if stage == "post_grad":
            part = "backward" if kwargs.get("is_backward") else "forward"
            found.append((part, _before_post_grad(gm, bool(kwargs.get("is_inference")))))
        return gm

    def capture(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        if stage == "dynamo":
            found.append(("forward", copy_graph(gm.graph, gm)))
        elif backend == "inductor":
            compile_fx.compile_fx(gm, inputs, inner_compile=inner_compile)
        else:
            call = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
            result = call(gm, inputs)
            if not found:
                result(*inputs)  # where a backend that refused says why
        return _finish

    joint = inductor.graph_pass("capture", "0", keep)
    with contextlib.ExitStack() as patches:
        # Each capture counts as a compilation of the same code.
        names = ("recompile_limit", "accumulated_recompile_limit")
        limits: dict[str, Any] = dict.fromkeys(names, sys.maxsize)
        patches.enter_context(dynamo_config.patch(limits))
        patches.enter_context(
            functorch_config.patch(
                enable_autograd_cache=False, force_non_lazy_backward_lowering=True
            )
        )
        patches.enter_context(mock.patch.object(compile_fx, "compile_fx_inner", inner_compile))
        if stage == "joint":
            patches.enter_context(config.patch(joint_custom_pre_pass=joint))
        compiled = torch.compile(function, backend=capture, fullgraph=True, dynamic=dynamic)
        with contextlib.suppress(_Done):
            compiled(*args, **kwargs)
    return found


def _finish(*_: Any) -> Any:
    raise _Done


def _before_post_grad(gm: torch.fx.GraphModule, is_inference: bool) -> torch.fx.GraphModule:
    """What the first custom pass of post_grad is given: views are reshapes, dead code is gone."""
    from torch._inductor import config
    from torch._inductor.fx_passes import post_grad

    seen: list[torch.fx.GraphModule] = []

    def stop(graph: torch.fx.Graph) -> None:
        seen.append(copy_graph(graph))
        raise _Done

    module = copy_graph(gm.graph, gm)
    post_grad.view_to_reshape(module)
    hook = inductor.graph_pass("stop", "0", stop)
    with config.patch(post_grad_custom_pre_pass=hook), contextlib.suppress(_Done):
        post_grad.post_grad_passes(module, is_inference)
    return seen[0]


def symbolic_size(mode: FakeTensorMode, name: str, hint: int) -> Any:
    """A new symbol for a size, with the number it is traced with."""
    from torch._dynamo.source import ConstantSource

    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    like = torch.empty(hint, device="meta")
    return mode.from_tensor(like, symbolic_context=context, source=ConstantSource(name)).shape[0]


def sort_nodes(graph: torch.fx.Graph) -> None:
    """Puts nodes after what they read, as Inductor does when all passes have run."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def cache_key(gm: torch.fx.GraphModule, inputs: Sequence[Any], hook: str, graph_pass: Any) -> str:
    """Inductor's key of a graph in its cache while a pass is installed at a hook."""
    from torch._inductor import config
    from torch._inductor.codecache import compiled_fx_graph_hash

    with config.patch({hook: graph_pass}):
        key, _ = compiled_fx_graph_hash(gm, inputs, {}, [])
    return key


def graph_pass_class() -> type:
    """Inductor's base class of custom passes."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def trace_calls(function: Callable[..., Any], names: Sequence[str]) -> Any:
    """A function as a pattern of the calls that it makes itself: torch functions and methods."""
    from torch._inductor import pattern_matcher

    found: dict[torch.fx.Node, Any] = {}
    parameters = iter(names)
    for node in torch.fx.symbolic_trace(function).graph.nodes:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), found.__getitem__)
        if node.op == "placeholder":
            found[node] = pattern_matcher.KeywordArg(next(parameters))
        elif node.op == "call_function":
            found[node] = pattern_matcher.CallFunction(node.target, *args, **kwargs)
        elif node.op == "call_method":
            found[node] = pattern_matcher.CallMethod(node.target, *args, **kwargs)
        elif node.op == "output":
            result = args[0]
            several = isinstance(result, list | tuple)
            return pattern_matcher.MultiOutputPattern(result) if several else result
        if hasattr(found[node], "users"):
            found[node].users = len(node.users)
            found[node].is_strict = True
    raise AssertionError("a traced function has an output")


def pattern_classes() -> Any:
    """The module of Inductor's pattern matcher."""
    from torch._inductor import pattern_matcher

    return pattern_matcher


def trace_pattern(
    function: Callable[..., Any], inputs: Sequence[Any], names: Sequence[str], training: bool
) -> Any:
    """A function as a pattern: its aten graph, any constant int, float, dtype or device ignored."""
    from torch._inductor import pattern_matcher

    trace: Any = pattern_matcher.joint_fwd_bwd if training else pattern_matcher.fwd_only
    with _fake_inputs(inputs) as fakes:
        gm = trace(function, fakes)
    ignored = (int, float, list, torch.device, torch.dtype)
    return pattern_matcher.fx_to_pattern(gm, ignore_types=ignored, argnames=list(names))


def replacement_pass(
    search: Callable[..., Any],
    replace: Callable[..., Any],
    inputs: Sequence[Any],
    extra_check: Callable[[Any], bool],
    training: bool,
) -> Any:
    """An Inductor `PatternMatcherPass` with one replacement."""
    from torch._inductor import pattern_matcher

    patterns = pattern_matcher.PatternMatcherPass()
    decomposed: Any = pattern_matcher.joint_fwd_bwd if training else pattern_matcher.fwd_only

    def trace(fn: Any, *args: Any, **options: Any) -> torch.fx.GraphModule:
        if fn is not replace or training:
            return decomposed(fn, *args, **options)  # type: ignore[no-any-return]
        # The replacement stays as it is written: decomposed, a fused op would be parts again.
        with torch.no_grad():
            traced = make_fx(fn, tracing_mode="real")(*args[0])
        traced.graph.eliminate_dead_code()
        traced.recompile()
        return traced

    with _fake_inputs(inputs) as fakes:
        pattern_matcher.register_replacement(
            search, replace, fakes, trace, patterns, extra_check=extra_check
        )
    return patterns


@contextlib.contextmanager
def _fake_inputs(inputs: Sequence[Any]) -> Iterator[list[Any]]:
    with FakeTensorMode() as mode:
        yield [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]
