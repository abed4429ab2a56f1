"""Every launch that linear layers and products make, over sizes, layouts and epilogues, compiled.

`python linear_launches.py TARGET [sample | all | n]` collects the launches without compiling them,
compiles those that differ (of a sample of calls, of all, or each n-th of all) and prints a line of
JSON for each. For a process of its own, with the Triton interpreter off.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROWS = (1, 2, 3, 16, 64, 65, 128, 200, 512, 1000, 1024, 2048, 8192, 16384)
SIZES = (
    (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096),
    (5333, 495), (1000, 1024), (1004, 1024), (33, 40),
)  # fmt: skip
# Words of a form: what `call` makes of them. With "conv1d" the weights' rows, not K, are contiguous.
SINGLE = (
    "", "bias", "column bias", "full bias", "silu", "gelu", "scale", "multiplier", "residual",
    "multiplier residual", "broadcast multiplier residual", "wide multiplier", "wide residual",
    "wide multiplier residual", "bias residual", "norm", "layer", "bare layer",
    "conv1d", "conv1d gelu bias layer", "conv1d bias residual", "conv1d norm",
)  # fmt: skip
SEVERAL = (
    "two", "two bias", "two silu bias", "three", "three bias", "three norm", "three bias layer",
    "conv1d three bias layer",
)  # fmt: skip
GATED = (
    "gated", "gated bias", "gated residual", "gated wide residual", "gated multiplier residual",
    "gated bias multiplier residual", "gated norm", "gated layer", "conv1d gated layer",
)  # fmt: skip
# A layout: "t" for an operand whose rows, not K, are contiguous, else "n"; b as an nn.Linear has it.
LAYOUTS = ("nn", "nt", "tn", "tt")
# dtype, the output's, words that forms are made of.
DTYPES = (
    ("bfloat16", "bfloat16", None),
    ("bfloat16", "float32", {"bias", "full", "residual", "wide", "multiplier"}),
    ("float16", "float16", {"bias", "residual", "multiplier", "two", "gated"}),
    ("float16", "float32", {"residual"}),
    (
        "float32",
        "float32",
        {"bias", "full", "multiplier", "residual", "norm", "gated", "layer", "conv1d"},
    ),
)
Call = tuple[int, int, int, str, str, str, str]


def calls() -> list[Call]:
    """(M, N, K, dtype, the output's, layout, form) of everything."""
    return [
        (M, N, K, dtype, out, layout, form)
        for dtype, out, words in DTYPES
        for M in ROWS
        for N, K in SIZES
        for layout in LAYOUTS
        for form in (*SINGLE, *SEVERAL, *GATED)
        if words is None or set(form.split()) <= words
        if N < 100_000 or form in ("", "bias", "residual", "two", "gated")
        if layout == "nn" or (form in SINGLE and not {"layer", "conv1d"} & set(form.split()))
        if out == dtype or not {"two", "gated"} & set(form.split())
    ]


# One call of each kernel; those whose tile the epilogue must change: they exceeded the shared
# memory, or spilled.
SAMPLE: list[Call] = [
    (M, N, K, "bfloat16", out, layout, form)
    for M, N, K, out, layout, form in (
        (2, 4096, 4096, "bfloat16", "nn", "three norm"),
        (2, 4096, 4096, "bfloat16", "nn", "three bias layer"),
        (2, 4096, 4096, "bfloat16", "nn", "gated layer"),
        (1, 4096, 14336, "bfloat16", "nn", "bare layer"),
        (2, 1024, 4096, "bfloat16", "nn", "conv1d gelu bias layer"),
        (2, 4096, 14336, "bfloat16", "nn", "conv1d bias residual"),
        (2, 14336, 4096, "bfloat16", "nn", "conv1d gated layer"),
        (16, 4096, 4096, "bfloat16", "nn", "three bias layer"),
        (2, 4096, 4096, "float32", "nt", "bias"),
        (16, 1024, 4096, "bfloat16", "nn", "gated norm"),
        (16, 4096, 4096, "bfloat16", "nn", "three norm"),
        (16, 28672, 4096, "bfloat16", "nn", "gated"),
        (16, 14336, 4096, "bfloat16", "nn", "wide multiplier residual"),
        (64, 1000, 1024, "bfloat16", "nn", "residual"),
        (64, 1000, 1000, "bfloat16", "nn", "residual"),
        (64, 1000, 1000, "bfloat16", "tn", "residual"),
        (64, 4096, 4096, "bfloat16", "nn", "silu"),
        (1000, 5333, 495, "float32", "nt", ""),
        (2, 5333, 495, "bfloat16", "nn", "residual"),
        (65, 5333, 495, "bfloat16", "nn", "residual"),
        (512, 14336, 4096, "bfloat16", "nn", "gated bias"),
        (1024, 14336, 4096, "bfloat16", "nn", "gated"),
        (1024, 4096, 4096, "bfloat16", "nn", "residual"),
        (8192, 4096, 14336, "bfloat16", "nn", "residual"),
        (8192, 1000, 1024, "bfloat16", "nn", "residual"),
        (8192, 1000, 1024, "bfloat16", "nn", "gated residual"),
        (8192, 1024, 4096, "bfloat16", "nn", "gated wide residual"),
        (8192, 1004, 1024, "bfloat16", "nn", "gated residual"),
        (8192, 1004, 1024, "bfloat16", "nn", "silu"),
        (8192, 1004, 1024, "bfloat16", "tn", "column bias"),
        (8192, 1004, 1024, "bfloat16", "nn", "wide residual"),
        (2048, 14336, 4096, "bfloat16", "tn", "full bias"),
        (1000, 14336, 4096, "bfloat16", "tn", "full bias"),
        (2048, 1000, 1024, "bfloat16", "nn", "residual"),
        (2048, 1004, 1024, "bfloat16", "nn", "multiplier"),
        (200, 14336, 4096, "float32", "tt", "wide multiplier residual"),
        (2048, 1024, 4096, "bfloat16", "nn", "two silu bias"),
    )
]


def call(M: int, N: int, K: int, dtype: str, out_dtype: str, layout: str, form: str) -> None:
    """A product of that form, through `linear` where that takes it, else through `matmul`."""
    import torch

    from triton_only_backend.kernels.epilogue import Epilogue
    from triton_only_backend.kernels.linear import linear
    from triton_only_backend.kernels.matmul import matmul
    from triton_only_backend.kernels.rms_norm import Norm

    narrow = getattr(torch, dtype)
    words = set(form.split())

    def empty(*shape: int, dtype: torch.dtype = narrow) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def operand(word: str) -> torch.Tensor | None:
        if word not in words:
            return None
        if "broadcast" in words:
            return (empty(N) if word == "multiplier" else empty(M, 1)).expand(M, N)
        return empty(M, N, dtype=torch.float32 if "wide" in words else narrow)

    activation = "gelu" if "gelu" in words else "silu" if words & {"silu", "gated"} else "none"
    scale = 0.5 if "scale" in words else 1.0
    epilogue = Epilogue(activation, operand("multiplier"), scale, operand("residual"))
    if layout == "nn" and dtype == out_dtype and not words & {"full", "column"}:
        columns = (
            [N, N] if words & {"two", "gated"} else [N, 1024, 1024] if "three" in words else [N]
        )
        outs = [empty(M, n) for n in columns[: 1 if "gated" in words else None]]
        norm = Norm(empty(K), 1e-5, 0.0) if "norm" in words else None
        if "layer" in words:
            vectors = (None, None) if "bare" in words else (empty(K), empty(K))
            norm = Norm(vectors[0], 1e-5, 0.0, True, vectors[1])
        linear(
            empty(M, K), [empty(K, n).T if "conv1d" in words else empty(n, K) for n in columns],
            [empty(n) for n in columns] if "bias" in words else None, outs,
            norm=norm, gated="gated" in words, epilogue=epilogue,
        )  # fmt: skip
        return
    a = empty(1, M, K) if layout[0] == "n" else empty(1, K, M).mT
    b = empty(1, N, K).mT if layout[1] == "n" else empty(1, K, N)
    bias = None
    if "bias" in words:
        bias = empty(M, N) if "full" in words else empty(M, 1) if "column" in words else empty(N)
    matmul(a, b, bias, empty(1, M, N, dtype=getattr(torch, out_dtype)), epilogue=epilogue)


def launches(target: str, of: list[Call]) -> list[tuple[Call, Any]]:
    """The launches of these calls that differ, each with its first call, and as a function."""
    import cross_compile
    from triton.runtime.jit import JITFunction

    found: dict[Any, tuple[Call, Any]] = {}
    current: list[Call] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        _, _, _, backend, binder = self.device_caches[0]
        bound, specialization, options = binder(*args, **kwargs)
        # Whether 16 divides a size, unlike a stride, changes no layout.
        coarse = [
            known[0] if name in ("M", "N", "K", "columns", "numel") else known
            for name, known in zip(bound, specialization, strict=True)
        ]
        key = self.fn.__name__, str(coarse), str(options)
        if key not in found:
            options, *rest = self._pack_args(backend, kwargs, bound, specialization, options)
            signature, constants, attributes = rest
            compile_it = functools.partial(
                self._do_compile, key, signature, 0, constants, options, attributes, True
            )
            found[key] = current[-1], compile_it

    cross_compile.compile_for(target)
    JITFunction.run = run
    for each in of:
        current.append(each)
        call(*each)
    return list(found.values())


_launches: list[tuple[Call, Any]] = []


def compile_launch(number: int) -> dict[str, Any]:
    """What the compiler says of a launch; in a process that was forked from `main`'s."""
    from cross_compile import TARGETS

    from triton_only_backend.tuning.cross_compile import describe

    of, compile_it = _launches[number]
    kernel = compile_it()
    kernel = kernel.result() if hasattr(kernel, "result") else kernel
    found = describe(kernel, TARGETS[sys.argv[1]][0])
    words = of[-1].split()
    operands = sum(word in ("full", "multiplier", "residual") for word in words)
    # Gated as two products, the second takes the first's for an operand too.
    operands += "gated" in words and found.name != "pair_gemm_kernel"
    row = dict(call=of, name=found.name, operands=operands, spilled=found.spilled)
    return row | dict(shared=found.shared_memory, registers=found.registers)


def main(target: str, which: str = "sample") -> None:
    """Prints a line for each launch."""
    every = int(which) if which.isdigit() else 1
    _launches[:] = launches(target, SAMPLE if which == "sample" else calls())[::every]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for row in pool.imap_unordered(compile_launch, range(len(_launches))):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
