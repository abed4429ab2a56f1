"""Random products of every kind: as accurate as the library, and the same bits each time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
SEED, COUNT, PARTS, ALIKE = 20, 2000, 40, 3


@pytest.fixture(autouse=True)
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gemm_sweep

    return gemm_sweep


def failures(sweep, cases, device):
    found = []
    for case in cases:
        error, allowed, repeats = sweep.errors(case, sweep.make_operands(case, device))
        if not error <= allowed or not repeats:
            found.append(f"{case}: error {error:.2e} of {allowed:.2e}, repeats {repeats}")
    return found


@pytest.mark.cpu
def test_a_sample_of_the_sweep(sweep, device):
    cases = sweep.make_cases(SEED, 60, largest=256)
    assert {case.op for case in cases} == set(sweep.OPS)
    assert {case.dtype for case in cases} == set(sweep.DTYPES)
    assert not failures(sweep, cases, device)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS))
def test_two_thousand_random_products(sweep, part):
    """In parts, which compile beside each other: cases that share a kernel share a part."""
    # cuBLAS may add partial sums in bf16, which would only widen the bound.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    cases = sweep.make_cases(SEED, COUNT, alike=ALIKE)
    assert len(set(cases)) == COUNT
    size = -(-COUNT // PARTS)
    assert not failures(sweep, cases[part * size : (part + 1) * size], "cuda")


def test_the_bound_catches_a_wrong_element(sweep, device, monkeypatch):
    case = sweep.Case("mm", "fp32", "row", "column", "vector", "none", 64, 40, 16, 1, 1, 1, 0)
    right = sweep.run

    def faulty(case, x):
        out = right(case, x)
        out[0] *= 1.00001
        return out

    operands = sweep.make_operands(case, device)
    error, allowed, repeats = sweep.errors(case, operands)
    assert error <= allowed and repeats
    monkeypatch.setattr(sweep, "run", faulty)
    error, allowed, _ = sweep.errors(case, operands)
    assert error > allowed
