"""Products of groups: kernel against fp64, the passes, and a mixture of experts that uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import triton
import triton.language as tl

from triton_only_backend import testing
from triton_only_backend.backend import compiled_reports
from triton_only_backend.kernels.grouped_gemm import GroupedConfig, select_config, tile_of_group
from triton_only_backend.passes.refusal import META_KEY
from triton_only_backend.passes.rewrite_grouped_mm import rewrite_grouped_mm

grouped_mm = torch.ops.triton_only.grouped_mm
ENDS = {
    "empty groups": ([3, 3, 40, 41], 41),
    "rows after the last": ([0, 0, 7], 11),
    "one group": ([100], 100),
    "many tiles": ([5, 130, 130, 300, 301], 310),
    "nothing": ([0, 0], 3),
}
FORMS = ("rows", "columns", "inner")


def exact(a, b, ends):
    """In fp64, rows after the last group 0."""
    if a.dim() == 3:
        return exact(b.mT, a.mT, ends).mT
    starts = [0, *ends[:-1]]
    a, b = a.double(), b.double()
    if b.dim() == 2:
        return torch.stack([a[:, s:e] @ b[s:e] for s, e in zip(starts, ends, strict=True)])
    out = torch.zeros(a.shape[0], b.shape[2], dtype=torch.float64, device=a.device)
    for g, (s, e) in enumerate(zip(starts, ends, strict=True)):
        out[s:e] = a[s:e] @ b[g]
    return out


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form, device):
    ends, rows = ENDS["rows after the last"]
    a, b = torch.randn(rows, 5, device=device), torch.randn(len(ends), 5, 6, device=device)
    if form == "columns":
        a, b = b.mT, a.mT
    elif form == "inner":
        a, b = a.mT, torch.randn(rows, 6, device=device)
    operands = [t.contiguous().requires_grad_() for t in (a, b)]
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    out = grouped_mm(*operands, offs)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, operands, grad)
    wide = [t.detach().double().requires_grad_() for t in operands]
    expected = torch.autograd.grad(exact(*wide, ends), wide, grad.double())
    for found, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ENDS)
def test_against_fp64(name, form, dtype, device):
    ends, rows = ENDS[name]
    a = torch.randn(rows, 37, device=device).to(dtype)
    b = torch.randn(len(ends), 53, 37, device=device).to(dtype).mT  # as nn.Linear keeps weights
    if form == "columns":
        a, b = b.mT, a.mT
    elif form == "inner":
        a, b = a.mT, torch.randn(rows, 106, device=device).to(dtype)[:, ::2]
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    actual, expected = grouped_mm(a, b, offs), exact(a, b, ends)
    assert actual.shape == expected.shape
    rounded = (expected.to(dtype) - expected).norm()  # what the output's dtype allows at best
    assert (actual - expected).norm() <= 2 * rounded + 3e-7 * expected.norm()
    assert torch.equal(actual, grouped_mm(a, b, offs))


@triton.jit
def tiles_kernel(offs_ptr, found_ptr, M, G, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    pid = tl.program_id(0)
    group, row, end = tile_of_group(pid, offs_ptr, M, G, BLOCK_M, BLOCK_G)
    tl.store(found_ptr + pid * 3, group)
    tl.store(found_ptr + pid * 3 + 1, row)
    tl.store(found_ptr + pid * 3 + 2, end)


@pytest.mark.parametrize("name", ENDS)
def test_tiles_cover_each_row_once(name, device):
    """Whatever the order of the programs: the interpreter's would hide rows written twice."""
    ends, rows = ENDS[name]
    groups = len(ends)
    programs = rows // 16 + groups + 1
    found = torch.empty(programs, 3, dtype=torch.int32, device=device)
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    tiles_kernel[(programs,)](offs, found, rows, groups, 16, triton.next_power_of_2(groups + 2))
    covered = [
        (group, row)
        for group, first, end in found.tolist()
        if group <= groups
        for row in range(first, min(first + 16, end))
    ]
    bounds = [0, *ends, rows]
    expected = [(g, row) for g in range(groups + 1) for row in range(bounds[g], bounds[g + 1])]
    assert covered == expected


def test_out_dtype(device):
    a, b = (torch.randn(s, device=device).bfloat16() for s in ((5, 16), (2, 16, 8)))
    offs = torch.tensor([2, 5], dtype=torch.int32, device=device)
    actual = grouped_mm(a, b, offs, out_dtype=torch.float32)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact(a, b, [2, 5]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "offs", "message"),
    [
        (((5, 16), (2, 15, 8)), [2, 5], "do not multiply"),
        (((5, 16), (3, 16, 8)), [2, 5], "2 groups for 3 matrices"),
        (((2, 5, 16), (2, 16, 8)), [2, 5], "2 or 3 dimensions"),
        (((5, 16), (2, 16, 8)), [2.0, 5.0], "offs must be int32"),
    ],
)
def test_bad_operands_are_named(shapes, offs, message, device):
    a, b = (torch.randn(s, device=device) for s in shapes)
    dtype = torch.float32 if isinstance(offs[0], float) else torch.int32
    with pytest.raises(RuntimeError, match=f"triton_only.grouped_mm: .*{message}"):
        grouped_mm(a, b, torch.tensor(offs, dtype=dtype, device=device))


