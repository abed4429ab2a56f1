"""`triton-only`: the demo, the audit, the profiler and the benchmarks from the command line.

Exit status: 0 clean, 1 violations (or wrong results), 2 wrong usage. Everything heavy is imported
by the command that needs it.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triton_only_backend import cli_audit
from triton_only_backend.cli_options import Json, Mode, console, write_json
from triton_only_backend.errors import TritonOnlyError, nearest
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
bench_app = typer.Typer(
    help="Measure the kernels and whole models against what they replace.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")
app.command()(cli_audit.audit)
app.command()(cli_audit.profile)


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


@bench_app.command("gemm")
def bench_gemm(
    shapes: Annotated[str, typer.Option(help="llama3-8b, granite-8b or all.")] = "llama3-8b",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    m: Annotated[
        str, typer.Option("--m", help="Rows, separated by commas.")
    ] = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096",
    json_path: Json = None,
) -> None:
    """Our matrix product against cuBLAS, on the shapes of a model's linear layers."""
    from triton_only_backend.bench import gemm
    from triton_only_backend.bench.models import DTYPES

    plan = gemm.Plan(
        shapes=_choice("--shapes", shapes, [*gemm.SHAPES, "all"]),
        dtype=_choice("--dtype", dtype, DTYPES),
        rows=_positive_integers("--m", m),
    )
    raise typer.Exit(gemm.run(plan, console(), json_path, _command_line()))


@bench_app.command("attention")
def bench_attention(
    cases: Annotated[str, typer.Option(help="causal, full, decode or all.")] = "all",
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "bf16",
    kv_heads: Annotated[
        int, typer.Option(min=1, max=32, help="KV heads for 32 query heads; a divisor of 32.")
    ] = 8,
    max_length: Annotated[int, typer.Option(min=512, help="Leave longer cases out.")] = 32768,
    json_path: Json = None,
) -> None:
    """Our attention against PyTorch's cuDNN, FlashAttention, efficient and math kernels."""
    from triton_only_backend.bench import attention

    if 32 % kv_heads:
        raise UsageError(f"--kv-heads {kv_heads} does not divide the 32 query heads")
    plan = attention.Plan(
        kinds=_choice("--cases", cases, [*attention.KINDS, "all"]),
        dtype=_choice("--dtype", dtype, ["bf16", "fp16"]),
        kv_heads=kv_heads,
        max_length=max_length,
    )
    raise typer.Exit(attention.run(plan, console(), json_path, _command_line()))


@bench_app.command("model")
def bench_model(
    model: Annotated[
        str, typer.Option(help="llama3-8b, granite-8b-code or llama-tiny.")
    ] = "llama3-8b",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens in each.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 256,
    providers: Annotated[
        str,
        typer.Option(help="Any of eager, compile, reduce-overhead, inductor-triton, triton_only."),
    ] = "eager,compile,reduce-overhead,triton_only",
    logits_error: Annotated[
        bool, typer.Option(help="Compare logits with those of the same weights in fp32.")
    ] = True,
    json_path: Json = None,
) -> None:
    """Prefill and decode of a whole model with random weights, against other providers."""
    from triton_only_backend.bench import generation, models
    from triton_only_backend.bench.providers import PROVIDERS

    names = [name.strip() for name in providers.split(",")]
    plan = generation.Plan(
        model=_choice("--model", model, models.MODELS),
        dtype=_choice("--dtype", dtype, models.DTYPES),
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        providers=tuple(_choice("--providers", name, PROVIDERS) for name in names),
        logits_error=logits_error,
    )
    plan = plan.for_interpreter() if generation.is_interpreted() else plan
    raise typer.Exit(generation.run(plan, console(), json_path, _command_line()))


def _choice(option: str, value: str, choices: Any) -> str:
    names = list(choices)
    if value not in names:
        raise UsageError(
            f"{option} {value!r} is not known{nearest(value, names)} (one of {', '.join(names)})"
        )
    return value


def _positive_integers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} {text!r} must be positive integers separated by commas")
    return tuple(int(part) for part in parts)


def _command_line() -> str:
    """What was asked for, less where its result was to be written."""
    words = sys.argv[1:]
    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if "--json" not in (before, word) and not word.startswith("--json=")
    ]
    return " ".join(["triton-only", *kept])


if __name__ == "__main__":
    main()
