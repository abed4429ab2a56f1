"""Takes the largest of a row by sorting it in blocks, which Inductor does in Triton.

Why: Inductor calls ATen for `topk`, by which every mixture of experts routes its tokens, and every
sampler and beam search choose theirs; rows of up to 512 it sorts in one Triton kernel.

Before:
    topk = aten.topk.default(scores, 8)                                  # scores (64, 128)
    values: "f32[64, 8]" = topk[0];  indices: "i64[64, 8]" = topk[1]
After:
    sort = aten.sort.stable(scores, stable=True, dim=-1, descending=True)
    values = aten.clone(aten.slice(sort[0], -1, 0, 8));  indices = …

Of a longer row the k largest of each block of 512 are kept, and of these the k largest taken again,
until they fit one block: a vocabulary of 128256 and k = 50 take four rounds. Equal numbers come in
the order of their places; NaN counts as largest, as in ATen. Left alone, each with its reason: rows
whose length is not known, and more than half a block of a longer row.
"""

from __future__ import annotations

import operator

import torch

from triton_only_backend.passes.graph_edit import arguments, describe, inline, put, value
from triton_only_backend.passes.refusal import Reason, Refusal, refuse

aten = torch.ops.aten
# What Inductor sorts in one block (torch._inductor.ir.Sort).
BLOCK = 512


def rewrite_topk(graph: torch.fx.Graph) -> int:
    """Rewrites every topk in the graph; returns how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.topk.default):
        refusal = can_rewrite(node)
        if refusal is not None:
            refuse(node, refusal)
            continue
        given = arguments(node)
        dim, k, largest = given["dim"], given["k"], given["largest"]

        def function(
            x: torch.Tensor, dim: int = dim, k: int = k, largest: bool = largest
        ) -> tuple[torch.Tensor, ...]:
            found = top(x.movedim(dim, -1), k, largest)
            return tuple(part.movedim(-1, dim) for part in found)

        results = inline(node, function, [given["self"]])
        for getitem in list(node.users):
            if getitem.target is operator.getitem:
                put(getitem, results[getitem.args[1]])
                graph.erase_node(getitem)
        graph.erase_node(node)
        count += 1
    return count


def can_rewrite(node: torch.fx.Node) -> Refusal | None:
    """None if the row can be sorted in blocks, else why not."""
    given = arguments(node)
    scores = value(given["self"])
    facts = f"{describe(given['self'])}, k={given['k']}"
    size = scores.shape[given["dim"]] if scores.dim() else 0
    if not isinstance(size, int) or not isinstance(given["k"], int):
        return Refusal(
            Reason.UNKNOWN_ROW, facts, "compile with dynamic=False, or mark the row's length static"
        )
    if size == 0 or (size > BLOCK and given["k"] > BLOCK // 2):
        return Refusal(Reason.MANY_OF_A_ROW, facts, f"take at most {BLOCK // 2} of a longer row")
    return None


def top(x: torch.Tensor, k: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k first of each row (…, n) in order, and their places: (…, k) each."""
    size = x.shape[-1]
    values, places = _first(x[..., : max(size // BLOCK, 1) * BLOCK], k, largest)
    if size <= BLOCK:
        return values, places
    rest = size % BLOCK
    if rest:
        others, at = _first(x[..., -rest:], min(k, rest), largest)
        values, places = torch.cat([values, others], -1), torch.cat([places, at + size - rest], -1)
    best, of = top(values, k, largest)
    return best, places.gather(-1, of)


def _first(x: torch.Tensor, k: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of each block: (…, blocks · k)."""
    if x.shape[-1] <= BLOCK:
        values, places = x.sort(stable=True, dim=-1, descending=largest)
        return values[..., :k], places[..., :k]
    blocks = x.unflatten(-1, (-1, BLOCK))
    values, places = blocks.sort(stable=True, dim=-1, descending=largest)
    starts = torch.arange(0, x.shape[-1], BLOCK, device=x.device)[:, None]
    return values[..., :k].flatten(-2), (places[..., :k] + starts).flatten(-2)
