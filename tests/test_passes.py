"""Each pass on small graphs, with fake tensors where a GPU's ops are meant: what goes in, what comes out.

Inline graphs are updated by EXPECTTEST_ACCEPT=1 python -m pytest tests/test_passes.py.
"""

from __future__ import annotations

import itertools
import operator

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

import triton_only_backend  # noqa: F401
from triton_only_backend import inductor
from triton_only_backend.passes import pipeline
from triton_only_backend.passes.capture_attention import MATH, SDPA, capture_attention
from triton_only_backend.passes.decompositions import DECOMPOSITIONS
from triton_only_backend.passes.refusal import META_KEY
from triton_only_backend.passes.rewrite_attention import BACKWARD_OF, rewrite_attention
from triton_only_backend.passes.rewrite_matmul import rewrite_matmul
from triton_only_backend.passes.rewrite_seeds import rewrite_seeds

aten = torch.ops.aten
ours = torch.ops.triton_only
SHORT = {"torch.float32": "f32", "torch.bfloat16": "bf16", "torch.bool": "bool"}
SHORT["torch.int64"] = "i64"


def show(graph: torch.fx.Graph) -> str:
    """One line a call: `mm: f32[2, 4] = triton_only.mm.default(a, b)`."""
    lines = []
    for node in graph.nodes:
        val = node.meta.get("val", node.meta.get("example_value"))
        typed = isinstance(val, torch.Tensor) and f": {SHORT[str(val.dtype)]}{list(val.shape)}"
        if node.op.startswith("call"):
            call = node.format_node().partition("target=")[2].replace("torch.ops.", "")
            target, _, arguments = call.partition("](args = (")
            arguments, _, options = arguments.partition("), kwargs = {")
            inside = ", ".join(x for x in (arguments.rstrip(","), options.rstrip("})")) if x)
            lines.append(f"{node.name}{typed or ''} = {target}({inside})")
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
    return "\n".join(lines)


def trace(function, *args) -> torch.fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*args)


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def refusals(graph: torch.fx.Graph) -> list[str]:
    return [node.meta[META_KEY]["reason"] for node in graph.nodes if META_KEY in node.meta]


# rewrite_matmul


def test_products_become_ours():
    def products(a, b, bias):
        product = torch.addmm(bias, a, b, alpha=2)
        batch = torch.baddbmm(bias, product[None], product.T[None], beta=0.5)
        return a.mm(b), batch.bmm(batch)

    graph = trace(products, torch.randn(4, 6), torch.randn(6, 4), torch.randn(4)).graph
    assert rewrite_matmul(graph) == 4
    graph.lint()
    assert_expected_inline(
        show(graph),
        """\
addmm_default: f32[4, 4] = triton_only.addmm.default(%bias_1, %a_1, %b_1, alpha: 2)
unsqueeze: f32[1, 4, 4] = aten.unsqueeze.default(%addmm_default, 0)
permute: f32[4, 4] = aten.permute.default(%addmm_default, [1, 0])
unsqueeze_1: f32[1, 4, 4] = aten.unsqueeze.default(%permute, 0)
baddbmm_default: f32[1, 4, 4] = triton_only.baddbmm.default(%bias_1, %unsqueeze, %unsqueeze_1, beta: 0.5)
mm_default: f32[4, 4] = triton_only.mm.default(%a_1, %b_1)
bmm_default: f32[1, 4, 4] = triton_only.bmm.default(%baddbmm_default, %baddbmm_default)
return (mm_default, bmm_default)""",
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
        show(graph),
        """\
mm_default: f32[4, 4] = triton_only.mm.default(%a, %b, out_dtype: torch.float32)
return mm_default""",
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


# decompositions


def decomposed(function, *args) -> torch.fx.GraphModule:
    return make_fx(function, decomposition_table=DECOMPOSITIONS, tracing_mode="symbolic")(*args)


DECOMPOSED_CALLS = {
    "addbmm": (
        lambda bias, a, b: torch.addbmm(bias, a, b, beta=0.5, alpha=2),
        [(4, 7), (3, 4, 5), (3, 5, 7)],
    ),
    "bilinear": (F.bilinear, [(2, 4), (2, 5), (3, 4, 5), (3,)]),
    "addmm_activation": (torch._addmm_activation, [(7,), (4, 5), (5, 7)]),
    "addmm_gelu": (
        lambda bias, a, b: torch._addmm_activation(bias, a, b, use_gelu=True),
        [(7,), (4, 5), (5, 7)],
    ),
}


@pytest.mark.parametrize("name", DECOMPOSED_CALLS)
def test_decompositions_compute_the_same(name):
    function, shapes = DECOMPOSED_CALLS[name]
    args = [torch.randn(shape) for shape in shapes]
    gm = decomposed(function, *args)
    torch.testing.assert_close(gm(*args), function(*args), rtol=1e-4, atol=1e-5)
    assert not {str(op) for op in DECOMPOSITIONS} & set(targets(gm.graph))


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
@pytest.mark.parametrize("mask", ["none", "lengths", "padding"])
def test_native_attention_is_taken_apart(mask, need_weights, device):
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True, device=device).eval()
    x = torch.randn(2, 5, 8, device=device)
    barred = torch.zeros((5, 5) if mask == "lengths" else (2, 5), dtype=torch.bool, device=device)
    barred[..., -2:] = True

    def native(x):
        return torch._native_multi_head_attention(
            x, x, x, 8, 2, attention.in_proj_weight, attention.in_proj_bias,
            attention.out_proj.weight, attention.out_proj.bias,
            None if mask == "none" else barred, need_weights,
            mask_type={"none": None, "lengths": 0, "padding": 1}[mask],
        )  # fmt: skip

    with torch.no_grad():
        gm = make_fx(native, decomposition_table=DECOMPOSITIONS, tracing_mode="fake",
                     _allow_non_fake_inputs=True)(x)  # fmt: skip
        actual, expected = gm(x), native(x)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    if need_weights:
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-5)
    assert "aten._native_multi_head_attention.default" not in targets(gm.graph)


