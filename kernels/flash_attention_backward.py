"""Gradients of scaled dot-product attention, by tiles, from the forward's log-sum-exp.

With P = exp(scale * Q K^T + mask - lse), which is what the forward normalised, and dO the gradient
of the output O = P V:

    delta_i = sum_d O_id dO_id        dP = dO V^T        dS_ij = P_ij (dP_ij - delta_i)
    dV = P^T dO                       dQ = scale * dS K                dK = scale * dS^T Q

Three kernels: delta, and the log-sum-exp in units of log2, with +inf, which makes P = 0, for rows
that saw no key; dK and dV, each program one tile of keys, over all queries of all query heads
that share the KV head; dQ, each program one tile of queries, over all keys. Every gradient is
summed by one program in a fixed order: no atomics, bitwise equal from run to run, grouped heads
included.

Layouts, masking and modifiers are those of `flash_attention`; dropout is drawn again from its seed,
and a soft-cap's derivative 1 - tanh^2 multiplies dS. The mask itself gets no gradient.

Reference: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from triton_only_backend.kernels import attention_modifiers
from triton_only_backend.kernels.attention_backward_configs import backward_without_tma
from triton_only_backend.kernels.attention_tiles import LOG2E
from triton_only_backend.kernels.eights import eights_of_heads, in_eights
from triton_only_backend.kernels.flash_attention import heads_in_cache
from triton_only_backend.kernels.key_value_gradient import key_value_gradient_kernel
from triton_only_backend.kernels.query_gradient import query_gradient_kernel
from triton_only_backend.kernels.sizes import padded_head_dim
from triton_only_backend.kernels.tma_layout import tma_can_load, tma_descriptor

if TYPE_CHECKING:
    from triton_only_backend.kernels.attention_backward_configs import BackwardConfig
    from triton_only_backend.kernels.attention_modifiers import Modifiers


@triton.jit(do_not_specialize=["num_rows", "len_q"])
def row_statistics_kernel(
    out_ptr, grad_out_ptr, lse_ptr, delta_ptr, lse2_ptr, stride_ob, stride_oh, stride_om, stride_od,
    stride_gob, stride_goh, stride_gom, stride_god, stride_lse_b, stride_lse_h, stride_lse_m,
    num_rows, num_heads, len_q, head_dim_v, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
    EIGHTS: tl.constexpr,
):  # fmt: skip
    (head_dim_v,) = in_eights((head_dim_v,), EIGHTS)
    stride_ob, stride_oh, stride_om = in_eights((stride_ob, stride_oh, stride_om), EIGHTS >> 1)
    stride_gob, stride_goh, stride_gom = in_eights(
        (stride_gob, stride_goh, stride_gom), EIGHTS >> 5
    )
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_dv = tl.arange(0, BLOCK_DV).to(tl.int64)
    row_valid = row < num_rows
    valid = row_valid[:, None] & (offs_dv < head_dim_v)[None, :]
    b = row // (num_heads * len_q)
    h = row // len_q % num_heads
    m = row % len_q
    out_ptrs = out_ptr + (b * stride_ob + h * stride_oh + m * stride_om)[:, None]
    grad_ptrs = grad_out_ptr + (b * stride_gob + h * stride_goh + m * stride_gom)[:, None]
    out = tl.load(out_ptrs + offs_dv[None, :] * stride_od, mask=valid, other=0.0)
    grad_out = tl.load(grad_ptrs + offs_dv[None, :] * stride_god, mask=valid, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=row_valid)
    lse_ptrs = lse_ptr + b * stride_lse_b + h * stride_lse_h + m * stride_lse_m
    lse = tl.load(lse_ptrs, mask=row_valid, other=0.0)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    tl.store(lse2_ptr + row, lse2, mask=row_valid)


def flash_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    *,
    is_causal: bool,
    scale: float,
    config: BackwardConfig,
    precision: str,
    modifiers: Modifiers = attention_modifiers.NONE,
) -> None:
    """Writes the gradients of `flash_attention` and `decode_attention` for query, key and value.

    Args:
        grad_out: (B, H, L_q, D_v) of query's dtype, any strides.
        query: (B, H, L_q, D), as the forward had it; so are `key`, `value` and `attn_mask`.
        key: (B, H_kv, L_kv, D).
        value: (B, H_kv, L_kv, D_v).
        attn_mask: None or (B, H, L_q, L_kv), bool or floating.
        out: (B, H, L_q, D_v), the forward's output.
        lse: (B, H, L_q) fp32, the forward's log-sum-exp.
        grad_query: (B, H, L_q, D), any strides; written, not added to, as are the other two.
        grad_key: (B, H_kv, L_kv, D), summed over the query heads of each KV head.
        grad_value: (B, H_kv, L_kv, D_v), likewise.
        is_causal: query i sees the keys j <= i only.
        precision: how fp32 products are computed, "ieee" or "tf32".
        modifiers: soft-cap, window, dropout and packed sequences, as the forward had them.
    """
    batch, num_heads, len_q, head_dim = query.shape
    num_kv_heads, len_kv, head_dim_v = value.shape[1:]
    use_tma = config.tma and all(map(tma_can_load, (query, key, value, grad_out)))
    use_tma = use_tma and not modifiers.is_packed
    if config.tma and not use_tma:
        config = backward_without_tma(config)
    mask = query if attn_mask is None else attn_mask
    group_size = num_heads // num_kv_heads if num_kv_heads else 1
    num_rows = batch * num_heads * len_q
    block_d, block_dv = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    row_bytes = (head_dim + head_dim_v) * query.element_size()

    delta = torch.empty(num_rows, dtype=torch.float32, device=query.device)
    lse2 = torch.empty_like(delta)
    if num_rows > 0:
        row_statistics_kernel[(triton.cdiv(num_rows, config.block_delta),)](
            out, grad_out, lse, delta, lse2, *out.stride(), *grad_out.stride(), *lse.stride(),
            num_rows, num_heads, len_q, head_dim_v, BLOCK_M=config.block_delta, BLOCK_DV=block_dv,
            EIGHTS=eights_of_heads((head_dim_v,), out, grad_out), num_warps=4,
        )  # fmt: skip

    total_q = None
    if modifiers.cu_seqlens_q is not None:
        batch, total_q = modifiers.cu_seqlens_q.numel() - 1, len_q
        len_q, len_kv = modifiers.max_q, modifiers.max_k
    input_strides = (
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *mask.stride(),
        *grad_out.stride(),
    )
    inputs = (query, key, value, grad_out)
    sizes = (group_size, len_q, len_kv, head_dim, head_dim_v)
    flags = {
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "IS_CAUSAL": is_causal,
        "HAS_MASK": attn_mask is not None,
        "MASK_IS_BOOL": mask.dtype == torch.bool,
        "EVEN_D": head_dim == block_d,
        "EVEN_DV": head_dim_v == block_dv,
        "USE_TMA": use_tma,
        "PRECISION": precision,
        **modifiers.kernel_arguments(),
        "total_q": total_q,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if grad_key.numel() + grad_value.numel() > 0:
        key_tiles = triton.cdiv(len_kv, config.block_n1)
        key_value_gradient_kernel[(key_tiles * batch * num_kv_heads,)](
            tma_descriptor(query, config.block_m1, block_d) if use_tma else query, key, value, mask,
            tma_descriptor(grad_out, config.block_m1, block_dv) if use_tma else grad_out, lse2,
            delta, grad_key, grad_value, *input_strides, *grad_key.stride(), *grad_value.stride(),
            scale, batch * num_kv_heads, num_kv_heads, *sizes, heads_in_cache(group_size * len_q *
            row_bytes, 1, batch * num_kv_heads), BLOCK_M=config.block_m1, BLOCK_N=config.block_n1,
            EVEN_M=len_q % config.block_m1 == 0 and not modifiers.is_packed,
            EIGHTS=eights_of_heads((head_dim, head_dim_v), *inputs, grad_key, grad_value), **flags,
        )  # fmt: skip
    if grad_query.numel() > 0:
        query_tiles = triton.cdiv(len_q, config.block_m2)
        query_gradient_kernel[(query_tiles * batch * num_heads,)](
            query, tma_descriptor(key, config.block_n2, block_d) if use_tma else key,
            tma_descriptor(value, config.block_n2, block_dv) if use_tma else value, mask, grad_out,
            lse2, delta, grad_query, *input_strides, *grad_query.stride(), scale, batch * num_heads,
            num_heads, *sizes, heads_in_cache(len_kv * row_bytes, group_size, batch * num_heads),
            BLOCK_M=config.block_m2, BLOCK_N=config.block_n2, EVEN_N=len_kv % config.block_n2 == 0
            and not modifiers.is_packed,
            EIGHTS=eights_of_heads((head_dim, head_dim_v), *inputs, grad_query), **flags,
        )  # fmt: skip
