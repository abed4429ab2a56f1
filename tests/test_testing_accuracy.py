"""The kit's judgement of numerics: what it lets pass, and what it does not; the problems it draws."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, find, given, settings

from triton_only_backend.testing import assert_accurate, strategies

quick = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def operands(dtype=torch.float32, M=33, N=17, K=65):
    return torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)


@pytest.mark.parametrize("dtype", strategies.FLOATS, ids=str)
def test_another_order_of_sums_is_accurate(dtype):
    a, b = operands(dtype)
    half = (a[:, :32].float() @ b[:32].float() + a[:, 32:].float() @ b[32:].float()).to(dtype)
    (accuracy,) = assert_accurate(half, torch.mm, (a, b))
    assert accuracy.is_accurate
    assert 0 <= accuracy.error <= 2 * max(accuracy.vendor_error, accuracy.rounding)


FAULTS = {
    "one wrong element": lambda c, a, b: _one(c),
    "one wrong row": lambda c, a, b: c.index_fill(0, torch.tensor([5]), 0),
    "a missing term": lambda c, a, b: (a[:, 1:].float() @ b[1:].float()).to(c.dtype),
    "one K too far": lambda c, a, b: (c.float() + a[:, :1].float() @ b[:1].float()).to(c.dtype),
    "low precision": lambda c, a, b: (a.to(torch.float8_e5m2).float() @ b.float()).to(c.dtype),
    "a NaN": lambda c, a, b: _set(c, math.nan),
    "an infinity": lambda c, a, b: _set(c, math.inf),
    "another shape": lambda c, a, b: c[:-1],
    "another dtype": lambda c, a, b: c.double(),
    "transposed": lambda c, a, b: c.T.contiguous().view(c.shape),
}


def _one(c):
    return _set(c, c[2, 3].item() + 0.2 * c.abs().max().item())


def _set(c, value):
    c = c.clone()
    c[2, 3] = value
    return c


@pytest.mark.parametrize("dtype", strategies.FLOATS, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, dtype):
    a, b = operands(dtype)
    with pytest.raises(AssertionError, match="the result"):
        assert_accurate(FAULTS[fault](a @ b, a, b), torch.mm, (a, b))


def test_the_worst_element_is_named():
    a, b = operands()
    with pytest.raises(AssertionError, match=r"the worst at \(2, 3\)"):
        assert_accurate(_one(a @ b), torch.mm, (a, b))


def test_integers_and_several_outputs():
    x = torch.randn(5, 7)
    found = assert_accurate(x.max(1), lambda x: x.max(1), (x,))
    assert len(found) == 1
    wrong = x.max(1)
    with pytest.raises(AssertionError, match="output 1 differs in 5 of 5"):
        assert_accurate((wrong.values, wrong.indices + 1), lambda x: x.max(1), (x,))


def test_infinities_of_the_reference_are_granted_and_demanded():
    x = torch.tensor([1.0, 70000.0]).half()
    assert torch.isinf(x[1])
    assert_accurate(x * 1, lambda x: x * 1, (x,))
    with pytest.raises(AssertionError, match="1 too few"):
        assert_accurate(torch.ones(2).half(), lambda x: x * 1, (x,))


def test_empty_results():
    a, b = operands(M=0)
    assert_accurate(a @ b, torch.mm, (a, b))


# problems


def test_sizes_hold_what_breaks_kernels():
    sizes = strategies.sizes()
    for wanted in (0, 1, 7, 97, 16, 17, 31, 64, 65):
        assert find(sizes, lambda n, wanted=wanted: n == wanted) == wanted


@quick
@given(tensor=strategies.tensors())
def test_tensors_are_of_their_kind(tensor):
    assert tensor.dtype in strategies.FLOATS
    assert 1 <= tensor.dim() <= 4
    assert not tensor.isnan().any()


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_layouts(layout):
    tensor = strategies.make_tensor((3, 4, 5), torch.float32, layout)
    assert tensor.shape == (3, 4, 5)
    strides = {
        "row": (20, 5, 1),
        "column": (20, 1, 4),
        "broadcast": (4, 1, 0),
        "offset": (20, 5, 1),
    }
    assert tensor.stride() == strides.get(layout, tensor.stride())
    assert tensor.is_contiguous() == (layout in ("row", "offset"))
    assert (tensor.storage_offset() > 0) == (layout in ("offset", "sliced"))


@quick
@given(problem=strategies.matmul_problems(batch=True, largest=20))
def test_matmul_problems_multiply(problem):
    product = problem.a @ problem.b
    assert_accurate(
        problem.bias.expand(product.shape[-2:]) + product, _affine, vars(problem).values()
    )


def _affine(bias, a, b):
    return bias.expand(a.shape[-2], b.shape[-1]) + a @ b


@quick
@given(problem=strategies.attention_problems(largest=12))
def test_attention_problems_attend(problem):
    arguments = (problem.query, problem.key, problem.value)
    output = F.scaled_dot_product_attention(*arguments, **problem.options)
    assert output.shape == (*problem.query.shape[:-1], problem.value.shape[-1])
