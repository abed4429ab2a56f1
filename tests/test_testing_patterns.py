"""Patterns of the kit: what matches, and how near the closest miss was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from triton_only_backend import testing
from triton_only_backend.testing import capture, closest_miss, make_pattern

X, Y, W = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8, 8)


def linear_gelu_mul(x, w, y):
    return torch.sigmoid(x @ w.t() * 2.0) * y


@pytest.fixture(scope="module")
def pattern():
    return make_pattern(linear_gelu_mul, [X, W, Y])


def test_a_match(pattern):
    gm = capture(lambda x, w, y: linear_gelu_mul(x, w, y) + 1, X, W, Y)
    assert testing.assert_matches(pattern, gm, times=1) == 1
    assert str(closest_miss(pattern, gm)) == "matched 5 of 5 nodes"


def two_users(x, w, y):
    scaled = x @ w.t() * 2.0
    return torch.sigmoid(scaled) * y, scaled


MISSES = {
    "a second user": (two_users, "matched 4 of 5 nodes; `mul` has a second user, `output`"),
    "another op": (
        lambda x, w, y: torch.tanh(x @ w.t() * 2.0) * y,
        "matched 3 of 5 nodes; `mul` is read by `tanh`, aten.tanh, where the pattern calls "
        "aten.sigmoid",
    ),
    "another op above": (
        lambda x, w, y: torch.sigmoid((x + w[:4]) * 2.0) * y,
        "matched 3 of 5 nodes; `mul` reads `add`, aten.add.Tensor, where the pattern calls aten.mm",
    ),
    "an input": (
        lambda x, w, y: torch.sigmoid(x * 2.0) * y,
        "matched 3 of 5 nodes; `mul` reads `arg0_1`, an input, where the pattern calls aten.mm",
    ),
    "no transpose": (
        lambda x, w, y: torch.sigmoid(x @ w * 2.0) * y,
        "matched 4 of 5 nodes; `mm` reads `arg1_1`, an input, where the pattern calls aten.permute",
    ),
    "the end is missing": (
        lambda x, w, y: torch.sigmoid(x @ w.t() * 2.0),
        "matched 4 of 5 nodes; `sigmoid` is read by `output`, the output, where the pattern calls "
        "aten.mul.Tensor",
    ),
    "nothing": (
        lambda x, w, y: x.relu(),
        "matched 0 of 5 nodes; the graph calls none of aten.mul.Tensor, aten.sigmoid, aten.mm, "
        "aten.permute",
    ),
}


@pytest.mark.parametrize("case", MISSES)
def test_the_closest_miss(case, pattern):
    function, expected = MISSES[case]
    gm = capture(function, X, W, Y)
    assert str(closest_miss(pattern, gm)) == expected
    with pytest.raises(AssertionError, match="matched 0 times; closest miss"):
        testing.assert_matches(pattern, gm)


def test_the_operands_of_one_name_are_one_node():
    square = make_pattern(lambda x: x * torch.sigmoid(x), [X])
    gm = capture(lambda x, y: x * torch.sigmoid(y), X, Y)
    miss = closest_miss(square, gm)
    assert str(miss).endswith("`x` is `arg1_1` in one place and `arg0_1` in another") or str(
        miss
    ).endswith("`x` is `arg0_1` in one place and `arg1_1` in another")


def test_operands_the_other_way_round_are_named():
    square = make_pattern(lambda x: x * torch.sigmoid(x), [X])
    gm = capture(lambda x: torch.sigmoid(x) * x, X)
    before = testing.render(gm)
    assert str(closest_miss(square, gm)).endswith(
        "with the operands of `mul` exchanged it reaches farther"
    )
    assert testing.render(gm) == before


def test_patterns_written_as_expressions():
    from torch._inductor.pattern_matcher import CallFunction, KeywordArg

    aten = torch.ops.aten
    product = CallFunction(aten.mm.default, KeywordArg("a"), KeywordArg("b"))
    pattern = CallFunction(aten.add.Tensor, product, 3)
    testing.assert_matches(pattern, capture(lambda a, b: a @ b + 3, X, W))
    gm = capture(lambda a, b: a @ b + 4, X, W)
    assert str(closest_miss(pattern, gm)) == (
        "matched 2 of 2 nodes; `add` has 4 where the pattern has 3"
    )


def silu(x):
    return x * torch.sigmoid(x)


def fused(x):
    return torch.ops.aten.silu.default(x)


def test_a_pass_from_two_functions():
    fuse = testing.pattern_pass(silu, fused, [X])
    run = testing.assert_pass(fuse, capture(lambda x: silu(x) + silu(x * 2), X), times=2)
    testing.assert_ops(run, appear={"aten.silu": 2}, vanish=["aten.sigmoid"])
    testing.assert_dynamic(fuse, capture(silu, X, dynamic=True), sweep=(2, 31))
    testing.assert_cache_key(fuse, testing.pattern_pass(silu, silu, [X]))
    with pytest.raises(AssertionError, match="matched 1 of 2 nodes; `mul` reads"):
        testing.assert_fired(fuse, capture(lambda x: x * torch.tanh(x), X))


def test_a_check_of_the_passs_own_is_named():
    fuse = testing.pattern_pass(silu, fused, [X], extra_check=lambda match: False)
    with pytest.raises(AssertionError, match="a check of the pass's own refused it"):
        testing.assert_fired(fuse, capture(silu, X))


def test_a_pass_is_called_by_inductor(device):
    fuse = testing.pattern_pass(silu, lambda x: torch.ops.aten.relu.default(x), [X])
    from triton_only_backend import inductor

    seen = []
    counted = inductor.graph_pass("counted", "0", lambda graph: seen.append(fuse(graph)))
    options = {"post_grad_custom_pre_pass": counted, "fx_graph_cache": False}
    with torch.no_grad():
        actual = torch.compile(silu, backend="triton_only", options=options)(X.to(device))
    assert seen == [1]
    torch.testing.assert_close(actual.cpu(), X.relu())


def product_gelu(x, w):
    return F.gelu((x @ w).unsqueeze(0))


def test_a_pass_of_dynamos_graph():
    fuse = testing.rewrite_pass(product_gelu, lambda x, w: F.linear(x, w).relu()[None])
    gm = capture(lambda x, w: product_gelu(x, w) + 1, X, W, stage="dynamo")
    run = testing.assert_fired(fuse, gm, times=1)
    assert_expected_inline(
        testing.render(run.after),
        """\
L_x_: f32[4, 8]
L_w_: f32[8, 8]
linear: f32[4, 8] = F.linear(L_x_, L_w_)
relu: f32[4, 8] = .relu(linear)
getitem: f32[1, 4, 8] = operator.getitem(relu, None)
add: f32[1, 4, 8] = operator.add(getitem, 1)
return (add,)""",
    )
    for function, message in (
        (lambda x, w: F.gelu((x @ w).unsqueeze(1)), "`unsqueeze` has 1 where the pattern has 0"),
        (
            lambda x, w: F.gelu((x @ w).unsqueeze(0), approximate="tanh"),
            r"matched 2 of 3 .*`gelu` has .* \['approximate'\]",
        ),
    ):
        with pytest.raises(AssertionError, match=message):
            testing.assert_fired(fuse, capture(function, X, W, stage="dynamo"))
