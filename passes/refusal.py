"""Why a pass left a node as it was: a reason with its facts, kept on the node for the report."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.fx

# Read by the audit, which knows this key and imports nothing of the passes.
META_KEY = "triton_only_refusal"
# Read by the runner of the passes.
DECLINED_KEY = "triton_only_declined"


class Reason(enum.Enum):
    """Kinds of refusal."""

    UNSUPPORTED_DTYPE = "the kernels take float16, bfloat16 and float32, one dtype an operation"
    UNSUPPORTED_DEVICE = "an operand is on a device that Triton cannot drive"
    UNSUPPORTED_LAYOUT = "an operand is not a plain strided tensor"
    HEAD_DIM_TOO_LARGE = "the head dimension exceeds 256, or varies"
    DROPOUT = "the probability of dropout is not known when the graph is compiled"
    MASK_NEEDS_GRADIENT = "the attention kernels give no gradient for the mask"
    FUNCTION_TRANSFORM = "the attention kernels have no rule for the transforms of torch.func"
    CONVOLUTION = "not a convolution that is computed as a product or a short sum"
    GROUPED_BIAS = "the grouped product has a bias"
    UNKNOWN_ROW = "the length of the rows is not known when the graph is compiled"
    MANY_OF_A_ROW = "more than is sorted in one block is to be taken of a longer row, or of none"
    MASK_AND_CAUSAL = "both a mask and is_causal are given, which PyTorch refuses"


# Attention refused for these reasons becomes bmm - softmax - bmm instead.
DECOMPOSED = frozenset(
    {
        Reason.HEAD_DIM_TOO_LARGE,
        Reason.DROPOUT,
        Reason.MASK_NEEDS_GRADIENT,
        Reason.FUNCTION_TRANSFORM,
    }
)


# The kind, in the words of the audit, of the reasons that it does not know by name.
_KINDS = {
    Reason.HEAD_DIM_TOO_LARGE: "UNSUPPORTED_SIZE",
    Reason.DROPOUT: "UNSUPPORTED_ARGUMENT",
    Reason.MASK_NEEDS_GRADIENT: "UNSUPPORTED_ARGUMENT",
    Reason.FUNCTION_TRANSFORM: "UNSUPPORTED_ARGUMENT",
    Reason.CONVOLUTION: "UNSUPPORTED_ARGUMENT",
    Reason.GROUPED_BIAS: "UNSUPPORTED_ARGUMENT",
    Reason.UNKNOWN_ROW: "UNSUPPORTED_SIZE",
    Reason.MANY_OF_A_ROW: "UNSUPPORTED_SIZE",
    Reason.MASK_AND_CAUSAL: "UNSUPPORTED_ARGUMENT",
}


@dataclass(frozen=True)
class Refusal:
    """One refusal: the reason, the facts and what to do."""

    reason: Reason
    detail: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"


def refuse(node: torch.fx.Node, refusal: Refusal) -> None:
    """Leaves the refusal on the node."""
    node.meta[META_KEY] = {
        "reason": refusal.reason.name,
        "kind": _KINDS.get(refusal.reason, refusal.reason.name),
        "detail": str(refusal),
        "remedy": refusal.remedy,
    }


def decline(node: torch.fx.Node, detail: str) -> None:
    """Leaves on a node why a fusion let it be: the report lists it, no operation is the worse."""
    node.meta[DECLINED_KEY] = {"detail": detail}
