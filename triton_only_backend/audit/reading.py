"""Reading reports back from JSON: whole and right, or an error that says what is wrong."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from triton_only_backend.errors import TritonOnlyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from triton_only_backend.audit.report import AuditReport


class ReportFormatError(TritonOnlyError, ValueError):
    """A file or a mapping that is no report, or one of another version."""


@contextmanager
def checked(data: object, schema: str, version: int) -> Iterator[None]:
    """Turns what goes wrong while a report is read into a `ReportFormatError`."""
    found = (data.get("schema"), data.get("schema_version")) if isinstance(data, dict) else None
    if found != (schema, version):
        told = f"{found[0]!r} version {found[1]!r}" if found else f"a {type(data).__name__}"
        raise ReportFormatError(f"expected {schema!r} version {version}, got {told}")
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ReportFormatError(f"not a report: {type(error).__name__}: {error}") from error


def parse(text: str) -> Any:
    """JSON as plain values."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ReportFormatError(f"not JSON: {error}") from error


def read_report(path: Path) -> AuditReport:
    """The report in a file: one, or the list that the option `report` writes, as one.

    Raises:
        ReportFormatError: there is no such file, or it holds something else.
    """
    from triton_only_backend.audit.report import AuditReport

    try:
        data: list[Mapping[str, Any]] | Mapping[str, Any] = parse(path.read_text(encoding="utf-8"))
        if isinstance(data, list):
            return AuditReport.merge(AuditReport.from_dict(item) for item in data)
        return AuditReport.from_dict(data)
    except (OSError, UnicodeDecodeError, ReportFormatError) as error:
        raise ReportFormatError(f"cannot read a report from {path}: {error}") from error
