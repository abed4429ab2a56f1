"""The processes that compile candidates: what they refuse, and that a crash costs one candidate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


# Without the guard that scripts need whose processes are started anew.
WORKER = """
import json
from triton_only_backend.kernels.gemm_choice import heuristic_config
from triton_only_backend.kernels.gemm_configs import GemmConfig, GemmProblem
from triton_only_backend.kernels.hardware import Hardware
from triton_only_backend.tuning.compilation import Job, Pool
from triton_only_backend.tuning.cross_compile import Target

device = Hardware("NVIDIA H200", "cuda", "sm90", 132, 232448)
problem = GemmProblem(1, 64, 4096, 4096, 2, False, True, True)
good = heuristic_config(problem, device)
spills = GemmConfig("gemm", 256, 256, 64, 1, 8, 4, 2)
no_tile = GemmConfig("gemm", 24, 64, 64, 1, 8, 4, 2)
with Pool(Target("cuda", 90, 32), device, processes=1) as pool:
    jobs = [Job("gemm", problem, config) for config in (good, spills, no_tile)]
    for job in jobs:
        pool.submit(job)
    print(json.dumps([pool.result(job) for job in jobs]))
"""
CRASHING = """
import os

def crash_on(job, shared_memory):
    if job.config == "crash":
        os.abort()
"""
CRASHES = """
import crashing
from triton_only_backend.kernels.hardware import INTERPRETER
from triton_only_backend.tuning import compilation
from triton_only_backend.tuning.compilation import Job, Pool

compilation.compile_job = crashing.crash_on
compilation.begin = print
with Pool(None, INTERPRETER, processes=1) as pool:
    jobs = [Job("x", i, c) for i, c in enumerate(["a", "b", "crash", "d", "e"])]
    for job in jobs:
        pool.submit(job)
    print([pool.result(job) for job in jobs])
"""


def run_script(tmp_path: Path, source: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(source)
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environ, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()[-1]


def test_workers_compile_and_say_what_cannot_be_used(tmp_path: Path) -> None:
    good, spills, no_tile = json.loads(run_script(tmp_path, WORKER))
    assert good is None
    assert spills.startswith("spills") or "shared memory" in spills
    assert no_tile.startswith("does not compile")


def test_a_crash_of_the_compiler_costs_one_candidate(tmp_path: Path) -> None:
    (tmp_path / "crashing.py").write_text(CRASHING)
    found = run_script(tmp_path, CRASHES)
    assert found == str([None, None, "the compiler crashed", None, None])
