"""Decode attention with its keys split, combined by the last to arrive or by a second kernel.

The compile tests run this file as a script in a process of its own, where Triton compiles rather
than interprets. By hand, `python tests/test_decode_attention.py sm90` prints its table.
"""

from __future__ import annotations

import json
import re
import sys

import cross_compile
import pytest
import torch
import torch.nn.functional as F
from attention_reference import DEVICE, DTYPES, reference, tensors

from triton_only_backend.kernels.decode_configs import DecodeConfig

THREE_SPLITS = DecodeConfig(16, 3, 4, 1, 16, 4)


def attend(query, key, value, mask=None, *, config=THREE_SPLITS, scale=None, modifiers=None):
    """Output and log-sum-exp of `decode_attention`, from memory that held NaN."""
    from triton_only_backend.kernels.decode_attention import decode_attention

    shape = (*query.shape[:3], value.shape[3])
    out = torch.full(shape, float("nan"), dtype=query.dtype, device=query.device)
    lse = torch.full(shape[:3], float("nan"), device=query.device)
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    decode_attention(
        query, key, value, mask, out, lse, is_causal=False, config=config, precision="ieee",
        scale=query.shape[3] ** -0.5 if scale is None else scale,
        **({} if modifiers is None else {"modifiers": modifiers}),
    )  # fmt: skip
    return out, lse


def check(query, key, value, mask=None, **options):
    """The error is at most twice torch's own in the same dtype, and a unit in the last place."""
    out, lse = attend(query, key, value, mask, **options)
    scale = query.shape[3] ** -0.5
    expected, expected_lse = reference(query, key, value, mask, scale)
    bias = mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
    plain = F.scaled_dot_product_attention(query, key, value, bias, enable_gqa=True)
    error = (out.double() - expected).abs().max().item()
    torch_error = (plain.double() - expected).abs().nan_to_num(0).max().item()
    unit = torch.finfo(query.dtype).eps * max(1.0, expected.abs().max().item())
    granted = 4 * unit if query.dtype == torch.float32 else unit
    assert error <= 2 * torch_error + granted, f"error {error:.3g}, torch's {torch_error:.3g}"
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    return out, lse


@pytest.fixture(params=["one launch", "two launches"])
def launches(request, monkeypatch):
    """Whether there are counters: without, a second kernel combines. Counts its launches."""
    from triton_only_backend.kernels import decode_attention as module

    state = {"two": request.param == "two launches", "combined": 0, "counters": None}
    original = module.combine_splits

    def counters(count, device):
        if state["two"]:
            return None
        state["counters"] = torch.zeros(count, dtype=torch.int32, device=device)
        return state["counters"]

    def combine(*args):
        state["combined"] += 1
        return original(*args)

    monkeypatch.setattr(module, "arrival_counters", counters)
    monkeypatch.setattr(module, "combine_splits", combine)
    return state


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_head_dimensions(dim, dtype, launches):
    check(*tensors(1, 4, 2, 1, 53, dim, dtype=dtype))
    assert launches["combined"] == launches["two"]


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (7, 1), (16, 2)])
def test_head_groups(heads, kv_heads, launches):
    check(*tensors(2, heads, kv_heads, 1, 67, 32))


@pytest.mark.parametrize("len_kv", [17, 31, 48, 97, 131])
@pytest.mark.parametrize("splits", [2, 3, 5, 64])
def test_lengths_and_splits(splits, len_kv, launches):
    config = DecodeConfig(16, splits, 4, 1, 16, 4)
    check(*tensors(1, 2, 1, 3, len_kv, 16, 24), config=config)


def test_values_narrower_than_keys(launches):
    check(*tensors(1, 4, 2, 2, 70, 64, 5, torch.float16))


def test_rows_of_several_tiles(launches):
    check(*tensors(2, 20, 1, 2, 70, 16, dtype=torch.float16))


MASKS = {
    "a row": (2, 1, 1, 83),
    "a row for all": (1, 1, 1, 83),
    "a row a head": (2, 4, 1, 83),
    "a row a query": (1, 1, 3, 83),
    "all": (2, 4, 3, 83),
    "one key": (2, 1, 1, 1),
}


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS.keys())
def test_masks(shape, form, launches):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check(*tensors(2, 4, 2, 3, 83, 16), mask > -0.3 if form == "bool" else mask)


