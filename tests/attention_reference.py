"""Attention's mathematics in fp64, and random operands: what the tests of its kernels share."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def reference(query, key, value, mask, scale, *, is_causal=False, softcap=0.0):
    """Output and log-sum-exp; `mask` is None, boolean or added to the scores.

    As F.scaled_dot_product_attention, but that a row which sees no key gives zeros.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = scale * query.double() @ key.mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.double()
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    unseen = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(unseen, 0.0) @ value, scores.logsumexp(-1)


def tensors(batch, heads, kv_heads, len_q, len_kv, dim, dim_v=None, dtype=torch.float32, seed=0):
    """Query, key and value, normally distributed."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    return (
        make(batch, heads, len_q, dim),
        make(batch, kv_heads, len_kv, dim),
        make(batch, kv_heads, len_kv, dim if dim_v is None else dim_v),
    )
