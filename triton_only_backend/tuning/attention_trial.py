"""One attention problem on the device: see `trial`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from triton_only_backend.kernels import tuned
from triton_only_backend.timing import copies_for, poison
from triton_only_backend.tuning.measuring import (
    Turns,
    error_bound,
    forced,
    relative_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from triton_only_backend.kernels.attention_configs import AttentionProblem


class Operands(NamedTuple):
    """query (B, H, L_q, D), key (B, H_kv, L_kv, D), value (B, H_kv, L_kv, D_v), mask or None."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None


def operands(problem: AttentionProblem, device: torch.device) -> Operands:
    """Uninitialised, but for the mask, which hides nothing."""
    p, dtype = problem, torch.bfloat16 if problem.element_size == 2 else torch.float32
    shapes = (
        (p.batch, p.num_heads, p.len_q, p.head_dim),
        (p.batch, p.num_kv_heads, p.len_kv, p.head_dim),
        (p.batch, p.num_kv_heads, p.len_kv, p.head_dim_v),
    )
    query, key, value = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    mask = torch.ones(p.batch, 1, p.len_q, p.len_kv, dtype=torch.bool, device=device)
    return Operands(query, key, value, mask if p.has_mask else None)


def attend(x: Operands, problem: AttentionProblem) -> torch.Tensor:
    """Attention by our kernels: (B, H, L_q, D_v)."""
    output: torch.Tensor = torch.ops.triton_only.attention(
        *x, is_causal=problem.is_causal, enable_gqa=True
    )
    return output


def exact(x: Operands, problem: AttentionProblem) -> torch.Tensor:
    """Attention in fp64, a sequence and a KV head at a time."""
    p = problem
    rows = torch.arange(p.len_q, device=x.query.device)[:, None]
    hidden = rows < torch.arange(p.len_kv, device=x.query.device)
    out = torch.empty(p.batch, p.num_heads, p.len_q, p.head_dim_v, dtype=torch.float64,
                      device=x.query.device)  # fmt: skip
    group = p.group_size
    for b in range(p.batch):
        for head in range(p.num_heads):
            q, k, v = (
                t[b, h].double()
                for t, h in ((x.query, head), (x.key, head // group), (x.value, head // group))
            )
            scores = q @ k.mT * p.head_dim**-0.5
            if p.is_causal:
                scores.masked_fill_(hidden, -torch.inf)
            if x.mask is not None:
                scores.masked_fill_(~x.mask[b, 0], -torch.inf)
            out[b, head] = scores.softmax(-1) @ v
    return out


class AttentionTrial:
    """Attention on random tensors, in enough copies that each call reads them from memory."""

    def __init__(self, kind: str, problem: AttentionProblem, device: torch.device) -> None:
        self.kind, self.problem = kind, problem
        first = operands(problem, device)
        size = sum(t.numel() * t.element_size() for t in first[:3])
        copies = copies_for(size) if device.type == "cuda" else 1
        self.operands = [first, *(operands(problem, device) for _ in range(copies - 1))]
        for x in self.operands:
            for tensor in x[:3]:
                tensor.normal_()
        self.reference = exact(first, problem)
        library = torch.nn.functional.scaled_dot_product_attention(
            *first, is_causal=problem.is_causal, enable_gqa=True
        )
        self.bound = error_bound(relative_error(library, self.reference), first.query.dtype)
        self.turns = Turns(self._calls)

    def check(self, config: Any) -> str | None:
        """See `Trial.check`."""
        with tuned.forcing(self.kind, config):
            poison(tuple(self.reference.shape), self.operands[0].query)
            output = attend(self.operands[0], self.problem)
            error = relative_error(output, self.reference)
            if not error <= self.bound:
                return f"error {error:.1e} above {self.bound:.1e}"
            again = attend(self.operands[0], self.problem)
            return None if torch.equal(output, again) else "a repetition gave other bits"

    def compare_us(self, configs: Sequence[Any], work_us: float) -> list[float]:
        """See `Trial.compare_us`."""
        return self.turns.times_us(configs, work_us)

    def _calls(self, config: Any) -> list[Callable[[], Any]]:
        return [
            forced(self.kind, config, functools.partial(attend, x, self.problem))
            for x in self.operands
        ]
