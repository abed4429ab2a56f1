"""Products against fp64, their error beside the vendor library's own on the same input."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import triton_only_backend  # noqa: F401
from triton_only_backend.errors import UnsupportedProblemError

ours = torch.ops.triton_only
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (1, 1, 1),
    (1, 7, 5),
    (2, 33, 100),
    (3, 2, 257),
    (17, 64, 64),
    (71, 13, 1),
    (64, 96, 128),
    (130, 257, 515),
]
LAYOUTS = ("row", "column", "sliced", "broadcast")


def operand(rows: int, columns: int, dtype: torch.dtype, layout: str, device: str) -> torch.Tensor:
    if layout == "column":
        return torch.randn(columns, rows, device=device).to(dtype).T
    if layout == "sliced":
        return torch.randn(rows * 2 + 1, columns * 3 + 2, device=device).to(dtype)[1::2, 2::3]
    if layout == "broadcast":
        return torch.randn(rows, 1, device=device).to(dtype).expand(rows, columns)
    return torch.randn(rows, columns, device=device).to(dtype)


def assert_as_accurate(
    actual: torch.Tensor, vendor: torch.Tensor, exact: torch.Tensor, factor: float = 2.0
) -> None:
    """The error against fp64 is at most `factor` times the vendor's on the same input.

    On a handful of elements the vendor's may be zero by luck: a rounding of the output, and of the
    fp32 sums (√K roundings, taking them as random; K < 1024 here), is always granted.
    """
    assert actual.shape == exact.shape
    norm = exact.norm().item() or 1.0
    error = (actual.double() - exact).norm().item() / norm
    vendor_error = (vendor.double() - exact).norm().item() / norm
    rounding = torch.finfo(actual.dtype).eps / 2 + torch.finfo(torch.float32).eps * 16
    assert error <= factor * max(vendor_error, rounding), (error, vendor_error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_mm(shape, dtype, device):
    M, N, K = shape
    a = operand(M, K, dtype, "row", device)
    b = operand(K, N, dtype, "column", device)
    assert_as_accurate(ours.mm(a, b), a @ b, a.double() @ b.double())


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
def test_mm_reads_any_strides(layouts, device):
    a = operand(19, 70, torch.bfloat16, layouts[0], device)
    b = operand(70, 37, torch.bfloat16, layouts[1], device)
    assert_as_accurate(ours.mm(a, b), a @ b, a.double() @ b.double())


@pytest.mark.parametrize("M", [0, 1, 2, 3, 8, 33, 64, 65])
def test_every_number_of_rows(M, device):
    a = operand(M, 96, torch.float16, "row", device)
    b = operand(96, 48, torch.float16, "column", device)
    assert_as_accurate(ours.mm(a, b), a @ b, a.double() @ b.double())
    assert_as_accurate(ours.mm(b.T, a.T), (a @ b).T, (a.double() @ b.double()).T)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
def test_zero_sizes(shape, device):
    M, N, K = shape
    a, b = torch.randn(M, K, device=device), torch.randn(K, N, device=device)
    bias = torch.randn(N, device=device)
    torch.testing.assert_close(ours.mm(a, b), a @ b)
    torch.testing.assert_close(ours.addmm(bias, a, b, beta=0.5), torch.addmm(bias, a, b, beta=0.5))


BIASES = [(21,), (1,), (1, 21), (5, 1), (5, 21), (1, 1), ()]


@pytest.mark.parametrize("bias_shape", BIASES, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_addmm_takes_any_bias(bias_shape, dtype, device):
    a, b = operand(5, 40, dtype, "row", device), operand(40, 21, dtype, "column", device)
    bias = torch.randn(bias_shape, device=device).to(dtype)
    exact = 1.5 * bias.double() + 0.5 * (a.double() @ b.double())
    actual = ours.addmm(bias, a, b, beta=1.5, alpha=0.5)
    assert_as_accurate(actual, torch.addmm(bias, a, b, beta=1.5, alpha=0.5), exact)


def test_beta_zero_does_not_read_the_bias(device):
    a, b = torch.randn(5, 40, device=device), torch.randn(40, 21, device=device)
    bias = torch.full((21,), float("nan"), device=device)
    torch.testing.assert_close(ours.addmm(bias, a, b, beta=0), a @ b)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bmm_and_baddbmm(batch, dtype, device):
    a = torch.randn(batch, 9, 33, device=device).to(dtype)
    b = torch.randn(batch, 11, 33, device=device).to(dtype).mT
    bias = torch.randn(9, 1, device=device).to(dtype)
    exact = a.double() @ b.double()
    assert_as_accurate(ours.bmm(a, b), a @ b, exact)
    actual = ours.baddbmm(bias, a, b, beta=-1, alpha=2)
    vendor = torch.baddbmm(bias, a, b, beta=-1, alpha=2)
    assert_as_accurate(actual, vendor, 2 * exact - bias.double())


def test_bmm_with_a_broadcast_batch(device):
    a = torch.randn(1, 6, 10, device=device).expand(4, 6, 10)
    b = torch.randn(4, 10, 7, device=device)
    torch.testing.assert_close(ours.bmm(a, b), a @ b)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_out_dtype_keeps_the_sums_in_fp32(dtype, device):
    a, b = operand(6, 64, dtype, "row", device), operand(64, 9, dtype, "column", device)
    actual = ours.mm(a, b, out_dtype=torch.float32)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split_k", [1, 2, 3, 8])
@pytest.mark.parametrize("kernel", ["gemm", "gemv"])
@pytest.mark.parametrize("swap", [False, True], ids=["straight", "swapped"])
def test_split_k_is_exact_and_repeats_bitwise(kernel, split_k, swap, dtype, device):
    from triton_only_backend.kernels.gemm import gemm
    from triton_only_backend.kernels.gemm_configs import GemmConfig
    from triton_only_backend.kernels.gemv import gemv

    few = 2 if kernel == "gemv" else 19
    M, N, K = (37, few, 300) if swap else (few, 37, 300)
    a = torch.randn(2, M, K, device=device).to(dtype)
    b = torch.randn(2, N, K, device=device).to(dtype).mT
    bias = torch.randn(N, device=device).to(dtype).expand(2, M, N)
    config = GemmConfig(kernel, 16, 32, 32, split_k, 4, 4, 2, swap_operands=swap)

    def run() -> torch.Tensor:
        out = torch.full((2, M, N), float("nan"), device=device, dtype=dtype)
        if kernel == "gemv":
            gemv(a, b, bias, out, alpha=0.5, beta=2.0, config=config)
        else:
            gemm(a, b, bias, out, alpha=0.5, beta=2.0, config=config, precision="ieee")
        return out

    first = run()
    vendor = torch.baddbmm(bias, a, b, beta=2.0, alpha=0.5)
    assert_as_accurate(first, vendor, 0.5 * (a.double() @ b.double()) + 2 * bias.double())
    assert torch.equal(first, run())


sizes = st.one_of(st.integers(0, 5), st.sampled_from([16, 31, 64, 97]))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    M=sizes,
    N=sizes,
    K=sizes,
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    alpha=st.sampled_from([1, 0.5, -2]),
    beta=st.sampled_from([0, 1, 0.25]),
)
def test_random_problems(M, N, K, dtype, layouts, alpha, beta, device):
    a = operand(M, K, dtype, layouts[0], device)
    b = operand(K, N, dtype, layouts[1], device)
    bias = torch.randn(M, 1, device=device).to(dtype)
    actual = ours.addmm(bias, a, b, alpha=alpha, beta=beta)
    exact = alpha * (a.double() @ b.double()) + beta * bias.double()
    assert_as_accurate(actual, torch.addmm(bias, a, b, alpha=alpha, beta=beta), exact)


@pytest.mark.parametrize(
    ("a_dtype", "b_dtype"),
    [(torch.float64, torch.float64), (torch.int32, torch.int32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_refuses_other_dtypes_by_name(a_dtype, b_dtype, device):
    a, b = torch.ones(2, 3, device=device, dtype=a_dtype), torch.ones(3, 4, device=device)
    with pytest.raises(UnsupportedProblemError, match=r"triton_only\.mm.*\[2, 3\].*cast"):
        ours.mm(a, b.to(b_dtype))


@pytest.mark.parametrize(
    ("op", "shapes"),
    [("mm", [(2, 3), (4, 5)]), ("bmm", [(2, 3, 4), (3, 4, 5)]), ("mm", [(2, 3), (3,)])],
    ids=str,
)
def test_refuses_shapes_that_do_not_multiply(op, shapes, device):
    with pytest.raises(RuntimeError, match=rf"triton_only\.{op}.*"):
        getattr(ours, op)(*(torch.randn(s, device=device) for s in shapes))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device):
    rows = 2**31 // 4096 + 64
    a = torch.randn(rows, 4096, device=device, dtype=torch.bfloat16)
    b = torch.randn(4096, 64, device=device, dtype=torch.bfloat16)
    tail = slice(rows - 128, rows)
    exact = a[tail].double() @ b.double()
    assert_as_accurate(ours.mm(a, b)[tail], a[tail] @ b, exact)
    assert_as_accurate(ours.mm(b.T, a.T)[:, tail], (a[tail] @ b).T, exact.T)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_fp32_precision_follows_torch(precision, device):
    a, b = torch.randn(300, 512, device=device), torch.randn(512, 200, device=device)
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        error = ((ours.mm(a, b).double() - exact).norm() / exact.norm()).item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert error < 1e-6 if precision == "highest" else 1e-5 < error < 1e-3


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("a_layout", ["row", "column"])
@pytest.mark.parametrize("b_layout", ["row", "column"])
def test_descriptor_kernel(a_layout, b_layout, with_bias, split_k, dtype, device):
    from triton_only_backend.kernels.gemm_configs import GemmConfig
    from triton_only_backend.kernels.gemm_tma import gemm_tma
    from triton_only_backend.kernels.matmul import is_aligned

    M, N, K = 40, 72, 152
    a, b = operand(M, K, dtype, a_layout, device), operand(K, N, dtype, b_layout, device)
    assert is_aligned(a[None]) and is_aligned(b[None])
    bias = operand(1, N, dtype, "row", device).expand(M, N) if with_bias else None
    vendor = 0.5 * (a @ b) if bias is None else torch.addmm(bias, a, b, alpha=0.5, beta=2)
    exact = 0.5 * (a.double() @ b.double()) + (0 if bias is None else 2 * bias.double())
    for swap, halves in ((False, False), (True, False), (False, True)):
        config = GemmConfig(
            "gemm_tma", 64, 32, 32, split_k, 8, 4, 3, swap_operands=swap, store_halves=halves
        )
        for out in (
            torch.full((M, N), float("nan"), device=device, dtype=dtype),
            torch.full((N, M + 1), float("nan"), device=device, dtype=dtype).T[:M],
        ):
            gemm_tma(a, b, bias, out, alpha=0.5, beta=2.0, config=config, num_sms=5)
            assert_as_accurate(out, vendor, exact)


@pytest.mark.parametrize("columns", [32, 64, 72, 96])
def test_columns_apart(columns, device):
    """The first columns by one configuration, the rest by another; none or all by the first."""
    from triton_only_backend.kernels import tuned
    from triton_only_backend.kernels.epilogue import Epilogue
    from triton_only_backend.kernels.gemm_configs import GemmConfig
    from triton_only_backend.kernels.matmul import matmul

    M, N, K = 40, 72, 152
    a, b = torch.randn(1, M, K, device=device), torch.randn(1, N, K, device=device).mT
    bias = torch.randn(1, N, device=device)
    multiplier, residual = torch.randn(2, M, N, device=device)
    out = torch.full((1, M, N), float("nan"), device=device)
    epilogue = Epilogue("relu", multiplier, 0.5, residual)
    with tuned.forcing("gemm", GemmConfig("gemm", 64, 32, 32, 1, 8, 4, 3, columns=columns)):
        matmul(a, b, bias, out, alpha=0.5, beta=2.0, epilogue=epilogue)

    def reference(a, b, bias, multiplier, residual):
        return (0.5 * (a @ b) + 2 * bias).relu() * multiplier * 0.5 + residual

    operands = (a[0], b[0], bias, multiplier, residual)
    exact = reference(*[x.double() for x in operands])
    assert_as_accurate(out[0], reference(*operands), exact)


def test_alignment(device):
    from triton_only_backend.kernels.matmul import is_aligned

    matrix = torch.empty(2, 64, 64, device=device, dtype=torch.bfloat16)
    assert is_aligned(matrix)
    assert is_aligned(matrix.mT)
    assert is_aligned(matrix[:1].expand(2, 64, 64))
    assert not is_aligned(matrix[:, :, 1:])
    assert not is_aligned(matrix[:, :, ::2])
    assert not is_aligned(matrix[:, :1].expand(2, 64, 64))
    assert not is_aligned(torch.empty(1, 64, 65, device=device, dtype=torch.bfloat16))
