"""The shipped model says what it says in eager PyTorch, and predicts unseen text as well.

`held_out.txt` is Colossians 1:12 to 4:18, King James Version (public domain; from Debian's package
bible-kjv-text): the beginning of what `examples/train_byte_llama.py` held out of the training.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("transformers")

from triton_only_backend.demo import byte_llama
from triton_only_backend.demo.generate import StaticDecoder, generate

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

HELD_OUT = Path(__file__).parent / "held_out.txt"
TOLERANCE = 1e-3  # of the perplexity
# How much further from fp64 than eager's a byte's loss may be: the order of sums is all that fp32
# rounds by, and it is ours; in 16 bits nearly all is the rounding of what is stored.
FACTORS = {torch.float32: 3.0, torch.bfloat16: 1.4, torch.float16: 1.4}
PROMPTS = ("And God said, ", "The LORD is my", "In the days of")  # as long as one another: 2 graphs
CACHE = 272

each_dtype = pytest.mark.parametrize("dtype", FACTORS, ids=str)


def predict(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Scores of the byte after each one: (N, S, 256)."""
    return model(input_ids=tokens, use_cache=False).logits


def losses(model: LlamaForCausalLM, windows: torch.Tensor, forward: Any = predict) -> torch.Tensor:
    """Of each byte of each window but its first, given those before: nats, fp64, shape (N * S,)."""
    scores = forward(model, windows[:, :-1]).double().flatten(0, 1)
    return torch.nn.functional.cross_entropy(scores, windows[:, 1:].flatten(), reduction="none")


def held_out(device: str, size: int = 512, count: int = 18) -> torch.Tensor:
    """The text in windows that share a byte with their neighbours: (count, size + 1)."""
    text = byte_llama.encode(HELD_OUT.read_bytes())[0]
    return text.unfold(0, size + 1, size)[:count].to(device)


def check(
    ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, factor: float, chance: float = 0
) -> None:
    """Within 0.1 % of eager's perplexity; and a byte's loss as near to fp64's as eager's is.

    Args:
        chance: standard deviations of what remains, when so few bytes are averaged, of the
            roundings of both, to be allowed besides.
    """
    spread = (eager - exact).square().mean().sqrt().item()
    own_spread = (ours - exact).square().mean().sqrt().item()
    allowed = TOLERANCE + chance * spread * math.sqrt(2 / eager.numel())
    change = (ours.mean() - eager.mean()).expm1().item()
    figures = (
        f"perplexity {eager.mean().exp():.5f} in eager, ours {change:+.2e} of it ({allowed:.1e} allowed); "
        f"a byte's loss is off by {own_spread:.2e}, eager's by {spread:.2e} ({factor} times it allowed)"
    )
    print(figures)
    assert abs(change) <= allowed, figures
    assert own_spread <= factor * spread, figures


@each_dtype
@torch.no_grad()
def test_perplexity_of_unseen_text_is_eagers(dtype: torch.dtype, device: str) -> None:
    interpreted = device == "cpu"  # 256 bytes of the text take it a quarter of a minute
    windows = held_out(device, 256, 1) if interpreted else held_out(device)
    model = byte_llama.load(device, dtype)
    exact = losses(byte_llama.load(device, torch.float64), windows)
    compiled = torch.compile(predict, backend="triton_only", fullgraph=True, dynamic=False)
    ours, eager = losses(model, windows, compiled), losses(model, windows)
    check(ours, eager, exact, FACTORS[dtype], chance=3 if interpreted else 0)


@each_dtype
@torch.no_grad()
def test_attention_2_percent_off_is_noticed(dtype: torch.dtype, device: str) -> None:
    windows = held_out(device)
    assert windows.shape == (18, 513)
    exact = losses(byte_llama.load(device, torch.float64), windows)
    model = byte_llama.load(device, dtype)
    eager = losses(model, windows)
    check(eager, eager, exact, FACTORS[dtype])
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.02
    with pytest.raises(AssertionError, match="perplexity"):
        check(losses(model, windows), eager, exact, FACTORS[dtype])


@each_dtype
@torch.no_grad()
def test_greedy_text_is_eagers(dtype: torch.dtype, device: str) -> None:
    """Byte for byte. Only in 16 bits, where eager's own rounding decides between two bytes, may
    the other one be said; the bytes after it are then judged as continuations of eager's text."""
    model = byte_llama.load(device, dtype)
    decoder = StaticDecoder(model, CACHE)
    step = torch.compile(
        decoder.forward,
        backend="triton_only",
        mode="reduce-overhead",
        fullgraph=True,
        dynamic=False,
    )
    interpreted = device == "cpu"  # a byte takes it half a second
    for prompt in PROMPTS[:2] if interpreted else PROMPTS:
        tokens = byte_llama.encode(prompt).to(device)
        length = 6 if interpreted else CACHE - tokens.shape[1]
        expected = generate(decoder.forward, decoder, tokens, length)
        text = generate(step, decoder, tokens, length)
        if not torch.equal(text, expected):
            said = f"{byte_llama.decode(text)!r}, not {byte_llama.decode(expected)!r}"
            assert dtype != torch.float32, said
            chosen = choices(step, decoder, tokens, expected)
            check_ties(model, tokens, expected, chosen, said)


@torch.no_grad()
def test_another_text_is_noticed(device: str) -> None:
    """What an attention that is 1.5 times too sharp would say is no matter of rounding."""
    model = byte_llama.load(device, torch.bfloat16)
    tokens, decoder = byte_llama.encode(PROMPTS[0]).to(device), StaticDecoder(model, CACHE)
    text = generate(decoder.forward, decoder, tokens, 64)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.5
    chosen = choices(decoder.forward, decoder, tokens, text)
    for layer in model.model.layers:
        layer.self_attn.scaling /= 1.5
    with pytest.raises(AssertionError, match="apart"):
        check_ties(model, tokens, text, chosen, "planted")
    with pytest.raises(AssertionError, match="no other choice"):
        check_ties(model, tokens, text, text, "planted")


def choices(
    step: Any, decoder: StaticDecoder, prompt: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """The byte that `step` would say in place of each byte of `text`, given those before: (1, S)."""
    said: list[torch.Tensor] = []

    def say_the_text(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        said.append(step(tokens, positions).clone())
        return text[:, len(said) - 1 : len(said)]

    generate(say_the_text, decoder, prompt, text.shape[1])
    return torch.cat(said, dim=1)


def check_ties(
    model: LlamaForCausalLM,
    prompt: torch.Tensor,
    text: torch.Tensor,
    chosen: torch.Tensor,
    message: str,
) -> None:
    """Where `chosen` is not `text`, fp64 scores both alike, within twice eager's worst error."""
    reference = byte_llama.load(model.device, torch.float64)
    context = torch.cat([prompt, text[:, :-1]], dim=1)
    exact = predict(reference, context)[:, prompt.shape[1] - 1 :]
    noise = (predict(model, context)[:, prompt.shape[1] - 1 :] - exact).abs().amax(-1)
    both = exact.gather(-1, torch.stack([text, chosen], dim=-1))
    gap = (both[..., 0] - both[..., 1]).abs()
    other = chosen != text
    print(f"{int(other.sum())} of {other.numel()} bytes chosen otherwise: {message}")
    assert other.any(), f"another text, yet no other choice: {message}"
    assert (gap <= 2 * noise)[other].all(), f"{gap[other]} apart, noise {noise[other]}: {message}"
