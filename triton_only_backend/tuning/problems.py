"""The problems to tune: of a list of shapes, of a preset, or of a model that is run once.

A shape is written MxNxK, or BATCHxMxNxK for a batched product: 32x6144x4096 is 32 rows times the
weight of nn.Linear(4096, 6144). M may be several, separated by commas: 1,2,4x6144x4096.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from typing import TYPE_CHECKING, Any

from triton_only_backend.errors import TritonOnlyError
from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.attention_configs import AttentionProblem
from triton_only_backend.kernels.gemm_configs import GemmProblem, bucket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path


class ShapeError(TritonOnlyError, ValueError):
    """A shape that is not written as the tuner reads it."""


Problem = tuple[str, Any]
ELEMENT_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}

# (N, K) of the weights, the most time of a model first.
LLAMA3_8B = ((28672, 4096), (6144, 4096), (4096, 4096), (4096, 14336), (14336, 4096))
LLAMA3_70B = ((57344, 8192), (10240, 8192), (8192, 8192), (8192, 28672))
HEADS = ((128256, 4096), (49152, 4096))
ODD = ((1024, 4096), (1000, 1024), (2560, 10240), (5333, 495))
MAIN_ROWS = (32, 64, 128, 256, 512, 1024, 4096)
OTHER_ROWS = (1, 2, 4, 8, 16, 2048, 8192)
RANDOM_SHAPES, RANDOM_SEED = 200, 0
# Attention: lengths of prompts and caches, sequences, and the most tokens in all caches.
PROMPTS = (2048, 512, 1024, 4096, 8192, 16384)
CACHES = (1024, 4096, 512, 2048, 8192, 32768, 131072)
SEQUENCES = (2, 1, 16, 64, 4, 32)
MAX_CACHED = 1 << 18


def product(
    batch: int, M: int, N: int, K: int, *, dtype: str = "bf16", k_contiguous: bool = True
) -> Problem:
    """The problem of a contiguous (batch, M, K) times the transpose of (batch, N, K), if so."""
    size = ELEMENT_SIZES[dtype]
    unit = 16 // size
    return "gemm", GemmProblem(
        batch=batch,
        M=bucket(M),
        N=bucket(N),
        K=K,
        element_size=size,
        ieee=dtype == "fp32",
        a_k_contiguous=True,
        b_k_contiguous=k_contiguous,
        aligned=K % unit == 0 and (k_contiguous or N % unit == 0),
    )


def _layers(
    shapes: Iterable[tuple[int, int]], rows: Sequence[int], **options: Any
) -> Iterable[Problem]:
    return (product(1, M, N, K, **options) for M in rows for N, K in shapes)


def _llama() -> Iterable[Problem]:
    yield from _layers(LLAMA3_8B, MAIN_ROWS)
    yield from _layers(HEADS, (32, 64, 16, 8, 4, 2, 1))
    yield from _layers(LLAMA3_8B, OTHER_ROWS)


def _all() -> Iterable[Problem]:
    yield from _llama()
    yield from _layers((*ODD, *LLAMA3_70B), (*MAIN_ROWS, *OTHER_ROWS))
    yield from _layers(HEADS, (128, 256, 512, 1024, 4096))
    everything = (*LLAMA3_8B, *LLAMA3_70B, *ODD)
    yield from _layers(everything, (*MAIN_ROWS, *OTHER_ROWS), k_contiguous=False)


def attention(
    batch: int,
    len_q: int,
    len_kv: int,
    *,
    kv_heads: int = 8,
    head_dim: int = 128,
    is_causal: bool = False,
    has_mask: bool = False,
) -> Problem:
    """The problem of 32 query heads, 16-bit: of decoding for one query, else of a prefill."""
    problem = AttentionProblem(
        batch=batch, num_heads=32, num_kv_heads=kv_heads, len_q=len_q, len_kv=len_kv,
        head_dim=head_dim, head_dim_v=head_dim, element_size=2, is_causal=is_causal,
        has_mask=has_mask,
    )  # fmt: skip
    return "decode_attention" if len_q == 1 else "flash_attention", problem.bucketed()


def _attention() -> Iterable[Problem]:
    shapes = ((8, 128), (32, 128), (8, 64), (32, 64))
    for kv_heads, head_dim in shapes:
        like: dict[str, Any] = {"kv_heads": kv_heads, "head_dim": head_dim}
        yield from (attention(2, n, n, is_causal=True, **like) for n in PROMPTS)
        # A mask, as static caches have one, and none.
        yield from (
            attention(batch, 1, n, has_mask=has_mask, **like)
            for has_mask in (True, False)
            for batch, n in itertools.product(SEQUENCES, CACHES)
            if batch * n <= MAX_CACHED
        )
        yield from (attention(2, n, n, **like) for n in PROMPTS)


def _random() -> Iterable[Problem]:
    """Shapes that no table knows, to judge the heuristic by: every size by its logarithm."""
    draw = random.Random(RANDOM_SEED)

    def size(least: int, most: int, multiple: int = 1) -> int:
        drawn = math.exp(draw.uniform(math.log(least), math.log(most)))
        return max(multiple, round(drawn / multiple) * multiple)

    found: dict[Problem, None] = {}
    while len(found) < RANDOM_SHAPES:
        multiple = draw.choice((1, 8, 64, 64))  # most models' sizes are multiples of 64
        M, N, K = size(1, 8192), size(256, 32768, multiple), size(256, 16384, multiple)
        found[product(1, M, N, K)] = None
    return found


# The Llama-3-8B layers first, at the numbers of rows where choices matter most.
PRESETS: dict[str, Callable[[], Iterable[Problem]]] = {
    "llama": _llama,
    "all": _all,
    "attention": _attention,
    "random": _random,
}


def preset(name: str) -> list[Problem]:
    """The problems of a preset, each once, in the order of their worth."""
    return list(dict.fromkeys(PRESETS[name]()))


def parse_shape(text: str, dtype: str, k_contiguous: bool) -> list[Problem]:
    """The problems of a shape as it is written above.

    Raises:
        ShapeError: it is written otherwise.
    """
    parts = text.strip().split("x")
    numbers = r"[1-9]\d*"
    if len(parts) == 3:
        parts = ["1", *parts]
    if (
        len(parts) != 4
        or not re.fullmatch(rf"{numbers}(,{numbers})*", parts[1])
        or not all(re.fullmatch(numbers, part) for part in (parts[0], *parts[2:]))
    ):
        raise ShapeError(f"{text!r} is no shape; write MxNxK or BATCHxMxNxK, as in 32x6144x4096")
    batch, N, K = (int(part) for part in (parts[0], *parts[2:]))
    return [
        product(batch, int(M), N, K, dtype=dtype, k_contiguous=k_contiguous)
        for M in parts[1].split(",")
    ]


def read_shapes(path: Path, dtype: str, k_contiguous: bool) -> list[Problem]:
    """The problems of a file with a shape a line; what follows # is a remark.

    Raises:
        ShapeError: the file cannot be read, or a line is no shape.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ShapeError(f"cannot read the shapes in {path}: {error}") from error
    found: list[Problem] = []
    for number, line in enumerate(lines, 1):
        shape = line.partition("#")[0].strip()
        if shape:
            try:
                found += parse_shape(shape, dtype, k_contiguous)
            except ShapeError as error:
                raise ShapeError(f"{path}, line {number}: {error}") from None
    return list(dict.fromkeys(found))


def recorded(run: Callable[[], Any]) -> list[Problem]:
    """The problems for which kernels are chosen while `run` runs, each once."""
    from triton_only_backend.tuning.spaces import SPACES

    with tuned.recording() as found:
        run()
    return [
        (kind, problem)
        for kind, problem in found
        if kind in SPACES and not getattr(problem, "has_modifiers", False)
    ]
