"""Rotary embedding of new positions, their keys and values put into the cache.

With x a head of the query or of the key, R the rotary width, and cos and sin of the position,

    half:         y[d]       = x[d] cos[d] - x[d + R/2] sin[d]
                  y[d + R/2] = x[d + R/2] cos[d + R/2] + x[d] sin[d + R/2]       d < R/2
    interleaved:  y[2i]      = x[2i] cos[i] - x[2i + 1] sin[i]
                  y[2i + 1]  = x[2i + 1] cos[i] + x[2i] sin[i]                   i < R/2

and y[d] = x[d] for d >= R; in fp32, rounded once. A position counts from the end where it is
negative, and writes nothing where it is outside the cache.

The kernel here serves a prefill, and where `rope_cache_attention` cannot do it all in one launch;
the functions serve both. Layouts: query (B, H, L, D), key (B, H_kv, L, D), value (B, H_kv, L, D_v)
and the caches (B, H_kv, S, D) and (B, H_kv, S, D_v), all by strides.

Reference: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
arXiv:2104.09864.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.dependent_launch import (
    launch_options,
    wait_for_producers,
)
from triton_only_backend.kernels.sizes import next_power_of_2, padded_head_dim

if TYPE_CHECKING:
    import torch


class Rotation(NamedTuple):
    """How heads are rotated: `kind` is "half", "interleaved" or "none".

    cos and sin are (B, L, W) views, stride 0 where they broadcast, with W = width for "half" and
    width / 2 for "interleaved"; any tensor of three dimensions where there is none.
    """

    kind: str
    width: int
    cos: torch.Tensor
    sin: torch.Tensor


@triton.jit
def load_heads(
    rows, row_valid, stride_d, rotary_dim, head_dim, BLOCK_D: tl.constexpr, ROPE: tl.constexpr
):
    """The heads at the pointers `rows`, and beside each element what it turns with, or 0."""
    d = tl.arange(0, BLOCK_D)
    valid = row_valid[:, None] & (d < head_dim)[None, :]
    x = tl.load(rows[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=valid, other=0.0)
    y = x
    if ROPE != "none":
        if ROPE == "half":
            other = tl.where(d < rotary_dim // 2, d + rotary_dim // 2, d - rotary_dim // 2)
        else:
            other = d ^ 1
        y_ptrs = rows[:, None] + other.to(tl.int64)[None, :] * stride_d
        y = tl.load(y_ptrs, mask=valid & (d < rotary_dim)[None, :], other=0.0)
    return x, y


@triton.jit
def load_angles(
    cos_ptr, sin_ptr, stride_cos, stride_sin, rotary_dim,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """cos and the sine that the other element is multiplied with, of each element of a head.

    The same for each of ROWS rows, and loaded so: in the layout of the heads, with no exchange.
    """
    d = tl.arange(0, BLOCK_D)
    cos = tl.zeros((ROWS, BLOCK_D), tl.float32)
    sin = cos
    if ROPE != "none":
        rows = tl.zeros((ROWS,), tl.int32)
        inside = (rows == 0)[:, None] & (d < rotary_dim)[None, :]
        if ROPE == "half":
            first = d < rotary_dim // 2
            angle = d
        else:
            first = d % 2 == 0
            angle = d // 2
        angle = rows[:, None] + angle[None, :]
        cos = tl.load(cos_ptr + angle * stride_cos, mask=inside, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle * stride_sin, mask=inside, other=0.0).to(tl.float32)
        sin = tl.where(first[None, :], -sin, sin)
    return cos, sin


@triton.jit
def rotate(x, y, cos, sin, ROPE: tl.constexpr):
    """Heads, given what `load_heads` and `load_angles` loaded."""
    if ROPE != "none":
        # What is not rotated has y = 0, cos = 1 and sin = 0, hence no product of 0 and infinity.
        rotated = x.to(tl.float32) * cos + y.to(tl.float32) * sin
        x = rotated.to(x.dtype)
    return x


@triton.jit
def write_slot(
    k, v, position, k_cache_ptr, v_cache_ptr, len_cache, head_dim, head_dim_v,
    stride_kn, stride_kd, stride_vn, stride_vd, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Writes one key (1, BLOCK_D) and one value (BLOCK_DV,) to their slot, if there is such."""
    inside = (position >= 0) & (position < len_cache)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k_ptrs = k_cache_ptr + position * stride_kn + offs_d.to(tl.int64) * stride_kd
    v_ptrs = v_cache_ptr + position * stride_vn + offs_dv.to(tl.int64) * stride_vd
    tl.store(k_ptrs[None, :], k, mask=(inside & (offs_d < head_dim))[None, :])
    tl.store(v_ptrs, v, mask=inside & (offs_dv < head_dim_v))


