"""Whose kernel is it? Triton's own by exact name, from live objects; a library's by its naming.

A library's pattern is never asked first: a name proves that a kernel is Triton's only if Triton
compiled a kernel of that name in this process.
"""

from __future__ import annotations

import gc
import re
import sys
from typing import TYPE_CHECKING, Any

from triton_only_backend import inductor
from triton_only_backend.audit.policy import Provider

if TYPE_CHECKING:
    from collections.abc import Mapping

WARP_SIZE = 32  # of CUDA devices

# Provider of a kernel that is not Triton's, by the first pattern that its name contains.
_PATTERNS: tuple[tuple[Provider, str], ...] = (
    (Provider.MEMCPY, r"^Memcpy|^CopyDevice|^hipMemcpy"),
    # CUDA graphs copy their inputs in by _foreach_copy_; between two dtypes it is arithmetic.
    (Provider.MEMCPY, r"multi_tensor_apply_kernel<.*\bCopy<([\w:]+), \1>"),
    (Provider.MEMSET, r"^Memset|^hipMemset|^FillBuffer"),
    (Provider.NCCL, r"^nccl|ncclDevKernel|ncclKernel|^rccl"),
    (Provider.FLASH, r"pytorch_flash|flash::|flash_fwd|flash_bwd|FlashAttn"),
    (Provider.EFFICIENT, r"fmha_cutlass|PyTorchMemEffAttention|AttentionKernel<"),
    (Provider.CUB, r"^(void )?(at_cuda_detail::)?(cub|thrust|hipcub|rocprim)::"),
    (Provider.ATEN, r"^(void )?(at::|c10::|\(anonymous namespace\)::)"),
    (Provider.CUDNN, r"cudnn|xmma_(fprop|dgrad|wgrad)|_(fprop|dgrad|wgrad)_|implicit_convolve"),
    (Provider.CUDNN, r"winograd|^MIOpen|miopen|LSTM_|GRU_|RNN_|elemWiseRNNcell"),
    (Provider.CUSOLVER, r"cusolver|magma|getrf|potrf|geqrf|syevj|gesvd|^void laswp"),
    (Provider.CUFFT, r"regular_fft|vector_fft|cufft|multi_bluestein|^void fft"),
    (Provider.CUSPARSE, r"cusparse"),
    (
        Provider.CUBLAS,
        r"nvjet_|cublas|cutlass_?\d+_(tensorop|wmma|simt)|xmma_gemm|gemv|gemmk1|Cijk_",
    ),
    (Provider.CUTLASS, r"cutlass|ck_tile|^void ck::"),
    (Provider.CUBLAS, r"gemm|splitKreduce_kernel|dot_kernel|trsm|syrk"),
    (Provider.ATEN, r"at::native|at::cuda"),
    (Provider.CUB, r"\b(cub|thrust)::"),
)


def classify_kernel(name: str, triton_kernels: Mapping[str, Provider]) -> Provider:
    """The provider of a device kernel: a Triton kernel by exact name, the others by pattern."""
    known = triton_kernels.get(name)
    if known is not None:
        return known
    for provider, pattern in _PATTERNS:
        if re.search(pattern, name):
            return provider
    return Provider.UNKNOWN


def triton_kernels() -> dict[str, Provider]:
    """The names of the kernels that Triton compiled, or loaded, in this process."""
    found: dict[str, Provider] = {}
    compiled = _class("triton.compiler.compiler", "CompiledKernel")
    static = inductor.static_kernel_classes()
    for candidate in _live_objects():
        kind = type(candidate)
        if kind is compiled:
            function = getattr(candidate.src, "fn", None)  # one loaded from a file has none
            found[str(candidate.name)] = _origin(function)
        elif kind in static:
            found.setdefault(str(candidate.name), Provider.TRITON_INDUCTOR)
    return found


def block_sizes() -> dict[str, set[int]]:
    """Threads a block with which Triton launches each kernel that it compiled, on CUDA devices.

    A kernel of the same name that runs with another number is not Triton's.
    """
    found: dict[str, set[int]] = {}
    compiled = _class("triton.compiler.compiler", "CompiledKernel")
    static = inductor.static_kernel_classes()
    for candidate in _live_objects():
        kind = type(candidate)
        if kind is compiled or kind in static:
            warps = getattr(getattr(candidate, "metadata", candidate), "num_warps", None)
            if isinstance(warps, int):
                found.setdefault(str(candidate.name), set()).add(warps * WARP_SIZE)
    return found


def interpreted_kernels() -> dict[str, Provider]:
    """The names of the functions that the Triton interpreter has wrapped in this process."""
    interpreted = _class("triton.runtime.interpreter", "InterpretedFunction")
    found: dict[str, Provider] = {}
    for candidate in _live_objects():
        kind = type(candidate)
        if kind is interpreted:
            found[candidate.fn.__name__] = _origin(candidate.fn)
    return found


def _live_objects() -> list[Any]:
    return gc.get_objects()


def _origin(function: Any) -> Provider:
    module = str(getattr(function, "__module__", None) or "")
    if module.startswith("triton_only_backend."):
        return Provider.TRITON_OURS
    return Provider.TRITON_INDUCTOR if module.startswith("torch.") else Provider.TRITON_USER


def _class(module: str, name: str) -> type | None:
    """A class of a module that nobody need have imported: then it has no objects either."""
    return getattr(sys.modules.get(module), name, None)
