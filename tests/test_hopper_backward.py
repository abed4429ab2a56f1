"""Attention's gradients on Hopper: when the kernel runs, the parts that can run here, what compiles.

The compile test runs this file as a script in a process of its own, where Triton compiles rather
than interprets. On a Hopper GPU the kernel runs against fp64, with FlashAttention-2's error as the
yardstick.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import types
import warnings
from dataclasses import replace

import cross_compile
import pytest
import torch
import torch.nn.functional as F
from attention_reference import DEVICE
from on_hopper import hopper, random_heads
from torch.nn.attention import SDPBackend, sdpa_kernel

from triton_only_backend.kernels import hardware, sdpa
from triton_only_backend.kernels import hopper_backward_configs as configs
from triton_only_backend.kernels.attention_arguments import Inputs, Options, operands
from triton_only_backend.kernels.attention_configs import AttentionProblem
from triton_only_backend.kernels.hopper_backward_configs import (
    HopperBackwardConfig,
    hopper_backward_shared_memory,
    select_hopper_backward,
    takes,
)
from triton_only_backend.kernels.loading import load

H200 = cross_compile.TARGETS["sm90"][2]
TRAINING = AttentionProblem(2, 32, 8, 4096, 4096, 128, 128, 2, True, False)


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "splits", "section_heads"),
    [
        ({}, 1, 16),
        ({"is_causal": False}, 1, 8),
        ({"num_kv_heads": 32}, 1, 16),
        ({"head_dim": 64, "head_dim_v": 64}, 1, 16),
        # 64 tiles of keys: in four parts 256, of which some are short.
        ({"len_q": 512, "len_kv": 512}, 4, 33),
        ({"len_q": 512, "len_kv": 512, "is_causal": False}, 2, 32),
        ({"len_q": 512, "len_kv": 512, "num_kv_heads": 32}, 1, 33),
        ({"len_q": 100, "len_kv": 100}, 4, 64),
        ({"batch": 1, "num_heads": 6, "num_kv_heads": 2}, 3, 6),
    ],
    ids=str,
)
def test_choice(changes, splits, section_heads):
    expected = HopperBackwardConfig(splits, section_heads)
    assert select_hopper_backward(replace(TRAINING, **changes), H200) == expected


def test_few_queries_do_not_take_it():
    assert select_hopper_backward(replace(TRAINING, len_q=64), H200) is None
    assert select_hopper_backward(replace(TRAINING, len_q=65), H200) is not None


@pytest.mark.parametrize("name", [name for name in cross_compile.TARGETS if name != "sm90"])
def test_other_gpus_do_not_take_it(name):
    assert select_hopper_backward(TRAINING, cross_compile.TARGETS[name][2]) is None


def test_another_gluon_does_not_take_it(monkeypatch):
    monkeypatch.setattr(hardware, "gluon_is_known", lambda: False)
    assert select_hopper_backward(TRAINING, H200) is None


@pytest.mark.parametrize("head_dim", [64, 128])
def test_fits_the_shared_memory_and_the_registers(head_dim):
    assert hopper_backward_shared_memory(head_dim) <= H200.shared_memory
    a_thread = 2 * configs.KEY_REGISTERS + configs.QUERY_REGISTERS + configs.SERVICE_REGISTERS
    assert 128 * a_thread <= 65536


def inputs(len_q=100, len_kv=90, dim=64, dtype=torch.bfloat16, mask=None):
    shapes = ((2, 4, len_q, dim), (2, 2, len_kv, dim), (2, 2, len_kv, dim))
    made = [torch.zeros(b, n, h, d, dtype=dtype).transpose(1, 2) for b, h, n, d in shapes]
    return Inputs(*made, None if mask is None else torch.ones(len_q, len_kv, dtype=mask))


@pytest.mark.parametrize(
    ("given", "options", "gradient", "expected"),
    [
        ({}, {}, "dense", True),
        ({"dim": 128, "dtype": torch.float16}, {"is_causal": True}, "dense", True),
        ({}, {}, "transposed", True),
        ({}, {}, "expanded", False),
        ({}, {}, "unaligned", False),
        ({}, {}, "fp32", False),
        ({"mask": torch.bool}, {}, "dense", False),
        ({"dtype": torch.float32}, {}, "dense", False),
        ({"dim": 80}, {}, "dense", False),
        ({}, {"softcap": 5.0}, "dense", False),
        ({}, {"dropout_p": 0.5}, "dense", False),
        ({}, {"window_left": 7}, "dense", False),
        ({}, {"scale": 0.0}, "dense", False),
    ],
    ids=str,
)
def test_takes(given, options, gradient, expected):
    x = operands(inputs(**given), True)
    shape, dtype = x.query.shape, x.query.dtype
    b, h, n, d = shape
    grad_out = {
        "dense": torch.empty(shape, dtype=dtype),
        "transposed": torch.empty(b, n, h, d, dtype=dtype).transpose(1, 2),
        "expanded": torch.empty((), dtype=dtype).expand(shape),
        "unaligned": torch.empty(b, h, n, d + 1, dtype=dtype)[..., :d],
        "fp32": torch.empty(shape),
    }[gradient]
    assert takes(x, grad_out, Options(enable_gqa=True, **options)) is expected


def test_what_it_is_launched_with(monkeypatch):
    calls = []
    stand_in = types.SimpleNamespace(
        flash_attention_backward_hopper=lambda *x, **options: calls.append((x, options))
    )
    monkeypatch.setattr(hardware, "of", lambda device: H200)
    name = f"{sdpa.__package__}.flash_attention_backward_hopper"
    monkeypatch.setitem(sys.modules, name, stand_in)
    given = inputs()
    out = torch.zeros(2, 100, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
    lse = torch.zeros(2, 4, 100)
    options = Options(is_causal=True, enable_gqa=True)
    grads = sdpa.backward(out, given, out, lse, options)
    ((tensors, launched),) = calls
    assert [x.data_ptr() for x in tensors[1:4]] == [x.data_ptr() for x in given[:3]]
    assert [x.data_ptr() for x in tensors[6:]] == [x.data_ptr() for x in grads]
    assert [x.shape for x in grads] == [x.shape for x in given[:3]]
    assert launched == {
        "is_causal": True, "scale": 0.125, "config": HopperBackwardConfig(2, 8)
    }  # fmt: skip


# --- parts of the kernel, on the CPU --------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch):
    """The module of the kernel's parts, run by Python on integers."""
    tiles = pytest.importorskip("triton_only_backend.kernels.hopper_backward_tiles")
    if not hardware.gluon_is_known():
        pytest.skip("no Gluon that is known")
    for name, value in list(vars(tiles).items()):
        if type(value).__name__ == "GluonJITFunction":
            monkeypatch.setattr(tiles, name, value.fn)
        elif type(value).__name__ == "constexpr":
            monkeypatch.setattr(tiles, name, value.value)
    fake = types.SimpleNamespace(minimum=min, where=lambda c, a, b: a if c else b)
    monkeypatch.setattr(tiles, "gl", fake)
    return tiles


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("len_q", "len_kv"), [(1, 1), (64, 129), (1000, 1000), (65, 700), (700, 65)]
)
def test_a_tile_of_queries_is_visited_in_turns(len_q, len_kv, is_causal, parts):
    """By the blocks of the keys 0 to n without a gap, of which the last one knows that it is."""
    query_tiles, key_tiles = -(-len_q // 64), -(-len_kv // 128)
    visitors = {tile: [] for tile in range(query_tiles)}
    for key_tile in range(key_tiles):
        first = parts.first_tile(key_tile * 128, query_tiles, is_causal)
        head, tile = 7, query_tiles - 1
        for _ in range(2 * (query_tiles - first)):
            assert head in (7, 8)
            visitors[tile] += [key_tile] * (head == 7)
            head, tile = parts.next_tile(head, tile, first, query_tiles)
        assert (head, tile) == (9, query_tiles - 1)
    for tile, found in visitors.items():
        last = parts.last_turn(tile, query_tiles, key_tiles, is_causal)
        assert found == list(range(last + 1))
        if is_causal:
            seen = min((tile * 64 + 63) // 128, key_tiles - 1)
            assert last >= seen


@pytest.mark.parametrize(
    ("key_tiles", "number", "section_heads"), [(1, 1, 1), (5, 7, 3), (4, 256, 33), (64, 16, 16)]
)
def test_a_block_waits_for_smaller_numbers_only(key_tiles, number, section_heads, monkeypatch):
    attention_tiles = load("attention_tiles")
    monkeypatch.setattr(attention_tiles, "tl", types.SimpleNamespace(minimum=min))
    tile_and_head = attention_tiles.tile_and_head.fn
    items = [tile_and_head(i, key_tiles, number, section_heads) for i in range(key_tiles * number)]
    assert sorted(items) == list(itertools.product(range(key_tiles), range(number)))
    place = {item: i for i, item in enumerate(items)}
    assert all(place[tile - 1, part] < i for (tile, part), i in place.items() if tile > 0)


def test_statistics_of_tiles():
    ends = load("hopper_backward_ends")
    batch, heads, len_q, dim = 2, 3, 70, 64
    out, grad_out = (
        torch.randn(batch, len_q, heads, dim, device=DEVICE, dtype=torch.float16).transpose(1, 2)
        for _ in range(2)
    )
    lse = torch.randn(batch, heads, len_q, device=DEVICE)
    lse[1, 2, 3] = float("-inf")
    stats = torch.full((batch, heads, 2, 2, 64), float("nan"), device=DEVICE)
    turns = torch.full((batch, heads, 2), 9, dtype=torch.int32, device=DEVICE)
    ends.tile_statistics_kernel[(batch * heads * 2,)](
        out, grad_out, lse, stats, turns, *out.stride(), *grad_out.stride(), *lse.stride(), 2,
        heads, len_q, BLOCK_M=64, BLOCK_D=dim,
    )  # fmt: skip
    minus_lse2, delta = (x.flatten(2) for x in stats.unbind(3))
    expected = torch.where(lse.isinf(), lse, lse * -1.4426950408889634)
    torch.testing.assert_close(minus_lse2[..., :len_q], expected)
    assert (minus_lse2[..., len_q:] == float("-inf")).all()
    torch.testing.assert_close(delta[..., :len_q], (out.float() * grad_out.float()).sum(-1))
    assert (delta[..., len_q:] == 0).all()
    assert (turns == 0).all()


def test_sums_of_splits():
    """`put_tile` writes what the threads of a wgmma have: element (row, column), by its formula."""
    ends = load("hopper_backward_ends")
    batch, heads, splits, length, dim = 2, 2, 3, 100, 64
    tiles = 2
    whole = torch.randn(2, batch * heads, splits, tiles, 64, dim, device=DEVICE)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(dim), indexing="ij")
    thread = rows // 16 * 32 + rows % 8 * 4 + columns % 8 // 2
    place = columns // 8 * 512 + thread * 4 + rows // 8 % 2 * 2 + columns % 2
    sums = torch.empty_like(whole).flatten(-2)
    sums[..., place.flatten().to(DEVICE)] = whole.flatten(-2)
    grads = [
        torch.empty(batch, length, heads, dim, device=DEVICE, dtype=torch.float16).transpose(1, 2)
        for _ in range(2)
    ]
    dk, dv = grads
    ends.add_splits_kernel[(batch * heads * tiles, 2)](
        sums[0].contiguous(), sums[1].contiguous(), dk, dv, *dk.stride(), *dv.stride(), 0.5, tiles,
        heads, length, splits, ROWS=64, BLOCK_D=dim,
    )  # fmt: skip
    expected = whole.sum(2).view(2, batch, heads, tiles * 64, dim)[..., :length, :]
    torch.testing.assert_close(dk.float(), expected[0] * 0.5, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(dv.float(), expected[1], rtol=1e-3, atol=2e-3)


# --- compiling for Hopper -------------------------------------------------------------------------

FORMS = [
    # head_dim, dtype, len_kv, is_causal, splits
    (128, "bfloat16", 1024, True, 1),
    (128, "bfloat16", 1024, False, 1),
    (128, "float16", 1000, True, 2),
    (128, "bfloat16", 1000, False, 2),
    (64, "bfloat16", 1024, True, 1),
    (64, "float16", 1000, False, 2),
]


def compile_forms():
    """Prints a row of JSON for each form, in a process where Triton compiles."""
    # PTX from a cache may be of another ptxas' version than the one that `assembler_warnings` asks.
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    compiled = cross_compile.compile_for("sm90")
    from triton_only_backend.kernels.flash_attention_backward_hopper import (
        flash_attention_backward_hopper,
    )

    for dim, dtype, len_kv, is_causal, splits in FORMS:
        compiled.clear()
        like = {"dtype": getattr(torch, dtype), "device": "meta"}
        q, k = torch.empty(2, 32, 512, dim, **like), torch.empty(2, 8, len_kv, dim, **like)
        flash_attention_backward_hopper(
            q, q, k, k, q, torch.empty(2, 32, 512, device="meta"), q, k, k, is_causal=is_causal,
            scale=0.1, config=HopperBackwardConfig(splits, 16),
        )  # fmt: skip
        assert len(compiled) == (3 if splits > 1 else 2)
        kernel = compiled[1]
        ptx = kernel.asm["ptx"]
        row = {
            "spilled": [one.spilled for one in compiled],
            "shared": kernel.shared_memory,
            "warnings": cross_compile.assembler_warnings(ptx),
            "red": ptx.count("red.relaxed.gpu.global.add.v4.f32"),
            "wgmma": ptx.count("wgmma.mma_async"),
        }
        print(json.dumps(row), flush=True)


def test_compiles():
    import triton

    newer = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    for form, row in cross_compile.rows_of_gluon(__file__, FORMS):
        bound = hopper_backward_shared_memory(form[0])
        assert row["shared"] <= bound <= H200.shared_memory, row
        # Some integers; Triton 3.9 keeps more of them.
        before, spilled, *after = row["spilled"]
        assert spilled <= (128 if newer else 64) * (form[0] == 128) + 16, row
        assert before == 0
        assert after in ([], [0])
        assert row["warnings"] == []
        assert row["red"] == form[0] // 8
        assert row["wgmma"] > 0


# --- on a Hopper GPU ------------------------------------------------------------------------------

ours = torch.ops.triton_only
# Relative error of FlashAttention-2's gradients of random numbers, where it has none to ask for.
USUAL_ERROR = {torch.bfloat16: 3e-3, torch.float16: 4e-4}


def random_tensors(batch, heads, kv_heads, len_q, len_kv, dim, dtype, order):
    """Query, key, value and the output's gradient."""
    sizes = ((heads, len_q), (kv_heads, len_kv), (kv_heads, len_kv), (heads, len_q))
    return tuple(random_heads(batch, h, n, dim, dtype, order) for h, n in sizes)


def exact(q, k, v, grad_out, is_causal, scale):
    """Output, log-sum-exp and gradients in fp64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in leaves[1:])
    scores = scale * leaves[0] @ key.mT
    if is_causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    out = scores.softmax(-1) @ value
    grads = torch.autograd.grad(out, leaves, grad_out.double())
    return out.detach(), scores.detach().logsumexp(-1), grads


def run(q, k, v, grad_out, out, lse, *, is_causal=False, scale=None, config=None):
    """The gradients, where each was NaN before."""
    from triton_only_backend.kernels.flash_attention_backward_hopper import (
        flash_attention_backward_hopper,
    )

    problem = AttentionProblem(
        q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], q.shape[3], 2,
        is_causal, False,
    )  # fmt: skip
    config = config or select_hopper_backward(replace(problem, len_q=max(65, q.shape[2])), H200)
    grads = [torch.full(x.shape, float("nan"), dtype=x.dtype, device=x.device) for x in (q, k, v)]
    flash_attention_backward_hopper(
        grad_out, q, k, v, out, lse, *grads, is_causal=is_causal,
        scale=scale or q.shape[3] ** -0.5, config=config,
    )  # fmt: skip
    return grads


def library_errors(q, k, v, grad_out, expected, is_causal, scale):
    """Relative errors of FlashAttention-2's gradients, or None where it does not run."""
    if is_causal and q.shape[2] != k.shape[2]:
        return None  # it aligns to the bottom right
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in leaves[1:])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = F.scaled_dot_product_attention(
            leaves[0], key, value, is_causal=is_causal, scale=scale
        )
    return relative_errors(torch.autograd.grad(out, leaves, grad_out), expected)


def relative_errors(grads, expected):
    return [
        ((x.double() - y).norm() / y.norm().clamp_min(1e-30)).item() if y.norm() > 1e-9
        else x.double().abs().max().item()
        for x, y in zip(grads, expected, strict=True)
    ]  # fmt: skip


def check(q, k, v, grad_out, *, is_causal=False, scale=None, config=None):
    """At most one and a half times FlashAttention-2's error, and the same from run to run."""
    scale = scale or q.shape[3] ** -0.5
    out, lse, expected = exact(q, k, v, grad_out, is_causal, scale)
    rest = (out.to(q.dtype), lse.float())
    options = {"is_causal": is_causal, "scale": scale, "config": config}
    grads = run(q, k, v, grad_out, *rest, **options)
    errors = relative_errors(grads, expected)
    theirs = library_errors(q, k, v, grad_out, expected, is_causal, scale)
    granted = [USUAL_ERROR[q.dtype]] * 3 if theirs is None else theirs
    assert all(e <= 1.5 * g + 1e-5 for e, g in zip(errors, granted, strict=True)), (errors, theirs)
    for _ in range(3):
        assert all(map(torch.equal, grads, run(q, k, v, grad_out, *rest, **options)))


LENGTHS = [
    (64, 128), (65, 129), (127, 128), (128, 127), (300, 777), (777, 300), (1000, 1000), (130, 1),
    (513, 513),
]  # fmt: skip


@hopper
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("len_q", "len_kv"), LENGTHS)
def test_lengths(len_q, len_kv, dim, is_causal):
    for dtype, order in ((torch.bfloat16, "bhld"), (torch.float16, "blhd")):
        tensors = random_tensors(2, 6, 2, len_q, len_kv, dim, dtype, order)
        check(*tensors, is_causal=is_causal)


