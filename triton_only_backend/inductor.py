"""The file that touches private names of torch._inductor and torch._dynamo.

Each function is one thing the package needs of them, with the differences between torch 2.11, 2.13
and 2.15 inside. Nothing of torch._inductor is imported before it is called.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

# Inductor settings of every compilation; the user's options override them.
BASE_CONFIG: dict[str, Any] = {
    # pad_mm benchmarks cuBLAS at compile time and pads for its alignment; our kernels need neither.
    "shape_padding": False,
}
# With max_autotune on a GPU: convolutions by Inductor's Triton template or not at all.
AUTOTUNE_CONFIG: dict[str, Any] = {"max_autotune_conv_backends": "TRITON"}


def mode_options() -> Mapping[str, Mapping[str, Any]]:
    """Inductor's modes and the options each stands for."""
    modes: Mapping[str, Mapping[str, Any]] = torch._inductor.list_mode_options()
    return modes


@functools.cache
def option_names() -> frozenset[str]:
    """Every key of torch._inductor.config."""
    return frozenset(torch._inductor.list_options())


def option_type(name: str) -> type | None:
    """The type that a key of torch._inductor.config takes, or None where it takes several."""
    from torch._inductor import config

    kind = config.get_type(name)  # type: ignore[attr-defined]  # installed by ConfigModule
    return kind if isinstance(kind, type) and not hasattr(kind, "__origin__") else None


def graph_pass(name: str, uuid: str, run: Callable[[torch.fx.Graph], Any]) -> Any:
    """An Inductor custom pass; its uuid makes Inductor's graph cache notice a change."""
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.pattern_matcher import stable_topological_sort

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            # Inductor's patterns leave nodes out of order until all passes have run.
            stable_topological_sort(graph)
            run(graph)

        def uuid(self) -> str:
            return f"triton_only-{name}-{uuid}"

    return Pass()


def after(existing: Any, ours: Any) -> Any:
    """Our pass, then the user's own at the same hook (torch 2.11 takes only one a hook)."""
    if existing is None:
        return ours
    others = list(existing) if isinstance(existing, list | tuple) else [existing]
    uuids = [other.uuid() if hasattr(other, "uuid") else repr(other) for other in others]

    def run(graph: torch.fx.Graph) -> None:
        ours(graph)
        for other in others:
            other(graph)

    return graph_pass("chain", repr([ours.uuid(), *uuids]), run)


def compile_graph(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    config: Mapping[str, Any],
    decompositions: Mapping[Any, Callable[..., Any]],
    inner_compile: Callable[..., Any],
) -> Callable[..., Any]:
    """AOTAutograd and Inductor on a Dynamo graph.

    Args:
        decompositions: by aten op, beside Inductor's own.
        inner_compile: called as `inner_compile(compile, gm, inputs, **kwargs)` for each aten graph
            (inference, forward, backward); must return what `compile(gm, inputs, **kwargs)`
            returns.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def compile_aten(gm: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        # The graph is taken apart already, and Inductor's cache refuses a key that holds a table.
        kwargs.pop("get_decomp_fn", None)
        return inner_compile(compile_fx_inner, gm, inputs, **kwargs)

    # A hit in AOTAutograd's cache would bypass inner_compile, and with it the audit.
    with functorch_config.patch(enable_autograd_cache=False):
        compiled: Any = compile_fx(
            gm,
            example_inputs,
            inner_compile=compile_aten,
            config_patches=dict(config),
            decompositions={**_inductor_decompositions(config), **decompositions},
        )
    return compiled  # type: ignore[no-any-return]


def decompose(function: Callable[..., Any], inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """A function of fake tensors as an aten graph, as Inductor has it after its joint passes."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor import config
    from torch._inductor.fx_passes.replace_random import replace_random_passes
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    trace = make_fx(function, decomposition_table=_inductor_decompositions({}))
    mode = inputs[0].fake_mode
    # Without the Python dispatcher, composite ops take symbolic sizes for numbers.
    with mode, enable_python_dispatcher(), V.set_fake_mode(mode), torch.no_grad():
        traced: torch.fx.GraphModule = trace(*inputs)
        if not config.fallback_random:
            replace_random_passes(traced)
    return traced


