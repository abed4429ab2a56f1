"""FlexAttention: as an option for comparison, and as what a model calls itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import triton_only_backend as tob
from triton_only_backend.backend import compiled_reports
from triton_only_backend.errors import SettingsError
from triton_only_backend.passes.capture_attention import SDPA
from triton_only_backend.passes.sdpa_to_flex import flex_sdpa, sdpa_to_flex
from triton_only_backend.settings import parse

FLEX = {"attention": "flex"}


def operands(heads=4, kv_heads=4, len_q=160, len_kv=160, dim=16, device="cpu", grad=True):
    shapes = ((2, heads, len_q, dim), (2, kv_heads, len_kv, dim), (2, kv_heads, len_kv, dim))
    return [torch.randn(s, device=device, requires_grad=grad) for s in shapes]


def through_flex(function):
    """Compiled with every attention traced as flex_sdpa and run by PyTorch's own, in eager."""

    def backend(gm, inputs):
        nodes = gm.graph.find_nodes(op="call_function", target=SDPA)
        assert nodes
        for node in nodes:
            node.target = flex_sdpa
        gm.recompile()
        return aot_eager(gm, inputs)

    return torch.compile(function, backend=backend)


CASES = {
    "full": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "causal, unequal lengths": ({"len_q": 130, "len_kv": 200}, {"is_causal": True}),
    "scale": ({}, {"scale": 0.7}),
    "grouped": ({"kv_heads": 2}, {"enable_gqa": True}),
    "bool mask": ({}, {"mask": "bool"}),
    "float mask": ({}, {"mask": "float"}),
}


@pytest.mark.parametrize("case", CASES)
def test_flex_computes_the_same(case):
    sizes, options = CASES[case]
    options = dict(options)
    q, k, v = operands(**sizes)
    mask = options.pop("mask", None)
    if mask is not None:
        mask = torch.randn(1, 4, 160, 160) if mask == "float" else torch.rand(2, 1, 160, 160) > 0.3

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    expected, actual = attention(q, k, v), through_flex(attention)(q, k, v)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (actual, expected)]
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


def dynamo_like_graph(device="cuda", shape=(1, 2, 32, 64), **options):
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in "qkv"]
    with FakeTensorMode():
        for node in nodes:
            node.meta["example_value"] = torch.empty(shape, device=device)
    graph.output(graph.call_function(SDPA, tuple(nodes), options))
    return graph


def test_the_pass_takes_what_the_template_does():
    assert sdpa_to_flex(dynamo_like_graph(is_causal=True)) == 1
    assert sdpa_to_flex(dynamo_like_graph(dropout_p=0.5)) == 0
    assert sdpa_to_flex(dynamo_like_graph(device="cpu")) == 0
    assert sdpa_to_flex(dynamo_like_graph(shape=(1, 2, 32, 80))) == 0
    assert sdpa_to_flex(dynamo_like_graph(shape=(2, 32, 64))) == 0


def test_the_option_is_checked_and_is_part_of_the_key():
    assert parse(environ={}).attention == "triton"
    assert parse(options=FLEX, environ={}).key != parse(environ={}).key
    assert parse(environ={"TRITON_ONLY_ATTENTION": "flex"}).attention == "flex"
    with pytest.raises(SettingsError, match=r"option 'attention' is 'flax'.*flex"):
        parse(options={"attention": "flax"}, environ={})


@pytest.mark.cpu
def test_on_a_cpu_attention_stays_ours():
    q, k, v = operands(grad=False)
    compiled = torch.compile(
        lambda *a: F.scaled_dot_product_attention(*a), backend="triton_only", options=FLEX
    )
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(compiled(q, k, v), expected, rtol=1e-4, atol=1e-5)
    assert "triton_only.attention" in compiled_reports()[-1].to_json()


def causal(batch, head, query, key):
    return query >= key


@pytest.mark.gpu
def test_a_model_that_calls_flex_attention_is_triton():
    q, k, v = operands(dim=64, len_q=256, len_kv=256, device="cuda")
    block_mask = create_block_mask(causal, None, None, 256, 256, device="cuda")

    def model(q, k, v):
        return flex_attention(q, k, v, block_mask=block_mask)

    report = tob.audit(model, q, k, v)
    assert report.is_triton_only, report.to_text()
    y = torch.compile(model, backend="triton_only")(q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_option_runs_flex_attention(is_causal):
    q, k, v = operands(dim=64, len_q=256, len_kv=256, device="cuda")

    def model(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    compiled = torch.compile(model, backend="triton_only", options=FLEX)
    torch.testing.assert_close(compiled(q, k, v), model(q, k, v), rtol=1e-2, atol=1e-2)
    report = compiled_reports()[-1]
    assert report.is_triton_only, report.to_text()
    assert "flex_attention" in report.to_json()
    compiled(q, k, v).sum().backward()
