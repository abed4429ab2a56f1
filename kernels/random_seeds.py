"""Seeds for the random numbers of compiled graphs and of dropout in attention, drawn in Triton.

Each device has a state of two numbers, a key and a counter, in its memory. A draw is one launch:

    seed_i = 63 bits of Philox4x32(key; i, counter)        then        counter += 1

PyTorch keeps a generator's key (what torch.manual_seed sets) and offset on the host. Before a
compiled graph that draws seeds runs, `following_generator` writes both into the state and moves
the generator on: the same seeds follow the same torch.manual_seed, and the replay of a CUDA graph,
which runs no host code of its own, draws new ones. A draw outside such a graph does so for itself.
In a graph that the user captures, the counter alone moves on from replay to replay.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes

from triton_only_backend.kernels import hardware

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Philox numbers that a draw takes from PyTorch's generator; its offsets are multiples of 4.
OFFSET_STEP = 4

_states: dict[torch.device, torch.Tensor] = {}
_thread = threading.local()


@triton.jit(do_not_specialize=["key", "counter"])
def set_seed_state_kernel(state_ptr, key, counter):
    tl.store(state_ptr, tl.full((), key, tl.int64))
    tl.store(state_ptr + 1, tl.full((), counter, tl.int64))


@triton.jit(do_not_specialize=["count"])
def draw_seeds_kernel(state_ptr, seeds_ptr, count, BLOCK: tl.constexpr):
    # One warp, so that every lane has read the counter before it is written.
    key = tl.load(state_ptr)
    counter = tl.load(state_ptr + 1)
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros_like(lanes)
    low = zeros + (counter & 0x7FFFFFFF).to(tl.int32)
    high = zeros + (counter >> 31).to(tl.int32)
    r0, r1, _, _ = tl.philox(key, lanes, low, high, zeros)
    seeds = (r0.to(tl.int64) << 32 | r1.to(tl.int64)) & 0x7FFFFFFFFFFFFFFF
    tl.store(seeds_ptr + lanes, seeds, mask=lanes < count)
    tl.store(state_ptr + 1, counter + 1)


def draw(count: int, device: torch.device) -> torch.Tensor:
    """`count` seeds: (count,) int64, not negative.

    Raises:
        RuntimeError: the first draw on a device, inside the capture of a CUDA graph.
    """
    device = _indexed(device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing and device not in _states:
        raise RuntimeError(
            f"triton_only.random_seeds: no random state on {device} yet, and a CUDA graph is being "
            "captured; run the function once before the capture"
        )
    if not capturing and device not in getattr(_thread, "following", ()):
        _follow_generator(device)
    seeds = torch.empty(count, dtype=torch.int64, device=device)
    if count > 0:
        with hardware.guard(seeds):
            draw_seeds_kernel[(1,)](
                _states[device], seeds, count, BLOCK=triton.next_power_of_2(count), num_warps=1
            )
    return seeds


@contextlib.contextmanager
def following_generator(devices: Iterable[torch.device]) -> Iterator[None]:
    """What is drawn inside follows PyTorch's generators, whose state is read once, at the start."""
    before: frozenset[torch.device] = getattr(_thread, "following", frozenset())
    devices = frozenset(map(_indexed, devices))
    for device in devices:
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            _follow_generator(device)
    _thread.following = before | devices
    try:
        yield
    finally:
        _thread.following = before


def _follow_generator(device: torch.device) -> None:
    """Writes the generator's key and offset to the device's state, and moves the generator on."""
    hardware.of(device)  # switches the interpreter on, or refuses the device
    state = _states.get(device)
    if state is None:
        state = _states[device] = torch.empty(2, dtype=torch.int64, device=device)
    key, counter = _from_generator(device)
    with hardware.guard(state):
        set_seed_state_kernel[(1,)](state, key, counter, num_warps=1)


def _from_generator(device: torch.device) -> tuple[int, int]:
    """A key, as a signed 64-bit number, and a counter, which no later call gives again."""
    if device.type == "cpu":  # Mersenne Twister: it has no offset
        with _disable_current_modes():
            return int(torch.randint(2**63 - 1, ()).item()), 0
    generator = torch.get_device_module(device).default_generators[device.index]
    offset = int(generator.get_offset())
    generator.set_offset(offset + OFFSET_STEP)
    seed = int(generator.initial_seed()) % 2**64
    return seed - 2**64 if seed >= 2**63 else seed, offset


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, torch.get_device_module(device).current_device())
