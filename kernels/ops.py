"""The operator library `triton_only`: schemas, fake kernels, implementations and gradients.

    triton_only::mm(a, b)                         (M, K) @ (K, N)
    triton_only::addmm(bias, a, b)                beta · bias + alpha · a @ b
    triton_only::bmm(a, b)                        (B, M, K) @ (B, K, N)
    triton_only::baddbmm(bias, a, b)              beta · bias + alpha · a @ b
    triton_only::linear_many(a, weights, biases)  a @ weightᵀ + bias for several weights at once
    triton_only::linear_fused(a, weights, biases) the same with norm, activation, gate and residual
    triton_only::grouped_mm(a, b, offs)           rows in groups, each times a matrix of its own
    triton_only::attention(q, k, v, mask)         scaled dot-product attention
    triton_only::attention_forward(q, k, v, mask) the same, with its log-sum-exp for the backward
    triton_only::attention_backward(…)            gradients of q, k and v
    triton_only::mask_spans(mask)                 where a mask hides nothing, and where all
    triton_only::attention_varlen(q, k, v, …)     attention of sequences packed one after the other
    triton_only::random_seeds(count)              seeds for random numbers, by PyTorch's generator
    triton_only::rope_cache(…)                    rotary embedding and cache write
    triton_only::attention_rope_cache(…)          the same and attention, of one position

Registered with `Library.define` and `impl`, about 7 µs a call where `torch.library.custom_op` costs
25. Tagged `flexible_layout`: every kernel takes any strides, so Inductor need not copy an operand
into a particular layout. Importing this module registers the ops, once.
"""

from __future__ import annotations

import torch

from triton_only_backend.kernels import (
    attention_ops,
    gradients,
    grouped_ops,
    linear_ops,
    product_ops,
    rope_cache_ops,
    seed_ops,
)

LIBRARY = torch.library.Library("triton_only", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

for _module in (product_ops, linear_ops, grouped_ops, attention_ops, rope_cache_ops):
    for _schema in _module.SCHEMAS:
        LIBRARY.define(_schema, tags=TAGS)
    for _name, (_implementation, _fake) in _module.IMPLEMENTATIONS.items():
        LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"triton_only::{_name}", _fake, lib=LIBRARY)

seed_ops.register(LIBRARY)
gradients.register(LIBRARY)
