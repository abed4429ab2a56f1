"""A norm goes into the linear layers that read it, or says why it stays."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fusing import (
    DEVICE,
    assert_same,
    aten,
    fired_passes,
    fuse,
    gemma_norm,
    llama_norm,
    meta_norm,
    options,
    random,
    refusals,
    torch_norm,
    trace,
)

from triton_only_backend.passes.fuse_norm import as_norm

NORMS = {"llama": llama_norm, "meta": meta_norm, "gemma": gemma_norm, "torch": torch_norm}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", NORMS)
def test_norm_goes_into_its_linear_layers(name, rows, dtype):
    def model(x, weight, q, k, v):
        h = NORMS[name](x, weight)
        return F.linear(h, q), F.linear(h, k), F.linear(h, v)

    args = (random(rows, 1, 32, dtype=dtype), random(32, dtype=dtype))
    args += tuple(random(n, 32, dtype=dtype) for n in (24, 8, 8))
    gm, fired = fuse(model, *args)
    assert fired == {"merge_linears": 1, "fuse_norm": 1}
    (kwargs,) = options(gm)
    assert math.isclose(kwargs["norm_eps"], 1e-5, rel_tol=1e-6)
    assert kwargs.get("norm_offset", 0.0) == (1.0 if name == "gemma" else 0.0)
    assert aten.rsqrt.default not in {n.target for n in gm.graph.nodes}
    assert_same(gm, model, *args)


def widen(x):
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def cohere_norm(x, weight, bias):
    wide = widen(x)
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).pow(2).mean(-1, keepdim=True)
    wide = (wide - mean) * torch.rsqrt(variance + 1e-5)
    return (widen(weight) * wide).to(x.dtype)


def olmo_norm(x, weight, bias):
    return F.layer_norm(widen(x), (x.shape[-1],), None, None, eps=1e-5).to(x.dtype)


# With the options that go to the product beside eps.
LAYER_NORMS = {
    "weight and bias": (
        lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5), {"norm_weight", "norm_bias"}
    ),
    "weight": (lambda x, w, b: F.layer_norm(x, w.shape, w, None, 1e-5), {"norm_weight"}),
    "neither": (lambda x, w, b: F.layer_norm(x, w.shape, None, None, 1e-5), set()),
    "nemotron": (
        lambda x, w, b: F.layer_norm(x, w.shape, w + 1, b, 1e-5),
        {"norm_weight", "norm_bias", "norm_offset"},
    ),
    "cohere": (cohere_norm, {"norm_weight"}),
    "olmo": (olmo_norm, set()),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norm_goes_into_its_linear_layers(name, rows, dtype):
    norm, names = LAYER_NORMS[name]

    def model(x, weight, bias, q, k, v, fc):
        h = norm(x, weight, bias)
        return F.linear(h, q), F.linear(h, k), F.linear(h, v), F.gelu(F.linear(h, fc))

    args = (random(rows, 1, 32, dtype=dtype), *(random(32, dtype=dtype) for _ in range(2)))
    args += tuple(random(n, 32, dtype=dtype) for n in (24, 8, 8, 40))
    gm, fired = fuse(model, *args)
    assert fired == {"fuse_epilogue": 1, "merge_linears": 1, "fuse_norm": 1}
    assert aten.rsqrt.default not in {n.target for n in gm.graph.nodes}
    for kwargs in options(gm):
        assert kwargs.pop("norm_centered") is True
        assert math.isclose(kwargs.pop("norm_eps"), 1e-5, rel_tol=1e-6)
        assert set(kwargs) - {"activation"} == names
        assert kwargs.get("norm_offset", 1.0) == 1.0
    assert_same(gm, model, *args)
    far = (args[0] * 0.25 + 250).to(dtype)  # a mean of a thousand deviations
    assert_same(gm, model, far, *args[1:])


def test_a_compiled_layer_norm_agrees():
    model = torch.nn.Sequential(
        torch.nn.LayerNorm(32), torch.nn.Linear(32, 24), torch.nn.GELU(), torch.nn.Linear(24, 32)
    ).to(DEVICE)
    x = random(2, 32)
    with torch.no_grad():
        fired, result = fired_passes(model, (x,))
        assert fired == {"rewrite_matmul": 2, "fuse_epilogue": 1, "fuse_norm": 1}
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)


def test_layer_norms_left_alone():
    def norm(x, weight, bias):
        return F.layer_norm(x, (32,), weight, bias)

    def more_rows(x, weight, bias, q):
        return F.linear(norm(x, weight, bias), q)

    def post_norm(x, weight, bias, q):
        h = norm(x, weight, bias)
        return h + F.linear(h, q)

    def of_both_dimensions(x, weight, bias, q):
        return F.linear(F.layer_norm(x, (2, 32), weight.expand(2, 32), bias.expand(2, 32)), q)

    def over_rows(x, weight, bias, q):
        return F.linear(weight * F.layer_norm(x.T, (2,)).T + bias, q)

    def unbiased(x, weight, bias, q):
        variance, mean = torch.var_mean(x, -1, correction=1, keepdim=True)
        return F.linear((x - mean) * torch.rsqrt(variance + 1e-5) * weight + bias, q)

    def mean_of_another(x, weight, bias, q):
        variance, _ = torch.var_mean(x, -1, correction=0, keepdim=True)
        mean = torch.var_mean(x.flip(0), -1, correction=0, keepdim=True)[1]
        return F.linear((x - mean) * torch.rsqrt(variance + 1e-5) * weight + bias, q)

    def one_bias_for_all(x, weight, bias, q):
        return F.linear(norm(x, weight, None) + bias[:1], q)

    def a_row_of_biases(x, weight, bias, q):
        return F.linear(norm(x, weight, None) + bias[None], q)

    def one_weight_for_all(x, weight, bias, q):
        return F.linear(norm(x, None, None) * weight[:1], q)

    def one_input_for_all(x, weight, bias, q):
        return F.linear(F.layer_norm(x[:, :1], (1,)) * weight + bias, q)

    def of_another_dtype(x, weight, bias, q):
        return F.linear(norm(x, weight, bias).bfloat16(), q.bfloat16())

    for model, rows in (
        (more_rows, 3), (post_norm, 2), (of_both_dimensions, 2), (over_rows, 2), (unbiased, 2),
        (mean_of_another, 2), (one_bias_for_all, 2), (a_row_of_biases, 2),
        (one_weight_for_all, 2), (one_input_for_all, 2), (of_another_dtype, 2),
    ):  # fmt: skip
        args = (random(rows, 32), random(32), random(32), random(32, 32))
        gm, fired = fuse(model, *args)
        assert "fuse_norm" not in fired, model
        assert fired == ({"fuse_epilogue": 1} if model is post_norm else {}), model
        assert_same(gm, model, *args)


@pytest.mark.parametrize("norm", [llama_norm, lambda x, w: F.layer_norm(x, (32,), w)])
def test_of_two_norms_the_last_goes(norm):
    def model(x, first, second, q, k):
        h = norm(norm(x, first), second)
        return F.silu(F.linear(h, q)), F.linear(h, k)

    args = (random(2, 32), random(32), random(32), random(24, 32), random(8, 32))
    gm, fired = fuse(model, *args)
    assert fired == {"fuse_epilogue": 1, "fuse_norm": 1}
    assert_same(gm, model, *args)


def test_a_norm_before_weights_that_are_no_stream():
    def model(x, weight, every_other):
        return F.linear(F.layer_norm(x, (32,), weight), every_other[:, ::2])

    args = (random(2, 32), random(32), random(24, 64))
    gm, fired = fuse(model, *args)
    assert fired == {}
    assert_same(gm, model, *args)
    op, besides = "triton_only.mm.default", "reads, not only as a linear layer's input"
    assert refusals(model, *args) == {f"a norm that {op} {besides}": 1}


def test_norms_that_stay_say_why():
    def post_norm(x, weight, q):
        h = F.layer_norm(x, (32,), weight, None)
        return h + F.linear(h, q)

    def no_product(x, weight, q):
        return llama_norm(x, weight).cos()

    def no_norm(x, weight, q):
        return torch.rsqrt(x.square() + 1)[:, :1] * weight

    def two_inputs(x, weight, q):
        h = F.layer_norm(x, (32,), weight, None)
        return F.linear(h, q), torch.mm(h, q)

    args = random(2, 32), random(32), random(32, 32)
    besides = "reads, not only as a linear layer's input"
    op = "triton_only.linear_fused.default"
    assert refusals(post_norm, *args) == {f"a norm that {op} {besides}": 1}
    assert refusals(no_product, *args) == {f"a norm that aten.cos.default {besides}": 1}
    assert refusals(no_norm, *args) == {"a norm of 64 rows: at most 2 are taken into a product": 1}
    assert refusals(two_inputs, *args) == {}
    assert refusals(post_norm, random(3, 32), *args[1:]) == {
        "a norm of 3 rows: at most 2 are taken into a product": 1
    }


def test_norms_left_alone():
    def more_rows(x, weight, q):
        return F.linear(llama_norm(x, weight), q)

    def read_by_something_else(x, weight, q):
        h = llama_norm(x, weight)
        return F.linear(h, q), h.sum()

    def not_a_norm(x, weight, q):
        wide = x.float()
        return F.linear(weight * (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + 1e-5)), q)

    def another_rows_scale(x, weight, q):
        wide = x.float()
        scale = torch.rsqrt(wide.flip(0).pow(2).mean(-1, keepdim=True) + 1e-5)
        return F.linear(weight * (wide * scale), q)

    def in_other_rows(x, weight, q):
        return F.linear(llama_norm(x.view(1, 64), weight.repeat(2)).view(2, 32), q)

    def one_weight_for_all(x, weight, q):
        return F.linear(llama_norm(x, weight[:1]), q)

    def one_input_for_all(x, weight, q):
        return F.linear(llama_norm(x[:, :1], weight), q)

    for model, rows in (
        (more_rows, 3), (read_by_something_else, 2), (not_a_norm, 2), (another_rows_scale, 2),
        (in_other_rows, 2), (one_weight_for_all, 2), (one_input_for_all, 2),
    ):  # fmt: skip
        args = (random(rows, 32), random(32), random(24, 32))
        gm, fired = fuse(model, *args)
        assert fired == {}, model
        assert_same(gm, model, *args)


def test_a_norm_over_another_dimension_is_none():
    def model(x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5))

    gm = trace(model, random(4, 4), random(4))
    assert [as_norm(n) for n in gm.graph.nodes if n.op == "call_function"][-1] is None
