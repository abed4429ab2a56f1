"""What an attention may have beside its mask: soft-cap, window, dropout, packed sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Modifiers:
    """What is left at its default costs nothing: the kernels are compiled without it.

    Attributes:
        softcap: c > 0 makes scores c · tanh(scale · q kᵀ / c), before any mask; 0 does not.
        window: (left, right), as in FlashAttention: query i, which stands at key
            i + L_kv − L_q, sees that key, `left` keys before it and `right` after; -1 for all.
        dropout_p: the probability with which a weight is dropped, the others being scaled by
            1 / (1 − dropout_p).
        seed: an int64 tensor of one element, with dropout; which weights are dropped depends on it
            and on the weight's place (batch, head, query, key) only.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32 or int64, with packed sequences: where
            each begins, and last where the last one ends. Query, key, value and output are then
            (1, heads, all lengths, head_dim), log-sum-exps (1, heads, all lengths).
        max_q, max_k: the longest sequence's length.
    """

    softcap: float = 0.0
    window: tuple[int, int] = (-1, -1)
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_q: int = 0
    max_k: int = 0

    @property
    def has_window(self) -> bool:
        """Whether any key is outside the window at all."""
        return self.window != (-1, -1)

    @property
    def is_packed(self) -> bool:
        """Whether the sequences are packed one after the other."""
        return self.cu_seqlens_q is not None

    def kernel_arguments(self) -> dict[str, Any]:
        """The arguments that the kernels take by name; None compiles a feature away."""
        drops = self.dropout_p > 0
        window_left, window_right = self.window if self.has_window else (None, None)
        return {
            "window_left": window_left,
            "window_right": window_right,
            "softcap": self.softcap if self.softcap > 0 else None,
            "seed_ptr": self.seed if drops else None,
            "drop_below": min(round(self.dropout_p * 2**32), 2**32 - 1) if drops else None,
            "keep_scale": keep_scale(self.dropout_p) if drops else None,
            "cu_seqlens_q_ptr": self.cu_seqlens_q,
            "cu_seqlens_k_ptr": self.cu_seqlens_k,
        }


def keep_scale(dropout_p: float) -> float:
    """What weights that are kept are scaled by; 0 where every weight is dropped."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


NONE = Modifiers()
