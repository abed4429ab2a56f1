"""The small passes around the products, and all of them together."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fusing import (
    DEVICE,
    assert_same,
    fired_passes,
    fuse,
    llama_norm,
    ours,
    random,
    run,
    trace,
)

# the last position, counters


@pytest.mark.parametrize("keep", ["select", "slice", "first"])
def test_only_kept_positions_are_multiplied(keep):
    def model(x, weight, bias):
        scores = F.linear(x, weight, bias)
        kept = {"select": scores[:, -1], "slice": scores[:, -2:], "first": scores[:, 0]}
        return kept[keep]

    args = (random(2, 5, 32), random(24, 32), random(24))
    gm, fired = fuse(model, *args)
    assert fired == {"keep_last_position": 1}
    (product,) = gm.graph.find_nodes(op="call_function", target=ours.addmm.default)
    assert list(product.meta["val"].shape) == [4 if keep == "slice" else 2, 24]
    assert_same(gm, model, *args)


def test_positions_left_alone():
    def channels(x, weight):
        return F.linear(x, weight)[..., 3]

    def all_positions_too(x, weight):
        scores = F.linear(x, weight)
        return scores[:, -1], scores.sum()

    for model in (channels, all_positions_too):
        args = (random(2, 5, 32), random(24, 32))
        gm, fired = fuse(model, *args)
        assert fired == {}, model
        assert_same(gm, model, *args)


def test_counters_advance_in_one_kernel():
    def model(x, a, b, c, d):
        for counter in (a, b, c):
            counter.add_(1)
        d.add_(2)
        return x + a + b + c + d

    def alone(x, a, b, c, d):
        for counter in (a, b, c):
            counter.add_(1)
        d.add_(2)
        return x * 2

    def counters():
        return [torch.tensor(n, device=DEVICE) for n in (3, 5, 7, 9)]

    for function, merged in ((model, 0), (alone, 1)):
        args = [random(4), *counters()]
        fired, result = fired_passes(function, args)
        assert fired.get("merge_counters", 0) == merged
        assert [int(a) for a in args[1:]] == [4, 6, 8, 11]
        torch.testing.assert_close(result, function(args[0].clone(), *counters()))


def test_counters_of_unknown_size_are_none():
    def model(x, a, b):
        a.add_(1)
        b.add_(1)
        return x * 2

    args = random(4), *(torch.arange(2, device=DEVICE) for _ in range(2))
    for counter in args[1:]:
        torch._dynamo.decorators.mark_unbacked(counter, 0)
    fired, _ = fired_passes(model, args)
    assert "merge_counters" not in fired
    assert [a.tolist() for a in args[1:]] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("shape", [(2, 12000), (1, 1, 8192), (3, 50257)], ids=str)
def test_argmax_of_long_rows(shape, keepdim):
    def model(x):
        return x.argmax(-1, keepdim=keepdim)

    x = random(*shape).round()  # so that the largest appears more than once
    x[..., -1] = x[..., 7] = 99.0
    gm, fired = fuse(model, x)
    assert fired == {"split_argmax": 1}
    assert torch.equal(gm(x), model(x))
    compiled = torch.compile(model, backend="triton_only")
    assert torch.equal(compiled(x), model(x))
    x[..., 4321] = x[..., 5432] = math.nan
    assert torch.equal(gm(x), model(x))
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("shape", [(2, 4000), (100, 12000), (2, 12007)], ids=str)
def test_argmax_left_alone(shape):
    _, fired = fuse(lambda x: x.argmax(-1), random(*shape))
    assert fired == {}


def test_each_pass_can_be_left_out():
    def model(x, weight, gate, up, down):
        h = llama_norm(x, weight)
        return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)

    args = (random(2, 32), random(32), random(24, 32), random(24, 32), random(32, 24))
    for name in ("fuse_epilogue", "fuse_norm"):
        gm = trace(model, *args)
        assert name not in run(gm, name)
        assert_same(gm, model, *args)


def test_gradients_are_not_disturbed():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.RMSNorm(16)
            self.gate, self.up, self.down = (torch.nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            h = self.norm(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    model, x = Block().to(DEVICE), random(2, 16).requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    actual = torch.autograd.grad(
        torch.compile(model, backend="triton_only")(x).sum(), [x, *model.parameters()]
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
