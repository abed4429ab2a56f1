"""What an AOTInductor package runs, read from the C++ that Inductor packed beside its library.

Nothing is executed, and torch's loader is not asked: a package is a zip archive. It holds no shapes
and no lines of the model; audit the exported program for those.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from typing import TYPE_CHECKING

from triton_only_backend.audit import policy
from triton_only_backend.audit.generated_code import CodeCall
from triton_only_backend.audit.policy import Provider, Reason, Verdict
from triton_only_backend.audit.reading import ReportFormatError
from triton_only_backend.audit.references import origin_of
from triton_only_backend.audit.report import AuditReport

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

# aoti_torch_cuda_addmm_out(…): an op of ATen through AOTInductor's C interface.
_SHIM = re.compile(r"\baoti_torch_(?:cpu|cuda|xpu|mps)_(\w+)\(")
# aoti_torch_proxy_executor_call_function(proxy_executor, 0, …): the op with that number in a table.
_PROXY = re.compile(r"\baoti_torch_proxy_executor_call_function\(proxy_executor, (\d+)")
_LOAD = re.compile(r"= loadKernel\([^;]*?\"(\w+)\", \d+")  # …, mangled name, shared memory, …
_LAUNCH = re.compile(r"^\s*call_(\w+?)\(", re.MULTILINE)
_CPU_KERNEL = re.compile(r'^extern "C"\s+void\s+(cpp_\w+)\(', re.MULTILINE)
_OP_CALL = re.compile(r"\bat::(?:_ops::(\w+)::call|(\w+)_out)\(")
_REMEDY = "package the model again, with the sources (the default)"


def is_package(path: Path) -> bool:
    """Whether a file is an AOTInductor package."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/data/aotinductor/" in f"/{name}" for name in archive.namelist())


def audit_package(path: Path, allow: Iterable[str] = ()) -> AuditReport:
    """The report on a package's generated code, a graph for each model in it.

    Raises:
        ReportFormatError: the file is no AOTInductor package.
    """
    if not path.is_file() or not is_package(path):
        raise ReportFormatError(f"{path} is no AOTInductor package")
    models: dict[str, list[str]] = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            _, found, inside = f"/{name}".partition("/data/aotinductor/")
            if found and "/" in inside:
                models.setdefault(inside.split("/", 1)[0], []).append(name)
        reports = [
            AuditReport.from_graph(
                (), list(_calls(archive, names)), graph_name=f"package {model}", allow=tuple(allow)
            )
            for model, names in models.items()
        ]
    return AuditReport.merge(reports)


def _calls(archive: zipfile.ZipFile, names: Sequence[str]) -> Iterator[CodeCall]:
    wrappers = [name for name in names if name.endswith(".wrapper.cpp")]
    if not wrappers:
        yield CodeCall(
            name="a library without its source",
            op="a library without its source",
            kind="opaque",
            provider=Provider.UNKNOWN,
            reason=Reason.OPAQUE_CODE,
            remedy=_REMEDY,
        )
    for wrapper in wrappers:
        table = wrapper.removesuffix(".cpp") + ".json"
        nodes = json.loads(archive.read(table)).get("nodes", []) if table in names else []
        targets = [str(node["node"]["target"]) for node in nodes]
        yield from audit_cpp(archive.read(wrapper).decode(), targets)


def audit_cpp(source: str, proxied: Sequence[str] = ()) -> list[CodeCall]:
    """Lists what a C++ wrapper of Inductor's runs.

    Args:
        proxied: the ops that it calls by number: "planted::mm", "torch.ops.aten.sort.stable".
    """
    calls: list[CodeCall] = []
    comment: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    for number, line in enumerate(source.splitlines(), 1):
        if "Source Nodes: [" in line and line.lstrip().startswith("//"):
            origin = origin_of(line)
            comment = (origin.source_nodes, origin.original_aten)
            continue
        for name, op in _ops(line.partition("//")[0], proxied):
            verdict = policy.classify_call(op)
            calls.append(_call(name, op, "extern", verdict, number, *comment))
            comment = ((), ())
    launches = Counter(_LAUNCH.findall(source))
    for pattern, verdict in (
        (_CPU_KERNEL, Verdict(Provider.CPU, Reason.CPU_KERNEL, "compile the package for a GPU")),
        (_LOAD, Verdict(Provider.TRITON_INDUCTOR)),
    ):
        for kernel, match in {found[1]: found for found in pattern.finditer(source)}.items():
            number = source.count("\n", 0, match.start()) + 1
            count = max(launches[kernel], 1)
            calls.append(_call(kernel, kernel, "kernel", verdict, number, count=count))
    return sorted(calls, key=lambda call: call.line)


def _call(
    name: str,
    op: str,
    kind: str,
    verdict: Verdict,
    line: int,
    source_nodes: tuple[str, ...] = (),
    original_aten: tuple[str, ...] = (),
    count: int = 1,
) -> CodeCall:
    return CodeCall(
        name=name,
        op=op,
        kind=kind,
        provider=verdict.provider,
        count=count,
        line=line,
        reason=verdict.reason,
        remedy=verdict.remedy,
        source_nodes=source_nodes,
        original_aten=original_aten,
    )


def _ops(line: str, proxied: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The calls of ops in a line of C++, each with the op's name."""
    for match in _SHIM.finditer(line):
        yield match[0].rstrip("("), _aten_op(match[1])
    for match in _PROXY.finditer(line):
        number = int(match[1])
        target = proxied[number] if number < len(proxied) else "unknown.unknown"
        op = target.removeprefix("torch.ops.").replace("::", ".")
        yield f"proxy executor: {target}", op
    for match in _OP_CALL.finditer(line):
        name = match[1] or match[2]
        yield match[0].rstrip("("), _aten_op(name)


def _aten_op(name: str) -> str:
    """`addmm_out` -> `aten.addmm`, `sort_stable` -> `aten.sort.stable`."""
    parts = name.split("_")
    for end in range(len(parts), 0, -1):
        base = "_".join(parts[:end])
        if base and policy.exists(f"aten.{base}"):
            overload = "_".join(parts[end:])
            op = f"aten.{base}.{overload}" if overload else f"aten.{base}"
            return op if policy.exists(op) else f"aten.{base}"
    return f"aten.{name}"
