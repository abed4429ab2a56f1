"""Whether `short_cache_attention` runs a decoding step's attention, and how it cuts the cache.

`takes` asks the tensors, `select_short_cache` the sizes and the hardware: pure functions. Where
either says no, `rope_cache_attention` runs its own kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from triton_only_backend.kernels import tuned

if TYPE_CHECKING:
    from triton_only_backend.kernels.attention_configs import AttentionProblem
    from triton_only_backend.kernels.hardware import Hardware
    from triton_only_backend.kernels.rope_cache_ops import Inputs

# Query heads of a KV head: the half of mma's 16 rows that one register holds.
MAX_GROUP = 8
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class ShortCacheConfig:
    """How `short_cache_attention` cuts a cache.

    Attributes:
        splits: programs a KV head, at most.
        num_warps: of a program; each attends to its own keys.
        warp_keys: that a warp holds of a tile, 16 or 32, at most.
        stages: tiles of a split that are asked for at once, at most.
        most_keys: the longest cache that it is for.
    """

    splits: int
    num_warps: int
    warp_keys: int
    stages: int
    most_keys: int


@dataclass(frozen=True)
class Cut:
    """What a configuration makes of a length."""

    splits: int
    tiles: int  # of a split, at most
    stages: int
    warp_keys: int  # of a tile, for each warp


# In the order of preference, where they find a multiprocessor for each program. On an H200, 768
# keys, eight KV heads of 128, in the chain of a decode step, µs a layer (the kernel of
# rope_cache_attention: 10): batch 2, 8 splits 5.5, 16 splits 5.8; alone (7.0 and 8.7): batch 1, 8
# splits 3.6, 16 splits 3.9, 4 splits 4.3, batch 2, 4.6, 4.9 and 5.2. A split has 64 KiB in flight,
# at most; splits of more than 192 keys, three tiles of 64, were not timed.
CONFIGS = (
    ShortCacheConfig(splits=8, num_warps=4, warp_keys=32, stages=1, most_keys=1024),
    ShortCacheConfig(splits=16, num_warps=4, warp_keys=32, stages=1, most_keys=2048),
    ShortCacheConfig(splits=8, num_warps=4, warp_keys=16, stages=2, most_keys=1536),
    ShortCacheConfig(splits=4, num_warps=4, warp_keys=16, stages=2, most_keys=768),
)


def select_short_cache(problem: AttentionProblem, hardware: Hardware) -> ShortCacheConfig | None:
    """How `short_cache_attention` runs a problem that it takes, or None where it should not.

    Where a program would not have a multiprocessor of its own, or a split has many keys, memory and
    not latency is what there is to wait for.
    """
    if not hardware.has_gluon or tuned.is_forced("decode_attention"):
        return None
    groups = problem.batch * problem.num_kv_heads
    for config in CONFIGS:
        fits = groups * config.splits <= hardware.num_sms
        if fits and 0 < problem.len_kv <= config.most_keys:
            return config
    return None


def takes(x: Inputs, out: torch.Tensor, *, is_causal: bool) -> bool:
    """Whether `short_cache_attention` computes this: what its layouts and formulas presume."""
    query, caches = x.query, (x.key_cache, x.value_cache)
    head_dim, mask = query.shape[3], x.attn_mask
    return (
        not is_causal
        and query.element_size() == 2
        and head_dim in HEAD_DIMS
        and x.value.shape[3] == head_dim
        and 1 <= query.shape[1] // x.key.shape[1] <= MAX_GROUP
        and (mask is None or mask.dtype == torch.bool)
        and all(t.stride(3) == 1 for t in (query, x.key, x.value, *caches, out))
        # cp.async moves 16 bytes; Triton knows of strides whether 16 divides them.
        and all(t.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in t.stride()[:3]) for t in caches)
    )


def cut(length: int, config: ShortCacheConfig) -> Cut:
    """The splits of a cache: of as many tiles as they need, as small as these may be."""
    full = config.num_warps * config.warp_keys
    tiles = max(1, -(-length // (config.splits * full)))
    warp_keys = -(-length // (config.splits * tiles * config.num_warps))
    warp_keys = max(4, -(-warp_keys // 4) * 4)
    splits = min(config.splits, max(1, -(-length // (config.num_warps * warp_keys))))
    return Cut(splits, tiles, min(tiles, config.stages), warp_keys)