# capture_attention


def dynamo_graph(function, *args) -> torch.fx.GraphModule:
    captured = []
    torch.compile(function, backend=lambda gm, _: captured.append(gm) or gm, fullgraph=True)(*args)
    return captured[0]


def heads(*shape: int, **options) -> torch.Tensor:
    """(batch, heads, length, head_dim), in memory (batch, length, heads, head_dim)."""
    batch, count, length, dim = shape
    return torch.randn(batch, length, count, dim, **options).transpose(1, 2)


def test_attention_is_captured_with_all_its_arguments():
    def attention(q, k, v, mask):
        y = F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.5)
        y = F.scaled_dot_product_attention(y, key=k, value=v, is_causal=True)
        return F.scaled_dot_product_attention(y, k[:, :2], v[:, :2], enable_gqa=True)

    gm = dynamo_graph(attention, *(heads(1, 4, 3, 8) for _ in range(3)), torch.zeros(3, 3))
    assert capture_attention(gm.graph) == 3
    gm.graph.lint()
    assert_expected_inline(
        show(gm.graph),
        """\
y: f32[1, 4, 3, 8] = triton_only.attention.default(%l_q_, %l_k_, %l_v_, %l_mask_, scale: 0.5)
y_1: f32[1, 4, 3, 8] = triton_only.attention.default(%y, %l_k_, %l_v_, None, is_causal: True)
getitem: f32[1, 2, 3, 8] = operator.getitem(%l_k_, (slice(None, None, None), slice(None, 2, None)))
getitem_1: f32[1, 2, 3, 8] = operator.getitem(%l_v_, (slice(None, None, None), slice(None, 2, None)))
scaled_dot_product_attention_2: f32[1, 4, 3, 8] = triton_only.attention.default(%y_1, %getitem, %getitem_1, None, enable_gqa: True)
return (scaled_dot_product_attention_2,)""",
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
    assert ("contiguous" in show(gm.graph)) == (reader != "transpose")
    if reader != "transpose":
        assert actual.stride() == attention(query).stride()


def test_dropout_is_captured_with_a_seed():
    gm = dynamo_graph(
        lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), heads(1, 2, 3, 8)
    )
    assert capture_attention(gm.graph) == 1
    gm.graph.lint()
    assert_expected_inline(
        show(gm.graph),
        """\
random_seeds_default: i64[1] = triton_only.random_seeds.default(1, device: cpu)
scaled_dot_product_attention: f32[1, 2, 3, 8] = triton_only.attention.default(%l_q_, %l_q_, %l_q_, None, %random_seeds_default, dropout_p: 0.5, contiguous: True)
return (scaled_dot_product_attention,)""",
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


def test_attention_of_other_dtypes_is_refused():
    gm = dynamo_graph(F.scaled_dot_product_attention, *(heads(1, 2, 3, 8).double(),) * 3)
    assert capture_attention(gm.graph) == 0
    assert refusals(gm.graph) == ["UNSUPPORTED_DTYPE"]
    assert gm.graph.find_nodes(op="call_function", target=SDPA)


# rewrite_attention


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
        show(graph),
        """\
attention_forward_default = triton_only.attention_forward.default(%arg0_1, %arg1_1, %arg2_1, None, is_causal: True, scale: 0.3)
getitem_15: f32[2, 3, 5, 8] = operator.getitem(%attention_forward_default, 0)
clone_default: f32[2, 3, 5, 8] = aten.clone.default(%getitem_15, memory_format: torch.contiguous_format)
getitem_16: f32[2, 3, 5] = operator.getitem(%attention_forward_default, 1)
attention_backward_default = triton_only.attention_backward.default(%arg3_1, %arg0_1, %arg1_1, %arg2_1, None, %getitem_15, %getitem_16, is_causal: True, scale: 0.3)
getitem_12: f32[2, 3, 5, 8] = operator.getitem(%attention_backward_default, 0)
getitem_13: f32[2, 3, 5, 8] = operator.getitem(%attention_backward_default, 1)
getitem_14: f32[2, 3, 5, 8] = operator.getitem(%attention_backward_default, 2)
return (clone_default, getitem_12, getitem_13, getitem_14)""",
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


# rewrite_seeds


def test_the_seeds_of_a_graph_are_drawn_at_once():
    seeds, lookup = inductor.seed_ops()

    def random_numbers(q):
        drawn = seeds(2, q.device)
        mine = ours.random_seeds(1, device=q.device)
        first = torch.ops.prims.inductor_random.default([3], lookup(drawn, 1), "rand")
        return first, ours.attention(q, q, q, None, mine, dropout_p=0.5)

    graph = trace(random_numbers, torch.randn(1, 2, 3, 8)).graph
    (drawn,) = graph.find_nodes(op="call_function", target=ours.random_seeds.default)
    drawn.meta["recompute"] = "must"
    assert rewrite_seeds(graph) == 2
    graph.eliminate_dead_code()
    graph.lint()
    assert_expected_inline(
        show(graph),
        """\
random_seeds_default: i64[3] = triton_only.random_seeds.default(3, device: cpu)
slice_tensor: i64[1] = aten.slice.Tensor(%random_seeds_default, 0, 2, 3)
inductor_lookup_seed: i64[] = prims.inductor_lookup_seed.default(%random_seeds_default, 1)
inductor_random: f32[3] = prims.inductor_random.default([3], %inductor_lookup_seed, rand)
attention: f32[1, 2, 3, 8] = triton_only.attention.default(%q_1, %q_1, %q_1, None, %slice_tensor, dropout_p: 0.5)
return (inductor_random, attention)""",
    )
    (merged,) = graph.find_nodes(op="call_function", target=ours.random_seeds.default)
    assert "recompute" not in merged.meta
    assert rewrite_seeds(graph) == 0


def test_a_draw_is_not_dead_code_of_another():
    """Two draws of the same arguments are two draws: common subexpressions are not merged."""
    tags = ours.random_seeds.default.tags
    assert torch.Tag.nondeterministic_seeded in tags


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
    assert "window_right: 0" in show(gm.graph)
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


# pipeline


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
    once = show(gm.graph)
    for stage in ("joint", "aten", "sweep"):
        assert [result.fired for result in pipeline.run_stage(stage, gm)] == [0] * sum(
            p.stage == stage for p in pipeline.PIPELINE
        )
    assert show(gm.graph) == once
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
