"""Launches every kernel once or more on small odd problems, for NVIDIA's compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/sanitize.py
    compute-sanitizer --tool racecheck python tests/sanitize.py
    python tests/sanitize.py --only gemm          problems whose name holds a word

Says which kernels of kernels/ ran, how often, and fails if one of them did not. PyTorch's allocator
is off, so that a read past the end of a tensor is one past the end of an allocation. Without a GPU
it runs in the interpreter, which finds out whether all kernels are reached.
"""

from __future__ import annotations

import argparse
import ast
import collections
import itertools
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

import triton_only_backend.kernels
from triton_only_backend import interpreter
from triton_only_backend.kernels import hardware

if TYPE_CHECKING:
    from collections.abc import Callable

KERNELS = Path(triton_only_backend.kernels.__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TMA = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] >= 9
HAS_GLUON = DEVICE == "cuda" and hardware.of(torch.device("cuda", 0)).has_gluon
HALF, FULL = torch.bfloat16, torch.float32
ours = torch.ops.triton_only

launched: collections.Counter[str] = collections.Counter()
PROBLEMS: dict[str, Callable[[], None]] = {}


def problem(function: Callable[[], None]) -> Callable[[], None]:
    """Adds a problem to the list, by its name."""
    PROBLEMS[function.__name__] = function
    return function


