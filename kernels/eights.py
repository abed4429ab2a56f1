"""That 8 divides an integer of a launch, which Triton would not know.

Of each integer argument Triton asks whether 16 divides it, and if not it takes any: rows of 1512
elements of 16 bits, which all begin at 16 bytes, are read an element at a time, without a pipeline
(an H200, 64 × 384 × 1512: 15.9 µs for 6.1 by the copy engine; the same on every GPU).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def eights(*numbers: int) -> int:
    """For `in_eights`: bit i is set where 8 divides the i-th number, and 16 does not."""
    return sum(1 << i for i, number in enumerate(numbers) if number % 16 == 8)


def eights_of_heads(head_dims: Sequence[int], *tensors: torch.Tensor) -> int:
    """The same of attention: of the head dimensions, then of each (B, H, L, D)'s strides.

    Only where 8 divides a head dimension and 16 does not: with each length that would compile anew.
    """
    if all(head_dim % 16 != 8 for head_dim in head_dims):
        return 0
    return eights(*head_dims, *(stride for tensor in tensors for stride in tensor.stride()))


@triton.jit
def in_eights(numbers, WHICH: tl.constexpr):
    """The same numbers, at least 0; of those whose bit is set the compiler learns that 8 divides
    them."""
    known: tl.tuple = ()
    for i in tl.static_range(len(numbers)):
        if (WHICH >> i) & 1 == 1:
            known += (numbers[i] // 8 * 8,)
        else:
            known += (numbers[i],)
    return known
