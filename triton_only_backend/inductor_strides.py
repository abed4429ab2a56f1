"""How strides are ordered while Inductor lowers a graph with symbolic sizes.

Inductor 2.13 takes one stride for at least another if a guard says so, or else if the remainder of
their division is 0. sympy cannot bound the remainder of sums (s + 1 by s * t + s + t + 1, the
strides of a view of a padded image), and the compilation ends in a ValueRangeError. Where the
symbols have values the guard has answered already; only of those that have none (`item()`) the
remainder can say more.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

COMPARISON = "_stride_expr_ge_or_false"  # of a layout; Inductor 2.11 has none


def compared_by_value() -> AbstractContextManager[object]:
    """Strides whose symbols have values are compared by these meanwhile, without a remainder."""
    from torch._inductor.ir import Layout
    from torch._inductor.virtualized import V
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    original = getattr(Layout, COMPARISON, None)
    if original is None:
        return contextlib.nullcontext()

    def at_least(left: Any, right: Any) -> bool:
        if free_unbacked_symbols((left, right)):
            return bool(original(left, right))
        answer = left >= right
        return bool(answer if isinstance(answer, bool) else V.graph.sizevars.guard_or_false(answer))

    return mock.patch.object(Layout, COMPARISON, staticmethod(at_least))
