"""Every stage of the pipeline on whole graphs, by the kit: sound fake values, numbers, memory, guards.

What each pass does to which graph is asked in the passes' own tests; a new pass is covered here as
soon as it is in the pipeline.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import triton_only_backend  # noqa: F401
from triton_only_backend import testing
from triton_only_backend.passes import pipeline

STAGES = {"dynamo": "dynamo", "joint": "joint", "aten": "post_grad"}


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(16, 24, bias=False) for _ in range(2))
        self.down, self.norm = torch.nn.Linear(24, 16), torch.nn.RMSNorm(16)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Attention(torch.nn.Module):
    """Grouped heads, repeated as models do."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(16, n, bias=False) for n in (32, 16, 16))
        self.o = torch.nn.Linear(32, 16, bias=False)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(-2))


def products(x):
    y = x @ x.mT
    return torch.baddbmm(x, y, x, beta=0.5), torch.einsum("bij,bkj->bik", x, y @ x), y.softmax(-1)


MODELS = {
    "mlp": (Mlp, (2, 3, 16)),
    "mlp of one row": (Mlp, (1, 16)),
    "attention": (Attention, (2, 5, 16)),
    "attention of one row": (Attention, (1, 1, 16)),
    "products": (lambda: products, (3, 4, 16)),
}


def stage_pass(stage):
    """A stage as one pass; it says how often its passes fired."""

    def run(gm: torch.fx.GraphModule) -> int:
        return sum(result.fired for result in pipeline.run_stage(stage, gm))

    return run


@functools.cache
def captured(name, stage, training, dynamic, part):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    return testing.capture(
        make(),
        torch.randn(shape),
        stage=STAGES[stage],
        training=training,
        dynamic=dynamic,
        part=part,
    )


CASES = [
    pytest.param(name, stage, training, dynamic, part,
                 id="-".join((name.replace(" ", "_"), stage, part if training else "inference",
                              "dynamic" if dynamic else "static")))
    for name in MODELS
    for stage in STAGES
    for training, part in ((False, "forward"), (True, "forward"), (True, "backward"))
    for dynamic in (False, True)
    if (part == "forward" or stage == "aten")
    and not (training and stage == "dynamo")
    and not (dynamic and "one row" in name)
]  # fmt: skip


@pytest.mark.cpu
@pytest.mark.parametrize(("name", "stage", "training", "dynamic", "part"), CASES)
def test_stage_is_sound(name, stage, training, dynamic, part):
    gm = captured(name, stage, training, dynamic, part)
    guards = testing.guards_of(gm)
    run = testing.run_pass(stage_pass(stage), gm)
    if stage == "aten":
        assert run.fired
    assert testing.guards_of(gm) == guards
    testing.assert_numerics(run, factor=3.0)
    testing.assert_mutation_safe(run)
    if stage != "dynamo":  # where AOTAutograd computes every value anew
        testing.assert_meta(run, same_outputs=False)
    again = testing.run_pass(stage_pass(stage), run.after)
    assert not again.changed
