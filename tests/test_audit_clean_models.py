"""No false alarm: models that Triton runs whole are reported so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import triton_only_backend as tob

transformers = pytest.importorskip("transformers")

WIDTH, HEADS, LENGTH, VOCABULARY = 32, 2, 8, 64


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 64, bias=False), nn.Linear(WIDTH, 64, bias=False)
        self.down = nn.Linear(64, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GroupedAttention(nn.Module):
    """Causal attention with two query heads for a head of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 2, 16).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 1, 32).transpose(1, 2).chunk(2, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, n, WIDTH))


class Experts(nn.Module):
    """A dense mixture: every expert on every token, weighted by a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.weight = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH)

    def forward(self, x):
        return torch.einsum("bne,bnd,edf->bnf", self.gate(x).softmax(-1), x, self.weight)


class Patches(nn.Module):
    """A vision model's patches by a view instead of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, WIDTH)

    def forward(self, x):
        x = x.reshape(2, 2, 8, 2, 8).transpose(2, 3).reshape(2, 4, 64)
        return F.normalize(self.project(x), dim=-1).mean(1)


class Gated(nn.Module):
    """A recurrence written out in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(2 * WIDTH, 2 * WIDTH)

    def forward(self, x):
        h = torch.zeros_like(x[:, 0])
        for step in x.unbind(1)[:3]:
            gate, new = self.cell(torch.cat([step, h], -1)).chunk(2, -1)
            h = torch.lerp(h, new.tanh(), gate.sigmoid())
        return h


PLAIN = {
    "mlp": nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 8)),
    "residual mlp": Residual(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)),
    "layer norm": nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()),
    "group norm": nn.Sequential(nn.GroupNorm(4, LENGTH), nn.Linear(WIDTH, WIDTH), nn.Mish()),
    "batch norm": nn.Sequential(nn.BatchNorm1d(LENGTH), nn.Linear(WIDTH, WIDTH), nn.ELU()),
    "rms norm and swiglu": Residual(nn.Sequential(nn.RMSNorm(WIDTH), SwiGLU())),
    "grouped attention": Residual(GroupedAttention()),
    "dense experts": Experts(),
    "patches": Patches(),
    "gated recurrence": Gated(),
    "encoder layer": nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_model_is_clean_in_training(name, device):
    report = tob.audit(PLAIN[name].to(device), torch.randn(2, LENGTH, WIDTH, device=device))
    assert report.is_triton_only, report.to_short_text()
    assert not report.graph_breaks
    assert report.coverage.ops == report.coverage.calls == 1
    assert len(report.graphs) == 2


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "intermediate_size": 64, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA_LIKE = {**SIZES, "num_key_value_heads": 1, "head_dim": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {
    "n_embd": WIDTH, "n_layer": 1, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCABULARY,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {"d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": HEADS}
OPT = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": WIDTH}

TRANSFORMERS = {
    "Llama": LLAMA_LIKE,
    "Mistral": LLAMA_LIKE,
    "Qwen2": LLAMA_LIKE,
    "Qwen3": LLAMA_LIKE,
    "Gemma2": LLAMA_LIKE,
    "Granite": LLAMA_LIKE,
    "Phi": SIZES,
    "GPT2": GPT2,
    "GPTNeoX": SIZES,
    "OPT": OPT,
    "Bert": {**SIZES, **NO_DROPOUT},
    "Roberta": {**SIZES, **NO_DROPOUT},
    "T5Encoder": {**T5, "vocab_size": VOCABULARY},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_model_of_transformers_is_clean_in_inference(name, device):
    config = getattr(transformers, f"{name.removesuffix('Encoder')}Config")(**TRANSFORMERS[name])
    model = getattr(transformers, f"{name}Model")(config).to(device).eval()
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), device=device)
    options = {} if name in ("Bert", "Roberta", "T5Encoder") else {"use_cache": False}
    with torch.no_grad():
        report = tob.audit(model, input_ids=ids, **options)
    assert report.is_triton_only, report.to_short_text()
    assert report.coverage.ops == report.coverage.calls == 1


def test_there_are_enough_of_them():
    assert len(PLAIN) + len(TRANSFORMERS) >= 20
