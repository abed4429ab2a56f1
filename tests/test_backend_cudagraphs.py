"""CUDA graphs of what a model writes for good."""

from __future__ import annotations

import pytest
import torch
from compiling import compiled

from triton_only_backend import inductor


class Cache:
    """Holds a tensor, as a KV cache does."""

    def __init__(self, device: str) -> None:
        self.keys = torch.zeros(4, device=device)


@pytest.mark.parametrize("cudagraphs", [False, True])
def test_what_a_graph_writes_for_good_is_no_copy(cudagraphs, device, monkeypatch):
    """Of what a graph writes, CUDA graphs are told that attributes of objects stay in place."""
    told = []
    original = inductor.keep_mutated_inputs_in_place

    def keep(gm, lasting, kwargs):
        # Inductor has no CUDA graphs on a CPU.
        kwargs = {**kwargs, "cudagraphs": cudagraphs, "static_input_idxs": ()}
        original(gm, lasting, kwargs)
        inputs = gm.graph.find_nodes(op="placeholder")
        told.append([tuple(inputs[i].meta["val"].shape) for i in kwargs["static_input_idxs"]])

    monkeypatch.setattr(inductor, "keep_mutated_inputs_in_place", keep)

    def step(x, cache, read, fresh):
        cache.keys.add_(x)
        fresh.mul_(2)
        return cache.keys.sum() + read.keys.sum()

    read = Cache(device)
    read.keys = torch.ones(5, device=device)
    with torch.no_grad():
        cache, fresh = Cache(device), torch.ones(3, device=device)
        compiled(step)(torch.ones(4, device=device), cache, read, fresh)
    assert told == [[(4,)] if cudagraphs else []]
    assert cache.keys.tolist() == [1.0] * 4
    assert fresh.tolist() == [2.0] * 3


@pytest.mark.gpu
def test_a_cache_first_seen_in_the_graph_has_its_cuda_graph(device):
    """PyTorch does without one there; a token took twice as long."""

    def step(x, cache):
        cache.keys.add_(x)
        return cache.keys * 2

    function = torch.compile(step, backend="triton_only", mode="reduce-overhead")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for _ in range(3):  # caches of their own: each is recorded, none is mixed up
            cache, x = Cache(device), torch.ones(4, device=device)
            for i in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                assert function(x, cache).tolist() == [2.0 * (i + 1)] * 4
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
