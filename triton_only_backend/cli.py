"""`triton-only`: the demo, the audit, the profiler and the benchmarks from the command line.

Exit status: 0 clean, 1 violations (or wrong results), 2 wrong usage. Everything heavy is imported
by the command that needs it.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from triton_only_backend import cli_audit, cli_bench, cli_minimise, cli_tune
from triton_only_backend.cli_options import Json, Mode, console, write_json
from triton_only_backend.errors import TritonOnlyError
from triton_only_backend.targets import UsageError
from triton_only_backend.targets import load_target as load_target

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    name="triton-only",
    help="PyTorch models on Triton kernels alone: see it, prove it, measure it.",
    epilog="Exit status: 0 clean, 1 violations, 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_bench.app, name="bench")
app.command()(cli_audit.audit)
app.command()(cli_audit.profile)
app.command()(cli_tune.tune)
app.command()(cli_minimise.minimise)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line (`sys.argv` by default) and exits with its status."""
    try:
        app(args=arguments, prog_name="triton-only")
    except TritonOnlyError as error:
        message = " ".join(str(error).split())
        print(f"triton-only: {message.removeprefix('triton_only: ')}", file=sys.stderr)
        raise SystemExit(2) from None


def _show_version(value: bool) -> None:
    if value:
        import triton_only_backend

        typer.echo(triton_only_backend.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to generate; 256 on a GPU, else 24.")
    ] = None,
    mode: Mode = None,
    json_path: Json = None,
) -> None:
    """Generate text with a small Llama, eager and on Triton only, and audit what ran."""
    from triton_only_backend import settings

    settings.parse(mode)
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("the demo needs transformers: pip install 'triton-only-backend[demo]'")
    from triton_only_backend.demo.show import run_demo

    raise typer.Exit(run_demo(prompt, max_new_tokens, mode, console(), json_path))


@app.command()
def env(json_path: Json = None) -> None:
    """Print versions and hardware, for a bug report."""
    from triton_only_backend import environment

    found = environment.collect()
    width = max(map(len, found))
    for key, value in found.items():
        typer.echo(f"{key:<{width}}  {'-' if value is None else value}")
    write_json(json_path, found)


if __name__ == "__main__":
    main()
