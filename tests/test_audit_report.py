"""The report: the generated code decides, the graph explains, and the error helps."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from audit_samples import call, graph_op
from torch._functorch import config as functorch_config

from triton_only_backend import interpreter
from triton_only_backend.audit import (
    AuditReport,
    CodeCall,
    Finding,
    Provider,
    Reason,
    audit_graph,
    audit_source,
    policy,
)
from triton_only_backend.errors import AuditError

SORT = graph_op(
    "aten.sort.default",
    inputs=("f32[8, 16]",),
    outputs=("f32[8, 16]", "i64[8, 16]"),
    dtypes=("f32", "i64"),
    module_path="head",
    source_line="model.py:12 in forward: y = torch.sort(x)",
)


def test_a_call_in_the_code_is_a_finding_told_by_its_graph_op():
    code = call("aten.sort.stable", "sort", line=40)
    report = AuditReport.from_graph([SORT], [code], graph_name="graph 0 (forward)")
    (finding,) = report.findings
    assert (finding.op, finding.provider, finding.count) == ("aten.sort.default", Provider.CUB, 1)
    assert finding.shapes == "f32[8, 16] -> f32[8, 16], i64[8, 16]"
    assert finding.source_line == "model.py:12 in forward: y = torch.sort(x)"
    assert finding.module_path == "head"
    assert finding.graph == "graph 0 (forward)"
    assert finding.code_line == 40
    assert not report.is_triton_only


def test_a_flagged_op_that_the_code_does_not_call_is_no_finding():
    convolution = graph_op("aten.convolution.default")
    kernel = CodeCall("triton_tem_0", "triton_tem_0", "kernel", Provider.TRITON_INDUCTOR, count=3)
    report = AuditReport.from_graph([convolution], [kernel])
    assert report.findings == []
    assert report.is_triton_only
    assert report.operations == {Provider.TRITON_INDUCTOR: 3}


def test_without_code_the_flags_of_the_graph_count():
    report = AuditReport.from_graph([SORT, graph_op("aten.add.Tensor")], None)
    assert [finding.op for finding in report.findings] == ["aten.sort.default"]
    assert report.operations == {Provider.CUB: 1, Provider.TRITON_INDUCTOR: 1}


def test_code_that_calls_nothing_is_not_the_same_as_no_code():
    assert AuditReport.from_graph([SORT], []).is_triton_only


def test_a_call_that_no_graph_op_explains_is_still_a_finding():
    report = AuditReport.from_graph([], [call("aten.mm", line=7)])
    (finding,) = report.findings
    assert (finding.op, finding.shapes, finding.code_line) == ("aten.mm", "", 7)
    with pytest.raises(AuditError, match="line 7 of the generated code"):
        report.raise_for_violations()


def test_calls_find_their_own_op_among_many():
    ops = [
        graph_op("aten.mm.default", f"mm_{i}", source_line=f"m.py:{i} in f: x", module_path="a")
        for i in range(4)
    ]
    calls = [call("aten.mm", f"mm_{i}", "permute", line=i + 1) for i in reversed(range(4))]
    report = AuditReport.from_graph(ops, calls)
    assert [finding.source_line for finding in report.findings] == [
        f"m.py:{i} in f: x" for i in reversed(range(4))
    ]


def test_an_mm_that_inductor_merged_into_an_addmm_is_recognised():
    ops = [graph_op("aten.mm.default", "mm_1", inputs=("f32[2, 2]",), outputs=("f32[2, 2]",))]
    (finding,) = AuditReport.from_graph(ops, [call("aten.addmm", "addmm_default")]).findings
    assert (finding.op, finding.graph_op) == ("aten.addmm", "aten.mm.default")
    assert finding.inputs == ("f32[2, 2]",)


def test_a_refusal_explains_the_finding():
    refused = graph_op(
        "aten.mm.default",
        "mm",
        reason=Reason.UNSUPPORTED_DTYPE,
        detail="fp64 operands",
        remedy="call .float()",
        refused="UNSUPPORTED_DTYPE",
    )
    (finding,) = AuditReport.from_graph([refused], [call("aten.mm", "mm")]).findings
    assert finding.why == "fp64 operands"
    assert finding.remedy == "call .float()"
    assert finding.to_dict()["refused"] == "UNSUPPORTED_DTYPE"


@pytest.mark.parametrize(
    "pattern",
    ["aten.sort*", "aten.sort", "aten.sort.default", "CUB*", "cub", "extern_kernels.sort"],
)
def test_allow_matches_ops_calls_and_providers(pattern):
    report = AuditReport.from_graph([SORT], [call("aten.sort.stable", "sort")], allow=[pattern])
    assert report.findings == []
    assert [finding.op for finding in report.allowed] == ["aten.sort.default"]
    assert report.is_triton_only
    assert report.operations == {Provider.CUB: 1}
    report.raise_for_violations()


@pytest.mark.parametrize("pattern", ["aten.topk*", "sort", "nccl", ""])
def test_allow_does_not_match_these(pattern):
    report = AuditReport.from_graph([SORT], [call("aten.sort.stable", "sort")], allow=[pattern])
    assert len(report.findings) == 1


def test_layers_that_differ_by_number_only_are_one_finding():
    ops = [
        graph_op("aten.mm.default", f"mm_{i}", module_path=f"layers.{i}.up", inputs=("f32[2, 2]",))
        for i in range(32)
    ]
    calls = [call("aten.mm", f"mm_{i}", line=i + 1) for i in range(32)]
    (finding,) = AuditReport.from_graph(ops, calls).findings
    assert (finding.count, len(finding.modules)) == (32, 32)
    assert finding.module_path == "layers.*.up (32 modules)"
    assert finding.code_line == 1


def test_the_error_says_what_where_why_and_what_to_do():
    calls = [call("aten.sort.stable", "sort"), call("aten.mm", line=9)]
    with pytest.raises(AuditError) as caught:
        AuditReport.from_graph([SORT], calls, graph_name="graph 0 (forward)").raise_for_violations()
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 operations would run outside Triton"
    assert lines[2:8] == [
        "aten.sort.default ×1  [f32[8, 16] -> f32[8, 16], i64[8, 16]] → CUB/Thrust",
        "  at     model.py:12 in forward: y = torch.sort(x)",
        "  module head",
        "  graph  graph 0 (forward)",
        "  why    Inductor has no Triton lowering",
        f"  do     {policy.classify('aten.sort').remedy}",
    ]
    assert isinstance(caught.value.report, AuditReport)


def test_the_error_is_singular_for_one_and_short_for_many():
    with pytest.raises(AuditError, match=r"^1 operation would run outside Triton"):
        AuditReport.from_graph([SORT], None).raise_for_violations()
    many = [graph_op("aten.mm.default", source_line=f"m.py:{i} in f: x") for i in range(30)]
    with pytest.raises(AuditError, match="and 10 more findings") as caught:
        AuditReport.from_graph(many, None).raise_for_violations()
    assert str(caught.value).startswith("30 operations")


def test_merge_adds_up():
    first = AuditReport.from_graph(
        [SORT], None, graph_name="a", graph_breaks=["print"], environment={"torch": "2"}
    )
    second = AuditReport.from_graph([SORT], None, graph_name="b", allow=["cub"])
    merged = AuditReport.merge([first, second], graph_breaks={"print": 1, "item": 2})
    assert merged.graphs == ["a", "b"]
    assert [finding.graph for finding in merged.findings] == ["a"]
    assert [finding.graph for finding in merged.allowed] == ["b"]
    assert merged.operations == {Provider.CUB: 2}
    assert merged.graph_breaks == ["print", "item (×2)"]
    assert merged.environment == {"torch": "2"}
    assert first.graphs == ["a"]


def test_nothing_audited_proves_nothing():
    assert not AuditReport.merge([]).is_triton_only


def test_json_has_a_schema_and_round_trips():
    report = AuditReport.from_graph([SORT], None, graph_name="g", environment={"dtype": torch.bool})
    data = json.loads(report.to_json())
    assert (data["schema"], data["schema_version"]) == ("triton_only_backend.audit", 1)
    assert data["is_triton_only"] is False
    assert data["operations"] == {"CUB/Thrust": 1}
    assert data["environment"] == {"dtype": "torch.bool"}
    (finding,) = data["findings"]
    assert finding["op"] == "aten.sort.default"
    assert finding["provider"] == "CUB/Thrust"
    assert finding["reason"] == "NO_TRITON_LOWERING"
    assert finding["inputs"] == ["f32[8, 16]"]
    assert finding["source_line"] == "model.py:12 in forward: y = torch.sort(x)"
    assert set(Finding("x", Provider.CPU).to_dict()) == set(finding)


def test_text_markdown_and_html_show_the_finding():
    piped = graph_op("aten.sort.default", source_line="m.py:1 in f: a | b")
    report = AuditReport.from_graph([piped], None, graph_name="g", graph_breaks=["call to print"])
    text = report.to_text()
    assert text.startswith("1 operation would run outside Triton (1 graph)")
    for rendering in (text, report.to_markdown(), report.to_html()):
        assert "aten.sort.default" in rendering
        assert "CUB/Thrust" in rendering
        assert "m.py:1 in f" in rendering
        assert "1 graph break" in rendering
    assert "\x1b" not in text
    assert r"a \| b" in report.to_markdown()
    clean = AuditReport.from_graph([], [], graph_name="g")
    assert "Triton only: no library call in 1 graph" in clean.to_text()


def compiled_reports(function, *inputs) -> list[AuditReport]:
    """Inductor's real output, under the interpreter's settings, audited graph by graph."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    reports = []

    def inner(gm, example_inputs, **kwargs):
        ops = audit_graph(gm)
        compiled = compile_fx_inner(gm, example_inputs, **kwargs)
        kind = "backward" if kwargs.get("is_backward") else "forward"
        calls = audit_source(compiled.source_code)
        reports.append(AuditReport.from_graph(ops, calls, graph_name=kind))
        return compiled

    def backend(gm, example_inputs):
        config = interpreter.INDUCTOR_CONFIG
        return compile_fx(gm, example_inputs, inner_compile=inner, config_patches=config)

    torch._dynamo.reset()
    with functorch_config.patch(enable_autograd_cache=False):
        output = torch.compile(function, backend=backend)(*inputs)
        if output.requires_grad:
            output.sum().backward()
    return reports


