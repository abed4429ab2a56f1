"""The attention benchmark without a GPU: what it computes, checks and draws; no times."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from triton_only_backend import cli
from triton_only_backend.bench import attention, attention_cases, attention_errors, plots
from triton_only_backend.timing import Ceilings

CPU = torch.device("cpu")


@pytest.fixture
def without_gpu(monkeypatch):
    """Each call runs once and is said to take 2 µs; FlexAttention's template is for GPUs."""

    def once(fns, *, reps):
        fns[0]()
        return fns

    def played(captured, *, replays):
        return [2.0 for _ in captured]

    def no_flex(case, device):
        def call(operands):
            raise RuntimeError("no FlexAttention here\nmore")

        return call

    monkeypatch.setattr(attention, "require_gpu", lambda: CPU)
    monkeypatch.setattr(attention, "capture", once)
    monkeypatch.setattr(attention, "replay_in_turn", played)
    monkeypatch.setattr(attention, "flex_call", no_flex)
    monkeypatch.setattr(attention, "BACKENDS", {"math": attention.BACKENDS["math"]})
    monkeypatch.setattr(attention_cases, "copies_for", lambda _: 1)


@pytest.mark.cpu
@pytest.mark.parametrize("kind", attention_cases.KINDS)
def test_a_row_of_each_kind(kind, without_gpu):
    case = attention_cases.Case(kind, 1, 1 if kind == "decode" else 24, 24, 8, head_dim=16)
    limits = Ceilings(1e12, 1e12, "made up")
    row = attention.measure_case(case, torch.float32, limits, ("ours", "flex", "math"))
    assert row["correct"]
    assert row["speedup"] == 1.0
    assert row["not_run"] == {"flex": "no FlexAttention here"}
    assert row["math_tflop_per_second"] == pytest.approx(case.flops / 2e6)
    assert ("ours_gradient_error" in row) == case.is_training
    assert row.get("ours_gradient_error", 0.0) < 1e-5


def test_the_articles_cases():
    """Prefill and decoding of one sequence over the same lengths."""
    plan = attention_cases.Plan(attention_cases.ARTICLE, "bf16", 32, 4096, batch=1)
    found = [(case.kind, case.batch, case.len_q, case.len_kv) for case in plan.cases()]
    lengths = (512, 1024, 2048, 4096)
    assert found == [
        *(("causal", 1, length, length) for length in lengths),
        *(("decode", 1, 1, length) for length in lengths),
    ]


@pytest.mark.parametrize(
    ("arguments", "kv_heads", "batch"),
    [
        (["--cases", "article"], 32, 1),
        (["--cases", "article", "--kv-heads", "8"], 8, 1),
        ([], 8, 2),
        (["--kv-heads", "32", "--batch", "4"], 32, 4),
    ],
)
def test_what_is_asked_for_is_measured(arguments, kv_heads, batch, monkeypatch):
    plans = []
    monkeypatch.setattr(attention, "run", lambda plan, *_: plans.append(plan) or 0)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "attention", *arguments])
    assert not stopped.value.code
    assert [(plan.kv_heads, plan.batch, plan.head_dim) for plan in plans] == [
        (kv_heads, batch, 128)
    ]


@pytest.mark.parametrize("kind", ["training", "training-full"])
def test_gradients_that_are_wrong_are_found(kind, device):
    case = attention_cases.Case(kind, 2, 24, 24, 8, head_dim=16)
    operands = attention_cases.make_operands(case, torch.float32, torch.device(device))[0]
    for operand in operands:
        operand.requires_grad_()
    right = attention.with_gradients(attention.our_call(case))(operands)
    # A graph that lives on keeps the operands' stream, which no other stream's capture may wait for.
    assert not any(tensor.requires_grad for tensor in right)
    wrong = (right[0], right[1], right[2] * 1.1, right[3])
    errors = attention_errors.gradient_errors(case, operands, {"right": right, "wrong": wrong})
    assert errors["right"] < 1e-5
    assert errors["wrong"] == pytest.approx(0.1, rel=0.01)


def test_work_of_a_training_step():
    case = attention_cases.Case("full", 2, 512, 512, 32, head_dim=64)
    training = dataclasses.replace(case, kind="training")
    assert training.flops == case.flops // 2 * 7 // 2
    assert training.bytes_moved(2) == 3 * case.bytes_moved(2)
    full = dataclasses.replace(case, kind="training-full")
    assert full.flops == 2 * training.flops
    assert full.bytes_moved(2) == training.bytes_moved(2)


def test_the_plot_has_a_panel_for_each_kind(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {
            "kind": kind, "batch": 2, "len_kv": length,
            **{f"{p}_{u}": 1.0 for p in ("ours", "cudnn")
               for u in ("tb_per_second", "tflop_per_second")},
        }
        for kind in ("causal", "decode") for length in (512, 1024)
    ]  # fmt: skip
    path = tmp_path / "new" / "attention.svg"
    plots.plot_attention(rows, ("ours", "cudnn", "flex"), path, "title")
    drawn = path.read_text()
    assert "<svg" in drawn
    assert drawn.count('id="axes_') == 2
