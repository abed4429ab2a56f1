"""Schemas, fake kernels and implementations of attention: forward, with log-sum-exp, backward."""

from __future__ import annotations

from typing import Any

import torch

from triton_only_backend.kernels.loading import load

Tensor = torch.Tensor

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *, "
    "bool is_causal=False, float? scale=None, bool enable_gqa=False"
)
SCHEMAS = (
    f"attention({_ARGUMENTS}) -> Tensor",
    f"attention_forward({_ARGUMENTS}) -> (Tensor output, Tensor logsumexp)",
    "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
    "Tensor? attn_mask, Tensor output, Tensor logsumexp, *, bool is_causal=False, "
    "float? scale=None, bool enable_gqa=False) -> (Tensor, Tensor, Tensor)",
)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    output: Tensor = load("sdpa").forward(
        query,
        key,
        value,
        attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        with_logsumexp=False,
    )[0]
    return output


def _attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    output, logsumexp = load("sdpa").forward(
        query,
        key,
        value,
        attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        with_logsumexp=True,
    )
    assert logsumexp is not None
    return output, logsumexp


def _attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients_: tuple[Tensor, Tensor, Tensor] = load("sdpa").backward(
        grad_output,
        query,
        key,
        value,
        attn_mask,
        output,
        logsumexp,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return gradients_


def _fake_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    load("sdpa").check(query, key, value, attn_mask)
    lead = load("sdpa").operands(query, key, value, attn_mask, enable_gqa).lead
    output = load("sdpa").empty_output(query, lead, value.shape[-1])
    return output, load("sdpa").empty_logsumexp(query, lead)


def _fake_attention(*args: Any, **kwargs: Any) -> Tensor:
    return _fake_attention_forward(*args, **kwargs)[0]


def _fake_attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


IMPLEMENTATIONS = {
    "attention": (_attention, _fake_attention),
    "attention_forward": (_attention_forward, _fake_attention_forward),
    "attention_backward": (_attention_backward, _fake_attention_backward),
}
