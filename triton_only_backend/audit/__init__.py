"""Proves that a model runs on Triton only: in the graph, in the generated code and at run time.

The package imports neither the passes nor the kernels, so that it can bear witness on them. It can
be called: `triton_only_backend.audit(model, *inputs)` compiles the model and returns its report.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from triton_only_backend.audit.generated_code import CodeCall as CodeCall
from triton_only_backend.audit.generated_code import audit_source as audit_source
from triton_only_backend.audit.graph import GraphOp as GraphOp
from triton_only_backend.audit.graph import audit_graph as audit_graph
from triton_only_backend.audit.graph import refused_ops as refused_ops
from triton_only_backend.audit.package import audit_package as audit_package
from triton_only_backend.audit.policy import Provider as Provider
from triton_only_backend.audit.policy import Reason as Reason
from triton_only_backend.audit.report import AuditReport as AuditReport
from triton_only_backend.audit.report import Finding as Finding
from triton_only_backend.audit.runtime import KernelReport as KernelReport
from triton_only_backend.audit.runtime import profile as profile

__all__ = [
    "AuditReport",
    "CodeCall",
    "Finding",
    "GraphOp",
    "KernelReport",
    "Provider",
    "Reason",
    "audit_graph",
    "audit_package",
    "audit_source",
    "profile",
    "refused_ops",
]


class _CallableModule(types.ModuleType):
    """Importing this package puts it where the public function `audit` is, so it is both."""

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> AuditReport:
        """Compiles `model`, runs it on the inputs and returns the report over all its graphs."""
        from triton_only_backend import model_audit

        report: AuditReport = model_audit.audit_model(model, *args, **kwargs)
        return report


sys.modules[__name__].__class__ = _CallableModule
