"""What of which architecture leaves Triton: prints the table of docs/models.md.

    python tests/model_table.py [architecture …]

Small models of transformers' own code with random weights, two layers, as they are compiled for an
H200 (`--target cuda:90`), fp32: a forward, a decode step with a static cache, a forward and backward.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
import transformers

from triton_only_backend.model_audit import audit_with

if TYPE_CHECKING:
    from collections.abc import Callable

LM = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**LM, "num_key_value_heads": 2, "head_dim": 8}
MLA = {
    **LM, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "n_shared_experts": 1, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "first_k_dense_replace": 1,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
WHISPER = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_source_positions": 16, "max_target_positions": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}


def words() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 64, (2, 7))}


def image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def large_image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def spectrum() -> dict[str, Any]:
    return {
        "input_features": torch.randn(2, 8, 32),
        "decoder_input_ids": torch.randint(3, 64, (2, 5)),
    }


# name: model, configuration, its sizes, what it is called with
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, words),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "sliding_window": 4}, words),
    "BLOOM": (
        "BloomForCausalLM", "BloomConfig",
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, words,
    ),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}, words),
    "GPT-OSS": (
        "GptOssForCausalLM", "GptOssConfig",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}, words,
    ),
    "DeepSeek-V2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", MLA, words),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", MLA, words),
    "Mamba": (
        "MambaForCausalLM", "MambaConfig",
        {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}, words,
    ),
    "Qwen3-Next": (
        "Qwen3NextForCausalLM", "Qwen3NextConfig",
        {
            **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        }, words,
    ),
    "BERT": ("BertForMaskedLM", "BertConfig", LM, words),
    "ViT": ("ViTModel", "ViTConfig", IMAGE, image),
    "Swin": (
        "SwinModel", "SwinConfig",
        {
            "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1],
            "num_heads": [2, 4], "window_size": 2,
        }, image,
    ),
    "SegFormer": (
        "SegformerModel", "SegformerConfig", {**STAGES, "num_attention_heads": [1, 2, 2, 2]},
        large_image,
    ),
    "ConvNeXt": ("ConvNextModel", "ConvNextConfig", STAGES, large_image),
    "ResNet": ("ResNetModel", "ResNetConfig", {**STAGES, "embedding_size": 8}, large_image),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, spectrum),
}  # fmt: skip


def build(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A small model with random weights, and what to call it with."""
    model, config, sizes, inputs = ARCHITECTURES[name]
    configuration = getattr(transformers, config)(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, model)(configuration).eval(), inputs()


def left(call: Callable[..., Any], **inputs: Any) -> set[str]:
    """The operations that leave Triton when a model is called so."""
    torch._dynamo.reset()
    report = audit_with(call, kwargs=inputs, target="cuda:90")
    return {finding.op for finding in report.findings}


def decode(model: torch.nn.Module) -> set[str]:
    """The same of one step through a static cache, after a prompt."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    ids = torch.randint(3, 64, (2, 6))
    with torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
        return left(
            model, input_ids=ids[:, 5:], past_key_values=cache, use_cache=True,
            position_ids=torch.tensor([[5], [5]]),
        )  # fmt: skip


def row(name: str) -> str:
    """A row of the table in Markdown."""
    model, inputs = build(name)
    can_decode = name in DECODERS
    with torch.no_grad():
        forward = left(model, **({**inputs, "use_cache": False} if can_decode else inputs))
    step = decode(model) if can_decode else None
    training = left(model.train(), **({**inputs, "use_cache": False} if can_decode else inputs))
    cells = ["–" if ops is None else "no" if ops else "yes" for ops in (forward, step, training)]
    remaining = sorted(forward | (step or set()) | training)
    listed = ", ".join(f"`{op.removeprefix('aten.').split('.')[0]}`" for op in remaining)
    return f"| {name} | {' | '.join(cells)} | {listed} |"


DECODERS = {name for name, (model, *_) in ARCHITECTURES.items() if model.endswith("ForCausalLM")}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("| architecture | forward | decoding | training | what is left |\n|---|---|---|---|---|")
    for architecture in sys.argv[1:] or ARCHITECTURES:
        print(row(architecture), flush=True)
