"""A Llama in plain PyTorch, as people write them to be compiled: no library, no special call.

Other graphs than transformers' come of it: q, k and v in one weight, gate and up apart, rotation of
pairs, a cache written by indexing, key and value heads repeated, a boolean mask cut out of a
triangle, scores of every position of which the last is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from triton_only_backend.bench.models import ModelShape

EPSILON = 1e-5


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, in fp32."""

    def __init__(self, width: int) -> None:
        """Weights of one."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x, (…, width), normalised and scaled."""
        wide = x.float()
        normalised = wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + EPSILON)
        return normalised.type_as(x) * self.weight


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of channels: x (B, L, H, D), table (L, D ⁄ 2, 2) of cosines and sines."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = table.view(1, pairs.size(1), 1, pairs.size(3), 2)
    rotated = torch.stack(
        [
            pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1],
            pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1],
        ],
        -1,
    )
    return rotated.flatten(3).type_as(x)


class Block(nn.Module):
    """Attention with its cache, and a gated MLP."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, shape: ModelShape, batch: int, max_length: int) -> None:
        """Random weights and an empty cache."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        kv_width = shape.kv_heads * shape.head_dim
        self.wqkv = nn.Linear(shape.hidden, shape.hidden + 2 * kv_width, bias=shape.bias)
        self.wo = nn.Linear(shape.hidden, shape.hidden, bias=shape.bias)
        self.gate = nn.Linear(shape.hidden, shape.intermediate, bias=shape.bias)
        self.up = nn.Linear(shape.hidden, shape.intermediate, bias=shape.bias)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=shape.bias)
        self.attention_norm, self.mlp_norm = RMSNorm(shape.hidden), RMSNorm(shape.hidden)
        cache = torch.zeros(batch, shape.kv_heads, max_length, shape.head_dim)
        self.register_buffer("keys", cache)
        self.register_buffer("values", cache.clone())

    def attend(
        self, x: torch.Tensor, table: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Attention of x, (B, L, width), over the cache."""
        batch, length, width = x.shape
        kv_width = self.kv_heads * self.head_dim
        q, k, v = self.wqkv(x).split([width, kv_width, kv_width], dim=-1)
        q = rotate(q.view(batch, length, self.heads, self.head_dim), table).transpose(1, 2)
        k = rotate(k.view(batch, length, self.kv_heads, self.head_dim), table).transpose(1, 2)
        v = v.view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        self.keys[:, :, positions] = k
        self.values[:, :, positions] = v
        groups = self.heads // self.kv_heads
        keys = self.keys.repeat_interleave(groups, dim=1)
        values = self.values.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        y = y.transpose(1, 2).contiguous().view(batch, length, width)
        return self.wo(y)  # type: ignore[no-any-return]

    def forward(
        self, x: torch.Tensor, table: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """One layer: (B, L, width) to the same."""
        x = x + self.attend(self.attention_norm(x), table, mask, positions)
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))  # type: ignore[no-any-return]


class PlainLlama(nn.Module):
    """The model with its static cache, for B sequences of the same length."""

    causal: torch.Tensor
    table: torch.Tensor

    def __init__(self, shape: ModelShape, batch: int, max_length: int) -> None:
        """Random weights, normal with a standard deviation of 0.02, and an empty cache."""
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape, batch, max_length) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.max_length = max_length
        frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(max_length), frequencies)
        self.register_buffer("table", torch.stack([angles.cos(), angles.sin()], -1))
        mask = torch.tril(torch.ones(max_length, max_length, dtype=torch.bool))
        self.register_buffer("causal", mask)

    def reset(self) -> None:
        """Empties the cache in place."""
        for name, buffer in self.named_buffers():
            if name.endswith(("keys", "values")):
                buffer.zero_()

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Appends tokens (B, S) at positions (S,) and returns the scores of the next, (B, V)."""
        return self(tokens, positions)[:, -1]  # type: ignore[no-any-return]

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Scores of every position, (B, S, V)."""
        mask = self.causal[None, None, positions]
        table = self.table[positions]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, table, mask, positions)
        return self.head(self.norm(x))  # type: ignore[no-any-return]
