"""Attention of sequences of different lengths, packed one after the other: no padding anywhere.

Query (total_q, H, D), key (total_k, H_kv, D) and value (total_k, H_kv, D_v) hold the sequences'
rows; sequence s has the rows cu_seqlens[s] to cu_seqlens[s + 1] - 1. The kernels are those of
`sdpa`: a program finds where its sequence begins and ends, and nothing is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.attention_configs import (
    AttentionProblem,
    select_backward_config,
    select_flash_config,
    without_tma,
)
from triton_only_backend.kernels.flash_attention import flash_attention
from triton_only_backend.kernels.flash_attention_backward import flash_attention_backward
from triton_only_backend.kernels.sdpa import (
    Options,
    check_options,
    precision_of,
    refuse,
    scale_of,
)
from triton_only_backend.kernels.sdpa import check as check_operands

if TYPE_CHECKING:
    from triton_only_backend.kernels.attention_modifiers import Modifiers

Tensor = torch.Tensor
OP = "attention_varlen"


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    seed: Tensor | None = None,
    **options: Any,
) -> None:
    """Refuses what the kernels do not cover; the lengths' values, on the device, are not read.

    Raises:
        UnsupportedProblemError: naming the argument, the dtypes and shapes, and a remedy.
    """
    tensors = query, key, value
    if not query.dim() == key.dim() == value.dim() == 3:
        what = "query, key and value must be (total length, heads, head_dim)"
        raise refuse(what, "pack the sequences one after the other", *tensors, op=OP)
    check_operands(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
    check_options(seed, Options(**options), *tensors, op=OP)
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if num_kv_heads != value.shape[1] or num_kv_heads == 0 or num_heads % num_kv_heads:
        what = f"{num_heads} query heads cannot share {num_kv_heads} and {value.shape[1]} evenly"
        raise refuse(
            what, "key and value need as many heads, a divisor of query's", *tensors, op=OP
        )
    for name, lengths in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        integral = lengths.dtype in (torch.int32, torch.int64)
        if not integral or lengths.dim() != 1 or lengths.device != query.device:
            what = f"{name} is {lengths.dtype}{list(lengths.shape)} on {lengths.device}"
            remedy = f"pass (sequences + 1,) int32 or int64 on {query.device}"
            raise refuse(what, remedy, *tensors, op=OP)
    torch._check(
        cu_seqlens_q.shape[0] == cu_seqlens_k.shape[0],
        lambda: (
            "triton_only.attention_varlen: cu_seqlens_q and cu_seqlens_k must name as many "
            f"sequences, got {list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}"
        ),
    )


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """(total_q, H, D_v)."""
    return query.new_empty((query.shape[0], query.shape[1], value.shape[2]))


def empty_logsumexp(query: Tensor) -> Tensor:
    """(H, total_q), fp32."""
    return query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


def _heads_first(packed: Tensor) -> Tensor:
    """(total, H, D) as (1, H, total, D)."""
    return packed.transpose(0, 1).unsqueeze(0)


def _problem(query: Tensor, key: Tensor, value: Tensor, m: Modifiers, causal: bool) -> Any:
    assert m.cu_seqlens_q is not None
    return AttentionProblem(
        batch=m.cu_seqlens_q.numel() - 1,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        len_q=m.max_q,
        len_kv=m.max_k,
        head_dim=query.shape[2],
        head_dim_v=value.shape[2],
        element_size=query.element_size(),
        is_causal=causal,
        has_mask=False,
        has_dropout=m.dropout_p > 0,
        has_softcap=m.softcap > 0,
        has_window=m.has_window,
    )


def _modifiers(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    seed: Tensor | None,
    options: Options,
) -> Modifiers:
    return options.modifiers(
        seed,
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        max_q=max_q,
        max_k=max_k,
    )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    seed: Tensor | None = None,
    *,
    with_logsumexp: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The output (total_q, H, D_v) and, on request, its log-sum-exp (H, total_q) in fp32.

    Raises:
        UnsupportedProblemError: see `check`.
        DeviceError: tensors on a device that Triton cannot drive.
    """
    check(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, seed, **options)
    chosen = Options(**options)
    device = hardware.of(query.device)
    output = empty_output(query, value)
    logsumexp = empty_logsumexp(query) if with_logsumexp else None
    modifiers = _modifiers(cu_seqlens_q, cu_seqlens_k, max_q, max_k, seed, chosen)
    problem = _problem(query, key, value, modifiers, chosen.is_causal)
    config = select_flash_config(problem, device)
    if config.tma:
        config = without_tma(config, max(problem.block_d, problem.block_dv))
    if output.numel() + (0 if logsumexp is None else logsumexp.numel()) == 0:
        return output, logsumexp
    with hardware.guard(query):
        flash_attention(
            _heads_first(query), _heads_first(key), _heads_first(value), None,
            _heads_first(output), None if logsumexp is None else logsumexp.unsqueeze(0),
            is_causal=chosen.is_causal, scale=scale_of(query, chosen.scale),
            config=config, precision=precision_of(query), modifiers=modifiers,
        )  # fmt: skip
    return output, logsumexp


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    output: Tensor,
    logsumexp: Tensor,
    seed: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous, in their shapes and dtypes."""
    chosen = Options(**options)
    device = hardware.of(query.device)
    grads = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    modifiers = _modifiers(cu_seqlens_q, cu_seqlens_k, max_q, max_k, seed, chosen)
    problem = _problem(query, key, value, modifiers, chosen.is_causal)
    with hardware.guard(query):
        flash_attention_backward(
            _heads_first(grad_output),
            _heads_first(query), _heads_first(key), _heads_first(value), None,
            _heads_first(output), logsumexp.unsqueeze(0),
            _heads_first(grads[0]), _heads_first(grads[1]), _heads_first(grads[2]),
            is_causal=chosen.is_causal, scale=scale_of(query, chosen.scale),
            config=select_backward_config(problem, device),
            precision=precision_of(query), modifiers=modifiers,
        )  # fmt: skip
    return grads[0], grads[1], grads[2]
