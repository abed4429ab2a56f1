"""What changed between two reports. A finding is the same by its op, its place and its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from triton_only_backend.audit.findings import Finding
    from triton_only_backend.audit.kernel_report import KernelReport, KernelRow
    from triton_only_backend.audit.report import AuditReport


@dataclass(frozen=True)
class Difference:
    """A report against an older one.

    Attributes:
        new, unchanged: findings of the newer report.
        fixed: findings of the older report that the newer one has not.
        allowed: findings of the older report that the newer one allows.
        new_kernels: kernels outside Triton in the newer report's run, not in the older one's.
        more: how many operations the unchanged findings have more than before.
    """

    new: tuple[Finding, ...]
    unchanged: tuple[Finding, ...]
    fixed: tuple[Finding, ...]
    allowed: tuple[Finding, ...]
    new_kernels: tuple[KernelRow, ...]
    more: int

    @property
    def is_worse(self) -> bool:
        """Whether the newer report has a violation that the older one has not."""
        return bool(self.new or self.new_kernels)

    @property
    def summary(self) -> str:
        """`1 new, 2 fixed, 5 unchanged`."""
        counts: list[tuple[int, str]] = [
            (len(self.new), "new"),
            (len(self.fixed), "fixed"),
            (len(self.unchanged), "unchanged"),
        ]
        if self.allowed:
            counts.append((len(self.allowed), "now allowed"))
        text = ", ".join(f"{count} {word}" for count, word in counts)
        if self.new_kernels:
            text += f"; {len(self.new_kernels)} new at run time"
        return text + (f"; {self.more} operations more in unchanged findings" if self.more else "")

    def to_dict(self) -> dict[str, Any]:
        """The identities of the findings, and the names of new kernels."""
        return {
            "new": [finding.identity for finding in self.new],
            "fixed": [finding.identity for finding in self.fixed],
            "unchanged": [finding.identity for finding in self.unchanged],
            "allowed": [finding.identity for finding in self.allowed],
            "new_kernels": [row.name for row in self.new_kernels],
        }

    def to_text(self) -> str:
        """The summary, then a line for each finding."""
        lines = [f"Against the baseline: {self.summary}"]
        for sign, findings in (("+", self.new), ("-", self.fixed), ("=", self.unchanged)):
            lines += [f"  {sign} {line_of(finding)}" for finding in findings]
        lines += [f"  ~ {line_of(finding)} (now allowed)" for finding in self.allowed]
        for row in self.new_kernels:
            lines.append(f"  + {row.name} ×{row.count} → {row.provider.value} (at run time)")
        return "\n".join(lines)


def line_of(finding: Finding) -> str:
    """A finding in one line: op, provider and place."""
    place = finding.source_place
    where = f"{place.file}:{place.line} in {place.function}" if place else finding.module_path
    text = f"{finding.op} ×{finding.count} → {finding.provider.value}"
    return f"{text}, {where}" if where else text


def compare(old: AuditReport, new: AuditReport) -> Difference:
    """What `new` has more and less than `old`."""
    before = {finding.identity for finding in old.findings}
    after = {finding.identity for finding in new.findings}
    allowed = {finding.identity for finding in new.allowed} - after
    gone = [finding for finding in old.findings if finding.identity not in after]
    unchanged = [finding for finding in new.findings if finding.identity in before]
    known = {(row.provider, row.name) for row in _violations(old.run)}
    grown = _total(unchanged) - _total(f for f in old.findings if f.identity in after)
    return Difference(
        new=tuple(finding for finding in new.findings if finding.identity not in before),
        unchanged=tuple(unchanged),
        fixed=tuple(finding for finding in gone if finding.identity not in allowed),
        allowed=tuple(finding for finding in gone if finding.identity in allowed),
        new_kernels=tuple(
            row for row in _violations(new.run) if (row.provider, row.name) not in known
        ),
        more=max(grown, 0),
    )


def _violations(run: KernelReport | None) -> tuple[KernelRow, ...]:
    return () if run is None else run.violations


def _total(findings: Iterable[Finding]) -> int:
    return sum(finding.count for finding in findings)
