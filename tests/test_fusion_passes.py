"""Fusion around the products and attention: what each pass finds, what it makes, what it leaves."""

from __future__ import annotations

import math
from collections import Counter

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import triton_only_backend  # noqa: F401
from triton_only_backend import inductor
from triton_only_backend.passes import pipeline
from triton_only_backend.passes.activations import as_activation
from triton_only_backend.passes.fuse_norm import as_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ours = torch.ops.triton_only
aten = torch.ops.aten


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def trace(function, *args):
    """The graph of a function as Inductor has it before our passes."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(arg) for arg in args]
    return inductor.decompose(torch.func.functionalize(function), fakes)


def run(gm, *disabled):
    """Runs the passes of the aten stage; returns how often each of them fired."""
    # It marks what a GPU runs alone, and has tests of its own.
    results = pipeline.run_stage("aten", gm, (*disabled, "mark_ready_inputs"))
    return {r.name: r.fired for r in results if r.fired and r.name != "rewrite_matmul"}


def fuse(function, *args):
    gm = trace(function, *args)
    fired = run(gm)
    assert run(gm) == {}, "the passes are not idempotent"
    return gm, fired


def targets(gm):
    return Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function")


def refusals(function, *args, name="fuse_norm"):
    """Why a pass left the graph of a function alone, and how often."""
    results = pipeline.run_stage("aten", trace(function, *args))
    return dict(next(r.refusals for r in results if r.name == name))


def options(gm):
    """The keyword arguments of each fused linear layer, tensors by their shapes."""
    return [
        {k: list(v.meta["val"].shape) if isinstance(v, torch.fx.Node) else v for k, v in n.kwargs.items()}
        for n in gm.graph.find_nodes(op="call_function", target=ours.linear_fused.default)
    ]  # fmt: skip


def assert_same(gm, function, *args):
    """As exact as the function itself, measured against fp64."""
    exact = function(*(a.double() if a.is_floating_point() else a for a in args))
    actual, plain = gm(*args), function(*args)
    if not isinstance(exact, tuple):
        actual, plain, exact = (actual,), (plain,), (exact,)
    for a, p, e in zip(actual, plain, exact, strict=True):
        error, plain_error = ((t.double() - e).norm().item() for t in (a, p))
        assert a.shape == p.shape
        assert a.dtype == p.dtype
        assert error <= 2 * plain_error + 1e-6 * e.norm().item()


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
BY_HAND = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu_tanh": lambda x: (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*ACTIVATIONS, *(f"{name} by hand" for name in BY_HAND)])
def test_activations_are_recognised(name, dtype):
    written = BY_HAND[name.split()[0]] if "by hand" in name else ACTIVATIONS[name]
    gm = trace(lambda x: written(x), random(2, 3, 4, dtype=dtype))
    found = [as_activation(n) for n in gm.graph.nodes if n.op == "call_function"]
    assert found[-1] is not None
    assert found[-1][0] == name.split()[0]
    assert found[-1][1].op == "placeholder"
    # On the way to it nothing passes for another one, but for what it is made of.
    assert {f[0] for f in found[:-1] if f} <= {"sigmoid", "tanh", name.split()[0]}


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_after_a_linear_layer(name, rows):
    def model(x, weight, bias):
        return ACTIVATIONS[name](F.linear(x, weight, bias))

    args = (random(rows, 1, 32), random(24, 32), random(24))
    gm, fired = fuse(model, *args)
    assert fired == {"fuse_epilogue": 1}
    assert options(gm) == [{"activation": name}]
    assert_same(gm, model, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("swapped", [False, True], ids=["act-gate", "up-first"])
@pytest.mark.parametrize("rows", [2, 6])
def test_gated_mlp_is_one_product(rows, swapped, with_bias, dtype):
    def model(x, gate, up, gate_bias, up_bias):
        biases = (gate_bias, up_bias) if with_bias else (None, None)
        first, second = F.silu(F.linear(x, gate, biases[0])), F.linear(x, up, biases[1])
        return second * first if swapped else first * second

    args = (random(rows, 1, 32, dtype=dtype), *(random(24, 32, dtype=dtype) for _ in range(2)))
    args += tuple(random(24, dtype=dtype) for _ in range(2))
    gm, fired = fuse(model, *args)
    assert fired == {"fuse_epilogue": 2}
    assert options(gm) == [{"activation": "silu", "gated": True}]
    assert_same(gm, model, *args)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("cut", ["chunk", "slices", "up first"])
@pytest.mark.parametrize("rows", [2, 6])
def test_gate_and_up_in_one_weight(rows, cut, with_bias):
    def model(x, weight, bias):
        both = F.linear(x, weight, bias if with_bias else None)
        if cut == "slices":
            gate, up = both[..., :24], both[..., 24:]
        else:
            gate, up = both.chunk(2, dim=-1)
        return F.silu(up) * gate if cut == "up first" else F.silu(gate) * up

    args = (random(rows, 1, 32), random(48, 32), random(48))
    gm, fired = fuse(model, *args)
    assert fired == {"split_gate": 1, "fuse_epilogue": 2}
    assert options(gm) == [{"activation": "silu", "gated": True}]
    assert_same(gm, model, *args)


def test_merged_weights_left_alone():
    def read_besides(x, weight):
        both = F.linear(x, weight)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up, both.sum()

    def no_gate(x, weight):
        a, b = F.linear(x, weight).chunk(2, dim=-1)
        return a * b.cos()

    def the_same_half(x, weight):
        gate, _ = F.linear(x, weight).chunk(2, dim=-1)
        return F.silu(gate) * gate

    def other_cut(x, weight):
        a, b = F.linear(x, weight).split([16, 32], dim=-1)
        return F.silu(a) * b[..., :16]

    for model in (read_besides, no_gate, the_same_half, other_cut):
        args = (random(4, 32), random(48, 32))
        gm, fired = fuse(model, *args)
        assert "split_gate" not in fired, model
        assert_same(gm, model, *args)


class TestGraphs(expecttest.TestCase):
    def test_llama_block(self):
        def norm(x, weight):
            wide = x.float()
            scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
            return weight * (wide * scale).to(x.dtype)

        def model(x, weight, gate, up, down):
            h = norm(x, weight)
            return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)

        dtype = torch.bfloat16
        args = (random(2, 1, 32, dtype=dtype), random(32, dtype=dtype))
        args += tuple(random(*s, dtype=dtype) for s in ((24, 32), (24, 32), (32, 24)))
        gm, fired = fuse(model, *args)
        self.assertEqual(fired, {"fuse_epilogue": 3, "fuse_norm": 1})
        self.assertExpectedInline(
            "\n".join(
                f"{n.name} = {n.target}({', '.join(map(str, n.args))}"
                + "".join(f", {k}={v}" for k, v in n.kwargs.items()) + ")"
                for n in gm.graph.nodes
                if n.op == "call_function" and n.target is not aten.permute.default
            ),
            """\
