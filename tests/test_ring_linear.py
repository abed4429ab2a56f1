"""Few rows through the ring: when it is chosen; on a Hopper GPU against fp64, beside cuBLAS."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from on_hopper import check_replays, hopper

import triton_only_backend  # noqa: F401
from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.gemm_choice import general_config, heuristic_config
from triton_only_backend.kernels.gemm_configs import GemmProblem, ring_of, supports, with_ring
from triton_only_backend.kernels.hardware import Hardware
from triton_only_backend.kernels.limits import RING_MAX_ROWS
from triton_only_backend.kernels.ring_configs import (
    RING_PRODUCT_ROWS,
    RingConfig,
    ring_fits,
    select_ring,
)

ours = torch.ops.triton_only
H200 = Hardware("NVIDIA H200", "cuda", "sm90", 132, 232448)
A100 = Hardware("A100", "cuda", "sm80", 108, 166912)


@pytest.mark.parametrize(
    ("M", "columns", "K", "gated", "normed", "expected"),
    [
        (2, (4096,), 4096, False, False, RingConfig(16, 5, 2)),
        (1, (4096, 1024, 1024), 4096, False, True, RingConfig(16, 8)),
        (2, (14336,), 4096, True, True, RingConfig(16, 12)),
        (2, (4096,), 14336, False, False, RingConfig(16, 5, 2)),
        (2, (128256,), 4096, False, True, RingConfig(16, 12)),
        (8, (14336,), 4096, False, False, RingConfig(32, 10)),
    ],
)
def test_choice(M, columns, K, gated, normed, expected):
    assert select_ring(M, columns, K, gated, normed, H200) == expected


@pytest.mark.parametrize(
    ("M", "columns", "K", "gated", "normed", "device"),
    [
        (2, (4096,), 4096, False, False, A100),
        (RING_MAX_ROWS * 2, (4096,), 4096, False, False, H200),
        (2, (4096,), 4096 + 64, False, False, H200),  # not a whole number of runs
        (2, (4096,), 4096 + 512, False, True, H200),  # nor of what is normalised at once
        (2, (4096,), 16384, False, True, H200),  # more than the registers hold
        (2, (1024,), 4096, False, False, H200),  # multiprocessors without a tile
    ],
)
def test_left_to_other_kernels(M, columns, K, gated, normed, device):
    assert select_ring(M, columns, K, gated, normed, device) is None


@pytest.mark.parametrize("K", [1024, 4096, 8192, 14336, 28672])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_fits_the_shared_memory(K, gated, normed):
    for M, n in itertools.product((1, 2, 4, 8), (4096, 6144, 128256)):
        config = select_ring(M, (n,), K, gated, normed, H200)
        if config is not None:
            rows, boxes = config.rows(M), 1 if gated else 2
            x = 2 * K * rows if normed else config.stages * boxes * config.fold * rows * 128
            sums = (1 + gated) * 64 * config.fold * rows * 4
            used = config.stages * (16384 + 16) + x + sums + 1024
            assert config.resident * used <= H200.shared_memory
            assert config.stages >= 3


def product(M: int, N: int, K: int, *, batch: int = 1, k_contiguous: bool = True) -> GemmProblem:
    return GemmProblem(batch, M, N, K, 2, False, True, k_contiguous)


@pytest.mark.parametrize(
    ("M", "N", "K", "tile", "resident"),
    [
        (1, 4096, 4096, 16, 2),
        (2, 6144, 4096, 16, 1),
        (2, 14336, 4096, 16, 1),
        (4, 1024, 4096, 16, 2),
        (4, 2560, 10240, 16, 1),
        (4, 4096, 14336, 16, 2),
        (4, 57344, 8192, 16, 1),
        (8, 1024, 1024, 32, 2),
        (8, 1024, 8192, 16, 2),
        (8, 4096, 14336, 32, 1),
        (8, 6144, 4096, 32, 1),
        (8, 57344, 8192, 32, 1),
        (4, 3712, 4864, 32, 1),
        (16, 4096, 14336, 32, 1),
        (2, 2560, 10240, 16, 1),
        (8, 10240, 8192, 16, 1),
        (16, 4096, 4096, 32, 1),
        (16, 1024, 4096, 64, 2),
        (16, 14336, 4096, 64, 2),
        (32, 4096, 4096, 64, 1),
        (32, 10240, 8192, 64, 1),
        (64, 2560, 10240, 64, 1),
    ],
)
def test_plain_products_go_through_it(M, N, K, tile, resident):
    """As measured on an H200."""
    config = heuristic_config(product(M, N, K), H200)
    assert config.kernel == "ring_linear"
    ring = ring_of(config)
    assert (ring.tile, ring.resident) == (tile, resident)
    assert ring_fits(M, K, ring, H200) and ring.stages >= 4
    assert not ring_fits(M, K, replace(ring, stages=ring.stages + 1), H200) or ring.stages == 12
    assert supports(product(M, N, K), config, H200)
    assert general_config(product(M, N, K), H200).kernel != "ring_linear"


@pytest.mark.parametrize(
    ("M", "N", "K", "kernel"),
    [
        (2, 4096, 4096 + 256, "gemv"),
        (2, 8, 4096, "gemv"),
        (2, 256, 16384, "gemv"),
        (64, 320, 1792, "gemm"),
        (2, 3712, 4864, "gemv"),
        (64, 512, 14336, "gemm_tma"),
        (64, 10240, 8192, "gemm_tma"),
        (64, 57344, 8192, "gemm_tma"),
    ],
)
def test_plain_products_that_others_do_faster(M, N, K, kernel):
    assert heuristic_config(product(M, N, K), H200).kernel == kernel


@pytest.mark.parametrize(
    ("problem", "device"),
    [
        (product(4, 6144, 4096), A100),
        (product(4, 6144, 4096, batch=2), H200),
        (product(2 * RING_PRODUCT_ROWS, 6144, 4096), H200),
        (GemmProblem(1, 4, 6144, 4096, 4, False, True, True), H200),
        (GemmProblem(1, 4, 6144, 4096, 2, False, True, True, aligned=False), H200),
    ],
    ids=str,
)
def test_products_that_it_does_not_compute(problem, device):
    assert heuristic_config(problem, device).kernel != "ring_linear"
    assert not supports(problem, with_ring(4, RingConfig(16, 5)), device)


@pytest.mark.parametrize(
    ("M", "N", "K", "k_contiguous", "split_k"),
    [
        (64, 4096, 4096, True, 2),
        (32, 2560, 10240, True, 3),
        (64, 1024, 1024, False, 1),  # parts of so few steps are not worth it
        (64, 512, 14336, True, None),  # 24 parts of as much as a multiprocessor takes long to read
        (32, 1024, 4096, True, 3),
        (64, 6144, 4096, True, 1),
        (32, 10240, 8192, True, 2),  # a second wave of 28 tiles
        (8, 4096, 4096, False, 2),
        (1, 2560, 10240, False, 3),
        (4, 6144, 4096 + 8, True, 1),  # a last step that is not whole
        (4, 4160, 11272, True, 2),  # rows 16 bytes times an odd number apart
    ],
)
def test_tiles_that_are_divided(M, N, K, k_contiguous, split_k):
    problem = product(M, N, K, k_contiguous=k_contiguous)
    config = heuristic_config(problem, H200)
    if split_k is None:
        assert config.kernel != "ring_linear"
    else:
        assert (config.kernel, config.block_n, config.split_k) == ("ring_linear", 64, split_k)
        assert supports(problem, config, H200)


@pytest.mark.parametrize("tile", [16, 32, 64, 128])
@pytest.mark.parametrize("K", [520, 4096, 4096 + 64])
def test_runs_above_one_another_end_where_k_does(K, tile):
    config = with_ring(4, RingConfig(tile, 3))
    whole = K % config.block_k == 0
    assert supports(product(4, 4096, K), config, H200) == (whole or tile >= 64)


@pytest.mark.parametrize("tile", [16, 32, 64, 128])
def test_runs_lie_above_one_another_only_of_weights_along_k(tile):
    config = with_ring(4, RingConfig(tile, 3))
    assert supports(product(4, 4096, 4096), config, H200)
    assert supports(product(4, 4096, 4096, k_contiguous=False), config, H200) == (tile >= 64)


def test_what_a_product_must_be_beside():
    from triton_only_backend.kernels.matmul import is_linear

    out, bias = torch.empty(1, 4, 64), torch.empty(64)
    rows = bias.expand(1, 4, 64)
    assert is_linear(None, out, 1.0, 1.0)
    assert is_linear(rows, out, 1.0, 1.0)
    assert is_linear(torch.empty(1, 1, 64), torch.empty(1, 1, 64), 1.0, 1.0)
    assert not is_linear(None, out, 0.5, 1.0)
    assert not is_linear(rows, out, 1.0, 2.0)
    assert not is_linear(torch.empty(1, 4, 64), out, 1.0, 1.0)
    assert not is_linear(torch.empty(4, 1).expand(1, 4, 64), out, 1.0, 1.0)
    assert not is_linear(None, torch.empty(1, 4, 128)[:, :, :64], 1.0, 1.0)


@hopper
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("M", [1, 3, 8, 13, 16, 25, 32])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (1000, 1024), (2117, 1536)])
def test_products_against_fp64(M, N, K, dtype):
    for tile, resident in itertools.product((16, 32), (1, 2)):
        ring = RingConfig(tile, 3 if M <= 16 or resident == 1 else 2, resident)
        if ring_fits(M, K, ring, H200):
            is_accurate(M, N, K, dtype, ring)


@hopper
@pytest.mark.parametrize(("tile", "stages"), [(64, 7), (64, 3), (128, 9), (32, 4)])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("M", [1, 5, 16, 32, 64])
@pytest.mark.parametrize(
    ("N", "K"), [(4096, 4096), (1000, 1024), (2117, 1792), (1352, 1000), (520, 11272)]
)
def test_parts_of_products_against_fp64(M, N, K, dtype, tile, stages):
    for split_k in (1, 2, 3, 6):
        ring = RingConfig(tile, stages, 2 if stages < 5 else 1, split_k)
        if ring_fits(M, K, ring, H200):
            is_accurate(M, N, K, dtype, ring)
            if tile >= 64 and N % 8 == 0:
                is_accurate(M, N, K, dtype, ring, k_contiguous=False)


def is_accurate(M, N, K, dtype, ring, *, k_contiguous=True):
    torch.manual_seed(M * K)
    a, weight, bias = (torch.randn(s, device="cuda").to(dtype) for s in ((M, K), (N, K), (N,)))
    if not k_contiguous:
        weight = weight.T.contiguous().T
    with tuned.forcing("gemm", with_ring(M, ring)):
        out = ours.addmm(bias, a, weight.T)
        assert torch.equal(out, ours.addmm(bias, a, weight.T))
        other = ours.addmm(bias, a, weight.T, alpha=0.5)  # not through the ring
    for actual, alpha in ((out, 1.0), (other, 0.5)):
        exact = alpha * (a.double() @ weight.T.double()) + bias.double()
        vendor = torch.addmm(bias, a, weight.T, alpha=alpha)
        error, theirs = ((t.double() - exact).norm().item() for t in (actual, vendor))
        rounding = torch.finfo(dtype).eps / 2 * exact.norm().item()
        assert error <= 1.5 * max(theirs, rounding)


@hopper
def test_parts_replay_in_a_graph_and_leave_the_counters_zero():
    torch.manual_seed(0)
    layers = [torch.randn(2560, 2560, device="cuda").bfloat16() / 50 for _ in range(24)]
    x = torch.randn(33, 2560, device="cuda").bfloat16()
    with tuned.forcing("gemm", with_ring(64, RingConfig(64, 3, 2, 3))):

        def run(ready):
            y = x
            for weight in layers:
                y = ours.mm(y, weight.T, weights_ready=ready)
            return y

        check_replays(run, run(False))


def reference(x, weights, biases, norm, gated, activation, multiplier, residual, dtype):
    x, weights = x.to(dtype), [w.to(dtype) for w in weights]
    if norm is not None:
        wide = x if dtype == torch.float64 else x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        x = (wide * rstd).to(dtype) * norm.to(dtype)
    ys = [F.linear(x, w, b.to(dtype)) for w, b in zip(weights, biases, strict=True)]
    act = {"none": lambda y: y, "silu": F.silu, "gelu": F.gelu}[activation]
    ys = [act(ys[0]) * ys[1]] if gated else [act(y) for y in ys]
    if len(ys) == 1:
        ys = [ys[0] * multiplier.to(dtype) + residual.to(dtype)]
    return ys


PROBLEMS = [
    ((4096,), 4096, "none", False, False),
    ((4096, 1024, 1024), 4096, "none", False, True),
    ((2117, 33, 5), 1024, "gelu", False, True),
    ((2500, 2500), 3072, "silu", True, False),
    ((14336, 14336), 4096, "silu", True, True),
    ((4111,), 14336, "none", False, False),
    ((9001,), 512, "silu", False, False),
]


@hopper
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("columns,K,activation,gated,normed", PROBLEMS)
def test_against_fp64(M, columns, K, activation, gated, normed, dtype):
    torch.manual_seed(M * K)
    device = torch.device("cuda")
    widths = columns[:1] if gated else columns

    def randn(*shape):
        return torch.randn(shape, device=device).to(dtype)

    # Rows of wider matrices: strides of their own.
    x = randn(M, K + 64)[:, :K] * 3
    weights = [randn(n, K + 8)[:, :K] * K**-0.5 for n in columns]
    biases = [randn(n) for n in columns]
    norm = 1 + 0.1 * randn(K) if normed else None
    multiplier, residual = randn(M, widths[0]), randn(M, widths[0])
    options = {"activation": activation, "gated": gated}
    if normed:
        options |= {"norm_weight": norm, "norm_eps": 1e-5}
    if len(widths) == 1:
        options |= {"multiplier": multiplier, "residual": residual}
    given = (x, weights, biases, norm, gated, activation, multiplier, residual)
    outs = ours.linear_fused(x, weights, biases, **options)
    assert "ring_linear_kernel" in kernels_of(
        lambda: ours.linear_fused(x, weights, biases, **options)
    ) or not is_chosen(M, widths, K, gated, normed)
    exact, vendor = reference(*given, torch.float64), reference(*given, dtype)
    for out, right, theirs in zip(outs, exact, vendor, strict=True):
        error, vendor_error = ((t.double() - right).norm().item() for t in (out, theirs))
        rounding = torch.finfo(dtype).eps / 2 * right.norm().item()
        assert error <= 1.5 * max(vendor_error, rounding)
    again = ours.linear_fused(x, weights, biases, **options)
    assert all(torch.equal(a, b) for a, b in zip(outs, again, strict=True))


def is_chosen(M, columns, K, gated, normed):
    from triton_only_backend.kernels import hardware
    from triton_only_backend.kernels.sizes import next_power_of_2

    device = hardware.of(torch.device("cuda", torch.cuda.current_device()))
    return select_ring(next_power_of_2(M), columns, K, gated, normed, device) is not None


def kernels_of(function):
    from triton_only_backend import profile

    return {row.name for row in profile(function).rows}


@hopper
def test_a_chain_that_reads_ahead_of_its_producers():
    """Each layer reads its weights while the one before runs, and what that writes after it."""
    torch.manual_seed(0)
    layers = [torch.randn(4096, 4096, device="cuda").bfloat16() / 64 for _ in range(24)]
    x = torch.randn(2, 4096, device="cuda").bfloat16()

    def run(ready):
        y = x
        for weight in layers:
            (y,) = ours.linear_fused(y, [weight], [], residual=x, weights_ready=ready)
        return y

    check_replays(run, run(False))
