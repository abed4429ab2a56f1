"""A model audited as it would be compiled for a CUDA device that is not there."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triton_only_backend import cli, inductor_target, interpreter
from triton_only_backend.audit import Provider
from triton_only_backend.errors import SettingsError
from triton_only_backend.model_audit import audit_with

pytestmark = pytest.mark.cpu


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        y = self.norm(x)[:, None]
        y = F.scaled_dot_product_attention(y, y, y, is_causal=True)[:, 0]
        return x + self.down(F.gelu(self.up(y))) + torch.arange(16)


def test_a_clean_model_is_clean_forward_and_backward():
    report = audit_with(Net(), [torch.randn(2, 8, 16)], target="cuda:90")
    assert report.is_triton_only, report.to_short_text()
    assert [name.split("(")[1] for name in report.graphs] == ["forward)", "backward)"]
    assert report.operations[Provider.TRITON_INDUCTOR] > 0
    assert report.environment == {"target": "cuda:90"}
    assert report.cudagraphs is None


@pytest.mark.parametrize("target", ["cuda:80", "cuda:120"])
def test_findings_are_told_as_ever(target):
    """A short row is sorted by Inductor's Triton; one of a row is found by ATen."""

    def function(a):
        return a.sort(-1)[0], torch.kthvalue(a, 2)[0]

    report = audit_with(function, [torch.randn(4, 32)], target=target)
    (finding,) = report.findings
    assert (finding.op, finding.provider) == ("aten.kthvalue.default", Provider.ATEN)
    assert "test_audit_target.py" in finding.source_line
    assert finding.call == "torch.ops.aten.kthvalue.default"


def test_a_graph_may_hold_constants():
    """A tensor that the model's code writes down is a real one, among fake ones."""

    def function(a):
        return torch.tensor([1.0, 2.0, 3.0, 4.0]) @ a * torch.tensor(2.0)

    assert audit_with(function, [torch.randn(4, 32)], target="cuda:90").is_triton_only


def test_a_long_row_is_sorted_by_a_library_there_too():
    report = audit_with(lambda a: a.sort(-1)[0], [torch.randn(2, 5000)], target="cuda:90")
    assert [f.provider for f in report.findings] == [Provider.CUB]


def test_sizes_may_be_symbols():
    report = audit_with(Net(), [torch.randn(3, 7, 16)], dynamic=True, target="cuda:90")
    assert report.is_triton_only
    assert any("s" in text for row in report.ops for text in row.inputs)


def test_the_code_is_for_the_device(monkeypatch):
    from triton_only_backend import audit

    seen = []
    read = audit.audit_source
    monkeypatch.setattr(
        audit, "audit_source", lambda source: [seen.append(source), read(source)][1]
    )
    audit_with(lambda a: torch.relu(a) + 1, [torch.randn(64)], target="cuda:90")
    (source,) = seen
    assert "type='cuda'" in source
    assert "cc=90" in source
    assert "empty_strided_cuda" in source
    assert "cpp_fused" not in source


def test_nothing_of_it_stays():
    active = torch.cuda.is_available(), torch.cuda.device_count()
    audit_with(torch.relu, [torch.randn(8)], target="cuda:90")
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == active
    assert interpreter.is_installed()
    x = torch.randn(8, 8)
    compiled = torch.compile(lambda a: torch.relu(a @ a), backend="triton_only")
    torch.testing.assert_close(compiled(x), torch.relu(x @ x))


@pytest.mark.parametrize("target", ["cuda", "cuda:7", "cuda:91", "hip:gfx942", ""])
def test_an_unknown_target_is_named(target):
    with pytest.raises(SettingsError, match=r"unknown target .*one of cuda:80, cuda:86"):
        inductor_target.parse(target)


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["triton-only", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return ended.value.code


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(
        textwrap.dedent("""
            import torch

            def make():
                return torch.nn.Linear(8, 8), (torch.randn(2, 8),)
        """)
    )
    return path


def test_the_command_line(model, monkeypatch, tmp_path):
    written = tmp_path / "audit.json"
    assert run(monkeypatch, "audit", f"{model}:make", "--target", "cuda:90", "--json", written) == 0
    environment = json.loads(written.read_text())["environment"]
    assert environment["target"] == "cuda:90"
    assert environment["gpu"] is None


@pytest.mark.parametrize("extra", [["--run"], ["--target", "cuda:1"]])
def test_what_the_command_line_refuses(extra, model, monkeypatch):
    assert run(monkeypatch, "audit", f"{model}:make", "--target", "cuda:90", *extra) == 2
