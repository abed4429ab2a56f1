"""The seeds of a graph are drawn at once, and none is lost.

Inline graphs are updated by EXPECTTEST_ACCEPT=1.
"""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from pass_graphs import ours, trace

import triton_only_backend  # noqa: F401
from triton_only_backend import inductor
from triton_only_backend.passes.rewrite_seeds import rewrite_seeds
from triton_only_backend.testing import render


def test_the_seeds_of_a_graph_are_drawn_at_once():
    seeds, lookup = inductor.seed_ops()

    def random_numbers(q):
        drawn = seeds(2, q.device)
        mine = ours.random_seeds(1, device=q.device)
        first = torch.ops.prims.inductor_random.default([3], lookup(drawn, 1), "rand")
        return first, ours.attention(q, q, q, None, mine, dropout_p=0.5)

    graph = trace(random_numbers, torch.randn(1, 2, 3, 8)).graph
    (drawn,) = graph.find_nodes(op="call_function", target=ours.random_seeds.default)
    drawn.meta["recompute"] = "must"
    assert rewrite_seeds(graph) == 2
    graph.eliminate_dead_code()
    graph.lint()
    assert_expected_inline(
        render(graph),
        """\
q_1: f32[1, 2, 3, 8]
random_seeds: i64[3] = triton_only.random_seeds(3, device=cpu)
slice: i64[1] = aten.slice.Tensor(random_seeds, 0, 2, 3)
inductor_lookup_seed: i64[] = prims.inductor_lookup_seed(random_seeds, 1)
inductor_random: f32[3] = prims.inductor_random([3], inductor_lookup_seed, 'rand')
attention: f32[1, 2, 3, 8][48, 8, 16, 1] = triton_only.attention(q_1, q_1, q_1, None, slice, dropout_p=0.5)
return (inductor_random, attention)""",
    )
    (merged,) = graph.find_nodes(op="call_function", target=ours.random_seeds.default)
    assert "recompute" not in merged.meta
    assert rewrite_seeds(graph) == 0


def test_a_draw_is_not_dead_code_of_another():
    """Two draws of the same arguments are two draws: common subexpressions are not merged."""
    tags = ours.random_seeds.default.tags
    assert torch.Tag.nondeterministic_seeded in tags
