"""The report as JSON: it fits its schema, can be read back, and is refused if damaged."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from audit_samples import check_schema, sample_report, timed_run

from triton_only_backend.audit import AuditReport, KernelReport, Provider, Reason, reading


@pytest.fixture
def report() -> AuditReport:
    return sample_report()


def test_json_fits_the_published_schema(report: AuditReport) -> None:
    schema = AuditReport.json_schema()
    for example in (report, AuditReport(), replace(report, run=None, cudagraphs=None)):
        check_schema(json.loads(example.to_json()), schema, schema)
    check_schema(json.loads(timed_run().to_json()), schema["$defs"]["kernels"], schema)


def test_the_schema_knows_every_word() -> None:
    words = AuditReport.json_schema()["$defs"]
    assert words["provider"]["enum"] == [provider.value for provider in Provider]
    assert words["reason"]["enum"] == [*(reason.name for reason in Reason), None]


@pytest.mark.parametrize("key", ["findings", "coverage", "schema_version", "ops"])
def test_the_check_of_the_schema_is_not_blind(report: AuditReport, key: str) -> None:
    schema = AuditReport.json_schema()
    data = report.to_dict()
    with pytest.raises(AssertionError):
        check_schema({**data, key: "wrong"}, schema, schema)
    with pytest.raises(AssertionError):
        check_schema({**data, f"{key}_": 1}, schema, schema)
    del data[key]
    with pytest.raises(AssertionError):
        check_schema(data, schema, schema)


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
