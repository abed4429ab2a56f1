"""How a candidate's error and time are taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend.kernels import tuned
from triton_only_backend.timing import Captured, capture, measure, replay_in_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A candidate may err this much more than PyTorch's own operation on the same input: sums in another
# order, nothing else.
ERROR_FACTOR = 2.0
# Microseconds of work in one CUDA graph: enough that its launch does not show; and so much that
# the chip's power has settled, which sets the pace of large products.
QUICK_US, PRECISE_US = 3_000, 16_000
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


class Turns:
    """Takes configurations' times in turn.

    What ran before, as a reference in fp64, heats the chip for all of them alike. The graph of the
    first is kept for the next comparison.
    """

    def __init__(self, calls_of: Callable[[Any], Sequence[Callable[[], Any]]]) -> None:
        self._calls_of = calls_of
        self._kept: tuple[Any, float, Captured] | None = None

    def times_us(self, configs: Sequence[Any], work_us: float) -> list[float]:
        """Microseconds a call of each, by graphs of about so much work of the first."""
        if self._kept is None or self._kept[:2] != (configs[0], work_us):
            calls = self._calls_of(configs[0])
            first = capture(calls, reps=_repetitions(calls, work_us))
            self._kept = (configs[0], work_us, first)
        first = self._kept[2]
        others = [capture(self._calls_of(c), reps=first.reps) for c in configs[1:]]
        return replay_in_turn([first, *others], replays=3 if work_us == QUICK_US else 5)


def _repetitions(calls: Sequence[Callable[[], Any]], wanted_us: float) -> int:
    once = measure(calls, reps=len(calls), replays=1)
    rotations = max(1, round(min(wanted_us / once, MAX_CALLS) / len(calls)))
    return rotations * len(calls)
