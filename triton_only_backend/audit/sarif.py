"""Reports as SARIF 2.1.0: a result for each finding, at the user's line of code."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from triton_only_backend.audit import baseline as baselines
from triton_only_backend.audit.policy import Reason

if TYPE_CHECKING:
    from triton_only_backend.audit.findings import Finding
    from triton_only_backend.audit.kernel_report import KernelRow
    from triton_only_backend.audit.report import AuditReport

SCHEMA_URI = "https://json.schemastore.org/sarif-2.1.0.json"
RUN_RULE = "KERNEL_AT_RUN_TIME"
_RUN_RULE_TEXT = "a kernel outside Triton was executed"
_ROOT = "SRCROOT"


def log_of(report: AuditReport, baseline: AuditReport | None = None) -> dict[str, Any]:
    """The whole log, as plain values.

    Lines are given relative to the working directory where the file is under it. With a baseline
    each finding says whether it is new.
    """
    from triton_only_backend import __version__

    before = None if baseline is None else {finding.identity for finding in baseline.findings}
    told = [(finding, "error") for finding in report.findings]
    told += [(finding, "note") for finding in report.allowed]
    results = [_result(finding, level, before) for finding, level in told]
    rules = _rules([finding for finding, _ in told])
    if report.run is not None and report.run.violations:
        rules.append(_rule(RUN_RULE, _RUN_RULE_TEXT, "audit the op whose implementation runs it"))
        difference = None if baseline is None else baselines.compare(baseline, report)
        fresh = None if difference is None else difference.new_kernels
        results += [_run_result(row, fresh) for row in report.run.violations]
    order = {rule["id"]: index for index, rule in enumerate(rules)}
    return {
        "$schema": SCHEMA_URI,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "triton-only",
                        "semanticVersion": __version__,
                        "rules": rules,
                    }
                },
                "originalUriBaseIds": {_ROOT: {"uri": f"{Path.cwd().as_uri()}/"}},
                "columnKind": "unicodeCodePoints",
                "results": [{**r, "ruleIndex": order[r["ruleId"]]} for r in results],
            }
        ],
    }


def rule_id(finding: Finding) -> str:
    """The name of the finding's reason."""
    return (finding.reason or Reason.UNKNOWN_OP).name


def _rules(findings: list[Finding]) -> list[dict[str, Any]]:
    """One rule a reason; what to do about its findings is its help."""
    remedies: dict[str, dict[str, None]] = {}
    for finding in findings:
        remedies.setdefault(rule_id(finding), {}).update(dict.fromkeys([finding.remedy]))
    return [
        _rule(name, Reason[name].value, "\n".join(filter(None, texts)))
        for name, texts in sorted(remedies.items())
    ]


def _rule(name: str, text: str, remedy: str) -> dict[str, Any]:
    return {
        "id": name,
        "name": name.title().replace("_", ""),
        "shortDescription": {"text": f"Outside Triton: {text}"},
        "help": {"text": remedy or text},
        "defaultConfiguration": {"level": "error"},
    }


def _result(finding: Finding, level: str, before: set[str] | None) -> dict[str, Any]:
    shapes = f" [{finding.shapes}]" if finding.shapes else ""
    text = f"{finding.op} ×{finding.count}{shapes} runs on {finding.provider.value}"
    text += "".join(f". {part}" for part in (finding.why, finding.remedy) if part)
    result: dict[str, Any] = {
        "ruleId": rule_id(finding),
        "level": level,
        "message": {"text": text},
        "locations": [_location(finding)],
        "partialFingerprints": {
            "tritonOnlyFinding/v1": hashlib.sha256(finding.identity.encode()).hexdigest()
        },
        "properties": finding.to_dict(),
    }
    if before is not None:
        result["baselineState"] = "unchanged" if finding.identity in before else "new"
    return result


def _location(finding: Finding) -> dict[str, Any]:
    location: dict[str, Any] = {}
    place = finding.source_place
    if place is not None:
        artifact = {"uri": quote(Path(place.file).as_posix())}
        if Path(place.file).is_file():  # the graph names files relative to the working directory
            artifact["uriBaseId"] = _ROOT
        location["physicalLocation"] = {
            "artifactLocation": artifact,
            "region": {"startLine": place.line},
        }
    names = [(module, "module") for module in finding.modules] or [(finding.op, "function")]
    location["logicalLocations"] = [
        {"fullyQualifiedName": name, "kind": kind} for name, kind in names
    ]
    return location


def _run_result(row: KernelRow, fresh: tuple[KernelRow, ...] | None) -> dict[str, Any]:
    text = f"{row.name} ×{row.count} ran on {row.provider.value}, {row.share:.1%} of compute time"
    result: dict[str, Any] = {
        "ruleId": RUN_RULE,
        "level": "error",
        "message": {"text": text},
        "locations": [{"logicalLocations": [{"fullyQualifiedName": row.name, "kind": "function"}]}],
    }
    if fresh is not None:
        result["baselineState"] = "new" if row in fresh else "unchanged"
    return result
