"""Compiles the products' kernels, with the configurations chosen, for GPUs that are not there."""

from __future__ import annotations

import json

import pytest
from cross_compile import TARGETS, rows_of

from triton_only_backend.kernels.shipped_tables import shipped_tables

SCRIPT = """
import json, sys
import cross_compile
target = sys.argv[1]
hardware = cross_compile.TARGETS[target][2]
from triton_only_backend.tuning import compilation
from triton_only_backend.tuning.cross_compile import Target
backend, arch, _ = cross_compile.TARGETS[target]
compilation.begin(Target(backend, arch, 64 if backend == "hip" else 32), hardware)
compiled = compilation._compiled
import torch
import triton_only_backend
from triton_only_backend.kernels import matmul
from triton_only_backend.kernels.gemm_choice import select_config
from triton_only_backend.tuning.compilation import Job, compiled_as
from triton_only_backend.tuning.spaces import decode_problem
from triton_only_backend.tuning.trial import call, fp32_precision

work = json.loads(sys.argv[2])
def report(problem, before):
    for c in compiled[before:]:
        row = dict(name=c.name, registers=c.registers, spilled=c.spilled,
                   shared=c.shared_memory, problem=problem,
                   wgmma="wgmma.mma" in c.asm.get("ptx", ""),
                   tma="cp.async.bulk.tensor" in c.asm.get("ptx", ""))
        print(json.dumps(row))

for dtype in (torch.bfloat16, torch.float32):
    for M, N, K, k_major in work["shapes"]:
        a = torch.empty(1, M, K, dtype=dtype)
        b = torch.empty(1, N, K, dtype=dtype).mT if k_major else torch.empty(1, K, N, dtype=dtype)
        out = torch.empty(1, M, N, dtype=dtype)
        before = len(compiled)
        matmul.matmul(a, b, torch.empty(N, dtype=dtype), out)
        report([str(dtype), M, N, K, k_major], before)
for M, N, K, gated in work["fused"]:
    like = dict(dtype=torch.bfloat16)
    weights = [torch.empty(N, K, **like) for _ in range(1 + gated)]
    before = len(compiled)
    torch.ops.triton_only.linear_fused(
        torch.empty(M, K, **like), weights, [], norm_weight=torch.empty(K, **like), norm_eps=1e-5,
        activation="silu", gated=gated, residual=torch.empty(M, N, **like),
    )
    report(["linear_fused", M, N, K, gated], before)
seen = set()
for text in work["tables"]:
    problem = decode_problem("gemm", text)
    key = compiled_as(Job("gemm", problem, select_config(problem, hardware)), hardware.num_sms)
    if key not in seen:
        seen.add(key)
        before = len(compiled)
        with fp32_precision(problem):
            call("gemm", problem, torch.device("cpu"))()
        report(text, before)
"""
QUICK = {
    "shapes": [
        (1, 4096, 4096, True),
        (16, 4096, 14336, True),
        (512, 4096, 4096, False),
        (256, 10240, 8192, True),
        (512, 28672, 4096, True),
        *((M, 5333, K, True) for M in (1, 2, 4) for K in (495, 2001)),
    ],
    "fused": [(1, 4096, 4096, True), (64, 4096, 4096, False)],
    "tables": [],
}
# Every problem of every table: on the table's own architecture its configuration, elsewhere the
# heuristic's choice.
IN_TABLES = sorted(
    {problem for table in shipped_tables() for problem in table["entries"].get("gemm", {})}
)
ALL = {
    "shapes": [
        (M, N, K, k_major)
        for M in (1, 2, 8, 33, 64, 128, 512, 4096)
        for N, K in ((1024, 4096), (4096, 14336), (28672, 4096), (495, 5333))
        for k_major in (True, False)
    ],
    "fused": [
        (M, N, K, gated)
        for M in (1, 2, 16, 64, 512)
        for N, K in ((1024, 4096), (14336, 4096), (33, 100))
        for gated in (False, True)
    ],
    "tables": IN_TABLES,
}


def compile_for(target: str, work: dict) -> list[dict]:
    return rows_of(SCRIPT, target, json.dumps(work))


def check(target: str, rows: list[dict]) -> None:
    limit = TARGETS[target][2].shared_memory
    for row in rows:
        assert row["shared"] <= limit, row
        # Of no weight: two or four registers that ptxas keeps on the stack below its limit of 255.
        assert row["spilled"] <= 16, row


@pytest.mark.parametrize("target", ["sm80", "sm90", "gfx942"])
def test_first_choices_fit_and_do_not_spill(target):
    rows = compile_for(target, {**QUICK, "tables": IN_TABLES[::16]})
    assert {row["name"] for row in rows} >= {"gemv_kernel"}
    check(target, rows)
    if target == "sm90":
        large = [r for r in rows if r["name"] in ("gemm_tma_kernel", "gemm_hopper_kernel")]
        assert {r["name"] for r in large} == {"gemm_tma_kernel", "gemm_hopper_kernel"}
        assert all(r["wgmma"] and r["tma"] for r in large)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", ["sm80", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950"])
def test_every_choice_fits_and_does_not_spill(target):
    check(target, compile_for(target, ALL))
