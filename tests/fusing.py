"""Tracing, fusing and checking graphs, for the tests of the fusion passes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import triton_only_backend  # noqa: F401
from triton_only_backend import inductor
from triton_only_backend.passes import pipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ours = torch.ops.triton_only
aten = torch.ops.aten


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def trace(function, *args):
    """The graph of a function as Inductor has it before our passes."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(arg) for arg in args]
    return inductor.decompose(torch.func.functionalize(function), fakes)


def run(gm, *disabled):
    """Runs the passes of the aten stage; returns how often each of them fired."""
    # It marks what a GPU runs alone, and has tests of its own.
    results = pipeline.run_stage("aten", gm, (*disabled, "mark_ready_inputs"))
    return {r.name: r.fired for r in results if r.fired and r.name != "rewrite_matmul"}


def fuse(function, *args):
    gm = trace(function, *args)
    fired = run(gm)
    assert run(gm) == {}, "the passes are not idempotent"
    return gm, fired


def targets(gm):
    return Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function")


def refusals(function, *args, name="fuse_norm"):
    """Why a pass left the graph of a function alone, and how often."""
    results = pipeline.run_stage("aten", trace(function, *args))
    return dict(next(r.refusals for r in results if r.name == name))


def options(gm):
    """The keyword arguments of each fused linear layer, tensors by their shapes."""
    return [
        {k: list(v.meta["val"].shape) if isinstance(v, torch.fx.Node) else v for k, v in n.kwargs.items()}
        for n in gm.graph.find_nodes(op="call_function", target=ours.linear_fused.default)
    ]  # fmt: skip


def assert_same(gm, function, *args):
    """As exact as the function itself, measured against fp64."""
    exact = function(*(a.double() if a.is_floating_point() else a for a in args))
    actual, plain = gm(*args), function(*args)
    if not isinstance(exact, tuple):
        actual, plain, exact = (actual,), (plain,), (exact,)
    for a, p, e in zip(actual, plain, exact, strict=True):
        error, plain_error = ((t.double() - e).norm().item() for t in (a, p))
        assert a.shape == p.shape
        assert a.dtype == p.dtype
        assert error <= 2 * plain_error + 1e-6 * e.norm().item()


def compile_step(function, **options):
    return torch.compile(function, backend="triton_only", fullgraph=True, options=options)


def fired_passes(function, args):
    """How often each pass fires when the function is compiled, and what it computes."""
    with torch.no_grad():
        return fired_passes_of(compile_step(function), args)


def fired_passes_of(compiled, args):
    """How often each pass fires in a call of a compiled function, and what it computes."""
    seen = []
    original = pipeline.run_stage

    def run_stage(stage, gm, disabled=()):
        results = original(stage, gm, disabled)
        seen.extend(r for r in results if r.fired)
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run_stage", run_stage)
        result = compiled(*args)
    return {r.name: r.fired for r in seen}, result


def llama_norm(x, weight):
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + 1e-5)).to(x.dtype)


def meta_norm(x, weight):
    wide = x.float()
    return (wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + 1e-5)).type_as(
        x
    ) * weight


def gemma_norm(x, weight):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (wide * (1.0 + weight.float())).type_as(x)


def torch_norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)
