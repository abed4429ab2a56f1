"""The third witness: one profiled run, every kernel that the device executed.

A kernel counts as Triton because Triton compiled a kernel of that name in this process, never
because its name looks the part. The names come from live objects: Triton's compiled kernels and the
kernels of Inductor's static launcher. With no GPU the interpreter's scopes take their place, and
every aten op that computes outside of one is a row.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from triton_only_backend.audit import policy, render
from triton_only_backend.audit.kernel_names import (
    classify_kernel,
    interpreted_kernels,
    triton_kernels,
)
from triton_only_backend.audit.policy import Provider

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rich.console import RenderableType

INTERPRETER_SCOPE = "triton_interpreter::"

# Ops that copy or fill when called by themselves; the rest of the non-compute ops are the policy's.
_COPIES = frozenset({"to", "_to_copy", "copy_", "clone", "contiguous", "cpu", "cuda", "copy"})
_FILLS = frozenset({"zero_", "zeros", "zeros_like", "new_zeros"})
# Device events that are not kernels: user annotations and waits, by Kineto's activity type.
_NOT_KERNELS = frozenset({"gpu_user_annotation", "user_annotation", "cuda_sync", "overhead"})


@dataclass(frozen=True)
class KernelRow:
    """All launches of one kernel.

    Attributes:
        name: as the profiler has it; an op's name where the CPU ran it.
        time_us: device time, or CPU time with no GPU, in microseconds.
        share: of the compute time; 0 for copies, fills and communication.
    """

    name: str
    provider: Provider
    count: int
    time_us: float
    share: float

    @property
    def is_violation(self) -> bool:
        """Whether the kernel breaks "Triton only"."""
        return self.provider.is_violation


@dataclass(frozen=True)
class KernelReport:
    """Every kernel of one run, the longest first.

    Attributes:
        rows: one for each kernel name.
        device: "gpu", or "interpreter" where the CPU stood in for it.
    """

    rows: tuple[KernelRow, ...]
    device: str

    @property
    def violations(self) -> tuple[KernelRow, ...]:
        """The kernels outside Triton, those that nobody knows included."""
        return tuple(row for row in self.rows if row.is_violation)

    @property
    def launches(self) -> int:
        """How many kernels, copies and fills were executed."""
        return sum(row.count for row in self.rows)

    @property
    def triton_time_share(self) -> float:
        """Triton's part of the compute time, 0 to 1; 0 when nothing was computed."""
        compute = sum(row.time_us for row in self.rows if row.provider.is_compute)
        triton = sum(row.time_us for row in self.rows if row.provider.is_triton)
        return triton / compute if compute else 0.0

    @property
    def is_triton_only(self) -> bool:
        """Whether Triton kernels ran, and no others but copies, fills and collectives."""
        return not self.violations and any(row.provider.is_triton for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "schema": "triton_only_backend.kernels",
            "schema_version": 1,
            "device": self.device,
            "is_triton_only": self.is_triton_only,
            "triton_time_share": self.triton_time_share,
            "launches": self.launches,
            "rows": [
                {**asdict(row), "provider": row.provider.value, "is_violation": row.is_violation}
                for row in self.rows
            ],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_text(self, width: int = 120) -> str:
        """The report as a plain table."""
        return render.to_text(self.__rich__(), width)

    def __rich__(self) -> RenderableType:
        return render.kernel_renderable(self)


@dataclass(frozen=True)
class KernelEvent:
    """One execution of a kernel, as the profiler saw it."""

    name: str
    provider: Provider
    time_us: float


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
    with torch.profiler.profile(activities=activities) as profiler:
        fn(*args, **kwargs)
        if gpu:
            torch.accelerator.synchronize()
    events = _device_events(profiler) if gpu else cpu_events(profiler.events() or ())
    return report_of(events, "gpu" if gpu else "interpreter")


def report_of(events: Iterable[KernelEvent], device: str) -> KernelReport:
    """Adds up the events of each kernel."""
    totals: dict[tuple[str, Provider], tuple[int, float]] = {}
    for event in events:
        count, time_us = totals.get((event.name, event.provider), (0, 0.0))
        totals[event.name, event.provider] = (count + 1, time_us + event.time_us)
    compute = sum(time for (_, provider), (_, time) in totals.items() if provider.is_compute)
    rows = [
        KernelRow(
            name=name,
            provider=provider,
            count=count,
            time_us=time_us,
            share=time_us / compute if compute and provider.is_compute else 0.0,
        )
        for (name, provider), (count, time_us) in totals.items()
    ]
    return KernelReport(tuple(sorted(rows, key=lambda row: -row.time_us)), device)


def _device_events(profiler: Any) -> list[KernelEvent]:
    from torch._C._autograd import DeviceType

    devices = (DeviceType.CUDA, DeviceType.XPU)
    known = triton_kernels()
    return [
        KernelEvent(e.name(), classify_kernel(e.name(), known), e.duration_ns() / 1e3)
        for e in profiler.profiler.kineto_results.events()
        if e.device_type() in devices and not _is_annotation(e)
    ]


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
    if name.startswith(INTERPRETER_SCOPE):
        kernel = name.removeprefix(INTERPRETER_SCOPE)
        return [KernelEvent(kernel, known.get(kernel, Provider.TRITON_USER), time_us)]
    inner = [found for child in event.cpu_children for found in _cpu_event(child, known)]
    namespace, separator, op = name.partition("::")
    if not separator or event.is_user_annotation or not f"{namespace}{op}".isidentifier():
        return inner
    if namespace == "aten" and not any(found.provider.is_triton for found in inner):
        provider = _aten_provider(op)
        return inner if provider is Provider.NONE else [KernelEvent(name, provider, time_us)]
    verdict = policy.classify_call(f"{namespace}.{op}")
    if inner or verdict.provider in (Provider.NONE, Provider.TRITON_OURS):
        return inner  # an op proves nothing by its name; what it ran is listed
    return [KernelEvent(name, verdict.provider, time_us)]


def _aten_provider(op: str) -> Provider:
    if op in _COPIES:
        return Provider.MEMCPY
    if op in _FILLS:
        return Provider.MEMSET
    provider = policy.classify_call(f"aten.{op}").provider
    return provider if not provider.is_compute else Provider.CPU
