"""What may be read early: which of a graph's layers and attentions the pass marks."""

from __future__ import annotations

import operator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import triton_only_backend  # noqa: F401
from triton_only_backend.passes.mark_ready_inputs import (
    ATTENTION,
    FUNCTIONAL,
    mark_ready_inputs,
)

ours = torch.ops.triton_only
BF16 = torch.bfloat16


def tensor(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype)


def trace(function, *args, device="cuda"):
    """The graph of a function of tensors like these on a device that need not be there."""
    with FakeTensorMode() as mode:
        fakes = [torch.empty(a.shape, dtype=a.dtype, device=device) for a in args]
        with mode:
            return make_fx(function, tracing_mode="real")(*fakes)


def marks(function, *args, device="cuda"):
    gm = trace(function, *args, device=device)
    count = mark_ready_inputs(gm.graph)
    products = {ours.linear_fused.default, ours.mm.default, ours.addmm.default}
    found = [
        node.kwargs.get("weights_ready", False)
        for node in gm.graph.nodes
        if node.target in products
    ]
    assert count == sum(found)
    assert mark_ready_inputs(gm.graph) == 0, "what is marked already counts again"
    return found


def layer(x, w, **options):
    return ours.linear_fused(x, [w], [], **options)[0]


def test_of_an_input_and_of_a_computed_activation():
    """The first layer follows whatever ran before the graph, the second the first."""
    found = marks(lambda x, w, v: layer(layer(x, w), v), tensor(2, 64), *2 * [tensor(64, 64)])
    assert found == [False, True]


def test_seen_through_views():
    found = marks(
        lambda x, w: layer(x.sin().view(2, 64), w.view(64, 64).permute(1, 0)),
        tensor(2, 1, 64), tensor(64 * 64),
    )  # fmt: skip
    assert found == [True]
    assert marks(lambda x, w: layer(x.view(2, 64), w), tensor(128), tensor(8, 64)) == [False]


def test_a_computed_weight():
    assert marks(lambda x, w: layer(x.sin(), w * 2), tensor(2, 64), tensor(64, 64)) == [False]


def test_a_computed_norm():
    def function(x, w, g):
        return layer(x.sin(), w, norm_weight=g + 1, norm_eps=1e-5)

    assert marks(function, tensor(2, 64), tensor(64, 64), tensor(64)) == [False]

    def given(x, w, g):
        return layer(x.sin(), w, norm_weight=g, norm_eps=1e-5)

    assert marks(given, tensor(2, 64), tensor(64, 64), tensor(64)) == [True]


def test_a_weight_that_the_graph_writes():
    def function(x, w, v):
        y = layer(x.sin(), w)
        torch.ops.aten.copy_.default(torch.ops.aten.select.int(w, 0, 0), v)
        return y

    assert marks(function, tensor(2, 64), tensor(64, 64), tensor(64)) == [False]


def test_a_weight_that_an_op_of_ours_writes():
    def function(x, w, q, k, positions):
        y = layer(x.sin(), w.view(16, 64))
        return y, ours.rope_cache(q, k, k, None, None, w, w.clone(), positions, rope="none")

    cache = tensor(1, 2, 8, 64)
    q = tensor(1, 2, 1, 64)
    assert marks(function, tensor(2, 64), cache, q, q, torch.tensor([3])) == [False]


def test_another_of_several_weights_is_computed():
    def function(x, w, v):
        return ours.linear_fused(x.sin(), [w, v.exp()], [])

    assert marks(function, tensor(2, 64), *2 * [tensor(64, 64)]) == [False]


def test_what_no_kernel_makes_use_of():
    x, w = tensor(2, 64, dtype=torch.float32), tensor(64, 64, dtype=torch.float32)
    assert marks(lambda x, w: layer(x.sin(), w), x, w) == [False]


def test_products():
    """Whose weight is the second operand, whatever the bias is."""

    def function(x, w, bias):
        y = ours.mm(x.sin(), w.T)
        return ours.addmm(bias.exp(), y, w), ours.mm(w, y), ours.mm(x, w)

    found = marks(function, tensor(64, 64), tensor(64, 64), tensor(64))
    assert found == [True, True, False, False]


def test_on_a_device_without_such_a_kernel():
    args = tensor(2, 64), tensor(64, 64)
    assert marks(lambda x, w: layer(x.sin(), w), *args, device="cpu") == [False]


def test_twice_is_once():
    gm = trace(lambda x, w: layer(x.sin(), w), tensor(2, 64), tensor(64, 64))
    assert mark_ready_inputs(gm.graph) == 1
    text = str(gm.graph)
    mark_ready_inputs(gm.graph)
    assert str(gm.graph) == text


def test_the_result_is_the_same(device):
    x, w = torch.randn(2, 64).to(device, BF16), torch.randn(64, 64).to(device, BF16)
    assert torch.equal(layer(x, w, weights_ready=True), layer(x, w))
    bias = torch.randn(64).to(device, BF16)
    assert torch.equal(ours.mm(x, w, weights_ready=True), ours.mm(x, w))
    assert torch.equal(ours.addmm(bias, x, w, weights_ready=True), ours.addmm(bias, x, w))


def decoding(*, computed=True, read_again=False, cache="placeholder", written_back=True):
    """A decoding step's attention as `fuse_rope_cache` leaves it, and whether it is marked."""
    graph = torch.fx.Graph()
    with FakeTensorMode():
        query = torch.empty(2, 8, 1, 64, dtype=BF16, device="cuda")
    x, keys, values = (graph.placeholder(name) for name in ("x", "keys", "values"))
    if cache != "placeholder":
        keys = graph.call_function(torch.ops.aten.clone.default, (keys,))
    q = graph.call_function(torch.ops.aten.sin.default, (x,)) if computed else x
    q.meta["val"] = query
    node = graph.call_function(
        FUNCTIONAL, (ATTENTION,), {"query": q, "_all_bases": [keys, values], "rope": "half"}
    )
    outs = [graph.call_function(operator.getitem, (node, i)) for i in range(3)]
    for base, new in zip((keys, values), outs[1:], strict=True):
        if written_back:
            graph.call_function(torch.ops.aten.copy_.default, (base, new))
    if read_again:
        outs.append(graph.call_function(torch.ops.aten.sum.default, (keys,)))
    graph.output((outs[0], *outs[3:]))
    count = mark_ready_inputs(graph)
    assert count == int(node.kwargs.get("caches_ready", False))
    return bool(count)


def test_caches_that_only_the_attention_writes():
    assert decoding()


@pytest.mark.parametrize(
    "changes",
    [{"computed": False}, {"read_again": True}, {"cache": "computed"}, {"written_back": False}],
    ids=str,
)
def test_caches_that_are_not_its_own(changes):
    assert not decoding(**changes)
