"""Scaled dot-product attention of many queries on Hopper: softmax beside the tensor cores' work.

For one head and one tile of queries, keys in tiles of BLOCK_N from the last visible one to the
first, with S = scale * Q K^T:

    m_i = max_j S_ij        l_i = sum_j exp(S_ij - m_i)        O_i = sum_j exp(S_ij - m_i) V_j / l_i

Exponentials are powers of two: log2(e) is folded into the scale, so that a score costs one fused
multiply-add and one exponential.

A block of threads has a warp that loads and GROUPS groups of four warps, each with 64 queries of
its own. The warp fills a ring of STAGES tiles of keys and values through the copy engine; a group
keeps its scores, probabilities and result in registers, and pipelines over the tiles:

    S(n-1) = Q K(n-1)^T             asynchronously, then
    O     += P(n) V(n)              asynchronously, O being rescaled to the new maximum before;
    P(n-1) = exp(S(n-1) - m)        while it runs, on the other units

so that tensor cores and exponentials work at the same time within a group, and the groups, not
being in step, fill each other's gaps. With `ordered`, two groups take turns in starting products.

One program runs on each multiprocessor, through work items, a tile of queries of a head each; the
next item's loads run while this one's result is written. See `hopper_attention_tiles`.

Layouts: query (B, H, L_q, D), key and value (B, H_kv, L_kv, D), by descriptors: any strides that
`tma_can_load` admits; query head h reads KV head h // (H / H_kv). The result by strides. Causal
masking is aligned to the top left, as in PyTorch: query i sees the keys j <= i. A boolean mask is
read where `mask_spans` says that it hides some of a tile and not all: tiles that are all hidden are
skipped, and one that is causal costs its diagonal.

Reference: Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and
Low-precision", arXiv:2407.08608, algorithm 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_only_backend.kernels import hopper_attention_configs as configs
from triton_only_backend.kernels.hopper_attention_configs import HopperFlashForm
from triton_only_backend.kernels.hopper_attention_pipeline import (
    BLOCK_N,
    GROUP_ROWS,
    attend,
    load_tiles,
)
from triton_only_backend.kernels.mask_spans import broadcast_mask_spans
from triton_only_backend.kernels.tma_layout import tma_can_load, tma_strides

if TYPE_CHECKING:
    from triton_only_backend.kernels.hopper_attention_configs import HopperFlashConfig

# Arguments whose value must not decide what is compiled.
SIZES = (
    "num_tiles", "heads", "num_heads", "group_size", "section_heads", "len_q", "len_kv",
    "stride_lse_b", "stride_lse_h", "stride_lse_m", "stride_mask_b", "stride_mask_h",
    "stride_mask_m", "stride_spans_b", "stride_spans_h", "stride_spans_m", "stride_spans_n",
)  # fmt: skip
FIRST, SECOND, THIRD = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.jit(do_not_specialize=SIZES)
def flash_attention_hopper_kernel(
    q_desc, k_desc, v_desc, out_desc, out_ptr, stride_ob, stride_oh, stride_om, stride_od, lse_ptr,
    stride_lse_b, stride_lse_h, stride_lse_m, mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m,
    stride_mask_n, spans_ptr, stride_spans_b, stride_spans_h, stride_spans_m, stride_spans_n, scale,
    num_tiles, heads, num_heads, group_size, section_heads, len_q, len_kv, CONFIG: gl.constexpr,
    FORM: gl.constexpr,
):  # fmt: skip
    GROUPS: gl.constexpr = CONFIG.groups
    STAGES: gl.constexpr = CONFIG.stages
    REGISTERS: gl.constexpr = CONFIG.registers
    LOADING_REGISTERS: gl.constexpr = CONFIG.loading_registers
    BLOCK_D: gl.constexpr = k_desc.block_type.shape[3]
    dtype: gl.constexpr = k_desc.dtype
    gl.static_assert(GROUPS == 2 or not CONFIG.ordered, "turns are for two")
    out_smem = gl.allocate_shared_memory(
        dtype, [GROUPS if FORM.store_tma else 1, 1, 1, GROUP_ROWS, BLOCK_D], out_desc.layout
    )
    q_smem = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, GROUP_ROWS, BLOCK_D], q_desc.layout)
    kv_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(group), count=1)
        mbarrier.init(q_empty.index(group), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()

    out_strides = (stride_ob, stride_oh, stride_om, stride_od)
    lse_strides = (stride_lse_b, stride_lse_h, stride_lse_m)
    output = (out_desc, out_smem, out_ptr, out_strides, lse_ptr, lse_strides)
    mask_strides = (stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n)
    spans_strides = (stride_spans_b, stride_spans_h, stride_spans_m, stride_spans_n)
    mask = (mask_ptr, mask_strides, spans_ptr, spans_strides)
    loading = (
        q_desc, k_desc, v_desc, mask, q_smem, kv_smem, q_full, q_empty, full, empty, num_tiles,
        heads, num_heads, group_size, section_heads, len_q, len_kv,
    )  # fmt: skip
    attending = (
        output, mask, q_smem, kv_smem, q_full, q_empty, full, empty, scale, num_tiles, heads,
        num_heads, section_heads, len_q, len_kv,
    )  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (attend, (attending, FIRST, CONFIG, FORM)),
                (attend, (attending, SECOND, CONFIG, FORM)),
                (load_tiles, (loading, CONFIG, FORM)),
            ],
            [4, 1],
            [REGISTERS, LOADING_REGISTERS],
        )
    else:
        gl.static_assert(GROUPS == 3, "two or three groups")
        gl.warp_specialize(
            [
                (attend, (attending, FIRST, CONFIG, FORM)),
                (attend, (attending, SECOND, CONFIG, FORM)),
                (attend, (attending, THIRD, CONFIG, FORM)),
                (load_tiles, (loading, CONFIG, FORM)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, LOADING_REGISTERS],
        )


def _descriptor(tensor: torch.Tensor, block_rows: int) -> TensorDescriptor:
    """A descriptor of (B, H, L, D) that loads tiles of `block_rows` whole rows."""
    block = [1, 1, block_rows, tensor.shape[3]]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), tma_strides(tensor), block, layout)


def _has_aligned_rows(mask: torch.Tensor) -> bool:
    """Whether keys of a mask (B, H, L_q, L_kv) are neighbours, and rows start at 16 bytes."""
    *steps, step = mask.stride()
    return step == 1 and all(n % 16 == 0 for n in (mask.data_ptr(), *steps))


def flash_attention_hopper(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    config: HopperFlashConfig,
    num_sms: int,
    spans: torch.Tensor | None = None,
) -> None:
    """Writes what `flash_attention` writes, from the arguments that `takes` admits.

    Args:
        query: (B, H, L_q, D) fp16 or bf16, D of 64 or 128, strides as `tma_can_load` says.
        key: (B, H_kv, L_kv, D) of query's dtype, likewise; H_kv divides H; at least one key.
        value: (B, H_kv, L_kv, D) of query's dtype, likewise.
        attn_mask: None or a (B, H, L_q, L_kv) boolean view, without `is_causal`.
        out: (B, H, L_q, D) of query's dtype, any strides.
        lse: None or (B, H, L_q) fp32: the natural logarithm of each row's sum of exponentials.
        is_causal: query i sees the keys j <= i only.
        scale: factor of the scores, positive.
        num_sms: multiprocessors of the device.
        spans: (B, H, tiles, chunks, 2) int32, `mask_spans` of the mask, where they are known.
    """
    batch, num_heads, len_q, head_dim = query.shape
    num_kv_heads, len_kv = key.shape[1:3]
    if out.numel() == 0:
        return
    group_size = num_heads // num_kv_heads
    heads = batch * num_heads
    num_tiles = triton.cdiv(len_q, config.block_m)
    programs = min(num_tiles * heads, num_sms)
    kv_bytes = 2 * len_kv * head_dim * key.element_size()
    section_heads = configs.heads_of_section(num_tiles, heads, group_size, kv_bytes, programs)
    mask: tuple[Any, ...] = (None, 0, 0, 0, 0, None, 0, 0, 0, 0)
    mask_aligned = False
    if attn_mask is not None:
        spans = broadcast_mask_spans(attn_mask) if spans is None else spans
        mask = (attn_mask.view(torch.uint8), *attn_mask.stride(), spans, *spans.stride()[:4])
        mask_aligned = _has_aligned_rows(attn_mask)
    store_tma = tma_can_load(out)
    even_n = len_kv % configs.BLOCK_N == 0
    form = HopperFlashForm(is_causal, even_n, mask_aligned, lse is not None, store_tma)
    flash_attention_hopper_kernel[(programs,)](
        _descriptor(query, configs.GROUP_ROWS), _descriptor(key, configs.BLOCK_N),
        _descriptor(value, configs.BLOCK_N),
        _descriptor(out if store_tma else query, configs.GROUP_ROWS), out, *out.stride(),
        lse if lse is not None else out, *(lse.stride() if lse is not None else (0, 0, 0)), *mask,
        scale, num_tiles, heads, num_heads, group_size, section_heads, len_q, len_kv,
        CONFIG=config, FORM=form, num_warps=4,
    )  # fmt: skip
