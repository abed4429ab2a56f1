"""The report's forms: each says the same, can be read by its reader, and loses nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any, NamedTuple

import pytest

from triton_only_backend.audit import (
    AuditReport,
    CodeCall,
    Finding,
    GraphOp,
    KernelReport,
    Provider,
    Reason,
    baseline,
    cudagraphs,
    kernel_report,
    page,
    policy,
    reading,
)
from triton_only_backend.audit.kernel_report import KernelEvent, report_of
from triton_only_backend.audit.places import source_line
from triton_only_backend.errors import AuditError

TRITON, CUDNN = Provider.TRITON_INDUCTOR, Provider.CUDNN


def graph_op(op: str, name: str = "", **fields: Any) -> GraphOp:
    verdict = policy.classify(op)
    name = name or op.split(".")[1]
    known = {"provider": verdict.provider, "reason": verdict.reason, "remedy": verdict.remedy}
    return GraphOp(**{"name": name, "op": op, "source_nodes": (name,), **known, **fields})


def call(op: str, *nodes: str, provider: Provider | None = None) -> CodeCall:
    verdict = policy.classify_call(op)
    return CodeCall(
        name=f"extern_kernels.{op.split('.')[1]}",
        op=op,
        kind="extern",
        provider=provider or verdict.provider,
        line=7,
        reason=verdict.reason,
        source_nodes=nodes,
    )


def kernel(name: str = "triton_poi_0", count: int = 1) -> CodeCall:
    return CodeCall(name, name, "kernel", TRITON, count=count)


def finding(op: str = "aten.sort.default", **fields: Any) -> Finding:
    known = {"provider": Provider.CUB, "reason": Reason.NO_TRITON_LOWERING}
    return Finding(op, **{**known, **fields})


def timed_run() -> KernelReport:
    events = [
        KernelEvent("triton_poi_0", TRITON, 60.0, 100.0),
        KernelEvent("nvjet <&> x", Provider.CUBLAS, 30.0, 165.0),
        KernelEvent("ncclDevKernel_AllReduce", Provider.NCCL, 50.0, 200.0),
        KernelEvent("triton_poi_0", TRITON, 10.0, 260.0),
    ]
    return report_of(events, "gpu")


@pytest.fixture
def report() -> AuditReport:
    """A report in which every part has something."""
    ops = [
        graph_op(
            "aten.convolution.default",
            module_path="vision.0",
            inputs=("f32[1, 3]",),
            outputs=("f32[1, 4]",),
            dtypes=("f32",),
            source_line="net.py:12 in forward: x = self.conv(x) | 1",
        ),
        graph_op("aten.sort.default", source_line="net.py:14 in forward: torch.sort(x)"),
        graph_op(
            "aten.add.Tensor", refused="DROPOUT", reason=None, detail="p=0.1", remedy="set it to 0"
        ),
        graph_op("aten.view.default"),
    ]
    calls = [
        call("aten.convolution", "convolution"),
        call("aten.sort", "sort"),
        call("aten.copy_", provider=Provider.MEMCPY),
        call("_c10d_functional.all_reduce_", provider=Provider.NCCL),
        kernel(count=2),
    ]
    return AuditReport.from_graph(
        ops,
        calls,
        graph_name="graph 0 (forward)",
        allow=["vision.*::aten.conv*"],
        graph_breaks=["call to print\n  Hint: <do> not"],
        environment={"gpu": "H200", "rocm": None},
        cudagraphs={"on": True, "skipped": ["skipping cudagraphs due to mutated inputs"]},
    ).with_run(timed_run())


def test_the_report_that_the_tests_use_has_every_part(report: AuditReport) -> None:
    assert [f.op for f in report.findings] == ["aten.sort.default"]
    assert [f.op for f in report.allowed] == ["aten.convolution.default"]
    assert [f.provider for f in report.listed] == [Provider.MEMCPY, Provider.NCCL]
    assert [(f.op, f.refused, f.provider) for f in report.notes] == [
        ("aten.add.Tensor", "DROPOUT", TRITON)
    ]
    assert report.run is not None
    assert not report.is_triton_only


# Coverage


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


# JSON


def check(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "$") -> None:
    """Asserts that a value fits a JSON Schema, as far as ours goes."""
    if "$ref" in schema:
        return check(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root, at)
    if "anyOf" in schema:
        kinds = [s for s in schema["anyOf"] if (s.get("type") == "null") == (value is None)]
        return check(value, kinds[0], root, at)
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    wanted = schema.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    assert not wanted or any(isinstance(value, types[kind]) for kind in wanted), at
    assert not isinstance(value, bool) or not wanted or "boolean" in wanted, at
    assert "const" not in schema or value == schema["const"], at
    assert "enum" not in schema or value in schema["enum"], at
    if isinstance(value, (int, float)):
        assert schema.get("minimum", value) <= value <= schema.get("maximum", value), at
    if isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1e9), at
        for index, item in enumerate(value):
            check(item, schema.get("items", {}), root, f"{at}[{index}]")
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), at
        for key, item in value.items():
            check(key, schema.get("propertyNames", {}), root, f"{at} key {key}")
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            assert inner is not False, f"{at}.{key}"
            check(item, inner, root, f"{at}.{key}")
    return None


def test_json_fits_the_published_schema(report: AuditReport) -> None:
    schema = AuditReport.json_schema()
    for example in (report, AuditReport(), replace(report, run=None, cudagraphs=None)):
        check(json.loads(example.to_json()), schema, schema)
    check(json.loads(timed_run().to_json()), schema["$defs"]["kernels"], schema)


def test_the_schema_knows_every_word() -> None:
    words = AuditReport.json_schema()["$defs"]
    assert words["provider"]["enum"] == [provider.value for provider in Provider]
    assert words["reason"]["enum"] == [*(reason.name for reason in Reason), None]


@pytest.mark.parametrize("key", ["findings", "coverage", "schema_version", "ops"])
def test_the_check_of_the_schema_is_not_blind(report: AuditReport, key: str) -> None:
    schema = AuditReport.json_schema()
    data = report.to_dict()
    with pytest.raises(AssertionError):
        check({**data, key: "wrong"}, schema, schema)
    with pytest.raises(AssertionError):
        check({**data, f"{key}_": 1}, schema, schema)
    del data[key]
    with pytest.raises(AssertionError):
        check(data, schema, schema)


def test_json_round_trips(report: AuditReport) -> None:
    assert AuditReport.from_json(report.to_json()) == report
    assert AuditReport.from_dict(report.to_dict()) == report
    assert KernelReport.from_json(timed_run().to_json()) == timed_run()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("3", "got a int"),
        ("{}", "got None version None"),
        ('{"schema": "triton_only_backend.audit", "schema_version": 9}', "version 9"),
        ('{"schema": "triton_only_backend.audit", "schema_version": 1}', "KeyError: 'findings'"),
    ],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(reading.ReportFormatError, match=re.escape(message)):
        AuditReport.from_json(text)


def test_a_damaged_finding_is_refused(report: AuditReport) -> None:
    data = report.to_dict()
    data["findings"][0]["provider"] = "cuBLASS"
    with pytest.raises(reading.ReportFormatError, match="cuBLASS"):
        AuditReport.from_dict(data)


def test_reports_are_read_from_files(report: AuditReport, tmp_path: Any) -> None:
    one, many, bad = tmp_path / "one.json", tmp_path / "many.json", tmp_path / "bad.json"
    one.write_text(report.to_json())
    many.write_text(json.dumps([report.to_dict(), report.to_dict()]))
    bad.write_text("[3]")
    assert reading.read_report(one) == report
    assert reading.read_report(many).graphs == ["graph 0 (forward)"] * 2
    for path in (bad, tmp_path / "none.json"):
        with pytest.raises(reading.ReportFormatError, match=path.name):
            reading.read_report(path)


# Markdown


def test_markdown_shows_findings_and_folds_the_rest(report: AuditReport) -> None:
    text = report.to_markdown()
    shown, *folded = text.split("<details>")
    assert shown.startswith("**1 operation would run outside Triton; 1 kernel did (1 graph)**")
    assert "`aten.sort.default`" in shown
    assert "aten.convolution.default" not in shown
    assert len(folded) == text.count("</details>") == 9
    table = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [len(re.split(r"(?<!\\)\|", line)) - 2 for line in table]
    assert set(cells) == {7, 5, 4}
    assert r"self.conv(x) \| 1" in text


# HTML


class Outline(HTMLParser):
    """The tags, the text and the addresses of a page; fails where tags do not match."""

    VOID = frozenset({"meta", "input", "br", "wbr", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        self.addresses += [str(values[key]) for key in ("src", "href") if key in values]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def outline(html: str) -> Outline:
    parsed = Outline()
    parsed.feed(html)
    parsed.close()
    assert parsed.open == []
    return parsed


def page_text(html: str) -> str:
    return " ".join("".join(outline(html).text).split())


def test_the_page_needs_no_network_and_is_well_formed(report: AuditReport) -> None:
    for html in (report.to_html(), timed_run().to_html(), AuditReport().to_html()):
        parsed = outline(html)
        assert parsed.addresses == []
        assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", html)
        assert html.startswith("<!doctype html>")


def test_the_page_shows_it_all(report: AuditReport) -> None:
    html = report.to_html()
    text = page_text(html)
    for part in (
        "aten.sort.default",
        "aten.convolution.default",
        "net.py:14 in forward: torch.sort(x)",
        "vision.0",
        "Hint: <do> not",
        "nvjet <&> x",
        "vision.*::aten.conv*",
        "H200",
        "70.0%",
    ):
        assert part in text
    assert "<do>" not in html
    parsed = outline(html)
    assert sum(tag == "rect" for tag, _ in parsed.tags) == 4
    boxes = [values["class"] for tag, values in parsed.tags if tag == "i" and "title" in values]
    assert boxes == ["p-cudnn", "p-cub", "p-triton-inductor", "p-none"]
    assert html.index("nvjet &lt;&amp;&gt; x</code>") < html.index("triton_poi_0</code>")


def test_the_page_can_be_used_without_a_mouse(report: AuditReport) -> None:
    parsed = outline(report.to_html())
    for tag, values in parsed.tags:
        if values.get("role") in ("img", "region"):
            assert values.get("aria-label"), (tag, values)
        if "scroll" in (values.get("class") or "").split() or values.get("id") == "timeline":
            assert values.get("tabindex") == "0"
    assert all(values.get("lang") for tag, values in parsed.tags if tag == "html")


def test_every_provider_has_a_colour() -> None:
    html = AuditReport().to_html()
    for provider in Provider:
        assert re.search(rf"\.p-{page.slug(provider)}\b", html), provider


# SARIF


def an_object(required: str = "", **properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {key.replace("S_", "$"): value for key, value in properties.items()},
        "required": required.split(),
        "additionalProperties": False,
    }


def many(name: str) -> dict[str, Any]:
    return {"type": "array", "items": one(name)}


def one(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


TEXT = {"type": "string"}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
BAG = {"type": "object"}
# What OASIS' schema of SARIF 2.1.0 (errata 01) allows and requires, of the objects that we write.
SARIF: dict[str, Any] = {
    "log": an_object("version runs", S_schema=TEXT, version={"const": "2.1.0"}, runs=many("run")),
    "run": an_object(
        "tool",
        tool=an_object("driver", driver=one("component")),
        originalUriBaseIds={"type": "object", "additionalProperties": one("artifactLocation")},
        columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
        results=many("result"),
    ),
    "component": an_object("name", name=TEXT, semanticVersion=TEXT, rules=many("descriptor")),
    "descriptor": an_object(
        "id",
        id=TEXT,
        name=TEXT,
        shortDescription=one("message"),
        help=one("message"),
        defaultConfiguration=an_object(level=LEVEL),
    ),
    "message": an_object("text", text=TEXT),
    "result": an_object(
        "message",
        ruleId=TEXT,
        ruleIndex={"type": "integer", "minimum": 0},
        level=LEVEL,
        message=one("message"),
        locations=many("location"),
        partialFingerprints={"type": "object", "additionalProperties": TEXT},
        baselineState={"enum": ["new", "unchanged", "updated", "absent"]},
        properties=BAG,
    ),
    "location": an_object(
        physicalLocation=an_object(
            "artifactLocation",
            artifactLocation=one("artifactLocation"),
            region=an_object("startLine", startLine={"type": "integer", "minimum": 1}),
        ),
        logicalLocations=many("logicalLocation"),
    ),
    "artifactLocation": an_object(uri=TEXT, uriBaseId=TEXT),
    "logicalLocation": an_object(fullyQualifiedName=TEXT, kind=TEXT),
}


def test_sarif_is_what_the_standard_allows(report: AuditReport) -> None:
    logs = [report.to_sarif(), report.to_sarif(AuditReport()), AuditReport().to_sarif()]
    assert logs[0]["runs"][0]["results"]
    assert logs[1]["runs"][0]["results"][0]["baselineState"] == "new"
    for log in logs:
        check(json.loads(json.dumps(log)), one("log"), {"$defs": SARIF})
    wrong = report.to_sarif()
    wrong["runs"][0]["results"][0]["severity"] = "error"
    with pytest.raises(AssertionError, match="severity"):
        check(wrong, one("log"), {"$defs": SARIF})


def test_sarif_points_at_the_line(
    report: AuditReport, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("")
    log = json.loads(json.dumps(report.to_sarif()))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert run["originalUriBaseIds"]["SRCROOT"]["uri"] == f"{tmp_path.as_uri()}/"
    rules = run["tool"]["driver"]["rules"]
    sort, convolution, _ = run["results"]
    assert (sort["level"], convolution["level"]) == ("error", "note")
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
    assert sort["ruleId"] == "NO_TRITON_LOWERING"
    assert report.findings[0].remedy in rules[sort["ruleIndex"]]["help"]["text"]
    assert sort["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "net.py", "uriBaseId": "SRCROOT"},
        "region": {"startLine": 14},
    }
    logical = convolution["locations"][0]["logicalLocations"]
    assert logical == [{"fullyQualifiedName": "vision.0", "kind": "module"}]
    assert "baselineState" not in sort


def test_sarif_of_a_file_elsewhere_and_of_no_file() -> None:
    found = [finding(source_line="a b/x.py:3 in f: y"), finding()]
    results = AuditReport(findings=found, graphs=["g"]).to_sarif()["runs"][0]["results"]
    artifact = results[0]["locations"][0]["physicalLocation"]["artifactLocation"]
    assert artifact == {"uri": "a%20b/x.py"}
    assert "physicalLocation" not in results[1]["locations"][0]


# Baselines


def test_a_finding_is_the_same_by_op_place_and_reason() -> None:
    at = "net.py:12 in forward: x"
    first = finding(source_line=at, modules=("layers.0.mlp",), inputs=("f32[2]",))
    moved = finding(source_line="net.py:99 in forward: y", count=4, graph="graph 3 (forward)")
    assert first.identity == moved.identity
    trace = 'File "net.py", line 12, in torch_dynamo_resume_in_forward_at_7\n    x'
    assert finding(source_line=source_line(trace)).identity == first.identity
    assert finding(modules=("a.0.b",)).identity == finding(modules=("a.7.b", "a.9.b")).identity
    others = [
        finding("aten.topk.default", source_line=at),
        finding(source_line="net.py:12 in backward: x"),
        finding(source_line="other.py:12 in forward: x"),
        finding(source_line=at, reason=Reason.USER_OP),
        finding(modules=("layers.0.mlp",)),
        finding(modules=("layers.0.attention",)),
    ]
    assert len({first.identity, *(other.identity for other in others)}) == 7


def test_a_baseline_tells_new_fixed_and_unchanged() -> None:
    a, b, c, d = (finding(f"aten.op{i}.default") for i in range(4))
    old = AuditReport(findings=[a, b, d], graphs=["g"])
    new = AuditReport(findings=[replace(b, count=3), c], allowed=[d], graphs=["g"])
    difference = baseline.compare(old, new)
    assert [f.op for f in difference.new] == [c.op]
    assert [f.op for f in difference.fixed] == [a.op]
    assert [f.op for f in difference.unchanged] == [b.op]
    assert [f.op for f in difference.allowed] == [d.op]
    assert difference.is_worse
    assert difference.summary == (
        "1 new, 1 fixed, 1 unchanged, 1 now allowed; 2 operations more in unchanged findings"
    )
    assert f"  + {c.op} ×1 → CUB/Thrust" in difference.to_text()
    assert f"+ {c.op} ×1 → CUB/Thrust" in new.to_markdown(old)
    states = [r.get("baselineState") for r in new.to_sarif(old)["runs"][0]["results"]]
    assert states == ["unchanged", "new", "unchanged"]
    assert not baseline.compare(new, new).is_worse


def test_a_new_kernel_is_worse_than_the_baseline() -> None:
    old = AuditReport(graphs=["g"])
    new = old.with_run(timed_run())
    assert [row.name for row in baseline.compare(old, new).new_kernels] == ["nvjet <&> x"]
    assert baseline.compare(old, new).is_worse
    assert not baseline.compare(new, new).is_worse
