"""Warp-specialised persistent matrix product for 16-bit operands on Hopper, in Gluon.

    out[b, m, n] = epilogue(alpha · Σ_k a[b, m, k] · b[b, k, n]  +  beta · bias[b, m, n])

One warp copies tiles of both operands to a ring in shared memory (TMA); two warpgroups multiply
(wgmma), one step of K always in flight, and each writes its own rows of the result through a small
staging buffer (TMA again). The copying warp runs ahead into the next tile while a result is
written. `full[s]` says that a ring slot has arrived, `empty[s]` that both have read it.

What bounds a tile: 64 × n × 16 multiplications take n / 2 cycles, in which shared memory moves 64 ·
n bytes; two consumers' operands are 2048 + 32 · n each such step, and what is copied comes on top.
By that 128 × 256 is just even, smaller tiles are bound by shared memory. Tiles of 96, 160, 192 and
224 columns, which fill a wave where powers of two do not, take one instruction all the same (see
`wide_mma`).

Of few steps a tile's result takes as long to write as to compute. With ALTERNATE the consumers take
turns: one multiplies while the other writes, instead of both doing the same at the same time.

With STREAM_K the tiles that would leave a wave half empty are divided along K (`stream_k`). What
each partition does is in `hopper_gemm_pipeline`.

Reference: the pipeline is that of Triton's Gluon tutorials 07 and 08.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_only_backend.kernels.arrival import arrival_counters
from triton_only_backend.kernels.dependent_launch import launch_options
from triton_only_backend.kernels.epilogue import NO_EPILOGUE, Epilogue, bias_strides
from triton_only_backend.kernels.gemm_configs import HOPPER_CONSUMERS, shares
from triton_only_backend.kernels.hopper_gemm_pipeline import (
    box_of,
    boxes_of,
    copy,
    multiply,
    piece_of,
)
from triton_only_backend.kernels.stream_k import CONSUMERS
from triton_only_backend.kernels.tma_layout import tma_strides
from triton_only_backend.kernels.wide_mma import shared_addresses

if TYPE_CHECKING:
    from triton_only_backend.kernels.gemm_configs import GemmConfig
    from triton_only_backend.kernels.hardware import Hardware


@gluon.jit
def consume(INDEX: gl.constexpr, work):
    multiply(INDEX, *work)


@gluon.jit
def produce(copies):
    copy(*copies)


@gluon.jit
def specialize(work, copies):
    """Starts those who multiply with `work`, and the warp that copies with `copies`.

    As arguments, since an assigned tuple's constants would become values. Of 384 threads' 168
    registers each, a thread that multiplies has 232: with 24 left, one that copies would spill.
    """
    gl.warp_specialize(
        [(consume, (0, work)), (consume, (1, work)), (produce, (copies,))],
        [4, 1],
        [232, 40],
    )


@gluon.jit
def slots_of(desc, COUNT: gl.constexpr):
    """Shared memory for some of a descriptor's tiles."""
    shape: gl.constexpr = [COUNT] + desc.block_type.shape  # noqa: RUF005
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


