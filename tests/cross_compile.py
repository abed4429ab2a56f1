"""The GPUs that the tests compile kernels for, in a process of its own; see tuning/cross_compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.hardware import Hardware
from triton_only_backend.tuning.cross_compile import Compiled as Compiled
from triton_only_backend.tuning.cross_compile import Target, compile_only

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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


def compile_for(target: str) -> list[Compiled]:
    """Turns launches into compilations for the target; returns the list they are added to."""
    backend, arch, device = TARGETS[target]
    hardware.of = lambda _: device  # type: ignore[assignment]
    return compile_only(Target(backend, arch, 64 if backend == "hip" else 32))


def rows_of_gluon(program: str, forms: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Each of the forms that a file compiles of a kernel in Gluon, and its row; see `rows_of`.

    Skips the test where this Triton's Gluon is not known.
    """
    if not hardware.gluon_is_known():
        pytest.skip("no Gluon that is known")
    rows = rows_of(program)
    assert len(rows) == len(forms)
    for form, row in zip(forms, rows, strict=True):
        print(form, row)
        yield form, row


def assembler_warnings(ptx: str) -> list[str]:
    """What ptxas says of PTX for sm_90a beyond its registers: wgmma that is serialised, for one."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(90).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run(
            [tool, "-arch=sm_90a", "-v", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stderr.splitlines() if "(C" in line or "warning" in line]


def rows_of(program: str, *arguments: str) -> list[Any]:
    """What a program prints, a line of JSON each, in a process where Triton compiles.

    Args:
        program: the path of a file, or Python text; either may import this module.
    """
    tests = Path(__file__).resolve().parent
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(tests.parent), str(tests), environ.get("PYTHONPATH", "")]
    environ["PYTHONPATH"] = os.pathsep.join(paths)
    how = [program] if program.endswith(".py") else ["-c", program]
    done = subprocess.run(
        [sys.executable, *how, *arguments],
        capture_output=True, text=True, check=False, env=environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
