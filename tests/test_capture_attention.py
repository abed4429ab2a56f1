"""scaled_dot_product_attention of Dynamo graphs becomes ours, or is decomposed or refused.

Inline graphs are updated by EXPECTTEST_ACCEPT=1.
"""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from pass_graphs import heads, refusals

import triton_only_backend as tob
from triton_only_backend.backend import compiled_reports
from triton_only_backend.passes.capture_attention import MATH, SDPA, capture_attention
from triton_only_backend.testing import render


def dynamo_graph(function, *args) -> torch.fx.GraphModule:
    captured = []
    torch.compile(function, backend=lambda gm, _: captured.append(gm) or gm, fullgraph=True)(*args)
    return captured[0]


def test_attention_is_captured_with_all_its_arguments():
    def attention(q, k, v, mask):
        y = F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.5)
        y = F.scaled_dot_product_attention(y, key=k, value=v, is_causal=True)
        return F.scaled_dot_product_attention(y, k[:, :2], v[:, :2], enable_gqa=True)

    gm = dynamo_graph(attention, *(heads(1, 4, 3, 8) for _ in range(3)), torch.zeros(3, 3))
    assert capture_attention(gm.graph) == 3
    gm.graph.lint()
    assert_expected_inline(
        render(gm.graph),
        """\
L_q_: f32[1, 4, 3, 8][96, 8, 32, 1]
L_k_: f32[1, 4, 3, 8][96, 8, 32, 1]
L_v_: f32[1, 4, 3, 8][96, 8, 32, 1]
L_mask_: f32[3, 3]
attention: f32[1, 4, 3, 8][96, 8, 32, 1] = triton_only.attention(L_q_, L_k_, L_v_, L_mask_, scale=0.5)
attention_1: f32[1, 4, 3, 8][96, 8, 32, 1] = triton_only.attention(attention, L_k_, L_v_, None, is_causal=True)
getitem: f32[1, 2, 3, 8][96, 8, 32, 1] = operator.getitem(L_k_, (slice(None, None, None), slice(None, 2, None)))
getitem_1: f32[1, 2, 3, 8][96, 8, 32, 1] = operator.getitem(L_v_, (slice(None, None, None), slice(None, 2, None)))
attention_2: f32[1, 4, 3, 8][96, 8, 32, 1] = triton_only.attention(attention_1, getitem, getitem_1, None, enable_gqa=True)
return (attention_2,)""",
    )
    assert capture_attention(gm.graph) == 0


@pytest.mark.cpu
@pytest.mark.parametrize("reader", ["view", "transpose", "output"])
def test_a_contiguous_output_stays_contiguous_where_that_shows(reader):
    def attention(q):
        y = F.scaled_dot_product_attention(q, q, q)
        return {"view": lambda: y.view(2, -1), "transpose": lambda: y.transpose(1, 2) * 2}.get(
            reader, lambda: y
        )()

    query = torch.randn(2, 4, 3, 8)
    gm = dynamo_graph(attention, query)
    capture_attention(gm.graph)
    gm.recompile()
    (actual,) = gm(query)
    assert actual.shape == attention(query).shape
    assert ("contiguous" in render(gm.graph)) == (reader != "transpose")
    if reader != "transpose":
        assert actual.stride() == attention(query).stride()


def test_dropout_is_captured_with_a_seed():
    gm = dynamo_graph(
        lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), heads(1, 2, 3, 8)
    )
    assert capture_attention(gm.graph) == 1
    gm.graph.lint()
    assert_expected_inline(
        render(gm.graph),
        """\
L_q_: f32[1, 2, 3, 8][48, 8, 16, 1]
random_seeds: i64[1] = triton_only.random_seeds(1, device=cpu)
attention: f32[1, 2, 3, 8] = triton_only.attention(L_q_, L_q_, L_q_, None, random_seeds, dropout_p=0.5, contiguous=True)
return (attention,)""",
    )


@pytest.mark.parametrize("case", ["head_dim", "mask_gradient"])
def test_what_the_kernels_do_not_do_is_decomposed(case):
    query = heads(1, 2, 3, 300 if case == "head_dim" else 8)
    mask = torch.zeros(3, 3, requires_grad=case == "mask_gradient")
    gm = dynamo_graph(lambda q, m: F.scaled_dot_product_attention(q, q, q, m, 0.5), query, mask)
    assert capture_attention(gm.graph) == 1
    gm.graph.lint()
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [MATH, operator.getitem]
    assert len(refusals(gm.graph)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_boolean_mask_hides_where_attention_is_decomposed(dtype):
    def attention(q, mask):
        return F.scaled_dot_product_attention(q, q, q, mask)

    query = heads(1, 2, 3, 300).to(dtype)
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    gm = dynamo_graph(attention, query, mask)
    assert capture_attention(gm.graph) == 1
    gm.graph.lint()
    gm.recompile()
    (actual,) = gm(query, mask)
    torch.testing.assert_close(actual, attention(query, mask))


TRANSFORMED = {
    "vmap": lambda q, k: torch.func.vmap(F.scaled_dot_product_attention, (0, None, None))(q, k, k),
    "grad": lambda q, k: torch.func.grad(
        lambda q: F.scaled_dot_product_attention(q, k, k, is_causal=True).square().sum()
    )(q),
    "gradients of each example": lambda q, k: torch.func.vmap(
        torch.func.grad(lambda q: F.scaled_dot_product_attention(q, k, k).square().sum())
    )(q),
}


@pytest.mark.parametrize("mode", ["compiled", "eager"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_attention_within_a_transform(name, mode, device):
    query, key = torch.randn(3, 2, 4, 8, device=device), torch.randn(2, 4, 8, device=device)
    expected = TRANSFORMED[name](query, key)
    if mode == "eager":
        with tob.eager():
            actual = TRANSFORMED[name](query, key)
    else:
        actual = torch.compile(TRANSFORMED[name], backend="triton_only")(query, key)
        report = compiled_reports()[-1]
        assert report.is_triton_only
        assert "no rule for the transforms of torch.func" in report.to_markdown()
    torch.testing.assert_close(actual, expected)


def test_attention_of_other_dtypes_is_refused():
    gm = dynamo_graph(F.scaled_dot_product_attention, *(heads(1, 2, 3, 8).double(),) * 3)
    assert capture_attention(gm.graph) == 0
    assert refusals(gm.graph) == ["UNSUPPORTED_DTYPE"]
    assert gm.graph.find_nodes(op="call_function", target=SDPA)
