"""`triton-only audit` and `triton-only profile`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triton_only_backend.cli_options import (
    FACTORY,
    Allow,
    Html,
    Json,
    Markdown,
    Mode,
    NoGrad,
    Target,
    console,
    form,
    grad_mode,
    write_json,
    write_text,
)
from triton_only_backend.targets import UsageError, load_target

if TYPE_CHECKING:
    from collections.abc import Callable

    from triton_only_backend.audit import AuditReport, KernelReport


def audit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY|SCRIPT.py|FILE.pt2",
            help=f"{FACTORY} Or a script: it is run with each torch.compile on this backend. "
            "Or what torch.export.save or AOTInductor wrote.",
            show_default=False,
        ),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS]", help="The script's arguments.")
    ] = None,
    json_path: Json = None,
    markdown: Markdown = None,
    html: Html = None,
    sarif: Annotated[
        Path | None, form("--sarif", "Write it there as SARIF 2.1.0, for code hosts.")
    ] = None,
    baseline: Annotated[
        Path | None,
        form("--baseline", "An older report as JSON: fail on new violations only."),
    ] = None,
    allow: Allow = None,
    mode: Mode = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Compile for dynamic shapes.")] = False,
    no_grad: NoGrad = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="cuda:90",
            help="Audit what would be compiled for such a GPU, which need not be there.",
        ),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Also profile one run, and report the kernels that ran.")
    ] = False,
) -> None:
    """Compile a model, or run a script, and report every operation outside Triton."""
    from triton_only_backend import environment
    from triton_only_backend.audit import baseline as baselines
    from triton_only_backend.audit.package import audit_package, is_package
    from triton_only_backend.audit.reading import read_report

    old = None if baseline is None else read_report(baseline)
    allow = allow or []
    failure = ""
    if target.endswith(".py"):
        if mode or dynamic or no_grad or run or device:
            raise UsageError(
                "--mode, --dynamic, --no-grad, --target and --run are for module:factory; a script "
                "says so itself"
            )
        report, failure = _audit_script(Path(target), arguments or [], allow)
    elif arguments:
        raise UsageError(f"only a script takes arguments, got {' '.join(arguments)}")
    elif target.endswith(".pt2") and is_package(Path(target)):
        if mode or dynamic or no_grad or run or device:
            raise UsageError("--mode, --dynamic, --no-grad, --target and --run are for models")
        report = audit_package(Path(target), allow)
    else:
        if run and device:
            raise UsageError("--run needs the device; --target is for one that is not there")
        report = _audit_target(target, allow, mode, dynamic, no_grad, run, device)
    found = {**report.environment, **environment.collect()}
    report = dataclasses.replace(report, environment=found)
    terminal = console()
    terminal.print(report, soft_wrap=True)
    write_json(json_path, report.to_dict())
    write_text(markdown, lambda: report.to_markdown(old))
    write_text(html, report.to_html)
    write_json(sarif, report.to_sarif(old) if sarif else None)
    clean = report.is_triton_only
    if old is not None:
        difference = baselines.compare(old, report)
        terminal.print(difference.to_text(), markup=False, highlight=False, soft_wrap=True)
        clean = bool(report.graphs) and not difference.is_worse
    if failure:
        raise UsageError(f"the audit is not complete: {target} {failure}")
    raise typer.Exit(0 if clean else 1)


def _audit_script(path: Path, arguments: list[str], allow: list[str]) -> tuple[AuditReport, str]:
    from triton_only_backend.scripts import run_script

    ran = run_script(path, arguments, allow)
    if ran.is_cut:
        print(f"triton-only: only the last {len(ran.report.graphs)} graphs", file=sys.stderr)
    return ran.report, ran.failure


def _audit_target(
    target: str,
    allow: list[str],
    mode: str | None,
    dynamic: bool,
    no_grad: bool,
    run: bool,
    device: str | None,
) -> AuditReport:
    from triton_only_backend import model_audit

    model, args, kwargs = load_target(target)
    with grad_mode(no_grad):
        report = model_audit.audit_with(
            model,
            args,
            kwargs,
            mode=mode,
            options={"allow": allow} if allow else None,
            dynamic=True if dynamic else None,
            target=device,
        )
        return report.with_run(_profile(model, args, kwargs, mode)) if run else report


def _profile(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: str | None,
    eager: bool = False,
) -> KernelReport:
    import torch

    from triton_only_backend.audit import profile as profile_kernels
    from triton_only_backend.backend import triton_only
    from triton_only_backend.bench.providers import own_options

    options = own_options(mode)
    backend: Any = triton_only
    function = model if eager else torch.compile(model, backend=backend, options=options)

    def call() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call,unused-ignore]
        function(*args, **kwargs)

    return profile_kernels(call)


def profile(
    target: Target,
    json_path: Json = None,
    markdown: Markdown = None,
    html: Html = None,
    allow: Allow = None,
    mode: Mode = None,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile.")] = False,
    no_grad: NoGrad = False,
) -> None:
    """Run a compiled model and list every kernel that ran, with its provider and time."""
    from triton_only_backend import environment, settings

    settings.parse(mode)
    model, args, kwargs = load_target(target)
    with grad_mode(no_grad):
        report = _profile(model, args, kwargs, mode, eager).with_allow(allow or [])
    report = dataclasses.replace(report, environment=environment.collect())
    console().print(report)
    write_json(json_path, report.to_dict())
    write_text(markdown, report.to_markdown)
    write_text(html, report.to_html)
    raise typer.Exit(0 if report.is_triton_only else 1)
