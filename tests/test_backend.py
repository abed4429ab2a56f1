"""The backend from outside: settings, violations, reports, and what comes of them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from compiling import compiled, float64_product
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from triton_only_backend import interpreter
from triton_only_backend.backend import check_devices, compiled_reports
from triton_only_backend.errors import AuditError, DeviceError, SettingsError


@pytest.fixture
def net(device) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).to(
        device
    )


def test_needs_no_import_of_ours():
    code = (
        "import sys, torch\n"
        "assert 'triton_only' in torch._dynamo.list_backends()\n"
        "assert not [m for m in sys.modules if m.startswith('triton_only')]\n"
        "x = torch.ones(2, 2, device='cuda' if torch.cuda.is_available() else 'cpu')\n"
        "print(torch.compile(torch.mm, backend='triton_only')(x, x).sum().item())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "8.0\n", run.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"fullgraph": True},
        {"dynamic": True},
        {"options": {"max_autotune": True, "triton.unique_kernel_names": True}},
        {"options": {"pattern_matcher": False}},
    ],
    ids=str,
)
def test_modes_and_options(options, net, device):
    x = torch.randn(3, 8, device=device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(net, **options)(x), net(x), rtol=1e-4, atol=1e-5)
    assert compiled_reports()[-1].is_triton_only


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"options": {"alow": []}}, r"did you mean \"allow\""),
        (
            {"options": {"disable_passes": ["rewrite_matmu"]}},
            r"no pass is named 'rewrite_matmu'; did you mean \"rewrite_matmul\"",
        ),
    ],
    ids=["mode", "option", "pass"],
)
def test_wrong_settings_are_named(options, message, net, device):
    with pytest.raises(SettingsError, match=message):
        compiled(net, **options)(torch.ones(3, 8, device=device))


def test_an_unknown_variable_is_named(net, device, monkeypatch):
    monkeypatch.setenv("TRITON_ONLY_ALOW", "nccl")
    with pytest.raises(SettingsError, match="TRITON_ONLY_ALOW"):
        compiled(net)(torch.ones(3, 8, device=device))


@pytest.mark.parametrize("suppress", [False, True], ids=["plain", "suppress_errors"])
def test_a_cpu_without_the_interpreter_is_refused(suppress, net, monkeypatch):
    monkeypatch.setattr(interpreter, "install_if_wanted", lambda: False)
    with (
        torch._dynamo.config.patch(suppress_errors=suppress),
        pytest.raises(DeviceError, match=r"device 'cpu'; move the model .*TRITON_INTERPRET=1"),
    ):
        compiled(net.cpu())(torch.ones(3, 8))


def test_a_device_that_triton_cannot_drive_is_named():
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    (x,) = gm.graph.find_nodes(op="placeholder")
    with FakeTensorMode() as mode:
        x.meta["example_value"] = FakeTensor(mode, torch.empty(2, device="meta"), "mps")
    with pytest.raises(DeviceError, match=r"device 'mps.*'; move .* to a CUDA, ROCm or XPU"):
        check_devices(gm)


@pytest.mark.parametrize("suppress", [False, True], ids=["plain", "suppress_errors"])
def test_a_violation_is_raised_unwrapped_with_its_source_line(suppress, device):
    with (
        torch._dynamo.config.patch(suppress_errors=suppress),
        pytest.raises(AuditError) as caught,
    ):
        compiled(float64_product)(torch.ones(2, 2, device=device))
    assert type(caught.value) is AuditError
    (finding,) = caught.value.report.findings
    assert (finding.op, finding.refused) == ("aten.mm.default", "UNSUPPORTED_DTYPE")
    assert finding.source_line.endswith("in float64_product: return x.double() @ x.double()")
    assert "cast the operands" in str(caught.value)
    with pytest.raises(AuditError):  # and again, on each call
        compiled(float64_product)(torch.ones(2, 2, device=device))


def test_integer_products_are_violations_too(device):
    with pytest.raises(AuditError, match=r"i32\[2, 2\]"):
        compiled(torch.mm)(*(torch.ones(2, 2, dtype=torch.int32, device=device),) * 2)


class DoubleBackward(torch.autograd.Function):
    """Its backward, and only that, has a product in float64."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return (grad.double() @ grad.double()).float()


@pytest.mark.parametrize("suppress", [False, True], ids=["plain", "suppress_errors"])
def test_a_violation_in_the_backward_is_raised_by_the_backward(suppress, device):
    x = torch.ones(2, 2, device=device, requires_grad=True)
    with torch._dynamo.config.patch(suppress_errors=suppress):
        output = compiled(lambda x: DoubleBackward.apply(x) * 3)(x)
        with pytest.raises(AuditError, match="backward"):
            output.sum().backward()


@pytest.mark.parametrize("pattern", ["aten.mm*", "cublas", "CUBLAS", "*"])
def test_allow_takes_ops_and_providers(pattern, device):
    x = torch.ones(2, 2, device=device)
    result = compiled(float64_product, options={"allow": [pattern]})(x)
    assert torch.equal(result, float64_product(x))
    report = compiled_reports()[-1]
    assert report.is_triton_only
    assert [finding.op for finding in report.allowed] == ["aten.mm.default"]


@pytest.mark.parametrize(("policy", "logged"), [("warn", 1), ("ignore", 0)])
def test_on_violation(policy, logged, device, caplog):
    x = torch.ones(2, 2, device=device)
    with caplog.at_level(logging.WARNING, logger="triton_only"):
        result = compiled(float64_product, options={"on_violation": policy})(x)
    assert torch.equal(result, float64_product(x))
    assert sum("would run outside Triton" in record.message for record in caplog.records) == logged


def test_disabled_passes_leave_their_operations(net, device):
    options = {"disable_passes": ["rewrite_matmul"], "on_violation": "ignore"}
    with torch.no_grad():
        compiled(net, options=options)(torch.ones(3, 8, device=device))
    assert {finding.provider.name for finding in compiled_reports()[-1].findings} == {"CUBLAS"}


def test_reports_are_added_to_a_file(net, device, tmp_path):
    path = tmp_path / "new" / "report.json"
    x = torch.randn(3, 8, device=device)
    compiled(net, options={"report": str(path)})(x).sum().backward()
    reports = json.loads(path.read_text())
    assert [report["graphs"][0].split()[-1] for report in reports] == ["(forward)", "(backward)"]
    assert all(report["is_triton_only"] for report in reports)
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", ["{}", "not JSON", None], ids=["dict", "text", "folder"])
def test_a_file_of_something_else_is_not_overwritten(content, net, device, tmp_path):
    path = tmp_path / "report.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(SettingsError, match="report"):
        compiled(net, options={"report": path})(torch.ones(3, 8, device=device))
    assert content is None or path.read_text() == content
