"""Runs the suite on the GPU where there is one, else on the CPU through the Triton interpreter."""

from __future__ import annotations

import os

# Before torch reads them. Inductor would start as many compiling processes as there are cores for
# each of as many test processes, and OpenMP as many threads; they wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from triton_only_backend import backend, interpreter

INTERPRETED = interpreter.install_if_wanted()
# Files whose tests take longest: where one of them comes last, the other processes wait for it.
FIRST = {
    "test_attention_configs.py", "test_attention_sweep.py", "test_audit_export.py", "test_cache.py",
    "test_compile_linear.py", "test_gemm_sweep.py", "test_mask_spans.py", "test_perplexity.py",
    "test_rewrite_grouped_mm.py", "test_tuning_backend.py",
}  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("-m")
    for item in items:
        if item.get_closest_marker("gpu") and INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("cpu") and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="is about running without a GPU"))
        if item.get_closest_marker("exhaustive") and "exhaustive" not in asked:
            item.add_marker(pytest.mark.skip(reason="exhaustive: run with -m exhaustive"))
    deal(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def deal(items: list[pytest.Item], workers: int) -> None:
    """Puts tests of FIRST at the head of each worker's share: `worksteal` cuts the list evenly."""
    long = [item for item in items if item.path.name in FIRST]
    short = [item for item in items if item.path.name not in FIRST]
    cuts = [len(short) * worker // workers for worker in range(workers + 1)]
    items[:] = [
        item
        for worker in range(workers)
        for item in long[worker::workers] + short[cuts[worker] : cuts[worker + 1]]
    ]


@pytest.fixture
def device() -> str:
    """Where kernels run: "cuda", or "cpu" under the interpreter."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> object:
    """Each test compiles anew, with the same random numbers and no report of another's graphs."""
    torch.manual_seed(0)
    backend._recent.clear()  # bounded: once full, its length says nothing of what a test compiled
    yield
    torch._dynamo.reset()
