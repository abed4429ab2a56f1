"""Takes F.scaled_dot_product_attention out of the Dynamo graph.

Why: AOTAutograd would send it to FlashAttention, cuDNN or the efficient kernel, by device, and save
their private state for the backward. Here it is still one call, and our op brings its own gradient.

Before:
    y: "bf16[2, 32, 512, 128]" = torch._C._nn.scaled_dot_product_attention(q, k, v, attn_mask=mask)
After:
    y: "bf16[2, 32, 512, 128]" = torch.ops.triton_only.attention.default(q, k, v, mask)

Our output lies in memory as (…, length, heads, head_dim). Where PyTorch's would be contiguous and
something that depends on it follows (a view, a branch's or the graph's output), a `contiguous` is
added.

What our kernels do not do (dropout, a head dimension over 256, a mask that needs a gradient)
becomes PyTorch's own decomposition, bmm - softmax - bmm, which stays in Triton but holds the scores
in memory; the report notes it. Left alone: nested tensors, other dtypes than fp16, bf16 and fp32,
and calls that PyTorch itself refuses.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from triton_only_backend.kernels.limits import DTYPES, MAX_HEAD_DIM
from triton_only_backend.passes.graph_edit import (
    describe,
    fake_call,
    is_contiguous,
    same_layout,
    value,
)
from triton_only_backend.passes.refusal import DECOMPOSED, META_KEY, Reason, Refusal, refuse

SDPA = torch.nn.functional.scaled_dot_product_attention
ATTENTION = torch.ops.triton_only.attention.default
MATH = torch.ops.aten._scaled_dot_product_attention_math.default
# Methods and functions of the output that give the same whatever its strides.
ANY_LAYOUT = frozenset({"transpose", "permute", "swapaxes", "reshape", "contiguous", "flatten"})

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
    if isinstance(given["dropout_p"], torch.fx.Node) or given["dropout_p"] != 0.0:
        return Refusal(
            Reason.DROPOUT, f"dropout_p={given['dropout_p']}", "set the attention dropout to 0"
        )
    if not (head_dim_fits(query) and head_dim_fits(val)):
        return Refusal(Reason.HEAD_DIM_TOO_LARGE, facts, "use more heads of a smaller dimension")
    if mask is not None and mask.requires_grad:
        return Refusal(Reason.MASK_NEEDS_GRADIENT, describe(given["attn_mask"]), "detach the mask")
    return None


def head_dim_fits(tensor: torch.Tensor) -> bool:
    """Whether the head dimension is known, so that asking adds no guard, and not too large."""
    return isinstance(tensor.shape[-1], int) and tensor.shape[-1] <= MAX_HEAD_DIM


def capture_attention(graph: torch.fx.Graph) -> int:
    """Rewrites every scaled_dot_product_attention of a Dynamo graph; returns how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=SDPA):
        given = sdpa_arguments(node)
        refusal = can_rewrite(given)
        if refusal is None:
            _rewrite(node, given)
        elif refusal.reason in DECOMPOSED:
            refuse(node, refusal)
            _decompose(node, given)
        else:
            refuse(node, refusal)
            continue
        count += 1
    return count


def _rewrite(node: torch.fx.Node, given: dict[str, Any]) -> None:
    node.target = ATTENTION
    node.args = tuple(given[name] for name in ("query", "key", "value", "attn_mask"))
    node.kwargs = {
        name: given[name]
        for name in ("is_causal", "scale", "enable_gqa")
        if given[name] is not _DEFAULTS[name]
    }
    expected = value(node)
    readers = [user for user in node.users if _reads_layout(user)]
    if not readers or same_layout(expected, fake_call(ATTENTION, node.args, node.kwargs)):
        return
    if not is_contiguous(expected):
        return
    with node.graph.inserting_after(node):
        copy = node.graph.call_method("contiguous", (node,))
    copy.meta = dict(node.meta)
    for user in readers:
        user.replace_input_with(node, copy)


def _reads_layout(user: torch.fx.Node) -> bool:
    name = user.target if user.op == "call_method" else getattr(user.target, "__name__", "")
    return name not in ANY_LAYOUT


def _decompose(node: torch.fx.Node, given: dict[str, Any]) -> None:
    with node.graph.inserting_before(node):
        pair = node.graph.call_function(
            MATH,
            tuple(given[name] for name in _PARAMETERS),
            {"scale": given["scale"], "enable_gqa": given["enable_gqa"]},
        )
        output = node.graph.call_function(operator.getitem, (pair, 0))
    pair.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
    output.meta = {k: v for k, v in node.meta.items() if k != META_KEY}
    node.replace_all_uses_with(output)
    node.graph.erase_node(node)
