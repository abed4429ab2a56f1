"""What the tests of kernels for Hopper share: where they run, or not; attention's operands there."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

import pytest
import torch

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.gemm_choice import general_config, heuristic_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Test = TypeVar("Test", bound="Callable[..., object]")


def hopper(test: Test) -> Test:
    """Runs a test on a Hopper GPU only."""
    missing = not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="the kernel is for Hopper")(test))


@contextlib.contextmanager
def unknown_gluon() -> Iterator[None]:
    """As with a Triton whose Gluon is not known: what is chosen of products, then chosen anew."""
    chosen = (heuristic_config, general_config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "gluon_is_known", lambda: False)
        for cached in chosen:
            cached.cache_clear()
        try:
            yield
        finally:
            for cached in chosen:
                cached.cache_clear()


def check_replays(
    chain: Callable[[bool], torch.Tensor],
    right: torch.Tensor,
    poison: Callable[[], object] = lambda: None,
) -> None:
    """Whether a chain of kernels that read weights early gives `right`, launched and replayed.

    Args:
        chain: launches them, early or not, and returns the last one's result.
        poison: what else than the result to spoil before each replay.
    """
    assert torch.equal(chain(True), right)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(True)
    for _ in range(50):
        out.fill_(float("nan"))
        poison()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, right)


def random_heads(
    batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, order: str
) -> torch.Tensor:
    """(batch, heads, length, dim), which lies in memory so, as "blhd", or "packed" between others."""
    if order == "blhd":
        x = torch.randn(batch, length, heads, dim, device="cuda", dtype=dtype)
        return x.transpose(1, 2)
    if order == "packed":
        whole = torch.randn(batch, length, 3 * heads * dim, device="cuda", dtype=dtype)
        middle = whole[..., heads * dim : 2 * heads * dim]
        return middle.view(batch, length, heads, dim).transpose(1, 2)
    return torch.randn(batch, heads, length, dim, device="cuda", dtype=dtype)
