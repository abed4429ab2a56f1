"""The accuracy checks find the faults that kernels have: each is planted in a kernel's source.

A kernel's file is copied with one expression exchanged, imported from there, and run on problems
with odd sizes inside larger buffers, so that what it should not read or write is there to be read
and written. The kernel as it is must pass the same check.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F

import triton_only_backend  # noqa: F401
from triton_only_backend.testing import assert_accurate, assert_repeatable

KERNELS = "triton_only_backend.kernels"
ours = torch.ops.triton_only
serial = itertools.count()


@pytest.fixture
def plant(tmp_path):
    """The module of a kernel with an expression exchanged, which must be there exactly once."""

    def planted(name: str, old: str = "", new: str = ""):
        module = importlib.import_module(f"{KERNELS}.{name}")
        source = inspect.getsource(module)
        if old:
            assert source.count(old) == 1, f"{name}.py has {source.count(old)} times: {old}"
        path = tmp_path / f"{name}_{next(serial)}.py"
        path.write_text(source.replace(old, new) if old else source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy

    return planted


def inside(rows: int, columns: int, device: str) -> torch.Tensor:
    """A matrix inside a larger buffer of other numbers."""
    return torch.randn(2, 80, 80, device=device)[:1, 3 : rows + 3, 5 : columns + 5]


def config(kernel: str, split_k: int = 1):
    from triton_only_backend.kernels.gemm_configs import GemmConfig

    return GemmConfig(kernel, 16, 16, 16, split_k, 4, 4, 2)


def product(kernel: str, module, device: str, split_k: int = 1, M: int = 19) -> None:
    """A product by the module's kernel, its whole output buffer judged."""
    N, K = 21, 37
    a, b = inside(M, K, device), inside(K, N, device)
    bias = torch.randn(N, device=device).expand(1, M, N)
    buffer = torch.full((1, M + 2, N + 3), 7.0, device=device)

    def run() -> torch.Tensor:
        out = buffer.clone()
        options = {"precision": "ieee"} if kernel == "gemm" else {}
        call = getattr(module, kernel)
        call(
            a, b, bias, out[:, :M, :N],
            alpha=0.5, beta=2.0, config=config(kernel, split_k), **options,
        )  # fmt: skip
        return out

    def reference(a, b, bias, buffer):
        expected = buffer.clone()
        expected[:, :M, :N] = torch.baddbmm(bias, a, b, beta=2.0, alpha=0.5)
        return expected

    assert_accurate(run(), reference, (a, b, bias, buffer))
    assert_repeatable(run)


PRODUCT_FAULTS = {
    "wrong mask of the rows": ("offs_m < M", "offs_m <= M"),
    "wrong mask of the columns": ("offs_n < N", "offs_n < N + 1"),
    "wrong mask of K": ("offs_k < K - k * step_k", "offs_k <= K - k * step_k"),
    "no mask of K": ("EVEN_K=K % (config.block_k * split_k) == 0", "EVEN_K=True"),
    "missing tail of K": ("range(0, tl.cdiv(K, step_k))", "range(0, K // step_k)"),
    "swapped strides of a": (
        "offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak",
        "offs_m[:, None] * stride_ak + offs_k[None, :] * stride_am",
    ),
    "swapped strides of b": (
        "offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn",
        "offs_k[:, None] * stride_bn + offs_n[None, :] * stride_bk",
    ),
    "swapped strides of the output": (
        "offs_m[:, None] * stride_cm + offs_n[None, :] * stride_cn",
        "offs_m[:, None] * stride_cn + offs_n[None, :] * stride_cm",
    ),
    "a step too short": ("step_a = step_k * stride_ak", "step_a = (step_k - 1) * stride_ak"),
    "beta forgotten": ("tl.cast(beta, tl.float32) * bias", "bias"),
}


def test_the_product_is_accurate(plant, device):
    product("gemm", plant("gemm"), device)
    product("gemm", plant("gemm"), device, split_k=3)
    product("gemv", plant("gemv"), device, M=2)


@pytest.mark.cpu  # a write past the end of a tile is for the sanitizer on a GPU
@pytest.mark.parametrize("fault", PRODUCT_FAULTS)
def test_a_fault_of_the_product_is_found(fault, plant, device):
    module = plant("gemm", *PRODUCT_FAULTS[fault])
    with pytest.raises(AssertionError, match=r"not accurate|NaN too many"):
        product("gemm", module, device)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("offs_k < K - k * STEP_K", "offs_k <= K - k * STEP_K"),
        ("tl.range(0, tl.cdiv(K, STEP_K), num_stages=STAGES)", "tl.range(0, K // STEP_K)"),
        ("a_ptrs + row * stride_am", "a_ptrs + 0 * stride_am"),
    ],
    ids=["wrong mask of K", "missing tail of K", "the same row twice"],
)
def test_a_fault_of_the_product_with_few_rows_is_found(old, new, plant, device):
    with pytest.raises(AssertionError, match=r"not accurate|NaN too many"):
        product("gemv", plant("gemv", old, new), device, M=2)


