"""The operator library `triton_only`: schemas, fake kernels, implementations and gradients.

    triton_only::mm(a, b)                         (M, K) @ (K, N)
    triton_only::addmm(bias, a, b)                beta · bias + alpha · a @ b
    triton_only::bmm(a, b)                        (B, M, K) @ (B, K, N)
    triton_only::baddbmm(bias, a, b)              beta · bias + alpha · a @ b
    triton_only::linear_many(a, weights, biases)  a @ weightᵀ + bias for several weights at once
    triton_only::attention(q, k, v, mask)         scaled dot-product attention
    triton_only::attention_forward(q, k, v, mask) the same, with its log-sum-exp for the backward
    triton_only::attention_backward(…)            gradients of q, k and v

Registered with `Library.define` and `impl`, about 7 µs a call where `torch.library.custom_op` costs
25. Tagged `flexible_layout`: every kernel takes any strides, so Inductor need not copy an operand
into a particular layout. Importing this module registers the ops, once.
"""

from __future__ import annotations

from typing import Any

import torch

from triton_only_backend.kernels import gradients
from triton_only_backend.kernels.loading import load

Tensor = torch.Tensor

LIBRARY = torch.library.Library("triton_only", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

_ATTENTION_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *, "
    "bool is_causal=False, float? scale=None, bool enable_gqa=False"
)
SCHEMAS = (
    "mm(Tensor a, Tensor b, *, ScalarType? out_dtype=None) -> Tensor",
    "addmm(Tensor bias, Tensor a, Tensor b, *, Scalar beta=1, Scalar alpha=1, "
    "ScalarType? out_dtype=None) -> Tensor",
    "bmm(Tensor a, Tensor b, *, ScalarType? out_dtype=None) -> Tensor",
    "baddbmm(Tensor bias, Tensor a, Tensor b, *, Scalar beta=1, Scalar alpha=1, "
    "ScalarType? out_dtype=None) -> Tensor",
    "linear_many(Tensor a, Tensor[] weights, Tensor[] biases) -> Tensor[]",
    f"attention({_ATTENTION_ARGUMENTS}) -> Tensor",
    f"attention_forward({_ATTENTION_ARGUMENTS}) -> (Tensor output, Tensor logsumexp)",
    "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
    "Tensor? attn_mask, Tensor output, Tensor logsumexp, *, bool is_causal=False, "
    "float? scale=None, bool enable_gqa=False) -> (Tensor, Tensor, Tensor)",
)
for _schema in SCHEMAS:
    LIBRARY.define(_schema, tags=TAGS)


def _check_product(op: str, a: Tensor, b: Tensor, dim: int) -> None:
    load("matmul").check_operands(op, a, b)
    torch._check(
        a.dim() == dim and b.dim() == dim,
        lambda: (
            f"triton_only.{op}: operands must have {dim} dimensions, "
            f"got {list(a.shape)} and {list(b.shape)}"
        ),
    )
    torch._check(
        a.shape[-1] == b.shape[-2],
        lambda: (
            f"triton_only.{op}: {list(a.shape)} and {list(b.shape)} do not multiply; "
            "the last dimension of the first must equal the one before last of the second"
        ),
    )
    if dim == 3:
        torch._check(
            a.shape[0] == b.shape[0],
            lambda: f"triton_only.{op}: batch sizes {a.shape[0]} and {b.shape[0]} differ",
        )


def _product_like(a: Tensor, b: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    shape = (*a.shape[:-1], b.shape[-1])
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


# mm, addmm: (M, K) @ (K, N) is a batch of one


def _mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    _check_product("mm", a, b, 2)
    out = _product_like(a, b, out_dtype)
    load("matmul").matmul(a.unsqueeze(0), b.unsqueeze(0), None, out.unsqueeze(0))
    return out


def _addmm(
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_product("addmm", a, b, 2)
    out = _product_like(a, b, out_dtype)
    load("matmul").matmul(
        a.unsqueeze(0),
        b.unsqueeze(0),
        bias.expand(out.shape).unsqueeze(0),
        out.unsqueeze(0),
        alpha=alpha,
        beta=beta,
    )
    return out


def _bmm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    _check_product("bmm", a, b, 3)
    out = _product_like(a, b, out_dtype)
    load("matmul").matmul(a, b, None, out)
    return out


def _baddbmm(
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_product("baddbmm", a, b, 3)
    out = _product_like(a, b, out_dtype)
    load("matmul").matmul(a, b, bias.expand(out.shape), out, alpha=alpha, beta=beta)
    return out


def _fake_linear_many(a: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    for weight in weights:
        _check_product("linear_many", a, weight.T, 2)
    return [a.new_empty((a.shape[0], weight.shape[0])) for weight in weights]


def _linear_many(a: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    outs = _fake_linear_many(a, weights, biases)
    load("matmul").linear_many(a, weights, biases or None, outs)
    return outs


def _fake_mm(op: str, dim: int) -> Any:
    def fake(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        _check_product(op, a, b, dim)
        return _product_like(a, b, out_dtype)

    return fake


def _fake_addmm(op: str, dim: int) -> Any:
    def fake(
        bias: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        _check_product(op, a, b, dim)
        out = _product_like(a, b, out_dtype)
        bias.expand(out.shape)
        return out

    return fake


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
    "mm": (_mm, _fake_mm("mm", 2)),
    "addmm": (_addmm, _fake_addmm("addmm", 2)),
    "bmm": (_bmm, _fake_mm("bmm", 3)),
    "baddbmm": (_baddbmm, _fake_addmm("baddbmm", 3)),
    "linear_many": (_linear_many, _fake_linear_many),
    "attention": (_attention, _fake_attention),
    "attention_forward": (_attention_forward, _fake_attention_forward),
    "attention_backward": (_attention_backward, _fake_attention_backward),
}
for _name, (_implementation, _fake) in IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"triton_only::{_name}", _fake, lib=LIBRARY)

gradients.register(LIBRARY)
