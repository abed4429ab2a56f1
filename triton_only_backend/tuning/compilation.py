"""Compiles candidates in other processes, ahead of their measurement, into Triton's cache.

The processes never touch the GPU: see `cross_compile`. They come from a server that has imported
everything once, so that many of them start in little more time than one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import types
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from triton_only_backend.tuning.cross_compile import Compiled, Target

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from triton_only_backend.kernels.hardware import Hardware

# Bytes of no weight: a few registers that ptxas keeps on the stack below its limit of 255.
SPILL_TOLERANCE = 16
_compiled: list[Compiled] = []


@dataclass(frozen=True)
class Job:
    """One configuration of one problem."""

    kind: str
    problem: Any
    config: Any


def compiled_as(job: Job, num_sms: int) -> Hashable:
    """Equal for jobs that compile the same kernel; unequal for some that do, too."""
    if job.kind != "gemm":
        return job
    p, c = job.problem, replace(job.config, resident=1, reduce_block=512)
    rows, columns = (p.N, p.M) if c.swap_operands else (p.M, p.N)
    tiles = p.batch * -(-rows // c.block_m) * -(-columns // c.block_n) * c.split_k
    return (
        c, p.element_size, p.ieee, p.a_k_contiguous, p.b_k_contiguous, p.aligned, p.batch == 1,
        tiles <= num_sms * job.config.resident, c.stream_k and tiles % num_sms == 0,
        p.K % (c.block_k * c.split_k) == 0,
        # Triton asks whether a size is 1 and whether 16 divides it, `eights` whether 8 does.
        *((size == 1, size % 16 == 0, size % 16 == 8) for size in (p.M, p.N, p.K)),
        rows if c.kernel == "gemv" else None,
        p.K if c.kernel == "ring_linear" or c.realign or c.alternate else None,
    )  # fmt: skip


def current_target() -> Target:
    """What Triton compiles for on the current device."""
    import triton

    found = triton.runtime.driver.active.get_current_target()
    return Target(found.backend, found.arch, found.warp_size)


def begin(target: Target, hardware: Hardware) -> None:
    """Makes this process one that compiles for a GPU: a worker's first call."""
    import torch

    from triton_only_backend import interpreter
    from triton_only_backend.kernels import hardware as of_devices
    from triton_only_backend.tuning.cross_compile import compile_only

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this.
    torch.set_num_threads(1)
    interpreter.install_if_wanted = lambda: False
    of_devices.of = lambda device: hardware  # type: ignore[assignment]
    global _compiled
    _compiled = compile_only(target)


def compile_job(job: Job, shared_memory: int) -> str | None:
    """Compiles a candidate in a process that `begin` made ready.

    Returns:
        Why it cannot be used, or None.
    """
    import torch
    from triton.errors import TritonError

    from triton_only_backend.kernels import tuned
    from triton_only_backend.tuning.trial import call, fp32_precision

    _compiled.clear()
    run = call(job.kind, job.problem, torch.device("cpu"))
    try:
        with tuned.forcing(job.kind, job.config), fp32_precision(job.problem):
            run()
    except (TritonError, RuntimeError, ValueError, AssertionError) as error:
        # What Triton says of a tile that it cannot compile: no two causes have one class.
        return f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    spilled = max((kernel.spilled for kernel in _compiled), default=0)
    shared = max((kernel.shared_memory for kernel in _compiled), default=0)
    if shared > shared_memory:
        return f"{shared} bytes of shared memory"
    return f"spills {spilled} bytes" if spilled > SPILL_TOLERANCE else None


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start meanwhile do not import the user's script, which may lack a guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Pool:
    """Processes that compile; a crash of the compiler costs the job that caused it, no other."""

    def __init__(self, target: Target, hardware: Hardware, processes: int | None = None) -> None:
        self._target, self._hardware = target, hardware
        self._processes = processes or max(1, (os.cpu_count() or 1) - 1)
        self._executor = self._start(self._processes)
        self._futures: dict[Hashable, Future[str | None]] = {}
        self._jobs: dict[Hashable, Job] = {}

    def _start(self, processes: int) -> Executor:
        known = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context(
            "forkserver" if "forkserver" in known else "spawn"
        )
        if "forkserver" in known:
            context.set_forkserver_preload(
                ["triton_only_backend.kernels.matmul", "triton_only_backend.tuning.trial"]
            )
        return ProcessPoolExecutor(
            processes, context, initializer=begin, initargs=(self._target, self._hardware)
        )

    def submit(self, job: Job) -> None:
        """Puts a job behind those that wait."""
        key = self._key(job)
        if key not in self._futures:
            self._jobs[key] = job
            self._futures[key] = self._compile(self._executor, job)

    def _key(self, job: Job) -> Hashable:
        return compiled_as(job, self._hardware.num_sms)

    def _compile(self, executor: Executor, job: Job) -> Future[str | None]:
        with _without_main():
            return executor.submit(compile_job, job, self._hardware.shared_memory)

    def result(self, job: Job) -> str | None:
        """Waits for a job: why its candidate cannot be used, or None."""
        self.submit(job)
        try:
            return self._futures[self._key(job)].result()
        except BrokenProcessPool:
            self._revive(job)
            return self._futures[self._key(job)].result()

    def _revive(self, job: Job) -> None:
        """Compiles the job that was waited for alone, and those not done yet in a new pool."""
        self.close()
        future: Future[str | None] = Future()
        with self._start(1) as alone:
            try:
                future.set_result(self._compile(alone, job).result())
            except BrokenProcessPool:
                future.set_result("the compiler crashed")
        self._executor = self._start(self._processes)
        self._futures[self._key(job)] = future
        for key, waiting in self._jobs.items():
            found = self._futures[key]
            if found.cancelled() or (found.done() and found.exception() is not None):
                self._futures[key] = self._compile(self._executor, waiting)

    def close(self) -> None:
        """Ends the processes without waiting for what they have begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
