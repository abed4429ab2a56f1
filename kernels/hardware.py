"""What kernels need to know of the device they run on. The only module that asks it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triton_only_backend.errors import DeviceError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch


@dataclass(frozen=True)
class Hardware:
    """A device, as `select_config` functions see it.

    Attributes:
        name: the vendor's name, e.g. "NVIDIA H200".
        backend: "cuda", "hip", "xpu" or "interpreter".
        arch: "sm90", "gfx942", …, or "interpreter".
        num_sms: multiprocessors (compute units).
        shared_memory: bytes of shared memory that one block may use.
    """

    name: str
    backend: str
    arch: str
    num_sms: int
    shared_memory: int

    @property
    def is_interpreter(self) -> bool:
        """Whether kernels are interpreted on the CPU, where few large blocks are fastest."""
        return self.backend == "interpreter"

    @property
    def has_wgmma(self) -> bool:
        """Whether this is Hopper, whose tensor cores take operands from shared memory."""
        return self.arch == "sm90"

    @property
    def has_gluon(self) -> bool:
        """Whether the kernels run that are written in Gluon, for Hopper."""
        return self.has_wgmma and gluon_is_known()

    @property
    def has_dependent_launch(self) -> bool:
        """Whether a kernel may start while its predecessor ends: see `dependent_launch`."""
        return self.backend == "cuda" and int(self.arch.removeprefix("sm")) >= 90


@functools.cache
def gluon_is_known() -> bool:
    """Whether this Triton's Gluon, whose names are not settled, is one that was compiled with."""
    import triton

    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return (3, 6) <= (major, minor) <= (3, 9)


INTERPRETER = Hardware("Triton interpreter", "interpreter", "interpreter", 1, 1 << 30)


@functools.cache
def of(device: torch.device) -> Hardware:
    """The hardware behind a tensor's device.

    Raises:
        DeviceError: Triton cannot drive the device.
    """
    import torch

    properties: Any
    if device.type == "cpu":
        from triton_only_backend import interpreter

        if not interpreter.install_if_wanted():
            raise DeviceError(device)
        return INTERPRETER
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            arch = properties.gcnArchName.split(":")[0]
            return Hardware(properties.name, "hip", arch, properties.multi_processor_count, 65536)
        arch = f"sm{properties.major}{properties.minor}"
        return Hardware(
            properties.name,
            "cuda",
            arch,
            properties.multi_processor_count,
            properties.shared_memory_per_block_optin,
        )
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return Hardware(
            properties.name, "xpu", "xpu", properties.gpu_subslice_count, properties.local_mem_size
        )
    raise DeviceError(device)


def guard(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current: Triton launches on the current device."""
    import torch

    return torch.xpu.device_of(tensor) if tensor.is_xpu else torch.cuda.device_of(tensor)
