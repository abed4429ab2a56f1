"""Training steps: the backward and the optimizer beside it, in steps that follow each other."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import triton_only_backend as tob
from triton_only_backend.backend import compiled_reports


class Block(torch.nn.Module):
    """Attention and a feed-forward, as small as they come."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)
        self.up, self.down = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16, bias=False)
        self.norm = torch.nn.LayerNorm(16)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2)
        return x + self.dropout(self.down(F.gelu(self.up(x))))


def train(model, forward, x, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(forward(x), x.roll(1, 1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_losses_follow_eagers(device):
    model = Block().to(device)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 6, 16, device=device)
    ours = train(model, torch.compile(model, backend="triton_only"), x)
    theirs = train(twin, twin, x)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]
    for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_a_compiled_step_with_its_optimizer(device):
    model = Block().to(device)
    # Capturable: the step counts live on the GPU. On a CPU beside it they are work that no Triton
    # kernel does, and the audit says so.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=device == "cuda")
    x = torch.randn(2, 6, 16, device=device)

    @torch.compile(backend="triton_only")
    def update() -> None:
        optimizer.step()

    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().mean().backward()
    update()
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))
    assert compiled_reports()[-1].is_triton_only


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
def test_gradients_are_eagers(mixed, device):
    model = Block().to(device)
    x = torch.randn(2, 6, 16, device=device, requires_grad=True)

    def step(forward):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
            y = forward(x)
        return torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])

    tolerance = 5e-2 if mixed else 1e-4
    for actual, expected in zip(
        step(torch.compile(model, backend="triton_only")), step(model), strict=True
    ):
        error = (actual - expected).norm() / expected.norm()
        assert error < tolerance


@pytest.mark.parametrize("layer", ["encoder", "attention"])
def test_torchs_own_layers(layer, device):
    """nn.TransformerEncoderLayer and nn.MultiheadAttention, which have fast paths of their own."""
    if layer == "encoder":
        module = torch.nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
        call = lambda m, x: m(x)  # noqa: E731
    else:
        module = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        call = lambda m, x: m(x, x, x)[0]  # noqa: E731
    module = module.to(device)
    compiled = torch.compile(module, backend="triton_only")
    x = torch.randn(2, 5, 16, device=device)
    actual, expected = (
        torch.autograd.grad(call(m, x).square().sum(), list(module.parameters()))
        for m in (compiled, module)
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    module.eval()
    with torch.inference_mode():
        torch.testing.assert_close(call(compiled, x), call(module, x), rtol=1e-4, atol=1e-5)
    assert compiled_reports()[-1].is_triton_only


def test_padding_masks_in_the_encoders_fast_path(device):
    module = torch.nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, device=device).eval()
    x = torch.randn(2, 5, 16, device=device)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2], device=device)
    with torch.no_grad():
        actual = torch.compile(module, backend="triton_only")(x, src_key_padding_mask=padding)
        expected = module(x, src_key_padding_mask=padding)
    torch.testing.assert_close(actual[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


# dropout


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_dropout_follows_manual_seed(mode, device):
    """Its seed is drawn by a Triton kernel, also where a CUDA graph is replayed.

    With gradients only without CUDA graphs: under them torch 2.11 says of this loop, with Inductor
    as with us, that an output of the forward "has been overwritten by a subsequent run".
    """
    model = Block(dropout=0.5).to(device)
    x = torch.randn(2, 6, 16, device=device)
    compiled = torch.compile(model, backend="triton_only", mode=mode)
    outputs = {}
    for step, seed in enumerate((0, None, 0, None, 0, 1, None)):
        if seed is not None:
            torch.manual_seed(seed)
        with torch.set_grad_enabled(mode == "default"):
            y = compiled(x)
        outputs[step] = y.detach().clone()
        if mode == "default":
            y.sum().backward()
    same = [{0, 2, 4}, {1, 3}, {5}, {6}]
    for group in same:
        for step, output in outputs.items():
            assert all(torch.equal(outputs[g], output) == (step in group) for g in group)
    assert all(report.is_triton_only for report in compiled_reports()[-2:])


def test_dropout_passes_its_mask_to_the_backward(device):
    x = torch.ones(64, device=device, requires_grad=True)
    y = torch.compile(F.dropout, backend="triton_only")(x, 0.5)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y.detach())
    assert set(y.tolist()) == {0.0, 2.0}


def attention_with_dropout(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)


@pytest.mark.parametrize("way", ["compiled", "eager"])
def test_attention_drops_one_weight_in_four_and_scales_the_others(way, device):
    """One key a head: the output is the value, dropped or scaled by 1 / (1 - p)."""
    q, k = (torch.randn(8, 16, length, 8, device=device) for length in (40, 1))
    v = torch.ones(8, 16, 1, 8, device=device, requires_grad=True)
    if way == "compiled":
        y = torch.compile(attention_with_dropout, backend="triton_only")(q, k, v)
        assert compiled_reports()[-1].is_triton_only
    else:
        with tob.eager():
            y = attention_with_dropout(q, k, v)
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 4 / 3], device=device))
    weights = y[..., 0].detach() * 0.75
    assert abs(weights.mean().item() - 0.75) < 4 * (0.75 * 0.25 / weights.numel()) ** 0.5
    # As PyTorch's: drawn apart for each batch, head and query.
    assert len({tuple(row.tolist()) for row in weights.flatten(0, 1)}) == 128
    y.sum().backward()
    torch.testing.assert_close(v.grad[..., 0, 0], y.detach().sum(2)[..., 0])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_attention_that_drops_nothing_or_everything(p, device):
    q = torch.randn(1, 2, 20, 8, device=device, requires_grad=True)

    def attention(q):
        return F.scaled_dot_product_attention(q, q, q, dropout_p=p)

    y = torch.compile(attention, backend="triton_only")(q)
    expected = torch.zeros_like(y) if p else attention(q)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(y.square().sum(), q)
    assert (grad == 0).all() == (p == 1.0)


def test_attention_in_eval_mode_draws_nothing(device):
    layer = torch.nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True, device=device)
    x = torch.randn(2, 5, 16, device=device)
    compiled = torch.compile(layer, backend="triton_only")
    for training in (True, False):
        layer.train(training)
        y = compiled(x, x, x, need_weights=False)[0]
        drawn = "random_seeds" in compiled_reports()[-1].to_json()
        assert drawn == training
    torch.testing.assert_close(y, layer(x, x, x, need_weights=False)[0], rtol=1e-4, atol=1e-5)


def test_checkpointed_dropout_is_the_same_in_the_backward(device):
    """The gradient of a dropped weight is dropped too, though the forward is computed again."""
    q, k = (torch.randn(2, 2, length, 8, device=device) for length in (30, 1))
    v = torch.ones(2, 2, 1, 8, device=device, requires_grad=True)

    def checkpointed(q, k, v):
        return torch.utils.checkpoint.checkpoint(
            attention_with_dropout, q, k, v, use_reentrant=False
        )

    compiled = torch.compile(checkpointed, backend="triton_only")
    first = compiled(q, k, v)
    compiled(q, k, v)  # draws in between
    (grad,) = torch.autograd.grad(first.sum(), v)
    torch.testing.assert_close(grad[..., 0, 0], first.detach().sum(2)[..., 0])


def test_audit_of_a_training_model_lists_both_graphs(device):
    report = tob.audit(Block().to(device), torch.randn(2, 6, 16, device=device))
    assert [graph.split()[-1] for graph in report.graphs] == ["(forward)", "(backward)"]
    assert report.is_triton_only