@pytest.mark.parametrize("fault", ["one place for all partials", "a split is dropped"])
def test_a_fault_of_split_k_is_found(fault, plant, device, monkeypatch):
    """A race's last writer wins; a reduction leaves the last split out."""
    if fault == "a split is dropped":
        faulty = plant("split_k", "tl.static_range(1, SPLIT_K)", "tl.static_range(1, SPLIT_K - 1)")
        module = plant("gemm")
        monkeypatch.setattr(module, "reduce_partials", faulty.reduce_partials)
    else:
        target = "c_ptr + split.to(tl.int64) * stride_cs"
        module = plant("gemm", target, "c_ptr + (split * 0).to(tl.int64) * stride_cs")
    with pytest.raises(AssertionError, match=r"not accurate|NaN|inf"):
        product("gemm", module, device, split_k=3)


def test_sums_in_another_order_each_time_are_found(plant, device, monkeypatch):
    """What atomics do: each result is as accurate as another, and none is the same."""
    order = itertools.cycle([[0, 1, 2], [2, 0, 1], [1, 2, 0]])
    module = plant("gemm")
    reduce = module.reduce_partials

    def shuffled(arranged, **options):
        target = arranged.target[next(order)]
        reduce(arranged._replace(target=target), **options)

    monkeypatch.setattr(module, "reduce_partials", shuffled)
    with pytest.raises(AssertionError, match="other bits from run to run"):
        product("gemm", module, device, split_k=3)


# attention


def heads(length: int, device: str, count: int = 2) -> torch.Tensor:
    """(1, heads, length, 16) inside a larger buffer of other numbers."""
    return torch.randn(1, count, length + 40, 16, device=device)[:, :, 7 : length + 7]


