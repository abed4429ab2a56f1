"""The shipped model and the demo that runs it."""

from __future__ import annotations

import io
import json
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("transformers")

from rich.console import Console
from torch._dynamo.utils import counters

from triton_only_backend import interpreter
from triton_only_backend.demo import byte_llama, show
from triton_only_backend.demo.generate import StaticDecoder, generate

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlamaForCausalLM

# Psalm 23:1-4, King James Version (public domain): one verse a line, as in the training text.
VERSES = b"""The LORD is my shepherd; I shall not want.
He maketh me to lie down in green pastures: he leadeth me beside the still waters.
He restoreth my soul: he leadeth me in the paths of righteousness for his name's sake.
Yea, though I walk through the valley of the shadow of death, I will fear no evil: for thou art
"""
PROMPT = "And God said, "
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return byte_llama.load()


def greedy_without_cache(
    model: LlamaForCausalLM, prompt: torch.Tensor, new_tokens: int
) -> torch.Tensor:
    """Reference for `generate`: the whole sequence is computed again for each token."""
    tokens = prompt
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(input_ids=tokens, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens[:, prompt.shape[1] :]


def test_every_byte_survives_the_round_trip() -> None:
    data = bytes(range(256))
    tokens = byte_llama.encode(data)
    assert tokens.shape == (1, 256)
    assert byte_llama.decode_bytes(tokens) == data


def test_text_survives_the_round_trip() -> None:
    text = "Génesis — ἐν ἀρχῇ"
    assert byte_llama.decode(byte_llama.encode(text)) == text


def test_invalid_utf8_decodes_to_printable_text() -> None:
    assert byte_llama.decode(torch.tensor([[0x41, 0xFF]])) == "A\N{REPLACEMENT CHARACTER}"


def test_checkpoint_is_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in byte_llama.CHECKPOINT.iterdir()}
    assert files.keys() == {"config.json", "generation_config.json", "model.safetensors"}
    assert sum(files.values()) <= 4_000_000


def test_checkpoint_loads_frozen_in_float32(model: LlamaForCausalLM) -> None:
    assert model.config.vocab_size == byte_llama.VOCABULARY
    assert not model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())


def test_model_has_learned_english(model: LlamaForCausalLM) -> None:
    score = byte_llama.bits_per_byte(model, byte_llama.encode(VERSES))
    assert score < 2.6, f"{score:.3f} bits per byte; uniform letters and space would be 4.75"


@pytest.mark.parametrize("prompt", ["A", PROMPT], ids=["one byte", "sentence"])
def test_static_cache_matches_full_recomputation(model: LlamaForCausalLM, prompt: str) -> None:
    tokens = byte_llama.encode(prompt)
    decoder = StaticDecoder(model, max_length=tokens.shape[1] + NEW_TOKENS)
    expected = greedy_without_cache(model, tokens, NEW_TOKENS)
    for _ in range(2):  # the second run starts from a cache that the first one filled
        assert torch.equal(generate(decoder.forward, decoder, tokens, NEW_TOKENS), expected)


def test_two_graphs_serve_all_tokens(model: LlamaForCausalLM) -> None:
    tokens = byte_llama.encode(PROMPT)
    decoder = StaticDecoder(model, max_length=64)
    expected = generate(decoder.forward, decoder, tokens, NEW_TOKENS)
    torch.compiler.reset()
    counters.clear()
    step = torch.compile(decoder.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        assert torch.equal(generate(step, decoder, tokens, NEW_TOKENS), expected)
    assert counters["stats"]["unique_graphs"] == 2


def test_cache_cannot_outgrow_the_model(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="longer than the 512 positions"):
        StaticDecoder(model, max_length=513)


def test_generation_cannot_outgrow_the_cache(model: LlamaForCausalLM) -> None:
    decoder = StaticDecoder(model, max_length=16)
    with pytest.raises(ValueError, match="do not fit into a cache of 16"):
        generate(decoder.forward, decoder, byte_llama.encode(PROMPT), 4)


class StandInReport:
    """As much of `AuditReport` as the demo uses."""

    is_triton_only = True

    @classmethod
    def merge(cls, reports: list[StandInReport]) -> StandInReport:
        return reports[0]

    def to_text(self) -> str:
        return "audit: [nothing] found"

    def to_dict(self) -> dict[str, Any]:
        return {"findings": []}


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[StandInReport]:
    """Puts a backend that runs graphs as they are, and logs a report for each, in ours' place."""
    compiled: list[StandInReport] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor], **kwargs: Any) -> Any:
        assert kwargs["options"]["on_violation"] == "ignore"
        compiled.append(StandInReport())
        return graph.forward

    backend_module, audit_module = ModuleType("backend"), ModuleType("audit")
    vars(backend_module)["compiled_reports"] = lambda: list(compiled)
    vars(audit_module)["AuditReport"] = StandInReport
    monkeypatch.setitem(sys.modules, "triton_only_backend.backend", backend_module)
    monkeypatch.setitem(sys.modules, "triton_only_backend.audit", audit_module)
    monkeypatch.setattr(show, "BACKEND", backend)
    monkeypatch.setattr(interpreter, "wanted", lambda: True)
    torch.compiler.reset()
    return compiled


def run_demo(prompt: str | None, new_tokens: int | None, path: Path | None) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=100)
    status = show.run_demo(prompt, new_tokens, None, console, path)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


def test_demo_shows_and_writes_what_it_found(reports: list[StandInReport], tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    status, shown = run_demo(PROMPT, NEW_TOKENS, path)
    assert status == 0
    assert len(reports) == 2
    assert "audit: [nothing] found" in shown
    facts = json.loads(path.read_text())
    assert facts["identical"]
    assert facts["texts"]["eager"] == facts["texts"]["triton_only"]
    assert len(facts["texts"]["eager"]) == NEW_TOKENS
    assert facts["compiled_graphs"] == 2
    assert facts["audit"] == {"findings": []}


def test_demo_fails_on_a_violation(
    reports: list[StandInReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandInReport, "is_triton_only", False)
    assert run_demo(PROMPT, 2, None)[0] == 1
    assert reports


def test_demo_fails_on_a_different_text(
    reports: list[StandInReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = show.BACKEND

    def wrong(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **kwargs: Any) -> Any:
        run = right(graph, inputs, **kwargs)
        return lambda *args: tuple(token ^ 1 for token in run(*args))

    monkeypatch.setattr(show, "BACKEND", wrong)
    assert run_demo(PROMPT, 2, None)[0] == 1
    assert reports


@pytest.mark.parametrize(("prompt", "new_tokens"), [("", 4), ("A", 0), ("A", -1), ("A", 512)])
def test_demo_refuses_what_does_not_fit(prompt: str, new_tokens: int) -> None:
    status, shown = run_demo(prompt, new_tokens, None)
    assert status == 2
    assert "at most 512" in shown


def test_demo_refuses_an_unknown_mode() -> None:
    console = Console(file=io.StringIO(), width=100)
    assert show.run_demo(None, None, "reduce_overhead", console, None) == 2
    assert "reduce-overhead" in console.file.getvalue()  # type: ignore[attr-defined]
