"""The models that are benchmarked: published shapes with random weights, and what bounds them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from triton_only_backend.timing import BenchmarkError

if TYPE_CHECKING:
    from triton_only_backend.bench.plain_llama import PlainLlama
    from triton_only_backend.demo.generate import StaticDecoder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama-like model.

    Attributes:
        bias: whether attention and MLP projections have biases.
        tied: whether the output projection is the embedding.
        plain: whether it is `plain_llama.PlainLlama` instead of transformers' `LlamaForCausalLM`.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    rope_theta: float
    max_length: int = 8192
    bias: bool = False
    tied: bool = False
    plain: bool = False

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden // self.heads

    def cache_bytes(self, batch: int, length: int, element_size: int) -> int:
        """Bytes of the keys and values of `length` tokens."""
        return 2 * self.layers * batch * self.kv_heads * length * self.head_dim * element_size

    def causal_attention_flops(self, batch: int, length: int) -> int:
        """Multiplications and additions of attention over a prompt, masked scores left out."""
        return 2 * self.layers * batch * self.heads * length**2 * self.head_dim


MODELS = {
    "llama3-8b": ModelShape(32, 4096, 32, 8, 14336, 128256, 500000.0),
    "granite-8b-code": ModelShape(36, 4096, 32, 8, 14336, 49152, 10000.0, bias=True, tied=True),
    "plain-llama3-8b": ModelShape(32, 4096, 32, 8, 14336, 128256, 500000.0, plain=True),
    "llama-tiny": ModelShape(2, 64, 4, 2, 128, 256, 10000.0, max_length=256),
    "plain-tiny": ModelShape(2, 64, 4, 2, 128, 256, 10000.0, max_length=256, plain=True),
}
# Small enough for the Triton interpreter.
INTERPRETABLE = ("llama-tiny", "plain-tiny")


def build(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, batch: int, cache_length: int
) -> torch.nn.Module:
    """The model with random weights, made in place on the device, frozen, in evaluation mode.

    Args:
        batch, cache_length: sequences and tokens of the cache, where the model owns one.

    Raises:
        BenchmarkError: transformers is not installed.
    """
    torch.manual_seed(0)
    if shape.plain:
        module: torch.nn.Module = _build_plain(shape, dtype, device, batch, cache_length)
    else:
        module = _build_transformers(shape, dtype, device)
    return module.requires_grad_(requires_grad=False).eval()


def _build_plain(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, batch: int, cache_length: int
) -> PlainLlama:
    from triton_only_backend.bench.plain_llama import PlainLlama

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return PlainLlama(shape, batch, cache_length)
    finally:
        torch.set_default_dtype(before)


def _build_transformers(
    shape: ModelShape, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    try:
        from transformers import AutoModelForCausalLM, LlamaConfig
    except ImportError as error:
        raise BenchmarkError(
            f"triton_only: the model benchmark needs transformers ({error}); "
            "pip install 'triton-only-backend[bench]'"
        ) from error

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        attention_bias=shape.bias,
        mlp_bias=shape.bias,
        tie_word_embeddings=shape.tied,
    )
    with torch.device(device):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model


def make_decoder(
    model: torch.nn.Module, batch: int, cache_length: int
) -> StaticDecoder | PlainLlama:
    """The model with a static cache: its own, or transformers'."""
    from triton_only_backend.bench.plain_llama import PlainLlama
    from triton_only_backend.demo.generate import StaticDecoder

    if isinstance(model, PlainLlama):
        return model
    return StaticDecoder(model, cache_length, batch)  # type: ignore[arg-type]


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device


def step_floor_bytes(model: torch.nn.Module, shape: ModelShape, batch: int, length: int) -> int:
    """Bytes that a decode step must read: the weights, and the cache of `length` tokens."""
    embedding = 0 if shape.tied else shape.vocabulary * shape.hidden
    parameters = list(model.parameters())
    element_size = parameters[0].element_size()
    weights = (sum(p.numel() for p in parameters) - embedding) * element_size
    return weights + shape.cache_bytes(batch, length, element_size)


def prefill_floor_flops(model: torch.nn.Module, shape: ModelShape, batch: int, length: int) -> int:
    """Operations of a prefill that scores the last position only."""
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    head = shape.vocabulary * shape.hidden
    matrices -= head if shape.tied else 2 * head  # the embedding is a look-up
    products = 2 * batch * (length * matrices + head)
    return products + shape.causal_attention_flops(batch, length)


@torch.no_grad()
def reference_logits(model: torch.nn.Module, tokens: torch.Tensor, keep: int) -> torch.Tensor:
    """Scores of the last `keep` positions by the same weights in fp32, without a cache.

    Args:
        model: left as it is; a copy is widened.
        tokens: int64, shape (B, S).
        keep: how many positions.

    Returns:
        fp32, shape (B, keep, V).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from triton_only_backend.bench.plain_llama import PlainLlama

    exact = copy.deepcopy(model).float()
    with sdpa_kernel(SDPBackend.MATH):
        if isinstance(exact, PlainLlama):
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            return exact(tokens, positions)[:, -keep:].clone()  # type: ignore[no-any-return]
        logits: torch.Tensor = exact(input_ids=tokens, use_cache=False, logits_to_keep=keep).logits
    return logits