reshape_default_4 = aten.reshape.default(x_1, [2, 32])
linear_fused_default_3 = triton_only.linear_fused.default(reshape_default_4, [gate_1, up_1], [], activation=silu, gated=True, norm_weight=weight_1, norm_eps=1e-05)
getitem_1 = <built-in function getitem>(linear_fused_default_3, 0)
reshape_default_1 = aten.reshape.default(getitem_1, [2, 1, 24])
view_4 = aten.view.default(reshape_default_1, [2, 24])
reshape_default_2 = aten.reshape.default(x_1, [2, 32])
linear_fused_default_2 = triton_only.linear_fused.default(view_4, [down_1], [], residual=reshape_default_2)
getitem_2 = <built-in function getitem>(linear_fused_default_2, 0)
reshape_default_3 = aten.reshape.default(getitem_2, [2, 1, 32])""",
        )  # fmt: skip
        assert_same(gm, model, *args)

    def test_gpt2_mlp(self):
        def model(x, weight, bias, c_fc, c_fc_bias, c_proj, c_proj_bias):
            h = F.layer_norm(x, (32,), weight, bias, 1e-5).view(-1, 32)
            h = BY_HAND["gelu_tanh"](torch.addmm(c_fc_bias, h, c_fc))
            return x + torch.addmm(c_proj_bias, h, c_proj).view(x.shape)

        shapes = ((2, 1, 32), (32,), (32,), (32, 24), (24,), (24, 32), (32,))
        args = tuple(random(*shape, dtype=torch.bfloat16) for shape in shapes)
        gm, fired = fuse(model, *args)
        self.assertEqual(fired, {"fuse_epilogue": 2, "fuse_norm": 1})
        self.assertExpectedInline(
            "\n".join(
                f"{n.name} = {n.target}({', '.join(map(str, n.args))}"
                + "".join(f", {k}={v}" for k, v in n.kwargs.items()) + ")"
                for n in gm.graph.nodes
                if n.op == "call_function"
            ),
            """\
