"""Every spelling of repeated KV heads is read in place, in inference and in training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import triton_only_backend as tob
from triton_only_backend.passes.fold_kv_expand import fold_kv_expand

ours = torch.ops.triton_only
Q, KV, ONE = (2, 4, 3, 16), (2, 2, 9, 16), (2, 1, 9, 16)


def repeat_kv(x):
    """As in transformers."""
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, 2, s, d).reshape(b, h * 2, s, d)


def before_the_transpose(x):
    return x.permute(0, 2, 1, 3).repeat_interleave(2, 2).permute(0, 2, 1, 3)


SPELLINGS = {
    "repeat_kv": (repeat_kv, KV),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), KV),
    "repeat_interleave, a negative dim": (lambda x: torch.repeat_interleave(x, 2, dim=-3), KV),
    "before the transpose": (before_the_transpose, KV),
    "flatten": (lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2), KV),
    "one head, expanded": (lambda x: x.expand(-1, 4, -1, -1), ONE),
}
INFERENCE_ONLY = {"one head, repeated": (lambda x: x.repeat(1, 4, 1, 1), ONE)}


def operands(shape, device, grad):
    return [torch.randn(s, device=device, requires_grad=grad) for s in (Q, shape, shape)]


@pytest.mark.parametrize("name", {**SPELLINGS, **INFERENCE_ONLY})
def test_inference(name, device):
    spell, shape = {**SPELLINGS, **INFERENCE_ONLY}[name]
    args = operands(shape, device, grad=False)

    def model(q, k, v):
        return ours.attention(q, spell(k), spell(v))

    gm = make_fx(model, tracing_mode="fake")(*args)
    assert fold_kv_expand(gm.graph) == 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    found = {str(node.target) for node in gm.graph.nodes if node.op == "call_function"}
    assert not {"aten.clone.default", "aten.expand.default", "aten.repeat.default"} & found
    torch.testing.assert_close(gm(*args), model(*args))
    assert fold_kv_expand(gm.graph) == 0


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_query_head_that_meets_them_all_is_left_alone(name, device):
    spell, shape = SPELLINGS[name]
    q, k, v = operands(shape, device, grad=False)

    def model(q, k, v):
        return ours.attention(q[:, :1], spell(k), spell(v))

    gm = make_fx(model, tracing_mode="fake")(q, k, v)
    assert fold_kv_expand(gm.graph) == 0
    assert gm(q, k, v).shape == Q


@pytest.mark.parametrize("name", SPELLINGS)
def test_training(name, device):
    spell, shape = SPELLINGS[name]
    args = operands(shape, device, grad=True)

    def model(q, k, v):
        return F.scaled_dot_product_attention(q, spell(k), spell(v), is_causal=True)

    report = tob.audit(model, *args)
    assert report.is_triton_only
    assert sum(row.fired for row in report.passes if row.name == "fold_kv_expand") == 1
    compiled = torch.compile(model, backend="triton_only")
    outputs = model(*args), compiled(*args)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    expected, actual = (torch.autograd.grad(y.square().sum(), args) for y in outputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def with_backward(q, keys, values):
    out, lse = ours.attention_forward(q, keys, values)
    return ours.attention_backward(out, q, keys, values, None, out, lse)


LEFT_ALONE = {
    "the repeated heads' gradient": lambda q, k, v: with_backward(q, repeat_kv(k), repeat_kv(v)),
    "a forward alone": lambda q, k, v: ours.attention_forward(q, repeat_kv(k), repeat_kv(v)),
    "only the keys": lambda q, k, v: ours.attention(q, repeat_kv(k), v.repeat(1, 2, 1, 1)),
    "groups the other way round": lambda q, k, v: ours.attention(
        q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name, device):
    gm = make_fx(LEFT_ALONE[name], tracing_mode="fake")(*operands(KV, device, grad=False))
    assert fold_kv_expand(gm.graph) == 0
