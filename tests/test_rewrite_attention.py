"""Library attention of joint graphs becomes ours, forward and backward together.

Inline graphs are updated by EXPECTTEST_ACCEPT=1.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from pass_graphs import aten, ours, refusals, targets
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import triton_only_backend  # noqa: F401
from triton_only_backend.passes import pipeline
from triton_only_backend.passes.rewrite_attention import BACKWARD_OF, rewrite_attention
from triton_only_backend.testing import render


def flash(q, k, v, bias, grad, *, dropout_p, is_causal):
    del bias
    op = aten._scaled_dot_product_flash_attention
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = op(
        q, k, v, dropout_p, is_causal, scale=0.3
    )
    grads = aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset,
        scale=0.3,
    )  # fmt: skip
    return out, *grads


def efficient(q, k, v, bias, grad, *, dropout_p, is_causal, bias_gradient=False):
    op = aten._scaled_dot_product_efficient_attention
    out, lse, seed, offset = op(q, k, v, bias, True, dropout_p, is_causal, scale=0.3)
    wanted = [True, True, True, bias_gradient]
    grads = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, bias, out, lse, seed, offset, dropout_p, wanted, is_causal, scale=0.3
    )
    return out, *grads[: sum(wanted)]


def cudnn(q, k, v, bias, grad, *, dropout_p, is_causal):
    op = aten._scaled_dot_product_cudnn_attention
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = op(
        q, k, v, bias, True, dropout_p, is_causal, scale=0.3
    )
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p,
        is_causal, scale=0.3,
    )  # fmt: skip
    return out, *grads


def cpu(q, k, v, bias, grad, *, dropout_p, is_causal):
    op = aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = op(q, k, v, dropout_p, is_causal, attn_mask=bias, scale=0.3)
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, dropout_p, is_causal, attn_mask=bias, scale=0.3
    )
    return out, *grads


def joint_graph(
    library,
    shape=(2, 3, 5, 8),
    bias=None,
    kv_heads=None,
    dtype=torch.float32,
    dropout_p=0.0,
    is_causal=False,
    **options,
) -> torch.fx.GraphModule:
    """Forward and backward through a library's ops, on fake CUDA tensors."""
    device = "cpu" if library is cpu else "cuda"

    def function(q, k, v, grad, *bias_):
        b = bias_[0] if bias_ else None
        return library(q, k, v, b, grad, dropout_p=dropout_p, is_causal=is_causal, **options)

    with FakeTensorMode(allow_non_fake_inputs=True):
        kv_shape = (shape[0], kv_heads or shape[1], *shape[2:])
        shapes = (shape, kv_shape, kv_shape, shape)
        operands = [torch.empty(s, dtype=dtype, device=device) for s in shapes]
        if bias is not None:
            operands.append(torch.empty(bias.shape, device=device))
        return make_fx(function)(*operands)


def reference(operands, bias=None, is_causal=False):
    q, k, v, grad = operands
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            *inputs, bias, is_causal=is_causal, scale=0.3, enable_gqa=q.shape[1] != k.shape[1]
        )
    wanted = inputs if bias is None or not bias.requires_grad else [*inputs, bias]
    return [out, *torch.autograd.grad(out, wanted, grad)]


def test_flash_attention_of_a_joint_graph_becomes_ours():
    graph = joint_graph(flash, is_causal=True).graph
    assert rewrite_attention(graph) == 1
    graph.eliminate_dead_code()
    graph.lint()
    assert_expected_inline(
        render(graph),
        """\
arg0_1: f32[2, 3, 5, 8]
arg1_1: f32[2, 3, 5, 8]
arg2_1: f32[2, 3, 5, 8]
arg3_1: f32[2, 3, 5, 8]
attention_forward: (f32[2, 3, 5, 8][120, 8, 24, 1], f32[2, 3, 5]) = triton_only.attention_forward(arg0_1, arg1_1, arg2_1, None, is_causal=True, scale=0.3)
getitem: f32[2, 3, 5, 8][120, 8, 24, 1] = operator.getitem(attention_forward, 0)
clone: f32[2, 3, 5, 8] = aten.clone(getitem, memory_format=torch.contiguous_format)
getitem_1: f32[2, 3, 5] = operator.getitem(attention_forward, 1)
attention_backward: (f32[2, 3, 5, 8], f32[2, 3, 5, 8], f32[2, 3, 5, 8]) = triton_only.attention_backward(arg3_1, arg0_1, arg1_1, arg2_1, None, getitem, getitem_1, is_causal=True, scale=0.3)
getitem_2: f32[2, 3, 5, 8] = operator.getitem(attention_backward, 0)
getitem_3: f32[2, 3, 5, 8] = operator.getitem(attention_backward, 1)
getitem_4: f32[2, 3, 5, 8] = operator.getitem(attention_backward, 2)
return (clone, getitem_2, getitem_3, getitem_4)""",
    )
    assert rewrite_attention(graph) == 0


@pytest.mark.cpu
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("library", [flash, efficient, cudnn, cpu], ids=lambda f: f.__name__)
def test_library_attention_becomes_ours_with_its_gradient(library, masked):
    if masked and library is flash:
        masked = False
    bias = torch.randn(2, 3, 5, 5) if masked else None
    gm = joint_graph(library, bias=bias, is_causal=not masked)
    assert pipeline.run_stage("joint", gm)[0].fired == 1
    assert not {str(op) for pair in BACKWARD_OF.items() for op in pair} & set(targets(gm.graph))
    operands = [torch.randn(2, 3, 5, 8) for _ in range(4)]
    actual = gm(*operands, *([bias] if masked else []))
    expected = reference(operands, bias, is_causal=not masked)
    for ours_, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5)


