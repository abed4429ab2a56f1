"""The op library: schemas, fakes and gradients hold together, and attention equals PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import triton_only_backend  # noqa: F401
from triton_only_backend.errors import UnsupportedProblemError

ours = torch.ops.triton_only


def randn(*shape: int, device: str, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device=device, requires_grad=grad)


def opcheck(op, args, kwargs=None, **options) -> None:
    result = torch.library.opcheck(op, args, kwargs or {}, **options)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("options", [{}, {"out_dtype": torch.float32}], ids=["plain", "out_dtype"])
@pytest.mark.parametrize("op", ["mm", "bmm"])
def test_opcheck_of_products(op, options, device):
    batch = (2,) if op == "bmm" else ()
    a, b = randn(*batch, 5, 6, device=device), randn(*batch, 7, 6, device=device).mT
    if options:
        a, b = (t.detach().bfloat16() for t in (a, b))
    opcheck(getattr(ours, op).default, (a, b), options)


@pytest.mark.parametrize("op", ["addmm", "baddbmm"])
def test_opcheck_of_affine_products(op, device):
    batch = (2,) if op == "baddbmm" else ()
    a, b = randn(*batch, 5, 6, device=device), randn(*batch, 6, 7, device=device)
    opcheck(getattr(ours, op).default, (randn(7, device=device), a, b), {"beta": 0.5, "alpha": 2.0})


def attention_inputs(device: str, grad: bool = True) -> tuple[torch.Tensor, ...]:
    query = randn(2, 4, 5, 8, device=device, grad=grad)
    key, value = (randn(2, 2, 6, 8, device=device, grad=grad) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("op", ["attention", "attention_forward"])
def test_opcheck_of_attention(op, device):
    mask = torch.rand(2, 1, 5, 6, device=device) > 0.2
    kwargs = {"scale": 0.3, "enable_gqa": True}
    opcheck(getattr(ours, op).default, (*attention_inputs(device), mask), kwargs)


def test_opcheck_of_attention_backward(device):
    query, key, value = attention_inputs(device, grad=False)
    options = {"is_causal": True, "enable_gqa": True}
    output, logsumexp = ours.attention_forward(query, key, value, **options)
    args = (torch.randn_like(output), query, key, value, None, output, logsumexp)
    opcheck(ours.attention_backward.default, args, options)


PROBLEMS = {
    "plain": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), None, {}),
    "causal": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), None, {"is_causal": True}),
    "scale": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), None, {"scale": 0.7}),
    "value dimension": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 24), None, {}),
    "grouped heads": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), None, {"enable_gqa": True}),
    "two dimensions": ((5, 8), (7, 8), (7, 8), (5, 7), {}),
    "three dimensions": ((3, 5, 8), (3, 7, 8), (3, 7, 8), (5, 7), {}),
    "five dimensions": ((2, 1, 3, 5, 8), (2, 2, 3, 7, 8), (1, 2, 3, 7, 8), None, {}),
    "broadcast keys": ((2, 3, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8), (2, 1, 1, 7), {}),
    "broadcast query": ((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (3, 5, 7), {}),
    "one query": ((2, 3, 1, 8), (2, 3, 70, 8), (2, 3, 70, 8), (2, 1, 1, 70), {}),
    "empty": ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8), None, {}),
}


CASES = [
    pytest.param(name, dtype, id=f"{name.replace(' ', '-')}-{dtype or 'no-mask'}")
    for name, (*_, mask_shape, _) in PROBLEMS.items()
    for dtype in ((torch.bool, torch.float32) if mask_shape else (None,))
]


@pytest.mark.parametrize(("problem", "mask_dtype"), CASES)
def test_attention_and_its_gradient_are_pytorchs(problem, mask_dtype, device):
    *shapes, mask_shape, options = PROBLEMS[problem]
    mask = None
    if mask_shape is not None:
        mask = torch.randn(mask_shape, device=device)
        mask = mask > -1 if mask_dtype == torch.bool else mask
    operands = [randn(*shape, device=device) for shape in shapes]
    output = ours.attention(*operands, mask, **options)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*operands, mask, **options)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(expected)
    actual = torch.autograd.grad(output, operands, grad)
    for ours_grad, reference in zip(
        actual, torch.autograd.grad(expected, operands, grad), strict=True
    ):
        torch.testing.assert_close(ours_grad, reference, rtol=1e-4, atol=1e-5)


def test_logsumexp_is_the_natural_one_of_the_scaled_scores(device):
    query, key, value = (randn(1, 2, 5, 8, device=device, grad=False) for _ in range(3))
    _, logsumexp = ours.attention_forward(query, key, value, scale=0.4)
    torch.testing.assert_close(logsumexp, (query @ key.mT * 0.4).logsumexp(-1))


def bad_attention(device: str) -> dict[str, tuple[tuple[torch.Tensor, ...], dict, str]]:
    q = torch.randn(1, 2, 4, 8, device=device)
    return {
        "float64": ((q.double(),) * 3, {}, "cast"),
        "two dtypes": ((q, q.half(), q), {}, "cast"),
        "head dimension": ((torch.randn(1, 2, 4, 320, device=device),) * 3, {}, "256"),
        "ranks": ((q, q[0], q[0]), {}, "dimensions"),
        "integer mask": ((q, q, q, torch.ones(4, 4, dtype=torch.int32, device=device)), {}, "mask"),
    }


@pytest.mark.parametrize("case", bad_attention("cpu"), ids=lambda name: name.replace(" ", "-"))
def test_attention_refuses_by_name(case, device):
    args, options, named = bad_attention(device)[case]
    with pytest.raises(UnsupportedProblemError, match=rf"triton_only\.attention.*{named}"):
        ours.attention(*args, **options)


def test_attention_refuses_heads_that_do_not_group(device):
    query, key = (torch.randn(1, heads, 4, 8, device=device) for heads in (3, 2))
    with pytest.raises(RuntimeError, match="3 query heads cannot share 2 key"):
        ours.attention(query, key, key, enable_gqa=True)


def test_attention_refuses_a_mask_that_needs_a_gradient(device):
    query = randn(1, 2, 4, 8, device=device)
    with pytest.raises(NotImplementedError, match="no gradient for attn_mask; detach it"):
        ours.attention(query, query, query, randn(4, 4, device=device))


def test_gradients_of_products_are_pytorchs(device):
    a, b, bias = (randn(*shape, device=device) for shape in ((5, 6), (6, 7), (7,)))
    grad = torch.randn(5, 7, device=device)
    actual = torch.autograd.grad(ours.addmm(bias, a, b, beta=0.5, alpha=2), (bias, a, b), grad)
    expected = torch.autograd.grad(torch.addmm(bias, a, b, beta=0.5, alpha=2), (bias, a, b), grad)
    for ours_grad, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours_grad, reference)
