"""What the attention benchmark runs: the cases, their operands, operations and bytes.

32 query heads of 128, as in Llama-3-8B, or of another head dimension. Prefill and training cases
take queries, keys and values as a model's projections leave them, (batch, length, heads, 128)
transposed; decode cases a cache, (batch, heads, length, 128), in enough copies that each call reads
it from memory. A training case is a forward and its backward, causal or (training-full) not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from triton_only_backend.timing import copies_for

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADS, HEAD_DIM = 32, 128
KINDS = ("causal", "full", "decode", "training", "training-full")
PROVIDERS = ("ours", "cudnn", "flash", "efficient", "flex", "math")
# The comparison of "CUDA-Free Inference for LLMs": prefill and decoding over one list of lengths.
ARTICLE = "article"
PREFILL_BATCH = 2
PREFILL_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DECODE = ((1, 512), (2, 768), (1, 2048), (1, 4096), (1, 8192), (1, 32768), (1, 131072), (4, 4096),
          (16, 2048), (16, 8192), (64, 1024), (64, 4096))  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Query (batch, 32, len_q, head_dim) over key and value (batch, kv_heads, len_kv, head_dim)."""

    kind: str
    batch: int
    len_q: int
    len_kv: int
    kv_heads: int
    head_dim: int = HEAD_DIM

    @property
    def is_causal(self) -> bool:
        """Whether a query sees only the keys up to its own place."""
        return self.kind in ("causal", "training")

    @property
    def is_training(self) -> bool:
        """Whether a backward follows."""
        return self.kind.startswith("training")

    @property
    def flops(self) -> int:
        """Operations of the products, masked scores left out: two, and five of a backward."""
        full = 4 * self.batch * HEADS * self.len_q * self.len_kv * self.head_dim
        full = full // 2 if self.is_causal else full
        return full * 7 // 2 if self.is_training else full

    def bytes_moved(self, element_size: int) -> int:
        """The fewest bytes: operands read once, the output written once.

        A backward reads these and the output's gradient, and writes the operands' gradients.
        """
        query = self.batch * HEADS * self.len_q * self.head_dim
        moved = 2 * query + 2 * self.kv_elements
        if self.is_training:
            moved += 4 * query + 4 * self.kv_elements
        return moved * element_size

    @property
    def kv_elements(self) -> int:
        """Elements of the keys."""
        return self.batch * self.kv_heads * self.len_kv * self.head_dim


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        kinds: one of `KINDS`, "all", or `ARTICLE`.
        dtype: a key of `models.DTYPES`.
        kv_heads: a divisor of 32.
        max_length: cases with more keys are left out.
        head_dim: of queries, keys and values.
        batch: of the prefill and training cases.
        providers: of `PROVIDERS`, ours and a kernel of PyTorch's library among them.
    """

    kinds: str
    dtype: str
    kv_heads: int
    max_length: int
    head_dim: int = HEAD_DIM
    batch: int = PREFILL_BATCH
    providers: tuple[str, ...] = PROVIDERS

    def cases(self) -> Iterator[Case]:
        """The cases, in order."""
        groups = {"all": KINDS, ARTICLE: ("causal", "decode")}
        for kind in groups.get(self.kinds, (self.kinds,)):
            if kind == "decode" and self.kinds == ARTICLE:
                sizes = [(self.batch, 1, length) for length in PREFILL_LENGTHS]
            elif kind == "decode":
                sizes = [(batch, 1, length) for batch, length in DECODE]
            else:
                sizes = [(self.batch, length, length) for length in PREFILL_LENGTHS]
            for batch, len_q, len_kv in sizes:
                if len_kv <= self.max_length:
                    yield Case(kind, batch, len_q, len_kv, self.kv_heads, self.head_dim)


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_operands(case: Case, dtype: torch.dtype, device: torch.device) -> list[Operands]:
    """Query, key and value, normally distributed, in as many copies as the caches call for."""

    def draw(heads: int, length: int) -> torch.Tensor:
        if case.kind == "decode":
            return torch.randn(case.batch, heads, length, case.head_dim, device=device, dtype=dtype)
        size = (case.batch, length, heads, case.head_dim)
        return torch.randn(size, device=device, dtype=dtype).transpose(1, 2)

    copies = copies_for(2 * case.kv_elements * dtype.itemsize)
    return [
        (
            draw(HEADS, case.len_q),
            draw(case.kv_heads, case.len_kv),
            draw(case.kv_heads, case.len_kv),
        )
        for _ in range(copies)
    ]
