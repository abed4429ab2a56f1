"""Few rows through linear layers on Hopper, the weights streamed through a ring in shared memory.

    x = a · rsqrt(mean_k(a²) + eps) · (norm + offset), rounded to a's dtype, or a itself
    out_i = epilogue(x @ weight_iᵀ + bias_i)
    gated: out = epilogue(activation(x @ weight_0ᵀ + bias_0) · (x @ weight_1ᵀ + bias_1))

With few rows, reading the weights is all the time there is. One warp does nothing but ask for them
(TMA), a whole ring ahead, and never waits for arithmetic; four warps multiply on the tensor cores,
whose A operand is the weights as they lie in shared memory, so that no thread touches them. A
program walks over tiles; the ring does not drain between them.

wgmma's A has 64 rows, and 64 rows of a weight a program would leave many multiprocessors without
work. So FOLD = 64 / TILE runs of 64 of K lie above one another as the 64 rows of A, over TILE rows
of the weight, and the same runs of x side by side as columns of B:

    A (64, 64) = [W[rows, run 0]; W[rows, run 1]; …]        B (64, FOLD · ROWS) = [x[:, run 0]ᵀ, …]

Of the product the blocks on the diagonal are the runs' sums, and the others are thrown away: with
few rows the tensor cores have time for that. `collect` adds the blocks in the order of the runs.
With more rows, or of a weight that is contiguous along N, a tile is 64 rows of the weight, one run,
or 128, so that x comes less often from L2. Where such tiles leave many multiprocessors without work
they are DIVIDED along K (`ring_shares`). The two partitions are `ring_copies` and `ring_pipeline`.

The ring is so large that a multiprocessor has no room for programs of this kernel and the next: a
program starts where one of the kernel before has ended, one each, and with EARLY asks for its
weights at once, though other programs still run. 32 layers of Llama-3-8B take 3873 µs a step so on
an H200, 3997 where the first loads wait too. The caller vouches that nobody since the kernel before
the last wrote the weights. (Why of the last but one: this kernel starts when the one before it has
let it, which that does after its own wait; see `dependent_launch`.)

Reference for the pipeline: Triton's Gluon tutorials 07 and 08 (persistence, warp specialisation).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.arrival import arrival_counters
from triton_only_backend.kernels.dependent_launch import launch_options
from triton_only_backend.kernels.epilogue import NO_EPILOGUE, Epilogue
from triton_only_backend.kernels.ring_copies import RUN, copy, matrices_of, runs_of
from triton_only_backend.kernels.ring_pipeline import multiply
from triton_only_backend.kernels.tma_ring import seen_as

if TYPE_CHECKING:
    from collections.abc import Sequence

    from triton_only_backend.kernels.ring_configs import RingConfig
    from triton_only_backend.kernels.rms_norm import Norm

NORM_CHUNK = 1024  # of K, that are normalised at once
MAX_WEIGHTS = 3


@gluon.constexpr_function
def bytes_of(shape, dtype):
    size = dtype.primitive_bitwidth // 8
    for n in shape:
        size *= n
    return size


@gluon.jit
def ring_linear_kernel(
    x_ptr, x_desc, weight0_desc, weight1_desc, weight2_desc, norm_ptr, biases, outs, columns,
    M, K: gl.constexpr, stride_m, norm_eps, norm_offset, epilogue, workspace_ptr, counters_ptr,
    ROWS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr,
    GATED: gl.constexpr, K_MAJOR: gl.constexpr, ACTIVATION: gl.constexpr, DIVIDED: gl.constexpr,
    EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    FOLD: gl.constexpr = runs_of(TILE)
    BOXES: gl.constexpr = 2 // matrices_of(TILE, GATED)
    dtype: gl.constexpr = weight0_desc.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    boxed: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    weight_descs: gl.tuple = (weight0_desc,)
    if weight1_desc is not None:
        weight_descs += (weight1_desc,)
    if weight2_desc is not None:
        weight_descs += (weight2_desc,)

    ring = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, RUN], flat)
    ring_boxes = seen_as(ring, dtype, [STAGES * 2, FOLD, 64 // FOLD, RUN], boxed)
    X_BOXES: gl.constexpr = STAGES * BOXES if norm_ptr is None else K // RUN // FOLD
    x_ring = gl.allocate_shared_memory(dtype, [X_BOXES, FOLD * ROWS, RUN], flat)
    x_boxes = seen_as(x_ring, dtype, [X_BOXES, FOLD, ROWS, RUN], boxed)
    X_BYTES: gl.constexpr = bytes_of([BOXES, FOLD, ROWS, RUN], dtype)
    BYTES: gl.constexpr = bytes_of([2, 64, RUN], dtype) + (X_BYTES if norm_ptr is None else 0)
    # Of one run nothing is thrown away, and the sums go another way.
    SUMS: gl.constexpr = [2 if GATED else 1, 64 if FOLD > 1 else 1, FOLD * ROWS]
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    buffers = gl.allocate_shared_memory(gl.float32, SUMS, plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)

    tiles = gl.cdiv(columns[0], TILE)
    if not GATED:
        for i in gl.static_range(1, len(columns)):
            tiles += gl.cdiv(columns[i], TILE)
    steps = gl.cdiv(K, RUN * FOLD * BOXES)
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    x_ptr, norm_ptr, biases, outs, columns, tiles, steps, M, K, stride_m,
                    norm_eps, norm_offset, epilogue, workspace_ptr, counters_ptr, ring, x_ring,
                    buffers, full, empty, ROWS, TILE, STAGES, CHUNK, GATED, K_MAJOR,
                    ACTIVATION, DIVIDED, EARLY, PDL,
                ),
            ),
            (
                copy,
                (
                    x_desc, weight_descs, columns, tiles, steps, ring_boxes, x_boxes, full, empty,
                    TILE, STAGES, BYTES, GATED, K_MAJOR, norm_ptr is None, DIVIDED, EARLY, PDL,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip


def lines_of(matrix: torch.Tensor, fold: int, rows: int) -> TensorDescriptor:
    """A descriptor of (R, K) that loads `fold` runs of K of `rows` rows, run by run.

    More than one only if 64 divides K: what is behind K is the next row's.
    """
    R, K = matrix.shape
    # A single row's stride may be anything; the descriptor wants a multiple of 16 bytes.
    stride = matrix.stride(0) if R > 1 else K
    layout = gl.NVMMASharedLayout(128, 16, rank=3)
    shape, strides = [K // RUN.value, R, RUN.value], [RUN.value, stride, 1]
    if fold == 1:
        shape, strides = [1, R, K], [R * stride, stride, 1]
    return TensorDescriptor(matrix, shape, strides, [fold, rows, RUN.value], layout)


def columns_of(weight: torch.Tensor) -> TensorDescriptor:
    """A descriptor of a (N, K) that is contiguous along N; it loads squares."""
    N, K = weight.shape
    layout = gl.NVMMASharedLayout(128, 16, rank=3)
    strides = [K * weight.stride(1), weight.stride(1), 1]
    return TensorDescriptor(weight, [1, K, N], strides, [1, RUN.value, 64], layout)


def ring_linear(
    a: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    outs: Sequence[torch.Tensor],
    *,
    config: RingConfig,
    norm: Norm | None = None,
    gated: bool = False,
    epilogue: Epilogue = NO_EPILOGUE,
    early: bool = False,
) -> None:
    """Writes epilogue(norm(a) @ weightᵀ (+ bias)) to each of `outs`, in one launch.

    Args:
        a: (M, K), fp16 or bf16, K-contiguous, rows at 16-byte boundaries; `config` says which M.
        weights: one to three of (N_i, K), likewise; or one that is contiguous along N.
        biases: as many of (N_i,), contiguous, or None.
        outs: as many of (M, N_i), contiguous; gated, one.
        config: `select_ring` of the problem, which says which K it takes.
        norm: normalises a's rows by their root mean square; its weight is contiguous.
        gated: of two weights, the activation of the first product times the second.
        epilogue: what follows; with operands only for one output.
        early: weights and norm were not written by the kernel launched last before this one.
    """
    M, K = a.shape
    device = hardware.of(a.device)
    rows = config.rows(M)
    columns = tuple(out.shape[1] for out in outs)
    tiles = sum(triton.cdiv(n, config.tile) for n in columns)
    k_major = all(weight.stride(1) == 1 for weight in weights)
    weight_descs = [
        lines_of(weight, config.fold, min(config.tile, 64)) if k_major else columns_of(weight)
        for weight in weights
    ]
    programs = min(tiles * config.split_k, device.num_sms * config.resident)
    counters = workspace = None
    # Shares are reckoned with 32 bits.
    steps = tiles * triton.cdiv(K, config.step)
    if config.split_k > 1 and tiles % programs > 0 and steps < 1 << 22:
        counters = arrival_counters(tiles, a.device)
    if counters is None:
        programs = min(tiles, programs)
    else:
        sums = 2 * programs * config.tile * rows
        workspace = torch.empty(sums, dtype=torch.float32, device=a.device)
    ring_linear_kernel[(programs,)](
        a, lines_of(a, config.fold, rows) if norm is None else None,
        *weight_descs, *[None] * (MAX_WEIGHTS - len(weights)),
        None if norm is None else norm.weight, tuple(biases) if biases else None,
        tuple(outs), columns, M, K, a.stride(0),
        0.0 if norm is None else float(norm.eps), 0.0 if norm is None else float(norm.offset),
        epilogue.arguments, workspace, counters,
        ROWS=rows, TILE=config.tile, STAGES=config.stages, CHUNK=NORM_CHUNK, GATED=gated,
        K_MAJOR=k_major, ACTIVATION=epilogue.activation, DIVIDED=counters is not None, EARLY=early,
        num_warps=4, maxnreg=config.registers(M), **launch_options(device),
    )  # fmt: skip
