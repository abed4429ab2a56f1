"""`triton-only bench`: the kernels and whole models against what they replace."""

from __future__ import annotations

import json
import sys
from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import Annotated, Any

import typer

from triton_only_backend.cli_options import Json, Plot, console
from triton_only_backend.errors import nearest
from triton_only_backend.targets import UsageError

app = typer.Typer(
    help="Measure the kernels and whole models against what they replace.", no_args_is_help=True
)


@app.command("gemm")
def bench_gemm(
    shapes: Annotated[
        str, typer.Option(help="llama3-8b, granite-8b, llama3-70b, odd, batched or all.")
    ] = "llama3-8b",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    m: Annotated[
        str, typer.Option("--m", help="Rows, separated by commas.")
    ] = "1,2,4,8,16,32,64,128,256,512,1024,4096,8192",
    providers: Annotated[
        str, typer.Option(help="ours,cublas and, slow to compile, inductor-triton.")
    ] = "ours,cublas",
    layout: Annotated[
        str, typer.Option(help="Weights contiguous along k (as nn.Linear has them) or n.")
    ] = "k",
    weights_ready: Annotated[
        bool,
        typer.Option(
            help="Ours may read weights before the kernel ahead has ended, as in a compiled graph."
        ),
    ] = True,
    plot: Plot = None,
    json_path: Json = None,
) -> None:
    """Our matrix product against cuBLAS, on the shapes of models' linear layers and batches."""
    from triton_only_backend.bench import gemm
    from triton_only_backend.bench.models import DTYPES

    plan = gemm.Plan(
        shapes=_choice("--shapes", shapes, [*gemm.SHAPES, "all"]),
        dtype=_choice("--dtype", dtype, DTYPES),
        rows=_positive_integers("--m", m),
        providers=_choices("--providers", providers, gemm.PROVIDERS),
        k_contiguous=_choice("--layout", layout, ["k", "n"]) == "k",
        weights_ready=weights_ready,
    )
    raise typer.Exit(gemm.run(plan, console(), json_path, _command_line(), plot))


@app.command("attention")
def bench_attention(
    cases: Annotated[
        str,
        typer.Option(
            help="causal, full, decode, training (forward and backward, causal), training-full, "
            "all, or article (causal and decode, batch 1, as many KV heads as heads, as in "
            '"CUDA-Free Inference for LLMs").'
        ),
    ] = "all",
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "bf16",
    kv_heads: Annotated[
        int | None,
        typer.Option(
            min=1, max=32, help="KV heads for 32 query heads; a divisor of 32; 8 if not given."
        ),
    ] = None,
    head_dim: Annotated[int, typer.Option(min=16, max=256, help="Of each head.")] = 128,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Of the prefill and training cases; 2 if not given.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=512, help="Leave longer cases out.")] = 32768,
    providers: Annotated[
        str, typer.Option(help="Of these: ours, and cudnn, flash, efficient or math.")
    ] = "ours,cudnn,flash,efficient,flex,math",
    plot: Plot = None,
    json_path: Json = None,
) -> None:
    """Our attention against PyTorch's cuDNN, Flash, efficient, flex and math kernels."""
    from triton_only_backend.bench import attention, attention_cases

    if kv_heads is not None and attention_cases.HEADS % kv_heads:
        raise UsageError(f"--kv-heads {kv_heads} does not divide the 32 query heads")
    names = _choices("--providers", providers, attention_cases.PROVIDERS)
    if "ours" not in names or not set(names) & set(attention.BACKENDS):
        raise UsageError(f"--providers {providers} does not compare ours with a library's kernel")
    is_article = cases == attention_cases.ARTICLE
    kinds = [*attention_cases.KINDS, "all", attention_cases.ARTICLE]
    plan = attention_cases.Plan(
        kinds=_choice("--cases", cases, kinds),
        dtype=_choice("--dtype", dtype, ["bf16", "fp16"]),
        kv_heads=kv_heads or (attention_cases.HEADS if is_article else 8),
        max_length=max_length,
        head_dim=head_dim,
        batch=batch or (1 if is_article else attention_cases.PREFILL_BATCH),
        providers=names,
    )
    raise typer.Exit(attention.run(plan, console(), json_path, _command_line(), plot))


