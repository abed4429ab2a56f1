"""What the passes did to each graph: how often each fired, and what it declined, with the facts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class PassResult(Protocol):
    """What the audit reads of a pass's result."""

    @property
    def name(self) -> str:
        """The pass."""

    @property
    def fired(self) -> int:
        """How often it changed the graph."""

    @property
    def refusals(self) -> Mapping[str, int]:
        """What it declined to rewrite and why, with counts."""


@dataclass(frozen=True)
class PassRow:
    """One pass on one graph, or on all of a model's.

    Attributes:
        name: "rewrite_matmul".
        graph: "graph 0 (forward)"; "" for all of them.
        fired: how often it changed the graph.
        declined: why it left an operation as it was, each with how often.
    """

    name: str
    graph: str = ""
    fired: int = 0
    declined: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PassRow:
        """The row that `to_dict` made `data` of."""
        return cls(data["name"], data["graph"], data["fired"], dict(data["declined"]))


def rows_of(results: Iterable[PassResult], graph: str) -> list[PassRow]:
    """One row a pass: its results on a graph and on those nested in it, added up."""
    rows = _add_up((result.name, result.fired, result.refusals) for result in results)
    return [replace(row, graph=graph) for row in rows]


def totals(rows: Iterable[PassRow]) -> list[PassRow]:
    """The rows of all graphs added up, in the order of the passes."""
    return _add_up((row.name, row.fired, row.declined) for row in rows)


def _add_up(parts: Iterable[tuple[str, int, Mapping[str, int]]]) -> list[PassRow]:
    fired: Counter[str] = Counter()
    declined: dict[str, Counter[str]] = {}
    for name, count, reasons in parts:
        fired[name] += count
        declined.setdefault(name, Counter()).update(reasons)
    return [PassRow(name, "", fired[name], dict(declined[name])) for name in declined]
