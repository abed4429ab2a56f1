"""Training steps: the backward and the optimizer beside it, in steps that follow each other."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import triton_only_backend as tob
from triton_only_backend.backend import compiled_reports
from triton_only_backend.errors import AuditError


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


def test_the_seed_of_dropout_is_a_listed_violation_with_its_remedy(device):
    """Inductor draws it with ATen's randint, one launch a graph."""
    model = Block(dropout=0.5).to(device)
    x = torch.randn(2, 6, 16, device=device)
    with pytest.raises(AuditError, match=r"allow=\[\"prims\.inductor_seed\*\"\]"):
        torch.compile(model, backend="triton_only")(x)
    torch._dynamo.reset()
    options = {"allow": ["prims.inductor_seed*"]}
    compiled = torch.compile(model, backend="triton_only", options=options)
    outputs = []
    for seed in (0, None, 0):
        if seed is not None:
            torch.manual_seed(seed)
        outputs.append(compiled(x).detach())
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    (finding,) = compiled_reports()[-1].allowed
    assert finding.graph_op.startswith("prims.inductor_seed")


def test_dropout_passes_its_mask_to_the_backward(device):
    options = {"allow": ["prims.inductor_seed*"]}
    x = torch.ones(64, device=device, requires_grad=True)
    y = torch.compile(F.dropout, backend="triton_only", options=options)(x, 0.5)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y.detach())
    assert set(y.tolist()) == {0.0, 2.0}


def test_attention_with_dropout_stays_in_triton(device):
    options = {"allow": ["prims.inductor_seed*"]}
    q = torch.randn(1, 2, 8, 8, device=device, requires_grad=True)

    def attention(q):
        return F.scaled_dot_product_attention(q, q, torch.ones_like(q), dropout_p=0.5)

    y = torch.compile(attention, backend="triton_only", options=options)(q)
    y.sum().backward()
    assert q.grad is not None
    assert 0.5 < y.mean().item() < 1.5
    assert all(report.is_triton_only for report in compiled_reports()[-2:])


def test_audit_of_a_training_model_lists_both_graphs(device):
    report = tob.audit(Block().to(device), torch.randn(2, 6, 16, device=device))
    assert [graph.split()[-1] for graph in report.graphs] == ["(forward)", "(backward)"]
    assert report.is_triton_only
