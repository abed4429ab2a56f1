"""The attention kernels against an fp64 reference, with torch's own error as the yardstick."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_reference import DEVICE, DTYPES, reference, tensors

from triton_only_backend.kernels import attention_configs, decode_configs, hardware
from triton_only_backend.kernels.attention_backward_configs import (
    BackwardConfig,
    select_backward_config,
)
from triton_only_backend.kernels.attention_configs import AttentionProblem, FlashConfig
from triton_only_backend.kernels.decode_attention import decode_attention
from triton_only_backend.kernels.decode_configs import DecodeConfig
from triton_only_backend.kernels.flash_attention import flash_attention
from triton_only_backend.kernels.flash_attention_backward import flash_attention_backward
from triton_only_backend.kernels.tma_layout import tma_can_load

KERNELS = ("flash", "decode")
needs_tma = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0),
    reason="the tensor memory accelerator needs Hopper",
)


def problem_of(query, key, value, attn_mask, is_causal):
    return AttentionProblem(
        query.shape[0],
        query.shape[1],
        key.shape[1],
        query.shape[2],
        key.shape[2],
        query.shape[3],
        value.shape[3],
        query.element_size(),
        is_causal,
        attn_mask is not None,
    )


def attend(kernel, query, key, value, attn_mask=None, is_causal=False, scale=None, config=None):
    """Runs one of the kernels; returns its output and log-sum-exp."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shape = (*query.shape[:3], value.shape[-1])
    out = torch.full(shape, float("nan"), dtype=query.dtype, device=query.device)
    lse = torch.full(shape[:3], float("nan"), dtype=torch.float32, device=query.device)
    problem = problem_of(query, key, value, attn_mask, is_causal)
    device = hardware.of(query.device)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    if kernel == "flash":
        config = config or attention_configs.select_flash_config(problem, device)
        run = flash_attention
    else:
        config = config or decode_configs.select_decode_config(problem, device)
        run = decode_attention
    run(
        query,
        key,
        value,
        attn_mask,
        out,
        lse,
        is_causal=is_causal,
        scale=scale,
        config=config,
        precision="ieee",
    )
    return out, lse


def check(kernel, query, key, value, attn_mask=None, is_causal=False, scale=None, config=None):
    """The kernel's error is at most twice that of torch's attention in the same dtype."""
    out, lse = attend(kernel, query, key, value, attn_mask, is_causal, scale, config)
    real_scale = query.shape[-1] ** -0.5 if scale is None else scale
    expected, expected_lse = reference(
        query, key, value, attn_mask, real_scale, is_causal=is_causal
    )
    mask = attn_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    torch_out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    error = (out.double() - expected).abs().max().item()
    unit = torch.finfo(query.dtype).eps * max(1.0, expected.abs().max().item())
    torch_error = (torch_out.double() - expected).abs().max().item()
    if torch_out.isnan().any():
        # torch's CPU kernel yields NaN for a causal mask and a scale below or at 0 (torch 2.13).
        torch_error = 4 * unit
    # In fp32 the GPU's ex2.approx alone is off by up to 2 units in the last place (PTX ISA).
    granted = 4 * unit if query.dtype == torch.float32 else unit
    assert error <= 2 * torch_error + granted, f"error {error:.3g}, torch's {torch_error:.3g}"
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("len_q", "len_kv"), [(61, 61), (61, 131), (131, 61), (64, 64), (1, 97), (97, 1)]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_lengths(kernel, len_q, len_kv, is_causal, dtype):
    config = FlashConfig(32, 32, 4, 1) if kernel == "flash" else DecodeConfig(32, 3, 4, 1, 64, 64)
    check(kernel, *tensors(1, 2, 1, len_q, len_kv, 64, dtype=dtype), None, is_causal, config=config)


