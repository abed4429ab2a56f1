"""Takes the argmax of few long rows in two steps, so that it fills the GPU.

Why: Inductor gives a row to one block. The 128256 scores of each of two sequences took 30 µs of an
H200, where reading them takes 0.1. In chunks, first all at once and then of the chunks' largest,
the rows fill the GPU.

Before:
    argmax: "i64[2, 1]" = aten.argmax.default(scores, -1, True)          # scores (2, 128256)
After:
    chunks: "f32[2, 334, 384]" = aten.reshape.default(scores, [2, 334, 384])
    largest = aten.amax.default(chunks, [-1]);  place = aten.argmax.default(chunks, -1)
    chunk: "i64[2, 1]" = aten.argmax.default(largest, -1, True)
    argmax = chunk * 384 + aten.gather.default(place, -1, chunk)

The first of equal scores wins, and a NaN before all, in both. Left alone: rows that are many or
short, symbolic sizes, other dimensions than the last, sizes without a divisor that serves.
"""

from __future__ import annotations

import math

import torch

from triton_only_backend.passes.graph_edit import arguments, inline, value

aten = torch.ops.aten
MIN_SIZE = 8192
MAX_ROWS = 64
CHUNKS = range(256, 4097)


def split_argmax(graph: torch.fx.Graph) -> int:
    """Splits every argmax that would leave the GPU idle; returns how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.argmax.default):
        given = arguments(node)
        scores = value(given["self"])
        chunk = _chunk(scores, given["dim"])
        if chunk is None:
            continue
        keepdim = given["keepdim"]

        def split(x: torch.Tensor, chunk: int = chunk, keepdim: bool = keepdim) -> torch.Tensor:
            chunks = x.reshape(*x.shape[:-1], -1, chunk)
            best = chunks.amax(-1).argmax(-1, keepdim=True)
            place = best * chunk + chunks.argmax(-1).gather(-1, best)
            return place if keepdim else place.squeeze(-1)

        (new,) = inline(node, lambda x, split=split: (split(x),), [given["self"]])
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        count += 1
    return count


def _chunk(scores: torch.Tensor, dim: int | None) -> int | None:
    """The divisor of the row nearest to its square root, or None where there is no need of one."""
    if dim is None or scores.dim() == 0 or dim % scores.dim() != scores.dim() - 1:
        return None
    if not all(isinstance(size, int) for size in scores.shape):
        return None
    *rows, size = scores.shape
    if size < MIN_SIZE or not 0 < math.prod(rows) <= MAX_ROWS:
        return None
    divisors = [n for n in CHUNKS if size % n == 0 and size // n > 1]
    return min(divisors, key=lambda n: abs(math.log(n * n / size)), default=None)
