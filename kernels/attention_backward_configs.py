"""With which blocks the gradients of attention are computed: pure functions of plain integers.

As in `attention_configs`, the first candidate whose tiles fit the shared memory is taken. They are
not tuned: two kernels share a configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from triton_only_backend.kernels.sizes import next_power_of_2

if TYPE_CHECKING:
    from triton_only_backend.kernels.attention_configs import AttentionProblem
    from triton_only_backend.kernels.hardware import Hardware


@dataclass(frozen=True)
class BackwardConfig:
    """Blocks of `flash_attention_backward`.

    The kernel for key and value gradients holds `block_n1` keys and walks the queries by
    `block_m1`; the kernel for query gradients holds `block_m2` queries and walks the keys by
    `block_n2`. `block_delta` rows a program for the sums of out * grad_out.
    """

    block_m1: int
    block_n1: int
    block_m2: int
    block_n2: int
    num_warps: int
    num_stages: int
    tma: bool = False
    block_delta: int = 16


def select_backward_config(problem: AttentionProblem, hardware: Hardware) -> BackwardConfig:
    """The configuration of `flash_attention_backward` for a problem."""
    if hardware.is_interpreter:
        block_m = min(128, max(16, next_power_of_2(problem.len_q)))
        block_n = min(128, max(16, next_power_of_2(problem.len_kv)))
        return BackwardConfig(block_m, block_n, block_m, block_n, 4, 1, block_delta=256)
    candidates = _backward_preferences(problem, hardware)
    for config in candidates:
        if backward_shared_memory(problem, config) <= hardware.shared_memory:
            return config
    return candidates[-1]


def backward_without_tma(config: BackwardConfig) -> BackwardConfig:
    """The same kernels with pointer loads: smaller tiles, as for `without_tma`."""
    return replace(
        config,
        tma=False,
        block_m1=min(config.block_m1, 32),
        block_n1=min(config.block_n1, 64),
        block_n2=min(config.block_n2, 64),
    )


def backward_shared_memory(problem: AttentionProblem, config: BackwardConfig) -> int:
    """An upper bound for the shared memory of either kernel: tiles held, staged and exchanged."""
    width = problem.block_d + problem.block_dv
    by_keys = (config.block_n1 + config.num_stages * config.block_m1) * width
    by_keys += config.block_n1 * config.block_m1
    by_queries = (config.block_m2 + config.num_stages * config.block_n2) * width
    by_queries += config.block_m2 * config.block_n2
    return max(by_keys, by_queries) * problem.element_size + 1024


def _backward_preferences(
    problem: AttentionProblem, hardware: Hardware
) -> tuple[BackwardConfig, ...]:
    width = max(problem.block_d, problem.block_dv)
    is_hip = hardware.backend == "hip"
    last = BackwardConfig(16, 16, 16, 16, 4, 1)
    if problem.element_size == 4:
        if width <= 64:
            first = (16, 32, 32, 16, 4, 2) if is_hip else (32, 32, 32, 32, 8, 2)
            return (BackwardConfig(*first), last)
        rows, keys = (16, 32) if width <= 128 else (16, 16)
        two_stages = BackwardConfig(rows, keys, keys, rows, 8, 2)
        return (two_stages, replace(two_stages, num_stages=1), last)
    if hardware.has_wgmma:
        if width <= 64:
            block_n2 = 64 if problem.has_second_tile else 128
            return (BackwardConfig(64, 128, 128, block_n2, 8, 2, tma=True), last)
        if width <= 128:
            # Dropout's random words beside 64 keys spilled 16 bytes (triton 3.6).
            block_n2 = 32 if problem.has_dropout else 64
            return (BackwardConfig(32, 128, 128, block_n2, 8, 2, tma=True), last)
        return (BackwardConfig(32, 64, 64, 32, 8, 2, tma=True), last)
    if width <= 64:
        if is_hip:
            return (BackwardConfig(32, 64, 64, 32, 4, 2), last)
        # A second stage beside a mask spilled 48 bytes on sm80.
        return (BackwardConfig(32, 128, 128, 32, 8, 1 if problem.has_second_tile else 2), last)
    if width <= 128:
        return (BackwardConfig(32, 64, 64, 32, 8, 2), BackwardConfig(16, 64, 64, 16, 8, 1), last)
    return (BackwardConfig(16, 64, 64, 16, 8, 1), BackwardConfig(16, 32, 32, 16, 4, 1), last)