def product(a, b, offs):
    return torch._grouped_mm(a, b, offs)


OPERANDS = {
    "rows": ((11, 16), (3, 16, 24)),
    "inner": ((24, 16), (16, 8)),  # PyTorch wants rows of a multiple of 16 bytes
}


def operands(form):
    a, b = (torch.randn(s).bfloat16() for s in OPERANDS[form])
    return a, b, torch.tensor([2, 2, 11], dtype=torch.int32)


@pytest.mark.parametrize("form", OPERANDS)
def test_the_pass_fires(form):
    gm = testing.capture(product, *operands(form))
    run = testing.run_pass(rewrite_grouped_mm, gm)
    assert run.fired == 1
    testing.assert_ops(run, appear={"triton_only.grouped_mm": 1}, vanish=["aten._grouped_mm"])
    testing.assert_idempotent(rewrite_grouped_mm, gm)


def test_without_groups_it_is_a_bmm():
    a, b = torch.randn(2, 8, 16).bfloat16(), torch.randn(2, 16, 24).bfloat16()
    run = testing.run_pass(rewrite_grouped_mm, testing.capture(torch._grouped_mm, a, b))
    testing.assert_ops(run, appear={"triton_only.bmm": 1})


def test_a_refusal_says_why():
    a, b, offs = operands("rows")
    gm = testing.capture(product, a, b, offs)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten._grouped_mm.default)
    node.args[0].meta["val"] = node.args[0].meta["val"].to(torch.float64)
    assert rewrite_grouped_mm(gm.graph) == 0
    assert "torch.float64[11, 16]" in node.meta[META_KEY]["detail"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts_runs_on_triton_only(dtype, device):
    """Routing, the sort of the tokens, both products, and in fp32 their gradients."""
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).to(device, dtype)
    ids = torch.randint(64, (2, 7), device=device)
    before = len(compiled_reports())
    compiled = torch.compile(model, backend="triton_only")
    if dtype != torch.float32:
        with torch.no_grad():
            actual, expected = (m(input_ids=ids).logits for m in (compiled, model))
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02)
    else:
        grads = []
        for forward in (compiled, model):
            model.zero_grad()
            forward(input_ids=ids, labels=ids).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for actual, expected in zip(*grads, strict=True):
            assert (actual - expected).norm() <= 1e-4 * expected.norm() + 1e-7
    reports = compiled_reports()[before:]
    assert reports
    assert all(report.is_triton_only for report in reports)


SCRIPT = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import cross_compile
compiled = cross_compile.compile_for(sys.argv[2])
from triton_only_backend.kernels import grouped_gemm
device = cross_compile.TARGETS[sys.argv[2]][2]
for dtype, rows in ((torch.bfloat16, 4), (torch.bfloat16, 4096), (torch.float32, 4096)):
    a, b = torch.empty(rows, 2048, dtype=dtype), torch.empty(8, 1536, 2048, dtype=dtype).mT
    offs = torch.empty(8, dtype=torch.int32)
    config = grouped_gemm.select_config(rows // 8, a.element_size(), device)
    out = torch.empty(rows, 1536, dtype=dtype)
    grouped_gemm.grouped_rows(a, b, offs, out, config=config, precision="ieee")
    config = grouped_gemm.select_config(2048, a.element_size(), device)
    grads = torch.empty(8, 2048, 1536, dtype=dtype)
    grouped_gemm.grouped_inner(a.mT, out, offs, grads, config=config, precision="ieee")
for c in compiled:
    print(json.dumps(dict(name=c.name, spilled=c.spilled, shared=c.shared_memory)))
"""


@pytest.mark.parametrize("target", ["sm80", "sm89", "sm90", "sm100", "gfx942"])
def test_compiles_for_gpus(target, monkeypatch):
    folder = str(Path(__file__).parent)
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, target],
        capture_output=True, text=True, env=environ, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    monkeypatch.syspath_prepend(folder)
    from cross_compile import TARGETS

    assert len(rows) == 6
    assert {row["name"] for row in rows} == {"grouped_rows_kernel", "grouped_inner_kernel"}
    assert all(row["shared"] <= TARGETS[target][2].shared_memory for row in rows), rows
    assert all(row["spilled"] == 0 for row in rows), rows


def test_the_choice_follows_the_rows():
    from triton_only_backend.kernels.hardware import Hardware

    h200 = Hardware("H200", "cuda", "sm90", 132, 232448)
    assert select_config(2, 2, h200) == GroupedConfig(16, 128, 64, 4, 3)
    assert select_config(5000, 2, h200).block_m == 128
