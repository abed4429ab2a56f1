"""Device time of a call, by CUDA graphs over rotating buffers, and the floor that it is held to."""

from __future__ import annotations

import contextlib
import gc
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend.errors import TritonOnlyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# More than any L2 cache holds several times over, so that a rotating operand is read from memory.
ROTATION_BYTES = 300_000_000
# Timed replays of a graph, after one that is not.
REPLAYS = 7


class BenchmarkError(TritonOnlyError, RuntimeError):
    """A benchmark that cannot run here: no GPU, or a package that is missing."""


@dataclass(frozen=True)
class Ceilings:
    """What a GPU can do at best.

    Attributes:
        bytes_per_second: of reading memory.
        flops_per_second: of multiplying matrices.
        source: how the two were found.
    """

    bytes_per_second: float
    flops_per_second: float
    source: str

    def floor_us(self, bytes_moved: float, flops: float) -> float:
        """The least time, in microseconds, in which that much can be moved and computed."""
        return 1e6 * max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


H200_HALF = Ceilings(
    4.29e12,
    790e12,
    "one H200, torch 2.11.0+cu130, triton 3.6.0, 2026-11-22: a plain Triton read kernel; "
    "cuBLAS bf16 8192³ at its fastest (680 to 790 TFLOP/s under load)",
)


def require_gpu() -> torch.device:
    """The current CUDA or ROCm device.

    Raises:
        BenchmarkError: there is none.
    """
    if not torch.cuda.is_available():
        raise BenchmarkError(
            "triton_only: benchmarks need a CUDA or ROCm GPU, and torch sees none; "
            "only `bench model --model llama-tiny` runs without one"
        )
    return torch.device("cuda", torch.cuda.current_device())


def copies_for(operand_bytes: int) -> int:
    """How many copies of an operand to rotate through."""
    return max(1, -(-ROTATION_BYTES // max(operand_bytes, 1)))


def repetitions(floor_us: float, rotation: int) -> int:
    """Calls to put into one graph: some 20 ms worth, a whole number of rotations, at most 2000."""
    wanted = min(2000, max(4, int(20_000 / max(floor_us, 1e-3))))
    return -(-wanted // rotation) * rotation if rotation < wanted else wanted


def measure(fns: Sequence[Callable[[], object]], *, reps: int, replays: int = REPLAYS) -> float:
    """Median device time of a call, in microseconds.

    Args:
        fns: the same call on different buffers, taken in turn; each is run once beforehand.
        reps: calls to capture into one CUDA graph.
        replays: timed replays of the graph, after one that is not.

    Raises:
        BenchmarkError: there is no GPU.
    """
    return replay_in_turn([capture(fns, reps=reps)], replays=replays)[0]


def measure_in_turn(
    calls: Mapping[str, Sequence[Callable[[], object]]], *, reps: int, replays: int = REPLAYS
) -> dict[str, float]:
    """Median device times of several calls, by name, in microseconds: a replay of each in turn.

    The chip's power sets the pace of large products, and what ran before, as a reference in fp64,
    must not count against the one that happens to be timed first.

    Args:
        calls: for each `measure`'s `fns`.
        reps: calls to capture into one CUDA graph each.
        replays: timed replays of each graph, after one that is not.

    Raises:
        BenchmarkError: there is no GPU.
    """
    times = replay_in_turn([capture(fns, reps=reps) for fns in calls.values()], replays=replays)
    return dict(zip(calls, times, strict=True))


@dataclass(frozen=True)
class Captured:
    """A CUDA graph of so many calls."""

    graph: Any
    reps: int


def capture(fns: Sequence[Callable[[], object]], *, reps: int) -> Captured:
    """A CUDA graph of `reps` calls, the functions in turn, each of which is run once beforehand.

    Raises:
        BenchmarkError: there is no GPU.
    """
    require_gpu()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.stream(stream):
        for fn in fns:
            fn()
        stream.synchronize()
        with _no_collection(), torch.cuda.graph(graph, stream=stream):
            for i in range(reps):
                fns[i % len(fns)]()
    torch.cuda.current_stream().wait_stream(stream)
    return Captured(graph, reps)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python from collecting garbage: a graph that is freed ends a capture in an error."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def replay_in_turn(captured: Sequence[Captured], *, replays: int) -> list[float]:
    """Median device times of a call of each graph, in microseconds: a replay of each in turn."""
    spans: list[list[tuple[Any, Any]]] = [[] for _ in captured]
    for each in captured:
        each.graph.replay()
    for _ in range(replays):
        for each, pairs in zip(captured, spans, strict=True):
            begin: Any = torch.cuda.Event(enable_timing=True)
            end: Any = torch.cuda.Event(enable_timing=True)
            begin.record()
            each.graph.replay()
            end.record()
            pairs.append((begin, end))
    torch.cuda.synchronize()
    return [
        statistics.median(float(begin.elapsed_time(end)) * 1e3 / each.reps for begin, end in pairs)
        for each, pairs in zip(captured, spans, strict=True)
    ]


def ceilings(dtype: torch.dtype) -> Ceilings:
    """The ceilings of the current GPU: known ones where there are any, else measured now."""
    device = require_gpu()
    if "H200" in torch.cuda.get_device_name(device) and dtype.itemsize == 2:
        return H200_HALF
    n = 8192 if dtype.itemsize == 2 else 4096
    return Ceilings(
        _copy_rate(device),
        _product_rate(device, dtype, n),
        f"measured in this run: a device-to-device copy; the library's product of {n}³",
    )


def _copy_rate(device: torch.device) -> float:
    source = torch.empty(1 << 29, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    time_us = measure([lambda: target.copy_(source)], reps=4)
    return 2 * source.numel() * source.element_size() / time_us * 1e6


def _product_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / measure([lambda: a @ b], reps=4) * 1e6


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """‖output − reference‖ / ‖reference‖ in the reference's precision."""
    difference = output.to(reference.dtype) - reference
    return float(difference.norm() / reference.norm())


def poison(shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Fills with NaN the memory from which the next tensor of that size will be allocated."""
    like.new_full(shape, float("nan"))
