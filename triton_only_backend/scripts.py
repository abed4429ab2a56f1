"""Runs a script as it stands, with this backend in the place of torch.compile's own."""

from __future__ import annotations

import contextlib
import functools
import runpy
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triton_only_backend.targets import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from triton_only_backend.audit import AuditReport


@dataclass(frozen=True)
class ScriptRun:
    """What came of a script.

    Attributes:
        report: over all graphs that were compiled while it ran.
        failure: how it failed: "raised ValueError", "ended with status 3"; "" if it did not.
        is_cut: whether there were more graphs than the backend remembers.
    """

    report: AuditReport
    failure: str
    is_cut: bool


def run_script(path: Path, arguments: Sequence[str] = (), allow: Sequence[str] = ()) -> ScriptRun:
    """Runs a script as `__main__`; what it compiles with Inductor goes to this backend.

    Violations do not stop it. What the script raises is printed and ends it, not the audit.

    Args:
        allow: globs that may stay, beside the script's own.

    Raises:
        UsageError: there is no such file.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    from triton_only_backend import backend, inductor
    from triton_only_backend.audit import AuditReport

    earlier = backend.compiled_reports()
    breaks = inductor.GraphBreaks()
    outcome = _Outcome()
    with _as_main(path, arguments), _on_this_backend(allow), outcome:
        runpy.run_path(str(path), run_name="__main__")
    known = set(map(id, earlier))  # `earlier` lives on, so that no new report has one of their ids
    reports = [report for report in backend.compiled_reports() if id(report) not in known]
    report = AuditReport.merge(reports, graph_breaks=breaks.reasons())
    return ScriptRun(report, outcome.failure, len(reports) >= backend.KEPT_REPORTS)


class _Outcome:
    """Ends whatever ends a script, and says how it ended; an interrupt goes on."""

    failure = ""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if isinstance(error, SystemExit):
            if error.code not in (None, 0):
                self.failure = f"ended with status {error.code}"
            return True
        if kind is None or not issubclass(kind, Exception):
            return False
        traceback.print_exception(kind, error, trace)
        self.failure = f"raised {kind.__name__}"
        return True


@contextlib.contextmanager
def _as_main(path: Path, arguments: Sequence[str]) -> Iterator[None]:
    argv, search = sys.argv, list(sys.path)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = search


@contextlib.contextmanager
def _on_this_backend(allow: Sequence[str]) -> Iterator[None]:
    import torch

    from triton_only_backend.backend import triton_only
    from triton_only_backend.bench.providers import own_options

    original: Any = torch.compile

    @functools.wraps(original)
    def compile_here(
        model: Callable[..., Any] | None = None,
        *,
        backend: Any = "inductor",
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> Any:
        if backend not in ("inductor", "triton_only", triton_only) or (mode and options):
            return original(model, backend=backend, mode=mode, options=options, **rest)
        given = {**own_options(mode), **(options or {})}
        given |= {"on_violation": "ignore", "allow": [*given.get("allow", ()), *allow]}
        return original(model, backend=triton_only, options=given, **rest)

    torch.compile = compile_here
    try:
        yield
    finally:
        torch.compile = original
