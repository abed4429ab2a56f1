"""Lets kernels of a decode step read weights and caches before the kernel before them has ended.

Why: a decode step is a chain of kernels that each stream memory, and between two of them the memory
idles while the one ends and the other begins. What no kernel near by writes need not wait for that:
a Llama-3-8B's step takes 3873 µs on an H200, 3997 where its weights do, and its attention another
2 µs a layer less where the cache does not.

Before:
    linear_fused = triton_only.linear_fused.default(x, [weight], [], residual=r)
    mm = triton_only.mm.default(x, permute)
    auto_functionalized_v2(triton_only.attention_rope_cache.default, query=q, _all_bases=[…], …)
After:
    linear_fused = triton_only.linear_fused.default(x, [weight], [], residual=r, weights_ready=True)
    mm = triton_only.mm.default(x, permute, weights_ready=True)
    auto_functionalized_v2(triton_only.attention_rope_cache.default, …, caches_ready=True)

It is right where weights, norm and caches are inputs of the graph, which the graph does not write
but for a cache its attention, in place, and x and q are computed in the graph. Then the kernel that
computes them, or a later one of the graph, is launched last before; that lets the next start only
once it has itself waited for all before it (see kernels/dependent_launch.py), so whatever wrote the
inputs before the graph has finished. (The attention does not wait before it lets the next start:
that one too follows two kernels of the graph, of which none writes what it reads early.)

Left alone: what reads an input of the graph for x or q, weights that are computed or written in the
graph, caches that something else reads, operands that are not 16-bit, other devices than CUDA's.
Kernels that make no use of it wait all the same.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from triton_only_backend.passes.graph_edit import arguments, value

Node = torch.fx.Node
LINEAR = torch.ops.triton_only.linear_fused.default
PRODUCTS = (torch.ops.triton_only.mm.default, torch.ops.triton_only.addmm.default)
ATTENTION = torch.ops.triton_only.attention_rope_cache.default
FUNCTIONAL = torch.ops.higher_order.auto_functionalized_v2
COPY = torch.ops.aten.copy_.default


def mark_ready_inputs(graph: torch.fx.Graph) -> int:
    """Marks every product and attention of which that holds; returns how many it has marked now."""
    written = _written_inputs(graph)
    count = 0
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        given = arguments(node)
        weights = [*given["weights"], given["norm_weight"], given["norm_bias"]]
        if _are_settled(weights, written) and _is_computed(given["input"]):
            count += _mark(node, "weights_ready")
    for target in PRODUCTS:
        for node in graph.find_nodes(op="call_function", target=target):
            given = arguments(node)
            if _are_settled([given["b"]], written) and _is_computed(given["a"]):
                count += _mark(node, "weights_ready")
    for node in graph.find_nodes(op="call_function", target=FUNCTIONAL):
        if node.args[0] is ATTENTION and _owns_caches(node) and _is_computed(node.kwargs["query"]):
            count += _mark(node, "caches_ready")
    return count


def _are_settled(weights: list[Node | None], written: set[Node]) -> bool:
    """Whether all are inputs of the graph that it does not write."""
    sources = {_source(weight) for weight in weights if weight is not None}
    return all(s.op in ("placeholder", "get_attr") and s not in written for s in sources)


def _mark(node: Node, name: str) -> bool:
    """Sets an argument to True; whether it was not before."""
    marked = node.kwargs.get(name, False)
    node.kwargs = {**node.kwargs, name: True}
    return not marked


def _is_computed(x: Node) -> bool:
    """Whether a kernel of the graph computes a 16-bit activation of a CUDA device."""
    fake = value(x)
    suits = fake.element_size() == 2 and fake.device.type == "cuda"
    return suits and _source(x).op == "call_function"


def _owns_caches(node: Node) -> bool:
    """Whether an attention's caches are inputs that are its own: Inductor writes them in place."""
    bases: Any = node.kwargs["_all_bases"]
    if any(user.target is not operator.getitem for user in node.users):
        return False
    for number, base in enumerate(bases, 1):
        results = [user for user in node.users if user.args[1] == number]
        copies = [copy for result in results for copy in result.users]
        others = set(base.users) - {node}
        written_back = len(copies) == 1 and copies[0].target is COPY and copies[0].args[0] is base
        if base.op != "placeholder" or not written_back or others != set(copies):
            return False
    return True


def _source(node: Node) -> Node:
    """The node whose memory a node is: through views, and ops that return what they write."""
    while isinstance(node.target, torch._ops.OpOverload):
        returns = node.target._schema.returns
        is_view = bool(returns) and returns[0].alias_info is not None
        # reshape is one where it can be, which its schema does not tell.
        if not is_view and node.target is not torch.ops.aten.reshape.default:
            break
        node = node.args[0]  # type: ignore[assignment]
    return node


def _written_inputs(graph: torch.fx.Graph) -> set[Node]:
    """The nodes that an op of the graph writes, or that a nested graph or kernel might."""
    written = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            for number, parameter in enumerate(node.target._schema.arguments):
                if parameter.alias_info is not None and parameter.alias_info.is_write:
                    given = node.args[number : number + 1] or node.kwargs.get(parameter.name)
                    written |= _nodes_in(given)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            written |= {_source(argument) for argument in node.all_input_nodes}
    return written


def _nodes_in(argument: object) -> set[Node]:
    leaves = torch.utils._pytree.tree_leaves(argument)
    return {_source(leaf) for leaf in leaves if isinstance(leaf, Node)}
