"""pytest: a fixture and an assertion that a model runs on Triton only.

    def test_my_model(triton_only):
        triton_only(MyModel().cuda(), torch.randn(8, 512, device="cuda"), allow=["aten.sort*"])

Nothing heavy is imported before an assertion is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from triton_only_backend.audit import AuditReport


class AssertTritonOnly(Protocol):
    """The type of the fixture `triton_only`."""

    def __call__(
        self,
        model: Callable[..., Any],
        *args: Any,
        allow: Iterable[str] | str = (),
        **kwargs: Any,
    ) -> AuditReport:
        """See `assert_triton_only`."""


@pytest.fixture
def triton_only() -> AssertTritonOnly:
    """The function `assert_triton_only`."""
    return assert_triton_only


def assert_triton_only(
    model: Callable[..., Any],
    *args: Any,
    allow: Iterable[str] | str = (),
    **kwargs: Any,
) -> AuditReport:
    """Compiles a model, runs it once, and fails unless every graph of it is Triton only.

    Args:
        model: a module or function, compiled or not.
        args, kwargs: what it is called with. With a gradient to come the backward is audited too.
        allow: globs of ops or providers that may stay.

    Returns:
        The report.

    Raises:
        AssertionError: the report in short.
    """
    __tracebackhide__ = True
    from triton_only_backend import model_audit

    globs = [allow] if isinstance(allow, str) else list(allow)
    report = model_audit.audit_with(model, args, kwargs, options={"allow": globs})
    if not report.is_triton_only:
        raise AssertionError(report.to_short_text())
    return report
