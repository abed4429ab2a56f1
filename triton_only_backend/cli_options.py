"""What the commands share: options of one meaning, the terminal, the files they write."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triton_only_backend import files

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

PIPE_WIDTH = 160  # columns when the output is not a terminal

FACTORY = (
    "A factory in an importable module or in a file (path/to/file.py:factory). It returns "
    "(model, args) or (model, args, kwargs), or a model whose attribute example_inputs holds "
    "its arguments."
)


def form(option: str, text: str) -> Any:
    """An option that names a file to write."""
    return typer.Option(option, metavar="PATH", dir_okay=False, help=text)


Target = Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help=FACTORY, show_default=False)]
Json = Annotated[Path | None, form("--json", "Write the result there as JSON.")]
Markdown = Annotated[Path | None, form("--markdown", "Write it there as Markdown.")]
Html = Annotated[Path | None, form("--html", "Write it there as one page of HTML.")]
Plot = Annotated[Path | None, form("--plot", "Draw it there: .png, .svg, .pdf.")]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help='An op or provider that may stay: "aten.sort*", "cudnn", "vision.*::aten.conv*".',
    ),
]
Mode = Annotated[
    str | None,
    typer.Option("--mode", help="torch.compile's mode: default, reduce-overhead, max-autotune, …"),
]
NoGrad = Annotated[
    bool, typer.Option("--no-grad", help="Run under torch.no_grad(): inference, no backward.")
]


def grad_mode(no_grad: bool) -> Any:
    """torch.no_grad() if asked for."""
    import torch

    return torch.no_grad() if no_grad else contextlib.nullcontext()


def console() -> Console:
    """The terminal, or something as wide as a report where there is none."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=PIPE_WIDTH)


def write_json(path: Path | None, data: Any) -> None:
    """Writes plain values, if there is a path, whole or not at all."""
    if path is not None:
        files.write_json(path, data)


def write_text(path: Path | None, render: Callable[[], str]) -> None:
    """Renders and writes, if there is a path, whole or not at all."""
    if path is not None:
        files.write_text(path, render())
