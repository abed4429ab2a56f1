"""Results as JSON, with what they depend on, and as a Markdown table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from triton_only_backend.files import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass
class Record:
    """One benchmark: where it ran, how it was called, and what came out.

    Attributes:
        environment: see `environment.collect`.
        command: the command line.
        rows: one mapping for each measurement; a value that was not measured is None or missing.
        summary: figures over all rows.
    """

    environment: dict[str, Any]
    command: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path | None) -> None:
        """Writes the record as JSON, whole or not at all; without a path it does nothing."""
        if path is not None:
            write_json(path, asdict(self))

    def to_markdown(self, columns: Sequence[str]) -> str:
        """The rows as a Markdown table, under a line that says where they were measured."""
        keys = ("gpu", "torch", "triton", "transformers", "cuda", "rocm", "date")
        facts = [f"{k} {self.environment[k]}" for k in keys if self.environment.get(k)]
        return f"{', '.join(facts)}\n\n{markdown_table(self.rows, columns)}"


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table of the named columns, numbers aligned to the right."""
    numeric = [all(not isinstance(row.get(c), str) for row in rows) for c in columns]
    lines = [f"| {' | '.join(columns)} |"]
    lines.append(f"|{'|'.join('---:' if right else '---' for right in numeric)}|")
    lines += [f"| {' | '.join(format_value(row.get(c)) for c in columns)} |" for row in rows]
    return "\n".join(lines)


def format_value(value: Any) -> str:
    """A table cell: three significant digits for fractions, "–" for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if value != 0 and abs(value) < 0.01:
            return f"{value:.1e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
