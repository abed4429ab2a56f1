"""Gradients of the ops in `ops`, each in terms of our own ops: a training graph stays in Triton."""

from __future__ import annotations

from typing import Any

import torch

from triton_only_backend.kernels.loading import load

Tensor = torch.Tensor


def _needed(ctx: Any, index: int) -> bool:
    return bool(ctx.needs_input_grad[index])


def _save_product(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _save_affine(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Tensor) -> None:
    bias, a, b = inputs
    ctx.save_for_backward(a, b)
    ctx.bias_shape, ctx.bias_dtype = bias.shape, bias.dtype
    ctx.alpha, ctx.beta = keyword_only_inputs["alpha"], keyword_only_inputs["beta"]


def _product_backward(product: Any) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)
        grad_a = product(grad, b.mT) if _needed(ctx, 0) else None
        grad_b = product(a.mT, grad) if _needed(ctx, 1) else None
        return grad_a, grad_b

    return backward


def _affine_backward(product: Any) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad_bias = grad_a = grad_b = None
        if _needed(ctx, 0):
            grad_bias = (grad * ctx.beta).sum_to_size(ctx.bias_shape).to(ctx.bias_dtype)
        scaled = (grad if ctx.alpha == 1 else grad * ctx.alpha).to(a.dtype)
        if _needed(ctx, 1):
            grad_a = product(scaled, b.mT)
        if _needed(ctx, 2):
            grad_b = product(a.mT, scaled)
        return grad_bias, grad_a, grad_b

    return backward


def _save_attention(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    query, key, value, attn_mask = inputs
    if attn_mask is not None and attn_mask.requires_grad:
        raise NotImplementedError(
            "triton_only.attention: no gradient for attn_mask; detach it, or write the attention "
            "as bmm, softmax, bmm"
        )
    out, logsumexp = output
    ctx.save_for_backward(query, key, value, attn_mask, out, logsumexp)
    ctx.mark_non_differentiable(logsumexp)
    ctx.options = keyword_only_inputs


def _attention_backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    query, key, value, attn_mask, out, logsumexp = ctx.saved_tensors
    grads = torch.ops.triton_only.attention_backward(
        grad_output, query, key, value, attn_mask, out, logsumexp, **ctx.options
    )
    return (*grads, None)


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
    """Autograd's `attention`: with a gradient to come, the forward that keeps the log-sum-exp."""
    output: Tensor
    arguments = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        sdpa = load("sdpa")
        sdpa.check(query, key, value, attn_mask)
        expanded = sdpa.expand_operands(query, key, value, enable_gqa)
        pair = torch.ops.triton_only.attention_forward(*expanded, attn_mask, **arguments)
        output = pair[0]
        return output
    with torch._C._AutoDispatchBelowAutograd():
        output = torch.ops.triton_only.attention(query, key, value, attn_mask, **arguments)
    return output


def register(library: torch.library.Library) -> None:
    """Registers every gradient with the op library."""
    ops = torch.ops.triton_only
    for name in ("mm", "bmm"):
        torch.library.register_autograd(
            f"triton_only::{name}",
            _product_backward(getattr(ops, name)),
            setup_context=_save_product,
            lib=library,
        )
    for name, product in (("addmm", ops.mm), ("baddbmm", ops.bmm)):
        torch.library.register_autograd(
            f"triton_only::{name}",
            _affine_backward(product),
            setup_context=_save_affine,
            lib=library,
        )
    torch.library.register_autograd(
        "triton_only::attention_forward",
        _attention_backward,
        setup_context=_save_attention,
        lib=library,
    )
    library.impl("attention", _attention, "Autograd")
