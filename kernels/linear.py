"""Linear layers with what stands around them: chooses between kernels, and launches.

    x = rms_norm(a), layer_norm(a) or a
    out_i = epilogue(x @ weight_iᵀ + bias_i)
    gated: out = epilogue(activation(x @ weight_0ᵀ + bias_0) · (x @ weight_1ᵀ + bias_1))

One or two rows: everything in one launch, and so up to 64 on Hopper where that fills the GPU; up to
8 there by a kernel of their own. Else the norm, then a product a weight, or one kernel for two that
are alike or of which one gates the other, with the epilogue in the product's kernel.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.epilogue import NO_EPILOGUE, Epilogue
from triton_only_backend.kernels.gated_gemm import gated_gemm
from triton_only_backend.kernels.gemm_configs import GEMV_MAX_ROWS, SKINNY_MAX_ROWS, bucket
from triton_only_backend.kernels.gemm_tma import has_aligned_rows
from triton_only_backend.kernels.layer_norm import layer_norm
from triton_only_backend.kernels.limits import RING_MAX_ROWS
from triton_only_backend.kernels.linear_configs import (
    SkinnyConfig,
    select_gated,
    select_linear_gemv,
    select_pair,
    select_skinny,
)
from triton_only_backend.kernels.linear_gemv import linear_gemv
from triton_only_backend.kernels.matmul import epilogue_traits, is_aligned, matmul
from triton_only_backend.kernels.pair_gemm import is_pair, pair_gemm
from triton_only_backend.kernels.ring_configs import RingConfig, select_ring
from triton_only_backend.kernels.rms_norm import Norm, rms_norm
from triton_only_backend.kernels.sizes import next_power_of_2
from triton_only_backend.kernels.skinny_linear import skinny_linear

if TYPE_CHECKING:
    from collections.abc import Sequence

# Outputs of one launch.
MAX_OUTPUTS = 3


def linear(
    a: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    outs: Sequence[torch.Tensor],
    *,
    norm: Norm | None = None,
    gated: bool = False,
    epilogue: Epilogue = NO_EPILOGUE,
    weights_ready: bool = False,
) -> None:
    """Writes epilogue(norm(a) @ weightᵀ (+ bias)) to each of `outs`.

    Args:
        a: (M, K), fp16, bf16 or fp32, any strides.
        weights: (N_i, K), a's dtype, any strides.
        biases: (N_i,) each, or None.
        outs: (M, N_i) each, contiguous; gated, one.
        norm: normalises a's rows. Few rows keep it in fp32; more are rounded to a's dtype, in which
            the tensor cores take them.
        gated: of two weights, the activation of the first product times the second.
        epilogue: what follows; with operands only for one output.
        weights_ready: weights and norm may be read before the kernel launched last has finished.
    """
    M = a.shape[0]
    ring = _ring(a, weights, biases, norm, gated)
    if ring is not None:
        # Here, for a Triton whose Gluon has other names must not fail before it is asked for.
        from triton_only_backend.kernels.ring_linear import ring_linear

        with hardware.guard(a):
            ring_linear(
                a, weights, biases, outs,
                config=ring, norm=norm, gated=gated, epilogue=epilogue, early=weights_ready,
            )  # fmt: skip
        return
    if _streams(M, weights, biases, norm):
        _stream(a, weights, biases, outs, norm, gated, epilogue)
        return
    if norm is not None and norm.centered:
        a, norm = _normalised(a, norm), None
    skinny = _skinny(a, weights, biases, norm, gated)
    if skinny is not None:
        with hardware.guard(a):
            skinny_linear(
                a, weights, biases, outs, config=skinny, norm=norm, gated=gated, epilogue=epilogue
            )
        return
    if norm is not None:
        a = _normalised(a, norm)
    if gated:
        _gate(a, weights, biases, outs[0], epilogue, weights_ready)
        return
    alone = _pairs(a, weights, biases, outs, epilogue)
    for i in alone:
        bias = None if biases is None else biases[i]
        matmul(
            a[None], weights[i].T[None], bias, outs[i][None],
            epilogue=epilogue, b_ready=weights_ready,
        )  # fmt: skip


def _normalised(a: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The rows of a after the norm, in a kernel of its own."""
    out = torch.empty_like(a, memory_format=torch.contiguous_format)
    if a.shape[0] > 0:
        with hardware.guard(a):
            (layer_norm if norm.centered else rms_norm)(a, norm, out)
    return out


def _streams(
    M: int,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    norm: Norm | None,
) -> bool:
    """Whether `linear_gemv` takes the problem."""
    return (
        0 < M <= GEMV_MAX_ROWS
        and all(w.numel() > 0 for w in weights)
        and (_is_k_major(*weights) or _is_k_major(*(w.T for w in weights)))
        and _are_plain(biases, norm)
    )


def _are_plain(biases: Sequence[torch.Tensor] | None, norm: Norm | None) -> bool:
    """Whether the vectors are contiguous."""
    return all(t.stride(0) == 1 for t in (*(biases or ()), *(norm.tensors if norm else ())))


def _fit_one_launch(
    a: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    norm: Norm | None,
) -> bool:
    """Whether the tensor cores' kernels of few rows read these operands, all in one launch."""
    return (
        len(weights) <= MAX_OUTPUTS
        and all(w.numel() > 0 for w in weights)
        and _is_k_major(a, *weights)
        and _are_plain(biases, norm)
    )


