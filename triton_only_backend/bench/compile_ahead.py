"""Compiles products' kernels in parallel processes before they are measured, one a core.

Where they are launched, one after the other, the 100 or so of `bench gemm --shapes all` take
a minute and a half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton_only_backend.kernels import hardware
from triton_only_backend.kernels.gemm_choice import select_config
from triton_only_backend.tuning.compilation import Job, Pool, current_target
from triton_only_backend.tuning.problems import product

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from triton_only_backend.bench.gemm import Plan
    from triton_only_backend.kernels.hardware import Hardware


def jobs(plan: Plan, device: Hardware) -> Iterable[Job]:
    """What the plan's products run by: the configuration of each, as it will be chosen."""
    for layer in plan.products():
        for M in plan.rows_of(layer):
            kind, problem = product(
                layer.batch, M, layer.N, layer.K, dtype=plan.dtype, k_contiguous=plan.k_contiguous
            )
            yield Job(kind, problem, select_config(problem, device))


def compile_ahead(plan: Plan, device: torch.device) -> None:
    """Fills Triton's cache; nothing on a CPU, where kernels are interpreted.

    What does not compile says so when it is launched.
    """
    if device.type != "cuda":
        return
    found = hardware.of(device)
    with Pool(current_target(), found) as pool:
        wanted = list(jobs(plan, found))
        for job in wanted:
            pool.submit(job)
        for job in wanted:
            pool.result(job)
