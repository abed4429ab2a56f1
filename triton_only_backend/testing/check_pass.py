"""Everything that holds of a sound pass, in one call; and the graph it should leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton_only_backend.errors import TritonOnlyError
from triton_only_backend.testing.check_meta import assert_meta
from triton_only_backend.testing.check_numerics import assert_mutation_safe, assert_numerics
from triton_only_backend.testing.check_ops import assert_fired, assert_idempotent
from triton_only_backend.testing.rendering import render
from triton_only_backend.testing.running import PassRun

if TYPE_CHECKING:
    import torch


def assert_pass(
    graph_pass: Any,
    gm: torch.fx.GraphModule,
    *,
    times: int | None = None,
    inputs: Any = None,
    backward: bool = False,
    factor: float = 2.0,
) -> PassRun:
    """All that holds of a sound pass on a graph that it should change.

    It fires; a second run finds nothing; fake values are true; the same inputs are written to and
    the same tensors share memory; results are as accurate, against fp64.

    Args:
        times: how often it shall match.
        inputs: real tensors; random ones by default.
        backward: compare the gradients of the floating inputs too.
        factor: how many times the error of the graph before is allowed.
    """
    run = assert_fired(graph_pass, gm, times=times)
    assert_idempotent(graph_pass, gm)
    assert_meta(run, inputs=inputs)
    assert_mutation_safe(run, inputs=inputs)
    assert_numerics(run, inputs=inputs, backward=backward, factor=factor)
    return run


def assert_expected_graph(gm: torch.fx.GraphModule | PassRun, expect: str) -> None:
    """Asserts a graph's text (see `render`); of a PassRun, the graph after the pass.

    `EXPECTTEST_ACCEPT=1 python -m pytest …` writes the text into the calling test's source.
    """
    try:
        from expecttest import assert_expected_inline
    except ImportError as error:
        raise TritonOnlyError(
            "assert_expected_graph needs expecttest: pip install 'triton-only-backend[test]'"
        ) from error
    graph = gm.after if isinstance(gm, PassRun) else gm
    assert_expected_inline(render(graph), expect, skip=1)
