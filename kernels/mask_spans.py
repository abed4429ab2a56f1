"""Where a boolean mask hides nothing, and where it hides all: a look at it before attention.

For each SPAN_ROWS queries, over chunks of SPAN_CHUNK keys:

    first_hidden    the first key of the chunk that some of these queries does not see
    last_seen       one past the last key of the chunk that some of these queries sees

Attention's programs, one a head and tile of queries, take the least and the largest over the chunks
and over the tile's rows: the keys before `first_hidden` need no mask, those from `last_seen` on
need not be read at all. A mask that is causal, or that of a static cache, costs the diagonal's
blocks then, and the scan is done once for all heads that share the mask, not in each program: 512
queries over a cache of 768 keys, 32 heads, took 66 µs of an H200 where each program scanned its
rows; causal attention of 512 takes 21. SPAN_ROWS is the least tile of a matrix product: every tile
of attention is made of whole spans, so that one scan serves any configuration.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_only_backend.errors import UnsupportedProblemError
from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.dependent_launch import launch_options, wait_for_producers

SPAN_ROWS: tl.constexpr = tl.constexpr(16)
SPAN_CHUNK: tl.constexpr = tl.constexpr(128)
# Greater than any key.
NO_KEY: tl.constexpr = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["len_q", "len_kv"])
def mask_spans_kernel(mask_ptr, spans_ptr, mask_strides, heads, len_q, len_kv, PDL: tl.constexpr):
    wait_for_producers(PDL)
    chunks = tl.cdiv(len_kv, SPAN_CHUNK)
    tiles = tl.cdiv(len_q, SPAN_ROWS)
    pid = tl.program_id(0)
    chunk = pid % chunks
    tile = pid // chunks % tiles
    batch_head = pid // (chunks * tiles)
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    rows = tile * SPAN_ROWS + tl.arange(0, SPAN_ROWS)
    keys = chunk * SPAN_CHUNK + tl.arange(0, SPAN_CHUNK)
    ptrs = mask_ptr + b * mask_strides[0] + h * mask_strides[1]
    ptrs += rows.to(tl.int64)[:, None] * mask_strides[2]
    ptrs = ptrs + keys.to(tl.int64)[None, :] * mask_strides[3]
    valid = (rows < len_q)[:, None] & (keys < len_kv)[None, :]
    seen = tl.load(ptrs, mask=valid, other=0).to(tl.int32) != 0
    seen_by_all = tl.min((seen | (valid == 0)).to(tl.int32), 0)
    seen_by_any = tl.max(seen.to(tl.int32), 0)
    first_hidden = tl.min(tl.where(seen_by_all != 0, NO_KEY, keys), 0)
    last_seen = tl.max(tl.where(seen_by_any != 0, keys + 1, 0), 0)
    spans_ptr += 2 * pid.to(tl.int64)
    tl.store(spans_ptr, first_hidden)
    tl.store(spans_ptr + 1, last_seen)


@triton.jit
def span_of_tile(
    spans_ptr, spans_strides, b, h, start_m, len_q, stop, BLOCK_M: tl.constexpr, CHUNKS:
    tl.constexpr,
):  # fmt: skip
    """The keys that all of a tile's queries see first, and the end of those that any sees."""
    chunks = tl.arange(0, CHUNKS)
    first_hidden = tl.full((CHUNKS,), NO_KEY, tl.int32)
    last_seen = tl.zeros((CHUNKS,), tl.int32)
    tile_ptrs = spans_ptr + b * spans_strides[0] + h * spans_strides[1] + chunks * spans_strides[3]
    for row in tl.static_range(0, BLOCK_M, SPAN_ROWS):
        ptrs = tile_ptrs + (start_m + row) // SPAN_ROWS * spans_strides[2]
        valid = (chunks * SPAN_CHUNK < stop) & (start_m + row < len_q)
        first_hidden = tl.minimum(first_hidden, tl.load(ptrs, mask=valid, other=NO_KEY))
        last_seen = tl.maximum(last_seen, tl.load(ptrs + 1, mask=valid, other=0))
    return tl.minimum(tl.min(first_hidden, 0), stop), tl.minimum(tl.max(last_seen, 0), stop)


def spans_shape(len_q: int, len_kv: int) -> tuple[int, int, int]:
    """(tiles, chunks, 2): the last dimensions of the spans of a mask (…, len_q, len_kv)."""
    return -(-len_q // SPAN_ROWS.value), -(-len_kv // SPAN_CHUNK.value), 2


def empty_spans(mask: torch.Tensor) -> torch.Tensor:
    """The result of `mask_spans`, not filled in.

    Raises:
        UnsupportedProblemError: a mask that is not boolean, or of fewer than two dimensions.
    """
    if mask.dtype != torch.bool or mask.dim() < 2:
        raise UnsupportedProblemError(
            f"triton_only.mask_spans({mask.dtype}{list(mask.shape)}): a boolean mask of two or "
            "more dimensions is needed; attention takes any other without spans"
        )
    shape = (*mask.shape[:-2], *spans_shape(*mask.shape[-2:]))
    return mask.new_empty(shape, dtype=torch.int32)


def mask_spans(mask: torch.Tensor) -> torch.Tensor:
    """The spans of a mask.

    Args:
        mask: bool, (…, L_q, L_kv), any strides.

    Returns:
        int32, (…, tiles, chunks, 2), contiguous: `first_hidden` and `last_seen`.

    Raises:
        UnsupportedProblemError: see `empty_spans`.
        DeviceError: a tensor on a device that Triton cannot drive.
    """
    spans = empty_spans(mask)
    device = hardware.of(mask.device)
    if spans.numel():
        view = mask[(None,) * (4 - mask.dim())] if mask.dim() <= 4 else mask.flatten(0, -4)
        with hardware.guard(mask):
            mask_spans_kernel[(spans.numel() // 2,)](
                view, spans, view.stride(), view.shape[1], *view.shape[2:],
                num_warps=4, **launch_options(device),
            )  # fmt: skip
    return spans


def broadcast_mask_spans(mask: torch.Tensor) -> torch.Tensor:
    """The spans of a mask (B, H, L_q, L_kv), expanded where the mask is: each row is read once."""
    own = mask[tuple(slice(0, 1 if step == 0 else None) for step in mask.stride()[:3])]
    return mask_spans(own).expand(*mask.shape[:2], *spans_shape(*mask.shape[2:]))
