"""One class for each failure a user can meet; each message names thing, cause and remedy."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable


class TritonOnlyError(Exception):
    """Base of every error that this package raises on purpose."""


class SettingsError(TritonOnlyError, ValueError):
    """A mode, option or environment variable that is unknown or has a value it cannot take."""


class DeviceError(TritonOnlyError, RuntimeError):
    """Tensors live on a device that Triton cannot drive."""

    def __init__(self, device: Any) -> None:
        remedy = (
            "move the model and its inputs to a GPU (model.to('cuda')), or set TRITON_INTERPRET=1 "
            "before starting Python to run in the Triton interpreter"
            if str(device).startswith("cpu")
            else "move the model and its inputs to a CUDA, ROCm or XPU device"
        )
        super().__init__(f"triton_only: Triton cannot drive device '{device}'; {remedy}")
        self.device = device


class UnsupportedProblemError(TritonOnlyError, NotImplementedError):
    """One of our ops was called on a problem that its kernels do not cover."""


class AuditError(TritonOnlyError, RuntimeError):
    """A compiled graph still calls a library kernel, and `on_violation` is "error".

    Attributes:
        report: the `AuditReport` whose findings the message lists.
    """

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


def nearest(name: str, candidates: Iterable[str]) -> str:
    """'; did you mean "x"?' for the candidate nearest to `name`, or '' when none is near."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f'; did you mean "{matches[0]}"?' if matches else ""
