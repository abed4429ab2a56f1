"""Counters by which the programs of one launch find out which of them finishes last.

A kernel whose programs share a counter adds one to it when its part is done; the one that finds all
others counted does what needs every part, and sets the counter back to zero. So a counter is zero
whenever no kernel runs that uses it, and serves the next launch without a memset.

Two launches that may run at the same time must not share counters:

- launches outside of CUDA graphs take those of their device and stream, which orders them;
- a launch that is captured takes counters that nothing else ever gets: graphs replay on any stream,
  beside others and beside eager launches. (One graph instantiated twice and replayed at the same
  time on two streams would share; PyTorch instantiates a graph once.)

They come from an arena that is allocated outside of capture, by a thread of its own: while Inductor
warms a CUDA graph up, this thread's allocations go to the graph's memory pool, where they must not
outlive the step. Captures before any eager launch of the device find no arena, and a great many
captures may exhaust it until the next eager launch: `arrival_counters` then says None, and the
caller launches a second kernel instead. So it does on AMD and Intel GPUs: Triton 3.7 compiles
`tl.debug_barrier` for gfx942 to an s_barrier that waits for no store of the other waves (no
s_waitcnt vmcnt before it), so that the last to arrive could read before they are done.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

# 4 MB: the captures of a step with 64 layers, batch 64 and 32 KV heads take an eighth of it.
ARENA_COUNTERS = 1 << 20
# Counters of two launches lie in different cache lines, and keep a tensor's alignment.
GRANULE = 32
MIN_COUNTERS_OF_STREAM = 1024


@dataclass
class _Arena:
    counters: torch.Tensor
    used: int = 0

    @property
    def left(self) -> int:
        return self.counters.numel() - self.used

    def take(self, count: int) -> torch.Tensor:
        taken = self.counters[self.used : self.used + count]
        self.used += -(-count // GRANULE) * GRANULE
        return taken


_lock = threading.Lock()
# The last of a device's is in use; graphs may still count in the others, so none is ever freed.
_arenas: dict[torch.device, list[_Arena]] = {}
_of_streams: dict[tuple[torch.device, int], torch.Tensor] = {}


def arrival_counters(count: int, device: torch.device) -> torch.Tensor | None:
    """At least `count` int32 counters, all zero, for a launch on the device's current stream.

    The launch must leave them at zero. None where there are none to be had: during a capture that
    no eager call on the device preceded or whose predecessors used them up, and off NVIDIA.
    """
    if device.type == "xpu" or torch.version.hip is not None:
        return None
    if is_capturing(device):
        with _lock:
            arenas = _arenas.get(device)
            return arenas[-1].take(count) if arenas and arenas[-1].left >= count else None
    key = (device, _stream(device))
    mine = _of_streams.get(key)
    enough = mine is not None and mine.numel() >= count
    if enough and _arenas[device][-1].left >= ARENA_COUNTERS // 2:
        return mine
    wanted = max(MIN_COUNTERS_OF_STREAM, 2 * count)
    with _lock:
        arenas = _arenas.setdefault(device, [])
        if not arenas or arenas[-1].left < max(wanted, ARENA_COUNTERS // 2):
            arenas.append(_Arena(_zeros(max(ARENA_COUNTERS, 4 * wanted), device)))
        if not enough:
            mine = _of_streams[key] = arenas[-1].take(wanted)
    return mine


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream is recording a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    """Zeros that any stream may use at once, in memory of no graph's pool."""

    def make() -> torch.Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return zeros

    with ThreadPoolExecutor(1) as other_thread:
        return other_thread.submit(make).result()
