"""`torch.compile(model, backend="triton_only")`: PyTorch models on Triton kernels alone, proven.

Importing it registers `torch.ops.triton_only`; Triton, the kernels and Inductor load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from triton_only_backend.kernels import ops as _ops  # noqa: F401  (registers torch.ops.triton_only)

if TYPE_CHECKING:
    from triton_only_backend import audit as audit
    from triton_only_backend.audit import AuditReport as AuditReport
    from triton_only_backend.audit import KernelReport as KernelReport
    from triton_only_backend.audit import profile as profile
    from triton_only_backend.eager_mode import eager as eager
    from triton_only_backend.errors import AuditError as AuditError
    from triton_only_backend.errors import DeviceError as DeviceError
    from triton_only_backend.errors import SettingsError as SettingsError
    from triton_only_backend.errors import TritonOnlyError as TritonOnlyError
    from triton_only_backend.errors import UnsupportedProblemError as UnsupportedProblemError

__version__ = "0.1.0"

_PUBLIC = {
    "AuditError": "errors",
    "AuditReport": "audit",
    "DeviceError": "errors",
    "KernelReport": "audit",
    "SettingsError": "errors",
    "TritonOnlyError": "errors",
    "UnsupportedProblemError": "errors",
    "audit": "audit",
    "eager": "eager_mode",
    "profile": "audit",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_PUBLIC[name]}")
    return module if name == "audit" else getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
