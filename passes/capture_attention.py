"""Takes F.scaled_dot_product_attention out of the Dynamo graph.

Why: AOTAutograd would send it to FlashAttention, cuDNN or the efficient kernel, by device, and save
their private state for the backward. Here it is still one call, and our op brings its own gradient.

Before:
    y: "bf16[2, 32, 512, 128]" = torch._C._nn.scaled_dot_product_attention(q, k, v, attn_mask=mask)
After:
    y: "bf16[2, 32, 512, 128]" = torch.ops.triton_only.attention.default(q, k, v, mask)

With dropout, a seed is drawn beside it (see `rewrite_seeds`):
    seed: "i64[1]" = torch.ops.triton_only.random_seeds.default(1, device=device)
    y = torch.ops.triton_only.attention.default(q, k, v, mask, seed, dropout_p=0.1)

Our output lies in memory as (…, length, heads, head_dim). Where PyTorch's would be contiguous and
only what depends on that follows (a view, a branch's or the graph's output), the kernel is asked to
write it so; where something else follows too, a `contiguous` is added.

What our kernels do not do (a head dimension over 256, a mask that needs a gradient, a probability
of dropout that is not known, attention within torch.func's vmap, grad or jvp) becomes PyTorch's own
decomposition, bmm - softmax - bmm, which stays in Triton but holds the scores in memory; the report
notes it. Nested tensors of the jagged layout become packed sequences (`nested_attention`). Left
alone: other nested tensors, other dtypes than fp16, bf16 and fp32, and calls that PyTorch itself
refuses.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from triton_only_backend import inductor
from triton_only_backend.kernels import nested_attention
from triton_only_backend.kernels.limits import DTYPES, MAX_HEAD_DIM
from triton_only_backend.passes.graph_edit import (
    describe,
    fake_call,
    is_contiguous,
    same_layout,
    value,
)
from triton_only_backend.passes.refusal import DECOMPOSED, META_KEY, Reason, Refusal, refuse
from triton_only_backend.passes.rewrite_seeds import OURS as SEEDS
from triton_only_backend.passes.rewrite_seeds import fake_seeds

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
    if any(t.is_nested for t in (query, key, val)):
        reason = nested_attention.why_not(query, key, val, mask)
        if reason is not None:  # the sizes of some nested tensors cannot be asked for
            facts = f"{query.dtype}, nested: {reason}"
            return Refusal(Reason.UNSUPPORTED_LAYOUT, facts, "pass padded tensors and a mask")
    facts = describe(given["query"], given["key"], given["value"])
    if any(t.layout not in (torch.strided, torch.jagged) for t in (query, key, val)):
        return Refusal(Reason.UNSUPPORTED_LAYOUT, facts, "pass padded tensors and a mask")
    if query.dtype not in DTYPES or not query.dtype == key.dtype == val.dtype:
        return Refusal(
            Reason.UNSUPPORTED_DTYPE, facts, "cast query, key and value to one of these dtypes"
        )
    if mask is not None and given["is_causal"]:
        return Refusal(Reason.MASK_AND_CAUSAL, facts, "combine them into one mask")
    if not isinstance(given["dropout_p"], float | int):
        return Refusal(
            Reason.DROPOUT, f"dropout_p={given['dropout_p']}", "make the probability a constant"
        )
    if not (head_dim_fits(query) and head_dim_fits(val)):
        return Refusal(Reason.HEAD_DIM_TOO_LARGE, facts, "use more heads of a smaller dimension")
    if any(map(inductor.is_transformed, (query, key, val, mask))):
        remedy = "call attention outside torch.func's transforms: it takes batches by itself"
        return Refusal(Reason.FUNCTION_TRANSFORM, facts, remedy)
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
    if value(given["query"]).is_nested:
        # A function of tensor subclasses; AOTAutograd traces what is inside.
        node.target = nested_attention.nested_attention
        return
    node.target = ATTENTION
    node.args = tuple(given[name] for name in ("query", "key", "value", "attn_mask"))
    node.kwargs = {
        name: given[name]
        for name in ("is_causal", "scale", "enable_gqa")
        if given[name] is not _DEFAULTS[name]
    }
    if given["dropout_p"] > 0:
        query = value(given["query"])
        with node.graph.inserting_before(node):
            seed = node.graph.call_function(SEEDS, (1,), {"device": query.device})
        seed.meta["example_value"] = fake_seeds(1, query.device, query.fake_mode)
        node.args = (*node.args, seed)
        node.kwargs = {**node.kwargs, "dropout_p": float(given["dropout_p"])}
    expected = value(node)
    readers = [user for user in node.users if _reads_layout(user)]
    if not readers or same_layout(expected, fake_call(ATTENTION, node.args, node.kwargs)):
        return
    if not is_contiguous(expected):
        return
    if len(readers) == len(node.users):
        node.kwargs = {**node.kwargs, "contiguous": True}
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
    mask = value(given["attn_mask"])
    if mask is not None and mask.dtype == torch.bool:
        given = {**given, "attn_mask": _as_addend(node, given)}
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


def _as_addend(node: torch.fx.Node, given: dict[str, Any]) -> torch.fx.Node:
    """A boolean mask as what is added to the scores: MATH adds any mask as it is."""
    graph, mask = node.graph, given["attn_mask"]
    with graph.inserting_before(node):
        hidden = graph.call_method("logical_not", (mask,))
        dtype = value(given["query"]).dtype
        zeros = graph.call_function(torch.zeros_like, (mask,), {"dtype": dtype})
        addend = graph.call_method("masked_fill", (zeros, hidden, float("-inf")))
    for new in (hidden, zeros, addend):
        new.meta = {k: v for k, v in node.meta.items() if k not in ("example_value", META_KEY)}
    return addend
