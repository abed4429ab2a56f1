"""What `triton-only demo` prints: one model, eager and on Triton kernels only, side by side.

Both runs go through the same `generate` over the same decoder; only the step function differs.
The audit that is shown belongs to the very graphs that produced the text.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text

from triton_only_backend import interpreter, settings
from triton_only_backend.demo import byte_llama
from triton_only_backend.demo.generate import StaticDecoder, generate
from triton_only_backend.errors import SettingsError
from triton_only_backend.files import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from triton_only_backend.audit import AuditReport
    from triton_only_backend.demo.generate import Step

BACKEND: Any = "triton_only"
PROMPT = "In the beginning "
CACHE_MULTIPLE = 16


@dataclass(frozen=True)
class Plan:
    """Sizes that depend on the hardware: the interpreter takes seconds where a GPU takes none.

    Attributes:
        device: where the model runs.
        mode: of `torch.compile`.
        options: of `torch.compile`: what `mode` stands for, and our own.
        max_new_tokens: tokens to generate.
        warmup: runs that are not timed: one compiles, CUDA graphs need two more to be recorded.
        warmup_tokens: tokens of each of them; two reach the prefill and the decode step.
        runs: timed runs, of which the fastest counts.
    """

    device: torch.device
    mode: str
    options: dict[str, Any]
    max_new_tokens: int
    warmup: int
    warmup_tokens: int
    runs: int


@dataclass(frozen=True)
class Run:
    """One way to run the model: the ids it generated, shape (1, N), and how long things took."""

    tokens: torch.Tensor
    seconds: float
    warmup_seconds: float

    @property
    def text(self) -> str:
        """What was generated, the prompt left out."""
        return byte_llama.decode(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens by seconds, the prefill included, the warm-up not."""
        return self.tokens.numel() / self.seconds


def make_plan(max_new_tokens: int | None, mode: str | None) -> Plan:
    """The plan for this machine, with what the user asked for in place of the defaults.

    Raises:
        SettingsError: `mode` is none that the backend takes.
    """
    interpreted = interpreter.wanted()
    if interpreted:
        device, default_mode, default_tokens = "cpu", "default", 24
    else:
        device = "cuda" if torch.cuda.is_available() else "xpu"
        default_mode, default_tokens = "reduce-overhead", 256
    mode = default_mode if mode is None else mode
    return Plan(
        device=torch.device(device),
        mode=mode,
        options=compile_options(mode),
        max_new_tokens=default_tokens if max_new_tokens is None else max_new_tokens,
        warmup=1 if interpreted else 3,
        warmup_tokens=2 if interpreted else 4,
        runs=1 if interpreted else 3,
    )


def compile_options(mode: str) -> dict[str, Any]:
    """The options of a compile in `mode` that leaves it to the demo to report violations.

    `torch.compile` takes a mode or options, never both, so the mode is spelled out as options.
    """
    return {**settings.parse(mode).inductor, "on_violation": "ignore"}


def measure(step: Step, decoder: StaticDecoder, prompt: torch.Tensor, plan: Plan) -> Run:
    """Generates with `step` until the plan is fulfilled.

    Args:
        step: eager or compiled.
        decoder: owner of the cache.
        prompt: token ids, int64, shape (1, S).
        plan: how often and how much.
    """

    def timed(new_tokens: int) -> tuple[torch.Tensor, float]:
        begin = time.perf_counter()
        tokens = generate(step, decoder, prompt, new_tokens).cpu()
        return tokens, time.perf_counter() - begin

    warmups = [timed(min(plan.warmup_tokens, plan.max_new_tokens)) for _ in range(plan.warmup)]
    runs = [timed(plan.max_new_tokens) for _ in range(plan.runs)]
    return Run(
        tokens=runs[-1][0],
        seconds=min(seconds for _, seconds in runs),
        warmup_seconds=sum(seconds for _, seconds in warmups),
    )


