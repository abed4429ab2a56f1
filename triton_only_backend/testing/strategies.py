"""Hypothesis strategies for problems: sizes, strides, dtypes and broadcasts that break kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend.errors import TritonOnlyError

try:
    from hypothesis import strategies as st
except ImportError as error:  # pragma: no cover
    raise TritonOnlyError(
        "triton_only_backend.testing.strategies needs hypothesis: "
        "pip install 'triton-only-backend[test]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypothesis.strategies import SearchStrategy

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PRIMES = (2, 3, 5, 7, 13, 31, 61, 97, 127)
LAYOUTS = ("row", "column", "sliced", "broadcast", "offset")


def sizes(*, smallest: int = 0, largest: int = 130, multiple: int = 16) -> SearchStrategy[int]:
    """Sizes of a dimension: 0, 1, primes, multiples of a tile's side and their neighbours."""
    around = [k * multiple + d for k in (1, 2, 4, 8) for d in (-1, 0, 1)]
    special = {0, 1, *PRIMES, *around}
    chosen = sorted(n for n in special if smallest <= n <= largest)
    return st.one_of(st.sampled_from(chosen), st.integers(smallest, min(largest, smallest + 9)))


def shapes(
    *, dimensions: tuple[int, int] = (1, 4), smallest: int = 0, largest: int = 17
) -> SearchStrategy[tuple[int, ...]]:
    """Shapes of `dimensions[0]` to `dimensions[1]` dimensions."""
    size = sizes(smallest=smallest, largest=largest)
    low, high = dimensions
    return st.lists(size, min_size=low, max_size=high).map(tuple)


def broadcastable(shape: Sequence[int]) -> SearchStrategy[tuple[int, ...]]:
    """Shapes that broadcast to a shape: leading dimensions left out, others one."""

    def choose(choice: tuple[int, list[bool]]) -> tuple[int, ...]:
        start, ones = choice
        return tuple(1 if one else n for n, one in zip(shape[start:], ones[start:], strict=True))

    rank = len(shape)
    ones = st.lists(st.booleans(), min_size=rank, max_size=rank)
    return st.tuples(st.integers(0, rank), ones).map(choose)


def dtypes(among: Sequence[torch.dtype] = FLOATS) -> SearchStrategy[torch.dtype]:
    """Floating dtypes, the widest first."""
    return st.sampled_from(list(among))


def layouts(among: Sequence[str] = LAYOUTS) -> SearchStrategy[str]:
    """How a tensor lies in memory: see `make_tensor`."""
    return st.sampled_from(list(among))


