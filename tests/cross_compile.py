"""Compiles kernels for GPUs that are not there, by calling their host functions on CPU tensors.

A stand-in driver names the target; every launch becomes a compilation only. The tests import this
in a process of its own, with the interpreter off.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_only_backend.kernels.hardware import Hardware

# Shared memory a block may use, bytes: NVIDIA's CUDA programming guide, table of compute
# capabilities; 64 KiB of LDS on CDNA3 (160 KiB on CDNA4, of which Triton uses as much).
TARGETS = {
    "sm80": ("cuda", 80, Hardware("A100", "cuda", "sm80", 108, 166912)),
    "sm89": ("cuda", 89, Hardware("L40S", "cuda", "sm89", 142, 101376)),
    "sm90": ("cuda", 90, Hardware("H200", "cuda", "sm90", 132, 232448)),
    "sm100": ("cuda", 100, Hardware("B200", "cuda", "sm100", 148, 232448)),
    "sm120": ("cuda", 120, Hardware("RTX 5090", "cuda", "sm120", 170, 101376)),
    "gfx942": ("hip", "gfx942", Hardware("MI300X", "hip", "gfx942", 304, 65536)),
    "gfx950": ("hip", "gfx950", Hardware("MI355X", "hip", "gfx950", 256, 65536)),
}


@dataclass(frozen=True)
class Compiled:
    """What a compilation says of a kernel."""

    name: str
    registers: int
    spilled: int
    shared_memory: int
    asm: dict[str, Any]


def compile_for(target: str) -> list[Compiled]:
    """Turns launches into compilations for the target; returns the list they are added to."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.jit import JITFunction

    assert not triton.knobs.runtime.interpret, "needs a process without TRITON_INTERPRET"
    backend, arch, _ = TARGETS[target]
    gpu = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    compiled: list[Compiled] = []

    class Driver(DriverBase):
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
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
        compiled.append(describe(kernel, backend))
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
        found = {
            key: int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))  # type: ignore[union-attr]
            for key in ("vgpr_count", "vgpr_spill_count")
        }
        return Compiled(name, found["vgpr_count"], found["vgpr_spill_count"], shared, kernel.asm)
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [os.fspath(tool), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
    local = int(re.search(r"LOCAL:(\d+)", usage).group(1))  # type: ignore[union-attr]
    stack = int(re.search(r"STACK:(\d+)", usage).group(1))  # type: ignore[union-attr]
    return Compiled(name, registers, max(local, stack), shared, kernel.asm)
