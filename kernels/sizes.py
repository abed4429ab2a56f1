"""Sizes of tiles from sizes of tensors."""

from __future__ import annotations


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """The tile width that holds a head dimension: a power of two that `tl.dot` takes."""
    return max(16, next_power_of_2(head_dim))


def fullness_of_waves(blocks: int, num_sms: int) -> float:
    """Which part of the multiprocessors is at work, over the waves that so many blocks need."""
    return blocks / (-(-blocks // num_sms) * num_sms)
