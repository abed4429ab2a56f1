"""pytest's way in, installed as `triton_only_pytest`: every run of pytest imports it.

Outside of `triton_only_backend` for that reason alone: importing that package loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from triton_only_backend.pytest_plugin import AssertTritonOnly


@pytest.fixture
def triton_only() -> AssertTritonOnly:
    """Asserts that a model runs on Triton only: `triton_only(model, *args, allow=[…])`."""
    from triton_only_backend.pytest_plugin import assert_triton_only

    return assert_triton_only
