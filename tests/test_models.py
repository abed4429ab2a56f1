"""Tiny transformers models: the same output as eager's, on Triton kernels only."""

from __future__ import annotations

import pytest
import torch
import transformers

from triton_only_backend.backend import compiled_reports

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 4,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
MODELS = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "num_hidden_layers": 2}),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 16}),
    "GPT2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "BERT": ("BertForMaskedLM", "BertConfig", SMALL),
}  # fmt: skip


def build(name: str, device: str, **options) -> torch.nn.Module:
    model, config, sizes = MODELS[name]
    config = getattr(transformers, config)(**sizes, **options, use_cache=False)
    return getattr(transformers, model)(config).to(device)


def tokens(device: str) -> torch.Tensor:
    return torch.randint(64, (2, 7), device=device)


@pytest.mark.parametrize("name", MODELS)
def test_inference(name, device):
    model, ids = build(name, device).eval(), tokens(device)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    before = len(compiled_reports())
    with torch.no_grad():
        compiled = torch.compile(model, backend="triton_only", fullgraph=name != "BERT")
        actual = compiled(input_ids=ids, attention_mask=mask).logits
        expected = model(input_ids=ids, attention_mask=mask).logits
    seen = mask.bool()
    torch.testing.assert_close(actual[seen], expected[seen], rtol=1e-3, atol=1e-4)
    reports = compiled_reports()[before:]
    assert reports
    assert all(report.is_triton_only for report in reports)


@pytest.mark.parametrize(("name", "attention"), [("Llama", "sdpa"), ("GPT2", "eager")])
def test_training_step(name, attention, device):
    model, ids = build(name, device, attn_implementation=attention).train(), tokens(device)
    compiled = torch.compile(model, backend="triton_only")
    before = len(compiled_reports())
    grads = []
    for forward in (compiled, model):
        model.zero_grad()
        forward(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for parameter, expected in grads[1].items():
        error = (grads[0][parameter] - expected).norm() / (expected.norm() + 1e-6)
        assert error < 1e-3, parameter
    reports = compiled_reports()[before:]
    assert {report.graphs[0].split()[-1] for report in reports} == {"(forward)", "(backward)"}
    assert all(report.is_triton_only for report in reports)
