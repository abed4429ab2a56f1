"""Does Inductor's cache notice a changed pass: functions that raise AssertionError."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch

from triton_only_backend.testing import private
from triton_only_backend.testing.capturing import placeholder_values


def assert_cache_key(
    graph_pass: Any,
    changed: Any,
    gm: torch.fx.GraphModule | None = None,
    *,
    hook: str = "post_grad_custom_pre_pass",
) -> None:
    """Asserts that Inductor's graph cache tells a pass from a changed one, and only then.

    Args:
        graph_pass: a `CustomGraphPass`.
        changed: the same pass with another source or another setting.
        gm: a graph to compute the key of; an empty one by default.
        hook: where the pass is installed.
    """
    for each in (graph_pass, changed):
        if not hasattr(each, "uuid"):
            raise AssertionError(
                f"{each!r} has no uuid(): Inductor bypasses its cache for it; derive it from "
                "CustomGraphPass"
            )
        if each.uuid() is None:
            raise AssertionError(f"uuid() of {each!r} is None: Inductor bypasses its cache for it")
    if gm is None:
        graph = torch.fx.Graph()
        graph.output(())
        gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    values = placeholder_values(gm)
    keys = [private.cache_key(gm, values, hook, p) for p in (graph_pass, graph_pass, changed)]
    if keys[0] != keys[1]:
        raise AssertionError("the cache key is another one each time; uuid() must be stable")
    if keys[0] == keys[2]:
        raise AssertionError(
            f"the cache key does not change with the pass: uuid() is {graph_pass.uuid()!r} for "
            "both; hash the sources and settings that the pass depends on"
        )


def source_hash(*objects: Any) -> str:
    """A hash of the sources of functions, classes or modules, for a pass's uuid."""
    digest = hashlib.sha256()
    for each in objects:
        digest.update(inspect.getsource(each).encode())
    return digest.hexdigest()