def test_fewer_key_heads_than_query_heads(device):
    with FakeTensorMode():
        q, k = (torch.empty(1, count, 5, 8, device="cuda") for count in (4, 2))
        op = aten._scaled_dot_product_flash_attention
        gm = make_fx(lambda q, k: op(q, k, k, scale=0.3)[0])(q, k)
    pipeline.run_stage("joint", gm)
    query, key = (torch.randn(1, count, 5, 8, device=device) for count in (4, 2))
    expected = F.scaled_dot_product_attention(query, key, key, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(gm(query, key), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["head_dim", "mask_gradient"])
def test_joint_attention_beyond_the_kernels_is_decomposed(case):
    if case == "head_dim":
        shape, kv_heads, bias = (1, 4, 5, 264), 2, None
        gm = joint_graph(cpu, shape, kv_heads=kv_heads, is_causal=True)
    else:
        shape, kv_heads, bias = (1, 2, 5, 8), 2, torch.randn(1, 2, 5, 5)
        gm = joint_graph(efficient, shape, bias, bias_gradient=True)
    assert pipeline.run_stage("joint", gm)[0].fired == 1
    assert not any("scaled_dot_product" in target for target in targets(gm.graph))
    assert targets(gm.graph).count("aten.bmm.default") == 6
    kv_shape = (1, kv_heads, *shape[2:])
    operands = [torch.randn(s) for s in (shape, kv_shape, kv_shape, shape)]
    actual = gm(*operands, *([] if bias is None else [bias]))
    expected = reference(
        operands, bias if bias is None else bias.clone().requires_grad_(), bias is None
    )
    assert len(actual) == len(expected)
    for ours_, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", [flash, efficient, cudnn, cpu], ids=lambda f: f.__name__)
def test_joint_attention_with_dropout_has_one_seed_for_forward_and_backward(library):
    gm = joint_graph(library, (1, 2, 5, 8), dropout_p=0.25)
    assert pipeline.run_stage("joint", gm)[0].fired == 1
    assert not any("scaled_dot_product" in target for target in targets(gm.graph))
    (seed,) = gm.graph.find_nodes(op="call_function", target=ours.random_seeds.default)
    readers = {str(user.target): user for user in seed.users}
    assert set(readers) == {
        "triton_only.attention_forward.default", "triton_only.attention_backward.default"
    }  # fmt: skip
    assert all(user.kwargs["dropout_p"] == 0.25 for user in readers.values())


def test_joint_attention_that_is_decomposed_keeps_one_random_mask():
    gm = joint_graph(cpu, (1, 2, 5, 264), dropout_p=0.25)
    assert pipeline.run_stage("joint", gm)[0].fired == 1
    found = targets(gm.graph)
    assert not any("scaled_dot_product" in target for target in found)
    assert found.count("prims.inductor_random.default") == 1
    assert found.count("aten.bmm.default") == 6


@pytest.mark.parametrize(
    ("library", "options", "reason"),
    [
        (flash, {"dtype": torch.float64}, "UNSUPPORTED_DTYPE"),
        (cudnn, {"dtype": torch.float64}, "UNSUPPORTED_DTYPE"),
    ],
    ids=["flash", "cudnn"],
)
def test_joint_attention_of_other_dtypes_is_refused(library, options, reason):
    gm = joint_graph(library, **options)
    assert pipeline.run_stage("joint", gm)[0].fired == 0
    assert refusals(gm.graph) == [reason, reason]


@pytest.mark.parametrize(("len_q", "len_kv"), [(3, 5), (5, 3)])
def test_flash_attention_is_causal_from_the_bottom_right(len_q, len_kv, device):
    with FakeTensorMode():
        q, k = (torch.empty(1, 2, length, 8, device="cuda") for length in (len_q, len_kv))
        op = aten._scaled_dot_product_flash_attention
        gm = make_fx(lambda q, k: op(q, k, k, 0.0, True, scale=0.3)[0])(q, k)
    pipeline.run_stage("joint", gm)
    assert "window_right=0" in render(gm.graph)
    query, key = (torch.randn(1, 2, length, 8, device=device) for length in (len_q, len_kv))
    seen = torch.ones(len_q, len_kv, dtype=torch.bool, device=device).tril(len_kv - len_q)
    expected = F.scaled_dot_product_attention(query, key, key, seen, scale=0.3)
    torch.testing.assert_close(gm(query, key), expected.nan_to_num(), rtol=1e-4, atol=1e-5)


def test_a_forward_whose_padded_logsumexp_is_read_is_refused():
    with FakeTensorMode():
        q = torch.empty(1, 2, 5, 8, device="cuda")
        op = aten._scaled_dot_product_efficient_attention
        graph = make_fx(lambda q: op(q, q, q, None, True)[:2])(q).graph
    assert rewrite_attention(graph) == 0
    assert refusals(graph) == ["UNSUPPORTED_LAYOUT"]


def test_a_forward_alone_keeps_no_logsumexp():
    with FakeTensorMode():
        q = torch.empty(1, 5, 2, 8, device="cuda").transpose(1, 2)
        op = aten._scaled_dot_product_cudnn_attention
        gm = make_fx(lambda q: op(q, q, q, None, False)[0])(q)
    pipeline.run_stage("joint", gm)
    assert targets(gm.graph) == ["triton_only.attention.default"]
