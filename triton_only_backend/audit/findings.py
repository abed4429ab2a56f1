"""One operation of a report, told by what the graph and the generated code know of it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from triton_only_backend.audit import policy
from triton_only_backend.audit.policy import Provider, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from triton_only_backend.audit.generated_code import CodeCall
    from triton_only_backend.audit.graph import GraphOp

_SOURCE_LINE = re.compile(r"(?P<file>.+?):(?P<line>\d+) in (?P<function>[^\s:]+)")


class SourcePlace(NamedTuple):
    """Where a line of the user's code stands."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class Finding:
    """One operation that runs outside Triton, with every place where it does so alike.

    A report's notes and its lists of copies and collectives are made of the same facts.

    Attributes:
        op: "aten.sort.default".
        provider: who runs it.
        count: how many such operations there are.
        reason, detail: why; the detail holds the facts of a pass's refusal.
        refused: the pass's own name for its reason, "" if no pass refused.
        remedy: what to do about it.
        inputs, outputs, dtypes: as "bf16[2, 4096]"; empty where the graph op is not known.
        modules: the modules that it occurs in.
        source_line: the user's line of code.
        graph: the compiled graph, "graph 0 (forward)".
        call, code_line: the call in the generated code and its line; "" and 0 without code.
        graph_op: the op of the graph that led to the call.
        allowed_by: the glob that allows it; "" if none does.
    """

    op: str
    provider: Provider
    count: int = 1
    reason: Reason | None = None
    detail: str = ""
    refused: str = ""
    remedy: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    source_line: str = ""
    graph: str = ""
    call: str = ""
    code_line: int = 0
    graph_op: str = ""
    allowed_by: str = ""

    @property
    def shapes(self) -> str:
        """`bf16[2, 4096], bf16[4096, 64] -> bf16[2, 64]`, or "" where they are not known."""
        if not self.inputs and not self.outputs:
            return ""
        return f"{', '.join(self.inputs)} -> {', '.join(self.outputs)}".strip()

    @property
    def module_path(self) -> str:
        """`layers.0.mlp`, or `layers.*.mlp (32 modules)` for all of its modules."""
        return module_pattern(self.modules)

    @property
    def source_place(self) -> SourcePlace | None:
        """The source line's file, line and function; None where no line is known."""
        match = _SOURCE_LINE.match(self.source_line)
        if match is None:
            return None
        return SourcePlace(match["file"], int(match["line"]), match["function"])

    @property
    def identity(self) -> str:
        """What makes it the same finding in another report: the op, the place and the reason.

        The place is the function that the op is called in, or the module's path with its layer
        numbers left out; line numbers, shapes and counts do not matter.
        """
        place = self.source_place
        modules = sorted({generalise(module) for module in self.modules})
        where = f"{place.file}:{place.function}" if place else ",".join(modules)
        return f"{self.op} | {where} | {self.refused or (self.reason.name if self.reason else '')}"

    @property
    def why(self) -> str:
        """The reason and its detail in one line; what a refusing pass says holds both."""
        if self.refused:
            return self.detail
        parts = [self.reason.value if self.reason else "", self.detail]
        return ": ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        values["provider"] = self.provider.value
        values["reason"] = self.reason.name if self.reason else None
        values["why"] = self.why
        values["shapes"] = self.shapes
        values["module_path"] = self.module_path
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """The finding that `to_dict` made `data` of."""
        data = {"allowed_by": "", **data}  # which early reports have not
        values: dict[str, Any] = {name: data[name] for name in cls.__dataclass_fields__}
        values["provider"] = Provider(data["provider"])
        values["reason"] = None if data["reason"] is None else Reason[data["reason"]]
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values)

    def matches(self, pattern: str) -> bool:
        """Whether an `allow` glob names the op, the call, the op it came from or its provider.

        "model.vision.*::aten.convolution*" holds only where all of its modules match as well.
        """
        modules, separator, names = pattern.rpartition("::")
        if separator and not all(fnmatchcase(m, modules) for m in self.modules or ("",)):
            return False
        known = [self.op, self.call, self.graph_op, self.provider.name, self.provider.value]
        known += [policy.packet(self.op), policy.packet(self.graph_op)]
        return any(name and fnmatchcase(name.lower(), names.lower()) for name in known)