def _inductor_decompositions(config: Mapping[str, Any]) -> dict[Any, Callable[..., Any]]:
    from torch._inductor import config as inductor_config
    from torch._inductor.decomposition import select_decomp_table

    with inductor_config.patch(dict(config)):
        return dict(select_decomp_table())


def attribute_inputs(gm: torch.fx.GraphModule) -> list[bool]:
    """For each input of a Dynamo graph, whether it is an attribute of an object, which lasts.

    A KV cache is one (`cache.layers[0].keys`); an argument that the caller makes anew is not.
    """
    sources = [getattr(n, "_dynamo_source", None) for n in gm.graph.find_nodes(op="placeholder")]
    names = [getattr(source, "name", "") for source in sources]
    # A method before torch 2.13.
    return ["." in str(name() if callable(name) else name) for name in names]


def keep_mutated_inputs_in_place(
    gm: torch.fx.GraphModule, lasting: Sequence[bool], kwargs: dict[str, Any]
) -> None:
    """Tells CUDA graphs to work on the very inputs that a graph writes, instead of copies of them.

    PyTorch copies every input that it does not know to stay where it is, and does without CUDA
    graphs where it would have to write such a copy: a KV cache that was first seen inside a
    compiled region. Told that the input stays, it checks its address at each call and records anew
    where it has changed; so only inputs that last are named.

    Args:
        gm: an aten graph about to be compiled.
        lasting: see `attribute_inputs`, of the Dynamo graph that it came from.
        kwargs: of `compile_fx_inner`; changed in place.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    # AOTAutograd has as many inputs, in their order, unless it took aliases or subclasses apart.
    if not kwargs.get("cudagraphs") or len(inputs) != len(lasting):
        return
    copy = torch.ops.aten.copy_.default
    written = {node.args[0] for node in gm.graph.find_nodes(op="call_function", target=copy)}
    mutated = [i for i, node in enumerate(inputs) if node in written and lasting[i]]
    kwargs["static_input_idxs"] = sorted({*kwargs.get("static_input_idxs", ()), *mutated})


def cudagraphs(compiled: Any) -> Any:
    """Whether a compiled graph asked for CUDA graphs, and PyTorch's reason to do without."""
    from torch._inductor import config

    reason = getattr(compiled, "disabled_cudagraphs_reason", None)
    return {"on": bool(config.triton.cudagraphs), "skipped": [reason] if reason else []}


@contextlib.contextmanager
def cudagraph_skips() -> Iterator[list[str]]:
    """Collects PyTorch's reasons to do without a CUDA graph, when compiling and when running."""
    from torch._inductor import cudagraph_utils

    reasons: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: reasons.append(record.getMessage())  # type: ignore[method-assign]
    logger: logging.Logger = vars(cudagraph_utils)["cudagraphs_log"]
    logger.addHandler(handler)
    try:
        yield reasons
    finally:
        logger.removeHandler(handler)


def is_missing_template(error: BaseException) -> bool:
    """Whether Inductor gave up because it has no Triton template for an operation."""
    from torch._inductor.select_algorithm import NoValidChoicesError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NoValidChoicesError) or "NoValidChoicesError" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def inductor_error() -> type[Exception]:
    """The class of Inductor's compilation errors."""
    from torch._inductor.exc import InductorError

    return InductorError


def source_code(compiled: Any) -> str | None:
    """Inductor's output code for a compiled graph; None where it made none (an empty graph)."""
    return getattr(compiled, "source_code", None)


def run_within(compiled: Any, context: Callable[[], AbstractContextManager[object]]) -> None:
    """Makes every call of a compiled graph, and what it captures, run in `context`."""
    call = compiled.current_callable

    @functools.wraps(call)
    def within(inputs: Any) -> Any:
        with context():
            return call(inputs)

    compiled.current_callable = within


