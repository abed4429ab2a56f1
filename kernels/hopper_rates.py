"""What an H200 was measured to do, bf16: what the choices of products on Hopper reckon with."""

from __future__ import annotations

# Bytes a µs from memory.
BYTES_PER_US = 4.2e6
# µs that a multiprocessor takes for 64 of K on a tile of `gemm_hopper`, all of them at work; 96 and
# 160 columns reckoned from what shared memory moves (see there), by the share of it that 192 reach.
STEP_US = {
    (128, 96): 0.345,
    (128, 128): 0.36,
    (128, 160): 0.465,
    (128, 192): 0.525,
    (128, 256): 0.655,
    (256, 128): 0.655,
}
# µs that dividing its tiles costs: measured 15 to 24, from M = 256 to 1024.
DIVISION_US = 22.0
