"""Complex products by their parts, forward and backward, and the gradient of a weight norm."""

from __future__ import annotations

import pytest
import torch

from triton_only_backend import testing
from triton_only_backend.passes.rewrite_complex import rewrite_complex


def rotate(x, angle):
    """Rotary embedding as DeepSeek-V2 writes it."""
    turn = torch.polar(torch.ones_like(angle), angle) * 0.5
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


@pytest.mark.parametrize(
    ("function", "times"),
    [
        (rotate, 3),
        (lambda x, a: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * a), 1),
        (lambda x, a: torch.view_as_real(a * torch.view_as_complex(x.unflatten(-1, (4, 2)))), 1),
    ],
    ids=["complex by complex", "complex by real", "real by complex"],
)
def test_the_pass_is_sound(function, times):
    gm = testing.capture(function, torch.randn(3, 5, 8), torch.randn(5, 4))
    testing.assert_pass(rewrite_complex, gm, times=times)


@pytest.mark.parametrize("transposed", [False, True])
def test_compiled_forward_and_backward(transposed, device):
    x = torch.randn(3, 5, 8, device=device)
    x = (x.transpose(0, 1).contiguous().transpose(0, 1) if transposed else x).requires_grad_()
    angle = torch.randn(5, 4, device=device)
    results = []
    for function in (torch.compile(rotate, backend="triton_only"), rotate):
        y = function(x, angle)
        results.append([y, *torch.autograd.grad(y.square().sum(), x)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 2])
def test_gradient_of_a_weight_norm(dim, device):
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(4, 6, 3, stride=3), dim=dim)
    layer = layer.to(device)
    x = torch.randn(2, 4, 9, device=device)
    grads = []
    for function in (torch.compile(layer, backend="triton_only"), layer):
        layer.zero_grad()
        function(x).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
