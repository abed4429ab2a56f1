"""What an H200 was measured to do, bf16: what the choices of products on Hopper reckon with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_only_backend.kernels.gemm_configs import GemmConfig, Shares

# Bytes a µs from memory.
BYTES_PER_US = 4.2e6
# µs that a multiprocessor takes for 64 of K on a tile of `gemm_hopper`, all of them at work.
STEP_US = {
    (128, 96): 0.275,
    (128, 128): 0.36,
    (128, 160): 0.41,
    (128, 192): 0.52,
    (128, 224): 0.585,
    (128, 256): 0.655,
    (256, 128): 0.655,
}
# µs that dividing the last tiles costs, and for each program of those that share one of 128 × 256.
# Measured as 3 to 10 where two share a tile, 9 where three or four do, 16 where seven do.
_DIVISION_US, _SHARER_US = 5.0, 2.0
# … that two programs take to exchange their sums of a tile.
_HALVES_US = 4.0


def division_us(share: Shares, tiles: int, config: GemmConfig) -> float:
    """What it costs that programs share some of a product's `tiles`; 0 where none do."""
    if not share.divided:
        return 0.0
    if config.split_k == 2:
        return _HALVES_US
    sharers = share.programs / (tiles - share.whole)
    return _DIVISION_US + _SHARER_US * sharers * config.block_m * config.block_n / 32768
