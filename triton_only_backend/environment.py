"""Versions and hardware, for reports, benchmarks and bug reports."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

_TRITON_DISTRIBUTIONS = (
    "triton",
    "pytorch-triton",
    "pytorch-triton-rocm",
    "pytorch-triton-xpu",
    "triton-rocm",
    "triton-windows",
)
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_AMD_DRIVER = Path("/sys/module/amdgpu/version")


def collect() -> dict[str, Any]:
    """What a result depends on, as plain values; None for what is not there."""
    import torch

    import triton_only_backend

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "triton_only_backend": triton_only_backend.__version__,
        "torch": torch.__version__,
        "triton": _version(*_TRITON_DISTRIBUTIONS),
        "transformers": _version("transformers"),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "driver": driver_version(),
        **_gpu(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def driver_version(nvidia: Path = _NVIDIA_DRIVER, amd: Path = _AMD_DRIVER) -> str | None:
    """The kernel driver's version, from the file in which the driver publishes it."""
    if nvidia.is_file():
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", nvidia.read_text())
        return found.group() if found else None
    return amd.read_text().strip() if amd.is_file() else None


def _gpu() -> dict[str, Any]:
    import torch

    from triton_only_backend import interpreter
    from triton_only_backend.kernels import hardware

    if not interpreter.gpu_available():
        return {"gpu": None, "gpus": 0, "arch": None, "multiprocessors": None, "memory_gib": None}
    module = torch.cuda if torch.cuda.is_available() else torch.xpu
    device = torch.device("cuda" if torch.cuda.is_available() else "xpu", module.current_device())
    found = hardware.of(device)
    return {
        "gpu": found.name,
        "gpus": module.device_count(),
        "arch": found.arch,
        "multiprocessors": found.num_sms,
        "memory_gib": round(module.get_device_properties(device).total_memory / 2**30, 1),
    }
