"""What is searched of each kind: its problems and configurations, candidates and bounds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.attention_configs import (
    AttentionProblem,
    FlashConfig,
    heuristic_flash_config,
    select_flash_config,
)
from triton_only_backend.kernels.decode_configs import (
    DecodeConfig,
    heuristic_decode_config,
    select_decode_config,
)
from triton_only_backend.kernels.gemm_choice import heuristic_config, select_config
from triton_only_backend.kernels.gemm_configs import GemmConfig, GemmProblem
from triton_only_backend.tuning import attention_space, gemm_cost, gemm_space

if TYPE_CHECKING:
    from collections.abc import Callable

    from triton_only_backend.kernels.hardware import Hardware


@dataclass(frozen=True)
class Space:
    """One kind of problem.

    Attributes:
        select: what runs, by the sources in force.
        candidates: what to measure, the heuristic's choice first.
        bound_us: a time that no run of a configuration can stay below.
    """

    problem: type
    config: type
    select: Callable[[Any, Hardware], Any]
    heuristic: Callable[[Any, Hardware], Any]
    candidates: Callable[[Any, Hardware, int], list[Any]]
    bound_us: Callable[[Any, Any, Hardware], float]


SPACES = {
    "gemm": Space(
        GemmProblem,
        GemmConfig,
        select_config,
        heuristic_config,
        gemm_space.candidates,
        gemm_cost.bound_us,
    ),
    "flash_attention": Space(
        AttentionProblem,
        FlashConfig,
        select_flash_config,
        heuristic_flash_config,
        attention_space.flash_candidates,
        attention_space.bound_us,
    ),
    "decode_attention": Space(
        AttentionProblem,
        DecodeConfig,
        select_decode_config,
        heuristic_decode_config,
        attention_space.decode_candidates,
        attention_space.bound_us,
    ),
}


def candidates(kind: str, problem: Any, hardware: Hardware, limit: int) -> list[Any]:
    """See `Space.candidates`; what is shipped is one of them, so that no search ends below it."""
    found = SPACES[kind].candidates(problem, hardware, limit)
    known = shipped(kind, problem, hardware)
    if known not in found:
        found = [found[0], known, *found[1:]][: limit or None]
    return found


def bound_us(kind: str, problem: Any, config: Any, hardware: Hardware) -> float:
    """See `Space.bound_us`."""
    return SPACES[kind].bound_us(problem, config, hardware)


def heuristic(kind: str, problem: Any, hardware: Hardware) -> Any:
    """What is chosen where nothing was measured."""
    return SPACES[kind].heuristic(problem, hardware)


def shipped(kind: str, problem: Any, hardware: Hardware) -> Any:
    """What is chosen without a database: the tables' configuration, or else the heuristic's."""
    with tuned.using(tuned.Sources()):
        return SPACES[kind].select(problem, hardware)


def decode_problem(kind: str, text: str) -> Any:
    """The problem that `tuned.encode` wrote."""
    return SPACES[kind].problem(**json.loads(text))


def decode_config(kind: str, text: str) -> Any:
    """The configuration that `tuned.encode` wrote."""
    return SPACES[kind].config(**json.loads(text))
