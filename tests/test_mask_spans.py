"""What a mask's spans say of it, against the mask itself; and attention that goes by them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import triton_only_backend  # noqa: F401
from triton_only_backend.errors import UnsupportedProblemError
from triton_only_backend.kernels import mask_spans as module
from triton_only_backend.kernels.attention_configs import FlashConfig
from triton_only_backend.kernels.flash_attention import flash_attention
from triton_only_backend.kernels.mask_spans import broadcast_mask_spans, mask_spans

SPAN_ROWS, SPAN_CHUNK = module.SPAN_ROWS.value, module.SPAN_CHUNK.value
LARGE = 2**31 - 1


MASKS = (
    "causal", "a mask a head", "random", "all", "nothing", "a cache that is not full", "one query",
    "a row of keys", "transposed", "no key",
)  # fmt: skip


def masks(device):
    """Boolean masks (B, H, L_q, L_kv) of many kinds, with their names: those of MASKS."""
    torch.manual_seed(0)
    causal = torch.ones(70, 300, dtype=torch.bool, device=device).tril(200)
    yield "causal", causal.expand(2, 3, 70, 300)
    yield "a mask a head", torch.stack([causal, ~causal]).expand(2, 2, 70, 300)
    yield "random", torch.rand(2, 1, 70, 300, device=device).gt(0.5).expand(2, 3, 70, 300)
    yield "all", torch.ones(1, 1, 70, 300, dtype=torch.bool, device=device).expand(2, 3, 70, 300)
    yield "nothing", torch.zeros(2, 3, 70, 300, dtype=torch.bool, device=device)
    slots = torch.arange(300, device=device) <= torch.arange(40, 110, device=device)[:, None]
    yield "a cache that is not full", slots.expand(2, 3, 70, 300)
    yield "one query", slots[:1].expand(2, 3, 1, 300)
    padded = torch.rand(2, 1, 1, 300, device=device).gt(0.1)
    yield "a row of keys", padded.expand(2, 3, 70, 300)
    yield "transposed", torch.rand(300, 70, device=device).gt(0.01).T.expand(2, 3, 70, 300)
    yield "no key", torch.ones(2, 3, 70, 0, dtype=torch.bool, device=device)


def test_spans_are_those_of_the_mask(device):
    assert [name for name, _ in masks(device)] == list(MASKS)
    for name, mask in masks(device):
        spans = mask_spans(mask)
        *lead, len_q, len_kv = mask.shape
        tiles, chunks = -(-len_q // SPAN_ROWS), -(-len_kv // SPAN_CHUNK)
        assert spans.shape == (*lead, tiles, chunks, 2), name
        assert torch.equal(spans, broadcast_mask_spans(mask)), name
        for tile in range(tiles):
            rows = mask[:, :, tile * SPAN_ROWS : (tile + 1) * SPAN_ROWS]
            for chunk in range(chunks):
                keys = slice(chunk * SPAN_CHUNK, (chunk + 1) * SPAN_CHUNK)
                hidden = (~rows[..., keys].all(2)).int()
                seen = rows[..., keys].any(2).int()
                number = torch.arange(hidden.shape[-1], device=device) + chunk * SPAN_CHUNK
                first = torch.where(hidden.bool(), number, LARGE).amin(-1)
                last = torch.where(seen.bool(), number + 1, 0).amax(-1)
                assert torch.equal(spans[:, :, tile, chunk, 0].long(), first), name
                assert torch.equal(spans[:, :, tile, chunk, 1].long(), last), name


@pytest.mark.parametrize("shape", [(40, 300), (3, 40, 300), (2, 1, 2, 3, 40, 300), (0, 2, 5, 7)])
def test_any_number_of_dimensions(shape, device):
    mask = torch.rand(shape, device=device).gt(0.01)
    expected = mask_spans(mask.reshape(-1, 1, *shape[-2:]))
    actual = torch.ops.triton_only.mask_spans(mask)
    assert torch.equal(actual, expected.reshape(actual.shape))


def test_what_is_no_boolean_mask_is_refused(device):
    for mask in (torch.zeros(4, 4, device=device), torch.ones(4, device=device).bool()):
        with pytest.raises(UnsupportedProblemError, match="a boolean mask of two or more"):
            torch.ops.triton_only.mask_spans(mask)


def assert_as_accurate(actual, q, k, v, mask, name):
    """Whether attention is as near to fp64's as PyTorch's own; a query that sees no key gives 0."""
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    exact = torch.where(mask.any(-1, keepdim=True), exact, 0.0)
    vendor = F.scaled_dot_product_attention(q, k, v, mask)
    vendor = torch.where(mask.any(-1, keepdim=True), vendor, 0.0)
    error, vendor_error = ((t.double() - exact).norm().item() for t in (actual, vendor))
    rounding = torch.finfo(q.dtype).eps * exact.norm().item()
    assert error <= 2 * max(vendor_error, rounding), name


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_tiles_of_any_height_go_by_them(block_m, name, device):
    mask = dict(masks(device))[name]
    q = torch.randn(*mask.shape[:3], 16, device=device)
    k = torch.randn(*mask.shape[:2], mask.shape[3], 16, device=device)
    # What a mask hides must not be read into the result.
    k = k.masked_fill(~mask.any(2)[..., None], 1e4)
    out = torch.empty_like(q)
    # Scores of fp32 take as many multiplications a thread as there are in a tile: with 4 warps, the
    # largest took 9 s to compile.
    config = FlashConfig(block_m, 128, max(4, block_m // 8), 1)
    options = {"is_causal": False, "scale": 0.25, "config": config, "precision": "ieee"}
    flash_attention(q, k, k, mask, out, None, **options)
    assert_as_accurate(out, q, k, k, mask, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_goes_by_them(dtype, device):
    for name, mask in masks(device):
        batch, heads, len_q, len_kv = mask.shape
        q = torch.randn(batch, heads, len_q, 32, device=device).to(dtype)
        k, v = (torch.randn(batch, heads, len_kv, 32, device=device).to(dtype) for _ in range(2))
        # What a mask hides must not be read into the result.
        unseen = ~mask.any(2)[..., None]
        poisoned = k.masked_fill(unseen, 1e4)
        actual = torch.ops.triton_only.attention(q, poisoned, v, mask)
        assert_as_accurate(actual, q, k, v, mask, name)
