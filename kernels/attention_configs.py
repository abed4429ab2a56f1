"""What attention's problems are, and the blocks of `flash_attention`: functions of plain integers.

Each `select_*` function takes the first candidate whose tiles fit the shared memory; the order of
the candidates is the order of preference. Registers are not modelled: the candidates are those
that compile without spills for the head dimensions that they are listed for (head dimension 128,
bf16, sm90: tests/test_attention_configs.py prints registers, spills and shared memory).
Decoding's are in `decode_configs`, the backward's in `attention_backward_configs`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.sizes import next_power_of_2, padded_head_dim

if TYPE_CHECKING:
    from triton_only_backend.kernels.hardware import Hardware

# More packed query rows than this are left to the kernel that tiles the queries.
MAX_DECODE_ROWS = 64


@dataclass(frozen=True)
class AttentionProblem:
    """The sizes of one attention call: query (batch, num_heads, len_q, head_dim) and so on."""

    batch: int
    num_heads: int
    num_kv_heads: int
    len_q: int
    len_kv: int
    head_dim: int
    head_dim_v: int
    element_size: int
    is_causal: bool
    has_mask: bool
    has_dropout: bool = False
    has_softcap: bool = False
    has_window: bool = False

    def bucketed(self) -> AttentionProblem:
        """Batch and lengths rounded up to powers of two: problems near each other, tuned as one."""
        batch, len_q, len_kv = map(next_power_of_2, (self.batch, self.len_q, self.len_kv))
        return replace(self, batch=batch, len_q=len_q, len_kv=len_kv)

    @property
    def has_modifiers(self) -> bool:
        """Whether there is more to it than attention and a mask: it is not tuned."""
        return self.has_dropout or self.has_softcap or self.has_window

    @property
    def has_second_tile(self) -> bool:
        """Whether a tile of a mask or of random words stands beside each tile of scores."""
        return self.has_mask or self.has_dropout

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def block_d(self) -> int:
        """The width of query and key tiles."""
        return padded_head_dim(self.head_dim)

    @property
    def block_dv(self) -> int:
        """The width of value tiles."""
        return padded_head_dim(self.head_dim_v)


@dataclass(frozen=True)
class FlashConfig:
    """Blocks of `flash_attention`; `tma`: keys and values come by the tensor memory accelerator.

    Where a layout does not suit it, the launch takes `without_tma(config)`.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False


def without_tma(config: FlashConfig, width: int) -> FlashConfig:
    """The same kernel with pointer loads, whose addresses cost about 50 registers a thread.

    128 x 128 at head dimension 128 spilled 128 bytes with pointers and none with descriptors, 128 x
    64 at 256 spilled 216 (triton 3.7.1, sm90, causal), hence smaller tiles. `width` is the wider of
    the padded head dimensions.
    """
    block_m = min(config.block_m, 64) if width > 128 else config.block_m
    return replace(config, tma=False, block_m=block_m, block_n=min(config.block_n, 64))


def uses_decode_kernel(problem: AttentionProblem) -> bool:
    """Whether `decode_attention` runs the problem: few packed query rows, more keys than that.

    It has no dropout, which belongs to training.
    """
    if problem.has_dropout:
        return False
    rows = problem.len_q * problem.group_size
    return rows <= MAX_DECODE_ROWS and (rows <= 16 or problem.len_kv >= 4 * problem.len_q)


def flash_shared_memory(problem: AttentionProblem, config: FlashConfig, hardware: Hardware) -> int:
    """An upper bound for the shared memory of `flash_attention`, in bytes.

    The stages of keys and values, a tile in which a mask changes its layout and, but for AMD, where
    the query stays in registers and a stage less is buffered, the query tile.
    """
    keys_values = config.block_n * (problem.block_d + problem.block_dv)
    mask = config.block_m * config.block_n if problem.has_second_tile else 0
    if hardware.backend == "hip":
        return (max(1, config.num_stages - 1) * keys_values + mask) * problem.element_size
    query = config.block_m * problem.block_d
    return (query + config.num_stages * keys_values + mask) * problem.element_size + 1024