@pytest.mark.parametrize(
    ("dim", "dim_v"),
    [(1, 1), (5, 5), (16, 16), (64, 64), (80, 80), (128, 128), (256, 256), (64, 128), (128, 5)],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_head_dimensions(kernel, dim, dim_v):
    check(kernel, *tensors(1, 2, 2, 19, 37, dim, dim_v, torch.float16), is_causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_head_groups(kernel, heads, kv_heads):
    check(kernel, *tensors(2, heads, kv_heads, 5, 67, 32))


@pytest.mark.parametrize("dtype", ["bool", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("last", [True, False], ids=["keys", "one key"])
@pytest.mark.parametrize("rows", [True, False], ids=["queries", "all queries"])
@pytest.mark.parametrize(
    ("batch", "heads"), [(2, 4), (1, 1), (2, 1), (1, 4)], ids=["bh", "none", "b", "h"]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_masks(kernel, batch, heads, rows, last, dtype):
    len_q, len_kv = 7, 45
    shape = (batch, heads, len_q if rows else 1, len_kv if last else 1)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1), device="cpu").to(DEVICE)
    mask = mask > -0.5 if dtype == "bool" else mask.to(DTYPES[dtype])
    check(kernel, *tensors(2, 4, 2, len_q, len_kv, 16), mask)


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_see_no_key_are_zero(kernel, splits, form):
    query, key, value = tensors(1, 2, 1, 6, 70, 16)
    mask = torch.ones(1, 1, 6, 70, dtype=torch.bool, device=DEVICE)
    mask[..., 2, :] = False
    mask[..., 4, 10:] = False
    if form == "float":
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, float("-inf"))
    config = (
        FlashConfig(16, 32, 4, 1) if kernel == "flash" else DecodeConfig(16, splits, 4, 1, 16, 4)
    )
    out, lse = attend(kernel, query, key, value, mask, config=config)
    assert (out[:, :, 2] == 0).all()
    assert (lse[:, :, 2] == float("-inf")).all()
    check(kernel, query, key, value, mask, config=config)


@pytest.mark.parametrize("least", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("len_q", [1, 20])
def test_rows_that_the_least_number_hides_average_the_values(len_q, least, device):
    """What PyTorch gives: the scores vanish beside it, so that all keys count the same."""
    q, k, v = (torch.randn(1, 2, n, 32, device=device) for n in (len_q, 37, 37))
    mask = torch.zeros(len_q, 37, device=device)
    mask[:, 30:] = mask[-1] = torch.finfo(least).min
    actual = torch.ops.triton_only.attention(q, k, v, mask)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(actual[:, :, -1], v.mean(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_causal_and_masked_together(kernel):
    mask = torch.randn(1, 1, 9, 41, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    query, key, value = tensors(2, 2, 2, 9, 41, 32)
    out, lse = attend(kernel, query, key, value, mask, is_causal=True)
    expected, expected_lse = reference(query, key, value, mask, 32**-0.5, is_causal=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_scales(kernel, is_causal, scale):
    check(kernel, *tensors(1, 2, 2, 20, 33, 16), None, is_causal, scale)


@pytest.mark.parametrize("layout", ["blhd", "dense rows", "columns", "expanded", "sliced"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_layouts(kernel, layout):
    query, key, value = tensors(2, 4, 4, 11, 23, 32)
    if layout == "blhd":
        query, key, value = (
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)
        )
    elif layout == "dense rows":
        query, key, value = (
            x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (query, key, value)
        )
    elif layout == "columns":
        query, key, value = (x.mT.contiguous().mT for x in (query, key, value))
    elif layout == "expanded":
        key, value = key[:1, :1].expand(2, 4, -1, -1), value[:, :1].expand(2, 4, -1, -1)
    else:
        query, key, value = query[..., 1:, ::2], key[:, :, 3:, ::2], value[:, :, 3:, 1:30]
    check(kernel, query, key, value)


@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_outputs(kernel):
    query, key, value = tensors(2, 3, 3, 10, 20, 16)
    expected, expected_lse = reference(query, key, value, None, 0.25)
    out = torch.zeros(2, 10, 3, 16, device=DEVICE).transpose(1, 2)
    lse = torch.zeros(3, 10, 2, device=DEVICE).permute(2, 0, 1)
    problem = problem_of(query, key, value, None, False)
    device = hardware.of(query.device)
    if kernel == "flash":
        run, config = flash_attention, attention_configs.select_flash_config(problem, device)
    else:
        run, config = decode_attention, DecodeConfig(16, 2, 4, 1, 16, 4)
    options = {"is_causal": False, "scale": 0.25, "config": config, "precision": "ieee"}
    run(query, key, value, None, out, lse, **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    out.zero_()
    run(query, key, value, None, out, None, **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_keys(kernel):
    out, lse = attend(kernel, *tensors(2, 2, 1, 3, 0, 16))
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("sizes", [(0, 2, 1, 3, 4, 16), (1, 2, 1, 0, 4, 16)], ids=["B=0", "L_q=0"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_queries(kernel, sizes):
    out, _ = attend(kernel, *tensors(*sizes))
    assert out.numel() == 0


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_propagates(kernel, splits, where):
    inputs = dict(zip(("query", "key", "value"), tensors(1, 1, 1, 4, 40, 16), strict=True))
    inputs[where][0, 0, 3, 0] = float("nan")
    config = (
        FlashConfig(16, 16, 4, 1) if kernel == "flash" else DecodeConfig(16, splits, 4, 1, 16, 4)
    )
    out, _ = attend(kernel, **inputs, config=config)
    expected, _ = reference(*inputs.values(), None, 0.25)
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("splits", [1, 2, 5, 64])
def test_decode_is_bitwise_repeatable(splits):
    query, key, value = tensors(2, 4, 1, 3, 203, 32, dtype=torch.float16)
    config = DecodeConfig(16, splits, 4, 1, 16, 8)
    first = attend("decode", query, key, value, config=config)
    second = attend("decode", query, key, value, config=config)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    check("decode", query, key, value, config=config)


def test_more_rows_than_one_decode_tile():
    config = DecodeConfig(32, 2, 4, 1, 16, 8)
    check("decode", *tensors(1, 4, 1, 13, 50, 16), None, True, config=config)


def test_more_heads_than_one_cache_section(monkeypatch):
    from triton_only_backend.kernels import flash_attention as module

    monkeypatch.setattr(module, "L2_SECTION_BYTES", 3 * 40 * 32 * 4)
    config = FlashConfig(16, 16, 4, 1)
    check("flash", *tensors(1, 8, 4, 40, 40, 16), None, True, config=config)


@needs_tma
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_tensor_descriptors(dtype, dim):
    query, key, value = tensors(2, 4, 2, 37, 53, dim, dtype=dtype)
    key = key.transpose(1, 2).contiguous().transpose(1, 2)
    assert tma_can_load(key)
    config = FlashConfig(32, 32, 4, 1, tma=True)
    check("flash", query, key, value, None, True, config=config)


def test_layouts_that_tensor_descriptors_cannot_load():
    key = torch.zeros(2, 4, 16, 64, dtype=torch.float16)
    assert tma_can_load(key)
    assert tma_can_load(key[:1])
    assert not tma_can_load(key[..., ::2])
    assert not tma_can_load(key[..., 1:])
    assert not tma_can_load(key[:1].expand(2, -1, -1, -1))
    assert not tma_can_load(torch.zeros(2, 4, 16, 5, dtype=torch.float16))
    assert not tma_can_load(key[:, :, :0])
    query, key, value = tensors(2, 2, 1, 20, 30, 5, dtype=torch.float16)
    check("flash", query, key, value, config=FlashConfig(32, 32, 4, 1, tma=True))


def gradients(query, key, value, attn_mask, is_causal, scale, config=None, forward="flash"):
    """The three gradients that the kernels compute for a random output gradient, and that."""
    out, lse = attend(forward, query, key, value, attn_mask, is_causal, scale)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    grad_out = grad_out.to(out.dtype).to(out.device)
    problem = problem_of(query, key, value, attn_mask, is_causal)
    if config is None:
        config = select_backward_config(problem, hardware.of(query.device))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    grads = [torch.full(x.shape, float("nan"), dtype=x.dtype) for x in (query, key, value)]
    grads = [grad.to(out.device) for grad in grads]
    flash_attention_backward(
        grad_out,
        query,
        key,
        value,
        attn_mask,
        out,
        lse,
        *grads,
        is_causal=is_causal,
        scale=scale,
        config=config,
        precision="ieee",
    )
    return grads, grad_out


def check_gradients(query, key, value, attn_mask=None, is_causal=False, scale=None, **options):
    """Each gradient's error is at most twice that of torch's attention in the same dtype."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    actual, grad_out = gradients(query, key, value, attn_mask, is_causal, scale, **options)
    exact = [x.double().detach().requires_grad_() for x in (query, key, value)]
    out, _ = reference(*exact, attn_mask, scale, is_causal=is_causal)
    expected = torch.autograd.grad(out, exact, grad_out.double())
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    mask = attn_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            *leaves, mask, is_causal=is_causal, scale=scale, enable_gqa=True
        )
        torch_grads = torch.autograd.grad(out, leaves, grad_out)
    for name, grad, torch_grad, exact_grad in zip(
        ("query", "key", "value"), actual, torch_grads, expected, strict=True
    ):
        if exact_grad.numel() == 0:
            continue
        error = (grad.double() - exact_grad).abs().max().item()
        torch_error = (torch_grad.double() - exact_grad).nan_to_num(0.0).abs().max().item()
        unit = torch.finfo(grad.dtype).eps * max(1.0, exact_grad.abs().max().item())
        granted = 8 * unit if grad.dtype == torch.float32 else 4 * unit
        assert error <= 2 * torch_error + granted, (
            f"gradient of {name}: error {error:.3g}, torch's {torch_error:.3g}"
        )


BACKWARD = BackwardConfig(16, 32, 32, 16, 4, 1, block_delta=64)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("len_q", "len_kv"), [(37, 37), (37, 71), (71, 37), (64, 64), (1, 40)])
def test_gradients_of_lengths(len_q, len_kv, is_causal, dtype):
    inputs = tensors(1, 2, 1, len_q, len_kv, 32, dtype=dtype)
    check_gradients(*inputs, None, is_causal, config=BACKWARD)


@pytest.mark.parametrize(("dim", "dim_v"), [(1, 1), (5, 5), (80, 80), (128, 64), (16, 256)])
def test_gradients_of_head_dimensions(dim, dim_v):
    check_gradients(*tensors(1, 2, 2, 19, 37, dim, dim_v), is_causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("forward", KERNELS)
def test_gradients_of_head_groups(heads, kv_heads, forward):
    inputs = tensors(2, heads, kv_heads, 21, 33, 16)
    check_gradients(*inputs, None, True, config=BACKWARD, forward=forward)


@pytest.mark.parametrize("dtype", ["bool", "fp32"])
@pytest.mark.parametrize(("batch", "heads"), [(2, 4), (1, 1)], ids=["bh", "none"])
@pytest.mark.parametrize("rows", [True, False], ids=["queries", "all queries"])
def test_gradients_with_masks(batch, heads, rows, dtype):
    shape = (batch, heads, 20 if rows else 1, 45)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = mask > -0.5 if dtype == "bool" else mask
    check_gradients(*tensors(2, 4, 2, 20, 45, 16), mask, config=BACKWARD)


@pytest.mark.parametrize("form", ["bool", "float"])
def test_rows_that_see_no_key_have_no_gradient(form):
    query, key, value = tensors(1, 2, 1, 6, 40, 16)
    mask = torch.ones(1, 1, 6, 40, dtype=torch.bool, device=DEVICE)
    mask[..., 2, :] = False
    mask[..., 17] = False
    if form == "float":
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, float("-inf"))
    (grad_query, grad_key, grad_value), _ = gradients(
        query, key, value, mask, False, 0.25, BACKWARD
    )
    assert (grad_query[:, :, 2] == 0).all()
    assert (grad_key[:, :, 17] == 0).all()
    assert (grad_value[:, :, 17] == 0).all()
    assert all(grad.isfinite().all() for grad in (grad_query, grad_key, grad_value))


@pytest.mark.parametrize("layout", ["blhd", "columns", "expanded", "sliced"])
def test_gradients_of_layouts(layout):
    query, key, value = tensors(2, 4, 4, 11, 23, 32)
    if layout == "blhd":
        query, key, value = (
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)
        )
    elif layout == "columns":
        query, key, value = (x.mT.contiguous().mT for x in (query, key, value))
    elif layout == "expanded":
        key, value = key[:1, :1].expand(2, 4, -1, -1), value[:, :1].expand(2, 4, -1, -1)
    else:
        query, key, value = query[..., 1:, ::2], key[:, :, 3:, ::2], value[:, :, 3:, 1:30]
    check_gradients(query, key, value, config=BACKWARD)


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_gradients_of_scales(scale):
    check_gradients(*tensors(1, 2, 2, 20, 33, 16), None, True, scale)


@needs_tma
@pytest.mark.parametrize("dim", [64, 80])
def test_gradients_by_tensor_descriptors(dim):
    inputs = tensors(2, 4, 2, 37, 53, dim, dtype=torch.float16)
    check_gradients(*inputs, None, True, config=BackwardConfig(16, 32, 32, 16, 4, 1, tma=True))


@pytest.mark.parametrize(("len_q", "len_kv"), [(3, 0), (0, 3)])
def test_gradients_of_nothing_are_zero(len_q, len_kv):
    grads, _ = gradients(*tensors(1, 2, 1, len_q, len_kv, 16), None, False, 0.25, BACKWARD)
    assert all((grad == 0).all() for grad in grads)


def test_gradients_are_bitwise_repeatable():
    inputs = tensors(2, 4, 2, 37, 53, 16, dtype=torch.float16)
    first, _ = gradients(*inputs, None, True, 0.25, BACKWARD)
    second, _ = gradients(*inputs, None, True, 0.25, BACKWARD)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
