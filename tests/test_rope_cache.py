"""Rotary embedding, cache write and decode attention in one op, against the three apart."""

from __future__ import annotations

import itertools
import json

import cross_compile
import pytest
import torch
import torch.nn.functional as F

import triton_only_backend  # noqa: F401
from triton_only_backend.errors import UnsupportedProblemError
from triton_only_backend.kernels.decode_configs import DecodeConfig

op = torch.ops.triton_only.attention_rope_cache
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def rotate(x, cos, sin, rope):
    """The embedding in fp64, rounded to x's dtype; cos and sin are (B, 1, W)."""
    if rope == "none":
        return x
    y, cos, sin = x.double().clone(), cos.double()[:, None], sin.double()[:, None]
    width = cos.shape[-1]
    if rope == "half":
        half = width // 2
        y1, y2 = x.double()[..., :half], x.double()[..., half:width]
        y[..., :half] = y1 * cos[..., :half] - y2 * sin[..., :half]
        y[..., half:width] = y2 * cos[..., half:] + y1 * sin[..., half:]
    else:
        y1, y2 = x.double()[..., : 2 * width : 2], x.double()[..., 1 : 2 * width : 2]
        y[..., : 2 * width : 2] = y1 * cos - y2 * sin
        y[..., 1 : 2 * width : 2] = y2 * cos + y1 * sin
    return y.to(x.dtype)


def reference(
    q, k, v, cos, sin, k_cache, v_cache, positions, mask, *, rope, scale, dtype=torch.float64
):
    """The new caches and the output, in fp64 but for the roundings that the op makes."""
    batch = q.shape[0]
    if cos is not None:
        cos, sin = (t.reshape(-1, 1, t.shape[-1]).expand(batch, -1, -1) for t in (cos, sin))
    q, k = rotate(q, cos, sin, rope), rotate(k, cos, sin, rope)
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    for b, slot in enumerate(positions.reshape(-1).expand(batch).tolist()):
        if 0 <= slot < k_cache.shape[2]:
            k_cache[b, :, slot], v_cache[b, :, slot] = k[b, :, 0], v[b, :, 0]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    if mask is not None:
        mask = mask.expand(batch, q.shape[1], 1, k_cache.shape[2])
    out = F.scaled_dot_product_attention(
        q.to(dtype), k_cache.to(dtype), v_cache.to(dtype), mask, scale=scale, enable_gqa=True
    )
    return out, k_cache, v_cache