@hopper
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_splits(splits, is_causal):
    tensors = random_tensors(3, 8, 2, 400, 400, 128, torch.bfloat16, "blhd")
    check(*tensors, is_causal=is_causal, config=HopperBackwardConfig(splits, 5))


@hopper
def test_one_query_of_one_key():
    check(*random_tensors(1, 1, 1, 1, 1, 128, torch.bfloat16, "bhld"), is_causal=True)


@hopper
@pytest.mark.parametrize("order", ["bhld", "blhd", "packed"])
def test_layouts(order):
    check(*random_tensors(3, 4, 4, 333, 333, 128, torch.float16, order), is_causal=True)


@hopper
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3.0])
def test_scales(scale):
    tensors = random_tensors(1, 4, 2, 300, 300, 128, torch.bfloat16, "bhld")
    check(*tensors, is_causal=True, scale=scale)


@hopper
def test_scores_far_below_zero():
    q, k, v, grad_out = random_tensors(2, 8, 2, 500, 333, 128, torch.float16, "bhld")
    check(q.abs(), k - 6, v, grad_out)


@hopper
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("kv_heads", "dim"), [(8, 128), (32, 128), (8, 64)])
def test_more_work_than_multiprocessors(kv_heads, dim, is_causal):
    q, k, v, grad_out = random_tensors(2, 32, kv_heads, 1500, 1500, dim, torch.bfloat16, "blhd")
    group = 32 // kv_heads
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    key, value = (x.repeat_interleave(group, 1) for x in leaves[1:])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        q, *(x.repeat_interleave(group, 1).detach() for x in (k, v)), 0.0, is_causal
    )[:2]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = F.scaled_dot_product_attention(leaves[0], key, value, is_causal=is_causal)
    expected = [x.double() for x in torch.autograd.grad(theirs, leaves, grad_out)]
    grads = run(q, k, v, grad_out, out, lse, is_causal=is_causal)
    assert max(relative_errors(grads, expected)) < 1e-2
    for _ in range(5):
        assert all(map(torch.equal, grads, run(q, k, v, grad_out, out, lse, is_causal=is_causal)))