def make_tensor(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    layout: str = "row",
    *,
    device: str = "cpu",
    seed: int = 0,
) -> torch.Tensor:
    """Random numbers in a shape.

    Args:
        layout: "row": contiguous. "column": the last two dimensions exchanged in memory.
            "sliced": every second and third element of a larger tensor. "broadcast": the last
            dimension has stride 0. "offset": one element past an aligned address.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> torch.Tensor:
        numbers = torch.randn(sizes, generator=generator)
        return numbers.to(dtype).to(device)

    shape = tuple(shape)
    if layout == "row" or not shape:
        return draw(*shape)
    if layout == "column":
        return draw(*shape[:-2], *reversed(shape[-2:])).mT if len(shape) > 1 else draw(*shape)
    if layout == "broadcast":
        return draw(*shape[:-1], 1).expand(shape)
    if layout == "offset":
        total = 1
        for n in shape:
            total *= n
        return draw(total + 1)[1:].view(shape)
    if layout == "sliced":
        rows = [2 * n + 1 for n in shape[:-1]]
        base = draw(*rows, 3 * shape[-1] + 2)
        index = (*(slice(1, None, 2) for _ in rows), slice(2, None, 3))
        return base[index]
    raise TritonOnlyError(f"layout {layout!r} is not known (one of {', '.join(LAYOUTS)})")


def tensors(
    shape: Sequence[int] | SearchStrategy[tuple[int, ...]] | None = None,
    dtype: SearchStrategy[torch.dtype] | None = None,
    layout: SearchStrategy[str] | None = None,
    *,
    device: str = "cpu",
) -> SearchStrategy[torch.Tensor]:
    """Tensors of any shape, dtype and layout."""
    shape_ = shapes() if shape is None else shape
    chosen: Any = shape_ if isinstance(shape_, st.SearchStrategy) else st.just(tuple(shape_))
    return st.builds(
        lambda s, d, w, seed: make_tensor(s, d, w, device=device, seed=seed),
        chosen,
        dtypes() if dtype is None else dtype,
        layouts() if layout is None else layout,
        st.integers(0, 2**31),
    )


@dataclass(frozen=True)
class MatmulProblem:
    """bias (broadcast to M × N), a (…, M, K), b (…, K, N), of one dtype."""

    bias: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor

    def __repr__(self) -> str:
        parts = (f"{n}={list(t.shape)}{list(t.stride())}" for n, t in vars(self).items())
        return f"MatmulProblem({self.a.dtype}, {', '.join(parts)})"


@st.composite
def matmul_problems(
    draw: st.DrawFn,
    *,
    batch: bool = False,
    largest: int = 97,
    device: str = "cpu",
    among: Sequence[torch.dtype] = FLOATS,
) -> MatmulProblem:
    """Operands of a product, with a bias that broadcasts."""
    M, N, K = (draw(sizes(largest=largest)) for _ in range(3))
    lead = (draw(st.integers(0, 3)),) if batch else ()
    dtype = draw(dtypes(among))

    def operand(*shape: int) -> torch.Tensor:
        seed = draw(st.integers(0, 2**31))
        return make_tensor(shape, dtype, draw(layouts()), device=device, seed=seed)

    bias = make_tensor(draw(broadcastable((M, N))), dtype, device=device)
    return MatmulProblem(bias, operand(*lead, M, K), operand(*lead, K, N))


@dataclass(frozen=True)
class AttentionProblem:
    """query (B, H, L, D), key (B, H_kv, S, D), value (B, H_kv, S, D_v) and the call's options."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, Any]

    def __repr__(self) -> str:
        shapes_ = ", ".join(str(list(t.shape)) for t in (self.query, self.key, self.value))
        options = {k: v if not isinstance(v, torch.Tensor) else list(v.shape)
                   for k, v in self.options.items()}  # fmt: skip
        return f"AttentionProblem({self.query.dtype}, {shapes_}, {options})"


@st.composite
def attention_problems(
    draw: st.DrawFn,
    *,
    largest: int = 40,
    device: str = "cpu",
    among: Sequence[torch.dtype] = FLOATS,
) -> AttentionProblem:
    """Arguments of scaled_dot_product_attention: lengths, grouped heads, masks, scale, causal."""
    length, keys = (draw(sizes(smallest=1, largest=largest)) for _ in range(2))
    batch, kv_heads, group = (draw(st.integers(1, 2)) for _ in range(3))
    head_dim, head_dim_v = (draw(st.sampled_from([1, 7, 8, 16, 24])) for _ in range(2))
    dtype = draw(dtypes(among))

    def operand(heads: int, rows: int, dim: int) -> torch.Tensor:
        seed = draw(st.integers(0, 2**31))
        layout = draw(layouts(("row", "sliced", "offset")))
        return make_tensor((batch, heads, rows, dim), dtype, layout, device=device, seed=seed)

    options: dict[str, Any] = {}
    kind = draw(st.sampled_from(["none", "causal", "bool", "float"]))
    if kind == "causal":
        options["is_causal"] = True
    elif kind != "none":
        mask = make_tensor(draw(broadcastable((batch, kv_heads * group, length, keys))), dtype)
        while mask.dim() < 2:
            mask = mask.unsqueeze(0)
        mask = mask.to(device)
        options["attn_mask"] = mask > -1 if kind == "bool" else mask
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.1, 1.0]))
    if group > 1:
        options["enable_gqa"] = True
    heads = kv_heads * group
    return AttentionProblem(
        operand(heads, length, head_dim),
        operand(kv_heads, keys, head_dim),
        operand(kv_heads, keys, head_dim_v),
        options,
    )
