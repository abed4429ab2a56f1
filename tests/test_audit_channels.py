"""PyTorch's own channels: TORCH_LOGS and the structured trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

import triton_only_backend as tob
from triton_only_backend.audit import AuditReport

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import sys, torch
x = torch.randn(4, 4, device=sys.argv[1], dtype=torch.float64, requires_grad=True)
def f(x):
    return torch.relu(x.float() @ x.float()) + (x @ x)
options = {"on_violation": "ignore"}
torch.compile(f, backend="triton_only", options=options)(x).sum().backward()
"""


def output(device, **environment) -> str:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, device],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stderr


def test_torch_logs_shows_what_fired_what_was_declined_and_the_findings(device):
    logged = output(device, TORCH_LOGS="triton_only")
    assert "pass rewrite_matmul (aten): fired 1, declined 1" in logged
    assert "declined 1: the kernels take float16, bfloat16 and float32" in logged
    assert "graph 0 (forward): 1 operation would run outside Triton" in logged
    assert "graph 0 (backward): 2 operations would run outside Triton" in logged
    assert "before rewrite_matmul" not in logged
    assert "[0/0" in logged  # PyTorch's compile id


def test_a_plus_shows_the_graphs_too(device):
    assert "before rewrite_matmul (aten)" in output(device, TORCH_LOGS="+triton_only")


def test_it_is_silent_unless_asked(device):
    assert "pass rewrite_matmul" not in output(device)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_the_structured_trace_holds_the_report(kind, device, tmp_path):
    output(device, TORCH_TRACE=str(tmp_path))
    (trace,) = tmp_path.iterdir()
    artifacts = read_artifacts(trace)
    report = AuditReport.from_json(artifacts[f"triton_only_audit_graph_0_{kind}", "json"])
    assert report.graphs == [f"graph 0 ({kind})"]
    assert report.findings
    assert all("mm" in f.op for f in report.findings)
    assert [row.name for row in report.passes if row.declined] == ["rewrite_matmul"]
    text = artifacts[f"triton_only_audit_graph_0_{kind}_text", "string"]
    assert text.startswith(report.to_text()[:40])


def test_why_a_cuda_graph_was_skipped_at_run_time_is_in_the_report(device):
    from torch._inductor import cudagraph_utils

    reason = "skipping cudagraphs due to mutated inputs (1 instances). Found from : net.py, line 3"

    @torch.compiler.disable
    def skip():
        cudagraph_utils.log_cudagraph_skip_and_bump_counter(reason)

    def function(a):
        skip()
        return torch.relu(a)

    report = tob.audit(function, torch.ones(8, device=device))
    assert report.cudagraphs == {"on": True, "skipped": [reason]}
    assert "mark_static_address" in report.to_text()


def read_artifacts(trace: Path) -> dict[tuple[str, str], str]:
    """Name and encoding of each artifact -> its payload: the lines after it, indented by a tab."""
    found: dict[tuple[str, str], list[str]] = {}
    payload: list[str] = []
    for line in trace.read_text().splitlines():
        if line.startswith("\t"):
            payload.append(line[1:])
            continue
        payload = []
        record = json.loads(line[line.index("{") :]) if "{" in line else {}
        if "artifact" in record:
            artifact = record["artifact"]
            found[artifact["name"], artifact["encoding"]] = payload
    return {key: "\n".join(lines) for key, lines in found.items()}
