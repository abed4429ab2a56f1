"""A byte-level Llama small enough to ship: its checkpoint, its (trivial) tokenizer, its score.

One token is one byte, so the vocabulary is 256 and there is no tokenizer file. The checkpoint is an
ordinary transformers one, trained by `examples/train_byte_llama.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

CHECKPOINT = Path(__file__).parent / "checkpoint"
VOCABULARY = 256


def load(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    checkpoint: Path = CHECKPOINT,
) -> LlamaForCausalLM:
    """The model, frozen and in evaluation mode, from files on disk only (nothing is downloaded).

    Args:
        device: where its parameters are put.
        dtype: what they are converted to; the file holds bfloat16.
        checkpoint: a directory that `save_pretrained` wrote.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    module: torch.nn.Module = model
    module.requires_grad_(requires_grad=False).eval().to(device)
    return model


def encode(text: str | bytes) -> torch.Tensor:
    """The bytes of `text`, UTF-8 for a string, as token ids: int64, shape (1, S)."""
    data = text.encode("utf-8") if isinstance(text, str) else text
    return torch.tensor([list(data)], dtype=torch.int64)


def decode_bytes(tokens: torch.Tensor) -> bytes:
    """The bytes that token ids of any shape, read in row-major order, stand for."""
    return bytes(tokens.flatten().tolist())


def decode(tokens: torch.Tensor) -> str:
    """`decode_bytes` as text that can always be printed: invalid UTF-8 becomes U+FFFD."""
    return decode_bytes(tokens).decode("utf-8", errors="replace")


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, windows: torch.Tensor, batch: int = 64) -> float:
    """Mean cross-entropy, in bits, of each byte of each window but its first, given those before.

    Args:
        model: any `LlamaForCausalLM` with a vocabulary of 256.
        windows: token ids, any integer dtype, shape (N, S) with S at least 2.
        batch: windows to score at once.
    """
    total = 0.0
    for rows in torch.split(windows, batch):
        tokens = rows.long()
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        nats = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        )
        total += nats.item()
    return total / (windows.shape[0] * (windows.shape[1] - 1) * math.log(2))
