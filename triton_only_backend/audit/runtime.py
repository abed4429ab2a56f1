"""The third witness: one profiled run, every kernel that the device executed.

A kernel counts as Triton because Triton compiled a kernel of that name in this process and launches
it with blocks of that size, never because its name looks the part. Names and sizes come from live
objects: Triton's compiled kernels and the kernels of Inductor's static launcher. With no GPU the
interpreter's scopes take their place, and every aten op that computes outside of one is a row.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from triton_only_backend.audit import policy
from triton_only_backend.audit.kernel_names import (
    block_sizes,
    classify_kernel,
    interpreted_kernels,
    triton_kernels,
)
from triton_only_backend.audit.kernel_report import KernelEvent as KernelEvent
from triton_only_backend.audit.kernel_report import KernelReport as KernelReport
from triton_only_backend.audit.kernel_report import KernelRow as KernelRow
from triton_only_backend.audit.kernel_report import report_of as report_of
from triton_only_backend.audit.policy import Provider

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

# In Kineto's metadata of a kernel: "block": [128, 1, 1]
_BLOCK = re.compile(r'"block": ?\[(\d+), ?(\d+), ?(\d+)\]')
INTERPRETER_SCOPE = "triton_interpreter::"

# Device events that are not kernels: user annotations and waits, by Kineto's activity type.
_NOT_KERNELS = frozenset({"gpu_user_annotation", "user_annotation", "cuda_sync", "overhead"})


def profile(
    fn: Callable[..., object], *args: object, warmup: int = 3, **kwargs: object
) -> KernelReport:
    """Runs `fn(*args, **kwargs)` once under the profiler and classifies every kernel that ran.

    Kernels inside CUDA graphs are seen too. With no GPU the CPU's ops are read instead, under the
    Triton interpreter; a GPU that is present but idle, because everything was interpreted, is not
    asked.

    Args:
        warmup: runs before it, unprofiled, for compilation, autotuning and CUDA graph capture.
    """
    import torch
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity

    from triton_only_backend import interpreter

    gpu = interpreter.gpu_available() and not interpreter.is_installed()
    for _ in range(warmup):
        fn(*args, **kwargs)
    activities = [ProfilerActivity.CPU]
    if gpu:
        activities.append(
            ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.XPU
        )
        torch.accelerator.synchronize()
    # Kineto's metadata hold the size of a kernel's blocks.
    options: dict[str, Any] = {"expose_kineto_event_metadata": True}  # which its stub lacks
    config = _ExperimentalConfig(**options)
    with torch.profiler.profile(
        activities=activities, experimental_config=config, acc_events=True
    ) as profiler:
        fn(*args, **kwargs)
        if gpu:
            torch.accelerator.synchronize()
    events = _device_events(profiler) if gpu else cpu_events(profiler.events() or ())
    return report_of(events, "gpu" if gpu else "interpreter")


def _device_events(profiler: Any) -> list[KernelEvent]:
    import torch
    from torch._C._autograd import DeviceType

    devices = (DeviceType.CUDA, DeviceType.XPU)
    known = triton_kernels()
    sizes = {} if torch.version.hip else block_sizes()
    return [
        KernelEvent(
            name=e.name(),
            provider=_provider(e, known, sizes),
            time_us=e.duration_ns() / 1e3,
            start_us=e.start_ns() / 1e3,
        )
        for e in profiler.profiler.kineto_results.events()
        if e.device_type() in devices and not _is_annotation(e)
    ]


def _provider(
    event: Any, known: Mapping[str, Provider], sizes: Mapping[str, Collection[int]]
) -> Provider:
    """Whose kernel it is: a Triton kernel's by its name, if its blocks are as Triton has them."""
    name = event.name()
    provider = classify_kernel(name, known)
    block = _BLOCK.search(event.metadata_json() or "")
    if provider.is_triton and block and name in sizes:
        threads = math.prod(int(size) for size in block.groups())
        return provider if threads in sizes[name] else Provider.UNKNOWN
    return provider


def _is_annotation(event: Any) -> bool:
    if hasattr(event, "activity_type"):
        return str(event.activity_type()) in _NOT_KERNELS
    return bool(event.is_user_annotation())


def cpu_events(events: Iterable[Any]) -> list[KernelEvent]:
    """What the CPU computed, from the profiler's function events: each outermost op once.

    Inside an interpreted launch nothing is counted: that is how the interpreter works. An aten op
    that a Triton kernel implements is taken apart.
    """
    known = interpreted_kernels()
    outermost = [event for event in events if event.cpu_parent is None]
    return [found for event in outermost for found in _cpu_event(event, known)]


def _cpu_event(event: Any, known: Mapping[str, Provider]) -> list[KernelEvent]:
    name, time_us = str(event.name), float(event.cpu_time_total)
    start_us = float(event.time_range.start)
    if name.startswith(INTERPRETER_SCOPE):
        kernel = name.removeprefix(INTERPRETER_SCOPE)
        return [KernelEvent(kernel, known.get(kernel, Provider.TRITON_USER), time_us, start_us)]
    inner = [found for child in event.cpu_children for found in _cpu_event(child, known)]
    namespace, separator, op = name.partition("::")
    if not separator or event.is_user_annotation or not f"{namespace}{op}".isidentifier():
        return inner
    if namespace == "aten" and not any(found.provider.is_triton for found in inner):
        provider = policy.eager_provider(f"aten.{op}")
        provider = Provider.CPU if provider.is_compute else provider
        if provider is Provider.NONE:
            return inner
        return [KernelEvent(name, provider, time_us, start_us)]
    verdict = policy.classify_call(f"{namespace}.{op}")
    if inner or verdict.provider in (Provider.NONE, Provider.TRITON_OURS):
        return inner  # an op proves nothing by its name; what it ran is listed
    return [KernelEvent(name, verdict.provider, time_us, start_us)]
