"""How wrong attention's outputs and gradients are, against the mathematics in fp64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from triton_only_backend.bench.attention_cases import HEADS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from triton_only_backend.bench.attention_cases import Case, Operands


def reference_errors(
    case: Case, operands: Operands, outputs: dict[str, torch.Tensor]
) -> dict[str, float]:
    """‖output − reference‖ / ‖reference‖ of each output, against softmax(q kᵀ / √d) v in fp64."""
    query, key, value = operands
    group = HEADS // case.kv_heads
    norm = 0.0
    differences = dict.fromkeys(outputs, 0.0)
    for batch in range(case.batch):
        for head in range(case.kv_heads):
            k, v = key[batch, head].double(), value[batch, head].double()
            for index in _head_blocks(head * group, group, case):
                q = query[batch, index].double()
                reference = _probabilities(case, q, k) @ v
                norm += float(reference.square().sum())
                for name, output in outputs.items():
                    difference = output[batch, index].double() - reference
                    differences[name] += float(difference.square().sum())
    return {name: math.sqrt(total / norm) for name, total in differences.items()}


def _probabilities(case: Case, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """softmax(q kᵀ / √d) (…, L_q, L_kv) of queries (…, L_q, d) and keys (…, L_kv, d)."""
    scores = query @ key.mT / math.sqrt(case.head_dim)
    if case.is_causal:
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1)


def _head_blocks(first: int, count: int, case: Case) -> Iterator[slice]:
    """The query heads of one KV head: together, or one by one where their scores are many."""
    step = count if count * case.len_q * case.len_kv <= 1 << 28 else 1
    for start in range(first, first + count, step):
        yield slice(start, start + step)


def gradient_errors(
    case: Case, operands: Operands, found: dict[str, tuple[torch.Tensor, ...]]
) -> dict[str, float]:
    """The greatest relative error of each provider's gradients, one KV head of each batch.

    Each against the exact gradient for that provider's own output gradient.
    """
    group = HEADS // case.kv_heads
    errors = {}
    for name, (output, *grads) in found.items():
        squares, norms = [0.0] * 3, [0.0] * 3
        for batch in range(case.batch):
            heads = slice(0, group), slice(0, 1), slice(0, 1)
            exact = [
                t[batch, h].detach().double().requires_grad_()
                for t, h in zip(operands, heads, strict=True)
            ]
            with torch.enable_grad():
                out = _probabilities(case, exact[0], exact[1]) @ exact[2]
                true = torch.autograd.grad(out, exact, output[batch, heads[0]].detach().double())
            for i, (grad, h) in enumerate(zip(grads, heads, strict=True)):
                squares[i] += float((grad[batch, h].double() - true[i]).square().sum())
                norms[i] += float(true[i].square().sum())
        errors[name] = max(math.sqrt(s / n) for s, n in zip(squares, norms, strict=True))
    return errors
