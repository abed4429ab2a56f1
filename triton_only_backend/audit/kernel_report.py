"""What one profiled run was made of: each kernel, whose it is, and when it ran."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from triton_only_backend.audit import reading, render
from triton_only_backend.audit.policy import Provider

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import RenderableType

SCHEMA = "triton_only_backend.kernels"
SCHEMA_VERSION = 1
MAX_EVENTS = 4000  # launches that a report keeps one by one


@dataclass(frozen=True)
class KernelRow:
    """All launches of one kernel.

    Attributes:
        name: as the profiler has it; an op's name where the CPU ran it.
        time_us: device time, or CPU time with no GPU, in microseconds.
        share: of the compute time; 0 for copies, fills and communication.
    """

    name: str
    provider: Provider
    count: int
    time_us: float
    share: float

    @property
    def is_violation(self) -> bool:
        """Whether the kernel breaks "Triton only"."""
        return self.provider.is_violation

    def matches(self, pattern: str) -> bool:
        """Whether an `allow` glob names the kernel or its provider."""
        names = (self.name, self.provider.name, self.provider.value)
        return any(fnmatchcase(name.lower(), pattern.lower()) for name in names)


@dataclass(frozen=True)
class KernelEvent:
    """One execution of a kernel, as the profiler saw it; `time_us` is how long it took."""

    name: str
    provider: Provider
    time_us: float
    start_us: float = 0.0


@dataclass(frozen=True)
class KernelReport:
    """Every kernel of one run, the longest first.

    Attributes:
        rows: one for each kernel name.
        device: "gpu", or "interpreter" where the CPU stood in for it.
        events: the launches in order of time, from 0 on. Of more than `MAX_EVENTS` the violations
            and then the longest are kept; `rows` counts them all.
        allow: globs of kernels or providers that may stay; they remain in `rows`.
        environment: versions and GPU.
    """

    rows: tuple[KernelRow, ...]
    device: str
    events: tuple[KernelEvent, ...] = ()
    allow: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def violations(self) -> tuple[KernelRow, ...]:
        """The kernels outside Triton that nothing allows, those that nobody knows included."""
        return tuple(r for r in self.rows if r.is_violation and not self.is_allowed(r))

    @property
    def allowed(self) -> tuple[KernelRow, ...]:
        """The kernels outside Triton that an `allow` glob names."""
        return tuple(row for row in self.rows if row.is_violation and self.is_allowed(row))

    def is_allowed(self, row: KernelRow) -> bool:
        """Whether an `allow` glob names this kernel."""
        return any(map(row.matches, self.allow))

    @property
    def violations_first(self) -> tuple[KernelRow, ...]:
        """The rows: those outside Triton, then the rest, each the longest first."""
        return tuple(sorted(self.rows, key=lambda row: not row.is_violation))

    @property
    def launches(self) -> int:
        """How many kernels, copies and fills were executed."""
        return sum(row.count for row in self.rows)

    @property
    def triton_time_share(self) -> float:
        """Triton's part of the compute time, 0 to 1; 0 when nothing was computed."""
        compute = sum(row.time_us for row in self.rows if row.provider.is_compute)
        triton = sum(row.time_us for row in self.rows if row.provider.is_triton)
        return triton / compute if compute else 0.0

    @property
    def is_triton_only(self) -> bool:
        """Whether Triton kernels ran, and no others but copies, fills and collectives."""
        return not self.violations and any(row.provider.is_triton for row in self.rows)

    def totals(self) -> dict[Provider, tuple[int, float]]:
        """Launches and microseconds by provider."""
        found: dict[Provider, tuple[int, float]] = {}
        for row in self.rows:
            count, time_us = found.get(row.provider, (0, 0.0))
            found[row.provider] = (count + row.count, time_us + row.time_us)
        return found

    def with_allow(self, allow: Iterable[str]) -> KernelReport:
        """The same run, with these globs beside its own."""
        return replace(self, allow=tuple(dict.fromkeys([*self.allow, *allow])))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an event is [index of its row, start in µs, duration in µs]."""
        index = {(row.name, row.provider): number for number, row in enumerate(self.rows)}
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "device": self.device,
            "is_triton_only": self.is_triton_only,
            "triton_time_share": self.triton_time_share,
            "launches": self.launches,
            "rows": [
                {**asdict(row), "provider": row.provider.value, "is_violation": row.is_violation}
                for row in self.rows
            ],
            "events": [
                [index[e.name, e.provider], round(e.start_us, 3), round(e.time_us, 3)]
                for e in self.events
            ],
            "allow": list(self.allow),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KernelReport:
        """The report that `to_dict` made `data` of.

        Raises:
            ReportFormatError: it is something else.
        """
        with reading.checked(data, SCHEMA, SCHEMA_VERSION):
            names = ("name", "count", "time_us", "share")
            rows = tuple(
                KernelRow(**{n: row[n] for n in names}, provider=Provider(row["provider"]))
                for row in data["rows"]
            )
            events = tuple(
                KernelEvent(rows[number].name, rows[number].provider, time_us, start_us)
                for number, start_us, time_us in data["events"]
            )
            environment = dict(data["environment"])
            return cls(rows, data["device"], events, tuple(data["allow"]), environment)

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON; values of `environment` that JSON lacks become text."""
        return json.dumps(self.to_dict(), indent=indent, default=str)

    @classmethod
    def from_json(cls, text: str) -> KernelReport:
        """The report that `to_json` wrote."""
        return cls.from_dict(reading.parse(text))

    def to_text(self, width: int = 120) -> str:
        """The report as a plain table."""
        return render.to_text(self.__rich__(), width)

    def to_markdown(self) -> str:
        """The report as Markdown, for a pull request."""
        from triton_only_backend.audit import markdown

        return markdown.kernel_report(self)

    def to_html(self) -> str:
        """The report as one page of HTML that needs no network."""
        from triton_only_backend.audit import page

        return page.render(None, self)

    def __rich__(self) -> RenderableType:
        return render.kernel_renderable(self)


def report_of(events: Iterable[KernelEvent], device: str) -> KernelReport:
    """Adds up the events of each kernel."""
    ordered = sorted(events, key=lambda event: event.start_us)
    totals: dict[tuple[str, Provider], tuple[int, float]] = {}
    for event in ordered:
        count, time_us = totals.get((event.name, event.provider), (0, 0.0))
        totals[event.name, event.provider] = (count + 1, time_us + event.time_us)
    compute = sum(time for (_, provider), (_, time) in totals.items() if provider.is_compute)
    rows = [
        KernelRow(
            name=name,
            provider=provider,
            count=count,
            time_us=time_us,
            share=time_us / compute if compute and provider.is_compute else 0.0,
        )
        for (name, provider), (count, time_us) in totals.items()
    ]
    rows.sort(key=lambda row: -row.time_us)
    return KernelReport(tuple(rows), device, _capped(ordered))


def _capped(ordered: list[KernelEvent]) -> tuple[KernelEvent, ...]:
    """The events that a report keeps, their times counted from the first of all."""
    begin = ordered[0].start_us if ordered else 0.0
    if len(ordered) > MAX_EVENTS:
        by_weight = sorted(ordered, key=lambda e: (not e.provider.is_violation, -e.time_us))
        ordered = sorted(by_weight[:MAX_EVENTS], key=lambda event: event.start_us)
    return tuple(replace(event, start_us=event.start_us - begin) for event in ordered)
