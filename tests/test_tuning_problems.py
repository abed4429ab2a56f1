"""What is to be tuned: shapes, files of shapes, presets, models and saved graphs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from triton_only_backend import cli_tune
from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.gemm_configs import GemmProblem
from triton_only_backend.kernels.shipped_tables import shipped_tables
from triton_only_backend.tuning import problems

if TYPE_CHECKING:
    from pathlib import Path


def test_shapes_are_read() -> None:
    (one,) = problems.parse_shape("32x6144x4096", "bf16", True)
    assert one == ("gemm", GemmProblem(1, 32, 6144, 4096, 2, False, True, True))
    many = problems.parse_shape(" 8x1,65x128x64 ", "fp32", False)
    assert [p.M for _, p in many] == [1, 128]
    assert all(p.batch == 8 and p.ieee and not p.b_k_contiguous for _, p in many)
    ((_, odd),) = problems.parse_shape("64x5333x495", "fp16", True)
    assert not odd.aligned and odd.N == 5376


@pytest.mark.parametrize("text", ["", "32x6144", "0x2x3", "1x2x3x4x5", "ax2x3", "1,x2x3", "1x-2x3"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(problems.ShapeError, match="is no shape; write MxNxK"):
        problems.parse_shape(text, "bf16", True)


def test_a_file_of_shapes(tmp_path: Path) -> None:
    path = tmp_path / "shapes.txt"
    path.write_text("# q, k, v\n1,2x6144x4096\n\n1x6144x4096  # again\n")
    found = problems.read_shapes(path, "bf16", True)
    assert [p.M for _, p in found] == [1, 2]
    path.write_text("1x2x3\nnonsense\n")
    with pytest.raises(problems.ShapeError, match="line 2: 'nonsense'"):
        problems.read_shapes(path, "bf16", True)


def test_presets_begin_with_what_matters_most() -> None:
    llama = problems.preset("llama")
    first = {(p.M, p.N, p.K) for _, p in llama[:35]}
    assert first == {(M, N, K) for M in problems.MAIN_ROWS for N, K in problems.LLAMA3_8B}
    everything = problems.preset("all")
    assert everything[: len(llama)] == llama
    assert len(set(everything)) == len(everything)
    assert {p.K for _, p in everything} >= {495, 1024, 4096, 8192, 10240, 14336, 28672}


def test_random_shapes_are_known_to_no_table_and_the_same_each_time() -> None:
    found = problems.preset("random")
    assert len(set(found)) == len(found) == problems.RANDOM_SHAPES == 200
    assert found == problems.preset("random")
    known = {text for table in shipped_tables() for text in table["entries"]["gemm"]}
    assert not known & {tuned.encode(problem) for _, problem in found}
    for low, high in ((1, 2), (3, 16), (17, 64), (65, 512), (513, 8192)):
        assert sum(low <= p.M <= high for _, p in found) >= 10
    assert 10 <= sum(not p.aligned for _, p in found) <= 100


@pytest.mark.cpu
def test_attention_is_tuned_as_models_call_it() -> None:
    found = problems.preset("attention")
    assert {kind for kind, _ in found} == {"flash_attention", "decode_attention"}
    query = torch.randn(2, 32, 40, 64)

    def run() -> None:
        key = query[:, :8]
        torch.ops.triton_only.attention(query, key, key, is_causal=True, enable_gqa=True)
        step, mask = query[:, :, :1], torch.ones(2, 1, 1, 40, dtype=torch.bool)
        torch.ops.triton_only.attention(step, key, key, mask, enable_gqa=True)

    recorded = [
        (kind, dataclasses.replace(p, element_size=2)) for kind, p in problems.recorded(run)
    ]
    like: dict[str, Any] = {"kv_heads": 8, "head_dim": 64}
    assert recorded == [
        problems.attention(2, 40, 40, is_causal=True, **like),
        problems.attention(2, 1, 40, has_mask=True, **like),
    ]
    lengths = [(p.len_q, p.len_kv) for _, p in found]
    assert {n for _, n in lengths} == {512 << i for i in range(9) if 512 << i != 65536}
    assert max(p.batch * p.len_kv for _, p in found if p.len_q == 1) <= problems.MAX_CACHED


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def make_two() -> Any:
    return Two(), (torch.randn(5, 64),)


@pytest.mark.cpu
def test_the_problems_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "two_layers.py"
    module.write_text(
        "import torch\n"
        "def make():\n"
        "    up, down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)\n"
        "    return torch.nn.Sequential(up, torch.nn.ReLU(), down), (torch.randn(5, 64),)\n"
    )
    found = cli_tune._of_model(f"{module}:make", no_grad=True)
    assert [(p.M, p.N, p.K) for kind, p in found if kind == "gemm"] == [(8, 128, 64), (8, 64, 96)]
    with_backward = cli_tune._of_model(f"{module}:make", no_grad=False)
    assert set(found) < set(with_backward)


@pytest.mark.cpu
def test_the_problems_of_a_saved_graph(tmp_path: Path) -> None:
    model, args = make_two()
    path = tmp_path / "two.pt2"
    torch.export.save(torch.export.export(model, args), path)
    found = cli_tune._of_model(str(path), no_grad=True)
    assert [(p.N, p.K) for _, p in found] == [(128, 64), (64, 96)]
    path.write_bytes(b"nothing")
    with pytest.raises(cli_tune.UsageError, match="cannot load"):
        cli_tune.load_exported(str(path))
