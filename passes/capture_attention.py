"""Takes F.scaled_dot_product_attention out of the Dynamo graph.

Why: AOTAutograd would send it to FlashAttention, cuDNN or the efficient kernel, by device, and save
their private state for the backward. Here it is still one call, and our op brings its own gradient.

Before:
    y: "bf16[2, 32, 512, 128]" = torch._C._nn.scaled_dot_product_attention(q, k, v, attn_mask=mask)
After:
    y: "bf16[2, 32, 512, 128]" = torch.ops.triton_only.attention.default(q, k, v, mask)

What our kernels do not do (dropout, a head dimension over 256, a mask that needs a gradient) becomes
PyTorch's own decomposition, bmm - softmax - bmm, which stays in Triton but holds the scores in
memory; the report says so. Left alone: nested tensors, other dtypes than fp16, bf16 and fp32, and
calls that PyTorch itself refuses.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from triton_only_backend.passes.graph_edit import describe, value
from triton_only_backend.passes.refusal import Reason, Refusal, refuse

SDPA = torch.nn.functional.scaled_dot_product_attention
MATH = torch.ops.aten._scaled_dot_product_attention_math.default
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
DECOMPOSED = (Reason.DROPOUT, Reason.HEAD_DIM_TOO_LARGE, Reason.MASK_NEEDS_GRADIENT)

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def sdpa_arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The call's arguments by name, defaults filled in."""
    given: dict[str, Any] = dict(_DEFAULTS)
    given.update(zip(_PARAMETERS, node.args, strict=False))
    given.update(node.kwargs)
    return given


def can_rewrite(given: dict[str, Any]) -> Refusal | None:
    """None if our kernels compute the same attention, else why not."""
    query, key, val = (value(given[name]) for name in ("query", "key", "value"))
    mask = value(given["attn_mask"])
    facts = describe(given["query"], given["key"], given["value"])
    if any(t.layout != torch.strided or t.is_nested for t in (query, key, val)):
        return Refusal(Reason.UNSUPPORTED_LAYOUT, facts, "pass padded tensors and a mask")
    if query.dtype not in DTYPES or not query.dtype == key.dtype == val.dtype:
        return Refusal(
            Reason.UNSUPPORTED_DTYPE, facts, "cast query, key and value to one of these dtypes"
        )
    if mask is not None and given["is_causal"]:
        return Refusal(Reason.MASK_AND_CAUSAL, facts, "combine them into one mask")
    if given["dropout_p"] != 0.0:
        return Refusal(
            Reason.DROPOUT, f"dropout_p={given['dropout_p']}", "set the attention dropout to 0"
        )
    if query.shape[-1] > MAX_HEAD_DIM or val.shape[-1] > MAX_HEAD_DIM:
        return Refusal(Reason.HEAD_DIM_TOO_LARGE, facts, "use more heads of a smaller dimension")
    if mask is not None and mask.requires_grad:
        return Refusal(Reason.MASK_NEEDS_GRADIENT, describe(given["attn_mask"]), "detach the mask")
    return None


def capture_attention(graph: torch.fx.Graph) -> int:
    """Rewrites every scaled_dot_product_attention of a Dynamo graph; returns how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=SDPA):
        given = sdpa_arguments(node)
        refusal = can_rewrite(given)
        if refusal is None:
            node.target = torch.ops.triton_only.attention.default
            node.args = tuple(given[name] for name in ("query", "key", "value", "attn_mask"))
            node.kwargs = {
                name: given[name]
                for name in ("is_causal", "scale", "enable_gqa")
                if given[name] != _DEFAULTS[name]
            }
            count += 1
            continue
        refuse(node, refusal)
        if refusal.reason in DECOMPOSED:
            _decompose(node, given)
    return count


def _decompose(node: torch.fx.Node, given: dict[str, Any]) -> None:
    with node.graph.inserting_before(node):
        pair = node.graph.call_function(
            MATH,
            tuple(given[name] for name in _PARAMETERS),
            {"scale": given["scale"], "enable_gqa": given["enable_gqa"]},
        )
        output = node.graph.call_function(operator.getitem, (pair, 0))
    pair.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
    output.meta = dict(node.meta)
    node.replace_all_uses_with(output)
    node.graph.erase_node(node)
