"""How a candidate's error and time are taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend.kernels import tuned
from triton_only_backend.timing import measure, measure_in_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A candidate may err this much more than PyTorch's own operation on the same input: sums in another
# order, nothing else.
ERROR_FACTOR = 2.0
# Microseconds of work in one CUDA graph: enough that its launch does not show.
QUICK_US, PRECISE_US = 3_000, 8_000
MAX_CALLS = 400


def error_bound(library: float, dtype: torch.dtype) -> float:
    """How far from fp64 a candidate may be, given the library's error on the same input.

    A rounding of the output, and of the fp32 sums, is granted in any case.
    """
    rounding = torch.finfo(dtype).eps / 2 + 16 * torch.finfo(torch.float32).eps
    return ERROR_FACTOR * max(library, rounding)


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """‖output − reference‖ / ‖reference‖; NaN where an element is."""
    difference = output.to(reference.dtype).sub_(reference)
    return float(difference.norm() / reference.norm())


def device_works() -> bool:
    """Whether the device can still be used, after an error on it."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def forced(kind: str, config: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call in which every choice of this kind is `config`."""

    def run() -> Any:
        with tuned.forcing(kind, config):
            return call()

    return run


def timed(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds a call, by a graph of about QUICK_US of whole rotations."""
    return measure(calls, reps=_repetitions(calls, QUICK_US), replays=3)


def timed_in_turn(candidates: Sequence[Sequence[Callable[[], Any]]]) -> list[float]:
    """The same of several candidates' calls, by graphs of about PRECISE_US, replayed in turn.

    What ran before, as the reference in fp64, so counts against none of them alone.
    """
    reps = _repetitions(candidates[0], PRECISE_US)
    times = measure_in_turn({str(i): calls for i, calls in enumerate(candidates)}, reps=reps)
    return [times[str(i)] for i in range(len(candidates))]


def _repetitions(calls: Sequence[Callable[[], Any]], wanted_us: float) -> int:
    once = measure(calls, reps=len(calls), replays=1)
    rotations = max(1, round(min(wanted_us / once, MAX_CALLS) / len(calls)))
    return rotations * len(calls)
