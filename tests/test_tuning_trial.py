"""One trial: it runs the configuration that is meant, on the problem that is meant, and checks it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from played_tuning import H200, PROBLEM

from triton_only_backend.kernels import hardware, tuned
from triton_only_backend.kernels.attention_configs import AttentionProblem
from triton_only_backend.kernels.gemm_choice import heuristic_config, select_config
from triton_only_backend.kernels.gemm_configs import GemmConfig, GemmProblem
from triton_only_backend.tuning import attention_trial, spaces, trial


@pytest.mark.parametrize(
    "problem",
    [
        GemmProblem(1, 16, 64, 96, 2, False, True, True),
        GemmProblem(2, 16, 64, 96, 2, False, True, False),
        GemmProblem(1, 16, 32, 33, 2, False, False, True, aligned=False),
        GemmProblem(1, 16, 32, 64, 4, True, True, True),
        GemmProblem(1, 2, 64, 96, 2, False, True, True),
    ],
    ids=str,
)
def test_a_trial_has_the_problem_it_was_made_for(problem: GemmProblem, device: str) -> None:
    a_trial = trial.GemmTrial(problem, torch.device(device))
    config = heuristic_config(problem, hardware.of(torch.device(device)))
    with tuned.recording() as recorded:
        assert a_trial.check(config) is None
    assert list(recorded) == [("gemm", problem)]


def test_a_wrong_configuration_is_caught(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = GemmProblem(1, 16, 64, 96, 2, False, True, True)
    a_trial = trial.GemmTrial(problem, torch.device(device))
    config = heuristic_config(problem, hardware.of(torch.device(device)))
    matmul = trial.load("matmul")
    right = matmul.matmul

    def one_missing(a: Any, b: Any, bias: Any, out: Any, **how: Any) -> None:
        right(a, b, bias, out, **how)
        out[0, 3, 5] = torch.nan

    def inaccurate(a: Any, b: Any, bias: Any, out: Any, **how: Any) -> None:
        right(a, b, bias, out, **how)
        out[0, :8] *= 1.02

    def unsteady(a: Any, b: Any, bias: Any, out: Any, **how: Any) -> None:
        right(a, b, bias, out, **how)
        out[0, 0, 0] *= 1 + torch.rand(()).item() * 2**-4

    for faulty, cause in ((one_missing, "error nan"), (inaccurate, "error"), (unsteady, "bits")):
        monkeypatch.setattr(matmul, "matmul", faulty)
        assert cause in (a_trial.check(config) or "")


def test_forced_configurations_are_what_runs(device: str) -> None:
    config = GemmConfig("gemm", 16, 16, 16, 3, 1, 4, 1)
    with tuned.forcing("gemm", config):
        assert select_config(PROBLEM, H200) is config
    assert select_config(PROBLEM, H200) != config


# Attention
PREFILL = AttentionProblem(2, 4, 2, 64, 64, 32, 32, 2, True, False)
DECODE = AttentionProblem(2, 4, 2, 1, 64, 32, 32, 2, False, True)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("flash_attention", PREFILL),
        ("flash_attention", dataclasses.replace(PREFILL, has_mask=True, is_causal=False)),
        ("decode_attention", DECODE),
        ("decode_attention", dataclasses.replace(DECODE, has_mask=False)),
    ],
    ids=str,
)
def test_an_attention_trial(
    kind: str, problem: AttentionProblem, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_trial = trial.make_trial(kind, problem, torch.device(device))
    config = spaces.heuristic(kind, problem, hardware.of(torch.device(device)))
    with tuned.recording() as recorded:
        assert a_trial.check(config) is None
    assert list(recorded) == [(kind, problem)]
    right = attention_trial.attend
    monkeypatch.setattr(attention_trial, "attend", lambda x, p: right(x, p).mul_(1.01))
    assert "error" in (a_trial.check(config) or "")
