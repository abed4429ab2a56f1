"""Gradients of scaled dot-product attention on Hopper: all five products in one kernel.

With P = exp(scale * Q K^T - lse), which is what the forward normalised, and dO the gradient of the
output O = P V:

    delta_i = sum_d O_id dO_id        dP = dO V^T        dS_ij = P_ij (dP_ij - delta_i)
    dV = P^T dO                       dQ = scale * dS K                dK = scale * dS^T Q

A block of threads holds 128 keys of a KV head, and goes over tiles of 64 queries of all query heads
that read it. It has a warp that loads, two groups of four warps with 64 keys each, which sum dK and
dV in registers, and a third group that sums dQ. The loading warp fills a ring of tiles of Q, dO and
the rows' statistics (-lse in units of log2, and delta) through the copy engine. Scores are
transposed, keys by queries, so that P is an operand of the next product without leaving registers.
A group has for each tile m the tensor cores compute

    S(m) = K Q(m)^T and dK += dS(m-1) Q(m-1)
    dV += P(m) dO(m) and dP = V dO(m)^T           with P = exp(S - lse), of the other units
    dS(m) = P (dP - delta)                        to shared memory

and the third group, behind them, dQ(m) = dS(m)^T K over the keys of both. No group waits for
another but for want of dS or of room for it: one's products run beside the other's exponentials.

What a block adds to a tile of dQ, which lies in memory in fp32, it adds in its turn: the block of
keys j after that of keys j - 1. The first writes, the last adds to its own what is there and writes
the result. Sums have a fixed order, so that results are bitwise equal from run to run. A warp waits
for turns, another passes them on: one number in memory for each tile, the turns that are over,
zeroed by the kernel before.

Waiting ends, because a block waits for blocks with smaller numbers only (`tile_and_head`), and
hardware starts the blocks of a launch in the order of their numbers, as decoupled look-back scans
presume, too: who is waited for has finished or is at work. All go through a head's queries from the
last tile to the first, so each finds its turn come when it is behind the block before it by the
time of one addition.

When there are fewer tiles of keys than fill the device, the query heads of a KV head are split
among blocks, and `add_splits_kernel` adds their sums of dK and dV.

Layouts: query and grad_out (B, H, L_q, D), key and value (B, H_kv, L_kv, D), and the gradients, by
descriptors: any strides that `tma_can_load` admits; query head h reads KV head h // (H / H_kv).
Causal masking is aligned to the top left, as in PyTorch: query i sees the keys j <= i.

References: Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and
Low-precision", arXiv:2407.08608; Dao, "FlashAttention-2: Faster Attention with Better Parallelism
and Work Partitioning", arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_only_backend.kernels import hopper_backward_configs as configs
from triton_only_backend.kernels.attention_tiles import tile_and_head
from triton_only_backend.kernels.hopper_backward_ends import (
    add_splits_kernel,
    tile_statistics_kernel,
)
from triton_only_backend.kernels.hopper_backward_pipeline import (
    BLOCK_M,
    BLOCK_N,
    GROUP_KEYS,
    STAGES,
    differentiate_keys,
    differentiate_queries,
    load_tiles,
    pass_turns,
    wait_for_turns,
)
from triton_only_backend.kernels.tma_layout import tma_strides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from triton_only_backend.kernels.hopper_backward_configs import HopperBackwardConfig

# Arguments whose value must not decide what is compiled.
SIZES = (
    "key_tiles", "query_tiles", "parts", "parts_of_batch", "group_size", "section_heads", "splits",
    "len_kv",
)  # fmt: skip
FIRST, SECOND = gl.constexpr(0), gl.constexpr(1)
KEY_REGISTERS = gl.constexpr(configs.KEY_REGISTERS)
QUERY_REGISTERS = gl.constexpr(configs.QUERY_REGISTERS)
SERVICE_REGISTERS = gl.constexpr(configs.SERVICE_REGISTERS)


@gluon.jit(do_not_specialize=SIZES)
def flash_attention_backward_hopper_kernel(
    q_desc, do_desc, k_desc, v_desc, stats_desc, dq_desc, dk_desc, dv_desc, turns_ptr, dq_sums_ptr,
    dk_sums_ptr, dv_sums_ptr, scale, key_tiles, query_tiles, parts, parts_of_batch, group_size,
    section_heads, splits, len_kv, IS_CAUSAL: gl.constexpr, EVEN_N: gl.constexpr, SPLIT:
    gl.constexpr,
):  # fmt: skip
    BLOCK_D: gl.constexpr = k_desc.block_type.shape[3]
    dtype: gl.constexpr = k_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, GROUP_KEYS, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, GROUP_KEYS, BLOCK_D], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], do_desc.layout)
    stats_smem = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, BLOCK_M], stats_desc.layout)
    ds_smem = gl.allocate_shared_memory(
        dtype, [2, BLOCK_N, BLOCK_M], gl.NVMMASharedLayout(128, 16, rank=2)
    )
    dq_smem = gl.allocate_shared_memory(dtype, [1, 1, 1, BLOCK_M, BLOCK_D], dq_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turn_come = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turn_done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turn_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for slot in gl.static_range(2):
        mbarrier.init(ds_full.index(slot), count=2)
        mbarrier.init(ds_empty.index(slot), count=1)
        mbarrier.init(turn_come.index(slot), count=1)
        mbarrier.init(turn_done.index(slot), count=1)
        mbarrier.init(turn_free.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()

    # The blocks of one head in the order of their turns, under a causal mask the longest first.
    key_tile, part = tile_and_head(gl.program_id(0), key_tiles, parts, section_heads)
    start_n = key_tile * BLOCK_N
    if SPLIT:
        results = (dk_sums_ptr, dv_sums_ptr)
    else:
        results = (dk_desc, dv_desc)
    by_keys = (
        k_smem, v_smem, q_smem, do_smem, stats_smem, ds_smem, kv_full, full, empty, ds_full,
        ds_empty, start_n, part, query_tiles, parts_of_batch, group_size, len_kv, scale,
    )  # fmt: skip
    by_queries = (
        dq_sums_ptr, dq_desc, k_smem, ds_smem, dq_smem, kv_full, ds_full, ds_empty, turn_come,
        turn_done, start_n, part, query_tiles, key_tiles, parts_of_batch, group_size, scale,
    )  # fmt: skip
    loading = (
        q_desc, do_desc, k_desc, v_desc, stats_desc, k_smem, v_smem, q_smem, do_smem, stats_smem,
        kv_full, full, empty, start_n, part, query_tiles, parts_of_batch, group_size, splits,
    )  # fmt: skip
    waiting = (turns_ptr, turn_come, turn_free, start_n, part, query_tiles, group_size)
    passing = (
        turns_ptr, turn_done, turn_free, start_n, part, query_tiles, key_tiles, group_size,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (differentiate_keys, (by_keys, results, FIRST, IS_CAUSAL, EVEN_N, SPLIT)),
            (differentiate_keys, (by_keys, results, SECOND, IS_CAUSAL, EVEN_N, SPLIT)),
            (differentiate_queries, (by_queries, IS_CAUSAL)),
            (load_tiles, (loading, IS_CAUSAL)),
            (wait_for_turns, (waiting, IS_CAUSAL)),
            (pass_turns, (passing, IS_CAUSAL)),
        ],
        [4, 4, 1, 1, 1],
        [KEY_REGISTERS, QUERY_REGISTERS, SERVICE_REGISTERS, SERVICE_REGISTERS, SERVICE_REGISTERS],
    )


def _descriptor(tensor: torch.Tensor, block: Sequence[int], swizzle: int = 128) -> TensorDescriptor:
    """A descriptor of (..., D) that moves whole rows."""
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=swizzle, element_bitwidth=8 * tensor.element_size(), rank=tensor.dim()
    )
    return TensorDescriptor(tensor, list(tensor.shape), tma_strides(tensor), list(block), layout)


def flash_attention_backward_hopper(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    *,
    is_causal: bool,
    scale: float,
    config: HopperBackwardConfig,
) -> None:
    """Writes the gradients of `flash_attention_hopper`, from the arguments that `takes` admits.

    Sums for dQ take 4 * B * H * L_q * D bytes, with L_q a multiple of 64, while it runs; those of
    splits as many for each of dK and dV.

    Args:
        grad_out: (B, H, L_q, D) of query's dtype, strides as `tma_can_load` says; not empty.
        query: (B, H, L_q, D) fp16 or bf16, D of 64 or 128, likewise.
        key: (B, H_kv, L_kv, D) of query's dtype, likewise; H_kv divides H.
        value: (B, H_kv, L_kv, D) of query's dtype, likewise.
        out: (B, H, L_q, D), the forward's output, any strides.
        lse: (B, H, L_q) fp32, the forward's log-sum-exp, natural.
        grad_query: (B, H, L_q, D) of query's dtype, strides as `tma_can_load` says; written, not
            added to, as are the other two.
        grad_key: (B, H_kv, L_kv, D), likewise, summed over the query heads of each KV head.
        grad_value: (B, H_kv, L_kv, D), likewise.
        is_causal: query i sees the keys j <= i only.
        scale: factor of the scores.
    """
    batch, num_heads, len_q, head_dim = query.shape
    num_kv_heads, len_kv = key.shape[1:3]
    query_tiles = triton.cdiv(len_q, configs.BLOCK_M)
    key_tiles = triton.cdiv(len_kv, configs.BLOCK_N)
    splits = config.splits
    parts_of_batch = num_kv_heads * splits

    def workspace(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    tiles = batch * num_heads * query_tiles
    statistics = workspace(2 * tiles, configs.BLOCK_M)
    turns = workspace(tiles, dtype=torch.int32)
    dq_sums = workspace(tiles, configs.BLOCK_M * head_dim)
    dk_sums = dv_sums = dq_sums
    if splits > 1:
        keys = batch * parts_of_batch * key_tiles * configs.BLOCK_N
        dk_sums, dv_sums = workspace(keys, head_dim), workspace(keys, head_dim)
    tile_statistics_kernel[(tiles,)](
        out, grad_out, lse, statistics, turns, *out.stride(), *grad_out.stride(), *lse.stride(),
        query_tiles, num_heads, len_q, BLOCK_M=configs.BLOCK_M, BLOCK_D=head_dim, num_warps=4,
    )  # fmt: skip
    block = (1, 1, configs.BLOCK_M, head_dim)
    flash_attention_backward_hopper_kernel[(key_tiles * batch * parts_of_batch,)](
        *(_descriptor(x, block) for x in (query, grad_out, key, value)),
        _descriptor(statistics, (1, configs.BLOCK_M), 0),
        *(_descriptor(x, block) for x in (grad_query, grad_key, grad_value)), turns, dq_sums,
        dk_sums, dv_sums, scale, key_tiles, query_tiles, batch * parts_of_batch, parts_of_batch,
        num_heads // parts_of_batch, config.section_heads, splits, len_kv, IS_CAUSAL=is_causal,
        EVEN_N=len_kv % configs.BLOCK_N == 0, SPLIT=splits > 1, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        key_rows = key_tiles * (configs.BLOCK_N // configs.GROUP_KEYS)
        add_splits_kernel[(batch * num_kv_heads * key_rows, 2)](
            dk_sums, dv_sums, grad_key, grad_value, *grad_key.stride(), *grad_value.stride(), scale,
            key_rows, num_kv_heads, len_kv, splits, ROWS=configs.GROUP_KEYS, BLOCK_D=head_dim,
            num_warps=4,
        )  # fmt: skip
