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
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

import triton_only_backend.kernels
from triton_only_backend import inductor_launch, inductor_mends
from triton_only_backend.passes.capture_attention import capture_attention
from triton_only_backend.passes.fold_broadcast_bmm import fold_broadcast_bmm
from triton_only_backend.passes.fold_kv_expand import fold_kv_expand
from triton_only_backend.passes.fold_masks import fold_masks
from triton_only_backend.passes.fuse_epilogue import fuse_epilogue
from triton_only_backend.passes.fuse_norm import fuse_norm
from triton_only_backend.passes.fuse_rope_cache import fuse_rope_cache
from triton_only_backend.passes.keep_last_position import keep_last_position
from triton_only_backend.passes.mark_ready_inputs import mark_ready_inputs
from triton_only_backend.passes.merge_counters import merge_counters
from triton_only_backend.passes.merge_linears import merge_linears
from triton_only_backend.passes.refusal import DECLINED_KEY, META_KEY
from triton_only_backend.passes.rewrite_attention import rewrite_attention
from triton_only_backend.passes.rewrite_complex import rewrite_complex
from triton_only_backend.passes.rewrite_convolution import rewrite_convolution
from triton_only_backend.passes.rewrite_grouped_mm import rewrite_grouped_mm
from triton_only_backend.passes.rewrite_matmul import rewrite_matmul
from triton_only_backend.passes.rewrite_seeds import rewrite_seeds
from triton_only_backend.passes.rewrite_sort import rewrite_sort
from triton_only_backend.passes.rewrite_topk import rewrite_topk
from triton_only_backend.passes.sdpa_to_flex import sdpa_to_flex
from triton_only_backend.passes.share_mask_spans import share_mask_spans
from triton_only_backend.passes.split_argmax import split_argmax
from triton_only_backend.passes.split_gate import split_gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

log = logging.getLogger("triton_only")

Stage = Literal["dynamo", "joint", "aten", "sweep"]


@dataclass(frozen=True)
class Pass:
    """A graph edit with its name and place. `run` returns how often it fired."""

    name: str
    stage: Stage
    run: Callable[[torch.fx.Graph], int]


PIPELINE: tuple[Pass, ...] = (
    Pass("sdpa_to_flex", "dynamo", sdpa_to_flex),
    Pass("capture_attention", "dynamo", capture_attention),
    Pass("rewrite_attention", "joint", rewrite_attention),
    Pass("rewrite_seeds", "joint", rewrite_seeds),
    Pass("rewrite_complex", "joint", rewrite_complex),
    Pass("fold_masks", "joint", fold_masks),
    Pass("fold_kv_expand", "joint", fold_kv_expand),
    Pass("rewrite_seeds", "aten", rewrite_seeds),
    Pass("fold_kv_expand", "aten", fold_kv_expand),
    Pass("rewrite_convolution", "aten", rewrite_convolution),
    Pass("rewrite_sort", "aten", rewrite_sort),
    Pass("rewrite_topk", "aten", rewrite_topk),
    Pass("rewrite_grouped_mm", "aten", rewrite_grouped_mm),
    Pass("fold_broadcast_bmm", "aten", fold_broadcast_bmm),
    Pass("rewrite_matmul", "aten", rewrite_matmul),
    Pass("keep_last_position", "aten", keep_last_position),
    Pass("split_gate", "aten", split_gate),
    Pass("fuse_epilogue", "aten", fuse_epilogue),
    Pass("merge_linears", "aten", merge_linears),
    Pass("fuse_norm", "aten", fuse_norm),
    Pass("fuse_rope_cache", "aten", fuse_rope_cache),
    Pass("share_mask_spans", "aten", share_mask_spans),
    Pass("merge_counters", "aten", merge_counters),
    Pass("split_argmax", "aten", split_argmax),
    Pass("mark_ready_inputs", "aten", mark_ready_inputs),
    Pass("rewrite_matmul", "sweep", rewrite_matmul),
)
NAMES = tuple(dict.fromkeys(p.name for p in PIPELINE))


@dataclass(frozen=True)
class PassResult:
    """What one pass did to one graph.

    Attributes:
        fired: how often.
        seconds: how long it took.
        refusals: what it declined to rewrite, each with the facts, and how often.
    """

    name: str
    stage: Stage
    fired: int
    seconds: float
    refusals: Mapping[str, int] = field(default_factory=dict)


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
    known = _refusals(graph)
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
        standing = _refusals(graph)
        before = set(map(id, known))  # `known` lives on, so that no new one has one of their ids
        declined = [refusal for refusal in standing if id(refusal) not in before]
        known = standing
        refusals = Counter(refusal["detail"] for refusal in declined)
        results.append(PassResult(graph_pass.name, stage, fired, seconds, dict(refusals)))
        log.info(
            "pass %s (%s): fired %d, declined %d, %.1f ms",
            graph_pass.name, stage, fired, len(declined), seconds * 1e3,
        )  # fmt: skip
        for detail, count in refusals.items():
            log.info("  declined %d: %s", count, detail)
    return results


def _refusals(graph: torch.fx.Graph) -> list[Mapping[str, str]]:
    keys = (META_KEY, DECLINED_KEY)
    return [node.meta[key] for node in graph.nodes for key in keys if key in node.meta]


@functools.cache
def source_hash() -> str:
    """Hash of the sources of all that decides the code: passes, kernels, launches, mends, tables.

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
    for name in (inductor_launch.__file__, inductor_mends.__file__):
        digest.update(Path(name).read_bytes())
    return digest.hexdigest()