def _skinny(
    a: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    norm: Norm | None,
    gated: bool,
) -> SkinnyConfig | None:
    """The configuration with which `skinny_linear` takes the problem, or None."""
    M = a.shape[0]
    if (
        GEMV_MAX_ROWS < M <= SKINNY_MAX_ROWS
        and (a.dtype == torch.bfloat16 or (a.dtype == torch.float16 and norm is None))
        and _fit_one_launch(a, weights, biases, norm)
    ):
        columns = sum(w.shape[0] for w in (weights[:1] if gated else weights))
        device = hardware.of(a.device)
        return select_skinny(
            next_power_of_2(M), columns, len(weights), gated, norm is not None, device
        )
    return None


def _ring(
    a: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    norm: Norm | None,
    gated: bool,
) -> RingConfig | None:
    """The configuration with which `ring_linear` takes the problem, or None."""
    if (
        0 < a.shape[0] <= RING_MAX_ROWS
        and a.element_size() == 2
        and not (norm is not None and norm.centered)
        and _fit_one_launch(a, weights, biases, norm)
    ):
        columns = tuple(w.shape[0] for w in (weights[:1] if gated else weights))
        device = hardware.of(a.device)
        return select_ring(
            next_power_of_2(a.shape[0]), columns, a.shape[1], gated, norm is not None, device
        )
    return None


def _is_k_major(*operands: torch.Tensor) -> bool:
    """Whether K is contiguous in each, and rows start at 16-byte boundaries."""
    return all(t.stride(1) == 1 and is_aligned(t[None]) for t in operands)


def _stream(
    a: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    outs: Sequence[torch.Tensor],
    norm: Norm | None,
    gated: bool,
    epilogue: Epilogue,
) -> None:
    device = hardware.of(a.device)
    k_major = _is_k_major(*weights)
    with hardware.guard(a):
        for first in range(0, len(outs), MAX_OUTPUTS):
            some = slice(first, first + MAX_OUTPUTS)
            columns = sum(out.shape[1] for out in outs[some])
            config = select_linear_gemv(
                columns, a.shape[1], a.element_size(), gated, device, k_major
            )
            linear_gemv(
                a, weights[some], None if biases is None else biases[some], outs[some],
                config=config, norm=norm, gated=gated, epilogue=epilogue,
            )  # fmt: skip


def _tiles(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None
) -> bool:
    """Whether the kernels that compute two layers in one tile read these operands."""
    return (
        x.element_size() == 2
        and x.shape[1] > 0
        and _is_k_major(x, *weights)
        and _are_plain(biases, None)
    )


def _pair(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    outs: Sequence[torch.Tensor],
    epilogue: Epilogue,
) -> bool:
    """Computes two layers, or one that gates the other, by `pair_gemm` where that is best."""
    first, second = weights
    if outs[0].numel() == 0 or not _tiles(x, weights, biases) or not is_pair(first, second):
        return False
    device = hardware.of(x.device)
    gated = len(outs) == 1
    traits = epilogue_traits(outs[0], None, epilogue)
    # Two outputs through pointers spill 200 bytes on sm90.
    if not gated and not all(has_aligned_rows(out) for out in outs):
        return False
    M, N, K = bucket(x.shape[0]), bucket(first.shape[0]), x.shape[1]
    config = select_pair(M, N, K, traits, device)
    if config is None:
        return False
    with hardware.guard(x):
        pair_gemm(
            x, weights, biases, outs,
            config=config, num_sms=device.num_sms, gated=gated, epilogue=epilogue,
        )  # fmt: skip
    return True


def _pairs(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    outs: Sequence[torch.Tensor],
    epilogue: Epilogue,
) -> list[int]:
    """Computes the layers that pair; returns the numbers of those that are left."""
    left = list(range(len(weights)))
    for i, j in itertools.combinations(range(len(weights)), 2):
        if i in left and j in left:
            both = [weights[i], weights[j]]
            theirs = None if biases is None else [biases[i], biases[j]]
            if _pair(x, both, theirs, [outs[i], outs[j]], epilogue):
                left = [k for k in left if k not in (i, j)]
    return left


def _gate(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    out: torch.Tensor,
    epilogue: Epilogue,
    weights_ready: bool,
) -> None:
    if out.numel() == 0 or _pair(x, weights, biases, [out], epilogue):
        return
    config = None
    if _tiles(x, weights, biases):
        config = select_gated(bucket(x.shape[0]), *weights[0].shape, hardware.of(x.device))
    if config is not None:
        with hardware.guard(x):
            gated_gemm(x, weights, biases, out, config=config, epilogue=epilogue)
        return
    # Two products: the second takes what the first made, rounded as by PyTorch, for multiplier.
    gate_bias, up_bias = biases or (None, None)
    gate = torch.empty_like(out)
    before = replace(epilogue, residual=None)
    matmul(
        x[None], weights[0].T[None], gate_bias, gate[None],
        epilogue=before, b_ready=weights_ready,
    )  # fmt: skip
    after = Epilogue(multiplier=gate, residual=epilogue.residual)
    matmul(
        x[None], weights[1].T[None], up_bias, out[None],
        epilogue=after, b_ready=weights_ready,
    )  # fmt: skip