def attend(device: str, *, is_causal: bool, mask: bool = False) -> None:
    """Attention and its gradients of odd lengths."""
    query, key, value = (heads(n, device) for n in (37, 71, 71))
    attn_mask = torch.randn(37, 71, device=device) if mask else None
    grad = torch.randn(1, 2, 37, 16, device=device)

    def both(attention):
        def run(q, k, v, grad):
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            m = None if attn_mask is None else attn_mask.to(q.dtype)
            with torch.enable_grad():
                out = attention(*leaves, m, is_causal=is_causal)
            return out.detach(), *torch.autograd.grad(out, leaves, grad)

        return run

    actual = both(ours.attention)(query, key, value, grad)
    reference = both(F.scaled_dot_product_attention)
    assert_accurate(actual, reference, (query, key, value, grad), factor=3.0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of queries and keys, none of them full at the end."""
    from triton_only_backend.kernels import sdpa

    def small(select):
        def choose(*args, **kwargs):
            chosen = select(*args, **kwargs)
            names = {f for f in ("block_m", "block_n") if hasattr(chosen, f)}
            return dataclasses.replace(chosen, **dict.fromkeys(names, 32))

        return choose

    monkeypatch.setattr(sdpa, "select_flash_config", small(sdpa.select_flash_config))


@pytest.mark.cpu  # where these tiles need not suit the hardware
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_attention_is_accurate(is_causal, device, small_tiles):
    attend(device, is_causal=is_causal)
    attend(device, is_causal=False, mask=True)


# Where what a file defines is called from, and its name there.
CALLED = {
    "online_softmax": ("flash_attention", "attend_blocks"),
    "flash_attention_backward": ("sdpa", "flash_attention_backward"),
    "key_value_gradient": ("flash_attention_backward", "key_value_gradient_kernel"),
    "query_gradient": ("flash_attention_backward", "query_gradient_kernel"),
}
ATTENTION_FAULTS = {
    "causal, the diagonal hidden": (
        "online_softmax",
        "hidden = offs_n[None, :] > row_position[:, None]",
        "hidden = offs_n[None, :] >= row_position[:, None]",
        {"is_causal": True},
    ),
    "causal, one key too many": (
        "online_softmax",
        "hidden = offs_n[None, :] > row_position[:, None]",
        "hidden = offs_n[None, :] > row_position[:, None] + 1",
        {"is_causal": True},
    ),
    "keys past the end are seen": (
        "online_softmax",
        "if CHECK and not EVEN_N:",
        "if CHECK and EVEN_N:",
        {"is_causal": False},
    ),
    "the sum is not rescaled": (
        "online_softmax",
        "        acc *= alpha[:, None]\n",
        "",
        {"is_causal": False},
    ),
    "the mask's rows and columns swapped": (
        "online_softmax",
        "mask_rows[:, None] + offs_n.to(tl.int64)[None, :] * stride_mask_n",
        "mask_rows[:, None] + offs_n.to(tl.int64)[None, :] * (stride_mask_n + 1)",
        {"is_causal": False, "mask": True},
    ),
    "causal, the diagonal hidden in the backward": (
        "key_value_gradient",
        "p = tl.where(offs_n[:, None] > offs_m[None, :], 0.0, p)\n        weights",
        "p = tl.where(offs_n[:, None] >= offs_m[None, :], 0.0, p)\n        weights",
        {"is_causal": True},
    ),
    "causal, the diagonal hidden from the query's gradient": (
        "query_gradient",
        "p = tl.where(offs_n[None, :] > offs_m[:, None], 0.0, p)",
        "p = tl.where(offs_n[None, :] >= offs_m[:, None], 0.0, p)",
        {"is_causal": True},
    ),
    "delta forgotten in the backward": (
        "flash_attention_backward",
        "tl.store(delta_ptr + row, delta, mask=row_valid)",
        "tl.store(delta_ptr + row, delta * 0, mask=row_valid)",
        {"is_causal": False},
    ),
}


@pytest.mark.cpu
@pytest.mark.parametrize("fault", ATTENTION_FAULTS)
def test_a_fault_of_attention_is_found(fault, plant, device, monkeypatch, small_tiles):
    name, old, new, options = ATTENTION_FAULTS[fault]
    caller, called = CALLED[name]
    module = importlib.import_module(f"{KERNELS}.{caller}")
    monkeypatch.setattr(module, called, getattr(plant(name, old, new), called))
    with pytest.raises(AssertionError, match=r"not accurate|NaN too many"):
        attend(device, **options)


# decoding: the keys are split, and the last split to arrive combines

DECODE_FAULTS = {
    "a race: combined before the last part is there": (
        "if arrived == num_splits - 1:",
        "if arrived == num_splits - 2:",
    ),
    "one place for all parts": ("* num_splits + split\n", "* num_splits + split * 0\n"),
    "a split is dropped": ("(offs_c < num_splits)", "(offs_c < num_splits - 1)"),
    "parts are not weighted": ("tl.exp2(lse2 - shift[:, None])", "tl.exp2(lse2 * 0)"),
    "a split reads its neighbour's keys": (
        "step = BLOCK_N * num_splits",
        "step = BLOCK_N * (num_splits - 1)",
    ),
    "the tail of the keys is missing": (
        "stop = tl.minimum((split + end * num_splits) * BLOCK_N, len_kv)",
        "stop = len_kv // BLOCK_N * BLOCK_N",
    ),
}


def decode(device: str) -> None:
    """One query of two heads a KV head over 103 keys in three splits, by one launch."""
    from triton_only_backend.kernels import tuned
    from triton_only_backend.kernels.decode_configs import DecodeConfig

    query, key, value = heads(1, device, count=4), heads(103, device), heads(103, device)
    with tuned.forcing("decode_attention", DecodeConfig(16, 3, 4, 1, 16, 4)):
        out = ours.attention(query, key, value, enable_gqa=True)

    def reference(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    assert_accurate(out, reference, (query, key, value))


@pytest.fixture
def faulty_decode(plant, monkeypatch):
    """Puts a fault into what the decoding kernel calls; its counters are its own."""
    from triton_only_backend.kernels import decode_attention

    launched = []

    def counters(count, device):
        launched.append(count)
        return torch.zeros(count, dtype=torch.int32, device=device)

    def put(old: str = "", new: str = "") -> None:
        monkeypatch.setattr(decode_attention, "arrival_counters", counters)
        faulty = plant("split_kv", old, new)
        for name in ("attend_split", "finish_split"):
            monkeypatch.setattr(decode_attention, name, getattr(faulty, name))

    yield put
    assert len(launched) == 1, "the decoding kernel did not run, or not by one launch"


@pytest.mark.cpu
def test_decoding_is_accurate(faulty_decode, device):
    faulty_decode()
    decode(device)


@pytest.mark.cpu
@pytest.mark.parametrize("fault", DECODE_FAULTS)
def test_a_fault_of_decoding_is_found(fault, faulty_decode, device):
    faulty_decode(*DECODE_FAULTS[fault])
    with pytest.raises(AssertionError, match=r"not accurate|NaN|inf"):
        decode(device)
