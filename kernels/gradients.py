"""Gradients of the ops in `ops`, each in terms of our own ops: a training graph stays in Triton."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional

from triton_only_backend.kernels import linear_ops
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


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    # Whichever of a, b and out has the groups' matrices, the products are these.
    a, b, offs = ctx.saved_tensors
    product = torch.ops.triton_only.grouped_mm
    grad = grad.to(a.dtype)
    grad_a = product(grad, b.mT, offs) if _needed(ctx, 0) else None
    grad_b = product(a.mT, grad, offs) if _needed(ctx, 1) else None
    return grad_a, grad_b, None


_ACTIVATIONS: dict[str, Any] = {
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "tanh": torch.tanh,
}


def _linear_fused(
    input: Tensor, weights: list[Tensor], biases: list[Tensor], **options: Any
) -> list[Tensor]:
    """Autograd's `linear_fused`: with a gradient to come, the ops that it stands for."""
    chosen = linear_ops.LinearOptions(**options)
    norm_weight, norm_eps, norm_offset, activation, gated, multiplier, scale, residual = chosen[:8]
    tensors = (input, *weights, *biases, norm_weight, chosen.norm_bias, multiplier, residual)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        outputs: list[Tensor]
        with torch._C._AutoDispatchBelowAutograd():
            outputs = torch.ops.triton_only.linear_fused(input, weights, biases, **options)
        return outputs
    linear_ops.check_linear_fused(input, weights, biases, chosen)
    x = input
    if chosen.norm:
        wide = input.float()
        if chosen.norm_centered:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)
        if norm_weight is not None:
            wide = wide * (norm_weight.float() + norm_offset)
        if chosen.norm_bias is not None:
            wide = wide + chosen.norm_bias.float()
        x = wide.to(input.dtype)
    mm = torch.ops.triton_only.mm
    values = [mm(x, weight.mT, out_dtype=torch.float32) for weight in weights]
    if biases:
        values = [value + bias.float() for value, bias in zip(values, biases, strict=True)]
    activate = _ACTIVATIONS.get(activation, lambda value: value)
    values = [activate(values[0]) * values[1]] if gated else [activate(v) for v in values]
    if multiplier is not None:
        values = [values[0] * multiplier.float()]
    if scale != 1:
        values = [values[0] * scale]
    if residual is not None:
        values = [values[0] + residual.float()]
    return [value.to(input.dtype) for value in values]


def _save_attention(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    query, key, value, attn_mask, seed = inputs
    if attn_mask is not None and attn_mask.requires_grad:
        raise NotImplementedError(
            "triton_only.attention: no gradient for attn_mask; detach it, or write the attention "
            "as bmm, softmax, bmm"
        )
    out, logsumexp = output
    ctx.save_for_backward(query, key, value, attn_mask, out, logsumexp, seed)
    ctx.mark_non_differentiable(logsumexp)
    ctx.options = keyword_only_inputs


def _attention_backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    query, key, value, attn_mask, out, logsumexp, seed = ctx.saved_tensors
    grads = torch.ops.triton_only.attention_backward(
        grad_output, query, key, value, attn_mask, out, logsumexp, seed, **ctx.options
    )
    return (*grads, None, None)


def _attention(*tensors: Any, spans: Tensor | None = None, **options: Any) -> Tensor:
    """Autograd's `attention`: with a gradient to come, the forward that keeps the log-sum-exp.

    That one scans its mask itself: `spans` say nothing that the mask does not.
    """
    output: Tensor
    ops = torch.ops.triton_only
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        given = load("attention_arguments")
        inputs, chosen = given.Inputs(*tensors), given.Options(**options)
        given.check(inputs, chosen)
        expanded = given.expand_operands(*inputs[:3], chosen.enable_gqa)
        output = ops.attention_forward(*expanded, *tensors[3:], **options)[0]
        return output
    with torch._C._AutoDispatchBelowAutograd():
        output = ops.attention(*tensors, **options, spans=spans)
    return output


def _save_varlen(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    *tensors, max_q, max_k, seed = inputs
    out, logsumexp = output
    ctx.save_for_backward(*tensors, out, logsumexp, seed)
    ctx.mark_non_differentiable(logsumexp)
    ctx.lengths = max_q, max_k
    ctx.options = keyword_only_inputs


def _varlen_backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, logsumexp, seed = ctx.saved_tensors
    grads = torch.ops.triton_only.attention_varlen_backward(
        grad_output, *tensors, *ctx.lengths, out, logsumexp, seed, **ctx.options
    )
    return (*grads, None, None, None, None, None)


def _varlen(*args: Any, **options: Any) -> Tensor:
    """Autograd's `attention_varlen`."""
    output: Tensor
    ops = torch.ops.triton_only
    if torch.is_grad_enabled() and any(t.requires_grad for t in args[:3]):
        output = ops.attention_varlen_forward(*args, **options)[0]
        return output
    with torch._C._AutoDispatchBelowAutograd():
        output = ops.attention_varlen(*args, **options)
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
        "triton_only::grouped_mm", _grouped_backward, setup_context=_save_product, lib=library
    )
    torch.library.register_autograd(
        "triton_only::attention_forward",
        _attention_backward,
        setup_context=_save_attention,
        lib=library,
    )
    library.impl("attention", _attention, "Autograd")
    library.impl("linear_fused", _linear_fused, "Autograd")
    torch.library.register_autograd(
        "triton_only::attention_varlen_forward",
        _varlen_backward,
        setup_context=_save_varlen,
        lib=library,
    )
    library.impl("attention_varlen", _varlen, "Autograd")
