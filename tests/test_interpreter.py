"""The mends of the Triton interpreter, each shown by what goes wrong without it."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from triton_only_backend import interpreter_libdevice, interpreter_mends

pytestmark = pytest.mark.cpu


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(c_ptr + at, product)


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_dot_multiplies_numbers_not_bits(dtype):
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    c = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, 16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@triton.jit
def first_of_largest(a, i, b, j):
    take = (a > b) | ((a == b) & (i < j))
    return tl.where(take, a, b), tl.where(take, i, j)


@triton.jit
def keep_left(a, b):
    return a


@triton.jit
def reduce_kernel(x_ptr, value_ptr, index_ptr, left_ptr, M: tl.constexpr, N: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    columns = tl.broadcast_to(n[None, :], (M, N))
    value, index = tl.reduce((x, columns), 1, first_of_largest)
    tl.store(value_ptr + m, value)
    tl.store(index_ptr + m, index)
    left = tl.reduce(x, 0, keep_left, keep_dims=True)
    tl.store(left_ptr + n[None, :], left)


@pytest.mark.parametrize("N", [1, 2, 64])
def test_reductions_with_their_own_combine_function(N):
    x = torch.randint(0, 5, (4, N)).float()  # many ties
    value, index, left = torch.empty(4), torch.empty(4, dtype=torch.int32), torch.empty(N)
    reduce_kernel[(1,)](x, value, index, left, 4, N)
    assert torch.equal(value, x.max(1).values)
    assert index.tolist() == [row.index(max(row)) for row in x.tolist()]
    assert torch.equal(left, x[0])  # keeps its order: the first operand is the earlier element


SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 3.4e38, -1.00390625]


@triton.jit
def affine(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def scan_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    _, y = tl.associative_scan((x, x), AXIS, affine)
    tl.store(y_ptr + at, y)


@pytest.mark.parametrize("axis", (0, 1))
def test_scans_with_their_own_combine_function(axis, monkeypatch):
    """A recurrence, whose order matters, runs its function log2(n) times."""
    from triton.runtime.interpreter import ScanOps

    calls = []
    to_tensor = ScanOps.to_tensor
    monkeypatch.setattr(
        ScanOps, "to_tensor", lambda self, *args: calls.append(args) or to_tensor(self, *args)
    )
    x = torch.rand(8, 16)
    y = torch.empty_like(x)
    scan_kernel[(1,)](x, y, 8, 16, axis)
    rows = x.double().movedim(axis, 0)
    expected = [rows[0]]
    for row in rows[1:]:
        expected.append(row * expected[-1] + row)
    torch.testing.assert_close(y.double(), torch.stack(expected).movedim(0, axis))
    assert len(calls) <= 4 * 4 + 2


@pytest.mark.parametrize("source", (torch.float32, torch.float16, torch.int32), ids=str)
def test_casts_to_bfloat16_round_to_nearest_even(source):
    x = torch.cat([torch.randn(1000) * 100, torch.tensor(SPECIAL + [257.0, 259.0] * 8)])
    x = x.nan_to_num().clamp(-1e4, 1e4).to(source) if source != torch.float32 else x
    y = torch.empty(1024, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, 1024)
    torch.testing.assert_close(y, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", (torch.float32, torch.float16, torch.int32), ids=str)
def test_casts_from_bfloat16_read_the_number(target):
    x = (torch.randn(1024) * 100).to(torch.bfloat16)
    y = torch.empty(1024, dtype=target)
    cast_kernel[(1,)](x, y, 1024)
    assert torch.equal(y, x.to(target))


@triton.jit
def _add_rows_kernel(out_ptr, x_ptr, index_ptr, COLUMNS: tl.constexpr):
    """Each program adds one row, under a mask of one element that is broadcast."""
    row = tl.program_id(0) + tl.arange(0, 1)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    values = tl.load(x_ptr + row * COLUMNS + columns)
    tl.atomic_add(out_ptr + tl.load(index_ptr + row) * COLUMNS + columns, values, row >= 0)


def test_atomics_with_a_broadcast_mask():
    x, index = torch.randn(5, 32), torch.tensor([3, 1, 3, 0, 1])
    out = torch.zeros(4, 32)
    _add_rows_kernel[(5,)](out, x, index, 32)
    torch.testing.assert_close(out, torch.zeros(4, 32).index_add(0, index, x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_atomics_add_each_dtype_and_return_what_was_there(dtype):
    x = torch.randn(8).to(dtype)
    index = torch.tensor([3, 1, 3, 0, 1, 3, 3, 2])
    out, before = torch.zeros(4, dtype=dtype), torch.full((8,), 9.0, dtype=dtype)
    _add_elements_kernel[(1,)](out, before, x, index, 6, 8)
    sums = torch.zeros(4, dtype=dtype)
    for i in range(6):  # one after the other, each sum rounded
        assert before[i] == sums[index[i]]
        sums[index[i]] += x[i]
    assert torch.equal(out, sums)


def test_the_gradient_of_an_index_in_bfloat16():
    weight = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    index = torch.tensor([[1, 3], [3, 3]])
    compiled = torch.compile(lambda w: w[index] * 2, backend="triton_only")
    compiled(weight).sum().backward()
    counts = torch.tensor([0.0, 1.0, 0.0, 3.0])[:, None]
    assert torch.equal(weight.grad, (2 * counts).expand(4, 8).to(torch.bfloat16))


@triton.jit
def _add_elements_kernel(out_ptr, before_ptr, x_ptr, index_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    places = out_ptr + tl.load(index_ptr + i)
    tl.store(before_ptr + i, tl.atomic_add(places, tl.load(x_ptr + i), i < n), i < n)


@triton.jit
def _copy_kernel(out_ptr, x_ptr, slot_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    slot = tl.load(slot_ptr).to(tl.int64)
    mask = (i < n) & (slot >= 0)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=mask, other=-1.0), mask=mask)


@pytest.mark.parametrize("slot", [0, -1])
def test_a_mask_of_a_block_and_a_scalar(slot):
    x, out = torch.randn(8), torch.zeros(8)
    _copy_kernel[(1,)](out, x, torch.tensor([slot]), 5, 8)
    assert torch.equal(out, x * (torch.arange(8) < 5) * (slot >= 0))


@pytest.mark.parametrize("name", ["tanh", "erf", "rsqrt", "log1p", "isnan", "pow", "llrint"])
@pytest.mark.parametrize("dtype", (tl.float32, tl.bfloat16), ids=str)
def test_libdevice_computes(name, dtype):
    from triton.runtime.interpreter import TensorHandle

    numbers = np.array([0.25, 1.5, 2.0, 7.0], dtype=np.float32)
    data = interpreter_mends.bfloat16_bits(numbers) if dtype == tl.bfloat16 else numbers
    x = tl.core.tensor(TensorHandle(data, dtype), tl.block_type(dtype, [4]))
    result = getattr(interpreter_libdevice.Libdevice(), name)(*([x, x] if name == "pow" else [x]))
    reference = {"pow": lambda t: t**t, "llrint": lambda t: t.round().long()}
    expected = reference.get(name, getattr(torch, name, None))(torch.from_numpy(numbers))
    actual = result.handle.data
    if result.type.scalar == tl.bfloat16:
        actual = (actual.astype(np.uint32) << 16).view(np.float32)
        torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-2, atol=1e-2)
    else:
        torch.testing.assert_close(torch.from_numpy(np.asarray(actual)), expected)


@pytest.mark.parametrize("size", [7, 300, 9000])
def test_reductions_with_an_index_find_nan(size):
    def model(x):
        return x.argmax(-1), x.argmin(-1), x.max(-1)

    x = torch.randn(2, size)
    x[0, 3] = x[0, 5] = x[1, 0] = float("nan")
    actual = torch.compile(model, backend="triton_only")(x)
    torch.testing.assert_close(actual, model(x), rtol=0, atol=0, equal_nan=True)


def test_threads_take_turns():
    weight = torch.randn(16, 16)
    compiled = torch.compile(lambda x: torch.softmax(x @ weight, -1), backend="triton_only")
    inputs = [torch.randn(16, 16) for _ in range(6)]
    compiled(inputs[0])
    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(compiled, inputs))
    for x, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, torch.softmax(x @ weight, -1))


def test_libdevice_names_what_it_lacks():
    with pytest.raises(AttributeError, match="no_such_function has no counterpart"):
        interpreter_libdevice.Libdevice().no_such_function  # noqa: B018


def test_works_after_triton_was_imported_and_says_so_once():
    script = (
        "import torch, torch._dynamo, torch._inductor.compile_fx, triton\n"
        "assert not triton.knobs.runtime.interpret\n"
        "f = torch.compile(lambda x: torch.softmax(x @ x.T, -1), backend='triton_only')\n"
        "x = torch.randn(8, 8)\n"
        "torch.testing.assert_close(f(x), torch.softmax(x @ x.T, -1))\n"
        "f(torch.randn(9, 9))\n"
    )
    environ = {k: v for k, v in __import__("os").environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environ, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("run in the Triton interpreter on the CPU") == 1
