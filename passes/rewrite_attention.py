"""Rewrites the library attention ops of an aten graph, forward and backward together.

Why: Inductor recognises hand-written attention (bmm - softmax - bmm) in the joint graph and turns
it into scaled_dot_product_attention, that is, into a library's kernel; models call these ops too.

Before (joint graph):
    fwd = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=0.125)
    out: "bf16[2, 4, 16, 64]" = fwd[0];  lse: "f32[2, 4, 16]" = fwd[1];  seed = fwd[6]; …
    bwd = aten._scaled_dot_product_flash_attention_backward(dout, q, k, v, out, lse, …)
After:
    fwd = triton_only.attention_forward(q, k, v, None, is_causal=True, scale=0.125)
    out: "bf16[2, 4, 16, 64]" = fwd[0];  lse: "f32[2, 4, 16]" = fwd[1]
    bwd = triton_only.attention_backward(dout, q, k, v, None, out, lse, is_causal=True, scale=0.125)

A forward without a backward becomes `triton_only.attention`. With dropout, forward and backward get
a seed of ours in place of the library's random state. FlashAttention's causal attention of unequal
lengths, which it aligns to the bottom right, becomes `window_right=0`, which is so aligned too.
Head dimensions over 256 and a backward that wants the mask's gradient become bmm - softmax - bmm
again (`attention_math`). Left alone, each with its reason: other dtypes, and a forward whose
private outputs (random state, padded log-sum-exp) something else than its backward reads.
"""

from __future__ import annotations

import logging
import operator
from functools import partial
from typing import Any, cast

import torch

from triton_only_backend.kernels.limits import DTYPES
from triton_only_backend.passes import attention_math
from triton_only_backend.passes.capture_attention import head_dim_fits
from triton_only_backend.passes.graph_edit import (
    arguments,
    describe,
    inline,
    insert,
    is_contiguous,
    same_sizes,
    value,
)
from triton_only_backend.passes.refusal import DECOMPOSED, Reason, Refusal, refuse
from triton_only_backend.passes.rewrite_seeds import OURS as SEEDS
from triton_only_backend.passes.rewrite_seeds import fake_seeds

log = logging.getLogger("triton_only")

aten = torch.ops.aten
ours = torch.ops.triton_only

FLASH = aten._scaled_dot_product_flash_attention.default
BACKWARD_OF = {
    FLASH: aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention.default: (
        aten._scaled_dot_product_efficient_attention_backward.default
    ),
    aten._scaled_dot_product_cudnn_attention.default: (
        aten._scaled_dot_product_cudnn_attention_backward.default
    ),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    ),
    aten._scaled_dot_product_fused_attention_overrideable.default: (
        aten._scaled_dot_product_fused_attention_overrideable_backward.default
    ),
}


def _mask(given: dict[str, Any]) -> Any:
    return given.get("attn_bias", given.get("attn_mask"))


def _grad(given: dict[str, Any]) -> Any:
    return given.get("grad_out", given.get("grad_out_"))


def _outputs(node: torch.fx.Node) -> dict[int, torch.fx.Node]:
    """The getitems of a node that something reads, by index."""
    getitems = [user for user in node.users if user.target is operator.getitem and user.users]
    return {int(cast("int", getitem.args[1])): getitem for getitem in getitems}


def can_rewrite(forward: torch.fx.Node, backwards: list[torch.fx.Node]) -> Refusal | None:
    """None if our kernels can take over the forward and all its backwards, else why not."""
    given = arguments(forward)
    facts = describe(given["query"], given["key"], given["value"])
    query, key, val = (value(given[name]) for name in ("query", "key", "value"))
    if query.dtype not in DTYPES or not query.dtype == key.dtype == val.dtype:
        return Refusal(Reason.UNSUPPORTED_DTYPE, facts, "cast query, key and value")
    for index, getitem in _outputs(forward).items():
        strangers = [user for user in getitem.users if user not in backwards]
        public = index == 0 or (index == 1 and same_sizes(value(getitem).shape, query.shape[:3]))
        if strangers and not public:
            return Refusal(
                Reason.UNSUPPORTED_LAYOUT,
                f"{facts}; {strangers[0].name} uses the library kernel's private outputs",
                "compile forward and backward together",
            )
    if not isinstance(given["dropout_p"], float | int):
        return Refusal(
            Reason.DROPOUT, f"dropout_p={given['dropout_p']}", "make the probability a constant"
        )
    if not (head_dim_fits(query) and head_dim_fits(val)):
        return Refusal(Reason.HEAD_DIM_TOO_LARGE, facts, "use more heads of a smaller dimension")
    if any(3 in _outputs(backward) for backward in backwards):
        return Refusal(Reason.MASK_NEEDS_GRADIENT, facts, "detach the mask")
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
            if refusal is None:
                seed = _seed(forward)
                for node in backwards:
                    _rewrite_backward(node, seed)
                    _erase(node)
                _rewrite_forward(forward, seed, needs_logsumexp=bool(backwards))
            elif refusal.reason in DECOMPOSED and 1 not in _read_by_others(forward, backwards):
                log.info("attention runs as bmm, softmax, bmm: %s", refusal)
                _decompose(forward, backwards)
            else:
                for node in (forward, *backwards):
                    refuse(node, refusal)
                continue
            _erase(forward)
            count += 1
    return count


