"""The passes, in their one order, and the runner that applies a stage of them to a graph.

    dynamo   on the Dynamo graph, before AOTAutograd
    joint    on the aten graph of forward and backward together (or of an inference)
    aten     on each aten graph that Inductor is about to compile: inference, forward or backward
    sweep    on the same graph once more, after Inductor's own patterns have run

A pass only edits the graph. The runner does the rest: dead code, lint, recompile, timing, log.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

import triton_only_backend.kernels
from triton_only_backend.passes.capture_attention import capture_attention
from triton_only_backend.passes.fold_broadcast_bmm import fold_broadcast_bmm
from triton_only_backend.passes.fold_kv_expand import fold_kv_expand
from triton_only_backend.passes.merge_linears import merge_linears
from triton_only_backend.passes.rewrite_attention import rewrite_attention
from triton_only_backend.passes.rewrite_matmul import rewrite_matmul

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

log = logging.getLogger("triton_only_backend")

Stage = Literal["dynamo", "joint", "aten", "sweep"]


@dataclass(frozen=True)
class Pass:
    """A graph edit with its name and place. `run` returns how often it fired."""

    name: str
    stage: Stage
    run: Callable[[torch.fx.Graph], int]


PIPELINE: tuple[Pass, ...] = (
    Pass("capture_attention", "dynamo", capture_attention),
    Pass("rewrite_attention", "joint", rewrite_attention),
    Pass("fold_kv_expand", "aten", fold_kv_expand),
    Pass("fold_broadcast_bmm", "aten", fold_broadcast_bmm),
    Pass("rewrite_matmul", "aten", rewrite_matmul),
    Pass("merge_linears", "aten", merge_linears),
    Pass("rewrite_matmul", "sweep", rewrite_matmul),
)
NAMES = tuple(dict.fromkeys(p.name for p in PIPELINE))


@dataclass(frozen=True)
class PassResult:
    """What one pass did to one graph: how often it fired, in how many seconds."""

    name: str
    stage: Stage
    fired: int
    seconds: float


def run_stage(
    stage: Stage, graph_module: torch.fx.GraphModule, disabled: Iterable[str] = ()
) -> list[PassResult]:
    """Runs a stage's passes on a graph and those nested in it (branches, loops, checkpoints)."""
    results: list[PassResult] = []
    for module in list(graph_module.modules()):
        if isinstance(module, torch.fx.GraphModule):
            results += run_on_graph(stage, module.graph, disabled)
            module.recompile()
    return results


def run_on_graph(
    stage: Stage, graph: torch.fx.Graph, disabled: Iterable[str] = ()
) -> list[PassResult]:
    """Runs a stage's passes on one graph."""
    results = []
    for graph_pass in PIPELINE:
        if graph_pass.stage != stage or graph_pass.name in disabled:
            continue
        if log.isEnabledFor(logging.DEBUG):
            log.debug("before %s (%s):\n%s", graph_pass.name, stage, graph)
        start = time.perf_counter()
        fired = graph_pass.run(graph)
        if fired:
            if stage != "dynamo":
                graph.eliminate_dead_code()
            graph.lint()
        seconds = time.perf_counter() - start
        results.append(PassResult(graph_pass.name, stage, fired, seconds))
        log.info("pass %s (%s): %d, %.1f ms", graph_pass.name, stage, fired, seconds * 1e3)
    return results


@functools.cache
def source_hash() -> str:
    """Hash of the sources of all passes and kernels and of the shipped tables.

    Part of the key of Inductor's graph cache: output code depends on the passes and on the kernels'
    fake implementations.
    """
    digest = hashlib.sha256()
    here = Path(__file__).parent
    kernels = Path(triton_only_backend.kernels.__file__).parent
    for folder in (here, kernels):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".json"):
                name = f"{folder.name}/{path.relative_to(folder)}"
                digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
