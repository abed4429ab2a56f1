"""What the tests of kernels for Hopper share: where they run, and attention's operands there."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

Test = TypeVar("Test", bound="Callable[..., object]")


def hopper(test: Test) -> Test:
    """Runs a test on a Hopper GPU only."""
    missing = not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="the kernel is for Hopper")(test))


def random_heads(
    batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, order: str
) -> torch.Tensor:
    """(batch, heads, length, dim), which lies in memory so, as "blhd", or "packed" between others."""
    if order == "blhd":
        x = torch.randn(batch, length, heads, dim, device="cuda", dtype=dtype)
        return x.transpose(1, 2)
    if order == "packed":
        whole = torch.randn(batch, length, 3 * heads * dim, device="cuda", dtype=dtype)
        middle = whole[..., heads * dim : 2 * heads * dim]
        return middle.view(batch, length, heads, dim).transpose(1, 2)
    return torch.randn(batch, heads, length, dim, device="cuda", dtype=dtype)