@triton.jit
def move_heads(
    rows, strides, out_rows, out_strides, valid, cos, sin, rotary_dim, head_dim,
    BLOCK_D: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Rotates the heads at the pointers `rows` (unless ROPE is "none") into `out_rows`."""
    x, y = load_heads(rows, valid, strides[3], rotary_dim, head_dim, BLOCK_D, ROPE)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = out_rows[:, None] + offs_d.to(tl.int64)[None, :] * out_strides[3]
    mask = valid[:, None] & (offs_d < head_dim)[None, :]
    tl.store(ptrs, rotate(x, y, cos, sin, ROPE), mask=mask)


@triton.jit
def rope_cache_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, position_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr,
    q_strides, k_strides, v_strides, cos_strides, sin_strides, position_strides,
    q_out_strides, k_cache_strides, v_cache_strides,
    len_q, num_heads, num_kv_heads, len_cache, head_dim, head_dim_v, rotary_dim,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one position, of the query or of key and value."""
    wait_for_producers(PDL)
    q_blocks = tl.cdiv(num_heads, BLOCK_H)
    blocks = q_blocks + tl.cdiv(num_kv_heads, BLOCK_H)
    token = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    b = (token // len_q).to(tl.int64)
    at = (token % len_q).to(tl.int64)
    cos, sin = load_angles(
        cos_ptr + b * cos_strides[0] + at * cos_strides[1],
        sin_ptr + b * sin_strides[0] + at * sin_strides[1],
        cos_strides[2], sin_strides[2], rotary_dim, 1, BLOCK_D, ROPE,
    )  # fmt: skip
    lanes = tl.arange(0, BLOCK_H)
    if block < q_blocks:
        h = (block * BLOCK_H + lanes).to(tl.int64)
        move_heads(
            q_ptr + b * q_strides[0] + h * q_strides[1] + at * q_strides[2], q_strides,
            q_out_ptr + b * q_out_strides[0] + h * q_out_strides[1] + at * q_out_strides[2],
            q_out_strides, h < num_heads, cos, sin, rotary_dim, head_dim, BLOCK_D, ROPE,
        )  # fmt: skip
    else:
        h = ((block - q_blocks) * BLOCK_H + lanes).to(tl.int64)
        slot = tl.load(position_ptr + b * position_strides[0] + at * position_strides[1])
        slot = slot.to(tl.int64)
        slot = tl.where(slot < 0, slot + len_cache, slot)  # as indexing does
        valid = (h < num_kv_heads) & (slot >= 0) & (slot < len_cache)
        k_cache_ptr += b * k_cache_strides[0] + slot * k_cache_strides[2]
        v_cache_ptr += b * v_cache_strides[0] + slot * v_cache_strides[2]
        move_heads(
            k_ptr + b * k_strides[0] + h * k_strides[1] + at * k_strides[2], k_strides,
            k_cache_ptr + h * k_cache_strides[1], k_cache_strides,
            valid, cos, sin, rotary_dim, head_dim, BLOCK_D, ROPE,
        )  # fmt: skip
        move_heads(
            v_ptr + b * v_strides[0] + h * v_strides[1] + at * v_strides[2], v_strides,
            v_cache_ptr + h * v_cache_strides[1], v_cache_strides,
            valid, cos, sin, rotary_dim, head_dim_v, BLOCK_DV, "none",
        )  # fmt: skip


def rotation_of(
    rope: str, cos: torch.Tensor | None, sin: torch.Tensor | None, query: torch.Tensor
) -> Rotation:
    """The rotation of a query (B, H, L, D) by tables (B or 1, L, W), or with fewer dimensions."""
    if cos is None or sin is None:
        return Rotation("none", 0, query[:, 0], query[:, 0])
    batch, _, length, _ = query.shape
    width = cos.shape[-1]
    tables = (
        t.reshape(t.shape[0] if t.dim() > 2 else 1, length, width).expand(batch, length, width)
        for t in (cos, sin)
    )
    return Rotation(rope, width if rope == "half" else 2 * width, *tables)


def rope_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rotation: Rotation,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    query_out: torch.Tensor,
) -> None:
    """Writes the rotated query to `query_out`, the rotated key and the value into the caches.

    Args:
        query: (B, H, L, D) fp16, bf16 or fp32, any strides.
        key: (B, H_kv, L, D) of query's dtype, any strides.
        value: (B, H_kv, L, D_v) of query's dtype, any strides.
        rotation: what is applied to query and key.
        key_cache: (B, H_kv, S, D) of query's dtype, any strides without overlap.
        value_cache: (B, H_kv, S, D_v) of query's dtype, any strides without overlap.
        positions: (B, L) integers, stride 0 where they broadcast: the slots in the caches. Of
            equal ones of one sequence, any may be the one that stays.
        query_out: (B, H, L, D) of query's dtype, any strides without overlap.
    """
    batch, num_heads, len_q, head_dim = query.shape
    num_kv_heads, length, head_dim_v = value_cache.shape[1:]
    # Eight heads of 128 keep a warp's loads at 16 bytes a lane, and a program's at 8 kB.
    block_h = min(8, next_power_of_2(num_heads))
    blocks = triton.cdiv(num_heads, block_h) + triton.cdiv(num_kv_heads, block_h)
    if batch * len_q == 0:
        return
    rope_cache_kernel[(batch * len_q * blocks,)](
        query, key, value, rotation.cos, rotation.sin, positions,
        query_out, key_cache, value_cache,
        query.stride(), key.stride(), value.stride(), rotation.cos.stride(), rotation.sin.stride(),
        positions.stride(), query_out.stride(), key_cache.stride(), value_cache.stride(),
        len_q, num_heads, num_kv_heads, length, head_dim, head_dim_v, rotation.width,
        BLOCK_H=block_h, BLOCK_D=padded_head_dim(head_dim), BLOCK_DV=padded_head_dim(head_dim_v),
        ROPE=rotation.kind, num_warps=4 if block_h == 8 else 1,
        **launch_options(hardware.of(query.device)),
    )  # fmt: skip
