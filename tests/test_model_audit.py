"""tob.audit and tob.profile of models: graph breaks, the backward, what the user compiled already."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled
from torch._dynamo.testing import CompileCounterWithBackend

import triton_only_backend as tob


@pytest.fixture
def net(device) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).to(
        device
    )


def test_audit_covers_graph_breaks_and_the_backward(device):
    layer = torch.nn.Linear(4, 4, device=device)

    def broken(x):
        y = layer(x)
        torch._dynamo.graph_break()
        return y.double() @ y.double()

    report = tob.audit(broken, torch.ones(4, 4, device=device))
    kinds = [graph.split()[-1] for graph in report.graphs]
    assert sorted(kinds) == ["(backward)", "(backward)", "(forward)", "(forward)"]
    assert len(report.graph_breaks) == 1
    assert {f.graph.split()[-1] for f in report.findings} == {"(forward)", "(backward)"}
    assert layer.weight.grad is None


def test_audit_sees_refusals_of_the_joint_graph(device):
    def by_hand(q):
        return torch.softmax(q @ q.mT * 0.3, -1) @ q

    # Without a gradient: torch 2.11's own CPU attention fails on float64 in the backward.
    report = tob.audit(by_hand, torch.randn(1, 2, 4, 8, device=device, dtype=torch.float64))
    assert not report.is_triton_only
    assert {finding.refused for finding in report.findings} == {"UNSUPPORTED_DTYPE"}


def test_audit_leaves_the_users_compiled_model_alone(net, device):
    x = torch.ones(3, 8, device=device)
    counter = CompileCounterWithBackend("eager")
    model = torch.compile(net, backend=counter)
    model(x)
    apart = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # torch 2.13
    with torch._dynamo.config.patch(recompile_limit=3 if apart else 8):
        for audited in (net, model, net, model):  # more than the limit of 3
            assert tob.audit(audited, x).is_triton_only
        model(x)
        assert counter.frame_count == 1
        model(torch.ones(5, 8, device=device))
        assert counter.frame_count == 2
    assert all(parameter.grad is None for parameter in net.parameters())


def test_audit_takes_models_compiled_in_place_and_functions(net, device):
    x = torch.ones(3, 8, device=device)
    net.compile(backend="eager")
    net(x)
    assert len(tob.audit(net, x).graphs) == 2
    assert len(tob.audit(torch.compile(torch.relu, backend="eager"), x).graphs) == 1


def test_audit_stops_at_its_inputs(device):
    """The graph that the inputs come from is neither run nor freed."""
    leaf = torch.ones(3, 3, device=device, requires_grad=True)
    x = (leaf * 2).exp()
    report = tob.audit(lambda x: x @ x, x)
    assert [graph.split()[-1] for graph in report.graphs] == ["(forward)", "(backward)"]
    x.sum().backward()
    assert leaf.grad is not None


def test_profile_sees_only_triton(net, device):
    model = compiled(net)
    x = torch.randn(3, 8, device=device)
    with torch.no_grad():
        report = tob.profile(model, x, warmup=1)
    assert report.is_triton_only
    assert report.triton_time_share == 1.0


def test_a_decomposed_attention_is_noted(device):
    query = torch.randn(1, 2, 4, 264, device=device)
    report = tob.audit(F.scaled_dot_product_attention, query, query, query)
    assert report.is_triton_only
    assert "the head dimension exceeds 256" in report.to_text(width=300)
