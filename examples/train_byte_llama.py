"""Trains the byte-level Llama that `triton-only demo` runs, from one text file.

    python examples/train_byte_llama.py --text kjv.txt --out triton_only_backend/demo/checkpoint

The defaults are sized for one data-centre GPU and write 3.7 MB. See examples/README.md for the
text. The same seed on the same machine and versions gives the same checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.utils.deterministic as deterministic
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from triton_only_backend.demo import byte_llama
from triton_only_backend.demo.generate import StaticDecoder, generate

HELD_OUT_SHARE = 0.05
SAMPLE_PROMPTS = ("In the beginning ", "And it came to pass, ", "The LORD is my ")
SAMPLE_TOKENS = 200


def build_model(dropout: float) -> LlamaForCausalLM:
    """1.8 million parameters; grouped-query attention with a head size that Triton kernels like."""
    config = LlamaConfig(
        vocab_size=byte_llama.VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def split(text: Path, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The text as uint8: all but its end, (T,), and its end in windows, (N, window + 1).

    Neighbouring windows share one byte, so that each held-out byte but the first is scored once.
    """
    data = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8)
    cut = data.numel() - int(data.numel() * HELD_OUT_SHARE)
    train, held_out = data[:cut], data[cut:]
    if train.numel() <= window + 1 or held_out.numel() <= window:
        raise SystemExit(f"{text}: {data.numel()} bytes are too few for windows of {window}")
    return train, held_out.unfold(0, window + 1, window)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to a twentieth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: LlamaForCausalLM, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' vectors alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train(args: argparse.Namespace, model: LlamaForCausalLM) -> None:
    """Trains `model` in place; leaves it at the weights that scored best on the held-out text."""
    device = torch.device(args.device)
    module: torch.nn.Module = model
    module.to(device)
    train_text, held_out = (part.to(device) for part in split(args.text, args.window))
    generator = torch.Generator().manual_seed(args.seed)
    starts = torch.randint(
        train_text.numel() - args.window, (args.steps, args.batch), generator=generator
    ).to(device)
    offsets = torch.arange(args.window + 1, device=device)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats; tokens is int64, (batch, window + 1)."""
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten()
        )

    forward = torch.compile(loss_of) if args.compile else loss_of
    optimizer = make_optimizer(model, args.weight_decay)
    best, best_weights = math.inf, {}
    mean_loss, steps_since = torch.zeros((), device=device), 0
    module.train()
    begin = time.perf_counter()
    for step in range(args.steps):
        rate = learning_rate(step, args.steps, args.lr, min(args.warmup, args.steps // 10 + 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = forward(train_text[starts[step][:, None] + offsets].long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean_loss, steps_since = mean_loss + loss.detach(), steps_since + 1

        if (step + 1) % args.evaluate_every == 0 or step + 1 == args.steps:
            module.eval()
            score = byte_llama.bits_per_byte(model, held_out)
            module.train()
            if score < best:
                best = score
                best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
            print(
                f"step {step + 1:6d}/{args.steps}  lr {rate:.1e}  bits per byte: "
                f"train {mean_loss.item() / steps_since / math.log(2):.4f}  held out {score:.4f}"
                f"{' *' if score == best else '  '}  {time.perf_counter() - begin:6.1f} s",
                flush=True,
            )
            mean_loss, steps_since = torch.zeros((), device=device), 0
    if not best_weights:
        raise SystemExit("the held-out loss was never finite: lower --lr")
    model.load_state_dict(best_weights)


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Writes the checkpoint in bfloat16 beside `out`, then puts it in `out`'s place by renaming."""
    model.config.attention_dropout = 0.0
    model.generation_config = GenerationConfig(do_sample=False)
    module: torch.nn.Module = model
    module.eval().to(device="cpu", dtype=torch.bfloat16)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    new, old = scratch / "new", scratch / "old"
    model.save_pretrained(new)
    for file in new.iterdir():
        file.chmod(0o644)  # the weights are written for their owner alone
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(scratch)


def report(args: argparse.Namespace) -> None:
    """Reads the stored checkpoint back, scores it and prints greedy continuations."""
    model = byte_llama.load(args.device, checkpoint=args.out)
    _, held_out = split(args.text, args.window)
    score = byte_llama.bits_per_byte(model, held_out.to(args.device))
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(
        f"stored {args.out}: {size / 1e6:.2f} MB, {model.num_parameters() / 1e6:.2f} M parameters, "
        f"held out {score:.4f} bits per byte"
    )
    decoder = StaticDecoder(model, max_length=256)
    for prompt in SAMPLE_PROMPTS:
        tokens = byte_llama.encode(prompt).to(args.device)
        text = byte_llama.decode(generate(decoder.forward, decoder, tokens, SAMPLE_TOKENS))
        print(f"--- {prompt!r}\n{prompt}{text}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train the byte-level Llama of the demo on one text file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--text", type=Path, required=True, help="the text, UTF-8 or ASCII")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128, help="windows in a step")
    parser.add_argument("--window", type=int, default=512, help="bytes predicted in a window")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps; a tenth of them at most")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1, help="of attention, in training")
    parser.add_argument("--evaluate-every", type=int, default=250, help="steps")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    return parser.parse_args()


def main() -> None:
    """Trains, saves, reads back and shows."""
    args = parse_arguments()
    disable_progress_bar()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # The fill of each new tensor with NaN finds bugs, of which this script has none to find.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(args.seed)
    model = build_model(args.dropout)
    train(args, model)
    save(model, args.out)
    report(args)


if __name__ == "__main__":
    main()
