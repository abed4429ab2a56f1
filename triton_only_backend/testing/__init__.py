"""A kit to test graph passes and numerics: ours, and anyone's.

    from triton_only_backend.testing import PassTestCase, assert_accurate, capture

Nothing here needs a GPU, and nothing knows of this package's own passes or kernels: passes may be
for any hook of Inductor or any backend, functions may come from anywhere.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton_only_backend.testing import strategies as strategies
    from triton_only_backend.testing.accuracy import Accuracy as Accuracy
    from triton_only_backend.testing.accuracy import assert_accurate as assert_accurate
    from triton_only_backend.testing.accuracy import assert_repeatable as assert_repeatable
    from triton_only_backend.testing.building import GraphBuilder as GraphBuilder
    from triton_only_backend.testing.capturing import CaptureError as CaptureError
    from triton_only_backend.testing.capturing import capture as capture
    from triton_only_backend.testing.capturing import to_device as to_device
    from triton_only_backend.testing.case import PassTestCase as PassTestCase
    from triton_only_backend.testing.check_cache import assert_cache_key as assert_cache_key
    from triton_only_backend.testing.check_cache import source_hash as source_hash
    from triton_only_backend.testing.check_meta import assert_meta as assert_meta
    from triton_only_backend.testing.check_numerics import assert_dynamic as assert_dynamic
    from triton_only_backend.testing.check_numerics import (
        assert_mutation_safe as assert_mutation_safe,
    )
    from triton_only_backend.testing.check_numerics import assert_numerics as assert_numerics
    from triton_only_backend.testing.check_numerics import guards_of as guards_of
    from triton_only_backend.testing.check_ops import assert_fired as assert_fired
    from triton_only_backend.testing.check_ops import assert_idempotent as assert_idempotent
    from triton_only_backend.testing.check_ops import assert_ops as assert_ops
    from triton_only_backend.testing.check_ops import assert_refused as assert_refused
    from triton_only_backend.testing.check_ops import count_ops as count_ops
    from triton_only_backend.testing.check_ops import refusals as refusals
    from triton_only_backend.testing.check_pass import (
        assert_expected_graph as assert_expected_graph,
    )
    from triton_only_backend.testing.check_pass import assert_pass as assert_pass
    from triton_only_backend.testing.minimising import Failure as Failure
    from triton_only_backend.testing.minimising import draw as draw
    from triton_only_backend.testing.minimising import find_failure as find_failure
    from triton_only_backend.testing.minimising import graph_of as graph_of
    from triton_only_backend.testing.minimising import minimise as minimise
    from triton_only_backend.testing.minimising import reproducer as reproducer
    from triton_only_backend.testing.pattern_passes import pattern_pass as pattern_pass
    from triton_only_backend.testing.pattern_passes import rewrite_pass as rewrite_pass
    from triton_only_backend.testing.patterns import Miss as Miss
    from triton_only_backend.testing.patterns import assert_matches as assert_matches
    from triton_only_backend.testing.patterns import closest_miss as closest_miss
    from triton_only_backend.testing.patterns import make_pattern as make_pattern
    from triton_only_backend.testing.rendering import render as render
    from triton_only_backend.testing.running import PassRun as PassRun
    from triton_only_backend.testing.running import random_inputs as random_inputs
    from triton_only_backend.testing.running import run_graph as run_graph
    from triton_only_backend.testing.running import run_pass as run_pass
    from triton_only_backend.testing.running import sizes_of as sizes_of

_PUBLIC = {
    "Accuracy": "accuracy",
    "CaptureError": "capturing",
    "Failure": "minimising",
    "GraphBuilder": "building",
    "Miss": "patterns",
    "PassRun": "running",
    "PassTestCase": "case",
    "assert_accurate": "accuracy",
    "assert_cache_key": "check_cache",
    "assert_dynamic": "check_numerics",
    "assert_expected_graph": "check_pass",
    "assert_fired": "check_ops",
    "assert_idempotent": "check_ops",
    "assert_matches": "patterns",
    "assert_meta": "check_meta",
    "assert_mutation_safe": "check_numerics",
    "assert_numerics": "check_numerics",
    "assert_ops": "check_ops",
    "assert_pass": "check_pass",
    "assert_refused": "check_ops",
    "assert_repeatable": "accuracy",
    "closest_miss": "patterns",
    "capture": "capturing",
    "count_ops": "check_ops",
    "draw": "minimising",
    "find_failure": "minimising",
    "graph_of": "minimising",
    "guards_of": "check_numerics",
    "make_pattern": "patterns",
    "minimise": "minimising",
    "pattern_pass": "pattern_passes",
    "random_inputs": "running",
    "refusals": "check_ops",
    "render": "rendering",
    "reproducer": "minimising",
    "rewrite_pass": "pattern_passes",
    "run_graph": "running",
    "run_pass": "running",
    "sizes_of": "running",
    "source_hash": "check_cache",
    "strategies": "strategies",
    "to_device": "capturing",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_PUBLIC[name]}")
    return module if name == "strategies" else getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
