"""`PassTestCase`: the checks as methods of a unittest class, with expected graphs inline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton_only_backend.errors import TritonOnlyError
from triton_only_backend.testing import (
    accuracy,
    capturing,
    check_cache,
    check_meta,
    check_numerics,
    check_ops,
    check_pass,
    patterns,
)
from triton_only_backend.testing.rendering import render
from triton_only_backend.testing.running import PassRun, run_pass

try:
    import expecttest
except ImportError as error:
    raise TritonOnlyError(
        "triton_only_backend.testing.PassTestCase needs expecttest: "
        "pip install 'triton-only-backend[test]'"
    ) from error

if TYPE_CHECKING:
    import torch


class PassTestCase(expecttest.TestCase):
    """A test case for graph passes.

        class TestSilu(PassTestCase):
            def test_fuses(self):
                gm = self.capture(lambda x: x * torch.sigmoid(x), torch.randn(4, 8))
                run = self.assertFired(fuse_silu, gm, times=1)
                self.assertGraph(run.after, \"\"\"…\"\"\")

    `EXPECTTEST_ACCEPT=1 python -m pytest test_silu.py` writes the expected graphs into the source.
    """

    longMessage = True
    maxDiff = None

    capture = staticmethod(capturing.capture)
    run_pass = staticmethod(run_pass)
    assertOps = staticmethod(check_ops.assert_ops)
    assertFired = staticmethod(check_ops.assert_fired)
    assertRefused = staticmethod(check_ops.assert_refused)
    assertIdempotent = staticmethod(check_ops.assert_idempotent)
    assertNumerics = staticmethod(check_numerics.assert_numerics)
    assertMutationSafe = staticmethod(check_numerics.assert_mutation_safe)
    assertDynamic = staticmethod(check_numerics.assert_dynamic)
    assertMeta = staticmethod(check_meta.assert_meta)
    assertCacheKey = staticmethod(check_cache.assert_cache_key)
    assertMatches = staticmethod(patterns.assert_matches)
    assertAccurate = staticmethod(accuracy.assert_accurate)
    assertRepeatable = staticmethod(accuracy.assert_repeatable)

    def assertGraph(self, gm: torch.fx.GraphModule | PassRun, expect: str) -> None:
        """Asserts a graph's text (see `render`); of a PassRun, the graph after the pass."""
        graph = gm.after if isinstance(gm, PassRun) else gm
        self.assertExpectedInline(render(graph), expect, skip=1)

    def assertPass(
        self,
        graph_pass: Any,
        gm: torch.fx.GraphModule,
        *,
        times: int | None = None,
        inputs: Any = None,
        backward: bool = False,
        factor: float = 2.0,
    ) -> PassRun:
        """All that holds of a sound pass on a graph that it should change.

        It fires; a second run finds nothing; fake values are true; results are as accurate; it
        writes to the same inputs; the same tensors share memory.
        """
        return check_pass.assert_pass(
            graph_pass, gm, times=times, inputs=inputs, backward=backward, factor=factor
        )
