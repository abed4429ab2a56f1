"""The report for code hosts: SARIF, and what is new since a baseline."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from audit_samples import check_schema, finding, sample_report, timed_run

from triton_only_backend.audit import AuditReport, Reason, baseline
from triton_only_backend.audit.places import source_line


@pytest.fixture
def report() -> AuditReport:
    return sample_report()


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
        check_schema(json.loads(json.dumps(log)), one("log"), {"$defs": SARIF})
    wrong = report.to_sarif()
    wrong["runs"][0]["results"][0]["severity"] = "error"
    with pytest.raises(AssertionError, match="severity"):
        check_schema(wrong, one("log"), {"$defs": SARIF})


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
