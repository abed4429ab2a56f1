"""One provider's model with its cache, ready to be called, timed and looked into."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend.bench import models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from triton_only_backend.bench.plain_llama import PlainLlama
    from triton_only_backend.bench.providers import Provider
    from triton_only_backend.demo.generate import StaticDecoder

CACHE_MULTIPLE = 16
# Decode steps on given tokens, besides the prefill, over which logits are compared.
COMPARED_STEPS = 4
# Steps before the profiled one: CUDA graphs have been recorded by then.
PROFILED_STEP = 2


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        model: a key of `models.MODELS`.
        dtype: a key of `models.DTYPES`.
        batch: sequences.
        prompt: tokens in each.
        new_tokens: tokens to generate for each, the first of which the prefill gives.
        providers: keys of `providers.PROVIDERS`.
        logits_error: whether to compare logits with those of an fp32 model.
        layers: layers of the model to build, None for all: each takes the same time.
        prefills: timed prefills.
        warmup: prefills and steps after the first, untimed: CUDA graphs need two to be recorded.
        eager_tokens: upper bound of `new_tokens` for a provider that does not compile.
    """

    model: str
    dtype: str
    batch: int
    prompt: int
    new_tokens: int
    providers: tuple[str, ...]
    logits_error: bool
    layers: int | None = None
    prefills: int = 7
    warmup: int = 3
    eager_tokens: int = 64

    @property
    def shape(self) -> models.ModelShape:
        """The model's sizes, with the layers that are built."""
        shape = models.MODELS[self.model]
        return shape if self.layers is None else replace(shape, layers=self.layers)

    def for_interpreter(self) -> Plan:
        """The same with as little repetition as can be: the interpreter takes a second a step."""
        return replace(self, prefills=1, warmup=0)

    @property
    def cache_length(self) -> int:
        """Tokens that the cache holds: at least those that are generated, compared, profiled."""
        steps = max(self.new_tokens, COMPARED_STEPS + 1, PROFILED_STEP + 2)
        return -(-(self.prompt + steps) // CACHE_MULTIPLE) * CACHE_MULTIPLE


class Stopwatch:
    """Marks moments on the device's own time line without waiting for it; on a CPU, the host's."""

    def __init__(self, device: torch.device) -> None:
        """Starts without a mark."""
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Marks the end of what was launched so far."""
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def intervals_ms(self) -> list[float]:
        """Milliseconds between successive marks."""
        synchronize(self._device)
        pairs = itertools.pairwise(self._marks)
        if self._device.type == "cpu":
            return [(end - begin) * 1e3 for begin, end in pairs]
        return [begin.elapsed_time(end) for begin, end in pairs]


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def make_tokens(plan: Plan, device: torch.device) -> torch.Tensor:
    """The prompt and the tokens on which logits are compared: (B, prompt + COMPARED_STEPS)."""
    generator = torch.Generator().manual_seed(1)
    size = (plan.batch, plan.prompt + COMPARED_STEPS)
    vocabulary = plan.shape.vocabulary
    return torch.randint(0, vocabulary, size, generator=generator).to(device)


class Trial:
    """One provider's step function over its own cache.

    Attributes:
        decoder: owner of the cache.
        step: (tokens (B, S), positions (S,)) to the next tokens (B, 1) and their scores (B, V);
            overwritten by the next call where CUDA graphs are on.
    """

    def __init__(self, model: torch.nn.Module, provider: Provider, plan: Plan) -> None:
        """Makes the cache, and runs a prefill and a step uncompiled."""
        self.plan = plan
        self.decoder: StaticDecoder | PlainLlama = models.make_decoder(
            model, plan.batch, plan.cache_length
        )
        self.device = models.device_of(model)
        self.tokens = make_tokens(plan, self.device)
        self.prompt = self.tokens[:, : plan.prompt].contiguous()
        self.positions = torch.arange(plan.prompt, device=self.device)
        self.step: Callable[..., Any] = self._step
        for _ in self.decode(1):
            pass
        self.step = provider.prepare(self._step, on_gpu=self.device.type != "cpu")

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.decoder.logits(tokens, positions)
        return logits.argmax(dim=-1, keepdim=True), logits

    def call(
        self, tokens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One call of the step function, a new iteration for CUDA graphs."""
        torch.compiler.cudagraph_mark_step_begin()
        next_tokens, logits = self.step(tokens, positions)
        return next_tokens, logits

    def prefill(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt through an empty cache."""
        self.decoder.reset()
        synchronize(self.device)
        return self.call(self.prompt, self.positions)

    def decode(
        self, steps: int, given: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A prefill and `steps` greedy steps; or, with tokens (B, steps) given, steps on those."""
        tokens, logits = self.prefill()
        yield tokens, logits
        positions = self.positions[-1:] + 1
        for i in range(steps):
            tokens = tokens.clone() if given is None else given[:, i : i + 1].contiguous()
            tokens, logits = self.call(tokens, positions)
            yield tokens, logits
            positions = positions + 1
