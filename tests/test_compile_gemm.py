"""Compiles the products' kernels, with the configurations chosen, for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import cross_compile
target = sys.argv[2]
compiled = cross_compile.compile_for(target)
from triton_only_backend.kernels import matmul
from triton_only_backend.kernels import hardware
hardware.of = lambda device: cross_compile.TARGETS[target][2]
SHAPES = json.loads(sys.argv[3])
for dtype in (torch.bfloat16, torch.float32):
    for M, N, K, k_major in SHAPES:
        a = torch.empty(1, M, K, dtype=dtype)
        b = torch.empty(1, N, K, dtype=dtype).mT if k_major else torch.empty(1, K, N, dtype=dtype)
        out = torch.empty(1, M, N, dtype=dtype)
        before = len(compiled)
        matmul.matmul(a, b, torch.empty(N, dtype=dtype), out)
        for c in compiled[before:]:
            row = dict(name=c.name, registers=c.registers, spilled=c.spilled,
                       shared=c.shared_memory, problem=[str(dtype), M, N, K, k_major],
                       wgmma="wgmma.mma" in c.asm.get("ptx", ""),
                       tma="cp.async.bulk.tensor" in c.asm.get("ptx", ""))
            print(json.dumps(row))
"""
QUICK = [(1, 4096, 4096, True), (16, 4096, 14336, True), (512, 4096, 4096, False)]
ALL = [
    (M, N, K, k_major)
    for M in (1, 2, 8, 33, 64, 128, 512, 4096)
    for N, K in ((1024, 4096), (4096, 14336), (28672, 4096), (495, 5333))
    for k_major in (True, False)
]


def compile_for(target: str, shapes: list[tuple[int, int, int, bool]]) -> list[dict]:
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), target, json.dumps(shapes)],
        capture_output=True,
        text=True,
        env=environ,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(target: str, rows: list[dict]) -> None:
    from cross_compile import TARGETS

    limit = TARGETS[target][2].shared_memory
    for row in rows:
        assert row["shared"] <= limit, row
        # Of no weight: two or four registers that ptxas keeps on the stack below its limit of 255.
        assert row["spilled"] <= 16, row


@pytest.fixture(autouse=True)
def tests_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize("target", ["sm80", "sm90", "gfx942"])
def test_first_choices_fit_and_do_not_spill(target):
    rows = compile_for(target, QUICK)
    assert {row["name"] for row in rows} >= {"gemv_kernel"}
    check(target, rows)
    if target == "sm90":
        large = [r for r in rows if r["name"] == "gemm_tma_kernel"]
        assert large
        assert all(r["wgmma"] and r["tma"] for r in large)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", ["sm80", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950"])
def test_every_choice_fits_and_does_not_spill(target):
    check(target, compile_for(target, ALL))
