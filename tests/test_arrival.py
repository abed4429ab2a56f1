"""Counters: who shares them with whom, and when there are none."""

from __future__ import annotations

import pytest
import torch

from triton_only_backend.kernels import arrival

DEVICE = torch.device("cpu")


@pytest.fixture
def state(monkeypatch):
    """An empty arena of 256 counters, a current stream and a capture to be set by the test."""
    state = {"stream": 1, "capturing": False}
    monkeypatch.setattr(arrival, "ARENA_COUNTERS", 256)
    monkeypatch.setattr(arrival, "_arenas", {})
    monkeypatch.setattr(arrival, "_of_streams", {})
    monkeypatch.setattr(arrival, "_stream", lambda _: state["stream"])
    monkeypatch.setattr(arrival, "is_capturing", lambda _: state["capturing"])
    return state


def lines(counters: torch.Tensor) -> set[int]:
    """Pieces of memory that the counters lie in; CPU tensors are aligned to 64 bytes."""
    first = counters.data_ptr()
    return {address // 64 for address in range(first, first + 4 * counters.numel(), 4)}


def take(count: int) -> torch.Tensor:
    counters = arrival.arrival_counters(count, DEVICE)
    assert counters is not None
    assert counters.numel() >= count
    assert counters.dtype == torch.int32
    assert not counters.any()
    return counters


def test_a_stream_keeps_its_counters(state):
    first, again = take(3), take(16)
    assert first.data_ptr() == again.data_ptr()
    state["stream"] = 2
    other = take(3)
    assert not lines(first) & lines(other)
    state["stream"] = 1
    assert take(3).data_ptr() == first.data_ptr()


def test_a_larger_launch_gets_more(state):
    first = take(3)
    assert not lines(first) & lines(take(5000))
    assert take(5000).data_ptr() == take(3).data_ptr()


def test_no_two_captures_share(state):
    monkey = take(3)
    state["capturing"] = True
    taken = [take(count) for count in (1, 40, 32)]
    assert [c.numel() for c in taken] == [1, 40, 32]
    every = [lines(c) for c in (*taken, monkey)]
    assert sum(map(len, every)) == len(set.union(*every))


def test_a_capture_with_no_arena_gets_none(state):
    state["capturing"] = True
    assert arrival.arrival_counters(1, DEVICE) is None
    state["capturing"] = False
    take(1)
    state["capturing"] = True
    take(1)


def test_an_eager_call_replaces_an_arena_that_runs_low(state, monkeypatch):
    monkeypatch.setattr(arrival, "ARENA_COUNTERS", 4096)
    eager = take(1)
    assert arrival._arenas[DEVICE][-1].left == 4096 - 1024
    state["capturing"] = True
    captured = take(2100)
    assert arrival.arrival_counters(1500, DEVICE) is None
    state["capturing"] = False
    assert take(1).data_ptr() == eager.data_ptr()
    state["capturing"] = True
    assert not lines(take(1500)) & (lines(captured) | lines(eager))


def test_the_counters_of_a_capture_outlive_everything(state):
    take(1)
    state["capturing"] = True
    address = take(3000).data_ptr()
    state["capturing"] = False
    take(1)
    assert len(arrival._arenas[DEVICE]) == 2
    first = arrival._arenas[DEVICE][0].counters
    assert first.data_ptr() <= address < first.data_ptr() + 4 * first.numel()


def test_amd_and_intel_have_none(state, monkeypatch):
    assert arrival.arrival_counters(1, torch.device("xpu")) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert arrival.arrival_counters(1, DEVICE) is None


@pytest.mark.gpu
def test_no_counters_come_from_a_graphs_memory_pool(monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(arrival, "_arenas", {})
    monkeypatch.setattr(arrival, "_of_streams", {})
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        counters = arrival.arrival_counters(1, device)
        inside = torch.zeros(1 << 22, device=device)
    segments = {segment["address"]: segment["total_size"] for segment in pool.snapshot()}

    def in_pool(tensor):
        return any(a <= tensor.data_ptr() < a + size for a, size in segments.items())

    assert in_pool(inside)
    assert not in_pool(counters)