def gradients(q, k, v, grad_out, is_causal=True):
    out, lse = ours.attention_forward(q, k, v, is_causal=is_causal, enable_gqa=True)
    return ours.attention_backward(
        grad_out, q, k, v, None, out, lse, is_causal=is_causal, enable_gqa=True
    )


@hopper
def test_the_op_runs_it_and_a_graph_repeats_it():
    q, k, v, grad_out = random_tensors(2, 32, 8, 512, 512, 128, torch.bfloat16, "blhd")
    expected = gradients(q, k, v, grad_out)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gradients(q, k, v, grad_out)
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    assert "flash_attention_backward_hopper_kernel" in names
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(q, k, v, grad_out)
    for _ in range(4):
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, captured, expected))


@hopper
def test_two_streams_at_once():
    first, second = (
        random_tensors(2, 16, 4, n, n, 128, torch.bfloat16, "blhd") for n in (1024, 900)
    )
    expected = gradients(*first), gradients(*second, is_causal=False)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = [[], []]
    for _ in range(8):
        with torch.cuda.stream(streams[0]):
            found[0].append(gradients(*first))
        with torch.cuda.stream(streams[1]):
            found[1].append(gradients(*second, is_causal=False))
    torch.cuda.synchronize()
    for grads, runs in zip(expected, found, strict=True):
        assert all(all(map(torch.equal, grads, again)) for again in runs)


@hopper
def test_autograd():
    q, k, v, grad_out = random_tensors(1, 8, 2, 700, 700, 64, torch.float16, "blhd")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    ours.attention(*leaves, is_causal=True, enable_gqa=True).backward(grad_out)
    _, _, expected = exact(q, k, v, grad_out, True, 0.125)
    assert max(relative_errors([x.grad for x in leaves], expected)) < 1e-3


if __name__ == "__main__":
    compile_forms()
