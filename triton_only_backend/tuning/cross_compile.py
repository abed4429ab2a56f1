"""Compiling kernels for a GPU without using one: their host functions called on CPU tensors.

A stand-in driver names the target, and every launch becomes a compilation only. What is compiled
lies in Triton's cache under the key that a process with the GPU looks up. For a process of its own,
with the Triton interpreter off.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """What Triton compiles for: `backend` "cuda" or "hip", `arch` 90 or "gfx942", …"""

    backend: str
    arch: int | str
    warp_size: int


@dataclass(frozen=True)
class Compiled:
    """What a compilation says of a kernel: registers a thread, bytes spilled, bytes shared."""

    name: str
    registers: int
    spilled: int
    shared_memory: int
    asm: dict[str, Any]


def compile_only(target: Target) -> list[Compiled]:
    """Turns this process's launches into compilations; returns the list they are added to."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.jit import JITFunction

    assert not triton.knobs.runtime.interpret, "needs a process without TRITON_INTERPRET"
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    compiled: list[Compiled] = []

    class Driver(DriverBase):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return gpu

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        compiled.append(describe(kernel, target.backend))
        return kernel

    JITFunction.run = run
    triton.runtime.driver.set_active(Driver())
    return compiled


def describe(kernel: Any, backend: str) -> Compiled:
    """Registers, spills and shared memory of a compiled kernel, read from its binary."""
    name = kernel.metadata.name
    shared = kernel.metadata.shared
    if backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, spilled = (
            _number(rf"\.{key}:\s*(\d+)", text) for key in ("vgpr_count", "vgpr_spill_count")
        )
        return Compiled(name, registers, spilled, shared, kernel.asm)
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [os.fspath(tool), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    registers, local, stack = (_number(rf"{key}:(\d+)", usage) for key in ("REG", "LOCAL", "STACK"))
    return Compiled(name, registers, max(local, stack), shared, kernel.asm)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found.group(1))
