"""Which pass fires how often on which architecture: prints the table of docs/passes.md.

    python tests/pass_table.py

Two layers of each, a decode step with a static cache and a prefill (an encoder's forward for BERT),
batch 2, fp32. The graphs are taken to where Inductor would begin; nothing is generated. The passes
that rewrite single operations (`rewrite_…`) fire once an operation, and have no column, nor has
`mark_ready_inputs`, which is for a GPU's graphs.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter

import torch
import transformers

from triton_only_backend import backend
from triton_only_backend.passes import pipeline

LAYERS = 2
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_positions": 64, "n_embd": 64, "n_layer": LAYERS, "n_head": 4}
OPT = {
    "vocab_size": 64, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
FALCON = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "alibi": False,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", GROUPED),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": None}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 16}),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 16}),
    "Phi": ("PhiForCausalLM", "PhiConfig", GROUPED),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", {**GROUPED, "pad_token_id": 0}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    "OPT": ("OPTForCausalLM", "OPTConfig", OPT),
    "Falcon": ("FalconForCausalLM", "FalconConfig", FALCON),
    "StableLM": ("StableLmForCausalLM", "StableLmConfig", GROUPED),
    "BERT": ("BertForMaskedLM", "BertConfig", SMALL),
}
SHOWN = tuple(name for name in pipeline.NAMES if not name.startswith(("rewrite_", "mark_")))


class Stop(Exception):
    """The graph has been seen; no code is wanted."""


def build(name: str) -> tuple[torch.nn.Module, transformers.PretrainedConfig]:
    """A small model of an architecture with random weights."""
    model, config, sizes = ARCHITECTURES[name]
    configuration = getattr(transformers, config)(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, model)(configuration).eval(), configuration


def fired(function, *args) -> Counter[str]:
    """How often each pass fires on the graph of a function."""
    counts: Counter[str] = Counter()
    original, inner = pipeline.run_on_graph, backend.Compilation._inner_compile

    def run_on_graph(stage, graph, disabled=()):
        results = original(stage, graph, disabled)
        counts.update({r.name: r.fired for r in results})
        return results

    def inner_compile(self, _compile, gm, *_args, **_kwargs):
        pipeline.run_stage("aten", gm)
        raise Stop

    pipeline.run_on_graph, backend.Compilation._inner_compile = run_on_graph, inner_compile
    try:
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(function, backend="triton_only", dynamic=False)(*args)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, Stop):
            raise
    finally:
        pipeline.run_on_graph, backend.Compilation._inner_compile = original, inner
    return counts


def graphs(name: str) -> dict[str, Counter[str]]:
    """The passes that fire in a decode step and in a prefill."""
    model, config = build(name)
    prompt = torch.randint(1, 64, (2, 40))
    if name == "BERT":
        return {"forward": fired(lambda ids: model(input_ids=ids).logits, prompt)}

    cache = transformers.StaticCache(config=config, max_cache_len=64)
    slots = torch.arange(64)

    def step(tokens, positions):
        return model(
            input_ids=tokens,
            attention_mask=(slots <= positions[:, None])[None, None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits

    with torch.no_grad():
        step(prompt, torch.arange(40))
    found = {"decode": fired(step, prompt[:, :1].contiguous(), torch.tensor([40]))}
    cache.reset()
    return {**found, "prefill": fired(step, prompt, torch.arange(40))}


def table(names: list[str]) -> str:
    """The table in Markdown, a row a graph."""
    lines = [f"| architecture | graph | {' | '.join(f'`{name}`' for name in SHOWN)} |"]
    lines.append("|---" * (len(SHOWN) + 2) + "|")
    for name in names:
        for graph, counts in graphs(name).items():
            cells = " | ".join(str(counts[shown] or "–") for shown in SHOWN)
            lines.append(f"| {name} | {graph} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(table(sys.argv[1:] or list(ARCHITECTURES)))
