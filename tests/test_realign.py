"""Operands without aligned rows: their copies, what is chosen, the products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_gemm import assert_as_accurate

from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.gemm_choice import heuristic_config
from triton_only_backend.kernels.gemm_configs import GemmConfig, GemmProblem, supports
from triton_only_backend.kernels.hardware import Hardware
from triton_only_backend.kernels.matmul import matmul
from triton_only_backend.kernels.realign import realign, realign_product
from triton_only_backend.tuning.gemm_space import candidates

H200 = Hardware("NVIDIA H200", "cuda", "sm90", 132, 232448)
ODD = GemmProblem(1, 4096, 5376, 495, 2, False, True, True, aligned=False)
OPERANDS = {
    "rows": lambda like: torch.randn(1, 37, 495, **like),
    "columns": lambda like: torch.randn(3, 21, 70, **like).mT,
    "sliced": lambda like: torch.randn(2, 60, 301, **like)[:, ::2, 1::3],
    "shifted": lambda like: torch.randn(2, 33, 136, **like)[:, :, 1:129],
    "broadcast": lambda like: torch.randn(1, 50, 1, **like).expand(2, 50, 600),
    "one": lambda like: torch.randn(1, 1, 1, **like),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERANDS)
def test_copies(name, dtype, device):
    like = {"device": device, "dtype": dtype}
    operand, other = OPERANDS[name](like), torch.randn(2, 9, 600, **like)
    for copies in (realign([operand]), realign([operand, other]), realign([other, operand])[::-1]):
        copy = copies[0]
        assert torch.equal(copy, operand)
        rows, columns = copy.stride()[1:]
        if columns != 1:
            rows, columns = columns, rows
        assert columns == 1 and rows % 64 == 0 and copy.data_ptr() % 16 == 0
        assert all(torch.equal(copy, other) for copy in copies[1:])


def test_the_end_of_a_row_is_zeros(device):
    like = {"device": device, "dtype": torch.bfloat16}
    a, b = torch.randn(2, 5, 495, **like), torch.randn(2, 7, 495, **like).mT
    a_copy, b_copy = realign_product(a, b, False, False)
    assert a_copy.shape == (2, 5, 496) and b_copy.shape == (2, 496, 7)
    assert torch.equal(a_copy[:, :, :495], a) and torch.equal(b_copy[:, :495], b)
    assert not a_copy[:, :, 495:].any() and not b_copy[:, 495:].any()


@pytest.mark.parametrize("k_major", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_products_of_copies(k_major, batch, device):
    """Both operands copied, or the one that needs it."""
    like = {"device": device, "dtype": torch.bfloat16}
    M, N, K = 37, 53, 135
    a = torch.randn(batch, M, K, **like) if k_major[0] else torch.randn(batch, K, M, **like).mT
    b = torch.randn(batch, N, K, **like).mT if k_major[1] else torch.randn(batch, K, N, **like)
    config = GemmConfig("gemm", 64, 64, 32, 1, 8, 4, 2, realign=True)
    aligned = torch.randn(batch, 40, K, **like).mT  # contiguous along M, of which 40 are left
    for left in (a, aligned.mT[:, :M]):
        outs = [torch.full((batch, M, N), float("nan"), **like) for _ in range(2)]
        with tuned.forcing("gemm", config):
            for out in outs:
                matmul(left, b, None, out)
        assert_as_accurate(outs[0], left @ b, left.double() @ b.double())
        assert torch.equal(*outs)


@pytest.mark.parametrize("M", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_few_rows_of_elements_read_one_by_one(M, dtype, device):
    from triton_only_backend.kernels.gemv import gemv

    like = {"device": device, "dtype": dtype}
    config = GemmConfig("gemv", 1, 4, 128, 1, 1, 1, 2)
    a, b = torch.randn(2, M, 301, **like), torch.randn(2, 45, 301, **like).mT
    outs = [torch.full((2, M, 45), float("nan"), **like) for _ in range(2)]
    for out in outs:
        gemv(a, b, None, out, alpha=1.0, beta=0.0, config=config)
    assert_as_accurate(outs[0], a @ b, a.double() @ b.double())
    assert torch.equal(*outs)


def test_what_is_chosen():
    for M in (1, 2, 3, 4):
        config = heuristic_config(replace(ODD, M=M), H200)
        assert (config.kernel, config.realign) == ("gemv", False)
        tile = (config.block_n, config.block_k, config.num_warps)
        assert tile == {1: (8, 512, 2), 2: (8, 512, 1)}.get(M, (4, 256, 1))
    for M in (8, 16, 64, 256, 4096, 8192):
        problem = replace(ODD, M=M)
        config = heuristic_config(problem, H200)
        assert config.realign and supports(problem, config, H200)
        assert not supports(replace(problem, aligned=True), config, H200)
    # K is as it was where one operand alone is copied, and the ring takes only multiples of 256.
    whole = replace(ODD, M=8, K=511)
    ring = heuristic_config(whole.realigned, H200)
    assert ring.kernel == "ring_linear"
    assert not supports(whole, replace(ring, realign=True), H200)
    assert heuristic_config(whole, H200).kernel != "ring_linear"
    assert all(config.kernel != "ring_linear" for config in candidates(whole, H200))
    small = heuristic_config(replace(ODD, M=40, N=40, K=71), H200)
    assert (small.kernel, small.realign) == ("gemm", False)


def test_elsewhere_nothing_is_copied():
    for device in (replace(H200, arch="sm80"), replace(H200, arch="sm100")):
        for M in (1, 64, 4096):
            config = heuristic_config(replace(ODD, M=M), device)
            assert (config.kernel, config.realign) == ("gemm", False)
    assert not heuristic_config(replace(ODD, element_size=4), H200).realign


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 2, 4, 8, 32, 33, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_the_vendors(M, dtype, device):
    like = {"device": device, "dtype": dtype}
    a, b = torch.randn(M, 495, **like), torch.randn(5333, 495, **like).T
    bias = torch.randn(5333, **like)
    ours = torch.ops.triton_only
    first = ours.addmm(bias, a, b)
    assert_as_accurate(first, torch.addmm(bias, a, b), a.double() @ b.double() + bias.double())
    assert torch.equal(first, ours.addmm(bias, a, b))