def without_fake_tensors() -> AbstractContextManager[object]:
    """Real tensors are made and computed with, though a graph of fake ones is being compiled."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def as_it_is(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    """An aten graph as AOTAutograd calls a compiled one."""
    from torch._functorch._aot_autograd.utils import make_boxed_func

    boxed: Callable[..., Any] = make_boxed_func(gm.forward)
    return boxed


def compile_apart(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile, kept apart from other compilations of the same code where torch can.

    Its entries then count against no other's recompile limit (torch 2.13 and later).
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    return torch.compile(model, **options)


class GraphBreaks:
    """The graph breaks of this process from the time that this is made."""

    def __init__(self) -> None:
        self._before = {kind: self._counts(kind) for kind in ("graph_break", "unimplemented")}

    def reasons(self) -> dict[str, int]:
        """Reasons with counts; in a line after its first each says where Dynamo broke off.

        Where Dynamo gave up a whole function, what it could not do is the reason.
        """
        for kind, before in self._before.items():
            new = {reason: n - before.get(reason, 0) for reason, n in self._counts(kind).items()}
            found = {_with_places(reason, n): n for reason, n in new.items() if n > 0}
            if found:
                return found
        return {}

    @staticmethod
    def _counts(kind: str) -> dict[str, int]:
        from torch._dynamo.utils import counters

        return dict(counters[kind])


def _with_places(reason: str, count: int) -> str:
    from torch._dynamo import output_graph

    breaks: list[Any] = vars(output_graph)["graph_break_reasons"]
    alike = [found for found in breaks if found.reason == reason]
    frames = [found.user_stack[-1] for found in alike[-count:] if found.user_stack]
    places = dict.fromkeys(f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in frames)
    title, newline, rest = reason.partition("\n")
    return "".join([title, *(f"\n  at {place}" for place in places), newline, rest])


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Adds an artifact to PyTorch's structured trace (TORCH_TRACE), which `tlparse` shows.

    Args:
        encoding: "json" or "string".
        payload: called only where there is a trace.
    """
    from torch._logging._internal import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,
    )


def reset_cudagraphs() -> None:
    """Frees the CUDA graphs of earlier compilations; `torch._dynamo.reset()` calls it."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


def has_triton_lowering(overload: torch._ops.OpOverload) -> bool:
    """Whether Inductor turns the op into code of its own, and not into a call of the op."""
    from torch._inductor.decomposition import decompositions
    from torch._inductor.lowering import lowerings

    handler = lowerings.get(overload)
    if handler is None:
        return overload in decompositions
    return not getattr(handler, "_is_fallback_handler", False)


def is_transformed(tensor: object) -> bool:
    """Whether a transform of torch.func (vmap, grad, …) holds the tensor: only what is called
    within the transform can compute with it."""
    return isinstance(tensor, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(
        tensor
    )


def seed_ops() -> tuple[Any, Any]:
    """The ops by which Inductor draws a graph's seeds, and takes one of them."""
    from torch._inductor import inductor_prims

    return inductor_prims.seeds, inductor_prims.lookup_seed


def static_kernel_classes() -> frozenset[type]:
    """The classes of kernels that Inductor's static launcher has loaded; it may not be in use."""
    modules = ("static_triton_launcher", "static_cuda_launcher")
    found = [sys.modules.get(f"torch._inductor.runtime.{module}") for module in modules]
    return frozenset(
        value
        for module in found
        if module is not None
        for name, value in vars(module).items()
        if isinstance(value, type) and name.startswith("StaticallyLaunched")
    )


def replace_libdevice(functions: Any) -> None:
    """Puts `functions` where the kernels that Inductor generates look for `libdevice`."""
    from torch._inductor.runtime import triton_helpers

    vars(triton_helpers)["libdevice"] = functions
