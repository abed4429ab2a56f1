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


def _attention(*tensors: Any, spans: Tensor | None = None, **options: Any) -> Tensor:
    given = load("attention_arguments")
    output: Tensor = load("sdpa").forward(
        given.Inputs(*tensors), given.Options(**options), with_logsumexp=False, spans=spans
    )[0]
    return output


def _attention_forward(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    given = load("attention_arguments")
    pair: tuple[Tensor, Tensor] = load("sdpa").forward(
        given.Inputs(*tensors), given.Options(**options), with_logsumexp=True
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
    given = load("attention_arguments")
    inputs = given.Inputs(query, key, value, attn_mask, seed)
    gradients: tuple[Tensor, Tensor, Tensor] = load("sdpa").backward(
        grad_output, inputs, output, logsumexp, given.Options(**options)
    )
    return gradients


def _fake_attention_forward(
    *tensors: Any, spans: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    given = load("attention_arguments")
    inputs, chosen = given.Inputs(*tensors), given.Options(**options)
    given.check(inputs, chosen)
    operands = given.operands(inputs, chosen.enable_gqa)
    if spans is not None:
        given.view_spans(spans, inputs.attn_mask, operands)
    width = inputs.value.shape[-1]
    output = given.empty_output(inputs.query, operands.lead, width, chosen.contiguous)
    return output, given.empty_logsumexp(inputs.query, operands.lead)


def _fake_attention(*tensors: Any, **options: Any) -> Tensor:
    return _fake_attention_forward(*tensors, **options)[0]


def _fake_attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _packed_forward(
    args: tuple[Any, ...], options: dict[str, Any], with_logsumexp: bool
) -> tuple[Tensor, Tensor | None]:
    varlen = load("varlen")
    pair: tuple[Tensor, Tensor | None] = varlen.forward(
        varlen.Packed(*args), varlen.Options(**options), with_logsumexp=with_logsumexp
    )
    return pair


def _varlen(*args: Any, **options: Any) -> Tensor:
    return _packed_forward(args, options, False)[0]


def _varlen_forward(*args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    return _packed_forward(args, options, True)


def _varlen_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    output: Tensor,
    logsumexp: Tensor,
    seed: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    varlen = load("varlen")
    inputs = varlen.Packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, seed)
    gradients: tuple[Tensor, Tensor, Tensor] = varlen.backward(
        grad_output, inputs, output, logsumexp, varlen.Options(**options)
    )
    return gradients


def _fake_varlen_forward(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    varlen = load("varlen")
    inputs = varlen.Packed(*args)
    varlen.check(inputs, varlen.Options(**options))
    return varlen.empty_output(inputs), varlen.empty_logsumexp(inputs)


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
