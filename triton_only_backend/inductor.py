"""The only file that touches private names of torch._inductor and torch._dynamo.

Each function is one thing the package needs of them, with the differences between torch 2.11, 2.13
and 2.15 inside. Nothing of torch._inductor is imported before it is called.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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


def graph_pass(name: str, uuid: str, run: Callable[[torch.fx.Graph], None]) -> Any:
    """An Inductor custom pass; its uuid makes Inductor's graph cache notice a change."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
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
    inner_compile: Callable[..., Any],
) -> Callable[..., Any]:
    """AOTAutograd and Inductor on a Dynamo graph.

    `inner_compile(compile, gm, example_inputs, **kwargs)` is called for each aten graph (inference,
    forward, backward) and must return what `compile(gm, example_inputs, **kwargs)` returns.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    # A hit in AOTAutograd's cache would bypass inner_compile, and with it the audit.
    with functorch_config.patch(enable_autograd_cache=False):
        compiled: Callable[..., Any] = compile_fx(
            gm,
            example_inputs,
            inner_compile=functools.partial(inner_compile, compile_fx_inner),
            config_patches=dict(config),
        )
    return compiled


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


def fake_mode_of(gm: torch.fx.GraphModule) -> Any:
    """The FakeTensorMode that a graph's values were traced under, or None."""
    from torch._dynamo.utils import detect_fake_mode

    return detect_fake_mode(
        [n.meta["val"] for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    )


def graph_breaks() -> dict[str, int]:
    """Reasons of the graph breaks so far in this process, with their counts."""
    from torch._dynamo.utils import counters

    return dict(counters["graph_break"])


def reset_cudagraphs() -> None:
    """Frees the CUDA graphs of earlier compilations; `torch._dynamo.reset()` calls it."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()
