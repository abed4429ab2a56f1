"""Fused library ops in terms of products: they compute the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pass_graphs import targets
from torch.fx.experimental.proxy_tensor import make_fx

import triton_only_backend  # noqa: F401
from triton_only_backend.passes.decompositions import DECOMPOSITIONS


def decomposed(function, *args) -> torch.fx.GraphModule:
    return make_fx(function, decomposition_table=DECOMPOSITIONS, tracing_mode="symbolic")(*args)


DECOMPOSED_CALLS = {
    "addbmm": (
        lambda bias, a, b: torch.addbmm(bias, a, b, beta=0.5, alpha=2),
        [(4, 7), (3, 4, 5), (3, 5, 7)],
    ),
    "bilinear": (F.bilinear, [(2, 4), (2, 5), (3, 4, 5), (3,)]),
    "addmm_activation": (torch._addmm_activation, [(7,), (4, 5), (5, 7)]),
    "addmm_gelu": (
        lambda bias, a, b: torch._addmm_activation(bias, a, b, use_gelu=True),
        [(7,), (4, 5), (5, 7)],
    ),
}


@pytest.mark.parametrize("name", DECOMPOSED_CALLS)
def test_decompositions_compute_the_same(name):
    function, shapes = DECOMPOSED_CALLS[name]
    args = [torch.randn(shape) for shape in shapes]
    gm = decomposed(function, *args)
    torch.testing.assert_close(gm(*args), function(*args), rtol=1e-4, atol=1e-5)
    assert not {str(op) for op in DECOMPOSITIONS} & set(targets(gm.graph))


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
@pytest.mark.parametrize("mask", ["none", "lengths", "padding"])
def test_native_attention_is_taken_apart(mask, need_weights, device):
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True, device=device).eval()
    x = torch.randn(2, 5, 8, device=device)
    barred = torch.zeros((5, 5) if mask == "lengths" else (2, 5), dtype=torch.bool, device=device)
    barred[..., -2:] = True

    def native(x):
        return torch._native_multi_head_attention(
            x, x, x, 8, 2, attention.in_proj_weight, attention.in_proj_bias,
            attention.out_proj.weight, attention.out_proj.bias,
            None if mask == "none" else barred, need_weights,
            mask_type={"none": None, "lengths": 0, "padding": 1}[mask],
        )  # fmt: skip

    with torch.no_grad():
        gm = make_fx(native, decomposition_table=DECOMPOSITIONS, tracing_mode="fake",
                     _allow_non_fake_inputs=True)(x)  # fmt: skip
        actual, expected = gm(x), native(x)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    if need_weights:
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-5)
    assert "aten._native_multi_head_attention.default" not in targets(gm.graph)