permute_default = aten.permute.default(c_fc_1, [1, 0])
reshape_default_2 = aten.reshape.default(x_1, [2, 32])
linear_fused_default_2 = triton_only.linear_fused.default(reshape_default_2, [permute_default], [c_fc_bias_1], activation=gelu_tanh, norm_weight=weight_1, norm_bias=bias_1, norm_eps=1e-05, norm_centered=True)
getitem_2 = <built-in function getitem>(linear_fused_default_2, 0)
reshape_default = aten.reshape.default(x_1, [2, 32])
permute_default_1 = aten.permute.default(c_proj_1, [1, 0])
linear_fused_default_1 = triton_only.linear_fused.default(getitem_2, [permute_default_1], [c_proj_bias_1], residual=reshape_default)
getitem_3 = <built-in function getitem>(linear_fused_default_1, 0)
reshape_default_1 = aten.reshape.default(getitem_3, [2, 1, 32])""",
        )  # fmt: skip
        assert_same(gm, model, *args)


@pytest.mark.parametrize("symbolic", ["length", "batch", "both"])
def test_one_size_may_be_symbolic(symbolic):
    def model(x, gate, up, down):
        return x + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    weights = random(24, 32), random(24, 32), random(32, 24)
    compiled = torch.compile(model, backend="triton_only")
    with torch.no_grad():
        for batch, length in ((2, 5), (3, 7)) if symbolic == "both" else ((2, 5), (2, 9)):
            shape = (length, batch, 32) if symbolic == "batch" else (batch, length, 32)
            x = random(*shape)
            torch._dynamo.mark_dynamic(x, 0 if symbolic == "batch" else 1)
            if symbolic == "both":
                torch._dynamo.mark_dynamic(x, 0)
            fired, result = fired_passes_of(compiled, (x, *weights))
            torch.testing.assert_close(result, model(x, *weights), rtol=1e-4, atol=1e-4)
            # Compiled once: the second size is none of its own.
            expected = 0 if symbolic == "both" else 3
            assert fired.get("fuse_epilogue", 0) == (expected if batch * length == 10 else 0)


def test_residual_scale_and_multiplier():
    def model(x, weight, bias, residual, factor):
        return residual + F.linear(x, weight, bias) * factor * 0.22

    args = (random(4, 1, 32), random(24, 32), random(24), random(4, 1, 24), random(4, 1, 24))
    gm, fired = fuse(model, *args)
    assert fired == {"fuse_epilogue": 3}
    assert options(gm) == [{"multiplier": [4, 24], "scale": 0.22, "residual": [4, 24]}]
    assert_same(gm, model, *args)


def test_the_later_of_two_products_takes_the_earlier_as_residual():
    def model(x, first, second):
        return F.linear(x, first) + F.linear(x, second)

    args = (random(4, 32), random(24, 32), random(24, 32))
    gm, fired = fuse(model, *args)
    assert fired == {"fuse_epilogue": 1}
    assert_same(gm, model, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["x last", "x first", "mlp first"])
@pytest.mark.parametrize("rows", [2, 5])
def test_parallel_attention_and_mlp_share_a_residual(rows, order, dtype):
    """As Phi, GPT-NeoX and Falcon write it: each product takes one of the two sums."""

    def model(x, dense, bias, fc):
        attention, mlp = F.linear(x.sin(), dense, bias), F.linear(x.cos(), fc) * 0.5
        if order == "x last":
            return (attention + mlp).view(rows, 1, 32) + x.view(rows, 1, 32)
        return x + (mlp + attention) if order == "x first" else (mlp + attention) + x

    args = (random(rows, 32, dtype=dtype), random(32, 32, dtype=dtype))
    args += (random(32, dtype=dtype), random(32, 32, dtype=dtype))
    gm, fired = fuse(model, *args)
    assert fired == {"fuse_epilogue": 3}
    assert [kwargs["residual"] for kwargs in options(gm)] == [[rows, 32]] * 2
    assert aten.add.Tensor not in {n.target for n in gm.graph.nodes}
    assert_same(gm, model, *args)


def test_sums_that_no_product_can_pass_on():
    def a_later_addend(x, dense, fc):
        both = F.linear(x, dense) + F.linear(x.cos(), fc)
        return both + x.exp()

    def an_addend_of_both(x, dense, fc):
        first, second = F.linear(x, dense), F.linear(x.cos(), fc)
        return (first + second) + (first * second)

    def with_a_residual_each(x, dense, fc):
        return ((F.linear(x, dense) + x.sin()) + F.linear(x.cos(), fc)) + x

    def broadcast(x, dense, fc):
        return (F.linear(x, dense) + F.linear(x.cos(), fc)) + x[:1]

    def read_twice(x, dense, fc):
        both = F.linear(x, dense) + F.linear(x.cos(), fc)
        return both + x, both

    for model, expected in (
        (a_later_addend, 1), (an_addend_of_both, 0), (with_a_residual_each, 2), (broadcast, 1),
        (read_twice, 1),
    ):  # fmt: skip
        args = (random(4, 32), random(32, 32), random(32, 32))
        gm, fired = fuse(model, *args)
        assert fired.get("fuse_epilogue", 0) == expected, model
        assert_same(gm, model, *args)


def left_alone():
    """Names, models and arguments of what fuse_epilogue must not touch."""
    x, w, v = random(4, 32), random(24, 32), random(24, 32)
    yield "result used twice", lambda x, w: (lambda y: (F.silu(y), y))(F.linear(x, w)), (x, w)
    yield (
        "what a view is of used twice",
        lambda x, w: (lambda y: (F.silu(y.view(2, 2, 24)), y))(F.linear(x, w)),
        (x, w),
    )
    yield "computed weight", lambda x, w: F.silu(F.linear(x, w.sin())), (x, w)
    yield "broadcast addend", lambda x, w, b: F.linear(x, w) + b, (x, w, random(4, 1))
    yield "other dtype", lambda x, w, r: F.linear(x, w) + r, (x, w, random(4, 24).double())
    yield "subtraction", lambda x, w, r: r - F.linear(x, w), (x, w, random(4, 24))
    yield "another activation", lambda x, w: F.softplus(F.linear(x, w)), (x, w)
    yield "activation after scale", lambda x, w: F.silu(F.linear(x, w) * 2.0).sum(), (x, w)
    yield "laid out as the addend", lambda x, w, r: r.t() + F.linear(x, w), (x, w, random(24, 4))
    yield "a product by itself", lambda x, w: (lambda y: y * y)(F.linear(x, w)), (x, w)
    yield (
        "gates of two inputs, both wanted",
        lambda x, w, v: (lambda a, b: (a * b, a, b))(F.linear(x, w), F.linear(x.cos(), v)),
        (x, w, v),
    )


@pytest.mark.parametrize(
    "name, model, args", list(left_alone()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_epilogues_left_alone(name, model, args):
    gm, fired = fuse(model, *args)
    expected = {"fuse_epilogue": 1} if name == "activation after scale" else {}
    assert fired == expected
    assert_same(gm, model, *args)


def test_a_symbolic_number_is_no_operand():
    def model(x, weight, other):
        y = F.linear(x, weight)
        return y * other.shape[0] + other.shape[0]

    args = random(3, 32), random(16, 32), random(5, 4)
    torch._dynamo.mark_dynamic(args[2], 0)
    fired, result = fired_passes(model, args)
    assert "fuse_epilogue" not in fired
    torch.testing.assert_close(result, model(*args), rtol=1e-5, atol=1e-5)


def test_parts_of_a_product_that_are_no_gate():
    def by_a_number(x, weight):
        first, second = F.linear(x, weight).chunk(2, -1)
        return first * 2.0, 3.0 * second

    def overlapping(x, weight):
        y = F.linear(x, weight)
        return F.silu(torch.split(y, [2, 4, 2], -1)[1]) * y[..., :4]

    for model in (by_a_number, overlapping):
        args = (random(3, 32), random(8, 32))
        gm, fired = fuse(model, *args)
        assert fired == {}, model
        assert_same(gm, model, *args)


def test_linear_layers_of_some_rows_of_a_weight_are_merged():
    def model(x, q, kv, q_bias, kv_bias):
        return (
            F.linear(x, q, q_bias),
            F.linear(x, kv[:8], kv_bias[:8]),
            F.linear(x, kv[8:], kv_bias[8:]),
        )

    args = (random(2, 32), random(24, 32), random(16, 32), random(24), random(16))
    gm, fired = fuse(model, *args)
    assert fired == {"merge_linears": 1}
    assert_same(gm, model, *args)


# RMSNorm


def llama_norm(x, weight):
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + 1e-5)).to(x.dtype)


def meta_norm(x, weight):
    wide = x.float()
    return (wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + 1e-5)).type_as(
        x
    ) * weight


def gemma_norm(x, weight):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (wide * (1.0 + weight.float())).type_as(x)


def torch_norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


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


# weights that are stored (K, N), as GPT-2's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_block_of_gpt2(rows, dtype):
    def model(x, g, b, c_attn, c_attn_bias, c_proj, c_proj_bias):
        h = F.layer_norm(x, (32,), g, b)
        q, k, v = torch.addmm(c_attn_bias, h, c_attn).split(32, -1)
        return x + torch.addmm(c_proj_bias, torch.sigmoid(q) * k + v, c_proj)

    shapes = ((rows, 32), (32,), (32,), (32, 96), (96,), (32, 32), (32,))
    args = tuple(random(*shape, dtype=dtype) for shape in shapes)
    gm, fired = fuse(model, *args)
    assert fired == {"fuse_epilogue": 1} | ({"fuse_norm": 1} if rows <= 2 else {})
    assert_same(gm, model, *args)


@pytest.mark.parametrize("stored", ["both transposed", "one transposed", "as nn.Linear"])
@pytest.mark.parametrize("rows", [2, 6])
def test_gated_mlp_of_transposed_weights(rows, stored):
    def product(x, weight, transposed):
        return torch.mm(x, weight) if transposed else F.linear(x, weight)

    def model(x, gate, up):
        first = product(x, gate, stored != "as nn.Linear")
        return F.silu(first) * product(x, up, stored == "both transposed")

    args = (random(rows, 32), random(32, 32), random(32, 32))
    gm, fired = fuse(model, *args)
    assert fired == {"fuse_epilogue": 2}
    gated = [kwargs.get("gated", False) for kwargs in options(gm)]
    assert gated == [stored != "one transposed"]
    assert_same(gm, model, *args)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [2, 6])
def test_gate_and_up_in_one_transposed_weight(rows, with_bias):
    def model(x, weight, bias):
        both = torch.addmm(bias, x, weight) if with_bias else torch.mm(x, weight)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    args = (random(rows, 32), random(32, 48), random(48))
    gm, fired = fuse(model, *args)
    assert fired == {"split_gate": 1, "fuse_epilogue": 2}
    assert options(gm) == [{"activation": "silu", "gated": True}]
    assert_same(gm, model, *args)


def test_transposed_weights_left_alone():
    def computed_weight(x, weight):
        return F.silu(torch.mm(x, weight.sin()))

    def gate_of_the_weight(x, weight):
        return F.silu(torch.mm(weight, x.T.cos()))

    for model in (computed_weight, gate_of_the_weight):
        args = (random(4, 32), random(32, 32))
        gm, fired = fuse(model, *args)
        assert fired == {}, model
        assert_same(gm, model, *args)


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


# rotary embedding, cache and attention


def rotate_half(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def rotate_pairs(x, table):
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = table.view(1, pairs.size(1), 1, pairs.size(3), 2)
    rotated = torch.stack(
        [
            pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1],
            pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1],
        ],
        -1,
    )
    return rotated.flatten(3).type_as(x)


def halves_model(q, k, v, cos, sin, keys, values, position, mask):
    q, k = rotate_half(q, cos[:, None], sin[:, None]), rotate_half(k, cos[:, None], sin[:, None])
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def pairs_model(q, k, v, cos, sin, keys, values, position, mask):
    table = torch.stack([cos[0, :, :8], sin[0, :, :8]], -1)
    q = rotate_pairs(q.transpose(1, 2), table).transpose(1, 2)
    k = rotate_pairs(k.transpose(1, 2), table).transpose(1, 2)
    keys[:, :, position] = k
    values[:, :, position] = v
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def plain_model(q, k, v, cos, sin, keys, values, position, mask):
    keys.index_copy_(2, position, k.cos())
    values.index_copy_(2, position, v)
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def decode_arguments(length=1, dtype=torch.float32, slots=24, position=7):
    q, k, v = (random(2, n, length, 16, dtype=dtype) for n in (4, 2, 2))
    angles = random(1, length, 8)
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
    keys, values = (random(2, 2, slots, 16, dtype=dtype) for _ in range(2))
    positions = torch.arange(position, position + length, device=DEVICE)
    mask = torch.arange(slots, device=DEVICE)[None] <= positions[:, None]
    return [q, k, v, cos, sin, keys, values, positions, mask[None, None]]


def compile_step(function, **options):
    return torch.compile(function, backend="triton_only", fullgraph=True, options=options)


def fired_passes(function, args):
    """How often each pass fires when the function is compiled, and what it computes."""
    with torch.no_grad():
        return fired_passes_of(compile_step(function), args)


def fired_passes_of(compiled, args):
    """How often each pass fires in a call of a compiled function, and what it computes."""
    seen = []
    original = pipeline.run_stage

    def run_stage(stage, gm, disabled=()):
        results = original(stage, gm, disabled)
        seen.extend(r for r in results if r.fired)
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run_stage", run_stage)
        result = compiled(*args)
    return {r.name: r.fired for r in seen}, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", [halves_model, pairs_model, plain_model])
def test_decoding_writes_the_cache_and_attends_in_one_op(model, dtype):
    args, reference = decode_arguments(dtype=dtype), decode_arguments()
    for mine, other in zip(args, reference, strict=True):
        other.copy_(mine)
    fired, result = fired_passes(model, args)
    assert fired["fuse_rope_cache"] == 1
    with torch.no_grad():
        expected = model(*reference)
    tolerance = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    torch.testing.assert_close(result.float(), expected, **tolerance)
    for mine, other in zip(args[5:7], reference[5:7], strict=True):
        torch.testing.assert_close(mine.float(), other, **tolerance)
        untouched = torch.arange(24, device=DEVICE) != 7
        assert torch.equal(mine[:, :, untouched].float(), other[:, :, untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["shared angles", "angles a sequence"])
@pytest.mark.parametrize("model", [halves_model, pairs_model])
def test_a_prefill_rotates_and_writes_the_cache_in_one_op(model, batched, dtype):
    args, reference = (decode_arguments(5, kind) for kind in (dtype, torch.float32))
    if batched and model is halves_model:
        args[3:5] = (torch.stack([t[0], t[0].flip(0)]) for t in args[3:5])
        reference[3:5] = (t.float() for t in args[3:5])
    for mine, other in zip(args, reference, strict=True):
        other.copy_(mine)
    fired, result = fired_passes(model, args)
    assert fired["fuse_rope_cache"] == 1
    with torch.no_grad():
        expected = model(*reference)
    tolerance = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    torch.testing.assert_close(result.float(), expected, **tolerance)
    for mine, other in zip(args[5:7], reference[5:7], strict=True):
        torch.testing.assert_close(mine.float(), other, **tolerance)


def test_a_negative_position_counts_from_the_end():
    def model(q, k, v, cos, sin, keys, values, position, mask):
        keys[:, :, position] = k
        values[:, :, position] = v
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    args, reference = decode_arguments(), decode_arguments()
    for mine, other in zip(args, reference, strict=True):
        other.copy_(mine)
    args[7].fill_(-3)
    reference[7].fill_(21)
    fired, result = fired_passes(model, args)
    assert fired["fuse_rope_cache"] == 1
    torch.testing.assert_close(result, model(*reference), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(args[5:7], reference[5:7])


def test_decoding_left_alone():
    def reads_the_cache(*args):
        return halves_model(*args), args[5].sum()

    def other_positions(q, k, v, cos, sin, keys, values, position, mask):
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position + 1, v)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    def returned_cache(q, k, v, cos, sin, keys, values, position, mask):
        keys = keys.index_copy(2, position, k)
        values = values.index_copy(2, position, v)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True), keys

    def capped(q, k, v, cos, sin, keys, values, position, mask):
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        op = torch.ops.triton_only.attention
        return op(q, keys, values, mask, enable_gqa=True, softcap=3.0)

    for model, args in (
        (plain_model, decode_arguments(length=3)),
        (capped, decode_arguments()),
        (reads_the_cache, decode_arguments()),
        (other_positions, decode_arguments()),
        (returned_cache, decode_arguments()),
    ):
        reference = [a.clone() for a in args]
        fired, result = fired_passes(model, args)
        assert "fuse_rope_cache" not in fired, model
        with torch.no_grad():
            torch.testing.assert_close(result, model(*reference), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(args, reference)


def write_and_attend(q, k, v, keys, values, position, mask):
    keys[:, :, position] = k
    values[:, :, position] = v
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def broadcast_writes():
    """Writes of one token to two positions, and of one head to all."""

    def two_positions(q, k, v, cos, sin, keys, values, position, mask):
        position = torch.cat([position, position + 1])
        return write_and_attend(q, k, v, keys, values, position, mask)

    def key_of_one_head(q, k, v, cos, sin, keys, values, position, mask):
        return write_and_attend(q, k[:, :1], v, keys, values, position, mask)

    def value_of_one_head(q, k, v, cos, sin, keys, values, position, mask):
        return write_and_attend(q, k, v[:, :1], keys, values, position, mask)

    def value_of_one_dim(q, k, v, cos, sin, keys, values, position, mask):
        return write_and_attend(q, k, v[..., :1], keys, values, position, mask)

    return two_positions, key_of_one_head, value_of_one_head, value_of_one_dim


@pytest.mark.parametrize("model", broadcast_writes(), ids=lambda model: model.__name__)
def test_writes_that_are_broadcast_are_left_alone(model):
    args = decode_arguments()
    reference = [a.clone() for a in args]
    fired, result = fired_passes(model, args)
    assert "fuse_rope_cache" not in fired
    torch.testing.assert_close(result, model(*reference), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(args, reference)


def other_rotations():
    """What looks like a rotary embedding that the kernel has, and is none."""

    def halves(q, k, cos, sin):
        return rotate_half(q, cos, sin), rotate_half(k, cos, sin)

    def table_of_each_head(q, k, cos, sin):
        tables = cos[:, None] * torch.arange(2, device=DEVICE)[:, None, None], sin[:, None]
        return halves(q[:, :2], k, *tables)

    def one_angle(q, k, cos, sin):
        return halves(q, k, cos[..., :1], sin[..., :1])

    def one_pair(q, k, cos, sin):
        table = torch.stack([cos[:, :, None, :1], sin[:, :, None, :1]], -1)
        pairs = [x.transpose(1, 2).unflatten(-1, (-1, 2)) for x in (q, k)]
        rotated = [
            torch.stack(
                [
                    p[..., 0] * table[..., 0] - p[..., 1] * table[..., 1],
                    p[..., 1] * table[..., 0] + p[..., 0] * table[..., 1],
                ],
                -1,
            )
            for p in pairs
        ]
        return tuple(r.flatten(3).transpose(1, 2) for r in rotated)

    def promoted(q, k, cos, sin):
        return halves(q.bfloat16(), k.bfloat16(), cos[:, None], sin[:, None])

    return table_of_each_head, one_angle, one_pair, promoted


def one_angle_for_all_tokens(q, k, cos, sin):
    return rotate_half(q, cos[:, None, :1], sin[:, None, :1]), rotate_half(
        k, cos[:, None, :1], sin[:, None, :1]
    )


@pytest.mark.parametrize(
    "rotation", [*other_rotations(), one_angle_for_all_tokens], ids=lambda f: f.__name__
)
def test_a_prefill_with_other_rotations_is_left_alone(rotation):
    def model(q, k, v, cos, sin, keys, values, position, mask):
        return write_and_attend(*rotation(q, k, cos, sin), v, keys, values, position, mask)

    args = decode_arguments(length=3)
    reference = [a.clone() for a in args]
    fired, result = fired_passes(model, args)
    assert "fuse_rope_cache" not in fired
    torch.testing.assert_close(result, model(*reference), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(args, reference, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rotation", other_rotations(), ids=lambda f: f.__name__)
def test_other_rotations_stay_before_the_fused_op(rotation):
    def model(q, k, v, cos, sin, keys, values, position, mask):
        return write_and_attend(*rotation(q, k, cos, sin), v, keys, values, position, mask)

    args = decode_arguments()
    reference = [a.clone() for a in args]
    fired, result = fired_passes(model, args)
    assert fired["fuse_rope_cache"] == 1
    torch.testing.assert_close(result, model(*reference), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(args, reference, rtol=1e-2, atol=1e-2)


def rotated_and_written(rotate, tables):
    """A step or a prefill whose queries and keys are rotated so, by tables that both share."""

    def model(q, k, v, cos, sin, keys, values, position, mask):
        given = tables(cos, sin)
        q, k = (rotate(x, *given) for x in (q, k))
        return write_and_attend(q, k, v, keys, values, position, mask)

    return model


def rotate_half_tokens_first(x, cos, sin):
    return rotate_half(x.transpose(1, 2), cos, sin).transpose(1, 2)


def rotate_pairs_tokens_first(x, table):
    return rotate_pairs(x.transpose(1, 2), table).transpose(1, 2)


@pytest.mark.parametrize(
    ("rotate", "tables"),
    [
        (rotate_half, lambda *t: [x[0, 0] for x in t]),
        (rotate_half_tokens_first, lambda *t: [x[0, 0] for x in t]),
        (rotate_half_tokens_first, lambda *t: [x[0, :1] for x in t]),
    ],
    ids=["heads first", "tokens first", "tokens first, a row"],
)
def test_a_table_without_tokens_is_no_table_of_each(rotate, tables):
    args = decode_arguments(length=3)
    reference = [a.clone() for a in args]
    model = rotated_and_written(rotate, tables)
    fired, result = fired_passes(model, args)
    assert "fuse_rope_cache" not in fired
    torch.testing.assert_close(result, model(*reference), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(args, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(
    ("rotate", "kind", "dtype"),
    [
        (rotate_half, torch.float32, torch.int64),
        (rotate_half, torch.float32, torch.bool),
        (rotate_pairs_tokens_first, torch.float32, torch.int64),
        (rotate_pairs_tokens_first, torch.bfloat16, torch.float64),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_tables_that_the_kernel_cannot_read_stay_outside(rotate, kind, dtype, length):
    def tables(cos, sin):
        cos, sin = (t[:, None].mul(3).to(dtype) for t in (cos, sin))
        both = torch.stack([cos[..., :8], sin[..., :8]], -1)
        return (cos, sin) if rotate is rotate_half else (both,)

    args = decode_arguments(length, kind)
    reference = [a.clone() for a in args]
    model = rotated_and_written(rotate, tables)
    fired, result = fired_passes(model, args)
    assert fired.get("fuse_rope_cache", 0) == (length == 1)
    tolerance = 1e-5 if kind == torch.float32 else 6e-2
    torch.testing.assert_close(result, model(*reference), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(args, reference, rtol=tolerance, atol=tolerance)


# Shapes of query, key and value: (batch, heads) of each, that SDPA broadcasts.
UNLIKE = [
    ((2, 1), (2, 4), (2, 4)),
    ((2, 4), (2, 4), (2, 1)),
    ((2, 4), (2, 1), (2, 4)),
    ((2, 4), (2, 4), (1, 4)),
]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("lead", UNLIKE, ids=str)
def test_caches_that_attention_broadcasts_are_left_alone(lead, length):
    def model(q, k, v, cos, sin, keys, values, position, mask):
        q, k = (rotate_half(x, cos[:, None], sin[:, None]) for x in (q, k))
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return F.scaled_dot_product_attention(q, keys, values, mask)

    args = decode_arguments(length)
    args[:3] = (random(*shape, length, 16) for shape in lead)
    args[5:7] = (random(*shape, 24, 16) for shape in lead[1:])
    reference = [a.clone() for a in args]
    fired, result = fired_passes(model, args)
    assert "fuse_rope_cache" not in fired
    torch.testing.assert_close(result, model(*reference), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(args, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "length"), [(0, 1), (0, 3), (2, 0)], ids=str)
def test_no_sequences_and_no_tokens(batch, length):
    args = decode_arguments(length)
    for i in (0, 1, 2, 5, 6):
        args[i] = args[i][:batch].clone()
    reference = [a.clone() for a in args]
    _, result = fired_passes(halves_model, args)
    assert result.shape == (batch, 4, length, 16)
    torch.testing.assert_close(args, reference)


@pytest.mark.parametrize("batch", [3, 4])
@pytest.mark.parametrize("batched", [False, True], ids=["shared angles", "angles a sequence"])
def test_a_prefill_of_a_symbolic_batch(batched, batch):
    """Also where the batch is as large as the prompt is long, which must not be compared."""

    def of(batch):
        args = decode_arguments(3)
        for i in (0, 1, 2, 5, 6, *((3, 4) if batched else ())):
            args[i] = random(batch, *args[i].shape[1:])
        return args

    compiled = compile_step(halves_model)
    first = of(batch)
    for i in (0, 1, 2, 5, 6, *((3, 4) if batched else ())):
        torch._dynamo.mark_dynamic(first[i], 0)
    for call, args in enumerate((first, of(5))):
        reference = [a.clone() for a in args]
        with torch.no_grad():
            fired, result = fired_passes_of(compiled, args)
            torch.testing.assert_close(result, halves_model(*reference), rtol=1e-5, atol=1e-5)
        count = fired.get("fuse_rope_cache", 0)
        # Before torch 2.13 a write to a cache does not tell that its batch is the tokens'.
        assert count == (call == 0) or (count == 0 and torch.__version__ < "2.13")
        torch.testing.assert_close(args, reference, rtol=1e-5, atol=1e-5)


def test_a_scaled_position_is_no_slot():
    def model(q, k, v, cos, sin, keys, values, position, mask):
        twice = torch.add(torch.arange(1, device=DEVICE), position[0], alpha=2)
        return write_and_attend(q, k, v, keys, values, twice, mask)

    args = decode_arguments()
    reference = [a.clone() for a in args]
    _, result = fired_passes(model, args)
    torch.testing.assert_close(result, model(*reference), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(args, reference)


# the last position, counters


@pytest.mark.parametrize("keep", ["select", "slice", "first"])
def test_only_kept_positions_are_multiplied(keep):
    def model(x, weight, bias):
        scores = F.linear(x, weight, bias)
        kept = {"select": scores[:, -1], "slice": scores[:, -2:], "first": scores[:, 0]}
        return kept[keep]

    args = (random(2, 5, 32), random(24, 32), random(24))
    gm, fired = fuse(model, *args)
    assert fired == {"keep_last_position": 1}
    (product,) = gm.graph.find_nodes(op="call_function", target=ours.addmm.default)
    assert list(product.meta["val"].shape) == [4 if keep == "slice" else 2, 24]
    assert_same(gm, model, *args)


def test_positions_left_alone():
    def channels(x, weight):
        return F.linear(x, weight)[..., 3]

    def all_positions_too(x, weight):
        scores = F.linear(x, weight)
        return scores[:, -1], scores.sum()

    for model in (channels, all_positions_too):
        args = (random(2, 5, 32), random(24, 32))
        gm, fired = fuse(model, *args)
        assert fired == {}, model
        assert_same(gm, model, *args)


def test_counters_advance_in_one_kernel():
    def model(x, a, b, c, d):
        for counter in (a, b, c):
            counter.add_(1)
        d.add_(2)
        return x + a + b + c + d

    def alone(x, a, b, c, d):
        for counter in (a, b, c):
            counter.add_(1)
        d.add_(2)
        return x * 2

    def counters():
        return [torch.tensor(n, device=DEVICE) for n in (3, 5, 7, 9)]

    for function, merged in ((model, 0), (alone, 1)):
        args = [random(4), *counters()]
        fired, result = fired_passes(function, args)
        assert fired.get("merge_counters", 0) == merged
        assert [int(a) for a in args[1:]] == [4, 6, 8, 11]
        torch.testing.assert_close(result, function(args[0].clone(), *counters()))


def test_counters_of_unknown_size_are_none():
    def model(x, a, b):
        a.add_(1)
        b.add_(1)
        return x * 2

    args = random(4), *(torch.arange(2, device=DEVICE) for _ in range(2))
    for counter in args[1:]:
        torch._dynamo.decorators.mark_unbacked(counter, 0)
    fired, _ = fired_passes(model, args)
    assert "merge_counters" not in fired
    assert [a.tolist() for a in args[1:]] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("shape", [(2, 12000), (1, 1, 8192), (3, 50257)], ids=str)
def test_argmax_of_long_rows(shape, keepdim):
    def model(x):
        return x.argmax(-1, keepdim=keepdim)

    x = random(*shape).round()  # so that the largest appears more than once
    x[..., -1] = x[..., 7] = 99.0
    gm, fired = fuse(model, x)
    assert fired == {"split_argmax": 1}
    assert torch.equal(gm(x), model(x))
    compiled = torch.compile(model, backend="triton_only")
    assert torch.equal(compiled(x), model(x))
    x[..., 4321] = x[..., 5432] = math.nan
    assert torch.equal(gm(x), model(x))
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("shape", [(2, 4000), (100, 12000), (2, 12007)], ids=str)
def test_argmax_left_alone(shape):
    _, fired = fuse(lambda x: x.argmax(-1), random(*shape))
    assert fired == {}


def test_each_pass_can_be_left_out():
    def model(x, weight, gate, up, down):
        h = llama_norm(x, weight)
        return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)

    args = (random(2, 32), random(32), random(24, 32), random(24, 32), random(32, 24))
    for name in ("fuse_epilogue", "fuse_norm"):
        gm = trace(model, *args)
        assert name not in run(gm, name)
        assert_same(gm, model, *args)


def test_gradients_are_not_disturbed():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.RMSNorm(16)
            self.gate, self.up, self.down = (torch.nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            h = self.norm(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    model, x = Block().to(DEVICE), random(2, 16).requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    actual = torch.autograd.grad(
        torch.compile(model, backend="triton_only")(x).sum(), [x, *model.parameters()]
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