# Sizes differ from call to call, and no address is computed from them.
@gluon.jit(do_not_specialize=["batch", "M", "N", "steps", "whole", "lanes"])
def gemm_hopper_kernel(
    a_desc, b_desc, c_desc, partial_desc, bias_ptr, workspace_ptr, flags_ptr,
    batch, M, N, steps, whole, lanes, stride_sb, stride_sm, stride_sn, alpha, beta, epilogue,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, BUFFERS: gl.constexpr, A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_OPERANDS: gl.constexpr, ACTIVATION: gl.constexpr,
    STREAM_K: gl.constexpr, HALVES: gl.constexpr, ALTERNATE: gl.constexpr, EARLY: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    a_ring = slots_of(a_desc, STAGES * CONSUMERS)
    b_ring = slots_of(b_desc, STAGES * boxes_of(BLOCK_N, B_K_MAJOR))
    staging = slots_of(c_desc, CONSUMERS * BUFFERS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    a_address, b_address = shared_addresses(a_ring.index(0), b_ring.index(0))
    fence_async_shared()
    specialize(
        (
            a_ring, a_address, b_address, full, empty, turns, c_desc, staging, bias_ptr,
            workspace_ptr, flags_ptr, batch, M, N, steps, whole, lanes,
            stride_sb, stride_sm, stride_sn, alpha, beta, epilogue,
            BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, BUFFERS, A_K_MAJOR, B_K_MAJOR,
            HAS_BIAS, HAS_OPERANDS, ACTIVATION, STREAM_K, HALVES, ALTERNATE, PDL,
        ),
        (
            a_desc, b_desc, a_ring, b_ring, full, empty, partial_desc, flags_ptr,
            batch, M, N, steps, whole, lanes, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M,
            A_K_MAJOR, B_K_MAJOR, STREAM_K, HALVES, EARLY, PDL,
        ),
    )  # fmt: skip


def _descriptor(matrices: torch.Tensor, rows: int, block_k: int) -> TensorDescriptor:
    """A descriptor of a (B, rows, K) operand's tiles, whichever way they are contiguous."""
    if matrices.stride(2) == 1:
        return _tiles_of(matrices, rows, block_k)
    return _tiles_of(matrices.mT, block_k, rows)


def _tiles_of(matrices: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    block = [1, rows, columns]
    # 16-bit elements, all of them; the layout needs only their width.
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(matrices, list(matrices.shape), tma_strides(matrices), block, layout)


def _chunks_of(workspace: torch.Tensor, rows: int) -> TensorDescriptor:
    """Sums as they lie, as many at a time as a slot of `a` with so many rows holds."""
    lines = workspace.view(-1, 256)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(lines, list(lines.shape), [256, 1], [rows // 8, 256], layout)


def ring_and_staging(config: GemmConfig, shared_memory: int) -> tuple[int, int]:
    """The slots of the ring, at most `config`'s, and pieces of a consumer's result, that fit."""
    width = piece_of(config.block_n)
    piece = config.block_m * width * 2
    slot = (config.block_m + config.block_n) * config.block_k * 2
    room = shared_memory - 1024
    stages = min(config.num_stages, (room - piece) // slot)
    return stages, min(config.block_n // width, (room - stages * slot) // piece)


def gemm_hopper(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    config: GemmConfig,
    device: Hardware,
    epilogue: Epilogue = NO_EPILOGUE,
    early: bool = False,
) -> None:
    """Writes epilogue(alpha · a @ b + beta · bias) to `out`.

    Args:
        a: (B, M, K), fp16 or bf16; of M and K one with stride 1, the other strides positive
            multiples of 16 bytes, and so the address.
        b: (B, K, N), a's dtype, likewise.
        bias: (B, M, N), any strides (0 where it broadcasts), or None.
        out: (B, M, N), fp16 or bf16, as a, and contiguous along N.
        alpha: factor of the product.
        beta: factor of the bias.
        config: the tile and the ring, and whether the last tiles are divided.
        device: where.
        epilogue: what follows; with operands only for B = 1.
        early: `b` was not written by the kernel launched last before this one (see `ring_linear`).
    """
    batch, M, K = a.shape
    N = b.shape[2]
    rows = config.block_m // HOPPER_CONSUMERS
    a_k_major, b_k_major = a.stride(2) == 1, b.stride(1) == 1
    a_desc = _descriptor(a, rows, config.block_k)
    b_desc = _descriptor(b.mT, box_of(config.block_n, b_k_major), config.block_k)
    stages, buffers = ring_and_staging(config, device.shared_memory)
    share = shares(batch, M, N, K, config, device.num_sms)
    flags = workspace = partial_desc = None
    if share.divided:
        flags = arrival_counters(share.programs * HOPPER_CONSUMERS, out.device)
    if flags is None:
        whole = replace(config, split_k=1, stream_k=False)
        share = shares(batch, M, N, K, whole, device.num_sms)
    else:
        sums = share.programs * config.block_m * config.block_n
        workspace = torch.empty(sums, dtype=torch.float32, device=out.device)
        partial_desc = _chunks_of(workspace, rows)
    gemm_hopper_kernel[(share.programs,)](
        a_desc, b_desc, _tiles_of(out, rows, piece_of(config.block_n)), partial_desc,
        a if bias is None else bias, workspace, flags,
        batch, M, N, triton.cdiv(K, config.block_k), share.whole, share.lanes,
        *bias_strides(bias),
        float(alpha), float(beta), epilogue.arguments,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        STAGES=stages, GROUP_M=config.group_m, BUFFERS=buffers,
        A_K_MAJOR=a_k_major, B_K_MAJOR=b_k_major,
        HAS_BIAS=bias is not None, HAS_OPERANDS=len(epilogue.tensors) > 0,
        ACTIVATION=epilogue.activation, STREAM_K=flags is not None and config.stream_k,
        HALVES=flags is not None and config.split_k == 2,
        ALTERNATE=config.alternate and triton.cdiv(K, config.block_k) <= stages,
        EARLY=early, num_warps=4,  # of the first partition
        **launch_options(device),
    )  # fmt: skip
