"""What Inductor lowers wrongly, done properly while this backend compiles.

1. A masked read (of padding, say) whose buffer the same kernel computes takes the value from the
   registers and forgets the mask: `F.pad(x.sum(-1), (1, 0))` gives the sum where 0 belongs
   (pytorch/pytorch#189895, in 2.11 and 2.13). And a masked read of a single boolean has True
   beside it for False. Both are followed by a select.
2. Inductor 2.13 takes one stride for at least another if a guard says so, or else if the remainder
   of their division is 0. sympy cannot bound the remainder of sums (s + 1 by s * t + s + t + 1, the
   strides of a view of a padded image), and the compilation ends in a ValueRangeError. Where the
   symbols have values the guard has answered already; only of those that have none (`item()`) the
   remainder can say more.
3. The order of strides is sorted by sympy, which raises a TypeError where a comparison depends on
   the symbols' values (8 * ((s - 4) // 3) + 8 < 8). There it is sorted with guards.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMPARISON = "_stride_expr_ge_or_false"  # of a layout; Inductor 2.11 has none


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Inductor lowers graphs as said above meanwhile."""
    from torch._inductor import ir
    from torch._inductor.codegen.triton import TritonKernelOverrides

    with contextlib.ExitStack() as stack:
        masked = _select_after(TritonKernelOverrides.masked)
        stack.enter_context(mock.patch.object(TritonKernelOverrides, "masked", masked))
        order = _with_guards(ir.get_stride_order)
        stack.enter_context(mock.patch.object(ir, "get_stride_order", order))
        if hasattr(ir.Layout, COMPARISON):
            at_least = _by_value(getattr(ir.Layout, COMPARISON))
            stack.enter_context(mock.patch.object(ir.Layout, COMPARISON, at_least))
        yield


def _select_after(original: Callable[..., Any]) -> Any:
    import torch
    from torch._inductor.virtualized import V

    def masked(mask: Any, body: Any, other: Any) -> Any:
        result = original(mask, body, other)
        is_false = result.dtype == torch.bool and not other
        if not is_false and not _reads_registers(body, V.kernel.cse.store_cache):
            return result
        ops = V.get_ops_handler()
        return ops.where(mask, result, ops.constant(other, result.dtype))

    return staticmethod(masked)


def _reads_registers(body: Any, computed: Any) -> bool:
    """Whether what a masked body gives is a load of a buffer that the kernel has computed."""
    results = [arg for node in body.graph.find_nodes(op="output") for arg in node.args]
    return any(node.target == "load" and node.args[1] in computed for node in results)


def _by_value(original: Callable[..., Any]) -> Any:
    from torch._inductor.virtualized import V
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    def at_least(left: Any, right: Any) -> bool:
        if free_unbacked_symbols((left, right)):
            return bool(original(left, right))
        answer = left >= right
        return bool(answer if isinstance(answer, bool) else V.graph.sizevars.guard_or_false(answer))

    return staticmethod(at_least)


def _with_guards(original: Callable[..., Any]) -> Any:
    from torch._inductor.virtualized import V

    def get_stride_order(strides: Any, shape_env: Any = None) -> Any:
        try:
            return original(strides, shape_env)
        except TypeError:
            return original(strides, V.graph.sizevars.shape_env)

    return get_stride_order
