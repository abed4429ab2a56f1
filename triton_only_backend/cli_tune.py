"""`triton-only tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triton_only_backend.cli_options import FACTORY, Json, NoGrad, console, form, write_json
from triton_only_backend.targets import UsageError, load_target
from triton_only_backend.tune_report import Bar, as_dict, describe, summary

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from triton_only_backend.tuning.problems import Problem
    from triton_only_backend.tuning.search import Outcome


def tune(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:FACTORY|GRAPH.pt2|SHAPES.txt]",
            help=f"What to tune. {FACTORY} Or a graph saved by torch.export. Or a file with a "
            "shape a line.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="[BATCHx]MxNxK", help="A product; M may be several: 1,2,4x6144x4096."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Products: llama (Llama-3-8B's layers), all (and many others), random (200 of any "
            "shape). attention: prefill and decoding of 32 heads."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the shapes: bf16, fp16, fp32 or tf32.")] = "bf16",
    layout: Annotated[
        str, typer.Option(help="Of the shapes' weights: k (as nn.Linear has them) or n contiguous.")
    ] = "k",
    budget: Annotated[
        float | None, typer.Option(min=0, help="Seconds, after which no measurement is begun.")
    ] = None,
    candidates: Annotated[
        int, typer.Option(min=0, help="Configurations of a problem to measure; 0 for all.")
    ] = 24,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile; all cores but one.")
    ] = None,
    database: Annotated[
        Path | None, form("--database", "Where the results are kept; in the user's cache if left.")
    ] = None,
    export: Annotated[
        Path | None, form("--export", "Write what the database holds as a table to ship.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the problems and candidates; needs no GPU.")
    ] = False,
    no_grad: NoGrad = False,
    json_path: Json = None,
) -> None:
    """Measure kernel configurations for a model's products and keep the best.

    Ctrl-C ends it and loses nothing; the same command goes on where it ended.
    """
    from triton_only_backend import settings
    from triton_only_backend.database import default_path, writing
    from triton_only_backend.tuning import tables

    terminal = console()
    problems = _problems(target, shape or [], preset, dtype, layout, no_grad)
    if not problems and export is None:
        raise UsageError("name what to tune: a model, --shape or --preset (or only --export)")
    if dry_run:
        _list(problems, candidates, terminal)
        return
    chosen = settings.from_environment().database
    path = database or (default_path() if chosen in (None, "none") else Path(str(chosen)))
    with writing(path) as found:
        outcomes: list[Outcome] = []
        stopped = False
        if problems:
            outcomes, stopped = _search(found, problems, candidates, budget, processes, terminal)
        if export is not None:
            count = tables.export(found, export, _gpu_name() if problems else None)
            terminal.print(f"{export}: {count} problems", markup=False, highlight=False)
    write_json(json_path, [as_dict(outcome) for outcome in outcomes])
    if problems:
        left = len(problems) - len(outcomes)
        more = f"; {left} are left: the same command goes on" if left or stopped else ""
        terminal.print(f"{len(outcomes)} problems tuned, in {path}{more}", highlight=False)
    for line in summary(outcomes):
        terminal.print(line, highlight=False)
    if stopped:
        raise typer.Exit(130)


def _problems(
    target: str | None,
    shapes: list[str],
    preset: str | None,
    dtype: str,
    layout: str,
    no_grad: bool,
) -> list[Problem]:
    from triton_only_backend.tuning import problems

    if dtype not in problems.ELEMENT_SIZES:
        raise UsageError(f"--dtype {dtype!r} is none of {', '.join(problems.ELEMENT_SIZES)}")
    if layout not in ("k", "n"):
        raise UsageError(f"--layout {layout!r} is neither k nor n")
    if preset is not None and preset not in problems.PRESETS:
        raise UsageError(f"--preset {preset!r} is none of {', '.join(problems.PRESETS)}")
    found = [p for text in shapes for p in problems.parse_shape(text, dtype, layout == "k")]
    if preset is not None:
        found += problems.preset(preset)
    if target is not None and target.endswith(".txt"):
        found += problems.read_shapes(Path(target), dtype, layout == "k")
    elif target is not None:
        found += _of_model(target, no_grad)
    return list(dict.fromkeys(found))


def _of_model(target: str, no_grad: bool) -> list[Problem]:
    """The problems of a model, which is compiled and run once, in the order it meets them."""
    from triton_only_backend import model_audit
    from triton_only_backend.cli_options import grad_mode
    from triton_only_backend.tuning.problems import recorded

    loader = load_exported if target.endswith(".pt2") else load_target
    model, args, kwargs = loader(target)
    with grad_mode(no_grad):
        return recorded(lambda: model_audit.audit_with(model, args, kwargs))


def load_exported(path: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model that torch.export.save wrote, and the inputs that it was exported with.

    Raises:
        UsageError: the file cannot be read, or holds no inputs.
    """
    import zipfile

    import torch

    try:
        program = torch.export.load(path)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot load {path}: {error}") from error
    if program.example_inputs is None:
        raise UsageError(f"{path} holds no example inputs; export the model with them")
    args, kwargs = program.example_inputs
    return program.module(), tuple(args), dict(kwargs)


def _list(problems: list[Problem], candidates: int, terminal: Console) -> None:
    """What would be measured: on this GPU, or with none on an H200."""
    from triton_only_backend.kernels.hardware import Hardware, of
    from triton_only_backend.tuning import spaces

    found = of_current()
    hardware = of(found) if found else Hardware("NVIDIA H200", "cuda", "sm90", 132, 232448)
    terminal.print(f"on {hardware.name}:", highlight=False)
    for kind, problem in problems:
        count = len(spaces.candidates(kind, problem, hardware, candidates))
        terminal.print(f"{describe(kind, problem)}: {count} candidates", highlight=False)


def of_current() -> Any:
    """The current CUDA or ROCm device, or None."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _gpu_name() -> str:
    from triton_only_backend.kernels.hardware import of

    return of(of_current()).name


def _search(
    database: Any,
    problems: list[Problem],
    candidates: int,
    budget: float | None,
    processes: int | None,
    terminal: Console,
) -> tuple[list[Outcome], bool]:
    """The outcomes, and whether Ctrl-C ended the search."""
    from triton_only_backend.kernels import hardware
    from triton_only_backend.timing import require_gpu
    from triton_only_backend.tuning.compilation import Pool, current_target
    from triton_only_backend.tuning.search import Search
    from triton_only_backend.tuning.trial import make_trial

    device = require_gpu()
    found = hardware.of(device)
    with Bar(terminal) as bar, Pool(current_target(), found, processes) as pool:
        search = Search(
            found, database, pool, lambda kind, problem: make_trial(kind, problem, device), bar,
            limit=candidates, budget=budget,
        )  # fmt: skip
        try:
            search.run(problems)
        except KeyboardInterrupt:
            return bar.outcomes, True
    return bar.outcomes, False
