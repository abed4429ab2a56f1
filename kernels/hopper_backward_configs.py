"""Whether `flash_attention_backward_hopper` runs a backward, and how it divides the work.

`takes` asks the tensors, `select_hopper_backward` the sizes and the hardware: pure functions, the
latter of plain integers. Where either says no, `flash_attention_backward` runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from triton_only_backend.kernels import hopper_attention_configs as forward_configs
from triton_only_backend.kernels.tma_layout import tma_can_load

if TYPE_CHECKING:
    import torch

    from triton_only_backend.kernels.attention_arguments import Operands, Options
    from triton_only_backend.kernels.attention_configs import AttentionProblem
    from triton_only_backend.kernels.hardware import Hardware

BLOCK_M = 64  # queries of a tile
GROUP_KEYS = 64  # keys of a group of four warps: the rows of one wgmma
BLOCK_N = 2 * GROUP_KEYS  # keys of a block
STAGES = 3  # tiles of queries in shared memory
# Of a thread, in the two groups that sum dK and dV and in the one that sums dQ. Fewer for the
# latter ptxas ignores, and with 200 for the former it does one product after the other.
KEY_REGISTERS, QUERY_REGISTERS = 208, 72
SERVICE_REGISTERS = 24  # the fewest that setmaxnreg grants
SMALL_BYTES = 3072  # rows' statistics, barriers: an upper bound
# Blocks of one head at work at a time, about: each waits for the one before it, and of few heads
# the tiles that all of them read lie in the L2 cache. Measured on an H200, TFLOP/s with 4, 8 and 16
# of 2 × 32 heads of 128 (8 KV heads), 2048 queries: causal 375, 372, 295; else 428, 432, 447, and
# of 8192 520, 511, 547.
CAUSAL_CHAIN, CHAIN = 8, 16


@dataclass(frozen=True)
class HopperBackwardConfig:
    """How `flash_attention_backward_hopper` divides its work.

    Attributes:
        splits: parts of the query heads of a KV head, a block for each; their sums are added.
        section_heads: KV heads, or parts of them, whose blocks run at the same time.
    """

    splits: int
    section_heads: int


def takes(x: Operands, grad_out: torch.Tensor, options: Options) -> bool:
    """Whether `flash_attention_backward_hopper` computes this, as `flash_attention_hopper` would.

    Args:
        x: attention's operands.
        grad_out: (B, H, L_q, D_v), the output's gradient.
        options: attention's.
    """
    return (
        x.mask is None
        and forward_configs.takes(x, options)
        and grad_out.dtype == x.query.dtype
        and tma_can_load(grad_out)
    )


def select_hopper_backward(
    problem: AttentionProblem, hardware: Hardware
) -> HopperBackwardConfig | None:
    """How `flash_attention_backward_hopper` runs a problem, or None where it should not."""
    if not hardware.has_gluon or problem.len_q <= BLOCK_M:
        return None
    key_tiles = -(-problem.len_kv // BLOCK_N)
    kv_heads = problem.batch * problem.num_kv_heads
    group_size = problem.num_heads // problem.num_kv_heads
    # As few parts as fill the device: causal blocks, of unlike lengths, better by several a
    # multiprocessor.
    wanted = hardware.num_sms * 3 // 2 if problem.is_causal else hardware.num_sms * 9 // 10
    parts = [n for n in range(1, group_size + 1) if group_size % n == 0]
    splits = next((n for n in parts if n * kv_heads * key_tiles >= wanted), group_size)
    chain = CAUSAL_CHAIN if problem.is_causal else CHAIN
    at_once = max(1, hardware.num_sms // min(chain, key_tiles))
    return HopperBackwardConfig(splits, min(kv_heads * splits, at_once))


def hopper_backward_shared_memory(head_dim: int) -> int:
    """An upper bound for the shared memory of `flash_attention_backward_hopper`, in bytes.

    Keys and values, the ring of queries and the output's gradient, a tile of dQ, two tiles of dS.
    """
    rows = 2 * BLOCK_N + 2 * STAGES * BLOCK_M + BLOCK_M
    return 2 * (rows * head_dim + 2 * BLOCK_N * BLOCK_M) + SMALL_BYTES