def entry_kernels() -> dict[str, str]:
    """The names of all kernels that a host function launches, each with the file that defines it."""
    # Under @triton.jit or, for this GPU, Gluon's.
    decorators = ("triton.jit", "gluon.jit") if HAS_GLUON else ("triton.jit",)
    defined: dict[str, str] = {}
    launches: set[str] = set()
    for path in sorted(KERNELS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                if any(ast.unparse(d).startswith(decorators) for d in node.decorator_list):
                    defined[node.name] = path.name
            # kernel[grid](…)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = node.func.value
                if isinstance(name, ast.Name):
                    launches.add(name.id)
    return {name: file for name, file in defined.items() if name in launches}


def count_launches() -> None:
    """Counts each launch by its kernel's name, compiled and interpreted."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    run, interpret = JITFunction.run, GridExecutor.__call__

    def counted_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched[self.fn.__name__] += not kwargs.get("warmup", False)
        return run(self, *args, **kwargs)

    def counted_interpret(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched[self.fn.__name__] += 1
        return interpret(self, *args, **kwargs)

    JITFunction.run = counted_run
    GridExecutor.__call__ = counted_interpret


def randn(*shape: int, dtype: torch.dtype = HALF, **options: Any) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, **options).to(dtype)


def leaf(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return randn(*shape, dtype=dtype).requires_grad_()


# products


@problem
def gemm() -> None:
    """Tiles, split K, exchanged operands, any strides, in both directions of the loop over K."""
    from triton_only_backend.kernels.gemm import gemm
    from triton_only_backend.kernels.gemm_configs import GemmConfig

    for dtype, split_k, swap in itertools.product((HALF, FULL), (1, 3), (False, True)):
        M, N, K = 37, 45, 101
        a, b = randn(2, M, K, dtype=dtype), randn(2, N, K, dtype=dtype).mT
        bias, out = randn(N, dtype=dtype).expand(2, M, N), randn(2, M, N, dtype=dtype)
        config = GemmConfig("gemm", 32, 32, 32, split_k, 4, 4, 3, swap_operands=swap)
        gemm(a, b, bias, out, alpha=0.5, beta=2.0, config=config, precision="ieee")
        gemm(a[:, ::2], b, None, out[:, ::2], alpha=1.0, beta=0.0, config=config, precision="ieee")


@problem
def gemm_tma() -> None:
    """Both layouts of both operands, stored by descriptors and by pointers."""
    from triton_only_backend.kernels.gemm_configs import GemmConfig
    from triton_only_backend.kernels.gemm_tma import gemm_tma

    if not HAS_TMA:
        return
    M, N, K = 72, 104, 136
    for split_k, halves, transposed in ((1, False, False), (3, False, True), (1, True, False)):
        a = randn(K, M).T if transposed else randn(M, K)
        b = randn(K, N) if transposed else randn(N, K).T
        config = GemmConfig(
            "gemm_tma", 64, 64, 64, split_k, 8, 4, 3, swap_operands=transposed, store_halves=halves
        )
        for bias in (None, randn(N).expand(M, N)):
            out = randn(M, N)
            gemm_tma(a, b, bias, out, alpha=0.5, beta=2.0, config=config, num_sms=5)


@problem
def gemm_hopper() -> None:
    """Each tile, whole and divided, both layouts, with and without an epilogue, one and batched."""
    from triton_only_backend.kernels import hardware
    from triton_only_backend.kernels.epilogue import NO_EPILOGUE, Epilogue
    from triton_only_backend.kernels.gemm_configs import (
        HOPPER_TILES,
        MOST_HALVED_SUMS,
        GemmConfig,
    )

    if not HAS_GLUON:
        return
    from triton_only_backend.kernels.gemm_hopper import gemm_hopper

    M, N, K = 272, 520, 1032
    device = hardware.of(torch.device(DEVICE))
    ways = ((1, False), (1, True), (2, False))
    for (tile, stages), (split_k, stream_k) in itertools.product(HOPPER_TILES.items(), ways):
        if split_k == 2 and tile[0] * tile[1] > MOST_HALVED_SUMS:
            continue
        config = GemmConfig("gemm_hopper", *tile, 64, split_k, 16, 8, stages, stream_k=stream_k)
        out, bias = randn(M, N), randn(N).expand(M, N)
        how = {"alpha": 0.5, "beta": 2.0, "config": config, "device": device}
        epilogue = Epilogue("silu", None, 1.0, randn(M, N))
        gemm_hopper(
            randn(1, M, K), randn(1, N, K).mT, bias[None], out[None], epilogue=epilogue, **how
        )
        how["epilogue"] = NO_EPILOGUE
        gemm_hopper(randn(1, K, M).mT, randn(1, K, N), None, out[None], **how)
        out = randn(3, M, N)
        gemm_hopper(randn(3, M, K), randn(3, N, K).mT, bias.expand(3, M, N), out, **how)
        how["config"] = replace(config, split_k=1, alternate=True)
        gemm_hopper(randn(3, M, 128), randn(3, 128, N), None, out, **how)


@problem
def realign() -> None:
    """One operand and two, of either layout and of none, in batches."""
    from triton_only_backend.kernels.realign import realign

    for x in (randn(1, 37, 495), randn(3, 21, 70).mT, randn(2, 9, 100)[:, ::2, 1::3]):
        realign([x])
        realign([randn(2, 130, 513), x])


@problem
def gemv() -> None:
    """One and two rows, K split and whole, K contiguous or not."""
    from triton_only_backend.kernels.gemm_configs import GemmConfig
    from triton_only_backend.kernels.gemv import gemv

    for rows, split_k, k_major in itertools.product((1, 2), (1, 3), (False, True)):
        N, K = 45, 301
        a = randn(2, rows, K)
        b = randn(2, N, K).mT if k_major else randn(2, K, N)
        config = GemmConfig("gemv", 1, 16, 64, split_k, 1, 4, 3)
        gemv(
            a, b, randn(N).expand(2, rows, N), randn(2, rows, N), alpha=0.5, beta=2.0, config=config
        )


@problem
def products_as_they_are_chosen() -> None:
    """Through the ops, with gradients: what the selection takes on this GPU."""
    for dtype in (HALF, FULL):
        for M, N, K in ((1, 72, 136), (7, 136, 72), (131, 65, 77)):
            a, b, bias = leaf(M, K, dtype=dtype), leaf(N, K, dtype=dtype), leaf(N, dtype=dtype)
            (ours.mm(a, b.T).sum() + ours.addmm(bias, a, b.T, beta=0.5).sum()).backward()
            c, d = leaf(3, M, K, dtype=dtype), leaf(3, K, N, dtype=dtype)
            (ours.bmm(c, d).sum() + ours.baddbmm(bias, c, d, alpha=2.0).sum()).backward()
    ours.mm(randn(136, 4096), randn(4096, 72), out_dtype=FULL)
    ours.mm(randn(0, 8), randn(8, 3))


@problem
def linear() -> None:
    """Several weights, gated, normalised, with each epilogue, for each number of rows."""
    for rows, K in ((1, 136), (2, 264), (7, 136), (33, 264), (70, 136), (131, 264)):
        x, N = randn(rows, K), 72
        weights = [randn(N, K) for _ in range(3)]
        biases = [randn(N) for _ in range(3)]
        ours.linear_many(x, weights, biases)
        options = {"norm_weight": randn(K), "norm_eps": 1e-5}
        ours.linear_fused(x, weights, biases, **options)
        layer_norm = {**options, "norm_centered": True, "norm_bias": randn(K)}
        for stored in (weights, [randn(K, N).T for _ in range(3)]):
            ours.linear_fused(x, stored, biases, **layer_norm)
            ours.linear_fused(x, stored[:2], [], norm_centered=True, gated=True)
        for activation in ("none", "silu"):
            ours.linear_fused(
                x, weights[:2], biases[:2], activation=activation, gated=True,
                residual=randn(rows, N), **options,
            )  # fmt: skip


@problem
def linear_gemv() -> None:
    from triton_only_backend.kernels.linear_configs import GemvConfig
    from triton_only_backend.kernels.linear_gemv import linear_gemv
    from triton_only_backend.kernels.rms_norm import Norm

    flags = (False, True)
    for rows, gated, k_major, centered in itertools.product((1, 2), flags, flags, flags):
        K = 264
        columns = (45, 45) if gated else (45, 7, 72)
        weights = [randn(n, K) if k_major else randn(K, n).T for n in columns]
        outs = [randn(rows, w.shape[0]) for w in (weights[:1] if gated else weights)]
        biases = [randn(w.shape[0]) for w in weights]
        linear_gemv(
            randn(rows, K), weights, biases, outs,
            config=GemvConfig(8 if k_major else 32, 128, 4, 3, k_major),
            norm=Norm(randn(K), 1e-5, 0.0, centered, randn(K) if centered else None), gated=gated,
        )  # fmt: skip


@problem
def ring_linear() -> None:
    from triton_only_backend.kernels.epilogue import Epilogue
    from triton_only_backend.kernels.ring_configs import RingConfig
    from triton_only_backend.kernels.rms_norm import Norm

    if not HAS_GLUON:
        return
    from triton_only_backend.kernels.ring_linear import ring_linear

    for rows, tile, gated, normed in itertools.product((1, 2, 7), (16, 32), (False, True), (0, 1)):
        K, columns = 2048, (45, 45) if gated else (45, 7, 72)
        weights = [randn(n, K) for n in columns]
        outs = [randn(rows, n) for n in (columns[:1] if gated else columns)]
        epilogue = Epilogue("silu", residual=randn(rows, 45)) if gated else Epilogue()
        ring_linear(
            randn(rows, K), weights, [randn(n) for n in columns], outs,
            config=RingConfig(tile, 3), norm=Norm(randn(K), 1e-5, 0.0) if normed else None,
            gated=gated, epilogue=epilogue, early=bool(normed),
        )  # fmt: skip


@problem
def divided_ring() -> None:
    """Tiles that several programs share: of each height that is divided, both layouts."""
    from triton_only_backend.kernels.epilogue import Epilogue
    from triton_only_backend.kernels.ring_configs import RingConfig

    if not HAS_GLUON:
        return
    from triton_only_backend.kernels.ring_linear import ring_linear

    K, N = 1536, 328
    for (rows, tile), split_k in itertools.product(((3, 32), (5, 64), (40, 64), (40, 128)), (1, 3)):
        for weight in (randn(N, K), randn(K, N).T)[: 1 + (tile >= 64)]:
            ring_linear(
                randn(rows, K), [weight], [randn(N)], [randn(rows, N)],
                config=RingConfig(tile, 3, 1, split_k), early=tile == 64,
                epilogue=Epilogue("silu", residual=randn(rows, N)),
            )  # fmt: skip


@problem
def skinny_linear() -> None:
    from triton_only_backend.kernels.linear_configs import SkinnyConfig
    from triton_only_backend.kernels.rms_norm import Norm
    from triton_only_backend.kernels.skinny_linear import skinny_linear

    if not HAS_TMA:
        return
    for gated in (False, True):
        K = 264
        weights = [randn(n, K) for n in ((72, 72) if gated else (72, 40, 136))]
        outs = [randn(7, w.shape[0]) for w in (weights[:1] if gated else weights)]
        skinny_linear(
            randn(7, K), weights, [randn(w.shape[0]) for w in weights], outs,
            config=SkinnyConfig(16, 64, 64, 4, 3), norm=Norm(randn(K), 1e-5, 0.0), gated=gated,
        )  # fmt: skip


@problem
def gated_gemm() -> None:
    from triton_only_backend.kernels.epilogue import Epilogue
    from triton_only_backend.kernels.gated_gemm import gated_gemm
    from triton_only_backend.kernels.linear_configs import GatedConfig

    for tma, swap in ((False, False), (False, True), (True, True))[: 2 + HAS_TMA]:
        M, N, K = 37, 72, 136
        config = GatedConfig(tma, 64, 32, 64, 4, 4, 3, swap=swap)
        epilogue = Epilogue("silu", residual=randn(M, N))
        gated_gemm(
            randn(M, K), [randn(N, K), randn(N, K)], [randn(N), randn(N)], randn(M, N),
            config=config, epilogue=epilogue,
        )  # fmt: skip


@problem
def pair_gemm() -> None:
    from triton_only_backend.kernels.epilogue import Epilogue
    from triton_only_backend.kernels.linear_configs import PairConfig
    from triton_only_backend.kernels.pair_gemm import pair_gemm

    M, K = 70, 136
    for N, gated in itertools.product((72, 33), (True, False)) if HAS_TMA else ():
        weights, outs = randn(3 * N, K), [randn(M, N), randn(M, N)][: 2 - gated]
        pair_gemm(
            randn(M, K), [weights[2 * N :], weights[:N]], [randn(N), randn(N)], outs,
            config=PairConfig(64, 32, 64, 4, 4, 3), num_sms=2, gated=gated,
            epilogue=Epilogue("silu", residual=randn(M, N) if gated else None),
        )  # fmt: skip


@problem
def rms_norm() -> None:
    from triton_only_backend.kernels.rms_norm import Norm, rms_norm

    for K in (7, 1001, 9001):
        rms_norm(randn(5, K), Norm(randn(K), 1e-5, 1.0), randn(5, K))


@problem
def layer_norm() -> None:
    from triton_only_backend.kernels.layer_norm import layer_norm
    from triton_only_backend.kernels.rms_norm import Norm

    for K in (7, 1001, 9001):
        for norm in (Norm(randn(K), 1e-5, 0.0, True, randn(K)), Norm(None, 1e-5, 0.0, True)):
            layer_norm(randn(5, K), norm, randn(5, K))


# attention


@problem
def attention() -> None:
    """Forward and backward: causal, masked, grouped heads, two head dimensions, each dtype."""
    cases: tuple[tuple[torch.dtype, int, int, dict[str, Any]], ...] = (
        (HALF, 8, 8, {}),
        (HALF, 40, 72, {"is_causal": True}),
        (HALF, 128, 128, {"is_causal": True}),
        (HALF, 64, 64, {"softcap": 5.0, "window_left": 9, "window_right": 3}),
        (torch.float16, 40, 40, {"is_causal": True}),
        (FULL, 40, 72, {"is_causal": True}),
    )
    for dtype, dim, dim_v, options in cases:
        q, k = leaf(2, 4, 131, dim, dtype=dtype), leaf(2, 2, 77, dim, dtype=dtype)
        v = leaf(2, 2, 77, dim_v, dtype=dtype)
        ours.attention(q, k, v, enable_gqa=True, **options).sum().backward()
    q, k = leaf(1, 2, 133, 24), leaf(1, 2, 70, 24)
    for mask in (torch.rand(133, 70, device=DEVICE) > 0.3, randn(1, 1, 1, 70)):
        ours.attention(q, k, k, mask).sum().backward()
    seed = ours.random_seeds(1, device=q.device)
    ours.attention(q, k, k, None, seed, dropout_p=0.3).sum().backward()


@problem
def attention_on_hopper() -> None:
    """Each configuration: causal and full, masks by bytes and by rows, every kind of store."""
    from triton_only_backend.kernels.hopper_attention_configs import (
        MASKED,
        THREE_GROUPS,
        TWO_GROUPS,
    )

    if not HAS_GLUON:
        return
    from triton_only_backend.kernels.flash_attention_hopper import flash_attention_hopper

    shapes = ((333, 201), (130, 256))
    for (len_q, len_kv), dim, form in itertools.product(shapes, (64, 128), ("", "causal", "mask")):
        q, k, v = randn(2, 4, len_q, dim), randn(2, 2, len_kv, dim), randn(2, 2, len_kv, dim)
        mask = None
        if form == "mask":
            mask = torch.rand(len_q, len_kv, device=DEVICE) > 0.3
            mask = mask.tril(100).expand(2, 4, len_q, len_kv)
        chosen = [(TWO_GROUPS if mask is None else MASKED)[dim]]
        if dim == 64 and mask is None:
            chosen.append(THREE_GROUPS)
        for config, width in itertools.product(chosen, (dim, dim + 3)):
            flash_attention_hopper(
                q, k, v, mask, randn(2, 4, len_q, width)[..., :dim], randn(2, 4, len_q, dtype=FULL),
                is_causal=form == "causal", scale=0.1, config=config, num_sms=5,
            )  # fmt: skip


@problem
def attention_backward_on_hopper() -> None:
    """Causal and full, whole and split, one tile of keys and several, ends that are not whole."""
    from triton_only_backend.kernels.hopper_backward_configs import HopperBackwardConfig

    if not HAS_GLUON:
        return
    from triton_only_backend.kernels.flash_attention_backward_hopper import (
        flash_attention_backward_hopper,
    )

    shapes = ((333, 201), (70, 300), (130, 128))
    for (len_q, len_kv), dim, is_causal, splits in itertools.product(
        shapes, (64, 128), (False, True), (1, 2)
    ):
        q, k, v = randn(2, 4, len_q, dim), randn(2, 2, len_kv, dim), randn(2, 2, len_kv, dim)
        flash_attention_backward_hopper(
            randn(2, len_q, 4, dim).transpose(1, 2), q, k, v, randn(2, 4, len_q, dim),
            randn(2, 4, len_q, dtype=FULL).abs() + 5, torch.empty_like(q), torch.empty_like(k),
            torch.empty_like(v), is_causal=is_causal, scale=0.1,
            config=HopperBackwardConfig(splits, 3),
        )  # fmt: skip


@problem
def attention_backward_ends() -> None:
    """What goes before and after the kernel above, which runs elsewhere too."""
    from triton_only_backend.kernels import hopper_backward_ends as ends

    len_q, length, tiles = 70, 100, 2
    for dim in (64, 128):
        out, grad_out = randn(2, 3, len_q, dim), randn(2, len_q, 3, dim).transpose(1, 2)
        lse = randn(2, 3, len_q, dtype=FULL)
        statistics = randn(2 * 3, 2, 2, 64, dtype=FULL)
        turns = torch.ones(2, 3, 2, dtype=torch.int32, device=DEVICE)
        ends.tile_statistics_kernel[(2 * 3 * 2,)](
            out, grad_out, lse, statistics, turns, *out.stride(), *grad_out.stride(), *lse.stride(),
            2, 3, len_q, BLOCK_M=64, BLOCK_D=dim, num_warps=4,
        )  # fmt: skip
        sums = randn(2, 2 * 3, 2, tiles, 64 * dim, dtype=FULL)
        dk, dv = randn(2, 3, length, dim), randn(2, length, 3, dim).transpose(1, 2)
        ends.add_splits_kernel[(2 * 3 * tiles, 2)](
            sums[0], sums[1], dk, dv, *dk.stride(), *dv.stride(), 0.5, tiles, 3, length, 2, ROWS=64,
            BLOCK_D=dim, num_warps=4,
        )  # fmt: skip


@problem
def decode() -> None:
    """Few queries: keys whole and split, whatever the number of heads in a group."""
    for length, group, queries in ((7, 1, 1), (501, 4, 1), (4099, 8, 3), (1003, 3, 2)):
        for dtype in (HALF, FULL):
            q = randn(1, 2 * group, queries, 64, dtype=dtype)
            k, v = (randn(1, 2, length, 64, dtype=dtype) for _ in range(2))
            mask = torch.rand(1, 1, queries, length, device=DEVICE) > 0.2
            for options in ({}, {"is_causal": True}):
                ours.attention_forward(q, k, v, enable_gqa=True, **options)
            ours.attention(q, k, v, mask, enable_gqa=True)


@problem
def decode_split() -> None:
    """The keys of one head over several programs, whatever the GPU would choose."""
    import dataclasses

    from triton_only_backend.kernels import sdpa

    select = sdpa.select_decode_config

    splits = 0

    def split(*args: Any, **kwargs: Any) -> Any:
        chosen = select(*args, **kwargs)
        return dataclasses.replace(chosen, num_splits=splits, block_n=32)

    sdpa.select_decode_config = split
    try:
        # The last split to arrive combines a few partial results; many take a launch of their own.
        for queries, group, length, splits in ((1, 2, 331, 5), (3, 4, 331, 5), (16, 4, 1331, 40)):  # noqa: B007
            q, k = randn(2, 2 * group, queries, 64), randn(2, 2, length, 64)
            ours.attention_forward(q, k, k, enable_gqa=True)
    finally:
        sdpa.select_decode_config = select


@problem
def packed_sequences() -> None:
    lengths = torch.tensor([0, 5, 5, 70, 133], dtype=torch.int32, device=DEVICE)
    q, k, v = leaf(133, 4, 40), leaf(133, 2, 40), leaf(133, 2, 40)
    for options in ({}, {"is_causal": True}):
        out = ours.attention_varlen(q, k, v, lengths, lengths, 65, 65, **options)
        out.sum().backward()


@problem
def rope_cache() -> None:
    """Rotation, cache write and attention in one op; caches short and long."""
    for length, kv_heads, rope in ((7, 1, "half"), (1003, 2, "half"), (4099, 2, "interleaved")):
        batch, dim = 2, 64
        width = dim if rope == "half" else dim // 2
        cos, sin = (randn(batch, 1, width, dtype=FULL) for _ in range(2))
        q = randn(batch, 8, 1, dim)
        k, v = (randn(batch, kv_heads, 1, dim) for _ in range(2))
        caches = [randn(batch, kv_heads, length, dim) for _ in range(2)]
        positions = torch.tensor([length - 3, 0], device=DEVICE)
        ours.attention_rope_cache(q, k, v, cos, sin, *caches, positions, None, rope=rope)
        mask = torch.rand(batch, 1, 1, length, device=DEVICE) > 0.2
        ours.attention_rope_cache(
            q, k, v, None, None, *caches, positions, mask, rope="none", is_causal=False
        )


@problem
def rope_cache_apart() -> None:
    """So many splits that rotation and cache write take a launch of their own."""
    from triton_only_backend.kernels.decode_configs import DecodeConfig
    from triton_only_backend.kernels.rope_cache_attention import attention_rope_cache
    from triton_only_backend.kernels.rope_cache_ops import Inputs

    dim, length = 128, 2101
    q, k, v = randn(2, 16, 1, dim), randn(2, 1, 1, dim), randn(2, 1, 1, dim)
    cos, sin = (randn(2, 1, dim, dtype=FULL) for _ in range(2))
    caches = [randn(2, 1, length, dim) for _ in range(2)]
    slots = torch.tensor([5, length - 1], device=DEVICE)
    attention_rope_cache(
        Inputs(q, k, v, cos, sin, *caches, slots), randn(2, 16, 1, dim),
        rope="half", is_causal=False, scale=None, config=DecodeConfig(32, 64, 4, 2, 16),
    )  # fmt: skip
    q, k, v = (randn(2, n, 5, dim) for n in (11, 1, 1))
    cos, sin = (randn(1, 5, 40, dtype=FULL) for _ in range(2))
    ours.rope_cache(q, k, v, cos, sin, *caches, torch.arange(5, device=DEVICE))


@problem
def short_cache_attention() -> None:
    """One split and several, of one tile and of more than are in flight; read ahead or not."""
    from triton_only_backend.kernels.rope_cache import rotation_of
    from triton_only_backend.kernels.rope_cache_ops import Inputs
    from triton_only_backend.kernels.short_cache_configs import CONFIGS

    if not HAS_GLUON:
        return
    from triton_only_backend.kernels.short_cache_attention import short_cache_attention

    for config, length, form in itertools.product(CONFIGS, (13, 41, 701), (0, 1, 2)):
        dim = 64 if form == 2 else 128
        q, k, v = randn(2, 6, 1, dim), randn(2, 2, 1, dim), randn(2, 2, 1, dim)
        caches = [randn(2, 2, length, dim) for _ in range(2)]
        slots = torch.tensor([length - 3, -1], device=DEVICE)
        rope, width = (("half", dim), ("interleaved", 16), ("none", 0))[form]
        angles = [None] * 2 if rope == "none" else [randn(1, 1, width, dtype=FULL)] * 2
        mask = None
        if form > 0:  # for each head, and for all of them
            mask = torch.rand(2, 6 if form == 1 else 1, 1, length, device=DEVICE) > 0.2
            mask = mask.expand(2, 6, 1, length)
        short_cache_attention(
            Inputs(q, k, v, *angles, *caches, slots), rotation_of(rope, *angles, q), slots, mask,
            randn(2, 6, 1, dim), scale=0.1, config=config, caches_ready=form != 1,
        )  # fmt: skip


@problem
def experts() -> None:
    """Groups of no, few and many rows, forward and backward; rows that belong to none."""
    for dtype in (HALF, FULL):
        ends = torch.tensor([0, 3, 140, 141], dtype=torch.int32, device=DEVICE)
        a, b = leaf(150, 72, dtype=dtype), leaf(4, 72, 136, dtype=dtype)
        ours.grouped_mm(a, b, ends).sum().backward()


@problem
def random_seeds() -> None:
    for count in (0, 1, 5):
        ours.random_seeds(count, device=torch.device(DEVICE))


def run(names: list[str]) -> int:
    """Runs problems by name; returns the exit status."""
    interpreter.install_if_wanted()
    count_launches()
    for name in names:
        torch.manual_seed(0)
        start = time.perf_counter()
        before = launched.total()
        PROBLEMS[name]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(
            f"{name:<28} {launched.total() - before:5} launches {time.perf_counter() - start:7.1f} s"
        )
    kernels = entry_kernels()
    print()
    for name, file in sorted(kernels.items()):
        print(f"{name:<36} {file:<32} {launched[name]:5}")
    missing = [name for name in kernels if not launched[name]]
    print(f"\n{len(kernels) - len(missing)} of {len(kernels)} kernels launched")
    if missing and len(names) == len(PROBLEMS):
        print(f"not launched: {', '.join(missing)}; add a problem to {__file__}")
        return 1
    return 0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="problems whose name holds this")
    asked = parser.parse_args().only
    names = [name for name in PROBLEMS if asked in name]
    if not names:
        sys.exit(f"no problem is called {asked!r} (there are {', '.join(PROBLEMS)})")
    sys.exit(run(names))


if __name__ == "__main__":
    main()
