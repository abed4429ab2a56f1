"""Rewrites the library attention ops of an aten graph, forward and backward together.

Why: Inductor recognises hand-written attention (bmm - softmax - bmm) in the joint graph and turns it
into scaled_dot_product_attention, that is, into a library's kernel; models also call these ops.

Before (joint graph):
    fwd = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=0.125)
    out: "bf16[2, 4, 16, 64]" = fwd[0];  lse: "f32[2, 4, 16]" = fwd[1];  seed = fwd[6]; …
    bwd = aten._scaled_dot_product_flash_attention_backward(dout, q, k, v, out, lse, …)
After:
    fwd = triton_only.attention_forward(q, k, v, None, is_causal=True, scale=0.125)
    out: "bf16[2, 4, 16, 64]" = fwd[0];  lse: "f32[2, 4, 16]" = fwd[1]
    bwd = triton_only.attention_backward(dout, q, k, v, None, out, lse, is_causal=True, scale=0.125)

A forward without a backward becomes `triton_only.attention`. Left alone, each with its reason:
dropout, head dimensions over 256, a backward that wants the mask's gradient, other dtypes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from triton_only_backend.passes.graph_edit import arguments, describe, insert, replace, value
from triton_only_backend.passes.refusal import Reason, Refusal, refuse

aten = torch.ops.aten
ours = torch.ops.triton_only
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256

BACKWARD_OF = {
    aten._scaled_dot_product_flash_attention.default: (
        aten._scaled_dot_product_flash_attention_backward.default
    ),
    aten._scaled_dot_product_efficient_attention.default: (
        aten._scaled_dot_product_efficient_attention_backward.default
    ),
    aten._scaled_dot_product_cudnn_attention.default: (
        aten._scaled_dot_product_cudnn_attention_backward.default
    ),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    ),
}


def _mask(given: dict[str, Any]) -> Any:
    return given.get("attn_bias", given.get("attn_mask"))


def _options(given: dict[str, Any]) -> dict[str, Any]:
    options = {
        "is_causal": given["is_causal"],
        "scale": given["scale"],
        # The library ops take fewer key heads than query heads without being told.
        "enable_gqa": value(given["query"]).shape[1] != value(given["key"]).shape[1],
    }
    return {k: v for k, v in options.items() if v not in (False, None)}


def can_rewrite(forward: torch.fx.Node, backwards: list[torch.fx.Node]) -> Refusal | None:
    """None if our kernels can take over the forward and all its backwards, else why not."""
    given = arguments(forward)
    facts = describe(given["query"], given["key"], given["value"])
    query, val = value(given["query"]), value(given["value"])
    if query.dtype not in DTYPES:
        return Refusal(Reason.UNSUPPORTED_DTYPE, facts, "cast query, key and value")
    if given["dropout_p"] != 0.0:
        return Refusal(
            Reason.DROPOUT, f"dropout_p={given['dropout_p']}", "set the attention dropout to 0"
        )
    if query.shape[-1] > MAX_HEAD_DIM or val.shape[-1] > MAX_HEAD_DIM:
        return Refusal(Reason.HEAD_DIM_TOO_LARGE, facts, "use more heads of a smaller dimension")
    for backward in backwards:
        if any(u.args[1] == 3 and u.users for u in backward.users):
            return Refusal(Reason.MASK_NEEDS_GRADIENT, facts, "detach the mask")
    used = {user.args[1] for user in forward.users if user.target is operator.getitem}
    private = used - {0, 1}
    outside = [
        user
        for getitem in forward.users
        if getitem.target is operator.getitem and getitem.args[1] in private
        for user in getitem.users
        if user not in backwards
    ]
    if outside:
        return Refusal(
            Reason.UNSUPPORTED_LAYOUT,
            f"{facts}; {outside[0].name} uses the library kernel's private outputs",
            "compile forward and backward together",
        )
    return None


def rewrite_attention(graph: torch.fx.Graph) -> int:
    """Rewrites every library attention in the graph; returns how many forwards."""
    count = 0
    for forward_op, backward_op in BACKWARD_OF.items():
        for forward in graph.find_nodes(op="call_function", target=forward_op):
            outputs = {u for u in forward.users if u.target is operator.getitem}
            backwards = [
                node
                for node in graph.find_nodes(op="call_function", target=backward_op)
                if arguments(node)["out"] in outputs
            ]
            refusal = can_rewrite(forward, backwards)
            if refusal is not None:
                refuse(forward, refusal)
                for node in backwards:
                    refuse(node, refusal)
                continue
            for node in backwards:
                _rewrite_backward(node)
            _rewrite_forward(forward, needs_logsumexp=bool(backwards))
            count += 1
    return count


def _rewrite_backward(node: torch.fx.Node) -> None:
    given = arguments(node)
    grad = given.get("grad_out", given.get("grad_out_"))
    names = ("query", "key", "value")
    replace(
        node,
        ours.attention_backward.default,
        (grad, *(given[n] for n in names), _mask(given), given["out"], given["logsumexp"]),
        _options(given),
    )


def _rewrite_forward(node: torch.fx.Node, *, needs_logsumexp: bool) -> None:
    given = arguments(node)
    args = (given["query"], given["key"], given["value"], _mask(given))
    getitems = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    needs_logsumexp = needs_logsumexp or bool(1 in getitems and getitems[1].users)
    op = ours.attention_forward.default if needs_logsumexp else ours.attention.default
    new = insert(node, op, args, _options(given))
    for index, getitem in getitems.items():
        if index == 0 and not needs_logsumexp:
            getitem.replace_all_uses_with(new)
        elif index in (0, 1) and needs_logsumexp:
            getitem.replace_all_uses_with(insert(getitem, operator.getitem, (new, index)))
        if not getitem.users:
            getitem.graph.erase_node(getitem)
    if not node.users:
        node.graph.erase_node(node)
