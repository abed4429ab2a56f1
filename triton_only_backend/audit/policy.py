"""Which library an op runs on, whether that breaks "Triton only", why, and what to do about it.

Ops are named by strings, `namespace.op.overload`, so that the graph, the generated code and the
profiler ask the same table. The order of judgement is:

1. our own namespace and the ops that launch no kernel (views, allocations, assertions);
2. the table below, for ops that run on a library;
3. Inductor's registries: an op with a lowering becomes Triton, one with a fallback stays on ATen;
4. anything else is a user's op or unknown, and a violation until it is allowed.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

from triton_only_backend import inductor
from triton_only_backend.audit.library_ops import ROWS
from triton_only_backend.audit.vocabulary import Provider as Provider
from triton_only_backend.audit.vocabulary import Reason as Reason
from triton_only_backend.audit.vocabulary import Verdict as Verdict

OURS = "triton_only"
# Ops that copy or fill when called by themselves.
_COPIES = frozenset({"to", "_to_copy", "copy_", "clone", "contiguous", "cpu", "cuda", "copy"})
_FILLS = frozenset({"zero_", "zeros", "zeros_like", "new_zeros"})
_TORCH_NAMESPACES = frozenset({"aten", "prims", "inductor", "rngprims", "fsdp", "higher_order"})


def _build_table() -> tuple[dict[str, Verdict], tuple[tuple[str, Verdict], ...]]:
    exact: dict[str, Verdict] = {}
    patterns: list[tuple[str, Verdict]] = []
    for provider, reason, remedy, names in ROWS:
        for name in names.split():
            verdict = Verdict(provider, reason, remedy)
            if "*" in name:
                patterns.append((name, verdict))
            else:
                exact.setdefault(name, verdict)
    return exact, tuple(patterns)


_EXACT, _PATTERNS = _build_table()


def packet(op: str) -> str:
    """`aten.sort.stable` -> `aten.sort`; in-place and `out=` spellings are left alone."""
    return ".".join(op.split(".")[:2])


def in_table(op: str) -> bool:
    """Whether the table names this op as one that a library runs."""
    verdict = _from_table(op)
    return verdict is not None and verdict.is_violation


def exists(op: str) -> bool:
    """Whether torch knows an op of that name."""
    return _find_overload(op) is not None


@functools.lru_cache(maxsize=4096)
def _from_table(op: str) -> Verdict | None:
    base = packet(op)
    for name in (base, base.rstrip("_")):  # aten.addmm_ runs what aten.addmm runs
        if name in _EXACT:
            return _EXACT[name]
        for pattern, verdict in _PATTERNS:
            if fnmatchcase(name, pattern):
                return verdict
    return None


def classify(op: str) -> Verdict:
    """The verdict on an op of a graph that Inductor is about to lower.

    Args:
        op: `aten.mm.default`, `aten.mm`, `triton_only.mm.default`, `higher_order.cond`, …
    """
    namespace = op.split(".", 1)[0]
    if namespace == OURS:
        return Verdict(Provider.TRITON_OURS)
    verdict = _from_table(op)
    if verdict is not None:
        return replace(verdict, remedy=verdict.remedy or _default_remedy(op, verdict))
    overload = _find_overload(op)
    if overload is not None and _is_view(overload):
        return Verdict(Provider.NONE)
    if overload is not None and inductor.has_triton_lowering(overload):
        return Verdict(Provider.TRITON_INDUCTOR)
    if namespace not in _TORCH_NAMESPACES:
        return _with_remedy(op, Verdict(Provider.USER, Reason.USER_OP))
    if namespace == "higher_order" or overload is None:
        return _with_remedy(op, Verdict(Provider.UNKNOWN, Reason.UNKNOWN_OP))
    return _with_remedy(op, Verdict(Provider.ATEN, Reason.NO_TRITON_LOWERING))


def classify_call(op: str) -> Verdict:
    """The verdict on an op that generated code, or eager code, calls by name.

    A lowering that Inductor has but did not use proves nothing: a called op runs ATen's kernel.
    """
    verdict = classify(op)
    if packet(op) in ("aten.copy_", "aten.copy"):
        return Verdict(Provider.MEMCPY)
    if verdict.provider is Provider.TRITON_INDUCTOR and not op.startswith("higher_order."):
        return _with_remedy(op, Verdict(Provider.ATEN, Reason.NO_TRITON_LOWERING))
    return verdict


def eager_provider(op: str) -> Provider:
    """Who runs an op that eager code calls by itself: a copy or a fill is no computation there."""
    namespace, _, name = packet(op).partition(".")
    if namespace == "aten" and name in _COPIES:
        return Provider.MEMCPY
    if namespace == "aten" and name in _FILLS:
        return Provider.MEMSET
    return classify_call(op).provider


def _with_remedy(op: str, verdict: Verdict) -> Verdict:
    return replace(verdict, remedy=_default_remedy(op, verdict))


def _default_remedy(op: str, verdict: Verdict) -> str:
    if not verdict.is_violation:
        return ""
    allow = f'allow=["{packet(op)}*"] lets it stay'
    if verdict.provider is Provider.USER:
        return f"write it in Triton with torch.library.triton_op, or {allow}"
    return f"rewrite it with ops that Inductor lowers to Triton, or {allow}"


def op_name(target: Any) -> str:
    """The name of a call_function target: an op overload, a packet or a higher-order op."""
    import torch

    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.__name__}"
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target)
    module = getattr(target, "__module__", None) or type(target).__module__
    return f"{module}.{getattr(target, '__qualname__', repr(target))}"


def _find_overload(op: str) -> Any:
    """The OpOverload of that name, the first overload of a packet, or None."""
    import torch

    parts = op.split(".")
    if len(parts) < 2 or parts[0] == "higher_order" or not all(map(str.isidentifier, parts)):
        return None
    found = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    if not isinstance(found, torch._ops.OpOverloadPacket):
        return None
    if len(parts) > 2:
        return getattr(found, parts[2], None)
    overloads: list[str] = cast("Any", found).overloads()
    return getattr(found, overloads[0]) if overloads else None


def _is_view(overload: Any) -> bool:
    returns = overload._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )
