"""The kernels that Inductor writes are launched dependent where that is safe and of use."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.utils import counters

from triton_only_backend import audit, inductor_launch
from triton_only_backend.model_audit import audit_with

WAIT, RELEASE = "tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_launch_dependents()"
GRAPHS = {"triton.cudagraphs": True}


def chain(x, w, cache, place):
    """Kernels that read nothing, that read what came long before, that write in place, that loop."""
    y = torch.relu(x) + w
    cache.index_copy_(0, place, y[:2])
    weights = torch.softmax(y @ w.t(), -1)
    total = weights.pow(2).sum(0) + y.sum()
    return torch.arange(64, device=x.device), total, weights + x.mean()


def operands(device: str) -> list[torch.Tensor]:
    x, w = (torch.randn(64, 4096, device=device) for _ in range(2))
    return [x, w, torch.zeros(8, 4096, device=device), torch.tensor([1, 5], device=device)]


@pytest.fixture
def kernels(monkeypatch):
    """Gives the lines of each kernel's body, as it is written for a GPU that is not there."""

    def written(target: str, options: dict) -> list[list[str]]:
        sources = []
        read = audit.audit_source
        monkeypatch.setattr(audit, "audit_source", lambda s: [sources.append(s), read(s)][1])
        audit_with(chain, operands("cpu"), target=target, options=options)
        (source,) = sources
        bodies = re.findall(r"@triton\.jit\ndef \w+\(.*?\):\n(.*?)\n'''", source, re.DOTALL)
        return [[line.strip() for line in body.splitlines()] for body in bodies]

    return written


@pytest.mark.cpu
@pytest.mark.parametrize("target", ["cuda:90", "cuda:100"])
def test_each_kernel_waits_before_it_touches_memory(target, kernels):
    found = kernels(target, GRAPHS)
    assert len(found) >= 5
    for lines in found:
        touching = [
            i for i, line in enumerate(lines) if re.search(r"tl\.(load|store|atomic)", line)
        ]
        loading = [i for i, line in enumerate(lines) if "tl.load" in line]
        assert lines.count(WAIT) == 1, lines
        assert lines.index(WAIT) < touching[0], lines
        assert lines.count(RELEASE) <= 1, lines
        if RELEASE in lines:
            assert lines.index(RELEASE) > loading[-1], lines
    assert any("tl.load" not in " ".join(lines) for lines in found)  # one that reads nothing
    assert any("tl.range" in " ".join(lines) for lines in found)  # one that loops


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("cuda:80", GRAPHS),
        ("cuda:90", {}),
        ("cuda:90", {**GRAPHS, "triton.enable_pdl": False}),
    ],
    ids=["no such GPU", "no CUDA graphs", "switched off"],
)
def test_elsewhere_no_trace_is_left(target, options, kernels):
    found = kernels(target, options)
    assert len(found) >= 5
    assert not any("gdc" in line for lines in found for line in lines)


@pytest.mark.cpu
def test_inductor_alone_would_not_wait_in_each(kernels, monkeypatch):
    """Why this package does it: if this fails, PyTorch has mended it."""
    monkeypatch.setattr(inductor_launch, "waiting_first", nullcontext)
    found = kernels("cuda:90", GRAPHS)
    assert any(WAIT not in lines for lines in found)


@pytest.mark.gpu
def test_replays_are_right(device):
    def step(x, w, cache, place):
        return *chain(x, w, cache := cache.clone(), place), cache

    compiled = torch.compile(step, backend="triton_only", mode="reduce-overhead")
    given = operands(device)
    counters.clear()
    with torch.no_grad():
        for _ in range(20):
            given[0].normal_()
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(*given), step(*given), rtol=1e-3, atol=1e-3)
    assert counters["inductor"]["cudagraph_skips"] == 0