def test_strided_mask(launches):
    mask = torch.rand(83, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.3
    check(*tensors(2, 4, 2, 1, 83, 16), mask.T[:, None, None])


@pytest.mark.parametrize("form", ["row", "rows"])
@pytest.mark.parametrize(
    ("first", "stop"), [(0, 1), (0, 16), (0, 17), (0, 40), (50, 60), (33, 97), (96, 97), (0, 0)]
)
def test_tiles_that_a_mask_hides_are_not_read(first, stop, form, launches):
    # 0 · NaN is NaN: had one of these tiles been read, the result would show it.
    query, key, value = tensors(2, 4, 2, 1 if form == "row" else 2, 97, 16)
    mask = torch.zeros(97, dtype=torch.bool, device=DEVICE)
    mask[first:stop] = True
    hidden = [t for t in range(7) if not mask[16 * t : 16 * t + 16].any()]
    expected, expected_lse = reference(query, key, value, mask, 0.25)
    for tile in hidden:
        key[:, :, 16 * tile : 16 * tile + 16] = float("nan")
        value[:, :, 16 * tile : 16 * tile + 16] = float("nan")
    rows = mask.expand(2, 4, 1, -1) if form == "row" else mask.expand(2, 4, 2, -1).clone()
    out, lse = attend(query, key, value, rows)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_a_long_mask_is_scanned_in_several_steps(monkeypatch, launches):
    from triton_only_backend.kernels import decode_attention as module

    monkeypatch.setattr(module, "SCAN_BYTES", 32)
    mask = torch.zeros(1, 1, 1, 300, dtype=torch.bool, device=DEVICE)
    mask[..., 37] = mask[..., 250] = True
    check(*tensors(1, 2, 2, 1, 300, 16), mask)


def test_window_and_soft_cap(launches):
    from triton_only_backend.kernels.attention_modifiers import Modifiers

    query, key, value = tensors(1, 4, 2, 2, 150, 16)
    distance = torch.arange(150)[None] - (torch.arange(2)[:, None] + 148)
    for window in ((40, 0), (3, 5), (-1, 0), (40, -1)):
        left, right = window
        visible = (distance >= -left) | (left < 0)
        visible &= (distance <= right) | (right < 0)
        out, lse = attend(query, key, value, modifiers=Modifiers(softcap=1.5, window=window))
        expected, expected_lse = reference(query, key, value, visible.to(DEVICE), 0.25, softcap=1.5)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_rows_that_see_no_key_are_zero(launches):
    query, key, value = tensors(2, 2, 1, 1, 70, 16)
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    out, lse = check(query, key, value, mask)
    assert (out[1] == 0).all()
    assert (lse[1] == float("-inf")).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_and_infinity_propagate(launches):
    query, key, value = tensors(3, 1, 1, 1, 70, 16)
    key[0, 0, 3, 0] = value[1, 0, 69, 2] = float("nan")
    value[2, 0, 5, 1] = float("inf")
    out, _ = attend(query, key, value)
    expected, _ = reference(query, key, value, None, 0.25)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


def test_each_run_gives_the_same_bits(launches):
    arguments = tensors(2, 8, 2, 2, 211, 32, dtype=torch.float16)
    runs = [attend(*arguments) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_counters_are_left_at_zero(launches):
    attend(*tensors(2, 40, 2, 1, 97, 16))
    if launches["two"]:
        assert launches["counters"] is None
    else:
        assert launches["counters"].numel() == 2 * 2 * 2
        assert not launches["counters"].any()


@pytest.mark.cpu  # a race on a GPU: the part that is read too early may be there by then
def test_counters_that_were_not_zero_show(monkeypatch):
    # So that the test above means something: the last split is who finds all others counted.
    from triton_only_backend.kernels import decode_attention as module

    ones = torch.ones(64, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(module, "arrival_counters", lambda *_: ones)
    out, _ = attend(*tensors(1, 2, 2, 1, 97, 16))
    expected, _ = reference(*tensors(1, 2, 2, 1, 97, 16), None, 0.25)
    assert not torch.allclose(out.double(), expected, equal_nan=False)


def test_large_combinations_take_two_launches(monkeypatch, launches):
    from triton_only_backend.kernels import decode_attention as module

    monkeypatch.setattr(module, "MAX_ARRIVAL_ELEMENTS", 3 * 2 * 16 - 1)
    check(*tensors(1, 2, 1, 1, 97, 16))
    assert launches["combined"] == 1
    assert launches["counters"] is None


# --- compiling for GPUs that are not here ---------------------------------------------------------

TARGETS = ("sm80", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950")
# (dtype, head dimension, heads, KV heads, keys, mask, rope or None)
CASES = [
    ("bfloat16", 128, 32, 8, 768, None, None),
    ("bfloat16", 128, 32, 8, 777, "bool", None),
    ("bfloat16", 64, 32, 32, 4096, "bfloat16", None),
    ("float16", 256, 16, 8, 8192, "bool", None),
    ("float32", 128, 32, 8, 1000, "bool", None),
    ("bfloat16", 128, 32, 8, 768, "bool", "half"),
    ("bfloat16", 64, 32, 8, 4096, None, "interleaved"),
    ("float16", 128, 32, 8, 777, "bool", "none"),
    ("bfloat16", 256, 8, 4, 8192, "bool", "half"),
]


@pytest.mark.parametrize(
    "target",
    [t if t == "sm90" else pytest.param(t, marks=pytest.mark.exhaustive) for t in TARGETS],
)
def test_kernels_compile(target):
    rows = cross_compile.rows_of(__file__, target)
    names = {row["kernel"] for row in rows}
    fused, fusable = target.startswith("sm"), sum(case[-1] is not None for case in CASES)
    assert len(rows) == 3 * len(CASES) + fusable * (1 if fused else 2)
    expected = {"decode_attention_kernel", "combine_splits_kernel", "rope_cache_kernel"}
    assert names == expected | ({"rope_cache_attention_kernel"} if fused else set())
    for row in rows:
        print(row)
        # Elsewhere ptxas may give 8 bytes for one more program a multiprocessor.
        assert row["spilled"] <= (0 if target == "sm90" and row["case"][1] <= 128 else 16), row
        one_launch = row["counters"] and "combine" not in row["kernel"]
        if fused:
            assert row["ordered"] is one_launch, row
            if "attention" in row["kernel"]:
                assert row["cp_async"] > 0, row
            if "rope_cache_attention" in row["kernel"]:
                assert row["slot_first"], row


def ordered(ptx):
    """Whether a barrier, the addition and a barrier come in this order, and stores before them."""
    events = re.findall(
        r"(bar\.sync|bar\.warp\.sync|barrier\.sync|atom\.global\.gpu\.acq_rel\.add|st\.global|ld\.global\.cg)",
        ptx,
    )
    order = "".join(
        {"b": "B", "a": "A", "s": "S"}.get(event[0], "L") if "ld" not in event else "L"
        for event in events
    )
    return re.search(r"SB+AB+L*", order) is not None and "L" in order.split("A", 1)[1]


def slot_first(ptx):
    """Whether the slot is stored, and a barrier passed, before any key or value is loaded."""
    before = ptx[: ptx.find("cp.async")]
    return 0 <= before.rfind("st.global") < before.rfind("bar.sync")


def compile_cases(target):
    """Prints a row of JSON for each kernel of each case, with counters and without."""
    compiled = cross_compile.compile_for(target)

    from triton_only_backend.kernels import decode_attention as module
    from triton_only_backend.kernels.attention_configs import AttentionProblem
    from triton_only_backend.kernels.decode_configs import select_decode_config
    from triton_only_backend.kernels.rope_cache_attention import attention_rope_cache
    from triton_only_backend.kernels.rope_cache_ops import Inputs

    gpu = cross_compile.TARGETS[target][2]
    for name, dim, heads, kv_heads, length, mask, rope in CASES:
        dtype = getattr(torch, name)

        def empty(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        query, out = empty(2, heads, 1, dim), empty(2, 1, heads, dim).transpose(1, 2)
        cache = empty(2, kv_heads, length, dim)
        bias = None if mask is None else empty(2, 1, 1, length, dtype=getattr(torch, mask))
        config = select_decode_config(
            AttentionProblem(
                2, heads, kv_heads, 1, length, dim, dim, dtype.itemsize, False, bias is not None
            ),
            gpu,
        )
        for counters in (True, False):
            compiled.clear()
            zeros = empty(1 << 16, dtype=torch.int32) if counters else None
            module.arrival_counters = lambda *_, zeros=zeros: zeros
            if rope is not None:
                width = dim if rope == "half" else dim // 2
                angles = None if rope == "none" else empty(2, 1, width)
                key = empty(2, 1, kv_heads, dim).transpose(1, 2)
                inputs = Inputs(
                    query, key, key, angles, angles, cache, cache, empty(1, dtype=torch.int64), bias
                )
                attention_rope_cache(
                    inputs, out, rope=rope, is_causal=False, scale=None, config=config
                )
            else:
                module.decode_attention(
                    query, cache, cache, None if bias is None else bias.expand(2, heads, 1, length),
                    out, None, is_causal=False, scale=0.1, config=config, precision="ieee",
                )  # fmt: skip
            for kernel in compiled:
                ptx = kernel.asm.get("ptx", "")
                row = {"kernel": kernel.name, "counters": counters, "case": [name, dim, length]}
                row.update(
                    registers=kernel.registers, spilled=kernel.spilled,
                    shared=kernel.shared_memory, ordered=ordered(ptx) if ptx else None,
                    cp_async=len(re.findall(r"cp\.async\.c[ag]", ptx)), slot_first=slot_first(ptx),
                )  # fmt: skip
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    compile_cases(sys.argv[1])
