"""Exported programs, and packages of AOTInductor."""

from __future__ import annotations

import json
import shutil
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import triton_only_backend as tob
from triton_only_backend import cli
from triton_only_backend.audit import Provider, Reason, audit_package
from triton_only_backend.audit.package import audit_cpp
from triton_only_backend.audit.reading import ReportFormatError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        y = self.linear(x)[:, None]
        y = F.scaled_dot_product_attention(y, y, y)[:, 0]
        return torch.kthvalue(torch.relu(y), 3)[0]


@pytest.fixture
def program(device):
    return torch.export.export(Net().to(device).eval(), (torch.randn(2, 8, 16, device=device),))


def test_an_exported_program_brings_its_inputs_and_lines(program):
    with torch.no_grad():
        report = tob.audit(program)
    (finding,) = report.findings
    assert finding.op == "aten.kthvalue.default"
    assert "in forward: return torch.kthvalue(torch.relu(y), 3)[0]" in finding.source_line
    ours = {row.op for row in report.ops if row.provider is Provider.TRITON_OURS}
    assert any("attention" in op for op in ours)
    assert any("linear" in op or "mm" in op for op in ours)


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return ended.value.code


def test_the_command_line_reads_programs(program, tmp_path):
    saved, written = tmp_path / "net.pt2", tmp_path / "audit.json"
    torch.export.save(program, saved)
    assert run("audit", saved, "--no-grad", "--json", written) == 1
    assert [f["op"] for f in json.loads(written.read_text())["findings"]] == [
        "aten.kthvalue.default"
    ]
    assert run("audit", saved, "--no-grad", "--allow", "aten.kthvalue*") == 0


def test_what_is_no_program_is_refused(tmp_path, capsys):
    path = tmp_path / "net.pt2"
    path.write_text("nothing")
    assert run("audit", path) == 2
    assert "is not what torch.export.save writes" in capsys.readouterr().err
    assert run("audit", tmp_path / "other.pt2") == 2


WRAPPER = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
extern "C"  void  cpp_fused_add_0(const float* in_ptr0, float* out_ptr0);
static void call_triton_poi_fused_relu_0(
    const AOTInductorModelKernels& kernels_, cudaStream_t stream_) {
    if (kernels_.triton_poi_fused_relu_0 == nullptr) {
        kernels_.triton_poi_fused_relu_0 = loadKernel("/c/abc.cubin", "triton_poi_fused_relu_0", 0, cubin_dir_); }
    launchKernel(kernels_.triton_poi_fused_relu_0, grid_0, 1, 1, 4, 0, args, stream_);
}
void AOTInductorModel::run_impl() {
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, a, b, c, d, 0, &buf0_handle));
    // Topologically Sorted Source Nodes: [linear], Original ATen: [aten.addmm]
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(buf0, bias, x, w, 1L, 1L));
    call_triton_poi_fused_relu_0(buf0, kernels, stream);
    call_triton_poi_fused_relu_0(buf0, kernels, stream);
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_sort_stable(buf1, &var_0, 1L, 0, &a, &b));
    // aoti_torch_cuda_mm_out(a comment);
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_proxy_executor_call_function(proxy_executor, 1, 0, i, 3, t));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_proxy_executor_call_function(proxy_executor, 0, 0, i, 3, t));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda__scaled_mm_out(a, b));
}
"""


def test_a_wrapper_in_cpp_is_read():
    proxied = ["triton_only::mm", "planted::mm"]
    calls = {call.op: call for call in audit_cpp(WRAPPER, proxied)}
    providers = {op: call.provider for op, call in calls.items()}
    assert providers == {
        "aten.addmm.out": Provider.CUBLAS,
        "triton_poi_fused_relu_0": Provider.TRITON_INDUCTOR,
        "aten.sort.stable": Provider.CUB,
        "planted.mm": Provider.USER,
        "triton_only.mm": Provider.TRITON_OURS,
        "aten._scaled_mm.out": Provider.CUBLAS,
        "cpp_fused_add_0": Provider.CPU,
    }
    assert calls["triton_poi_fused_relu_0"].count == 2
    assert calls["aten.addmm.out"].original_aten == ("aten.addmm",)
    assert calls["aten.sort.stable"].original_aten == ()
    lines = WRAPPER.splitlines()
    assert "aoti_torch_cuda_sort_stable" in lines[calls["aten.sort.stable"].line - 1]
    assert "loadKernel" in lines[calls["triton_poi_fused_relu_0"].line - 1]


def test_a_proxied_op_that_no_table_names_is_unknown():
    (call, _) = [c for c in audit_cpp(WRAPPER) if c.name.startswith("proxy")]
    assert call.is_violation


def package(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"net/data/aotinductor/model/{name}", text)
    return path


def test_a_package_is_read_whole(tmp_path):
    nodes = {
        "nodes": [{"node": {"target": "triton_only::mm"}}, {"node": {"target": "planted::mm"}}]
    }
    path = package(
        tmp_path / "net.pt2",
        {"abc.wrapper.cpp": WRAPPER, "abc.wrapper.json": json.dumps(nodes), "abc.wrapper.so": ""},
    )
    report = audit_package(path, allow=["planted.*"])
    assert report.graphs == ["package model"]
    assert [f.op for f in report.allowed] == ["planted.mm"]
    assert Provider.TRITON_OURS in report.operations
    assert report.violation_count == 4
    assert run("audit", path) == 1
    assert run("audit", path, "--dynamic") == 2


def test_a_package_without_its_source_proves_nothing(tmp_path):
    report = audit_package(package(tmp_path / "net.pt2", {"abc.wrapper.so": ""}))
    assert [f.reason for f in report.findings] == [Reason.OPAQUE_CODE]


def test_what_is_no_package_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("net/models/model.json", "{}")
    for name in ("other.zip", "missing.pt2"):
        with pytest.raises(ReportFormatError, match="no AOTInductor package"):
            audit_package(tmp_path / name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_real_package_shows_its_library_calls(program, tmp_path):
    path = tmp_path / "net.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    report = audit_package(path)
    assert not report.is_triton_only
    assert any(f.op.startswith("aten.kthvalue") for f in report.findings)
    assert report.operations
