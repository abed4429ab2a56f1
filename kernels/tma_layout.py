"""Which tensors NVIDIA's tensor memory accelerator can load, and their descriptors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    import torch


def tma_can_load(tensor: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator takes this layout: dense last dimension, 16-byte steps.

    An expanded dimension is refused: cuTensorMapEncode does not document strides of 0.
    """
    alignment = 16 // tensor.element_size()
    return (
        tensor.data_ptr() % 16 == 0
        and tensor.numel() > 0
        and tensor.stride(-1) == 1
        and all(
            step > 0 and step % alignment == 0
            for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
            if size > 1
        )
    )


def tma_strides(tensor: torch.Tensor) -> list[int]:
    """The strides of a layout that `tma_can_load`, rounded up where a size is 1."""
    alignment = 16 // tensor.element_size()
    strides = [
        step if size > 1 else triton.cdiv(step, alignment) * alignment
        for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    strides[-1] = 1
    return strides


def tma_descriptor(tensor: torch.Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """A descriptor of (B, H, L, D) that loads tiles of `block_rows` x `block_columns`."""
    block = [1, 1, block_rows, block_columns]
    return TensorDescriptor(tensor, list(tensor.shape), tma_strides(tensor), block)
