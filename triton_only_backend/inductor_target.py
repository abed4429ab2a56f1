"""Inductor's output code for a CUDA device that is not there.

The graph is traced, and rewritten by our passes, on CPU tensors. Right before Inductor lowers it
every tensor of it is moved to a fake CUDA device, whose properties stand in for the driver's. The
code is written as for that device, and then compilation stops: nothing is compiled or run.

Not known without the device: what autotuning would choose (it is off), whether the kernels compile,
CUDA graphs, times. A model that asks for its device in Python is told "cpu".
"""

from __future__ import annotations

import contextlib
import copy
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from triton_only_backend import inductor
from triton_only_backend.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

CUDA = torch.device("cuda:0")
# Streaming multiprocessors by compute capability: A100, A40, RTX 4090, H100, B200, RTX 5090.
_MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


class _Finished(BaseException):
    """The code is written. No Exception, so that nothing on the way up takes it for a failure."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source


def parse(target: str) -> int:
    """`cuda:90` -> 90, the compute capability.

    Raises:
        SettingsError: it is something else.
    """
    match = re.fullmatch(r"cuda:(\d+)", target)
    if match is None or int(match[1]) not in _MULTIPROCESSORS:
        known = ", ".join(f"cuda:{capability}" for capability in _MULTIPROCESSORS)
        raise SettingsError(f"triton_only: unknown target {target!r} (one of {known})")
    return int(match[1])


def output_code(
    compile_fx_inner: Callable[..., Any],
    gm: torch.fx.GraphModule,
    inputs: Sequence[Any],
    options: Mapping[str, Any],
    capability: int,
) -> str:
    """The code that Inductor would write for an aten graph on a device of that capability.

    Args:
        gm, inputs: the graph and its fake inputs, on the CPU; they are left as they are.
        options: the keyword arguments of `compile_fx_inner`.
    """
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering

    class Lowering(GraphLowering):
        def __init__(self, gm: Any, example_inputs: Any = None, **options: Any) -> None:
            gm, self.moved_inputs = _moved(gm, example_inputs)
            super().__init__(gm, example_inputs=self.moved_inputs, **options)

        def run(self, *_: Any, **options: Any) -> Any:
            return super().run(*self.moved_inputs, **options)

        def codegen(self) -> Any:
            code = super().codegen()[0]
            raise _Finished(str(getattr(code, "value", code)))

    settings = {
        "fx_graph_cache": False,
        "max_autotune": False,
        "max_autotune_gemm": False,
        "max_autotune_pointwise": False,
        "triton.cudagraphs": False,
    }
    with (
        _device(capability),
        mock.patch.object(compile_fx, "GraphLowering", Lowering),
        config.patch(settings),
    ):
        with inductor.without_fake_tensors():  # a constant of the graph is a real tensor
            copied = copy.deepcopy(gm)
        try:
            compile_fx_inner(copied, list(inputs), **options)
        except _Finished as finished:
            return finished.source
    raise AssertionError("Inductor compiled a graph without lowering it")


def _moved(
    gm: torch.fx.GraphModule, inputs: Sequence[Any]
) -> tuple[torch.fx.GraphModule, list[Any]]:
    """The graph and its inputs with every tensor on the fake device."""

    def tensor(value: Any) -> Any:
        if not isinstance(value, FakeTensor) or value.device.type != "cpu":
            return value
        with torch.utils._python_dispatch._disable_current_modes():
            meta = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="meta"
            )
        return FakeTensor(value.fake_mode, meta, CUDA)

    def device(value: Any) -> Any:
        return CUDA if isinstance(value, torch.device) and value.type == "cpu" else value

    for module in gm.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = torch.utils._pytree.tree_map(tensor, node.meta["val"])
            node.args = torch.fx.node.map_aggregate(node.args, device)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, device)
        module.recompile()
    return gm, [tensor(value) for value in inputs]


@contextlib.contextmanager
def _device(capability: int) -> Iterator[None]:
    """A CUDA device for whoever asks torch, Inductor or Triton about one."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    version = divmod(capability, 10)
    properties = SimpleNamespace(
        name=f"CUDA device of capability {version[0]}.{version[1]}",
        major=version[0],
        minor=version[1],
        multi_processor_count=_MULTIPROCESSORS[capability],
        total_memory=80 << 30,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=227 << 10,
        shared_memory_per_multiprocessor=228 << 10,
        L2_cache_size=50 << 20,
        gcnArchName="",
        is_integrated=0,
    )

    def constant(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    class Driver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            """Loads nothing: there is no driver library."""

        get_current_target = constant(GPUTarget("cuda", capability, 32))
        get_current_device = constant(0)
        get_current_stream = constant(0)
        is_active = staticmethod(constant(True))

    random_state = torch.zeros(16, dtype=torch.uint8)
    on_cuda = {
        "is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
        "get_device_properties": properties, "get_device_capability": version,
        "get_device_name": properties.name, "is_bf16_supported": True, "synchronize": None,
        "current_stream": None, "set_device": None, "_exchange_device": 0,
        "_maybe_exchange_device": 0, "get_rng_state": random_state, "set_rng_state": None,
    }  # fmt: skip
    on_interface = {
        "is_available": True, "current_device": 0, "get_compute_capability": capability,
        "get_device_properties": properties, "synchronize": None, "get_raw_stream": 0,
    }  # fmt: skip
    on_worker = {"get_device_properties": properties, "current_device": 0}
    drivers = triton.runtime.driver
    before = drivers._active
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        for name, value in on_cuda.items():
            stack.enter_context(patch(torch.cuda, name, constant(value)))
        for owner, values in ((CudaInterface, on_interface), (CudaInterface.Worker, on_worker)):
            for name, value in values.items():
                stack.enter_context(patch(owner, name, staticmethod(constant(value))))
        stack.enter_context(patch(fake_tensor, "init_gpu_context", constant(None)))
        stack.callback(_forget, DeviceProperties)
        stack.callback(drivers.set_active, before)
        drivers.set_active(Driver())
        _forget(DeviceProperties)
        yield


def _forget(device_properties: Any) -> None:
    """Forgets what was learnt of the device, which comes or goes."""
    from torch.utils import _triton

    for function in (device_properties.create, *vars(_triton).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()
