"""Schemas, fake kernels and implementations of attention: forward, with log-sum-exp, backward."""

from __future__ import annotations

from typing import Any

import torch

from triton_only_backend.kernels.loading import load

Tensor = torch.Tensor

_OPTIONS = (
    "bool is_causal=False, float? scale=None, bool enable_gqa=False, float softcap=0.0, "
    "int window_left=-1, int window_right=-1, float dropout_p=0.0, bool contiguous=False"
)
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, Tensor? seed=None, *, "
) + _OPTIONS
_PACKED_OPTIONS = (
    "bool is_causal=False, float? scale=None, float softcap=0.0, "
    "int window_left=-1, int window_right=-1, float dropout_p=0.0"
)
_PACKED = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_q, SymInt max_k"
)
_GRADIENTS = "(Tensor grad_query, Tensor grad_key, Tensor grad_value)"
SCHEMAS = (
    "mask_spans(Tensor mask) -> Tensor",
    f"attention({_ARGUMENTS}, Tensor? spans=None) -> Tensor",
    f"attention_forward({_ARGUMENTS}) -> (Tensor output, Tensor logsumexp)",
    "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
    "Tensor? attn_mask, Tensor output, Tensor logsumexp, Tensor? seed=None, *, "
    f"{_OPTIONS}) -> {_GRADIENTS}",
    f"attention_varlen({_PACKED}, Tensor? seed=None, *, {_PACKED_OPTIONS}) -> Tensor",
    f"attention_varlen_forward({_PACKED}, Tensor? seed=None, *, {_PACKED_OPTIONS}) "
    "-> (Tensor output, Tensor logsumexp)",
    f"attention_varlen_backward(Tensor grad_output, {_PACKED}, Tensor output, Tensor logsumexp, "
    f"Tensor? seed=None, *, {_PACKED_OPTIONS}) -> {_GRADIENTS}",
)


def _mask_spans(mask: Tensor) -> Tensor:
    spans: Tensor = load("mask_spans").mask_spans(mask)
    return spans


def _fake_mask_spans(mask: Tensor) -> Tensor:
    spans: Tensor = load("mask_spans").empty_spans(mask)
    return spans


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    spans: Tensor | None = None,
    **options: Any,
) -> Tensor:
    sdpa = load("sdpa")
    tensors = (query, key, value, attn_mask, seed)
    output: Tensor = sdpa.forward(
        *tensors, sdpa.Options(**options), with_logsumexp=False, spans=spans
    )[0]
    return output


def _attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    seed: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    sdpa = load("sdpa")
    pair: tuple[Tensor, Tensor] = sdpa.forward(
        query, key, value, attn_mask, seed, sdpa.Options(**options), with_logsumexp=True
    )
    return pair


def _attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    seed: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    sdpa = load("sdpa")
    gradients: tuple[Tensor, Tensor, Tensor] = sdpa.backward(
        grad_output, query, key, value, attn_mask, output, logsumexp, seed, sdpa.Options(**options)
    )
    return gradients


def _fake_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    spans: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    sdpa = load("sdpa")
    chosen = sdpa.Options(**options)
    sdpa.check(query, key, value, attn_mask, seed, chosen)
    operands = sdpa.operands(query, key, value, attn_mask, chosen.enable_gqa)
    if spans is not None:
        sdpa.view_spans(spans, attn_mask, operands)
    output = sdpa.empty_output(query, operands.lead, value.shape[-1], chosen.contiguous)
    return output, sdpa.empty_logsumexp(query, operands.lead)


def _fake_attention(*args: Any, **options: Any) -> Tensor:
    return _fake_attention_forward(*args, **options)[0]


def _fake_attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _varlen(*args: Any, **options: Any) -> Tensor:
    output: Tensor = load("varlen").forward(*args, **options, with_logsumexp=False)[0]
    return output


def _varlen_forward(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    pair: tuple[Tensor, Tensor] = load("varlen").forward(*args, **options, with_logsumexp=True)
    return pair


def _varlen_backward(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = load("varlen").backward(*args, **options)
    return gradients


def _fake_varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    module = load("varlen")
    module.check(query, key, value, *args, **options)
    return module.empty_output(query, value), module.empty_logsumexp(query)


def _fake_varlen(*args: Any, **options: Any) -> Tensor:
    return _fake_varlen_forward(*args, **options)[0]


IMPLEMENTATIONS = {
    "mask_spans": (_mask_spans, _fake_mask_spans),
    "attention": (_attention, _fake_attention),
    "attention_forward": (_attention_forward, _fake_attention_forward),
    "attention_backward": (_attention_backward, _fake_attention_backward),
    "attention_varlen": (_varlen, _fake_varlen),
    "attention_varlen_forward": (_varlen_forward, _fake_varlen_forward),
    "attention_varlen_backward": (_varlen_backward, _fake_attention_backward),
}
