"""topk by sorting in blocks, the sort of its places by counting, and histc by comparing."""

from __future__ import annotations

import pytest
import torch

from triton_only_backend import testing
from triton_only_backend.errors import AuditError
from triton_only_backend.model_audit import audit_with
from triton_only_backend.passes import rewrite_topk
from triton_only_backend.passes.refusal import META_KEY
from triton_only_backend.passes.rewrite_sort import by_counting, rewrite_sort

ROWS = {
    "few": ((4, 60), 8, -1, True),
    "all": ((3, 7), 7, -1, False),
    "another dimension": ((2, 6, 3), 2, 1, True),
    "one row": ((9,), 3, 0, True),
    "a whole block": ((2, 512), 300, -1, True),
    "blocks and a rest": ((2, 1300), 5, -1, True),
    "a rest shorter than k": ((1, 1026), 5, -1, False),
    "several rounds": ((1, 5000), 40, -1, True),
}


def as_sets(indices, dim):
    return indices.movedim(dim, -1).sort(-1)[0]


@pytest.mark.parametrize("name", ROWS)
def test_finds_what_atens_finds(name, device):
    shape, k, dim, largest = ROWS[name]
    x = torch.randn(shape, device=device).round(decimals=1)  # with ties

    def function(x):
        return torch.topk(x, k, dim, largest)

    values, indices = torch.compile(function, backend="triton_only")(x)
    expected = function(x)
    assert torch.equal(values, expected[0])
    assert torch.equal(x.gather(dim, indices), values)
    places = as_sets(indices, dim)
    assert (places[..., 1:] > places[..., :-1]).all(), "a place was taken twice"


def test_nan_is_the_largest_and_infinities_are_numbers(device):
    inf = float("inf")
    x = torch.tensor([[1, float("nan"), 3, -inf, inf], [-inf, -inf, -inf, -inf, 0]], device=device)
    values, indices = torch.compile(lambda x: torch.topk(x, 3), backend="triton_only")(x)
    torch.testing.assert_close(values, torch.topk(x, 3)[0], equal_nan=True)
    assert indices[0].tolist() == [1, 4, 2]
    assert indices[1].tolist() == [4, 0, 1]


def test_gradient(device):
    x = torch.randn(3, 40, device=device, requires_grad=True)
    weights = torch.randn(3, 4, device=device)
    compiled = torch.compile(lambda x: torch.topk(x, 4)[0] * weights, backend="triton_only")
    (ours,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad((torch.topk(x, 4)[0] * weights).sum(), x)
    torch.testing.assert_close(ours, expected)


def captured(function, *args):
    return testing.capture(function, *args)


@pytest.mark.parametrize(("shape", "k"), [((4, 60), 8), ((2, 700), 5)])
def test_the_pass_is_sound(shape, k):
    gm = captured(lambda x: torch.topk(x, k), torch.randn(shape))
    testing.assert_pass(rewrite_topk.rewrite_topk, gm, times=1)


def test_any_number_of_rows():
    x = torch.randn(6, 60)
    torch._dynamo.mark_dynamic(x, 0)
    gm = captured(lambda x: torch.topk(x, 4)[1], x)
    testing.assert_dynamic(rewrite_topk.rewrite_topk, gm)


@pytest.mark.parametrize(
    ("shape", "k", "dynamic", "facts"),
    [((2, 1000), 300, False, "take"), ((2, 1000), 3, True, "known")],
    ids=["more than half a block", "rows of any length"],
)
def test_what_is_left_says_why(shape, k, dynamic, facts):
    x = torch.randn(shape)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    gm = captured(lambda x: torch.topk(x, k), x)
    assert rewrite_topk.rewrite_topk(gm.graph) == 0
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default)
    assert facts in node.meta[META_KEY]["detail"]


def test_the_report_says_why(device):
    compiled = torch.compile(lambda x: torch.topk(x, 300), backend="triton_only")
    with pytest.raises(AuditError, match="take at most 256 of a longer row"):
        compiled(torch.randn(2, 1000, device=device))


def experts(x):
    chosen = torch.topk(x, 3)[1].reshape(-1)
    return chosen, *torch.sort(chosen, stable=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_sort_of_places(dynamic, device):
    x = torch.randn(300, 12, device=device)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    chosen, values, order = torch.compile(experts, backend="triton_only")(x)
    expected = torch.sort(chosen, stable=True)
    assert torch.equal(values, expected[0])
    assert torch.equal(order, expected[1])


@pytest.mark.cpu
def test_sort_of_places_on_a_gpu_that_is_not_there():
    """A GPU's Triton has no scatter of int64."""
    assert audit_with(experts, [torch.randn(300, 12)], target="cuda:90").is_triton_only


def test_the_pass_of_sorts_is_sound():
    gm = captured(experts, torch.randn(300, 12))
    testing.assert_pass(rewrite_sort, gm, times=1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.sort((x * 9).long().view(-1)),
        lambda x: torch.sort(torch.topk(x, 3)[1].view(-1), descending=True),
        lambda x: torch.sort(torch.topk(x, 3)[1]),
        lambda x: torch.sort(torch.topk(x, 3)[0].view(-1)),
    ],
    ids=["any numbers", "descending", "rows", "values"],
)
def test_other_sorts_are_left(function):
    assert rewrite_sort(captured(function, torch.randn(300, 12)).graph) == 0


def test_short_sorts_are_inductors():
    assert rewrite_sort(captured(experts, torch.randn(100, 12)).graph) == 0


def test_counting_sorts_as_sort_does():
    x = torch.randint(0, 40, (1000,))
    values, order = by_counting(x, numbers=40)
    expected = torch.sort(x, stable=True)
    assert torch.equal(values, expected[0])
    assert torch.equal(order, expected[1])


@pytest.mark.parametrize(
    ("x", "arguments"),
    [
        (torch.randint(-1, 9, (40,)).float(), (8, 0, 7)),
        (torch.tensor([0, 7, 7, 3.5, float("nan"), float("inf"), -1]), (7, 0, 7)),
        (torch.arange(128).repeat(3).float(), (128, 0, 127)),
        (torch.zeros(0), (4, 0, 3)),
    ],
    ids=["outside the bounds", "bounds and no numbers", "experts", "empty"],
)
def test_histc(x, arguments, device):
    x = x.to(device)
    compiled = torch.compile(lambda x: torch.histc(x, *arguments), backend="triton_only")
    assert torch.equal(compiled(x), torch.histc(x, *arguments))
