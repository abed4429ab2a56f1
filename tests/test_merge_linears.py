"""Several linear layers in one launch: the op against separate products, the pass on graphs."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import triton_only_backend  # noqa: F401
from triton_only_backend.passes.merge_linears import merge_linears
from triton_only_backend.passes.refusal import DECLINED_KEY

ours = torch.ops.triton_only


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("columns", [(64, 16, 16), (33, 70), (5, 0, 7), (8, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_linear_many(rows, columns, with_bias, dtype, device):
    K = 96
    a = torch.randn(rows, K, device=device).to(dtype)
    weights = [torch.randn(n, K, device=device).to(dtype) for n in columns]
    biases = [torch.randn(n, device=device).to(dtype) for n in columns] if with_bias else []
    outs = ours.linear_many(a, weights, biases)
    assert len(outs) == len(columns)
    for i, (weight, out) in enumerate(zip(weights, outs, strict=True)):
        exact = a.double() @ weight.double().T + (biases[i].double() if with_bias else 0)
        vendor = torch.nn.functional.linear(a, weight, biases[i] if with_bias else None)
        error, vendor_error = ((t.double() - exact).norm().item() for t in (out, vendor))
        rounding = (torch.finfo(dtype).eps / 2 + 2e-6) * exact.norm().item()
        assert error <= 2 * max(vendor_error, rounding)


def test_opcheck(device):
    a, w = torch.randn(2, 32, device=device), torch.randn(16, 32, device=device)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(ours.linear_many.default, (a, [w, w.clone()], []), test_utils=utils)


def trace(function, *args):
    return make_fx(function, tracing_mode="fake")(*args)


def qkv(x, q, k, v):
    y = ours.mm(x.view(-1, 32), q.permute(1, 0))
    y = y.sin()
    return y, ours.mm(x.view(-1, 32), k.permute(1, 0)), ours.mm(x.view(-1, 32), v.permute(1, 0))


def targets(gm):
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def test_merges_q_k_v(device):
    args = [torch.randn(s, device=device) for s in ((2, 1, 32), (64, 32), (16, 32), (16, 32))]
    gm = trace(qkv, *args)
    assert merge_linears(gm.graph) == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    assert targets(gm).count(ours.linear_many.default) == 1
    assert ours.mm.default not in targets(gm)
    for actual, expected in zip(gm(*args), qkv(*args), strict=True):
        torch.testing.assert_close(actual, expected)
    assert merge_linears(gm.graph) == 0


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 200])
def test_many_rows_merge_where_two_weights_are_alike(rows):
    args = [torch.randn(s) for s in ((rows, 1, 32), (64, 32), (16, 32), (16, 32))]
    gm = trace(qkv, *args)
    assert merge_linears(gm.graph) == (rows > 0)
    assert targets(gm).count(ours.linear_many.default) == (rows > 0)
    args[3] = torch.randn(24, 32)
    assert merge_linears(trace(qkv, *args).graph) == (0 < rows <= 64)


def conv1d(x, q, k, v):
    return ours.mm(x, q), ours.mm(x, k), ours.mm(x, v)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_transposed_weights_merge_where_they_are_streams(rows, device):
    """Stored (K, N), as transformers' Conv1D does."""
    args = [torch.randn(s, device=device) for s in ((rows, 32), (32, 64), (32, 16), (32, 16))]
    gm = trace(conv1d, *args)
    assert merge_linears(gm.graph) == (rows < 3)
    gm.recompile()
    assert targets(gm).count(ours.linear_many.default) == (rows < 3)
    for actual, expected in zip(gm(*args), conv1d(*args), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    declined = [n.meta[DECLINED_KEY] for n in gm.graph.nodes if DECLINED_KEY in n.meta]
    reason = "3 rows: 1 to 2 are merged of weights stored (K, N)"
    detail = f"3 layers that share an input have {reason}"
    assert declined == ([] if rows < 3 else [{"detail": detail}])


def test_weights_stored_in_two_ways_stay_apart():
    def model(x, a, b, c):
        return ours.mm(x, a), ours.mm(x, b.permute(1, 0)), ours.mm(x, c)

    gm = trace(model, *(torch.randn(s) for s in ((2, 32), (32, 32), (32, 32), (32, 32))))
    assert merge_linears(gm.graph) == 1
    (many,) = gm.graph.find_nodes(op="call_function", target=ours.linear_many.default)
    assert len(many.args[1]) == 2


def test_left_alone():
    def two_inputs(x, a, b):
        return ours.mm(x, a.permute(1, 0)), ours.mm(x.sin(), b.permute(1, 0))

    def computed_weight(x, a, b):
        return ours.mm(x, a.permute(1, 0)), ours.mm(x, b.sin().permute(1, 0))

    def scaled(x, a, b):
        bias = torch.zeros(8)
        return ours.addmm(bias, x, a.permute(1, 0), alpha=2), ours.mm(x, b.permute(1, 0))

    for model, rows in ((two_inputs, 2), (computed_weight, 2), (scaled, 2)):
        gm = trace(model, torch.randn(rows, 32), torch.randn(8, 32), torch.randn(8, 32))
        before = targets(gm)
        assert merge_linears(gm.graph) == 0, model
        assert targets(gm) == before


def test_compiled_model_merges_and_agrees(device):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(32, n) for n in (64, 16, 16))

        def forward(self, x):
            return self.q(x).sum(-1) + self.k(x).sum(-1) * self.v(x).sum(-1)

    model, x = Attention().to(device), torch.randn(2, 1, 32, device=device)
    with torch.no_grad():
        actual = torch.compile(model, backend="triton_only")(x)
        torch.testing.assert_close(actual, model(x), rtol=1e-4, atol=1e-4)