def link(calls: Sequence[CodeCall], graph_ops: Sequence[GraphOp]) -> list[GraphOp | None]:
    """For each call of the generated code, the graph op that it came from, where that is clear.

    Inductor's comment above a call names source nodes and original ops. An op is claimed once: by
    the first call that names both its node and its op, then by either. What then remains is paired
    in order if, for a provider, as many calls as flagged ops are left.
    """
    linked: list[GraphOp | None] = [None] * len(calls)
    free = list(graph_ops)
    for threshold in (3, 2):
        for index, call in enumerate(calls):
            if linked[index] is None:
                best = max(free, key=lambda op: _affinity(call, op), default=None)
                if best is not None and _affinity(call, best) >= threshold:
                    linked[index] = best
                    free.remove(best)
    for provider in {call.provider for call in calls}:
        left = [i for i, c in enumerate(calls) if linked[i] is None and c.provider is provider]
        ops = [op for op in free if op.provider is provider and op.is_violation]
        if len(left) == len(ops):
            for index, op in zip(left, ops, strict=True):
                linked[index] = op
    return linked


def _affinity(call: CodeCall, op: GraphOp) -> int:
    """3: same op and same node; 2: same op, or a flagged op of the same node; else 0."""
    same_op = policy.packet(call.op) == policy.packet(op.op)
    same_node = bool(set(call.source_nodes) & set(op.source_nodes))
    if same_op and same_node:
        return 3
    if same_op or (same_node and op.is_violation and op.provider is call.provider):
        return 2
    return 0


def from_op(op: GraphOp, graph: str) -> Finding:
    """The finding on a flagged op of a graph."""
    return Finding(
        op=op.op,
        provider=op.provider,
        reason=op.reason,
        detail=op.detail,
        refused=op.refused,
        remedy=op.remedy,
        inputs=op.inputs,
        outputs=op.outputs,
        dtypes=op.dtypes,
        modules=(op.module_path,) if op.module_path else (),
        source_line=op.source_line,
        graph=graph,
        graph_op=op.op,
    )


def from_call(call: CodeCall, op: GraphOp | None, graph: str) -> Finding:
    """The finding on a call of the generated code, told by the graph op that it came from."""
    finding = Finding(
        op=call.op,
        provider=call.provider,
        count=call.count,
        reason=call.reason,
        remedy=call.remedy,
        graph=graph,
    )
    if op is not None:
        same_op = policy.packet(call.op) == policy.packet(op.op)
        finding = replace(
            from_op(op, graph),
            op=op.op if same_op else call.op,
            provider=call.provider,
            count=call.count,
            reason=op.reason or call.reason,
            remedy=op.remedy or call.remedy,
        )
    return replace(finding, call=call.name, code_line=call.line)


def module_pattern(modules: Sequence[str]) -> str:
    """`layers.0.mlp`, or `layers.*.mlp (32 modules)` for several."""
    if len(modules) < 2:
        return "".join(modules)
    return f"{generalise(modules[0])} ({len(modules)} modules)"


def generalise(module_path: str) -> str:
    """`layers.0.mlp` -> `layers.*.mlp`."""
    return re.sub(r"\b\d+\b", "*", module_path)


def group(findings: Iterable[Finding]) -> list[Finding]:
    """Adds up findings that differ only in the number of their layer and their line of code."""
    groups: dict[Finding, Finding] = {}
    for finding in findings:
        pattern = tuple(generalise(module) for module in finding.modules)
        key = replace(finding, modules=pattern, count=0, code_line=0)
        known = groups.get(key)
        if known is None:
            groups[key] = finding
        else:
            modules = tuple(dict.fromkeys([*known.modules, *finding.modules]))
            groups[key] = replace(known, count=known.count + finding.count, modules=modules)
    return list(groups.values())
