"""Every op of a graph with who runs it: what a report's coverage and its pictures are made of."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from triton_only_backend.audit.findings import generalise
from triton_only_backend.audit.policy import Provider

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from triton_only_backend.audit.generated_code import CodeCall
    from triton_only_backend.audit.graph import GraphOp

_LOWERED = "usually a library's; Inductor made Triton code of it"
_UNEXPLAINED = "in the generated code; no op of the graph explains it"


@dataclass(frozen=True)
class OpRow:
    """One op of a graph, with every place where it occurs alike.

    Attributes:
        op: "aten.mm.default".
        provider: who runs it, by the generated code where there is some.
        graph: "graph 0 (forward)".
        inputs, outputs, dtypes, modules, source_line: as for `Finding`.
        note: what the generated code changed in the graph's verdict.
        positions: where it stands in the order of the graph; one for each occurrence.
    """

    op: str
    provider: Provider
    graph: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    source_line: str = ""
    note: str = ""
    positions: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How often it occurs."""
        return len(self.positions)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {**asdict(self), "provider": self.provider.value}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OpRow:
        """The row that `to_dict` made `data` of."""
        values: dict[str, Any] = {name: data[name] for name in cls.__dataclass_fields__}
        values["provider"] = Provider(data["provider"])
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values)


@dataclass(frozen=True)
class Coverage:
    """Triton's part, 0 to 1, of all that computes; None where it is not known.

    Attributes:
        ops: of the ops of the graphs.
        calls: of the calls and kernel launches in the generated code.
        time: of the compute time of a profiled run.
    """

    ops: float | None = None
    calls: float | None = None
    time: float | None = None


def share(counts: Mapping[Provider, int]) -> float | None:
    """Triton's part of what computes; copies, fills, communication and views do not."""
    compute = sum(n for provider, n in counts.items() if provider.is_compute)
    triton = sum(n for provider, n in counts.items() if provider.is_triton)
    return triton / compute if compute else None


def percent(part: float | None) -> str:
    """`99.9%`; rounded down, so that only all of it is 100%."""
    return "–" if part is None else f"{math.floor(part * 1000 + 1e-9) / 10:.1f}%"


def count_by_provider(rows: Iterable[OpRow]) -> Counter[Provider]:
    """How many ops each provider runs; views and the like are left out."""
    counts: Counter[Provider] = Counter()
    for row in rows:
        if row.provider is not Provider.NONE:
            counts[row.provider] += row.count
    return counts


def rows_of(
    graph_ops: Sequence[GraphOp],
    calls: Sequence[CodeCall] | None,
    linked: Sequence[GraphOp | None],
    graph: str,
) -> list[OpRow]:
    """The ops of a graph in order, those alike in one row, by the generated code's verdict.

    Args:
        calls: the calls outside Triton in the generated code; None when there is no code.
        linked: for each of them the op that it came from.
    """
    rows = [_row(op, graph, index) for index, op in enumerate(graph_ops)]
    if calls is not None:
        pairs = list(zip(calls, linked, strict=True))
        called = {id(op): call.provider for call, op in pairs if op is not None}
        lowered = {id(op) for op in lowered_ops(graph_ops, calls, linked)}
        for index, op in enumerate(graph_ops):
            if id(op) in called:
                rows[index] = replace(rows[index], provider=called[id(op)])
            elif id(op) in lowered:
                rows[index] = replace(rows[index], provider=Provider.TRITON_INDUCTOR, note=_LOWERED)
        rows += [
            OpRow(call.op, call.provider, graph, note=_UNEXPLAINED, positions=(len(rows) + index,))
            for index, call in enumerate(call for call, op in pairs if op is None)
        ]
    return _group(rows)


def lowered_ops(
    graph_ops: Sequence[GraphOp], calls: Sequence[CodeCall], linked: Sequence[GraphOp | None]
) -> list[GraphOp]:
    """The flagged ops that Inductor made Triton code of: the generated code does not call them.

    Where a provider has calls that no op explains, nothing is said of its ops.
    """
    called = {id(op) for op in linked}
    unclear = {call.provider for call, op in zip(calls, linked, strict=True) if op is None}
    return [
        op
        for op in graph_ops
        if op.is_violation and id(op) not in called and op.provider not in unclear
    ]


def _row(op: GraphOp, graph: str, position: int) -> OpRow:
    return OpRow(
        op=op.op,
        provider=op.provider,
        graph=graph,
        inputs=op.inputs,
        outputs=op.outputs,
        dtypes=op.dtypes,
        modules=(op.module_path,) if op.module_path else (),
        source_line=op.source_line,
        positions=(position,),
    )


def _group(rows: Iterable[OpRow]) -> list[OpRow]:
    """Adds up rows that differ only in their position and the number of their layer."""
    groups: dict[OpRow, list[OpRow]] = {}
    for row in rows:
        key = replace(row, modules=tuple(map(generalise, row.modules)), positions=())
        groups.setdefault(key, []).append(row)
    return [
        replace(
            alike[0],
            modules=tuple(dict.fromkeys(module for row in alike for module in row.modules)),
            positions=tuple(position for row in alike for position in row.positions),
        )
        for alike in groups.values()
    ]
