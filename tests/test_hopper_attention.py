"""Attention of many queries on Hopper: when it runs, the parts that can run here, and what compiles.

The compile test runs this file as a script in a process of its own, where Triton compiles rather
than interprets. On a Hopper GPU the kernel runs against fp64, with cuDNN's error as the yardstick.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import sys
import types
from dataclasses import replace

import cross_compile
import pytest
import torch
import torch.nn.functional as F
from attention_reference import DEVICE, reference
from on_hopper import hopper, random_heads

from triton_only_backend.kernels import hardware, sdpa, tuned
from triton_only_backend.kernels.attention_arguments import Inputs, Options, operands
from triton_only_backend.kernels.attention_configs import AttentionProblem, FlashConfig
from triton_only_backend.kernels.hopper_attention_configs import (
    MASKED,
    THREE_GROUPS,
    TWO_GROUPS,
    heads_of_section,
    hopper_flash_shared_memory,
    select_hopper_flash,
    takes,
)
from triton_only_backend.kernels.mask_spans import mask_spans

H200 = cross_compile.TARGETS["sm90"][2]
PREFILL = AttentionProblem(2, 32, 8, 4096, 4096, 128, 128, 2, True, False)
SHIPPED = [
    *((config, d) for kind in (TWO_GROUPS, MASKED) for d, config in kind.items()),
    (THREE_GROUPS, 64),
]


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, TWO_GROUPS[128]),
        ({"is_causal": False}, TWO_GROUPS[128]),
        ({"is_causal": False, "has_mask": True}, MASKED[128]),
        ({"head_dim": 64}, THREE_GROUPS),
        ({"head_dim": 64, "len_q": 2048}, TWO_GROUPS[64]),
        ({"head_dim": 64, "len_q": 2048, "is_causal": False}, THREE_GROUPS),
        ({"head_dim": 64, "len_q": 1024, "is_causal": False}, TWO_GROUPS[64]),
        ({"head_dim": 64, "has_mask": True, "is_causal": False}, MASKED[64]),
        ({"len_q": 65}, None),
        ({"len_q": 65, "batch": 4}, TWO_GROUPS[128]),
        ({"len_q": 64, "batch": 64}, None),
        ({"len_q": 256}, TWO_GROUPS[128]),
        ({"len_q": 256, "batch": 1}, None),
    ],
    ids=str,
)
def test_choice(changes, expected):
    problem = replace(PREFILL, **changes)
    problem = replace(problem, head_dim_v=problem.head_dim)
    assert select_hopper_flash(problem, H200) == expected


@pytest.mark.parametrize("name", [name for name in cross_compile.TARGETS if name != "sm90"])
def test_other_gpus_do_not_take_it(name):
    assert select_hopper_flash(PREFILL, cross_compile.TARGETS[name][2]) is None


def test_another_gluon_does_not_take_it(monkeypatch):
    monkeypatch.setattr(hardware, "gluon_is_known", lambda: False)
    assert select_hopper_flash(PREFILL, H200) is None


def test_a_forced_configuration_is_measured():
    with tuned.forcing("decode_attention", None):
        assert select_hopper_flash(PREFILL, H200) is not None
    with tuned.forcing("flash_attention", FlashConfig(64, 64, 4, 2)):
        assert select_hopper_flash(PREFILL, H200) is None


@pytest.mark.parametrize(("config", "head_dim"), SHIPPED, ids=str)
def test_fits_the_shared_memory_and_the_registers(config, head_dim):
    assert hopper_flash_shared_memory(config, head_dim) <= H200.shared_memory
    threads = 128 * (config.groups * config.registers + config.loading_registers)
    assert threads <= 65536


def inputs(
    len_q=100, len_kv=90, dim=64, dim_v=None, dtype=torch.bfloat16, mask=None, layout="bhld"
):
    shapes = ((2, 4, len_q, dim), (2, 2, len_kv, dim), (2, 2, len_kv, dim_v or dim))
    if layout == "blhd":
        made = [torch.zeros(b, n, h, d, dtype=dtype).transpose(1, 2) for b, h, n, d in shapes]
    else:
        made = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    if layout == "unaligned":
        made[1] = torch.zeros(2, 2, len_kv, dim + 1, dtype=dtype)[..., :dim]
    if layout == "expanded":
        made[2] = made[2][:1].expand(2, -1, -1, -1)
    attn_mask = None if mask is None else torch.ones(len_q, len_kv, dtype=mask)
    return Inputs(*made, attn_mask)


@pytest.mark.parametrize(
    ("given", "options", "expected"),
    [
        ({}, {}, True),
        ({"dim": 128, "dtype": torch.float16}, {"is_causal": True}, True),
        ({"layout": "blhd"}, {"is_causal": True}, True),
        ({"mask": torch.bool}, {}, True),
        ({"len_q": 1, "len_kv": 1}, {"scale": 1.0}, True),
        ({"mask": torch.bool}, {"is_causal": True}, False),
        ({"mask": torch.bfloat16}, {}, False),
        ({"dtype": torch.float32}, {}, False),
        ({"dim": 80}, {}, False),
        ({"dim": 256}, {}, False),
        ({"dim": 64, "dim_v": 128}, {}, False),
        ({"len_kv": 0}, {}, False),
        ({"layout": "unaligned"}, {}, False),
        ({"layout": "expanded"}, {}, False),
        ({}, {"scale": 0.0}, False),
        ({}, {"scale": -0.5}, False),
        ({}, {"scale": 1e-40}, False),
        ({}, {"scale": math.inf}, False),
        ({}, {"scale": math.nan}, False),
        ({}, {"softcap": 5.0}, False),
        ({}, {"dropout_p": 0.5}, False),
        ({}, {"window_left": 7}, False),
        ({}, {"window_right": 0}, False),
    ],
    ids=str,
)
def test_takes(given, options, expected):
    options = Options(enable_gqa=True, **options)
    assert takes(operands(inputs(**given), True), options) is expected


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_what_it_is_launched_with(masked, monkeypatch):
    calls = []
    stand_in = types.SimpleNamespace(
        flash_attention_hopper=lambda *tensors, **options: calls.append((tensors, options))
    )
    monkeypatch.setattr(hardware, "of", lambda device: replace(H200, num_sms=3))
    monkeypatch.setitem(sys.modules, f"{sdpa.__package__}.flash_attention_hopper", stand_in)
    given = inputs(mask=torch.bool if masked else None, layout="blhd")
    spans = torch.zeros(7, 1, 2, dtype=torch.int32) if masked else None
    output, lse = sdpa.forward(
        given, Options(is_causal=not masked, enable_gqa=True), with_logsumexp=True, spans=spans
    )
    ((tensors, options),) = calls
    query, key, value, mask, out, out_lse = tensors
    assert query.data_ptr() == given.query.data_ptr()
    assert key.shape == value.shape == (2, 2, 90, 64)
    assert (out.data_ptr(), out_lse.data_ptr()) == (output.data_ptr(), lse.data_ptr())
    assert (mask is None) is not masked
    spans = options.pop("spans")
    assert (spans.shape if masked else spans) == ((2, 4, 7, 1, 2) if masked else None)
    config = (MASKED if masked else TWO_GROUPS)[64]
    expected = {"is_causal": not masked, "scale": 0.125, "config": config, "num_sms": 3}
    assert options == expected


# --- parts of the kernel, on the CPU --------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch):
    """The module of the kernel's parts, run by Python: its `gl` is torch, one program at a time."""
    tiles = pytest.importorskip("triton_only_backend.kernels.hopper_attention_tiles")
    if not hardware.gluon_is_known():
        pytest.skip("no Gluon that is known")

    def load(addresses, mask, other):
        return torch.where(mask, tiles.memory[torch.where(mask, addresses, 0)], other)

    def where(condition, a, b):
        if isinstance(condition, bool):
            return a if condition else b
        return torch.where(condition, a, b)

    def pairwise(function):
        tensors = {min: torch.minimum, max: torch.maximum}[function]

        def call(a, b):
            if isinstance(a, torch.Tensor) and a.dim():
                return tensors(a, torch.as_tensor(b))
            return function(int(a), int(b))

        return call

    fake = types.SimpleNamespace(
        SliceLayout=lambda *_: None, BlockedLayout=lambda *_: None, constexpr=None,
        int32=torch.int32, int64=torch.int64, where=where, load=load,
        minimum=pairwise(min), maximum=pairwise(max),
        cdiv=lambda a, b: -(-a // b), static_range=range,
        arange=lambda start, stop, _: torch.arange(start, stop, dtype=torch.int32),
        full=lambda shape, value, dtype, _: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
        min=lambda x, axis: x.amin(axis), max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis, dtype=torch.int32), convert_layout=lambda x, _: x,
        multiple_of=lambda x, _: x, max_contiguous=lambda x, _: x,
    )  # fmt: skip
    for name, value in list(vars(tiles).items()):
        if type(value).__name__ == "GluonJITFunction":
            monkeypatch.setattr(tiles, name, value.fn)
        elif type(value).__name__ == "constexpr":
            monkeypatch.setattr(tiles, name, value.value)
    monkeypatch.setattr(tiles, "gl", fake)
    return tiles


