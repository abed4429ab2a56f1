"""The one way from attention's tensors to a kernel: check, view as 4-D, choose, launch.

Semantics are those of `torch.nn.functional.scaled_dot_product_attention` (its mathematical
reference): `is_causal` is aligned to the top left also where L_q ≠ L_kv, and a row that sees no key
gives zeros.
"""

from __future__ import annotations

from typing import Any

import torch

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.attention_arguments import (
    Inputs,
    Operands,
    Options,
    check,
    empty_logsumexp,
    empty_output,
    operands,
    refuse,
    to_4d,
    view_spans,
)
from triton_only_backend.kernels.attention_backward_configs import select_backward_config
from triton_only_backend.kernels.attention_configs import (
    AttentionProblem,
    select_flash_config,
    uses_decode_kernel,
)
from triton_only_backend.kernels.decode_attention import decode_attention
from triton_only_backend.kernels.decode_configs import select_decode_config
from triton_only_backend.kernels.flash_attention import flash_attention
from triton_only_backend.kernels.flash_attention_backward import flash_attention_backward
from triton_only_backend.kernels.hopper_attention_configs import (
    HopperFlashConfig,
    select_hopper_flash,
    takes,
)
from triton_only_backend.kernels.hopper_backward_configs import select_hopper_backward
from triton_only_backend.kernels.hopper_backward_configs import takes as takes_backward
from triton_only_backend.kernels.matmul import precision_of

Tensor = torch.Tensor


def _problem(x: Operands, options: Options) -> AttentionProblem:
    batch, num_heads, len_q, head_dim = x.query.shape
    return AttentionProblem(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=x.key.shape[1],
        len_q=len_q,
        len_kv=x.key.shape[2],
        head_dim=head_dim,
        head_dim_v=x.value.shape[3],
        element_size=x.query.element_size(),
        is_causal=options.is_causal,
        has_mask=x.mask is not None,
        has_dropout=options.dropout_p > 0,
        has_softcap=options.softcap > 0,
        has_window=max(options.window_left, options.window_right) >= 0,
    )


def _hopper_config(
    x: Operands, options: Options, problem: AttentionProblem, device: hardware.Hardware
) -> HopperFlashConfig | None:
    """The configuration with which `flash_attention_hopper` runs this, or None."""
    if device.has_gluon and takes(x, options):
        return select_hopper_flash(problem, device)
    return None


def decodes(query: Tensor, key: Tensor, value: Tensor, options: Options) -> bool:
    """Whether the decoding kernel runs this attention, which scans a mask by itself."""
    x = operands(Inputs(query, key, value), options.enable_gqa)
    return uses_decode_kernel(_problem(x, options))


def forward(
    inputs: Inputs, options: Options, *, with_logsumexp: bool, spans: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention's output (*lead, L_q, D_v) and, on request, its log-sum-exp (*lead, L_q) in fp32.

    `spans` are those of the mask (see `view_spans`), where something has scanned it already.

    Raises:
        UnsupportedProblemError: see `check`.
        DeviceError: tensors on a device that Triton cannot drive.
    """
    check(inputs, options)
    query = inputs.query
    device = hardware.of(query.device)
    x = operands(inputs, options.enable_gqa)
    if spans is not None:
        spans = view_spans(spans, inputs.attn_mask, x)
    output = empty_output(query, x.lead, x.value.shape[-1], options.contiguous)
    logsumexp = empty_logsumexp(query, x.lead) if with_logsumexp else None
    if output.numel() == 0 and (logsumexp is None or logsumexp.numel() == 0):
        return output, logsumexp
    out = _view_output(output)
    lse = None if logsumexp is None else logsumexp.view(x.query.shape[:3])
    problem = _problem(x, options)
    tensors = (x.query, x.key, x.value, x.mask, out, lse)
    arguments: dict[str, Any] = {
        "is_causal": options.is_causal,
        "scale": options.scale_of(query),
        "precision": precision_of(query),
        "modifiers": options.modifiers(inputs.seed),
    }
    with hardware.guard(query):
        if uses_decode_kernel(problem):
            decode_attention(*tensors, config=select_decode_config(problem, device), **arguments)
        elif (hopper := _hopper_config(x, options, problem, device)) is not None:
            # Here, for a Triton whose Gluon has other names must not fail before it is asked for.
            from triton_only_backend.kernels.flash_attention_hopper import flash_attention_hopper

            flash_attention_hopper(
                *tensors, is_causal=options.is_causal, scale=options.scale_of(query),
                config=hopper, num_sms=device.num_sms, spans=spans,
            )  # fmt: skip
        else:
            config = select_flash_config(problem, device)
            flash_attention(*tensors, config=config, **arguments, spans=spans)
    return output, logsumexp


def _view_output(output: Tensor) -> Tensor:
    """The output as (B, H, L_q, D_v); its layout always allows the view."""
    if output.dim() <= 4:
        return output[(None,) * (4 - output.dim())]
    return output.transpose(-3, -2).flatten(0, -4).transpose(-3, -2)


def backward(
    grad_output: Tensor, inputs: Inputs, output: Tensor, logsumexp: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their shapes and dtypes.

    Raises:
        UnsupportedProblemError: operands that the forward broadcasts; see `expand_operands`.
    """
    given = inputs[:3]
    query = inputs.query
    device = hardware.of(query.device)
    x = operands(inputs, options.enable_gqa)
    if any(t.numel() != view.numel() for t, view in zip(given, x[:3], strict=True)):
        remedy = "expand them and repeat their heads, as triton_only.attention does"
        raise refuse("no gradient of operands that are broadcast", remedy, *given)
    grads = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in x[:3])
    grad_out, out = to_4d(grad_output, x.lead), to_4d(output, x.lead)
    lse = logsumexp.reshape(x.query.shape[:3])
    problem = _problem(x, options)
    hopper = None
    if device.has_gluon and takes_backward(x, grad_out, options):
        hopper = select_hopper_backward(problem, device)
    with hardware.guard(query):
        if hopper is not None:
            # Here, as in `forward`.
            from triton_only_backend.kernels.flash_attention_backward_hopper import (
                flash_attention_backward_hopper,
            )

            flash_attention_backward_hopper(
                grad_out, *x[:3], out, lse, *grads, is_causal=options.is_causal,
                scale=options.scale_of(query), config=hopper,
            )  # fmt: skip
        else:
            flash_attention_backward(
                grad_out, *x[:4], out, lse, *grads,
                is_causal=options.is_causal, scale=options.scale_of(query),
                config=select_backward_config(problem, device),
                precision=precision_of(query), modifiers=options.modifiers(inputs.seed),
            )  # fmt: skip
    dq, dk, dv = (grad.view(t.shape) for grad, t in zip(grads, given, strict=True))
    return dq, dk, dv
