"""The ways to run one function that the model benchmark compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend import inductor, settings
from triton_only_backend.eager_mode import eager

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def own_options(mode: str | None = None) -> dict[str, Any]:
    """Options of a compile with our backend in `mode` that leaves it to the caller to report.

    `torch.compile` takes a mode or options, never both, so the mode is spelled out as options.

    Raises:
        SettingsError: `mode` is none that the backend takes.
    """
    return {**settings.parse(mode).inductor, "on_violation": "ignore"}


def _inductor_triton_options() -> dict[str, Any]:
    return {**inductor.mode_options()["max-autotune"], "max_autotune_gemm_backends": "TRITON"}


@dataclass(frozen=True)
class Provider:
    """One way to run a function.

    Attributes:
        name: as the command line has it.
        about: what it is, for the legend of a chart.
        is_ours: whether it is this backend.
        mode: Inductor's mode, or None for an uncompiled function.
        options: Inductor's options in place of a mode.
        own: options of this backend, beside the mode's.
        tunes: whether it measures kernels while it compiles.
    """

    name: str
    about: str
    is_ours: bool = False
    mode: str | None = None
    options: Callable[[], Mapping[str, Any]] | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    tunes: bool = False

    @property
    def is_compiled(self) -> bool:
        """Whether it compiles at all."""
        return self.mode is not None or self.options is not None

    def prepare(self, fn: Callable[..., Any], *, on_gpu: bool) -> Callable[..., Any]:
        """`fn`, compiled as this provider does it; the interpreter has no use for CUDA graphs."""
        if not self.is_compiled:
            return eager()(fn) if self.is_ours else fn
        backend: Any = "inductor"
        options: Mapping[str, Any] | None = self.options() if self.options else None
        if self.is_ours:
            from triton_only_backend.backend import triton_only

            # The function, not its name, so that an installation is not needed.
            backend = triton_only
            options = options or {**own_options(self.mode if on_gpu else None), **self.own}
        compiled: Callable[..., Any] = torch.compile(
            fn,
            backend=backend,
            fullgraph=True,
            dynamic=False,
            mode=None if options is not None else self.mode,
            options=None if options is None else dict(options),
        )
        return compiled


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("eager", "PyTorch on the vendor's libraries, not compiled"),
        Provider("triton-eager", "PyTorch on this backend's kernels, not compiled", is_ours=True),
        Provider("compile", "torch.compile on the vendor's libraries", mode="default"),
        Provider(
            "reduce-overhead",
            "torch.compile on the vendor's libraries, CUDA graphs",
            mode="reduce-overhead",
        ),
        Provider(
            "max-autotune",
            "torch.compile, products by the faster of cuBLAS and its templates, CUDA graphs",
            mode="max-autotune",
            tunes=True,
        ),
        Provider(
            "inductor-triton",
            "torch.compile, products by its Triton templates, CUDA graphs",
            options=_inductor_triton_options,
            tunes=True,
        ),
        Provider(
            "triton_only",
            "this backend, CUDA graphs",
            is_ours=True,
            mode="reduce-overhead",
        ),
        Provider(
            "triton_only-shipped",
            "this backend, CUDA graphs, configurations by its tables alone",
            is_ours=True,
            mode="reduce-overhead",
            own={"database": "none"},
        ),
        Provider(
            "triton_only-heuristic",
            "this backend, CUDA graphs, configurations by its heuristics alone",
            is_ours=True,
            mode="reduce-overhead",
            own={"tuning": "heuristic"},
        ),
    )
}


def reset() -> None:
    """Forgets all that was compiled, and what was counted."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()


def compilation_counts() -> dict[str, int]:
    """Since `reset`: graphs compiled, CUDA graphs that Inductor did without, inputs it copies.

    Two graphs of two inputs each are recorded with four inputs to copy; more means that weights or
    the cache are copied at each call, and 0 that no CUDA graph was recorded.
    """
    from torch._dynamo.utils import counters

    return {
        "graphs": int(counters["stats"]["unique_graphs"]),
        "cudagraph_skips": int(counters["inductor"]["cudagraph_skips"]),
        "cudagraph_copied_inputs": int(
            counters["inductor"]["cudagraph_recorded_non_static_inputs"]
        ),
    }
