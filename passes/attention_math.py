"""Attention as bmm - softmax - bmm, and its gradient, for what our attention kernels do not do.

    S = scale · Q Kᵀ + bias       P = softmax(S)      P' = P ∘ keep / (1 − p)      O = P' V
    dV = P'ᵀ dO      dP = (dO Vᵀ) ∘ keep / (1 − p)      dS = P ∘ (dP − rowsum(P ∘ dP))
    dQ = scale · dS K      dK = scale · dSᵀ Q      dbias = dS

All are functions of (batch, heads, length, head_dim) tensors, to be traced into a graph. The bias
has the full shape of the scores, as in PyTorch's library ops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Options(NamedTuple):
    """What of an attention is no tensor."""

    is_causal: bool
    scale: float | None
    dropout_p: float


def _repeat(tensor: Tensor, heads: int) -> Tensor:
    """Key or value heads, repeated to the number of query heads."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _sum_groups(grad: Tensor, heads: int) -> Tensor:
    """The gradient of `_repeat`."""
    batch, _, *rest = grad.shape
    return grad.reshape(batch, heads, -1, *rest).sum(2)


def _scale(query: Tensor, options: Options) -> float:
    return query.shape[-1] ** -0.5 if options.scale is None else options.scale


def forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, options: Options
) -> tuple[Tensor, ...]:
    """The output and the probabilities P; with dropout, also what P is multiplied by."""
    heads = query.shape[1]
    scores = query @ _repeat(key, heads).mT * _scale(query, options)
    if options.is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, float("-inf"))
    elif bias is not None:
        scores = scores + bias
    probabilities = scores.float().softmax(-1).to(query.dtype)
    if not options.dropout_p:
        return probabilities @ _repeat(value, heads), probabilities
    kept = torch.rand_like(probabilities, dtype=torch.float32) >= options.dropout_p
    keep = (kept / (1 - options.dropout_p)).to(query.dtype)
    return (probabilities * keep) @ _repeat(value, heads), probabilities, keep


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    probabilities: Tensor,
    keep: Tensor | None = None,
    *,
    options: Options,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, and of the bias if there is one."""
    heads, kv_heads = query.shape[1], key.shape[1]
    dropped = probabilities if keep is None else probabilities * keep
    grad_p = grad @ _repeat(value, heads).mT
    grad_p = (grad_p if keep is None else grad_p * keep).float()
    p = probabilities.float()
    grad_scores = (p * (grad_p - (p * grad_p).sum(-1, keepdim=True))).to(query.dtype)
    scaled = grad_scores * _scale(query, options)
    grads = (
        scaled @ _repeat(key, heads),
        _sum_groups(scaled.mT @ query, kv_heads),
        _sum_groups(dropped.mT @ grad, kv_heads),
    )
    return grads if bias is None else (*grads, grad_scores.to(bias.dtype))
