"""silu(gate) * up becomes one op: options={"post_grad_custom_pre_pass": fuse_swiglu}."""

import torch
import torch.nn.functional as F

from triton_only_backend.testing import pattern_pass


@torch.library.custom_op("example::swiglu", mutates_args=())
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up  # stands for a kernel of one's own


@swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate)


def search(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def replace(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.ops.example.swiglu.default(gate, up)


fuse_swiglu = pattern_pass(search, replace, [torch.empty(4, 8), torch.empty(4, 8)])
