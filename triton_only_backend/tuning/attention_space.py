"""The configurations of attention's forward kernels that are worth measuring."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from triton_only_backend.kernels.attention_configs import (
    AttentionProblem,
    FlashConfig,
    flash_fits,
    heuristic_flash_config,
)
from triton_only_backend.kernels.decode_configs import (
    MAX_SPLITS,
    DecodeConfig,
    decode_fits,
    heuristic_decode_config,
)
from triton_only_backend.tuning.gemm_cost import rates_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from triton_only_backend.kernels.hardware import Hardware

C = TypeVar("C", FlashConfig, DecodeConfig)
# Sums and scores a thread may hold of its 255 registers.
MAX_HELD = 200


def flash_candidates(
    problem: AttentionProblem, hardware: Hardware, limit: int = 0
) -> list[FlashConfig]:
    """Configurations of `flash_attention`, the heuristic's first; `limit` at most, 0 for all."""
    first = heuristic_flash_config(problem, hardware)
    fitting = (c for c in _flash(problem, hardware) if flash_fits(problem, c, hardware))
    return _near(first, [c for c in fitting if c != first], limit)


def _flash(problem: AttentionProblem, hardware: Hardware) -> Iterator[FlashConfig]:
    rows = (64, 128) if hardware.has_wgmma else (32, 64, 128)
    tma = hardware.has_wgmma and problem.element_size == 2
    for block_m, block_n, warps in itertools.product(rows, (16, 32, 64, 128), (4, 8)):
        held = block_m * (problem.block_dv + block_n) / (32 * warps)
        if held <= MAX_HELD and (not hardware.has_wgmma or block_m >= 16 * warps):
            for stages in (2, 3, 4):
                yield FlashConfig(block_m, block_n, warps, stages, tma)


def decode_candidates(
    problem: AttentionProblem, hardware: Hardware, limit: int = 0
) -> list[DecodeConfig]:
    """Configurations of `decode_attention`, the heuristic's first; `limit` at most, 0 for all."""
    first = heuristic_decode_config(problem, hardware)
    splits = {
        max(1, min(MAX_SPLITS, problem.len_kv // 16, round(first.num_splits * factor)))
        for factor in (0.5, 0.75, 1, 1.5, 2, 3)
    }
    found = [
        replace(first, block_n=block_n, num_splits=count, num_warps=warps, num_stages=stages)
        for block_n, count, warps, stages in itertools.product(
            (16, 32, 64, 128), sorted(splits), (2, 4, 8), (1, 2, 3, 4)
        )
        if block_n <= max(16, problem.len_kv // count)
    ]
    fitting = [c for c in found if c != first and decode_fits(problem, c, hardware)]
    return _near(first, fitting, limit)


def _near(first: C, others: list[C], limit: int) -> list[C]:
    """The first and those nearest to it, by how many doublings lie between their fields."""

    def distance(config: C) -> float:
        pairs = zip(vars(first).values(), vars(config).values(), strict=True)
        return sum(abs(math.log2((1 + a) / (1 + b))) for a, b in pairs)

    found: list[C] = [first]
    found += sorted(others, key=distance)
    return found[:limit] if limit else found


def bound_us(problem: AttentionProblem, config: object, hardware: Hardware) -> float:
    """A time that no run of any configuration can stay below: memory's and the tensor cores'."""
    rates = rates_of(hardware, problem.element_size, ieee=problem.element_size == 4)
    heads = problem.batch * problem.num_heads
    width = problem.head_dim + problem.head_dim_v
    kv = problem.batch * problem.num_kv_heads * problem.len_kv * width
    moved = (heads * problem.len_q * width + kv) * problem.element_size
    flops = 2 * heads * problem.len_q * problem.len_kv * width
    if problem.is_causal or problem.has_mask:
        flops = 0  # A kernel may leave out what is hidden.
    chip = rates.flops * hardware.num_sms
    return max(moved / (1.15 * rates.memory), flops / (1.15 * chip))
