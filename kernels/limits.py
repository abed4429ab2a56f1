"""What the kernels take: for the passes and eager mode too, which must refuse what they refuse."""

from __future__ import annotations

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
ACTIVATIONS = ("none", "relu", "sigmoid", "silu", "gelu", "gelu_tanh", "tanh")
# Rows of a linear layer that `ring_linear` takes: of more, the blocks of a product that it throws
# away cost the tensor cores too much time.
RING_MAX_ROWS = 8