needs_interpreter = pytest.mark.skipif(
    not interpreter.install_if_wanted(), reason="reads what Inductor generates for the interpreter"
)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return torch.kthvalue(x, 3)[0]


@needs_interpreter
def test_a_real_compilation_is_explained_forward_and_backward():
    forward, backward = compiled_reports(Net(), torch.randn(4, 16))
    addmm, kthvalue = forward.findings
    assert (addmm.op, addmm.provider, addmm.count) == ("aten.addmm.default", Provider.CUBLAS, 2)
    assert addmm.modules == ("layers.0", "layers.1")
    assert addmm.source_line.endswith("in forward: x = torch.nn.functional.gelu(layer(x))")
    assert addmm.shapes == "f32[16], f32[4, 16], f32[16, 16] -> f32[4, 16]"
    assert kthvalue.op == "aten.kthvalue.default"
    assert kthvalue.source_line.endswith("in forward: return torch.kthvalue(x, 3)[0]")
    assert forward.operations[Provider.TRITON_INDUCTOR] > 0

    found = Counter()
    for finding in backward.findings:
        found[finding.op] += finding.count
    assert found["aten.mm.default"] == 3
    modules = {module for finding in backward.findings for module in finding.modules}
    assert modules == {"layers.0", "layers.1"}


@needs_interpreter
def test_a_real_compilation_without_library_ops_is_clean():
    (report,) = compiled_reports(
        lambda x, y: torch.softmax(x * y, -1).cumsum(-1), torch.randn(4, 16), torch.randn(4, 16)
    )
    assert report.is_triton_only
    assert set(report.operations) == {Provider.TRITON_INDUCTOR}
