"""`triton-only minimise`: a graph on which a pass fails, cut down to a small script."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triton_only_backend import files
from triton_only_backend.cli_options import Json, Target, write_json
from triton_only_backend.errors import nearest
from triton_only_backend.targets import UsageError, load_target

if TYPE_CHECKING:
    from triton_only_backend.testing.minimising import Reduced


def minimise(
    target: Target,
    graph_pass: Annotated[
        str,
        typer.Option(
            "--pass",
            metavar="MODULE:PASS",
            help="The pass, in a module or a file (path/to/file.py:name): a function of a graph, a "
            "CustomGraphPass or its class.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", dir_okay=False, help="Where to write the script.")
    ] = Path("reproducer.py"),
    stage: Annotated[str, typer.Option(help="dynamo, joint or post_grad.")] = "post_grad",
    check: Annotated[
        list[str] | None,
        typer.Option(help="numerics, meta or mutation; by default all. The pass itself always."),
    ] = None,
    training: Annotated[bool, typer.Option("--training", help="With a backward to come.")] = False,
    backward: Annotated[
        bool, typer.Option("--backward", help="The backward's graph, at stage post_grad.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    json_path: Json = None,
) -> None:
    """Reduce a model's graph on which a pass fails to a small script that shows it."""
    from triton_only_backend import testing
    from triton_only_backend.testing.minimising import CHECKS, NothingFailsError

    checks = check or list(CHECKS)
    for name in checks:
        if name not in CHECKS:
            raise UsageError(
                f"--check {name!r} is not known{nearest(name, CHECKS)} (one of {', '.join(CHECKS)})"
            )
    model, args, kwargs = load_target(target)
    found, statement = load_pass(graph_pass)
    options: dict[str, Any] = {
        "stage": stage,
        "training": training or backward,
        "part": "backward" if backward else "forward",
    }
    gm = testing.capture(model, *args, kwargs=kwargs, **options)
    inputs = testing.random_inputs(gm, seed=seed)
    try:
        reduced = testing.minimise(gm, found, inputs, checks=checks)
    except NothingFailsError as error:
        typer.echo(str(error))
        write_json(json_path, {"failure": None})
        raise typer.Exit(0) from None
    files.write_text(out, testing.reproducer(reduced, statement, graph_pass=found))
    typer.echo(str(reduced.failure))
    typer.echo(f"{reduced.nodes_before} calls reduced to {reduced.nodes}; python {out} shows it")
    write_json(json_path, _as_dict(reduced, out))
    raise typer.Exit(1)


def load_pass(text: str) -> tuple[Any, str]:
    """A pass, and the statements of a script after which it is called `graph_pass`.

    Raises:
        UsageError: there is no such thing.
    """
    place, separator, name = text.rpartition(":")
    if not separator or not place or not name.isidentifier():
        raise UsageError(f"--pass {text!r} is not of the form module:name or path/to/file.py:name")
    lines = ""
    module_name = place
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
        folder, module_name = str(path.parent.resolve()), path.stem
        lines = f"import sys\n\nsys.path.append({folder!r})\n"
        sys.path.append(folder)
    else:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"cannot import {place}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found) and not hasattr(found, "apply"):
        raise UsageError(f"{place} has no pass {name!r}{nearest(name, vars(module))}")
    lines += f"from {module_name} import {name} as graph_pass"
    if isinstance(found, type):
        return found(), f"{lines}\n\ngraph_pass = graph_pass()"
    return found, lines


def _as_dict(reduced: Reduced, out: Path) -> dict[str, Any]:
    return {
        "failure": {"where": reduced.failure.where, "error": reduced.failure.error,
                    "message": reduced.failure.message},
        "calls": {"before": reduced.nodes_before, "after": reduced.nodes},
        "script": str(out),
    }  # fmt: skip
