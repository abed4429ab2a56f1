"""Seeds: drawn by a Triton kernel, decided by torch.manual_seed, never the same twice."""

from __future__ import annotations

import pytest
import torch
from cross_compile import TARGETS, rows_of

import triton_only_backend  # noqa: F401
from triton_only_backend.kernels.loading import load

ours = torch.ops.triton_only


def draw(count, device):
    return ours.random_seeds(count, device=device)


def test_manual_seed_decides_what_follows(device):
    torch.manual_seed(3)
    first = [draw(n, device) for n in (1, 5, 300)]
    torch.manual_seed(3)
    assert all(torch.equal(draw(len(seeds), device), seeds) for seeds in first)
    torch.manual_seed(4)
    assert not torch.equal(draw(300, device), first[2])


def test_seeds_are_many_and_different(device):
    seeds = torch.cat([draw(n, device) for n in (1000, 24, 1, 1)])
    assert seeds.dtype == torch.int64
    assert (seeds >= 0).all()
    assert len(seeds.unique()) == len(seeds)
    bits = (seeds[:, None] >> torch.arange(63, device=device)) & 1
    share = bits.double().mean(0)  # of ones: a half, within five standard deviations
    assert ((share - 0.5).abs() < 5 * 0.5 / len(seeds) ** 0.5).all()


def test_none_at_all(device):
    assert draw(0, device).shape == (0,)


def test_pytorchs_generator_moves_on(device):
    torch.manual_seed(0)
    before = torch.rand(3, device=device)
    torch.manual_seed(0)
    draw(1, device)
    assert not torch.equal(torch.rand(3, device=device), before)


def test_a_graph_reads_the_generator_once(device):
    """What a compiled call draws follows from where the generator stood before it."""
    module = load("random_seeds")
    torch.manual_seed(0)
    with module.following_generator([torch.device(device)]):
        inside = [draw(2, device), draw(2, device)]
    after = draw(2, device)
    torch.manual_seed(0)
    with module.following_generator([torch.device(device)]):
        again = [draw(2, device), draw(2, device)]
    assert all(torch.equal(a, b) for a, b in zip(inside, again, strict=True))
    assert len(torch.cat([*inside, after]).unique()) == 6


def test_a_trace_draws_nothing(device):
    torch.manual_seed(0)
    before = draw(1, device)
    torch.manual_seed(0)
    with torch._subclasses.FakeTensorMode():
        assert draw(7, device).shape == (7,)
    assert torch.equal(draw(1, device), before)


def test_common_subexpressions_and_constants_are_out_of_the_question():
    assert torch.Tag.nondeterministic_seeded in ours.random_seeds.default.tags


@pytest.mark.gpu
def test_replays_of_a_users_graph_draw_new_seeds():
    draw(1, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seeds = draw(4, "cuda")
    drawn = []
    for _ in range(3):
        graph.replay()
        drawn.append(seeds.clone())
    assert len(torch.cat(drawn).unique()) == 12


@pytest.mark.gpu
def test_the_first_draw_inside_a_capture_is_refused(monkeypatch):
    module = load("random_seeds")
    monkeypatch.setattr(module, "_states", {})
    with pytest.raises(RuntimeError, match="run the function once"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            draw(1, "cuda")


COMPILES = """
import json, sys
import cross_compile
compiled = cross_compile.compile_for(sys.argv[1])
import torch
from cross_compile import TARGETS, rows_of
from triton_only_backend.kernels import random_seeds
random_seeds.draw(3, torch.device("cpu"))
print(json.dumps([[c.name, c.spilled] for c in compiled]))
"""


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_compile(target):
    (found,) = rows_of(COMPILES, target)
    assert found == [["set_seed_state_kernel", 0], ["draw_seeds_kernel", 0]]
