"""The words of a report: who supplies a kernel, why an op stayed there, and the verdict on it."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Provider(enum.Enum):
    """Who supplies a kernel. The value is the label that reports print."""

    TRITON_OURS = "Triton (triton_only)"
    TRITON_INDUCTOR = "Triton (Inductor)"
    TRITON_USER = "Triton (user kernel)"
    CUBLAS = "cuBLAS"
    CUDNN = "cuDNN"
    CUTLASS = "CUTLASS"
    FLASH = "FlashAttention (CUDA)"
    EFFICIENT = "memory-efficient attention (CUTLASS)"
    ATEN = "ATen native"
    CUB = "CUB/Thrust"
    CUFFT = "cuFFT"
    CUSOLVER = "cuSOLVER/MAGMA"
    CUSPARSE = "cuSPARSE"
    NCCL = "NCCL"
    CPU = "CPU"
    MEMCPY = "memcpy"
    MEMSET = "memset"
    USER = "user op"
    NONE = "no kernel"
    UNKNOWN = "unknown"

    @property
    def is_triton(self) -> bool:
        """Whether the kernel was written in, or generated as, Triton."""
        return self in _TRITON

    @property
    def is_violation(self) -> bool:
        """Whether a kernel from here breaks "Triton only". Collectives and copies do not."""
        return self not in _HARMLESS

    @property
    def is_compute(self) -> bool:
        """Whether its time counts as compute; copies, fills and communication do not."""
        return self not in _NOT_COMPUTE

    @property
    def is_listed(self) -> bool:
        """Whether a report names it though it is no violation: communication, copies, fills."""
        return self in _LISTED


_TRITON = frozenset({Provider.TRITON_OURS, Provider.TRITON_INDUCTOR, Provider.TRITON_USER})
_LISTED = frozenset({Provider.NCCL, Provider.MEMCPY, Provider.MEMSET})
_NOT_COMPUTE = _LISTED | {Provider.NONE}
_HARMLESS = _TRITON | _NOT_COMPUTE


class Reason(enum.Enum):
    """Why an op runs outside Triton. A pass that refuses an op records one of these names."""

    UNSUPPORTED_DTYPE = "our Triton kernels do not cover this dtype"
    UNSUPPORTED_LAYOUT = "our Triton kernels do not cover the layout of an operand"
    UNSUPPORTED_DEVICE = "an operand is on a device that Triton cannot drive"
    UNSUPPORTED_ARGUMENT = "our Triton kernels do not cover one of its arguments"
    UNSUPPORTED_SIZE = "our Triton kernels do not cover the size of an operand"
    NO_TRITON_LOWERING = "Inductor has no Triton lowering"
    LIBRARY_ONLY = "Inductor calls a library, and no pass replaced it"
    DATA_DEPENDENT = "its output shape depends on the data"
    USER_OP = "custom op: opaque to the audit"
    REFUSED_BY_PASS = "a pass refused to replace it"
    EAGER = "it runs eagerly, between the compiled graphs"
    CPU_KERNEL = "it runs on the CPU"
    OPAQUE_CODE = "the audit cannot read this code"
    UNKNOWN_OP = "the audit does not know it"


@dataclass(frozen=True)
class Verdict:
    """What the policy says of one op."""

    provider: Provider
    reason: Reason | None = None
    remedy: str = ""

    @property
    def is_violation(self) -> bool:
        """Whether the op breaks "Triton only"."""
        return self.provider.is_violation
