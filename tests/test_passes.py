"""The pipeline of passes as a whole; each pass has tests of its own."""

from __future__ import annotations

import itertools

import torch
from pass_graphs import aten, targets, trace
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import triton_only_backend  # noqa: F401
from triton_only_backend.passes import pipeline
from triton_only_backend.passes.decompositions import DECOMPOSITIONS
from triton_only_backend.testing import render


def test_subgraphs_are_rewritten_too():
    def branches(x):
        return torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: (x + 1) @ x, (x,))

    gm = trace(branches, torch.randn(3, 3))
    pipeline.run_stage("aten", gm)
    inner = [m for name, m in gm.named_modules() if name]
    assert len(inner) == 2
    assert all("triton_only.mm.default" in targets(module.graph) for module in inner)


def test_disabled_passes_do_not_run():
    gm = trace(torch.mm, torch.randn(2, 2), torch.randn(2, 2))
    results = pipeline.run_stage("aten", gm, disabled=("rewrite_matmul",))
    assert "rewrite_matmul" not in [result.name for result in results]
    assert targets(gm.graph) == ["aten.mm.default"]


def test_every_pass_is_idempotent_and_leaves_a_valid_graph():
    """A second run of the pipeline changes nothing."""

    def model(x, q):
        y = torch.softmax(q @ q.mT, -1) @ q
        return (x @ x.T).sum() + y.sum()

    gm = trace(model, torch.randn(3, 3), torch.randn(1, 2, 3, 8))
    for stage in ("joint", "aten", "sweep"):
        pipeline.run_stage(stage, gm)
    once = render(gm.graph)
    for stage in ("joint", "aten", "sweep"):
        assert [result.fired for result in pipeline.run_stage(stage, gm)] == [0] * sum(
            p.stage == stage for p in pipeline.PIPELINE
        )
    assert render(gm.graph) == once
    gm.graph.lint()


def test_passes_add_no_guards():
    """Sizes are compared as they are written, never by value."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(*shape: int, dynamic: tuple[int, ...]) -> torch.Tensor:
        sizes = [
            DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(len(shape))
        ]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        source = ConstantSource(f"input{next(serial)}")
        return mode.from_tensor(torch.randn(shape), symbolic_context=context, source=source)

    def model(q, k, x):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, k)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            out, q, k, k, out, lse, 0.0, False
        )
        return out, *grads, x @ x.mT, torch.addbmm(x[0], x, x.mT @ x)

    serial = itertools.count()
    query, key = fake(2, 3, 5, 8, dynamic=(2,)), fake(2, 3, 6, 8, dynamic=(2,))
    inputs = query, key, fake(2, 7, 7, dynamic=(0,))
    with mode:
        gm = make_fx(model, decomposition_table=DECOMPOSITIONS)(*inputs)
    guards = len(mode.shape_env.guards)
    for stage in ("joint", "aten", "sweep"):
        pipeline.run_stage(stage, gm)
    assert "triton_only.attention_backward.default" in targets(gm.graph)
    assert targets(gm.graph).count("triton_only.addmm.default") == 1
    assert len(mode.shape_env.guards) == guards
