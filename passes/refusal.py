"""Why a pass left a node as it was: a reason with its facts, kept on the node for the report."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.fx

# Read by the audit, which knows this key and imports nothing of the passes.
META_KEY = "triton_only_refusal"


class Reason(enum.Enum):
    """Kinds of refusal."""

    UNSUPPORTED_DTYPE = "the kernels take float16, bfloat16 and float32, one dtype an operation"
    UNSUPPORTED_DEVICE = "an operand is on a device that Triton cannot drive"
    UNSUPPORTED_LAYOUT = "an operand is not a plain strided tensor"
    HEAD_DIM_TOO_LARGE = "the head dimension exceeds 256"
    DROPOUT = "the attention kernels have no dropout"
    MASK_NEEDS_GRADIENT = "the attention kernels give no gradient for the mask"
    MASK_AND_CAUSAL = "both a mask and is_causal are given, which PyTorch refuses"
    DISABLED = "the pass is in disable_passes"


@dataclass(frozen=True)
class Refusal:
    """One refusal: the reason, the facts and what to do."""

    reason: Reason
    detail: str
    remedy: str


def refuse(node: torch.fx.Node, refusal: Refusal) -> None:
    """Leaves the refusal on the node."""
    node.meta[META_KEY] = {
        "reason": refusal.reason.name,
        "detail": f"{refusal.reason.value}: {refusal.detail}",
        "remedy": refusal.remedy,
    }
