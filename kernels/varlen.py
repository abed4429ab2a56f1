"""Attention of sequences of different lengths, packed one after the other: no padding anywhere.

Query (total_q, H, D), key (total_k, H_kv, D) and value (total_k, H_kv, D_v) hold the sequences'
rows; sequence s has the rows cu_seqlens[s] to cu_seqlens[s + 1] - 1. The kernels are those of
`sdpa`: a program finds where its sequence begins and ends, and nothing is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.attention_arguments import (
    Options,
    check_options,
    check_tensors,
    refuse,
)
from triton_only_backend.kernels.attention_backward_configs import select_backward_config
from triton_only_backend.kernels.attention_configs import (
    AttentionProblem,
    select_flash_config,
    without_tma,
)
from triton_only_backend.kernels.flash_attention import flash_attention
from triton_only_backend.kernels.flash_attention_backward import flash_attention_backward
from triton_only_backend.kernels.matmul import precision_of

if TYPE_CHECKING:
    from triton_only_backend.kernels.attention_modifiers import Modifiers

Tensor = torch.Tensor
OP = "attention_varlen"


class Packed(NamedTuple):
    """The arguments of `attention_varlen` but for its options; see `docs/attention.md`."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int
    seed: Tensor | None = None

    def modifiers(self, options: Options) -> Modifiers:
        """What the kernels take beside the tensors."""
        return options.modifiers(
            self.seed,
            cu_seqlens_q=self.cu_seqlens_q.contiguous(),
            cu_seqlens_k=self.cu_seqlens_k.contiguous(),
            max_q=self.max_q,
            max_k=self.max_k,
        )

    def problem(self, options: Options) -> AttentionProblem:
        """Its sizes, by the longest sequences."""
        return AttentionProblem(
            batch=self.cu_seqlens_q.numel() - 1,
            num_heads=self.query.shape[1],
            num_kv_heads=self.key.shape[1],
            len_q=self.max_q,
            len_kv=self.max_k,
            head_dim=self.query.shape[2],
            head_dim_v=self.value.shape[2],
            element_size=self.query.element_size(),
            is_causal=options.is_causal,
            has_mask=False,
            has_dropout=options.dropout_p > 0,
            has_softcap=options.softcap > 0,
            has_window=max(options.window_left, options.window_right) >= 0,
        )


def check(x: Packed, options: Options) -> None:
    """Refuses what the kernels do not cover; the lengths' values, on the device, are not read.

    Raises:
        UnsupportedProblemError: naming the argument, the dtypes and shapes, and a remedy.
    """
    tensors = query, key, value = x.query, x.key, x.value
    if not query.dim() == key.dim() == value.dim() == 3:
        what = "query, key and value must be (total length, heads, head_dim)"
        raise refuse(what, "pack the sequences one after the other", *tensors, op=OP)
    check_tensors(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
    check_options(x.seed, options, *tensors, op=OP)
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if num_kv_heads != value.shape[1] or num_kv_heads == 0 or num_heads % num_kv_heads:
        what = f"{num_heads} query heads cannot share {num_kv_heads} and {value.shape[1]} evenly"
        raise refuse(
            what, "key and value need as many heads, a divisor of query's", *tensors, op=OP
        )
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        lengths = getattr(x, name)
        integral = lengths.dtype in (torch.int32, torch.int64)
        if not integral or lengths.dim() != 1 or lengths.device != query.device:
            what = f"{name} is {lengths.dtype}{list(lengths.shape)} on {lengths.device}"
            remedy = f"pass (sequences + 1,) int32 or int64 on {query.device}"
            raise refuse(what, remedy, *tensors, op=OP)
    torch._check(
        x.cu_seqlens_q.shape[0] == x.cu_seqlens_k.shape[0],
        lambda: (
            "triton_only.attention_varlen: cu_seqlens_q and cu_seqlens_k must name as many "
            f"sequences, got {list(x.cu_seqlens_q.shape)} and {list(x.cu_seqlens_k.shape)}"
        ),
    )


def empty_output(x: Packed) -> Tensor:
    """(total_q, H, D_v)."""
    return x.query.new_empty((x.query.shape[0], x.query.shape[1], x.value.shape[2]))


def empty_logsumexp(x: Packed) -> Tensor:
    """(H, total_q), fp32."""
    return x.query.new_empty((x.query.shape[1], x.query.shape[0]), dtype=torch.float32)


def _heads_first(packed: Tensor) -> Tensor:
    """(total, H, D) as (1, H, total, D)."""
    return packed.transpose(0, 1).unsqueeze(0)


def forward(x: Packed, options: Options, *, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
    """The output (total_q, H, D_v) and, on request, its log-sum-exp (H, total_q) in fp32.

    Raises:
        UnsupportedProblemError: see `check`.
        DeviceError: tensors on a device that Triton cannot drive.
    """
    check(x, options)
    device = hardware.of(x.query.device)
    output = empty_output(x)
    logsumexp = empty_logsumexp(x) if with_logsumexp else None
    problem = x.problem(options)
    config = select_flash_config(problem, device)
    if config.tma:
        config = without_tma(config, max(problem.block_d, problem.block_dv))
    if output.numel() + (0 if logsumexp is None else logsumexp.numel()) == 0:
        return output, logsumexp
    with hardware.guard(x.query):
        flash_attention(
            _heads_first(x.query), _heads_first(x.key), _heads_first(x.value), None,
            _heads_first(output), None if logsumexp is None else logsumexp.unsqueeze(0),
            is_causal=options.is_causal, scale=options.scale_of(x.query),
            config=config, precision=precision_of(x.query), modifiers=x.modifiers(options),
        )  # fmt: skip
    return output, logsumexp


def backward(
    grad_output: Tensor, x: Packed, output: Tensor, logsumexp: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous, in their shapes and dtypes."""
    device = hardware.of(x.query.device)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in x[:3])
    with hardware.guard(x.query):
        flash_attention_backward(
            _heads_first(grad_output),
            _heads_first(x.query), _heads_first(x.key), _heads_first(x.value), None,
            _heads_first(output), logsumexp.unsqueeze(0),
            _heads_first(dq), _heads_first(dk), _heads_first(dv),
            is_causal=options.is_causal, scale=options.scale_of(x.query),
            config=select_backward_config(x.problem(options), device),
            precision=precision_of(x.query), modifiers=x.modifiers(options),
        )  # fmt: skip
    return dq, dk, dv
