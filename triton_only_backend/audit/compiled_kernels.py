"""The kernels that Inductor's output code hands to `async_compile.<language>(name, source)`."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from triton_only_backend.audit.policy import Provider, Reason
from triton_only_backend.audit.references import KERNEL

_PROVIDERS = {
    "triton": Provider.TRITON_INDUCTOR,
    "multi_kernel": Provider.TRITON_INDUCTOR,
    "size_hint_multi_kernel": Provider.TRITON_INDUCTOR,
    "cpp": Provider.CPU,
    "cpp_pybinding": Provider.CPU,
    "cutlass": Provider.CUTLASS,
    "cuda": Provider.CUTLASS,
    "rocm": Provider.CUTLASS,
    "xpu": Provider.CUTLASS,
    "cutedsl": Provider.CUTLASS,
    "nv_universal_gemm": Provider.CUTLASS,
}
_NOT_KERNELS = frozenset({"wait", "wakeup", "use_process_pool", "warm_pool", "submit"})


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel; `key` is the path by which the resolver knows it."""

    key: str
    name: str
    provider: Provider
    line: int

    @property
    def reason(self) -> Reason | None:
        """Why it is not Triton; None if it is."""
        if self.provider is Provider.CPU:
            return Reason.CPU_KERNEL
        if self.provider is Provider.UNKNOWN:
            return Reason.UNKNOWN_OP
        return Reason.LIBRARY_ONLY if self.provider.is_violation else None

    @property
    def remedy(self) -> str:
        """What to do about it."""
        if self.provider is Provider.CPU:
            return "move the model and its inputs to the GPU"
        if self.provider is Provider.CUTLASS:
            return 'leave "CUTLASS" and its like out of max_autotune_gemm_backends'
        return ""


def read_kernel(language: str, call: ast.Call) -> Kernel | None:
    """The kernel that a call of `async_compile.<language>` defines; None if it defines none."""
    if language in _NOT_KERNELS:
        return None
    constants = [a.value for a in call.args if isinstance(a, ast.Constant)]
    strings = [value for value in constants if isinstance(value, str)]
    provider = _PROVIDERS.get(language, Provider.UNKNOWN)
    if language == "triton" and len(strings) > 1 and _is_user_kernel(strings[1]):
        provider = Provider.TRITON_USER
    has_name = bool(strings) and strings[0].isidentifier()
    name = strings[0] if has_name else f"async_compile.{language} kernel"
    return Kernel(f"{KERNEL}{call.lineno}:{call.col_offset}", name, provider, call.lineno)


def _is_user_kernel(source: str) -> bool:
    """Whether Inductor took the kernel over from the user: it is under `user_autotune`."""
    if "user_autotune" not in source:
        return False
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return False
    return any(
        isinstance(node, ast.Attribute) and node.attr == "user_autotune" for node in ast.walk(tree)
    )
