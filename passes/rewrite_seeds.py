"""Draws all the seeds of a graph in one launch, by a Triton kernel of ours.

Why: Inductor draws the seed of its random numbers (dropout) with ATen's randint, the one kernel of
a training graph that is not Triton's. Attention with dropout asks for a seed of its own each time:
a launch a layer. And what activation checkpointing marks to be computed again in the backward would
draw other numbers there; the draw that stands here is computed once.

Before:
    inductor_seeds: "i64[2]" = prims.inductor_seeds.default(2, device)
    seed: "i64[]" = prims.inductor_lookup_seed.default(inductor_seeds, 1)
    random_seeds: "i64[1]" = triton_only.random_seeds.default(1, device=device)
    out = triton_only.attention.default(q, k, v, None, random_seeds, dropout_p=0.1)
After:
    random_seeds: "i64[3]" = triton_only.random_seeds.default(3, device=device)
    slice_1: "i64[2]" = aten.slice.Tensor(random_seeds, 0, 0, 2)
    seed: "i64[]" = prims.inductor_lookup_seed.default(random_seeds, 1)
    slice_2: "i64[1]" = aten.slice.Tensor(random_seeds, 0, 2, 3)
    out = triton_only.attention.default(q, k, v, None, slice_2, dropout_p=0.1)

(`lookup_seed` reads the merged seeds, so that the slice before it is dead.) Left alone: random
numbers that ATen draws itself, as Inductor's option fallback_random wants it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from triton_only_backend import inductor
from triton_only_backend.passes.graph_edit import insert

OURS = torch.ops.triton_only.random_seeds.default
# Recomputing these would draw other seeds, and merging is what they are here for.
CHECKPOINT_MARKS = ("recompute", "ac_graph_id", "partitioner_tag", "tensor_meta")


def _request(node: torch.fx.Node) -> tuple[torch.device, int]:
    count: Any = node.args[0]
    device: Any = node.kwargs["device"] if node.target is OURS else node.args[1]
    return torch.device(device), count


def fake_seeds(count: int, device: torch.device, mode: Any) -> torch.Tensor:
    """The fake value of a draw; nothing is drawn."""
    with mode:
        return torch.empty(count, dtype=torch.int64, device=device)


def rewrite_seeds(graph: torch.fx.Graph) -> int:
    """Merges what draws seeds into one draw a device; returns how many it replaced."""
    library_op, lookup_op = inductor.seed_ops()
    found: dict[torch.device, list[torch.fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (OURS, library_op):
            found[_request(node)[0]].append(node)
    replaced = 0
    for device, nodes in found.items():
        if [node.target for node in nodes] == [OURS] and "recompute" not in nodes[0].meta:
            continue
        total = sum(_request(node)[1] for node in nodes)
        with graph.inserting_before(nodes[0]):
            merged = graph.call_function(OURS, (total,), {"device": device})
        merged.meta = {k: v for k, v in nodes[0].meta.items() if k not in CHECKPOINT_MARKS}
        merged.meta["val"] = fake_seeds(total, device, nodes[0].meta["val"].fake_mode)
        start = 0
        for node in nodes:
            count = _request(node)[1]
            _redirect(node, merged, start, count, lookup_op)
            start += count
            replaced += 1
    return replaced


def _redirect(
    node: torch.fx.Node, merged: torch.fx.Node, start: int, count: int, lookup_op: Any
) -> None:
    """Makes what read a draw read its part of the merged one."""
    for user in list(node.users):
        if user.target is lookup_op:
            index: Any = user.args[1]
            user.args = (merged, start + index)
    if node.users:
        part = insert(node, torch.ops.aten.slice.Tensor, (merged, 0, start, start + count))
        node.replace_all_uses_with(part)
    node.graph.erase_node(node)


def devices_that_draw(gm: torch.fx.GraphModule) -> set[torch.device]:
    """The devices whose seeds a graph, or one nested in it, draws."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [n for graph in graphs for n in graph.find_nodes(op="call_function", target=OURS)]
    return {_request(node)[0] for node in nodes}
