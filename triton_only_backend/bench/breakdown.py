"""Where the microseconds of a step go, by kind of kernel, overlaps counted once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton_only_backend.audit.policy import Provider

if TYPE_CHECKING:
    from triton_only_backend.audit import KernelReport
    from triton_only_backend.audit.kernel_report import KernelEvent

# Parts of a step, in the order of a stacked bar.
PRODUCTS, ATTENTION, INDUCTOR, LIBRARIES, COPIES, GAPS = PARTS = (
    "products",
    "attention",
    "Inductor's kernels",
    "libraries",
    "copies",
    "between kernels",
)
_ATTENTION = ("attention", "combine_splits", "rope_cache", "mask_spans")


def part_of(event: KernelEvent) -> str:
    """The part of a step that a kernel belongs to."""
    if event.provider is Provider.TRITON_OURS:
        return ATTENTION if any(word in event.name for word in _ATTENTION) else PRODUCTS
    if event.provider is Provider.TRITON_INDUCTOR:
        return INDUCTOR
    return LIBRARIES if event.provider.is_compute else COPIES


def breakdown(report: KernelReport) -> dict[str, float]:
    """Microseconds of each part, adding up to the time from the first kernel to the last.

    A kernel counts from where the one before it ended, so that dependent launch, under which a
    kernel starts early and waits, is not counted twice.
    """
    found = dict.fromkeys(PARTS, 0.0)
    events = sorted(report.events, key=lambda event: event.start_us + event.time_us)
    last = events[0].start_us if events else 0.0
    for event in events:
        end = event.start_us + event.time_us
        found[GAPS] += max(0.0, event.start_us - last)
        found[part_of(event)] += end - max(last, event.start_us)
        last = end
    return found
