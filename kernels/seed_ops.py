"""Schema, fake kernel and implementation of `random_seeds`, which takes no tensor."""

from __future__ import annotations

import torch

from triton_only_backend.kernels.loading import load

NAME = "random_seeds"
SCHEMA = f"{NAME}(int count, *, Device device) -> Tensor"
TAGS = (
    torch.Tag.pt2_compliant_tag,
    torch.Tag.flexible_layout,
    torch.Tag.nondeterministic_seeded,  # neither merged with its like nor folded into a constant
)


def _random_seeds(count: int, *, device: torch.device) -> torch.Tensor:
    seeds: torch.Tensor = load("random_seeds").draw(count, torch.device(device))
    return seeds


def _fake_random_seeds(count: int, *, device: torch.device) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int64, device=device)


def register(library: torch.library.Library) -> None:
    """Defines the op; one without tensors is dispatched by BackendSelect."""
    library.define(SCHEMA, tags=TAGS)
    library.impl(NAME, _random_seeds, "BackendSelect")
    torch.library.register_fake(f"triton_only::{NAME}", _fake_random_seeds, lib=library)
