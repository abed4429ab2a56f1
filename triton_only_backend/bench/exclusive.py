"""One measurement at a time on a GPU, whatever else the machine is compiling."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def exclusive(device: torch.device) -> Iterator[None]:
    """Holds the machine's lock on a GPU: benchmarks side by side compile together, and wait here.

    Compiling a model takes a minute of one core, measuring it some seconds of the GPU. On a CPU
    nothing is locked.
    """
    if device.type == "cpu":
        yield
        return
    name = torch.cuda.get_device_properties(device).uuid
    with FileLock(Path(tempfile.gettempdir()) / f"triton-only-bench-{name}.lock"):
        torch.cuda.synchronize(device)
        yield
