"""PyTorch's opcheck of every op that is registered: an op without a sample fails."""

from __future__ import annotations

import pytest
import torch

import triton_only_backend  # noqa: F401

ours = torch.ops.triton_only
NAMES = sorted(
    name.removeprefix("triton_only::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("triton_only::")
)
# A random op gives other numbers each time, so its results cannot be compared.
DETERMINISTIC = ("test_schema", "test_autograd_registration", "test_faketensor",
                 "test_aot_dispatch_dynamic")  # fmt: skip
RANDOM = ("test_schema", "test_autograd_registration", "test_faketensor")


def samples(device):
    """By the op's name: positional arguments, arguments by name."""

    def leaf(*shape):
        return torch.randn(shape, device=device, requires_grad=True)

    def data(*shape):
        return torch.randn(shape, device=device)

    q, k = (1, 4, 5, 8), (1, 2, 6, 8)
    grouped = {"enable_gqa": True, "is_causal": True}
    query, key, value = data(*q), data(*k), data(*k)
    output, logsumexp = ours.attention_forward(query, key, value, **grouped)
    lengths = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    packed = (data(7, 4, 8), data(7, 2, 8), data(7, 2, 8), lengths, lengths, 4, 4)
    packed_output, packed_logsumexp = ours.attention_varlen_forward(*packed)
    caches = (data(2, 2, 6, 8), data(2, 2, 6, 8))
    angles = (data(2, 1, 8), data(2, 1, 8))
    position = torch.tensor([3, 0], device=device)
    new = (data(2, 4, 1, 8), data(2, 2, 1, 8), data(2, 2, 1, 8))
    return {
        "mm": ((leaf(5, 6), leaf(7, 6).T), {}),
        "addmm": ((leaf(7), leaf(5, 6), leaf(6, 7)), {"beta": 0.5, "alpha": 2.0}),
        "bmm": ((leaf(2, 5, 6), leaf(2, 6, 7)), {}),
        "baddbmm": ((leaf(7), leaf(2, 5, 6), leaf(2, 6, 7)), {"beta": 0.5}),
        "linear_many": ((data(2, 32), [data(16, 32), data(8, 32)], [data(16), data(8)]), {}),
        "linear_fused": (
            (data(2, 32), [data(16, 32), data(16, 32)], []),
            {"norm_weight": data(32), "norm_eps": 1e-5, "activation": "silu", "gated": True},
        ),
        "grouped_mm": (
            (leaf(7, 6), leaf(2, 6, 5), torch.tensor([3, 7], dtype=torch.int32, device=device)), {},
        ),
        "mask_spans": ((data(2, 1, 20, 40).gt(0),), {}),
        "attention": ((leaf(*q), leaf(*k), leaf(*k)), grouped),
        "attention_forward": ((leaf(*q), leaf(*k), leaf(*k)), grouped),
        "attention_backward": (
            (data(*q), query, key, value, None, output, logsumexp), grouped,
        ),
        "attention_varlen": (packed, {}),
        "attention_varlen_forward": (packed, {}),
        "attention_varlen_backward": (
            (data(7, 4, 8), *packed, packed_output, packed_logsumexp), {},
        ),
        "attention_rope_cache": ((*new, *angles, *caches, position), {}),
        "rope_cache": ((*new, *angles, *caches, position[:, None]), {}),
        "random_seeds": ((3,), {"device": torch.device(device)}),
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    table = samples(device)
    op_name, _, overload = name.partition(".")
    assert op_name in table, f"triton_only::{name} has no sample here"
    op = getattr(getattr(ours, op_name), overload or "default")
    args, kwargs = table[op_name]
    utils = RANDOM if torch.Tag.nondeterministic_seeded in op.tags else DETERMINISTIC
    results = torch.library.opcheck(op, args, kwargs, test_utils=utils)
    assert set(results.values()) == {"SUCCESS"}, results


def test_every_sample_is_of_an_op(device):
    assert set(samples(device)) == {name.partition(".")[0] for name in NAMES}
