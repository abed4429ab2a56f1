"""What Inductor lowers wrongly is right here; each shown by what goes wrong without the mend."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import triton_only_backend  # noqa: F401


@pytest.fixture(autouse=True)
def whole_float32():
    """cuDNN's convolutions round float32 to TF32 unless told not to."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def before(y, value=0.0):
    """What padding has before the first of one column: the same kernel computes y and reads it."""
    return y, F.pad(y, (2, 1), value=value)[..., :1] * 3


PADDED = {
    "a sum": (lambda x: before(x.sum(-1, keepdim=True)), (4, 8)),
    "a value": (lambda x: before(torch.sin(x)), (4, 1)),
    "another value": (lambda x: before(x.amax(-1, keepdim=True), -7.5), (4, 8)),
    "an integer": (lambda x: before((x > 0.5).sum(-1, keepdim=True)), (4, 8)),
    "whether any": (lambda x: before((x > 0.5).any(-1, keepdim=True)), (4, 8)),
    "one boolean": (lambda x: F.pad(before((x > 0).any(-1))[0], (2, 1)), (1, 8)),
    "offsets of sequences": (
        lambda x: F.pad((x > 0.5).sum(-1, dtype=torch.int32).cumsum(0), (1, 0)), (1, 16384),
    ),
    "depthwise convolution": (
        lambda x: F.conv2d(
            x.sum((2, 3), keepdim=True), x[0, :, None, :3, :3], padding=2, dilation=2, groups=4
        ),
        (2, 4, 5, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PADDED)
def test_padding_of_what_the_kernel_computes(name, dtype, device):
    function, shape = PADDED[name]
    x = torch.randn(shape, device=device).abs().to(dtype)
    # Another process may have left this graph in the cache, made without the mend.
    compiled = torch.compile(function, backend="triton_only", options={"fx_graph_cache": False})
    torch.testing.assert_close(compiled(x), function(x), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("layer", "more"),
    [
        (torch.nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, groups=4), 2),
        (torch.nn.Conv2d(4, 8, 2, stride=4), 0),
    ],
    ids=["transposed, channels last", "gradient of a square image"],
)
def test_strides_that_are_sums(layer, more, device):
    """A graph gives out a view whose symbolic strides are expanded sums."""
    layer = copy.deepcopy(layer).to(device, memory_format=torch.channels_last)
    compiled = torch.compile(
        layer, backend="triton_only", dynamic=True, options={"fx_graph_cache": False}
    )
    for side in (8, 13):
        x = torch.randn(3, 4, side, side + more, device=device)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        y, expected = compiled(x), layer(x)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(t, x, torch.ones_like(t))[0] for t in (y, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_strides_whose_order_depends_on_the_sizes(device):
    """The second layer, of two groups, stays; what it reads is a view, kept for the backward."""
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 4, stride=3), torch.nn.Conv2d(8, 8, 1),
        torch.nn.Conv2d(8, 8, 2, stride=2, groups=2),
    ).to(device)  # fmt: skip
    options = {"fx_graph_cache": False, "on_violation": "ignore"}
    compiled = torch.compile(layers, backend="triton_only", dynamic=True, options=options)
    for height, width in ((13, 10), (12, 16)):
        x = torch.randn(2, 3, height, width, device=device, requires_grad=True)
        y, expected = compiled(x), layers(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(t, x, torch.ones_like(t))[0] for t in (y, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
