"""Programmatic dependent launch of the kernels that Inductor writes, as of ours.

A kernel so launched starts while the one before it still runs (`kernels.dependent_launch`).
Inductor writes its kernels so with `triton.enable_pdl`, on Hopper and later and nowhere else, and
has them wait before the first access to what the very last kernel wrote, by name. That is not
always enough:

- a kernel that reads nothing (`arange`, `full`) never waits, and may end before its predecessor;
  the next one waits for it alone, and then reads what the predecessor is still writing;
- what a kernel writes may lie in memory that was another buffer's, which the last one still reads.

Here each of them waits before it touches any memory, as ours do: all that came before has then
ended and can be seen, whatever it was and wherever it wrote.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

HOOK = "_filter_pdl"  # called with a kernel's finished body


def options() -> dict[str, Any]:
    """Inductor's options where CUDA graphs are on.

    Without them the host sets the pace, and Inductor's faster launcher launches nothing dependent.
    """
    from torch._inductor.codegen.triton import TritonKernel

    return {"triton.enable_pdl": hasattr(TritonKernel, HOOK)}


def waiting_first() -> AbstractContextManager[object]:
    """Each kernel that Inductor writes for dependent launch meanwhile waits before all else."""
    from torch._inductor.codegen.triton import TritonKernel

    if not hasattr(TritonKernel, HOOK):
        return contextlib.nullcontext()
    return mock.patch.object(TritonKernel, HOOK, _wait_first)


def _wait_first(kernel: Any, body: Any) -> None:
    """Leaves of the waits in a kernel's body one, at its start, and of the releases the last."""
    if not kernel._enable_pdl_codegen():
        return
    lines = [line for line in body._lines if not _is(line, kernel.GDC_WAIT)]
    releases = [place for place, line in enumerate(lines) if _is(line, kernel.GDC_LAUNCH)]
    for place in reversed(releases[:-1]):
        del lines[place]
    body._lines = [kernel.GDC_WAIT, *lines]


def _is(line: Any, call: str) -> bool:
    return isinstance(line, str) and line.strip() == call
