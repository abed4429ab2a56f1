"""Key and value heads of unlike numbers, which `enable_gqa` allows: against PyTorch's mathematics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import triton_only_backend
from triton_only_backend.testing import assert_accurate

ours = torch.ops.triton_only
# Query heads, key heads, value heads.
HEADS = [(8, 2, 4), (8, 4, 2), (6, 2, 3), (6, 1, 3), (4, 4, 1), (4, 2, 4)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def library(query, key, value, mask=None, **options):
    """In fp64 PyTorch's own: it repeats each of key and value to the query's heads."""
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True, **options)


def in_eager_mode(query, key, value, mask=None, **options):
    with triton_only_backend.eager():
        return library(query, key, value, mask, **options)


def compiled(query, key, value, mask=None, **options):
    run = torch.compile(library, backend="triton_only", fullgraph=True)
    return run(query, key, value, mask, **options)


def by_hand(query, key, value, mask=None, **options):
    return ours.attention(query, key, value, mask, enable_gqa=True, **options)


WAYS = {f.__name__: f for f in (by_hand, in_eager_mode, compiled)}


def tensors(heads, device, len_q=19, len_kv=19, dim=16, dim_v=24, dtype=torch.float32, batch=2):
    sizes = zip(heads, (len_q, len_kv, len_kv), (dim, dim, dim_v), strict=True)
    return [torch.randn(batch, h, n, d, device=device).to(dtype) for h, n, d in sizes]


def check(run, given, mask=None, **options):
    def reference(query, key, value):
        bias = mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
        return library(query, key, value, bias, **options)

    actual = run(*given, mask, **options)
    assert_accurate(actual, reference, given, factor=2.0)
    return actual


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("len_q", [1, 2, 37], ids=["decode", "few", "prefill"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_forward(heads, len_q, dtype, device):
    check(by_hand, tensors(heads, device, len_q, 41, dtype=dtype), scale=0.3)


@pytest.mark.parametrize("way", ["in_eager_mode", "compiled"])
@pytest.mark.parametrize("len_q", [1, 19], ids=["decode", "prefill"])
@pytest.mark.parametrize("heads", [(6, 2, 3), (4, 1, 2)], ids=str)
def test_ways(heads, len_q, way, device):
    given = tensors(heads, device, len_q)
    check(WAYS[way], given, is_causal=len_q > 1)
    with torch.inference_mode():
        check(WAYS[way], given)


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("shape", [(2, 6, 19, 19), (2, 1, 1, 19), (19, 19)], ids=str)
def test_masks(shape, form, device):
    mask = torch.randn(shape, device=device)
    mask = (mask > -1) | (torch.arange(shape[-1], device=device) == 0) if form == "bool" else mask
    check(by_hand, tensors((6, 2, 3), device), mask)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads", [(6, 2, 3), (4, 1, 2), (4, 4, 2)], ids=str)
def test_gradients(heads, is_causal, way, device):
    given = tensors(heads, device)
    grad = torch.randn(2, heads[0], 19, 24, device=device)

    def both(attention):
        def run(*tensors):
            *leaves, grad = tensors
            leaves = [t.detach().requires_grad_() for t in leaves]
            with torch.enable_grad():
                out = attention(*leaves, is_causal=is_causal)
            return out.detach(), *torch.autograd.grad(out, leaves, grad)

        return run

    actual = both(WAYS[way])(*given, grad)
    assert [g.shape for g in actual[1:]] == [t.shape for t in given]
    assert_accurate(actual, both(library), [*given, grad], factor=3.0)


def test_strided_and_broadcast(device):
    query = torch.randn(2, 19, 6, 16, device=device).transpose(1, 2)
    key = torch.randn(2, 32, 19, 2, device=device).permute(0, 3, 2, 1)[..., ::2]
    value = torch.randn(1, 3, 19, 5, device=device)
    actual = by_hand(query, key, value)
    expected = library(query.double(), key.double(), value.double().expand(2, -1, -1, -1))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_one_head_is_not_copied(device):
    from triton_only_backend.kernels.attention_arguments import share_heads

    query, key, value = tensors((6, 1, 3), device)
    repeated, same = share_heads(query, key, value)
    assert repeated.shape == (2, 3, 19, 16)
    assert repeated.data_ptr() == key.data_ptr()
    assert same is value


def test_equal_numbers_are_left_alone(device):
    from triton_only_backend.kernels.attention_arguments import share_heads

    query, key, value = tensors((6, 3, 3), device)
    assert share_heads(query, key, value) == (key, value)


def test_each_run_gives_the_same_bits(device):
    given = tensors((6, 2, 3), device, dtype=torch.float16)
    first = by_hand(*given)
    assert all(torch.equal(by_hand(*given), first) for _ in range(2))


def test_opcheck(device):
    given = [t.requires_grad_() for t in tensors((6, 2, 3), device)]
    result = torch.library.opcheck(ours.attention.default, tuple(given), {"enable_gqa": True})
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("heads", [(6, 2, 4), (6, 4, 3), (6, 0, 3), (6, 2, 0)], ids=str)
def test_heads_that_do_not_divide_the_querys_are_refused(heads, device):
    message = f"{heads[0]} query heads cannot share {heads[1]} key and {heads[2]} value heads"
    with pytest.raises(RuntimeError, match=message):
        by_hand(*tensors(heads, device))


def test_no_heads_at_all(device):
    assert by_hand(*tensors((0, 0, 0), device)).shape == (2, 0, 19, 24)


@pytest.mark.parametrize("shape", [(2, 2, 19, 16), (1, 6, 19, 16)], ids=["heads", "batch"])
def test_the_forward_for_the_backward_wants_its_operands_expanded(shape, device):
    query, key = torch.randn(2, 6, 19, 16, device=device), torch.randn(shape, device=device)
    value = torch.randn(2, 3 if shape[1] == 2 else 6, 19, 16, device=device)
    given = [t.requires_grad_() for t in (query, key, value)]
    out = ours.attention_forward(*given, enable_gqa=True)[0]
    with pytest.raises(RuntimeError, match="no gradient of operands that are broadcast; expand"):
        out.sum().backward()
