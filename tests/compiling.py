"""Compiling with the backend under test."""

from __future__ import annotations

import torch

from triton_only_backend.backend import compiled_reports


def compiled(function, **options):
    return torch.compile(function, backend="triton_only", **options)


def float64_product(x: torch.Tensor) -> torch.Tensor:
    return x.double() @ x.double()


def assert_compiles(function, *args: torch.Tensor, **options) -> None:
    """Compiled output and gradients equal eager's, and every graph is Triton-only."""
    before = len(compiled_reports())
    actual, expected = compiled(function, **options)(*args), function(*args)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    wanted = [a for a in args if a.requires_grad]
    if wanted:
        ours = torch.autograd.grad(actual.sum(), wanted)
        theirs = torch.autograd.grad(expected.sum(), wanted)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    reports = compiled_reports()[before:]
    assert len(reports) == (2 if wanted else 1)
    assert all(report.is_triton_only for report in reports)
