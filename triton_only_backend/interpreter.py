"""Runs Triton kernels, ours and Inductor's, on CPU tensors through the Triton interpreter.

Used by itself on a machine with no GPU. Two things stand in the way of the stock interpreter:

1. Functions decorated with `@triton.jit` before the interpreter was switched on stay compiled
   functions; they are rebound, so that importing triton first (as torch._dynamo does) is harmless.
2. There is no active driver: a driver for a `cpu` target is installed.

What it computes wrongly, or slowly, is mended in `interpreter_mends`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("triton_only")

# Inductor settings under which its Triton codegen targets the CPU. One compile thread: the worker
# processes of the parallel compiler would not know of the mends.
INDUCTOR_CONFIG: dict[str, Any] = {
    "cpu_backend": "triton",
    "compile_threads": 1,
}

# Prefix of the profiler scope of an interpreted launch.
LAUNCH_SCOPE = "triton_interpreter::"

_state = {"installed": False, "announced": False}


def gpu_available() -> bool:
    """Whether torch sees a device that Triton can compile for (CUDA, ROCm or XPU)."""
    import torch

    return torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())


def wanted() -> bool:
    """Whether kernels should be interpreted: no GPU, or the user set TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1" or not gpu_available()


def is_installed() -> bool:
    """Whether the interpreter is on in this process."""
    return _state["installed"]


def announce() -> None:
    """Says once, in one line, that kernels are interpreted."""
    if not _state["announced"]:
        _state["announced"] = True
        log.warning(
            "triton_only: %s; kernels run in the Triton interpreter on the CPU (exact, slow)",
            "TRITON_INTERPRET=1" if gpu_available() else "no GPU found",
        )


def install_if_wanted() -> bool:
    """Switches the interpreter on when there is no GPU. Idempotent; returns `is_installed()`."""
    if not _state["installed"] and wanted():
        _install()
    return _state["installed"]


def _install() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    # numpy and torch's stand-ins for libdevice, for those who need them only.
    from triton_only_backend import inductor
    from triton_only_backend.interpreter_libdevice import Libdevice
    from triton_only_backend.interpreter_mends import mend

    triton.knobs.runtime.interpret = True
    _rebind_compiled_functions()
    _install_driver()
    mend()
    inductor.replace_libdevice(Libdevice())
    _wrap_launches()
    _clear_triton_probes()
    _state["installed"] = True


def _rebind_compiled_functions() -> None:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    interpreted: dict[int, Any] = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith(("triton", "torch._inductor.runtime")):
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                if id(value) not in interpreted:
                    interpreted[id(value)] = InterpretedFunction(value.fn)
                setattr(module, attribute, interpreted[id(value)])


def _install_driver() -> None:
    import triton
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.backends.driver import DriverBase

    class InterpreterCompiler(BaseBackend):  # type: ignore[misc]
        """Satisfies the queries Inductor makes of a Triton backend; it never compiles."""

        binary_ext = "none"

        @staticmethod
        def supports_target(target: GPUTarget) -> bool:
            return bool(target.backend == "cpu")

        def hash(self) -> str:
            return f"interpreter-{triton.__version__}"

        def parse_options(self, options: dict[str, Any]) -> Any:
            return type("Options", (), {"extern_libs": None})()

        def add_stages(self, stages: Any, options: Any, language: Any = None) -> None:
            raise NotImplementedError("the Triton interpreter does not compile")

        def load_dialects(self, context: Any) -> None:
            pass

        def get_module_map(self) -> dict[str, Any]:
            return {}

        def pack_metadata(self, metadata: Any) -> Any:
            return metadata

        def get_codegen_implementation(self, *_: Any) -> dict[str, Any]:
            return {}

    class InterpreterDriver(DriverBase):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_device_interface(self) -> Any:
            import torch

            return torch.cpu

        def get_empty_cache_for_benchmark(self) -> None:
            return None

        def clear_cache(self, cache: Any) -> None:
            pass

        def get_benchmarker(self) -> Callable[..., float]:
            def benchmark(fn: Callable[[], Any], **_: Any) -> float:
                start = time.perf_counter()
                fn()
                return (time.perf_counter() - start) * 1e3

            return benchmark

    if "cpu" not in backends:
        backends["cpu"] = Backend(compiler=InterpreterCompiler, driver=InterpreterDriver)
    triton.runtime.driver.set_active(InterpreterDriver())


def _wrap_launches() -> None:
    """Each interpreted launch is a scope of the profiler, which tells it from ATen's CPU ops.

    One at a time: a launch replaces triton.language's functions for all threads. And numpy warns as
    little as a GPU does: masked lanes divide 0 by 0.
    """
    import threading

    import numpy as np
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.run
    turn = threading.RLock()

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = torch.profiler.record_function(LAUNCH_SCOPE + self.fn.__name__)
        with turn, scope, np.errstate(all="ignore"):
            return original(self, *args, **kwargs)

    InterpretedFunction.run = run


def _clear_triton_probes() -> None:
    """torch caches whether Triton is usable; the answer has changed."""
    from torch.utils import _triton

    for name in ("has_triton", "triton_backend", "triton_hash_with_backend"):
        getattr(_triton, name).cache_clear()