@app.command("model")
def bench_model(
    model: Annotated[
        str,
        typer.Option(help="llama3-8b, granite-8b-code, plain-llama3-8b, llama-tiny or plain-tiny."),
    ] = "llama3-8b",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of it to build; all if not given.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens in each.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 256,
    providers: Annotated[
        str,
        typer.Option(
            help="Any of eager, triton-eager (our kernels, not compiled), compile, "
            "reduce-overhead, triton_only, triton_only-shipped and triton_only-heuristic (less "
            "the database, and the tables) and, minutes to compile, max-autotune, inductor-triton."
        ),
    ] = "eager,compile,reduce-overhead,triton_only",
    logits_error: Annotated[
        bool, typer.Option(help="Compare logits with those of the same weights in fp32.")
    ] = True,
    json_path: Json = None,
) -> None:
    """Prefill and decode of a whole model with random weights, against other providers."""
    from triton_only_backend.bench import generation, models, trial
    from triton_only_backend.bench.providers import PROVIDERS

    plan = trial.Plan(
        model=_choice("--model", model, models.MODELS),
        dtype=_choice("--dtype", dtype, models.DTYPES),
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        providers=_choices("--providers", providers, PROVIDERS),
        logits_error=logits_error,
        layers=layers,
    )
    plan = plan.for_interpreter() if generation.is_interpreted() else plan
    raise typer.Exit(generation.run(plan, console(), json_path, _command_line()))


@app.command("passes")
def bench_passes(
    model: Annotated[str, typer.Option(help="As for bench model.")] = "llama3-8b",
    layers: Annotated[int, typer.Option(min=1, help="Layers of it to build.")] = 8,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens in each.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the parts of a step there.")
    ] = None,
    json_path: Json = None,
) -> None:
    """What each fusion pass takes off a decode step, switched on one after another."""
    from triton_only_backend.bench import ablation, generation, models, trial

    plan = trial.Plan(
        model=_choice("--model", model, models.MODELS),
        dtype=_choice("--dtype", dtype, models.DTYPES),
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        providers=("triton_only",),
        logits_error=False,
        layers=layers,
    )
    plan = plan.for_interpreter() if generation.is_interpreted() else plan
    raise typer.Exit(ablation.run(plan, console(), json_path, plot, _command_line()))


@app.command("chart")
def bench_chart(
    records: Annotated[list[Path], typer.Argument(help="JSON files of bench model.")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="The picture, by its suffix.")],
) -> None:
    """Draws the records of several models beside one another."""
    from triton_only_backend.bench import plots

    plots.require_drawable(out)
    found: list[tuple[str, list[dict[str, Any]]]] = []
    gpus = set()
    for path in records:
        try:
            record = json.loads(path.read_text())
            plan, rows = record["summary"]["plan"], record["rows"]
            name = f"{plan['model']}\n{plan['dtype']}, batch {plan['batch']}, {plan['prompt']} in"
            keys = ("provider", *plots.PROVIDER_TIMES)
            found.append((name, [{key: row[key] for key in keys} for row in rows]))
            gpus.add(record["environment"]["gpu"] or "CPU")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is no record of bench model ({error!r})") from error
        if not rows:
            raise UsageError(f"{path} holds no measurement")
    names = [name for name, _ in found]
    told_apart = [
        (f"{name}\n{path.stem}" if names.count(name) > 1 else name, rows)
        for path, (name, rows) in zip(records, found, strict=True)
    ]
    title = f"One token and one prefill, by provider, on {', '.join(sorted(gpus))}"
    plots.plot_providers(told_apart, out, title)


def _choice(option: str, value: str, choices: Any) -> str:
    names = list(choices)
    if value not in names:
        raise UsageError(
            f"{option} {value!r} is not known{nearest(value, names)} (one of {', '.join(names)})"
        )
    return value


def _choices(option: str, text: str, choices: Any) -> tuple[str, ...]:
    return tuple(_choice(option, name.strip(), choices) for name in text.split(","))


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
