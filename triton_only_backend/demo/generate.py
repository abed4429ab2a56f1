"""Greedy generation through a static key/value cache, with the step function passed in.

    decoder = StaticDecoder(model, max_length=64)
    text = generate(decoder.forward, decoder, prompt, 24)                 # eager
    step = torch.compile(decoder.forward, backend="triton_only", fullgraph=True, dynamic=False)
    text = generate(step, decoder, prompt, 24)                            # compiled

Two graphs are compiled: the prefill, of shape (1, S), and the decode step, of shape (1, 1), which
serves every token because the position is a tensor. For CUDA graphs, three things matter:

- the cache exists before the first compiled call, so that its tensors are marked as static inputs;
- one cache serves every run, so that its addresses, and the recorded graphs, stay valid;
- a token is cloned before the next replay overwrites it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from transformers import StaticCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlamaForCausalLM

    Step: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class StaticDecoder(torch.nn.Module):
    """A causal language model with its own static cache, for B sequences of the same length."""

    def __init__(self, model: LlamaForCausalLM, max_length: int, batch: int = 1) -> None:
        """Allocates the cache.

        Args:
            model: the language model, on its device and in its dtype.
            max_length: tokens that the cache holds, those of the prompt included.
            batch: how many sequences, B.
        """
        super().__init__()
        if max_length > model.config.max_position_embeddings:
            raise ValueError(
                f"a cache of {max_length} tokens is longer than the "
                f"{model.config.max_position_embeddings} positions that the model was trained on; "
                "shorten the prompt or ask for fewer new tokens"
            )
        self.model = model
        self.max_length = max_length
        self.cache = StaticCache(config=model.config, max_cache_len=max_length)
        with torch.no_grad():
            token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
            self(token, token[0])
        self.reset()

    def reset(self) -> None:
        """Empties the cache in place."""
        self.cache.reset()

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Appends `tokens` to the sequences and returns the likeliest next ones.

        Args:
            tokens: int64, shape (B, S).
            positions: their places in the sequence, int64, shape (S,).

        Returns:
            int64, shape (B, 1).
        """
        return self.logits(tokens, positions).argmax(dim=-1, keepdim=True)

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Appends `tokens` to the sequences and returns the scores of the next ones, (B, V)."""
        # Given as a whole because transformers, left to itself, leaves the mask of a single query
        # out in eager mode, and the query would then see the slots that are not filled yet.
        slots = torch.arange(self.max_length, device=tokens.device)
        mask = slots <= positions[:, None]
        logits: torch.Tensor = self.model(
            input_ids=tokens,
            attention_mask=mask[None, None],
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]


@torch.no_grad()
def generate(
    step: Step, decoder: StaticDecoder, prompt: torch.Tensor, max_new_tokens: int
) -> torch.Tensor:
    """Continues `prompt` greedily, one call of `step` for each new token.

    Args:
        step: `decoder.forward`, as it is or compiled.
        decoder: owner of the cache that `step` writes; emptied first.
        prompt: token ids on the model's device, int64, shape (1, S) with S at least 1.
        max_new_tokens: how many tokens to add, at least 1.

    Returns:
        The new token ids, int64, shape (1, max_new_tokens).
    """
    length = prompt.shape[1]
    if length + max_new_tokens - 1 > decoder.max_length:
        raise ValueError(
            f"{length} prompt tokens and {max_new_tokens} new ones do not fit into a cache of "
            f"{decoder.max_length}"
        )
    decoder.reset()
    positions = torch.arange(length, device=prompt.device)
    tokens, generated = prompt, []
    for _ in range(max_new_tokens):
        torch.compiler.cudagraph_mark_step_begin()
        tokens = step(tokens, positions).clone()
        generated.append(tokens)
        positions = positions[-1:] + 1
    return torch.cat(generated, dim=1)