def _read_by_others(forward: torch.fx.Node, backwards: list[torch.fx.Node]) -> set[int]:
    items = _outputs(forward).items()
    return {index for index, item in items if any(u not in backwards for u in item.users)}


def _seed(forward: torch.fx.Node) -> torch.fx.Node | None:
    """What forward and backward draw their dropout from, if there is any."""
    given = arguments(forward)
    if given["dropout_p"] == 0:
        return None
    query = value(given["query"])
    with forward.graph.inserting_before(forward):
        seed = forward.graph.call_function(SEEDS, (1,), {"device": query.device})
    seed.meta["val"] = fake_seeds(1, query.device, query.fake_mode)
    return seed


def _options(node: torch.fx.Node, given: dict[str, Any]) -> dict[str, Any]:
    query, key = value(given["query"]), value(given["key"])
    is_flash = node.target in (FLASH, BACKWARD_OF[FLASH])
    aligned = same_sizes(query.shape[2:3], key.shape[2:3])
    bottom_right = given["is_causal"] and is_flash and not aligned
    options = {
        "is_causal": given["is_causal"] and not bottom_right,
        "scale": given["scale"],
        # The library ops take fewer key heads than query heads without being told.
        "enable_gqa": not same_sizes(query.shape[1:2], key.shape[1:2]),
        "window_right": 0 if bottom_right else None,
        "dropout_p": float(given["dropout_p"]) or None,
    }
    return {k: v for k, v in options.items() if v is not None and v is not False}


def _rewrite_backward(node: torch.fx.Node, seed: torch.fx.Node | None) -> None:
    given = arguments(node)
    names = ("query", "key", "value")
    new = insert(
        node,
        ours.attention_backward.default,
        (_grad(given), *(given[n] for n in names), _mask(given), given["out"], given["logsumexp"])
        + (() if seed is None else (seed,)),
        _options(node, given),
    )
    for index, getitem in _outputs(node).items():
        _put(getitem, insert(getitem, operator.getitem, (new, index)))


def _rewrite_forward(
    node: torch.fx.Node, seed: torch.fx.Node | None, *, needs_logsumexp: bool
) -> None:
    given = arguments(node)
    args: tuple[Any, ...] = (given["query"], given["key"], given["value"], _mask(given))
    args = args if seed is None else (*args, seed)
    outputs = _outputs(node)
    if needs_logsumexp or 1 in outputs:
        new = insert(node, ours.attention_forward.default, args, _options(node, given))
    else:
        new = insert(node, ours.attention.default, args, _options(node, given))
    for index, getitem in outputs.items():
        pair = new.target is ours.attention_forward.default
        _put(getitem, insert(getitem, operator.getitem, (new, index)) if pair else new)


def _decompose(forward: torch.fx.Node, backwards: list[torch.fx.Node]) -> None:
    given = arguments(forward)
    options = attention_math.Options(given["is_causal"], given["scale"], given["dropout_p"])
    operands = [given["query"], given["key"], given["value"], _mask(given)]
    out, *saved = inline(forward, partial(attention_math.forward, options=options), operands)
    for node in backwards:
        function = partial(attention_math.backward, options=options)
        grads = inline(node, function, [_grad(arguments(node)), *operands, *saved])
        for index, getitem in _outputs(node).items():
            _put(getitem, grads[index])
        _erase(node)
    for getitem in _outputs(forward).values():
        _put(getitem, out)


def _erase(node: torch.fx.Node) -> None:
    """Erases a node that nothing reads. FX would keep it, because it may draw random numbers."""
    for getitem in list(node.users):
        node.graph.erase_node(getitem)
    node.graph.erase_node(node)


def _put(old: torch.fx.Node, new: torch.fx.Node) -> None:
    """Puts a new value in the place of an old, as contiguous as that where it is an output."""
    leaving = [user for user in old.users if user.op == "output"]
    if leaving and is_contiguous(value(old)) and not is_contiguous(value(new)):
        options = {"memory_format": torch.contiguous_format}
        copy = insert(old, aten.clone.default, (new,), options)
        for user in leaving:
            user.replace_input_with(old, copy)
    old.replace_all_uses_with(new)
