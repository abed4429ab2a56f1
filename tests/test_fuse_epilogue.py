"""What follows a product goes into it; layers that share an input become one."""

from __future__ import annotations

import math

import expecttest
import pytest
import torch
import torch.nn.functional as F
from fusing import (
    assert_same,
    aten,
    fired_passes,
    fired_passes_of,
    fuse,
    options,
    random,
    trace,
)

from triton_only_backend.passes.activations import as_activation

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
