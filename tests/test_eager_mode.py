"""`with tob.eager()`: which operations become ours, in which of autograd's modes, and what remains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import triton_only_backend as tob
from triton_only_backend.errors import UnsupportedProblemError


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operations that arrive below autograd, and below our modes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def run(function, *args):
    """The result under `eager`, and the operations that reached PyTorch."""
    with Seen() as seen, tob.eager():
        result = function(*args)
    return result, seen.ops


LIBRARY = ("mm", "bmm", "linear", "matmul", "einsum", "scaled_dot_product", "multi_head")


def assert_ours(ops: list[str], *expected: str) -> None:
    assert [op.split(".")[1] for op in ops if op.startswith("triton_only.")] == list(expected)
    assert_no_library(ops)


def assert_no_library(ops: list[str]) -> None:
    assert not [op for op in ops if op.startswith("aten.") and any(n in op for n in LIBRARY)]


GRAD_MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("mode", GRAD_MODES, ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x, w: x @ w, "mm"),
        (lambda x, w: F.linear(x, w.T, w[0]), "addmm"),
        (lambda x, w: torch.einsum("bij,bjk->bik", x.expand(2, 4, 6), w.expand(2, 6, 5)), "bmm"),
        (lambda x, w: torch.baddbmm(w[:1, :1], x[None], w[None]), "baddbmm"),
        (lambda x, w: F.scaled_dot_product_attention(x[None], w.T[None], w.T[None]), "attention"),
    ],
    ids=["matmul", "linear", "einsum", "baddbmm", "attention"],
)
def test_operations_become_ours(function, op, mode, device):
    x, w = torch.randn(4, 6, device=device), torch.randn(6, 5, device=device)
    with mode():
        result, ops = run(function, x, w)
        torch.testing.assert_close(result, function(x, w), rtol=1e-4, atol=1e-5)
    assert_ours(ops, op)


def test_a_backward_inside_is_ours_too(device):
    layer = torch.nn.Linear(6, 5, device=device)
    x = torch.randn(4, 6, device=device, requires_grad=True)

    def step():
        return torch.autograd.grad(layer(x).sum(), [x, layer.weight])

    grads, ops = run(step)
    assert_ours(ops, "addmm", "mm", "mm")
    for actual, expected in zip(grads, step(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_attention_keeps_our_gradient_outside(device):
    operands = [torch.randn(1, 2, 4, 8, device=device, requires_grad=True) for _ in range(3)]
    output, ops = run(lambda *a: F.scaled_dot_product_attention(*a, is_causal=True), *operands)
    assert_ours(ops, "attention_forward")
    actual = torch.autograd.grad(output.sum(), operands)
    eager = F.scaled_dot_product_attention(*operands, is_causal=True)
    for ours, theirs in zip(actual, torch.autograd.grad(eager.sum(), operands), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_attention_with_dropout_is_ours_too(device):
    query = torch.randn(1, 2, 4, 8, device=device)
    outputs = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        output, ops = run(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), query)
        assert_ours(ops, "random_seeds", "attention")
        outputs.append(output)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("case", ["mask gradient", "head dimension"])
def test_attention_beyond_the_kernels_is_products_and_softmax(case, device):
    query = torch.randn(1, 2, 4, 264 if case == "head dimension" else 8, device=device)
    mask = torch.zeros(4, 4, device=device, requires_grad=case == "mask gradient")
    _, ops = run(F.scaled_dot_product_attention, query, query, query, mask)
    assert_ours(ops, "bmm", "bmm")


@pytest.mark.parametrize("mode", GRAD_MODES, ids=lambda m: m.__name__)
def test_modules_that_call_attention_inside(mode, device):
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, device=device).eval()
    x = torch.randn(2, 3, 8, device=device)
    with mode():
        result, ops = run(layer, x)
        torch.testing.assert_close(result, layer(x), rtol=1e-4, atol=1e-5)
    attention = "attention_forward" if mode is torch.enable_grad else "attention"
    assert ops.count(f"triton_only.{attention}.default") == 1
    assert_no_library(ops)


def test_outside_the_context_nothing_changes(device):
    x = torch.randn(4, 4, device=device)
    with tob.eager():
        pass
    with Seen() as seen:
        x @ x
    assert seen.ops == ["aten.mm.default"]


def test_other_dtypes_are_refused(device):
    x = torch.ones(2, 2, device=device, dtype=torch.float64)
    with pytest.raises(UnsupportedProblemError, match="cast"), tob.eager():
        x @ x
