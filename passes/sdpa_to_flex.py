"""Rewrites F.scaled_dot_product_attention to FlexAttention, for comparison.

Why: options={"attention": "flex"}. FlexAttention is Inductor's own Triton template; beside our
kernels in the same model it tells what each is worth.

Before:
    y: "bf16[2, 32, 512, 128]" = torch._C._nn.scaled_dot_product_attention(q, k, v, is_causal=True)
After:
    y: "bf16[2, 32, 512, 128]" = flex_sdpa(q, k, v, is_causal=True)

(a function, which AOTAutograd traces into `higher_order.flex_attention` and what makes its block
mask). Left to `capture_attention`, that is to our kernels: dropout, head dimensions that are no
power of two from 16 to 256, symbolic lengths, other than four dimensions, a mask that needs a
gradient, transforms of torch.func, dtypes that our kernels do not take, and CPUs, for which
Inductor's template is C++.
"""

from __future__ import annotations

from typing import Any

import torch

from triton_only_backend import inductor
from triton_only_backend.kernels.limits import DTYPES
from triton_only_backend.passes.capture_attention import SDPA, sdpa_arguments
from triton_only_backend.passes.graph_edit import value

HEAD_DIMS = (16, 32, 64, 128, 256)


def _causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= key


def _unchanged(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score


def _only_where(score: Any, batch: Any, head: Any, query: Any, key: Any, mask: Any) -> Any:
    return torch.where(mask[batch, head, query, key], score, -float("inf"))


def _plus(score: Any, batch: Any, head: Any, query: Any, key: Any, mask: Any) -> Any:
    return score + mask[batch, head, query, key]


def flex_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention's arguments as a call of the flex_attention operator.

    To be traced: `torch.nn.attention.flex_attention.flex_attention` would compile by itself.
    """
    from torch._higher_order_ops.flex_attention import flex_attention
    from torch.nn.attention import flex_attention as flex

    len_q, len_kv = query.shape[2], key.shape[2]
    if is_causal:
        block_mask = flex.create_block_mask(_causal, None, None, len_q, len_kv, device=query.device)
    else:
        block_mask = flex._create_empty_block_mask(query, key)
    score_mod: Any = _unchanged
    buffers: tuple[torch.Tensor, ...] = ()
    if attn_mask is not None:
        score_mod = _only_where if attn_mask.dtype == torch.bool else _plus
        buffers = (attn_mask.expand(*query.shape[:2], len_q, len_kv),)
    options: Any = flex._apply_kernel_options(query, key, value, False, {})
    output: torch.Tensor = flex_attention(
        query, key, value, score_mod, block_mask.as_tuple(),
        query.shape[-1] ** -0.5 if scale is None else scale, options, buffers, (),
    )[0]  # fmt: skip
    return output


def can_rewrite(given: dict[str, Any]) -> bool:
    """Whether FlexAttention's Triton template computes the same."""
    tensors = [value(given[name]) for name in ("query", "key", "value")]
    mask = value(given["attn_mask"])
    return (
        not any(t.is_nested for t in tensors)
        and not any(map(inductor.is_transformed, (*tensors, mask)))
        and all(t.dim() == 4 and t.device.type != "cpu" for t in tensors)
        and tensors[0].dtype in DTYPES
        and all(isinstance(size, int) for t in tensors for size in t.shape)
        and all(t.shape[-1] in HEAD_DIMS for t in tensors)
        and given["dropout_p"] == 0
        and (mask is None or not (given["is_causal"] or mask.requires_grad))
    )


def sdpa_to_flex(graph: torch.fx.Graph) -> int:
    """Rewrites every scaled_dot_product_attention of a Dynamo graph; returns how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=SDPA):
        if can_rewrite(sdpa_arguments(node)):
            node.target = flex_sdpa
            count += 1
    return count
