"""Loads kernel modules on first use: registering the ops stays light, and needs no Triton yet.

Whether `@triton.jit` compiles or interprets is decided where a kernel is defined, so the
interpreter is switched on here, before the first kernel module is imported.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from triton_only_backend import interpreter


@functools.cache
def load(name: str) -> Any:
    """The module `triton_only_backend.kernels.<name>`."""
    interpreter.install_if_wanted()
    return importlib.import_module(f"triton_only_backend.kernels.{name}")
