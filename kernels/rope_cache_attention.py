"""A decoding step's attention: rotary embedding, cache write, attention over the updated cache.

One launch for what are four kernels otherwise: `decode_attention` whose programs rotate their
queries as they load them. Of the programs of a KV head, those whose split has the position's slot
write the rotated key and the value there before they attend to the tile. A barrier between the two
makes a program's own write visible to its own reads, through which it sees the new key even where
another of the group's row blocks writes the same values again. No program reads a slot that it does
not write itself, so no other order is needed.

A short cache on Hopper has a kernel of its own, `short_cache_attention`.

Where no counters are to be had (see `arrival`), the splits' parts are too many for one program to
combine, or a barrier does not order the stores, `rope_cache` and `decode_attention` run one after
the other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.attention_configs import AttentionProblem
from triton_only_backend.kernels.decode_attention import (
    Splits,
    arrange_splits,
    decode_attention,
    has_one_row,
    prefetch,
    scan_tiles,
)
from triton_only_backend.kernels.decode_configs import DecodeConfig, select_rope_cache_config
from triton_only_backend.kernels.dependent_launch import (
    launch_options,
    release_dependents,
    wait_for_producers,
)
from triton_only_backend.kernels.matmul import precision_of
from triton_only_backend.kernels.rope_cache import (
    Rotation,
    load_angles,
    load_heads,
    rope_cache,
    rotate,
    rotation_of,
    write_slot,
)
from triton_only_backend.kernels.short_cache_configs import select_short_cache, takes
from triton_only_backend.kernels.sizes import padded_head_dim
from triton_only_backend.kernels.split_kv import (
    attend_split,
    finish_split,
    prefetch_tiles,
    tiles_to_visit,
)

if TYPE_CHECKING:
    from triton_only_backend.kernels.rope_cache_ops import Inputs

Tensor = torch.Tensor

# PTX: bar.sync performs the threads' writes to memory for one another. AMD's: see `arrival`.
BARRIER_ORDERS_STORES = ("cuda", "interpreter")


@triton.jit(do_not_specialize=["len_kv"])
def rope_cache_attention_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, position_ptr, k_cache_ptr, v_cache_ptr, mask_ptr,
    out_ptr, partial_out_ptr, partial_lse_ptr, counter_ptr,
    q_strides, k_strides, v_strides, cos_strides, sin_strides, stride_position,
    k_cache_strides, v_cache_strides, mask_strides, out_strides, scale,
    num_kv_heads, group_size, len_kv, head_dim, head_dim_v, rotary_dim,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SCAN_TILES: tl.constexpr, ROPE: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, MASK_IS_BOOL: tl.constexpr,
    ONE_MASK_ROW: tl.constexpr, IS_SPLIT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    row_block = tl.program_id(2)
    b = (batch_head // num_kv_heads).to(tl.int64)
    kv_head = (batch_head % num_kv_heads).to(tl.int64)
    first_row = row_block * BLOCK_G
    row = first_row + tl.arange(0, BLOCK_G)
    row_valid = row < group_size
    h = kv_head * group_size + row
    k_cache_ptr += b * k_cache_strides[0] + kv_head * k_cache_strides[1]
    v_cache_ptr += b * v_cache_strides[0] + kv_head * v_cache_strides[1]
    if PREFETCH > 0:
        prefetch_tiles(
            k_cache_ptr, v_cache_ptr, split, num_splits, len_kv, head_dim, head_dim_v,
            k_cache_strides[2], v_cache_strides[2], BLOCK_N, BLOCK_D, BLOCK_DV, PREFETCH,
        )  # fmt: skip
    wait_for_producers(PDL)

    # All loads first, every program's key and value too: their latencies overlap.
    position = tl.load(position_ptr + b * stride_position).to(tl.int64)
    position = tl.where(position < 0, position + len_kv, position)  # as indexing does
    cos_ptr += b * cos_strides[0]
    sin_ptr += b * sin_strides[0]
    cos, sin = load_angles(
        cos_ptr, sin_ptr, cos_strides[2], sin_strides[2], rotary_dim, BLOCK_G, BLOCK_D, ROPE
    )
    q_rows = q_ptr + b * q_strides[0] + h * q_strides[1]
    x, y = load_heads(q_rows, row_valid, q_strides[3], rotary_dim, head_dim, BLOCK_D, ROPE)
    zero = tl.zeros((1,), tl.int64)
    k_row = k_ptr + b * k_strides[0] + kv_head * k_strides[1] + zero
    k_x, k_y = load_heads(k_row, zero == 0, k_strides[3], rotary_dim, head_dim, BLOCK_D, ROPE)
    k_cos, k_sin = load_angles(
        cos_ptr, sin_ptr, cos_strides[2], sin_strides[2], rotary_dim, 1, BLOCK_D, ROPE
    )
    offs_dv = tl.arange(0, BLOCK_DV)
    v_ptrs = v_ptr + b * v_strides[0] + kv_head * v_strides[1]
    v = tl.load(v_ptrs + offs_dv.to(tl.int64) * v_strides[3], mask=offs_dv < head_dim_v)

    if ONE_MASK_ROW:
        mask_rows = b * mask_strides[0] + kv_head * group_size * mask_strides[1]
        mask_rows = mask_ptr + mask_rows + zero
        mask_valid = tl.full((1,), True, tl.int1)
    else:
        mask_rows = mask_ptr + b * mask_strides[0] + h * mask_strides[1]
        mask_valid = row_valid
    begin, end = tiles_to_visit(
        mask_rows, mask_valid, mask_strides[3], split, num_splits, 1, len_kv, None, None,
        BLOCK_N, IS_CAUSAL, SCAN_TILES,
    )  # fmt: skip

    q = rotate(x, y, cos, sin, ROPE)
    if (position // BLOCK_N).to(tl.int32) % num_splits == split:
        write_slot(
            rotate(k_x, k_y, k_cos, k_sin, ROPE), v, position, k_cache_ptr, v_cache_ptr,
            len_kv, head_dim, head_dim_v, k_cache_strides[2], k_cache_strides[3],
            v_cache_strides[2], v_cache_strides[3], BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        tl.debug_barrier()
    out, lse2 = attend_split(
        q, k_cache_ptr, v_cache_ptr, mask_rows, mask_valid, row * 0, split, num_splits, begin, end,
        len_kv, head_dim, head_dim_v, k_cache_strides[2], k_cache_strides[3],
        v_cache_strides[2], v_cache_strides[3], mask_strides[3], scale, None, None, None,
        BLOCK_N, BLOCK_DV, IS_CAUSAL, HAS_MASK, MASK_IS_BOOL, EVEN_N, EVEN_D, EVEN_DV, PRECISION,
    )  # fmt: skip
    release_dependents(PDL)
    if counter_ptr is not None:
        counter_ptr += batch_head * tl.num_programs(2) + row_block
    finish_split(
        out, lse2, out_ptr, None, partial_out_ptr, partial_lse_ptr, counter_ptr,
        b, kv_head, first_row, group_size, split, num_splits,
        num_kv_heads, group_size, 1, head_dim_v, out_strides, out_strides,
        BLOCK_R, BLOCK_C, IS_SPLIT,
    )  # fmt: skip


def attention_rope_cache(
    x: Inputs,
    out: Tensor,
    *,
    rope: str,
    is_causal: bool,
    scale: float | None,
    caches_ready: bool = False,
    config: DecodeConfig | None = None,
) -> None:
    """Writes attention's output to `out` and the new key and value into the caches.

    Shapes are those of `triton_only.attention_rope_cache`, checked by the caller; `config` is
    chosen here where there is none, and with it the kernel.

    Args:
        caches_ready: the kernel launched last did not write the caches, so that they may be read
            before it ends; and the one launched next may start before this one has waited.

    Raises:
        DeviceError: tensors on a device that Triton cannot drive.
    """
    query = x.query
    device = hardware.of(query.device)
    batch, num_heads, _, head_dim = query.shape
    num_kv_heads, len_kv, head_dim_v = x.value_cache.shape[1:]
    if batch * num_heads == 0:
        return
    slots = x.positions.reshape(-1).expand(batch)
    mask = None if x.attn_mask is None else x.attn_mask.expand(batch, num_heads, 1, len_kv)
    rotation = rotation_of(rope, x.cos, x.sin, query)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    precision = precision_of(query)
    if config is None:
        problem = AttentionProblem(
            batch=batch, num_heads=num_heads, num_kv_heads=num_kv_heads, len_q=1, len_kv=len_kv,
            head_dim=head_dim, head_dim_v=head_dim_v, element_size=query.element_size(),
            is_causal=is_causal, has_mask=mask is not None,
        )  # fmt: skip
        short = select_short_cache(problem, device)
        if short is not None and takes(x, out, is_causal=is_causal):
            # A Triton with another Gluon fails at the import.
            from triton_only_backend.kernels.short_cache_attention import short_cache_attention

            if short_cache_attention(
                x, rotation, slots, mask, out,
                scale=scale, config=short, caches_ready=caches_ready,
            ):  # fmt: skip
                return
        config = select_rope_cache_config(problem, device)
    with hardware.guard(query):
        splits = arrange_splits(query, num_kv_heads, len_kv, head_dim_v, config)
        one_launch = splits.num_splits == 1 or splits.counters is not None
        if one_launch and device.backend in BARRIER_ORDERS_STORES:
            _launch(
                x, rotation, slots, mask, out, splits,
                is_causal=is_causal, scale=scale, config=config, precision=precision,
            )  # fmt: skip
            return
        rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        rope_cache(
            query, x.key, x.value, rotation, x.key_cache, x.value_cache, slots[:, None], rotated
        )
        decode_attention(
            rotated, x.key_cache, x.value_cache, mask, out, None,
            is_causal=is_causal, scale=scale, config=config, precision=precision,
        )  # fmt: skip


def _launch(
    x: Inputs,
    rotation: Rotation,
    slots: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    splits: Splits,
    *,
    is_causal: bool,
    scale: float,
    config: DecodeConfig,
    precision: str,
) -> None:
    query, key, value, _, _, key_cache, value_cache, *_ = x
    _, num_heads, _, head_dim = query.shape
    num_kv_heads, len_kv, head_dim_v = value_cache.shape[1:]
    group_size = num_heads // num_kv_heads
    block_d, block_dv = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    one_mask_row = has_one_row(attn_mask, group_size)
    mask = query if attn_mask is None else attn_mask
    device = hardware.of(query.device)
    rope_cache_attention_kernel[splits.grid](
        query, key, value, rotation.cos, rotation.sin, slots, key_cache, value_cache, mask, out,
        splits.partial_out, splits.partial_lse, splits.counters,
        query.stride(), key.stride(), value.stride(), rotation.cos.stride(), rotation.sin.stride(),
        slots.stride(0), key_cache.stride(), value_cache.stride(), mask.stride(), out.stride(),
        scale, num_kv_heads, group_size, len_kv, head_dim, head_dim_v, rotation.width,
        BLOCK_G=config.block_g, BLOCK_N=config.block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
        BLOCK_R=splits.combine_rows, BLOCK_C=splits.combine_splits,
        SCAN_TILES=scan_tiles(attn_mask, one_mask_row, len_kv, splits.num_splits, config),
        ROPE=rotation.kind, IS_CAUSAL=is_causal, HAS_MASK=attn_mask is not None,
        MASK_IS_BOOL=mask.dtype == torch.bool, ONE_MASK_ROW=one_mask_row,
        IS_SPLIT=splits.num_splits > 1, EVEN_N=len_kv % config.block_n == 0,
        EVEN_D=head_dim == block_d, EVEN_DV=head_dim_v == block_dv, PRECISION=precision,
        PREFETCH=prefetch(key_cache, value_cache, config, device),
        num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(device),
    )  # fmt: skip