SCHEDULES = [
    (tiles, kv_heads * group * batch, group, length, programs)
    for batch, kv_heads, group, (tiles, length), programs in itertools.product(
        (1, 3), (1, 8, 32), (1, 4), ((1, 100), (3, 300), (40, 5000), (128, 16384)), (1, 7, 132)
    )
]


@pytest.mark.parametrize("case", SCHEDULES, ids=str)
def test_each_tile_of_queries_is_somebodys(case, parts):
    tiles, heads, group, len_kv, programs = case
    programs = min(programs, tiles * heads)
    section_heads = heads_of_section(tiles, heads, group, 512 * len_kv, programs)
    assert section_heads % group == 0
    found = collections.Counter()
    work = collections.Counter()
    for program in range(programs):
        parts.gl.program_id = lambda _, program=program: program
        parts.gl.num_programs = lambda _: programs
        for section in range(-(-heads // section_heads)):
            turns, before = parts.rounds_of_section(section, tiles, heads, section_heads)
            for turn in range(turns):
                start_m, head = parts.work_item(
                    section, turn, before, tiles, heads, section_heads, 128
                )
                found[start_m, head] += 1
                work[program] += start_m // 128 + 1
    assert found == dict.fromkeys(itertools.product(range(0, 128 * tiles, 128), range(heads)), 1)
    if tiles * heads >= 8 * programs:
        assert max(work.values()) <= 1.25 * sum(work.values()) / programs


def test_sections_are_whole_rounds():
    # 32 KV heads of 16 tiles: 16 heads are 256 tiles, two rounds of 132.
    assert heads_of_section(16, 64, 1, 1 << 20, 132) == 16
    # A head of 40 tiles, 2.4 MB: six are 240 of 264, and nine 360 of 396.
    assert heads_of_section(40, 64, 1, 5000 * 512, 132) in (6, 9)
    # Few tiles: as many heads as there are programs to take one each.
    assert heads_of_section(1, 1024, 4, 64 << 20, 132) >= 66


MASKS = ("causal", "cache", "padded", "random", "none", "all")


def make_mask(kind, len_q, len_kv, device="cpu", batch=1):
    rows = torch.arange(len_q, device=device)[:, None]
    keys = torch.arange(len_kv, device=device)
    mask = {
        "causal": keys <= rows,
        "cache": keys <= rows + len_kv // 3,
        "padded": (keys <= rows + len_kv // 3) & (keys >= 70),
        "random": torch.rand(
            len_q, len_kv, generator=torch.Generator().manual_seed(3)
        ).to(device) < 0.5,
        "none": torch.zeros(len_q, len_kv, dtype=torch.bool, device=device),
        "all": torch.ones(len_q, len_kv, dtype=torch.bool, device=device),
    }[kind]  # fmt: skip
    mask = mask.expand(batch, 1, len_q, len_kv).clone()
    if kind == "padded":
        mask[-1, :, :, : len_kv // 2] = False
    return mask


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("len_q", "len_kv"), [(150, 300), (129, 4999)])
def test_tiles_that_a_mask_hides(kind, len_q, len_kv, parts):
    mask = make_mask(kind, len_q, len_kv)[0, 0]
    spans = mask_spans(mask.to(DEVICE)).cpu()
    parts.memory = spans.flatten()
    zero = torch.tensor(0)
    for start_m in range(0, len_q, 128):
        tiles, masked = parts.tiles_of_keys(
            (zero, None, zero, (0, 0, *spans.stride()[:2])),
            zero, zero, start_m, len_q, len_kv, 128, 4, False,
        )  # fmt: skip
        seen = mask[start_m : start_m + 128]
        assert 1 <= tiles <= -(-len_kv // 128)
        assert not seen[:, tiles * 128 :].any()
        assert seen[:, : masked * 128].all()
        assert masked <= tiles
        if kind == "causal":
            assert (tiles, masked) == (start_m // 128 + 1, start_m // 128)


@pytest.mark.parametrize("aligned", [False, True], ids=["bytes", "aligned"])
@pytest.mark.parametrize("column", [0, 128, 256])
def test_a_tile_of_a_mask(column, aligned, parts):
    len_q, len_kv, row = 100, 300, 64
    mask = make_mask("random", len_q, len_kv)[0, 0]
    parts.memory = mask.flatten().to(torch.uint8)
    zero = torch.tensor(0)
    even = column + 128 <= len_kv
    tile = parts.load_mask(
        (zero, (0, 0, len_kv, 1), None, None), zero, zero, row, column, len_q, len_kv, even, aligned
    )
    scores = torch.randn(64, 128)
    scores_type = types.SimpleNamespace(layout=None)
    fake = types.SimpleNamespace(shape=(64, 128), type=scores_type)
    where = parts.gl.where
    parts.gl.where = lambda seen, a, b: where(seen, scores if a is fake else a, b)
    hidden = parts.hide_by_mask(fake, parts.pack(tile)) == float("-inf")
    expected = torch.ones(64, 128, dtype=torch.bool)
    visible = mask[row : row + 64, column : column + 128]
    expected[: visible.shape[0], : visible.shape[1]] = ~visible
    assert torch.equal(hidden, expected)


# --- compiling for Hopper -------------------------------------------------------------------------

FORMS = [
    # config, head_dim, len_kv, is_causal, mask, lse, out
    *((c, d, 1024, causal, "", False, "tma") for causal in (True, False) for c, d in SHIPPED
      if (c, d) not in [(c, d) for d, c in MASKED.items()]),
    *((c, d, 1024, False, "aligned", False, "tma") for d, c in MASKED.items()),
    (TWO_GROUPS[128], 128, 1000, True, "", True, "odd"),
    (THREE_GROUPS, 64, 1000, False, "", True, "odd"),
    (MASKED[128], 128, 1000, False, "bytes", True, "odd"),
]  # fmt: skip


def compile_forms():
    """Prints a row of JSON for each form, in a process where Triton compiles."""
    compiled = cross_compile.compile_for("sm90")
    from triton_only_backend.kernels.flash_attention_hopper import flash_attention_hopper

    for config, dim, len_kv, is_causal, mask, lse, out in FORMS:
        compiled.clear()
        like = {"dtype": torch.bfloat16, "device": "meta"}
        q, k = torch.empty(2, 32, 512, dim, **like), torch.empty(2, 8, len_kv, dim, **like)
        width = dim if out == "tma" else dim + 3
        attn_mask = spans = None
        if mask:
            attn_mask = torch.empty(2, 1, 512, len_kv, dtype=torch.bool, device="meta")
            spans = torch.empty(2, 1, 32, 8, 2, dtype=torch.int32, device="meta")
            attn_mask, spans = attn_mask.expand(-1, 32, -1, -1), spans.expand(-1, 32, -1, -1, -1)
        flash_attention_hopper(
            q, k, k, attn_mask, torch.empty(2, 512, 32, width, **like).transpose(1, 2)[..., :dim],
            torch.empty(2, 32, 512, device="meta") if lse else None,
            is_causal=is_causal, scale=0.1, config=config, num_sms=132, spans=spans,
        )  # fmt: skip
        (kernel,) = compiled
        ptx = kernel.asm["ptx"]
        row = {
            "mask": mask,
            "spilled": kernel.spilled,
            "shared": kernel.shared_memory,
            "bound": hopper_flash_shared_memory(config, dim),
            "wgmma": ptx.count("wgmma.mma_async"),
            "tma": ptx.count("cp.async.bulk.tensor"),
            "stores": ptx.count("cp.async.bulk.tensor.4d.global"),
            "sixteen": ptx.count("ld.global.v4.b32"),
        }
        print(json.dumps(row), flush=True)


def test_compiles():
    import triton

    for form, row in cross_compile.rows_of_gluon(__file__, FORMS):
        assert row["shared"] <= row["bound"] <= H200.shared_memory, row
        # Of a mask's bookkeeping one to five integers, outside the loops over keys. Triton 3.9
        # keeps more of three groups.
        newer = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
        assert row["spilled"] <= (24 if form[4] else 256 if newer else 0), row
        assert row["wgmma"] > 0
        assert row["tma"] > 0
        assert (row["stores"] > 0) is (form[6] == "tma")
        # Of each group's two loads of a mask, all of them: 64 rows of 128 bytes.
        assert row["sixteen"] == (16 if form[4] == "aligned" else 0), row


# --- on a Hopper GPU ------------------------------------------------------------------------------

ours = torch.ops.triton_only


def random_inputs(batch, heads, kv_heads, len_q, len_kv, dim, dtype, order):
    sizes = ((heads, len_q), (kv_heads, len_kv), (kv_heads, len_kv))
    return tuple(random_heads(batch, h, n, dim, dtype, order) for h, n in sizes)


def config_for(dim, mask, groups):
    if groups == 3:
        return THREE_GROUPS
    return (TWO_GROUPS if mask is None else MASKED)[dim]


def run(q, k, v, mask=None, *, is_causal=False, groups=2, out=None, spans=None, scale=None):
    """Output and log-sum-exp, where each was NaN before."""
    from triton_only_backend.kernels.flash_attention_hopper import flash_attention_hopper

    out = torch.full_like(q, float("nan")) if out is None else out
    lse = torch.full(q.shape[:3], float("nan"), device=q.device)
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    flash_attention_hopper(
        q, k, v, mask, out, lse, is_causal=is_causal, scale=scale or q.shape[3] ** -0.5,
        config=config_for(q.shape[3], mask, groups), num_sms=132, spans=spans,
    )  # fmt: skip
    return out, lse


def check_against_fp64(q, k, v, out, lse, mask=None, *, is_causal=False, scale=None):
    """At most twice the error of PyTorch's own kernel, and a unit in the last place."""
    scale = scale or q.shape[3] ** -0.5
    expected, expected_lse = reference(q, k, v, mask, scale, is_causal=is_causal)
    if mask is not None:
        # PyTorch 2.11's own kernel reads a mask of one column at misaligned addresses.
        mask = mask.expand(*q.shape[:3], k.shape[2]).contiguous()
    theirs = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    unit = torch.finfo(q.dtype).eps * max(1.0, expected.abs().max().item())
    error = (out.double() - expected).abs().max().item()
    granted = 2 * (theirs.double() - expected).nan_to_num().abs().max().item() + unit
    assert error <= granted
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


LENGTHS = [
    (1, 1), (64, 64), (65, 129), (127, 128), (128, 127), (129, 1), (300, 777), (777, 300),
    (1000, 1000), (385, 2049),
]  # fmt: skip


@hopper
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("dim", "groups"), [(128, 2), (64, 2), (64, 3)])
@pytest.mark.parametrize(("len_q", "len_kv"), LENGTHS)
def test_lengths(len_q, len_kv, dim, groups, is_causal):
    for dtype, order in ((torch.bfloat16, "bhld"), (torch.float16, "blhd")):
        q, k, v = random_inputs(2, 6, 2, len_q, len_kv, dim, dtype, order)
        out, lse = run(q, k, v, is_causal=is_causal, groups=groups)
        check_against_fp64(q, k, v, out, lse, is_causal=is_causal)


@hopper
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("len_q", "len_kv"), [(64, 64), (130, 256), (500, 777), (777, 776), (256, 4999)]
)
def test_masks(len_q, len_kv, dim, kind):
    q, k, v = random_inputs(2, 4, 2, len_q, len_kv, dim, torch.bfloat16, "blhd")
    mask = make_mask(kind, len_q, len_kv, "cuda", batch=2)
    out, lse = run(q, k, v, mask)
    check_against_fp64(q, k, v, out, lse, mask)
    view = mask.expand(2, 4, len_q, len_kv)
    spans = mask_spans(mask).expand(2, 4, -1, -1, -1)
    again, again_lse = run(q, k, v, view, spans=spans)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)
    by_rows = torch.empty(2, 1, len_kv, len_q, dtype=torch.bool, device="cuda").mT.copy_(mask)
    assert torch.equal(out, run(q, k, v, by_rows)[0])


@hopper
def test_a_mask_of_a_row_and_of_a_column():
    q, k, v = random_inputs(2, 4, 2, 200, 300, 128, torch.bfloat16, "bhld")
    for shape in ((2, 1, 1, 300), (1, 4, 200, 1), (2, 4, 200, 300)):
        mask = torch.rand(shape, device="cuda") > 0.3
        out, lse = run(q, k, v, mask)
        check_against_fp64(q, k, v, out, lse, mask)


@hopper
@pytest.mark.parametrize("order", ["bhld", "blhd", "packed"])
@pytest.mark.parametrize("stored", ["tma", "odd", "transposed"])
def test_layouts(order, stored):
    q, k, v = random_inputs(3, 4, 4, 333, 444, 128, torch.float16, order)
    out = torch.full_like(q, float("nan"))
    if stored == "odd":
        out = q.new_full((3, 4, 333, 131), float("nan"))[..., :128]
    elif stored == "transposed":
        out = q.new_full((3, 4, 128, 333), float("nan")).mT
    out, lse = run(q, k, v, is_causal=True, out=out)
    check_against_fp64(q, k, v, out, lse, is_causal=True)


@hopper
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_scales(scale):
    q, k, v = random_inputs(1, 4, 2, 200, 300, 128, torch.bfloat16, "bhld")
    out, lse = run(q, k, v, is_causal=True, scale=scale)
    check_against_fp64(q, k, v, out, lse, is_causal=True, scale=scale)


@hopper
@pytest.mark.parametrize("kv_heads", [8, 32])
@pytest.mark.parametrize(("dim", "groups"), [(128, 2), (64, 3)])
def test_more_work_than_programs_is_bitwise_repeatable(kv_heads, dim, groups):
    q, k, v = random_inputs(2, 32, kv_heads, 1100, 1100, dim, torch.bfloat16, "blhd")
    for is_causal in (True, False):
        first = run(q, k, v, is_causal=is_causal, groups=groups)
        for _ in range(3):
            again = run(q, k, v, is_causal=is_causal, groups=groups)
            assert all(map(torch.equal, first, again))
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        torch.testing.assert_close(first[0], theirs, rtol=2e-2, atol=2e-2)


@hopper
def test_the_op_runs_it_captured_and_with_gradients():
    q, k, v = random_inputs(2, 32, 8, 512, 768, 128, torch.bfloat16, "blhd")
    mask = make_mask("causal", 512, 768, "cuda", batch=2)
    spans = ours.mask_spans(mask)

    def attend():
        return ours.attention(q, k, v, mask, enable_gqa=True, spans=spans)

    expected = attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        attend()
        torch.cuda.synchronize()
    assert {event.key for event in profile.key_averages()} & {"flash_attention_hopper_kernel"}

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    ours.attention(*leaves, is_causal=True, enable_gqa=True).square().sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    whole = [exact[0], *(x.repeat_interleave(4, 1) for x in exact[1:])]
    F.scaled_dot_product_attention(*whole, is_causal=True).square().sum().backward()
    for ours_grad, grad in zip(leaves, exact, strict=True):
        error = (ours_grad.grad.double() - grad.grad).norm() / grad.grad.norm()
        assert error < 1e-2


if __name__ == "__main__":
    compile_forms()
