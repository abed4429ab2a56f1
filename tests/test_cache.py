"""Inductor's graph cache: hits give the same code and the same audit; every change is a miss."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from triton_only_backend import inductor
from triton_only_backend.backend import Compilation, compiled_reports
from triton_only_backend.passes import pipeline
from triton_only_backend.settings import Settings


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    yield
    torch._dynamo.reset()


def model(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ x) @ x.double().float()


def without_serials(report) -> dict:
    """The report, with graph 7 (forward) called graph (forward)."""
    return json.loads(re.sub(r"graph \d+ ", "graph ", report.to_json()))


def compile_and_train(device: str, **options) -> tuple[int, int, list[dict]]:
    """Compiles anew; hits and misses, and the reports without their graphs' serial numbers."""
    torch._dynamo.reset()
    counters.clear()
    before = len(compiled_reports())
    x = torch.ones(4, 4, device=device, requires_grad=True)
    torch.compile(model, backend="triton_only", options=options)(x).sum().backward()
    reports = [without_serials(report) for report in compiled_reports()[before:]]
    found = counters["inductor"]
    assert found["fxgraph_cache_bypass"] == 0
    return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"], reports


def test_a_second_compilation_hits_with_the_same_reports(device):
    hits, misses, reports = compile_and_train(device)
    assert (hits, misses, len(reports)) == (0, 2, 2)
    assert compile_and_train(device) == (2, 0, reports)


def test_a_violation_is_found_in_cached_code_too(device):
    options = {"disable_passes": ["rewrite_matmul"], "on_violation": "ignore"}
    assert compile_and_train(device, **options)[:2] == (0, 2)
    hits, _, reports = compile_and_train(device, **options)
    assert hits == 2
    assert [report["is_triton_only"] for report in reports] == [False, False]
    assert reports[0]["findings"][0]["source_line"].startswith("tests/test_cache.py:")


@pytest.mark.parametrize(
    "options",
    [
        {"deterministic": False},
        {"disable_passes": ["rewrite_attention"]},
        {"max_fusion_size": 8},
    ],
    ids=str,
)
def test_other_settings_are_a_miss(options, device):
    compile_and_train(device)
    assert compile_and_train(device, **options)[:2] == (0, 2)


def test_judging_settings_are_a_hit(device):
    compile_and_train(device)
    assert compile_and_train(device, on_violation="warn", allow=["nccl"])[:2] == (2, 0)


def test_other_sources_are_a_miss(device, monkeypatch):
    compile_and_train(device)
    monkeypatch.setattr(pipeline, "source_hash", lambda: "changed")
    assert compile_and_train(device)[:2] == (0, 2)


@pytest.mark.parametrize(
    "changed", ["passes/rewrite_matmul.py", "kernels/ops.py", "kernels/tables/sm90.json"]
)
def test_the_hash_of_the_sources_covers(changed, tmp_path, monkeypatch):
    folders = {}
    for module in (pipeline, pipeline.triton_only_backend.kernels):
        source = pipeline.Path(module.__file__).parent
        folders[source.name] = shutil.copytree(source, tmp_path / source.name)
    (tmp_path / "kernels" / "tables").mkdir(exist_ok=True)
    (tmp_path / "kernels" / "tables" / "sm90.json").write_text("{}")
    assert set(folders) == {"passes", "kernels"}

    def source_hash() -> str:
        pipeline.source_hash.cache_clear()
        return pipeline.source_hash()

    original = source_hash()
    kernels = pipeline.triton_only_backend.kernels
    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "passes" / "pipeline.py"))
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels" / "__init__.py"))
    copied = source_hash()
    assert source_hash() == copied
    path = tmp_path / changed
    path.write_text(path.read_text() + "\n")
    assert source_hash() != copied
    monkeypatch.undo()
    assert source_hash() == original


def test_the_users_own_passes_run_and_count():
    """A hook that the user fills is kept, after ours, and is part of the key."""
    ran = []
    users = inductor.graph_pass("users", "1", lambda graph: ran.append(graph))
    config = Compilation(Settings(inductor={"post_grad_custom_post_pass": users}))._config(True)
    plain = Compilation(Settings())._config(True)
    chained = config["post_grad_custom_post_pass"]
    assert chained.uuid() != plain["post_grad_custom_post_pass"].uuid()
    assert (
        chained.uuid()
        == Compilation(Settings(inductor={"post_grad_custom_post_pass": users}))
        ._config(True)["post_grad_custom_post_pass"]
        .uuid()
    )
    graph = torch.fx.Graph()
    chained(graph)
    assert ran == [graph]


SCRIPT = """
import json, sys, torch
from torch._dynamo.utils import counters
from triton_only_backend.backend import compiled_reports
x = torch.ones(4, 4, device=sys.argv[1], requires_grad=True)
torch.compile(lambda x: torch.relu(x @ x), backend="triton_only")(x).sum().backward()
found = counters["inductor"]
print(json.dumps([found["fxgraph_cache_hit"], [r.to_dict() for r in compiled_reports()]]))
"""


def test_a_fresh_process_hits_with_the_same_reports(device):
    results = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, device], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        results.append(json.loads(run.stdout))
    assert [hits for hits, _ in results] == [0, 2]
    assert results[0][1] == results[1][1]
