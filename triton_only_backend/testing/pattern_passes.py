"""Passes from a function to look for and one to put in its place."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import subgraph_rewriter

from triton_only_backend.testing import private
from triton_only_backend.testing.check_cache import source_hash
from triton_only_backend.testing.patterns import make_pattern
from triton_only_backend.testing.rendering import value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def pattern_pass(
    search: Callable[..., Any],
    replace: Callable[..., Any],
    example_inputs: Sequence[Any],
    *,
    extra_check: Callable[[Any], bool] = lambda match: True,
    training: bool = False,
) -> Any:
    """A pass for Inductor's hooks that replaces what `search` computes by what `replace` computes.

    It is a `CustomGraphPass` with a `uuid` of the three functions' sources, and returns the number
    of matches; `.pattern` is for `closest_miss`.

    Args:
        search, replace: functions of the same tensors.
        extra_check: of Inductor's `Match`, whether to replace.
    """
    patterns = private.replacement_pass(search, replace, example_inputs, extra_check, training)
    found = make_pattern(search, example_inputs, training=training)
    identity = source_hash(search, replace, extra_check)

    class Pass(private.graph_pass_class()):  # type: ignore[misc]
        pattern = found

        def __call__(self, graph: torch.fx.Graph) -> int:
            return int(patterns.apply(graph))

        def uuid(self) -> str:
            return identity

    return Pass()


def rewrite_pass(
    search: Callable[..., Any],
    replace: Callable[..., Any],
    *,
    extra_check: Callable[[Any], bool] = lambda match: True,
) -> Any:
    """A pass for Dynamo's graph, where calls are torch functions and methods, not aten ops yet.

    On `torch.fx.subgraph_rewriter`: it compares calls as they are written (`x * y` is
    operator.mul, `torch.mul(x, y)` is not), and takes the GraphModule. It returns the number of
    matches; `.pattern` is for `closest_miss`.

    Args:
        search, replace: functions of the same tensors.
        extra_check: of the rewriter's `InternalMatch`, whether to replace.
    """

    class Pass:
        pattern = private.trace_calls(search, list(inspect.signature(search).parameters))

        def __call__(self, gm: torch.fx.GraphModule) -> int:
            known = set(gm.graph.nodes)
            matches = subgraph_rewriter.replace_pattern_with_filters(
                gm, search, replace, [lambda match, *_: extra_check(match)]
            )
            for node in gm.graph.nodes:
                if node not in known and node.op.startswith("call"):
                    _give_value(node)
            return len(matches)

    return Pass()


def _give_value(node: torch.fx.Node) -> None:
    """The fake value of a new node of Dynamo's graph."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    mode = next(leaf.fake_mode for leaf in leaves if hasattr(leaf, "fake_mode"))
    target: Any = node.target
    with mode, torch.no_grad():
        if node.op == "call_method":
            node.meta["example_value"] = getattr(args[0], target)(*args[1:], **kwargs)
        else:
            node.meta["example_value"] = target(*args, **kwargs)
