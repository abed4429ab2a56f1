"""What a report knows: coverage, the run, what is allowed, CUDA graphs, the passes."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import pytest
from audit_samples import TRITON, call, graph_op, kernel, page_text, sample_report, timed_run

from triton_only_backend.audit import AuditReport, Provider, cudagraphs, kernel_report
from triton_only_backend.audit.kernel_report import KernelEvent, report_of
from triton_only_backend.errors import AuditError


@pytest.fixture
def report() -> AuditReport:
    return sample_report()


def test_the_report_that_the_tests_use_has_every_part(report: AuditReport) -> None:
    assert [f.op for f in report.findings] == ["aten.sort.default"]
    assert [f.op for f in report.allowed] == ["aten.convolution.default"]
    assert [f.provider for f in report.listed] == [Provider.MEMCPY, Provider.NCCL]
    assert [(f.op, f.refused, f.provider) for f in report.notes] == [
        ("aten.add.Tensor", "DROPOUT", TRITON)
    ]
    assert report.run is not None
    assert not report.is_triton_only


def test_coverage_counts_ops_calls_and_time(report: AuditReport) -> None:
    assert report.coverage.ops == pytest.approx(1 / 3)  # the view computes nothing
    assert report.coverage.calls == pytest.approx(2 / 4)  # nor do the copy and the collective
    assert report.coverage.time == pytest.approx(0.7)
    text = report.to_text()
    assert "Triton runs 33.3% of the ops, 50.0% of the calls and launches, 70.0% of the GPU" in text
    empty = AuditReport().coverage
    assert (empty.ops, empty.calls, empty.time) == (None, None, None)


def test_only_all_of_it_is_100_percent() -> None:
    ops = [graph_op("aten.add.Tensor", f"add_{i}") for i in range(9999)]
    missing = AuditReport.from_graph([*ops, graph_op("aten.sort.default")], None)
    assert "Triton runs 99.9% of the ops" in missing.to_text()
    assert "Triton runs 100.0% of the ops" in AuditReport.from_graph(ops, None).to_text()


def test_an_op_that_inductor_lowered_is_triton_in_the_list_of_ops() -> None:
    (row,) = AuditReport.from_graph([graph_op("aten.convolution.default")], [kernel()]).ops
    assert row.provider is TRITON
    assert "Inductor made Triton code of it" in row.note


def test_a_call_that_no_op_explains_is_in_the_list_and_clears_no_op() -> None:
    # The one call may be either of the two products, or neither.
    ops = [graph_op("aten.bmm.default"), graph_op("aten.baddbmm.default")]
    rows = AuditReport.from_graph(ops, [call("aten.mm")]).ops
    assert [row.op for row in rows] == ["aten.bmm.default", "aten.baddbmm.default", "aten.mm"]
    assert {row.provider for row in rows} == {Provider.CUBLAS}
    assert rows[2].positions == (2,)


def test_ops_alike_are_one_row_that_remembers_their_places() -> None:
    ops = [graph_op("aten.add.Tensor", f"a{i}", module_path=f"layers.{i}") for i in range(3)]
    ops.insert(1, graph_op("aten.mul.Tensor"))
    add, mul = AuditReport.from_graph(ops, None).ops
    assert (add.positions, add.count, mul.positions) == ((0, 2, 3), 3, (1,))
    assert add.modules == ("layers.0", "layers.1", "layers.2")


# The run as a witness
def test_a_run_can_refute_a_clean_graph() -> None:
    clean = AuditReport.from_graph([], [kernel()], graph_name="g")
    assert clean.is_triton_only
    refuted = clean.with_run(timed_run())
    assert not refuted.is_triton_only
    with pytest.raises(AuditError, match=r"1 kernel ran outside Triton\n\nnvjet <&> x ×1 → cuBLAS"):
        refuted.raise_for_violations()
    for form in (refuted.to_text(), refuted.to_markdown(), page_text(refuted.to_html())):
        assert "1 kernel ran outside Triton (1 graph)" in form
    (result,) = refuted.to_sarif()["runs"][0]["results"]
    assert result["ruleId"] == "KERNEL_AT_RUN_TIME"


def test_allow_holds_for_kernels_and_hides_none() -> None:
    clean = AuditReport.from_graph([], [kernel()], graph_name="g", allow=["nvjet*"])
    run = clean.with_run(timed_run()).run
    assert run is not None
    assert run.is_triton_only
    assert [row.name for row in run.allowed] == ["nvjet <&> x"]
    assert "(1 allowed)" in run.to_text()
    assert "cuBLAS (allowed)" in run.to_markdown()
    assert [r.name for r in timed_run().with_allow(["cublas"]).allowed] == ["nvjet <&> x"]


def test_a_run_without_triton_proves_nothing() -> None:
    idle = report_of([KernelEvent("Memcpy DtoD", Provider.MEMCPY, 1.0)], "gpu")
    joined = AuditReport.from_graph([], [kernel()], graph_name="g").with_run(idle)
    assert not joined.is_triton_only
    assert joined.to_text().startswith("No Triton kernel ran")


def test_events_start_at_zero_and_violations_come_first() -> None:
    run = timed_run()
    assert [event.start_us for event in run.events] == [0.0, 65.0, 100.0, 160.0]
    assert run.violations_first[0].name == "nvjet <&> x"
    assert run.rows[0].name == "triton_poi_0"


def test_of_many_events_the_violations_and_the_longest_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_report, "MAX_EVENTS", 3)
    events = [KernelEvent("triton_k", TRITON, float(i), 10.0 * i) for i in range(1, 9)]
    events.append(KernelEvent("nvjet", Provider.CUBLAS, 0.1, 5.0))
    run = report_of(events, "gpu")
    assert run.launches == 9
    assert [(e.name, e.start_us) for e in run.events] == [
        ("nvjet", 0.0),
        ("triton_k", 65.0),
        ("triton_k", 75.0),
    ]
    assert "9 launches in 83 µs; 3 are shown" in page_text(run.to_html())


# Policy
@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        ("vision.*::aten.convolution*", ["vision.0.conv", "vision.1.proj"]),
        ("vision.0.conv::cudnn", ["vision.0.conv"]),
        ("*::aten.conv*", ["text.conv", "vision.0.conv", "vision.1.proj", ""]),
        ("vision.*::aten.sort*", []),
        ("audio.*::*", []),
        ("vision::aten.convolution*", []),
        ("Vision.*::aten.convolution*", []),
        ("vision.?.*::ATEN.CONVOLUTION*", ["vision.0.conv", "vision.1.proj"]),
    ],
)
def test_a_policy_for_modules(pattern: str, allowed: list[str]) -> None:
    paths = ("text.conv", "vision.0.conv", "vision.1.proj", "")
    ops = [
        graph_op("aten.convolution.default", f"c{i}", module_path=p) for i, p in enumerate(paths)
    ]
    found = AuditReport.from_graph(ops, None, allow=[pattern])
    modules = [f.modules[0] if f.modules else "" for f in found.allowed]
    assert sorted(modules) == sorted(allowed)
    assert sum(f.count for f in [*found.findings, *found.allowed]) == 4


def test_layers_that_only_some_globs_allow_are_told_apart() -> None:
    ops = [graph_op("aten.mm.default", f"mm{i}", module_path=f"layers.{i}") for i in range(4)]
    found = AuditReport.from_graph(ops, None, allow=["layers.0::aten.mm*", "layers.2::cublas"])
    assert found.findings[0].modules == ("layers.1", "layers.3")
    assert [(f.modules, f.allowed_by) for f in found.allowed] == [
        (("layers.0",), "layers.0::aten.mm*"),
        (("layers.2",), "layers.2::cublas"),
    ]


def test_copies_and_communication_are_listed_apart(report: AuditReport) -> None:
    for form in (report.to_text(), report.to_markdown(), page_text(report.to_html())):
        assert "Communication" in form
        assert "Copies and fills" in form
        assert "_c10d_functional.all_reduce_" in form


def test_refusals_of_ops_that_were_taken_apart_are_notes() -> None:
    attention = graph_op(
        "aten.scaled_dot_product_attention.default", refused="DROPOUT", detail="dropout_p=0.1"
    )
    noted = AuditReport.from_graph([], [kernel()], refused=[attention])
    assert noted.is_triton_only
    (note,) = noted.notes
    assert (note.refused, note.provider, note.why) == ("DROPOUT", Provider.NONE, "dropout_p=0.1")
    assert "refused by a pass" in noted.to_text()


# CUDA graphs
def test_cudagraphs_are_merged_and_explained(report: AuditReport) -> None:
    parts: list[cudagraphs.CudaGraphs | None] = [
        None,
        {"on": False, "skipped": []},
        {"on": True, "skipped": ["a", "b"]},
        {"on": True, "skipped": ["b"]},
    ]
    assert cudagraphs.merge(parts) == {"on": True, "skipped": ["a", "b"]}
    assert cudagraphs.merge([None]) is None
    assert cudagraphs.headline({"on": True, "skipped": []}) == "on"
    assert cudagraphs.headline({"on": False, "skipped": []}) == "off"
    assert "mark_static_address" in cudagraphs.advice("skipping cudagraphs due to mutated inputs")
    assert cudagraphs.advice("something new") == ""
    for form in (report.to_text(), report.to_markdown(), page_text(report.to_html())):
        assert "CUDA graphs: skipped for 1 reason" in form
        assert "mark_static_address" in form.replace("\\_", "_")


# Passes
class Result(NamedTuple):
    """What a pass gives."""

    name: str
    fired: int
    refusals: dict[str, int]


def test_what_the_passes_did_is_told_in_every_form() -> None:
    results = [Result("fold", 0, {}), Result("rewrite", 2, {"float64": 1}), Result("fold", 3, {})]
    parts = [
        AuditReport.from_graph([], [kernel()], graph_name=name, passes=results)
        for name in ("graph 0 (forward)", "graph 0 (backward)")
    ]
    assert [(row.name, row.graph, row.fired) for row in parts[0].passes] == [
        ("fold", "graph 0 (forward)", 3),
        ("rewrite", "graph 0 (forward)", 2),
    ]
    merged = AuditReport.merge(parts)
    assert AuditReport.from_json(merged.to_json()) == merged
    text = merged.to_text()
    assert re.search(r"fold +6\b", text)
    assert re.search(r"rewrite +4 +2 × float64", text)
    assert "| rewrite | 4 | 2 × float64 |" in merged.to_markdown()
    assert re.search(r"rewrite\s*4\s*2 × float64", page_text(merged.to_html()))


def test_reports_of_before_the_passes_were_told_are_read(report: AuditReport) -> None:
    data = json.loads(report.to_json())
    del data["passes"]
    for item in (*data["findings"], *data["allowed"], *data["listed"], *data["notes"]):
        del item["allowed_by"]
    assert AuditReport.from_dict(data).findings == report.findings


def test_the_glob_that_allows_is_told() -> None:
    ops = [graph_op("aten.sort.default", "sort")]
    found = AuditReport.from_graph(ops, None, allow=["aten.mm*", "aten.sort*", "*"])
    assert [f.allowed_by for f in found.allowed] == ["aten.sort*"]