def audited(
    decoder: StaticDecoder, prompt: torch.Tensor, plan: Plan
) -> tuple[Run, AuditReport, int]:
    """Compiles and measures; returns also the audit of the graphs compiled, and their number."""
    from triton_only_backend.audit import AuditReport
    from triton_only_backend.backend import compiled_reports

    step = torch.compile(
        decoder.forward, backend=BACKEND, fullgraph=True, dynamic=False, options=plan.options
    )
    earlier = compiled_reports()
    run = measure(step, decoder, prompt, plan)
    reports = [new for new in compiled_reports() if all(new is not old for old in earlier)]
    return run, AuditReport.merge(reports), len(reports)


def run_demo(
    prompt: str | None,
    max_new_tokens: int | None,
    mode: str | None,
    console: Console,
    json_path: Path | None,
) -> int:
    """Generates text twice, compares, audits, and shows it all.

    Args:
        prompt: text to continue; None for the default one.
        max_new_tokens: tokens to generate; None for 256 on a GPU and 24 in the interpreter.
        mode: of `torch.compile`; None for "reduce-overhead" on a GPU and "default" elsewhere.
        console: where to print.
        json_path: a file to write the same facts to, or None.

    Returns:
        The exit status: 0; 1 if the texts differ or the audit found a violation; 2 if the request
        cannot be met.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        plan = make_plan(max_new_tokens, mode)
    except SettingsError as error:
        console.print(str(error), markup=False)
        return 2
    prompt = PROMPT if prompt is None else prompt
    tokens = byte_llama.encode(prompt).to(plan.device)
    model = byte_llama.load(plan.device)
    length = tokens.shape[1] + plan.max_new_tokens
    longest = model.config.max_position_embeddings
    if tokens.shape[1] == 0 or plan.max_new_tokens < 1 or length > longest:
        console.print(
            f"a prompt of {tokens.shape[1]} bytes and {plan.max_new_tokens} new ones: each must be "
            f"at least 1, and their sum at most {longest}",
            markup=False,
        )
        return 2

    console.print(_headline(model.num_parameters(), plan), style="bold", markup=False)
    cache_length = min(longest, -(-length // CACHE_MULTIPLE) * CACHE_MULTIPLE)
    decoder = StaticDecoder(model, cache_length)
    eager = measure(decoder.forward, decoder, tokens, plan)
    _print_text(console, "PyTorch eager", prompt, eager)
    with console.status("compiling for Triton only…"):
        compiled, report, graphs = audited(decoder, tokens, plan)
    _print_text(console, "torch.compile, backend=triton_only", prompt, compiled)

    identical = torch.equal(eager.tokens, compiled.tokens)
    console.print(_comparison(eager, compiled, identical, graphs))
    console.print(report.to_text(), markup=False, highlight=False)
    if json_path is not None:
        facts = {
            "device": _device_name(plan.device),
            "mode": plan.mode,
            "prompt": prompt,
            "max_new_tokens": plan.max_new_tokens,
            "texts": {"eager": eager.text, "triton_only": compiled.text},
            "identical": identical,
            "tokens_per_second": {
                "eager": eager.tokens_per_second,
                "triton_only": compiled.tokens_per_second,
            },
            "compile_and_warmup_seconds": compiled.warmup_seconds,
            "compiled_graphs": graphs,
            "audit": report.to_dict(),
        }
        write_json(json_path, facts)
    return 0 if identical and report.is_triton_only else 1


def _headline(parameters: int, plan: Plan) -> str:
    return (
        f"byte-level Llama, {parameters / 1e6:.1f} M parameters, float32, on "
        f'{_device_name(plan.device)}, mode="{plan.mode}"'
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "the CPU (Triton interpreter)"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _print_text(console: Console, title: str, prompt: str, run: Run) -> None:
    console.print(f"\n{title}", style="bold cyan", markup=False)
    console.print(Text.assemble((prompt, "dim"), run.text))


def _comparison(eager: Run, compiled: Run, identical: bool, graphs: int) -> Table:
    table = Table("", "eager", "triton_only", title_justify="left")
    table.add_row(
        "tokens/s", f"{eager.tokens_per_second:,.1f}", f"{compiled.tokens_per_second:,.1f}"
    )
    table.add_row("compile and warm-up", "", f"{compiled.warmup_seconds:.1f} s")
    table.add_row("graphs", "", str(graphs))
    table.add_row("same text", "", "[green]yes" if identical else "[bold red]no")
    return table