def inputs(batch, heads, kv_heads, length, dim, dim_v=None, dtype=torch.float32, seed=0):
    """query, key, value, caches on the device; random, of unit variance."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    dim_v = dim if dim_v is None else dim_v
    return (
        make(batch, heads, 1, dim), make(batch, kv_heads, 1, dim), make(batch, kv_heads, 1, dim_v),
        make(batch, kv_heads, length, dim), make(batch, kv_heads, length, dim_v),
    )  # fmt: skip


def angles(shape, device, dtype=torch.float32, seed=1):
    angle = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    return angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)


def check(q, k, v, cos, sin, k_cache, v_cache, positions, mask=None, *, rope="half", scale=None):
    """Runs the op; the caches must equal the reference's, the output be as near as torch's."""
    arguments = (q, k, v, cos, sin, k_cache, v_cache, positions, mask)
    expected, k_expected, v_expected = reference(*arguments, rope=rope, scale=scale)
    plain, *_ = reference(*arguments, rope=rope, scale=scale, dtype=q.dtype)
    out = op(*arguments, rope=rope, scale=scale)
    assert out.shape == expected.shape
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(v_cache, v_expected)
    # fp32 products are rounded once more than fp64's: a unit in the last place at most.
    unit = torch.finfo(q.dtype).eps
    torch.testing.assert_close(k_cache, k_expected, rtol=unit, atol=unit)
    slots = positions.reshape(-1).expand(q.shape[0]).tolist()
    for b, slot in enumerate(slots):
        others = torch.arange(k_cache.shape[2], device=q.device) != slot
        assert torch.equal(k_cache[b, :, others], k_expected[b, :, others])
    seen = ~expected.isnan().any(-1)
    error = (out.double() - expected)[seen].abs().max().item()
    torch_error = (plain.double() - expected)[seen].abs().max().item()
    granted = (8 if q.dtype == torch.float32 else 1) * unit * max(1.0, expected[seen].abs().max())
    assert error <= 2 * torch_error + granted, f"error {error:.3g}, torch's {torch_error:.3g}"
    assert (out[~seen] == 0).all()
    return out


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("rope", ["half", "interleaved", "none"])
def test_kinds_and_dtypes(rope, dtype):
    q, k, v, k_cache, v_cache = inputs(2, 4, 2, 37, 64, dtype=dtype)
    cos = sin = None
    if rope != "none":
        cos, sin = angles((2, 1, 64 if rope == "half" else 32), q.device, dtype)
    positions = torch.tensor([[3], [36]], device=q.device)
    check(q, k, v, cos, sin, k_cache, v_cache, positions, rope=rope)


@pytest.fixture(params=["one split", "one launch", "apart"])
def way(request, monkeypatch):
    """How the op runs: one split, three that the last to arrive combines, or in three launches."""
    from triton_only_backend.kernels import decode_attention, rope_cache_attention

    splits = 1 if request.param == "one split" else 3
    config = DecodeConfig(16, splits, 4, 1, 16, 4)
    monkeypatch.setattr(rope_cache_attention, "select_rope_cache_config", lambda *_: config)
    monkeypatch.setattr(rope_cache_attention, "select_short_cache", lambda *_: None)
    launched = []

    def count(module, name):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            launched.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(rope_cache_attention, "rope_cache")
    count(rope_cache_attention, "decode_attention")
    count(decode_attention, "combine_splits")
    if request.param == "apart":
        monkeypatch.setattr(decode_attention, "arrival_counters", lambda *_: None)
    yield request.param
    expected = ["rope_cache", "decode_attention", "combine_splits"]
    assert launched[:3] == (expected if request.param == "apart" else [])


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 20])
def test_head_dimensions_and_groups(group, dim, way):
    q, k, v, k_cache, v_cache = inputs(1, 2 * group, 2, 53, dim, dtype=torch.float16)
    cos, sin = angles((1, dim), q.device)
    check(q, k, v, cos, sin, k_cache, v_cache, torch.tensor([17], device=q.device))


@pytest.mark.parametrize("rope", ["half", "interleaved"])
@pytest.mark.parametrize("width", [2, 6, 32, 40])
def test_the_rest_of_a_partly_rotated_head_passes_through(width, rope, way):
    q, k, v, k_cache, v_cache = inputs(2, 4, 2, 37, 40, 24)
    cos, sin = angles((1, 1, width if rope == "half" else width // 2), q.device)
    positions = torch.tensor([36, 5], device=q.device)
    check(q, k, v, cos, sin, k_cache, v_cache, positions, rope=rope)
    # 0 · infinity is NaN: what passes through must meet no such product.
    k[..., width:] = float("inf")
    op(q, k, v, cos, sin, k_cache, v_cache, positions, rope=rope)
    assert (k_cache[0, :, 36, width:] == float("inf")).all()
    assert k_cache[0, :, 36, :width].isfinite().all()


@pytest.mark.parametrize("position", [0, 15, 16, 31, 32, 47, 48, 52])
def test_every_split_can_have_the_slot(position, way):
    q, k, v, k_cache, v_cache = inputs(1, 4, 2, 53, 16)
    # The cache held NaN where the new key and value go: attention must see the new ones.
    k_cache[:, :, position] = v_cache[:, :, position] = float("nan")
    cos, sin = angles((16,), q.device)
    out = check(q, k, v, cos, sin, k_cache, v_cache, torch.tensor([position], device=q.device))
    assert out.isfinite().all()


@pytest.mark.parametrize(
    "positions", [[3], [[3]], [3, 50], [[3], [50]]], ids=lambda p: str(p).replace(" ", "")
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_positions(positions, dtype, way):
    q, k, v, k_cache, v_cache = inputs(2, 4, 2, 53, 16)
    cos, sin = angles((2, 1, 16), q.device)
    positions = torch.tensor(positions, dtype=dtype, device=q.device)
    check(q, k, v, cos, sin, k_cache, v_cache, positions)


@pytest.mark.parametrize("position", [-54, -1000, 53, 54, 64, 1 << 40])
def test_positions_outside_the_cache_write_nothing(position, way):
    q, k, v, k_cache, v_cache = inputs(1, 4, 2, 53, 16)
    before = k_cache.clone(), v_cache.clone()
    cos, sin = angles((16,), q.device)
    check(q, k, v, cos, sin, k_cache, v_cache, torch.tensor([position], device=q.device))
    assert torch.equal(before[0], k_cache)
    assert torch.equal(before[1], v_cache)


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 53), (1, 1, 53), (53,), (2, 4, 1, 53), (1, 4, 1, 53), (2, 1, 1, 1)], ids=str
)
def test_masks(shape, form, way):
    q, k, v, k_cache, v_cache = inputs(2, 4, 2, 53, 16)
    cos, sin = angles((16,), q.device)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(q.device)
    mask = mask > -1 if form == "bool" else mask
    check(q, k, v, cos, sin, k_cache, v_cache, torch.tensor([40], device=q.device), mask)


def test_a_slot_that_the_mask_hides_is_written(way):
    q, k, v, k_cache, v_cache = inputs(2, 4, 2, 53, 16)
    cos, sin = angles((16,), q.device)
    mask = torch.zeros(1, 1, 1, 53, dtype=torch.bool, device=q.device)
    mask[..., :10] = True
    check(q, k, v, cos, sin, k_cache, v_cache, torch.tensor([40], device=q.device), mask)
    check(q, k, v, cos, sin, k_cache, v_cache, torch.tensor([41], device=q.device), mask & False)


def test_slices_of_a_merged_product_and_strided_caches(way):
    batch, heads, kv_heads, dim, length = 2, 4, 2, 16, 53
    device = "cuda" if torch.cuda.is_available() else "cpu"
    merged = torch.randn(batch, 1, (heads + 2 * kv_heads) * dim, device=device)
    parts = merged.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in parts)
    k_cache = torch.randn(batch, length, kv_heads, dim, device=device).transpose(1, 2)
    v_cache = torch.randn(kv_heads, dim, length, batch, device=device).permute(3, 0, 2, 1)
    cos, sin = (t[..., ::2] for t in angles((batch, 1, 2 * dim), device))
    check(q, k, v, cos, sin, k_cache, v_cache, torch.tensor([19], device=device))
    whole = torch.randn(batch, kv_heads, 2 * length, dim, device=device)
    rest = whole.clone()
    check(q, k, v, cos, sin, whole[:, :, ::2], v_cache, torch.tensor([20], device=device))
    assert torch.equal(whole[:, :, 1::2], rest[:, :, 1::2])


def test_is_causal_and_scale(way):
    q, k, v, k_cache, v_cache = inputs(1, 2, 2, 53, 16)
    cos, sin = angles((16,), q.device)
    check(q, k, v, cos, sin, k_cache, v_cache, torch.tensor([0], device=q.device), scale=-0.4)
    position = torch.tensor([30], device=q.device)
    out = op(q, k, v, cos, sin, k_cache, v_cache, position, is_causal=True)
    torch.testing.assert_close(out, v_cache[:, :, :1])
    torch.testing.assert_close(v_cache[:, :, 30], v[:, :, 0])


def test_each_run_gives_the_same_bits(way):
    q, k, v, k_cache, v_cache = inputs(2, 8, 2, 211, 32, dtype=torch.bfloat16)
    cos, sin = angles((2, 1, 32), q.device)
    position = torch.tensor([210], device=q.device)
    runs = [op(q, k, v, cos, sin, k_cache, v_cache, position) for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("sizes", [(0, 4, 2, 53, 16), (2, 4, 2, 0, 16)], ids=["B=0", "S=0"])
def test_nothing_to_attend_to(sizes):
    q, k, v, k_cache, v_cache = inputs(*sizes)
    cos, sin = angles((16,), q.device)
    out = op(q, k, v, cos, sin, k_cache, v_cache, torch.tensor([0], device=q.device))
    assert out.shape == (sizes[0], 4, 1, 16)
    assert (out == 0).all()


@pytest.mark.parametrize("rope", ["half", "none"])
def test_opcheck(rope):
    q, k, v, k_cache, v_cache = inputs(2, 4, 2, 9, 16, 8)
    cos, sin = angles((2, 1, 12), q.device) if rope == "half" else (None, None)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device=q.device)
    positions = torch.tensor([[1], [8]], device=q.device)
    arguments = (q, k, v, cos, sin, k_cache, v_cache, positions, mask)
    result = torch.library.opcheck(op.default, arguments, {"rope": rope, "scale": 0.3})
    assert set(result.values()) == {"SUCCESS"}, result


prefill = torch.ops.triton_only.rope_cache

COMPILE = """
import json, sys
import torch
import cross_compile
compiled = cross_compile.compile_for(sys.argv[1])
from triton_only_backend.kernels import rope_cache
for dtype, heads, kv_heads, dim, dim_v, rope in json.loads(sys.argv[2]):
    def empty(*shape):
        return torch.empty(*shape, dtype=getattr(torch, dtype), device="meta")
    q, k, v = (
        empty(2, 7, n, d).transpose(1, 2)
        for n, d in ((heads, dim), (kv_heads, dim), (kv_heads, dim_v))
    )
    tables = [None if rope == "none" else empty(1, 7, dim // 2 * (1 + (rope == "half")))] * 2
    rope_cache.rope_cache(
        q, k, v, rope_cache.rotation_of(rope, *tables, q), empty(2, kv_heads, 96, dim),
        empty(2, kv_heads, 96, dim_v), torch.empty(1, 7, dtype=torch.int64, device="meta"),
        torch.empty_like(q),
    )
    kernel = compiled[-1]
    wide = max(kernel.asm.get("ptx", "").count(f"ld.global.{kind}") for kind in ("v4.b32", "v2.b64"))
    print(json.dumps([kernel.spilled, wide]))
"""


@pytest.mark.parametrize(
    "target",
    ["sm90", "gfx942"]
    + [
        pytest.param(t, marks=pytest.mark.exhaustive)
        for t in ("sm80", "sm89", "sm100", "sm120", "gfx950")
    ],
)
def test_the_kernel_compiles(target):
    """Also where keys and values are of unlike widths, which the interpreter does not mind."""
    cases = [
        ["bfloat16", 32, 8, 128, 128, "half"],
        ["bfloat16", 32, 8, 128, 128, "interleaved"],
        ["float16", 4, 2, 80, 40, "half"],
        ["float32", 20, 1, 64, 256, "interleaved"],
        ["float32", 3, 3, 16, 24, "none"],
    ]
    rows = cross_compile.rows_of(COMPILE, target, json.dumps(cases))
    assert len(rows) == len(cases)
    assert all(spilled == 0 for spilled, _ in rows)
    if target.startswith("sm"):
        assert rows[0][1] >= 2  # 16 bytes a load


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("rope", ["half", "interleaved", "none"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "width"), [(4, 2, 64, 64), (21, 3, 80, 32), (9, 9, 16, 16)]
)
def test_many_positions(heads, kv_heads, dim, width, rope, dtype):
    """Strided queries, positions of each sequence, some past the cache, some from its end."""
    q, _, _, k_cache, v_cache = inputs(2, heads, kv_heads, 29, dim, dim + 8, dtype=dtype)
    merged = inputs(2, heads + kv_heads, kv_heads, 1, dim, dtype=dtype, seed=5)[0].expand(
        -1, -1, 7, -1
    )
    merged = (merged * torch.arange(1, 8, device=q.device)[:, None]).to(dtype)
    merged = merged.transpose(1, 2).contiguous().transpose(1, 2)
    q, k = merged[:, :heads], merged[:, heads:]
    v = torch.randn(7, 2, kv_heads, dim + 8, device=q.device).to(dtype).permute(1, 2, 0, 3)
    cos = sin = None
    if rope != "none":
        cos, sin = angles((2, 7, width if rope == "half" else width // 2), q.device, dtype)
    positions = torch.tensor([[5, 0, 28, -1 - 4, 40, -30, 6], [1, 2, 3, 4, 5, 6, 7]])
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    rotated = [rotate(t, cos, sin, rope) for t in (q, k)]
    for b, at in itertools.product(range(2), range(7)):
        slot = int(positions[b, at])
        if -29 <= slot < 29:
            expected_k[b, :, slot] = rotated[1][b, :, at]
            expected_v[b, :, slot] = v[b, :, at]
    out = prefill(q, k, v, cos, sin, k_cache, v_cache, positions.to(q.device), rope=rope)
    unit = torch.finfo(dtype).eps
    near = {"rtol": unit, "atol": 8 * unit}  # of sums of products up to 20
    torch.testing.assert_close(out, rotated[0], **near)
    torch.testing.assert_close(k_cache, expected_k, **near)
    assert torch.equal(v_cache, expected_v)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("rope", ["half", "interleaved", "none"])
@pytest.mark.parametrize("sizes", [(0, 4, 2, 3), (2, 4, 2, 0)], ids=["B=0", "L=0"])
def test_no_positions(sizes, rope):
    batch, heads, kv_heads, length = sizes
    q, k, v, k_cache, v_cache = inputs(batch, heads, kv_heads, 9, 16)
    q, k, v = (t.expand(-1, -1, length, -1) if length else t[:, :, :0] for t in (q, k, v))
    before = k_cache.clone()
    positions = torch.zeros(length, dtype=torch.int64, device=q.device)
    width = 16 if rope == "half" else 8
    for rows in (1, batch):
        tables = [None] * 2 if rope == "none" else angles((rows, length, width), q.device)
        out = prefill(q, k, v, *tables, k_cache, v_cache, positions, rope=rope)
        assert out.shape == q.shape
        assert torch.equal(k_cache, before)


def test_several_positions_of_unlike_length_are_refused():
    q, k, v, k_cache, v_cache = inputs(2, 4, 2, 9, 16)
    positions = torch.zeros(1, dtype=torch.int64, device=q.device)
    with pytest.raises(UnsupportedProblemError, match=r"triton_only\.rope_cache\(.*query's L"):
        many = k.expand(-1, -1, 3, -1)
        prefill(q, many, v, None, None, k_cache, v_cache, positions, rope="none")
    with pytest.raises(UnsupportedProblemError, match=r"rope_cache\(.*shape \(L,\)"):
        prefill(q, k, v, None, None, k_cache, v_cache, positions.expand(3), rope="none")


def bad_calls():
    q, k, v, k_cache, v_cache = inputs(2, 4, 2, 9, 16)
    cos, sin = angles((16,), q.device)
    good = {
        "query": q, "key": k, "value": v, "cos": cos, "sin": sin, "key_cache": k_cache,
        "value_cache": v_cache, "positions": torch.tensor([1], device=q.device),
    }  # fmt: skip
    return {
        "rank": (good | {"query": q[0]}, "four dimensions"),
        "dtype": (good | {"key": k.half()}, "one dtype.*cast"),
        "double": ({n: t.double() if t.dim() == 4 else t for n, t in good.items()}, "cast"),
        "two queries": (good | {"query": q.expand(-1, -1, 2, -1)}, "one position each"),
        "key": (good | {"key": k[:1]}, "key must be"),
        "groups": (good | {"query": q[:, :3]}, "3 query heads cannot share 2"),
        "cache": (good | {"key_cache": k_cache[:, :1]}, "caches must be"),
        "lengths": (good | {"value_cache": v_cache[:, :, :8]}, "caches must be"),
        "positions": (good | {"positions": torch.tensor([1.0])}, "positions must be integers"),
        "three positions": (good | {"positions": torch.tensor([1, 2, 3])}, "positions must be"),
        "rope": (good | {"rope": "quarter"}, "unknown rope"),
        "no angles": (good | {"cos": None}, "both be given"),
        "angles": (good | {"rope": "none"}, "both be given"),
        "width": (good | {"cos": cos[:12]}, "one width"),
        "odd": (good | {"cos": cos[:5], "sin": sin[:5]}, "width of 5"),
        "wide": (good | {"rope": "interleaved"}, "width of 32"),
        "batch": (good | {"cos": cos.expand(3, 1, -1), "sin": sin.expand(3, 1, -1)}, "cos and sin"),
        "mask": (good | {"attn_mask": torch.ones(2, 1, 1, 8, device=q.device)}, "broadcast to"),
        "integers": (good | {"attn_mask": torch.ones(9, dtype=torch.int32)}, "boolean or float"),
        "head": (
            {n: t.repeat(1, 1, 1, 20) if t.dim() == 4 else t for n, t in good.items()}, "over 256",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_calls(), ids=lambda name: name.replace(" ", "-"))
def test_bad_calls_are_refused_by_name(case):
    call, named = bad_calls()[case]
    with pytest.raises(UnsupportedProblemError, match=rf"attention_rope_cache\(query.*{named}"):
        op(**call)
