"""Programmatic dependent launch: a kernel starts while the one before it still runs.

A kernel launched with `launch_options(device)` may be scheduled before its predecessor in the
stream has finished. It must call `wait_for_producers` before it touches anything that another
kernel wrote or still reads; what no kernel writes (weights) may be prefetched before. The wait
returns when all earlier kernels have finished and their writes are visible: safe whatever runs
before or after, since a kernel launched without the attribute waits for everything anyway.
`release_dependents` says that the next kernel may be scheduled; it promises nothing about memory.

Release late, when the reading is done. Released at their start, the next kernel's blocks take what
room the running one leaves, crowd on some of the multiprocessors, and stay there: a decode step of
Llama-3-8B on an H200 took 4.52 ms so, 4.19 without dependent launch, and 4.12 released after the
main loop. Bringing weights to the L2 cache before the wait made it slower again (4.15), also those
of the output projection while attention, which reads little, runs (0.03 to 0.14 ms a step more).

Release early where the next kernel has one program a multiprocessor, which starts where there is
room: `ring_linear` does, and reads weights before it waits; `short_cache_attention` releases before
it has waited itself, if its caller vouches for what the next kernel reads early (see the pass
`mark_ready_inputs`). A step takes 3.61 ms so.

Hopper and later (PTX `griddepcontrol`); elsewhere both calls compile to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from triton.language.extra import cuda

if TYPE_CHECKING:
    from triton_only_backend.kernels.hardware import Hardware


@triton.jit
def wait_for_producers(PDL: tl.constexpr):
    if PDL:
        cuda.gdc_wait()


@triton.jit
def release_dependents(PDL: tl.constexpr):
    if PDL:
        cuda.gdc_launch_dependents()


@triton.jit
def prefetch_to_l2(ptrs):
    """Asks for the 128-byte lines that the pointers lie in; changes nothing that is read later."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def launch_options(device: Hardware) -> dict[str, Any]:
    """What a kernel's launch takes: PDL=… for the kernel, and launch_pdl where it is on."""
    if not device.has_dependent_launch:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
