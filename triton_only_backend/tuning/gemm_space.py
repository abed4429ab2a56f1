"""The configurations of a product that are worth measuring, the most promising first."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from triton_only_backend.kernels.gemm_choice import fit_stages, heuristic_config
from triton_only_backend.kernels.gemm_configs import (
    GEMV_MAX_ROWS,
    HOPPER_TILES,
    GemmConfig,
    GemmProblem,
    can_realign,
    has_descriptors,
    supports,
    with_ring,
)
from triton_only_backend.kernels.ring_configs import RING_PRODUCT_ROWS, RingConfig, deepest_ring
from triton_only_backend.kernels.sizes import next_power_of_2
from triton_only_backend.tuning.gemm_cost import cost_us

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from triton_only_backend.kernels.hardware import Hardware

# Accumulators a thread may hold of its 255 registers, and still have the rest of the loop in them.
MAX_ACCUMULATORS = 128
# Elements of an output of which tiles of 64 rows leave most multiprocessors idle.
SMALL_OUTPUT = 1 << 16


def candidates(problem: GemmProblem, hardware: Hardware, limit: int = 0) -> list[GemmConfig]:
    """What to measure: the heuristic's choice, then the most promising by the model.

    Args:
        limit: how many at most; 0 for all that the hardware could run.

    Configurations that differ only in their pipeline are one family; the best of each family come
    before the second of any, so that few candidates still cover the tiles and splits.
    """
    first = heuristic_config(problem, hardware)
    families: dict[tuple[object, ...], list[tuple[float, GemmConfig]]] = {}
    for config in dict.fromkeys(space(problem, hardware)):
        if config != first:
            family = (
                config.kernel, config.swap_operands, config.block_m, config.block_n,
                config.block_k, config.split_k, config.num_warps,
            )  # fmt: skip
            cost = cost_us(problem, config, hardware)
            families.setdefault(family, []).append((cost, config))
    ranked = sorted(
        (
            (cost * 1.04**place, place, config)
            for members in families.values()
            for place, (cost, config) in enumerate(sorted(members, key=_preference))
        ),
        key=lambda entry: entry[:2],
    )
    found = [first, *(config for _, _, config in ranked)]
    return found[:limit] if limit else found


def _preference(member: tuple[float, GemmConfig]) -> tuple[float, int, int, bool]:
    """Within a family: the deepest pipeline, the fewest blocks a multiprocessor."""
    cost, config = member
    return cost, config.resident, -config.num_stages, not config.store_halves


def space(problem: GemmProblem, hardware: Hardware) -> Iterator[GemmConfig]:
    """Every configuration that computes the problem and fits memory and registers."""
    swaps = (False, True) if min(problem.M, problem.N) <= 128 else (False,)
    for swap in swaps:
        seen = problem.transposed if swap else problem
        for config in itertools.chain(
            _gemv(seen), _rings(seen, hardware), _tiles(seen, hardware), _warp_specialised(seen)
        ):
            config = replace(config, swap_operands=swap)
            if supports(problem, config, hardware):
                yield config
    if can_realign(problem, hardware):
        for config in space(problem.realigned, hardware):
            config = replace(config, realign=True)
            if supports(problem, config, hardware):
                yield config


def _gemv(problem: GemmProblem) -> Iterator[GemmConfig]:
    if problem.M > GEMV_MAX_ROWS:
        return
    if problem.b_k_contiguous:
        widths: Iterable[tuple[int, int]] = (
            (n, k) for n in (4, 8, 16, 32) for k in (256, 512, 1024)
        )
    else:
        widths = ((n, k) for n in (64, 128, 256) for k in (32, 64, 128))
    for (block_n, block_k), warps, stages in itertools.product(widths, (4, 8), (3, 4, 5)):
        per_thread = block_n * block_k / (32 * warps)
        if not 16 <= per_thread <= 64 or block_k > max(next_power_of_2(problem.K), 32):
            continue
        for split_k in (1, 2, 4):
            if split_k == 1 or problem.K // (block_k * split_k) >= 2:
                yield GemmConfig("gemv", 1, block_n, block_k, split_k, 1, warps, stages)


def _rings(problem: GemmProblem, hardware: Hardware) -> Iterator[GemmConfig]:
    """Every tile and split, with the deepest rings of one and of two programs a multiprocessor."""
    if problem.M > RING_PRODUCT_ROWS:
        return
    for tile, resident in itertools.product((16, 32, 64, 128), (1, 2)):
        tiles, room = math.ceil(problem.N / tile), hardware.num_sms * resident
        # Two divide the last wave's tiles; more do where there are programs for them.
        for split_k in (1, *(n for n in (2, 3, 4, 6) if n == 2 or tiles * (n - 1) < room)):
            few = split_k * RingConfig(tile, 0).step * 4 > problem.K
            if split_k > 1 and (few or tiles % room == 0):
                break
            ring = RingConfig(tile, 0, resident, split_k)
            deepest = deepest_ring(problem.M, problem.K, ring, hardware)
            if deepest is not None:
                yield with_ring(problem.M, deepest)


def _tiles(problem: GemmProblem, hardware: Hardware) -> Iterator[GemmConfig]:
    size = problem.element_size
    # Blocks that waste no more than half of themselves.
    rows = [b for b in (16, 32, 64, 128, 256) if b <= max(16, next_power_of_2(problem.M))]
    columns = [b for b in (16, 32, 64, 128, 256) if b <= max(16, next_power_of_2(problem.N))]
    # A row of 128 bytes is what the tensor cores of Hopper and the copy engine take at once.
    depths = [b // size for b in (64, 128, 256, 512) if b >= 128 or not hardware.has_wgmma]
    if not problem.aligned or problem.ieee:
        rows, columns, depths = (
            [b for b in rows if b <= 128],
            [b for b in columns if b <= 64],
            [16, 32],
        )
    for block_m, block_n, block_k in itertools.product(rows, columns, depths):
        if block_k > max(16, next_power_of_2(problem.K)) or block_m * block_n < 512:
            continue
        for warps in (4, 8):
            accumulators = block_m * block_n / (32 * warps)
            if not 4 <= accumulators <= MAX_ACCUMULATORS:
                continue
            # Hopper's tensor cores take 64 rows for each four warps; where such tiles are too few,
            # the products of Ampere are faster.
            few = problem.batch * problem.M * problem.N <= SMALL_OUTPUT
            if hardware.has_wgmma and block_m < 16 * warps and not (few and warps == 4):
                continue
            for split_k in _splits(problem, hardware, block_m, block_n, block_k):
                tile = (block_m, block_n, block_k, split_k, 8, warps)
                yield from _pipelines(problem, hardware, tile)


def _warp_specialised(problem: GemmProblem) -> Iterator[GemmConfig]:
    for (block_m, block_n), stages in HOPPER_TILES.items():
        for split_k, stream_k in ((1, False), (1, True), (2, False)):
            for group in (8, 16) if problem.M > 2048 else (16,):
                tile = (block_m, block_n, 64, split_k, group, 8, stages)
                yield GemmConfig("gemm_hopper", *tile, stream_k=stream_k)
        if math.ceil(problem.K / 64) <= stages:
            for depth in (stages, stages - 1):
                tile = (block_m, block_n, 64, 1, 16, 8, depth)
                yield GemmConfig("gemm_hopper", *tile, alternate=True)


def _splits(
    problem: GemmProblem, hardware: Hardware, block_m: int, block_n: int, block_k: int
) -> Iterator[int]:
    """Splits of K that leave each block 4 steps, and at most three blocks to a multiprocessor."""
    tiles = problem.batch * math.ceil(problem.M / block_m) * math.ceil(problem.N / block_n)
    yield 1
    for split_k in (2, 3, 4, 6, 8):
        if tiles * split_k <= 3 * hardware.num_sms and problem.K // (block_k * split_k) >= 4:
            yield split_k


def _pipelines(
    problem: GemmProblem, hardware: Hardware, tile: tuple[int, int, int, int, int, int]
) -> Iterator[GemmConfig]:
    block_m, block_n, block_k, _, _, warps = tile
    size = problem.element_size
    accumulators = block_m * block_n // (32 * warps)

    def depths(resident: int, staging: int, most: int) -> list[int]:
        fitting = fit_stages(
            replace(hardware, shared_memory=hardware.shared_memory - staging * resident),
            block_m, block_n, block_k, size, most=most, blocks=resident,
        )  # fmt: skip
        return [stages for stages in (fitting, fitting - 1) if stages >= 2]

    most = 3 if not problem.aligned or problem.ieee else 6
    for resident in (1, 2, 3):
        for stages in depths(resident, 0, most):
            yield GemmConfig("gemm", *tile, stages)
    if not has_descriptors(hardware):
        return
    for resident in (1, 2, 3):
        if resident * warps * 32 * (accumulators + 56) > 65536:
            continue
        for halves in (False, True):
            if halves and block_n < 64:
                continue
            staging = block_m * block_n * size // (1 + halves)
            for stages in depths(resident, staging, 8):
                for group in (8, 16) if problem.M > 2048 else (8,):
                    config = GemmConfig("gemm_tma", *tile, stages, False, 512, resident, halves)
                    yield replace(config, group_m=group)
