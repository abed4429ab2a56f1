"""The products that the benchmark measures: linear layers of models, and batched products."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """(batch, M, K) times the transpose of (batch, N, K); `M` is None where the plan gives it.

    Attributes:
        op: "mm", "bmm" or "baddbmm".
    """

    name: str
    N: int
    K: int
    op: str = "mm"
    batch: int = 1
    M: int | None = None


def _layers(sizes: dict[str, tuple[int, int]]) -> tuple[Product, ...]:
    return tuple(Product(name, n, k) for name, (n, k) in sizes.items())


# (N, K) of the weights.
_LAYERS_8B = {
    "qkv": (6144, 4096),
    "q, o": (4096, 4096),
    "k, v": (1024, 4096),
    "gate, up": (14336, 4096),
    "gate + up": (28672, 4096),
    "down": (4096, 14336),
}
_LAYERS_70B = {
    "70B qkv": (10240, 8192),
    "70B q, o": (8192, 8192),
    "70B gate + up": (57344, 8192),
    "70B down": (8192, 28672),
}
_ODD = {"odd": (1000, 1024), "odder": (5333, 495), "long": (2560, 10240)}

# Attention written out: batch × heads of (queries, head_dim) · (head_dim, keys), and of the weights
# times the values; and experts of a mixture, each with the rows that came to it.
_ATTENTION = tuple(
    Product(f"attention {what}, {batch} heads", N, K, op, batch, M)
    for op in ("bmm", "baddbmm")
    for batch, M, keys in ((64, 512, 512), (64, 1, 2048), (256, 128, 128), (8, 2048, 2048))
    for what, N, K in ((f"scores {M}", keys, 128), (f"values {M}", 128, keys))
)
_EXPERTS = tuple(
    Product(f"{batch} experts, {what}", N, K, op, batch, M)
    for op in ("bmm", "baddbmm")
    for batch, M, what, N, K in (
        (8, 4, "up", 14336, 4096),
        (8, 64, "up", 14336, 4096),
        (8, 512, "down", 4096, 14336),
        (64, 16, "up", 1408, 2048),
        (64, 128, "down", 2048, 1408),
    )
)

SHAPES: dict[str, tuple[Product, ...]] = {
    "llama3-8b": _layers({**_LAYERS_8B, "lm_head": (128256, 4096)}),
    "granite-8b": _layers({**_LAYERS_8B, "lm_head": (49152, 4096)}),
    "llama3-70b": _layers(_LAYERS_70B),
    "odd": _layers(_ODD),
    "batched": (*_ATTENTION, *_EXPERTS),
}


def products(shapes: str) -> list[Product]:
    """Those of a key of `SHAPES` or, for "all", of every one; each shape once."""
    chosen = SHAPES.values() if shapes == "all" else (SHAPES[shapes],)
    found = {
        (product.op, product.batch, product.M, product.N, product.K): product
        for group in chosen
        for product in group
    }
    return list(found.values())