def flash_candidates(problem: AttentionProblem, hardware: Hardware) -> tuple[FlashConfig, ...]:
    """Configurations of `flash_attention` that fit the hardware, the preferred one first."""
    if hardware.is_interpreter:
        block_m = min(128, max(16, next_power_of_2(problem.len_q)))
        block_n = min(256, max(16, next_power_of_2(problem.len_kv)))
        return (FlashConfig(block_m, block_n, 4, 1),)
    candidates = _flash_preferences(problem, hardware)
    fitting = tuple(config for config in candidates if flash_fits(problem, config, hardware))
    return fitting or candidates[-1:]


def select_flash_config(problem: AttentionProblem, hardware: Hardware) -> FlashConfig:
    """The configuration of `flash_attention` for a problem: what was measured best, or else."""
    return tuned.select(
        "flash_attention", problem, hardware, FlashConfig, flash_fits, heuristic_flash_config
    )


def flash_fits(problem: AttentionProblem, config: FlashConfig, hardware: Hardware) -> bool:
    """Whether a configuration's tiles fit the shared memory."""
    return flash_shared_memory(problem, config, hardware) <= hardware.shared_memory


def heuristic_flash_config(problem: AttentionProblem, hardware: Hardware) -> FlashConfig:
    """The first candidate."""
    return flash_candidates(problem, hardware)[0]


def _flash_preferences(problem: AttentionProblem, hardware: Hardware) -> tuple[FlashConfig, ...]:
    width = max(problem.block_d, problem.block_dv)
    if problem.element_size == 4:
        return _flash_preferences_fp32(width, hardware)
    if hardware.backend == "hip":
        if width <= 64:
            return (FlashConfig(128, 64, 4, 2), FlashConfig(64, 32, 4, 2))
        if width <= 128:
            return (FlashConfig(128, 32, 4, 2), FlashConfig(64, 32, 4, 2))
        return (FlashConfig(64, 16, 4, 2), FlashConfig(32, 16, 4, 1))
    if hardware.has_wgmma:
        return _flash_preferences_hopper(problem, hardware, width)
    if width <= 64:
        stages = 2 if problem.has_second_tile else 3
        return (FlashConfig(128, 64, 8, stages), FlashConfig(128, 32, 8, 2))
    if width <= 128:
        wide = () if problem.has_second_tile else (FlashConfig(128, 64, 8, 2),)
        return (*wide, FlashConfig(128, 32, 8, 3), FlashConfig(128, 32, 8, 2))
    return (FlashConfig(64, 32, 8, 2), FlashConfig(32, 32, 8, 2), FlashConfig(32, 16, 4, 1))


def _flash_preferences_hopper(
    problem: AttentionProblem, hardware: Hardware, width: int
) -> tuple[FlashConfig, ...]:
    if width > 128:
        tiles = -(-problem.len_q // 128) * problem.batch * problem.num_heads
        if problem.has_second_tile or tiles < hardware.num_sms:
            return (FlashConfig(64, 64, 8, 2, tma=True),)
        return (FlashConfig(128, 64, 8, 2, tma=True), FlashConfig(64, 64, 8, 2, tma=True))
    # Measured on an H200, D = 128, bf16: two programs of 64 rows a multiprocessor overlap one's
    # softmax with the other's products; 413 TFLOP/s at 2048 causal where 128 × 128 reaches 341.
    deeper = () if problem.has_second_tile else (FlashConfig(64, 64, 4, 3, tma=True),)
    return (*deeper, FlashConfig(64, 64, 4, 2, tma=True))


def _flash_preferences_fp32(width: int, hardware: Hardware) -> tuple[FlashConfig, ...]:
    small = FlashConfig(32, 16, 8, 2)
    if width <= 64:
        return (FlashConfig(64, 32, 8, 2), small)
    if width <= 128:
        wide = () if hardware.backend == "hip" else (FlashConfig(32, 64, 8, 2),)
        return (*wide, FlashConfig(32, 32, 8, 2), small)
    wide = () if hardware.backend == "hip" else (FlashConfig(32, 32, 8, 2),)
    return (*wide, small, FlashConfig(16, 16, 4, 1))
