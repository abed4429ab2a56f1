"""Products on small graphs: what becomes ours, what is refused, what a node goes on knowing.

Inline graphs are updated by EXPECTTEST_ACCEPT=1.
"""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from pass_graphs import aten, ours, refusals, targets, trace
from torch._subclasses import FakeTensorMode

import triton_only_backend  # noqa: F401
from triton_only_backend.passes.rewrite_matmul import rewrite_matmul
from triton_only_backend.testing import render


def test_products_become_ours():
    def products(a, b, bias):
        product = torch.addmm(bias, a, b, alpha=2)
        batch = torch.baddbmm(bias, product[None], product.T[None], beta=0.5)
        return a.mm(b), batch.bmm(batch)

    graph = trace(products, torch.randn(4, 6), torch.randn(6, 4), torch.randn(4)).graph
    assert rewrite_matmul(graph) == 4
    graph.lint()
    assert_expected_inline(
        render(graph),
        """\
a_1: f32[4, 6]
b_1: f32[6, 4]
bias_1: f32[4]
addmm: f32[4, 4] = triton_only.addmm(bias_1, a_1, b_1, alpha=2)
unsqueeze: f32[1, 4, 4] = aten.unsqueeze(addmm, 0)
permute: f32[4, 4][1, 4] = aten.permute(addmm, [1, 0])
unsqueeze_1: f32[1, 4, 4][4, 1, 4] = aten.unsqueeze(permute, 0)
baddbmm: f32[1, 4, 4] = triton_only.baddbmm(bias_1, unsqueeze, unsqueeze_1, beta=0.5)
mm: f32[4, 4] = triton_only.mm(a_1, b_1)
bmm: f32[1, 4, 4] = triton_only.bmm(baddbmm, baddbmm)
return (mm, bmm)""",
    )
    assert rewrite_matmul(graph) == 0


def test_out_dtype_is_carried_over():
    graph = torch.fx.Graph()
    with FakeTensorMode():
        a, b = (torch.empty(4, 4, dtype=torch.bfloat16) for _ in range(2))
    nodes = [graph.placeholder(name) for name in "ab"]
    for node, val in zip(nodes, (a, b), strict=True):
        node.meta["val"] = val
    product = graph.call_function(aten.mm.dtype, (*nodes, torch.float32))
    graph.output(product)
    assert rewrite_matmul(graph) == 1
    assert_expected_inline(
        render(graph),
        """\
a: bf16[4, 4]
b: bf16[4, 4]
mm: f32[4, 4] = triton_only.mm(a, b, out_dtype=torch.float32)
return mm""",
    )


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (torch.ones(2, 2).double(), torch.ones(2, 2).double(), "UNSUPPORTED_DTYPE"),
        (torch.ones(2, 2).int(), torch.ones(2, 2).int(), "UNSUPPORTED_DTYPE"),
        (torch.ones(2, 2).cfloat(), torch.ones(2, 2).cfloat(), "UNSUPPORTED_DTYPE"),
    ],
    ids=["float64", "int32", "complex64"],
)
def test_products_of_other_dtypes_are_refused(a, b, reason):
    graph = trace(torch.mm, a, b).graph
    assert rewrite_matmul(graph) == 0
    assert refusals(graph) == [reason]
    assert targets(graph) == ["aten.mm.default"]


def test_operands_on_two_devices_are_refused():
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in "ab"]
    with FakeTensorMode():
        for node, device in zip(nodes, ("cpu", "cuda"), strict=True):
            node.meta["val"] = torch.empty(2, 2, device=device)
    graph.output(graph.call_function(aten.mm.default, tuple(nodes)))
    assert rewrite_matmul(graph) == 0
    assert refusals(graph) == ["UNSUPPORTED_DEVICE"]


PROVENANCE = ("stack_trace", "nn_module_stack", "original_aten", "from_node", "seq_nr")


def test_a_replacement_knows_what_the_node_knew():
    gm = trace(torch.mm, torch.randn(2, 3), torch.randn(3, 4))
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.mm.default)
    node.meta.update({key: f"the {key}" for key in PROVENANCE})
    before = node.meta["val"]
    rewrite_matmul(gm.graph)
    (new,) = gm.graph.find_nodes(op="call_function", target=ours.mm.default)
    assert {key: new.meta[key] for key in PROVENANCE} == {k: f"the {k}" for k in PROVENANCE}
    after = new.meta["val"]
    assert after.fake_mode is before.fake_mode
    assert (after.shape, after.stride(), after.dtype) == (
        before.shape, before.stride(), before.dtype
    )  # fmt: skip
