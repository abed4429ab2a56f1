"""The benchmarks: their arithmetic, their checks, and one whole run in the interpreter."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import io
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

from triton_only_backend import cli, cli_bench, environment, inductor, settings, timing
from triton_only_backend.audit.kernel_report import KernelEvent, KernelReport, KernelRow
from triton_only_backend.audit.policy import Provider
from triton_only_backend.backend import triton_only
from triton_only_backend.bench import (
    ablation,
    attention,
    attention_cases,
    attention_errors,
    breakdown,
    comparison,
    compile_ahead,
    gemm,
    generation,
    models,
    plots,
    providers,
    record,
)
from triton_only_backend.kernels import hardware, tuned
from triton_only_backend.kernels.gemm_choice import select_config
from triton_only_backend.passes import pipeline

if TYPE_CHECKING:
    from pathlib import Path

PLAN = generation.Plan("llama-tiny", "bf16", 2, 4, 2, ("eager", "triton_only"), logits_error=False)


# Floors


@pytest.mark.parametrize(
    ("bytes_moved", "flops", "expected"),
    [(4e12, 0, 1e6), (0, 2e15, 2e6), (4e12, 2e15, 2e6), (4e6, 1e9, 1.0)],
)
def test_floor_is_the_longer_of_two_times(
    bytes_moved: float, flops: float, expected: float
) -> None:
    limits = timing.Ceilings(4e12, 1e15, "")
    assert limits.floor_us(bytes_moved, flops) == pytest.approx(expected)


def test_traffic_of_a_product() -> None:
    assert gemm.traffic(2, 4096, 1024, 2) == (2 * (2048 + 4096 * 1024 + 8192), 2**24)


def test_flops_and_bytes_of_attention() -> None:
    case = attention_cases.Case("full", 2, 512, 1024, 8)
    assert case.flops == 4 * 2 * 32 * 512 * 1024 * 128
    assert dataclasses.replace(case, kind="causal").flops * 2 == case.flops
    assert case.bytes_moved(2) == 2 * 2 * 128 * (2 * 32 * 512 + 2 * 8 * 1024)


def test_floors_of_llama3_8b() -> None:
    pytest.importorskip("transformers")
    shape = models.MODELS["llama3-8b"]
    model = models.build(shape, torch.bfloat16, torch.device("meta"), 2, 768)
    assert model.num_parameters() == 8_030_261_248
    # 7.5 G weights that are read, the embedding left out; 768 tokens of 128 KiB, twice.
    assert models.step_floor_bytes(model, shape, 2, 768) == 2 * 7_504_924_672 + 2 * 768 * 2**17
    flops = models.prefill_floor_flops(model, shape, 2, 512)
    assert flops == pytest.approx(2 * 1024 * 6.98e9 + 0.14e12, rel=1e-3)


@pytest.mark.parametrize(
    ("size", "copies"), [(1, 300_000_000), (8_388_608, 36), (1_050_673_152, 1)]
)
def test_operands_rotate_through_more_than_the_caches(size: int, copies: int) -> None:
    assert timing.copies_for(size) == copies


@pytest.mark.parametrize(
    ("floor_us", "rotation", "expected"),
    [(2.0, 36, 2016), (5000.0, 1, 4), (1000.0, 6, 24), (5000.0, 6, 4), (0.0, 1, 2000)],
)
def test_repetitions_are_whole_rotations(floor_us: float, rotation: int, expected: int) -> None:
    assert timing.repetitions(floor_us, rotation) == expected


@pytest.mark.cpu
def test_timing_needs_a_gpu() -> None:
    with pytest.raises(timing.BenchmarkError, match="need a CUDA or ROCm GPU"):
        timing.measure([lambda: None], reps=1)


@pytest.mark.gpu
def test_measured_time_is_that_of_a_copy() -> None:
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)

    def least(reps: int) -> float:  # other processes may be using the GPU
        return min(timing.measure([lambda: target.copy_(source)], reps=reps) for _ in range(5))

    once = least(1)
    assert least(8) == pytest.approx(once, rel=0.3)
    assert 1e6 * 2**31 / once < 20e12  # bytes a second: no graph was empty


# Correctness checks


def test_gemm_errors_are_those_of_each_output() -> None:
    a, weight = torch.randn(3, 64), torch.randn(40, 64)
    right = a @ weight.t()
    outputs = {"right": right, "twice": 2 * right, "nothing": torch.full_like(right, torch.nan)}
    errors = gemm.errors(a, weight, outputs)
    assert errors["right"] < 1e-6
    assert errors["twice"] == pytest.approx(1)
    assert not errors["nothing"] <= 1


def test_gemm_errors_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    a, weight = torch.randn(3, 64), torch.randn(40, 64)
    outputs = {"half": (a @ weight.t()).bfloat16()}
    whole = gemm.errors(a, weight, outputs)["half"]
    monkeypatch.setattr(gemm, "CHUNK", 7)
    assert gemm.errors(a, weight, outputs)["half"] == pytest.approx(whole)


@pytest.mark.parametrize("kind", attention_cases.KINDS)
@pytest.mark.parametrize("kv_heads", [8, 32])
def test_attention_errors_agree_with_pytorch(kind: str, kv_heads: int) -> None:
    case = attention_cases.Case(kind, 1, 1 if kind == "decode" else 24, 24, kv_heads)
    operands = attention_cases.make_operands(case, torch.float32, torch.device("cpu"))[:1]
    call = attention.library_call(case, attention.BACKENDS["math"])
    output = call(operands[0])
    outputs = {"right": output, "shifted": output.roll(1, dims=1)}
    errors = attention_errors.reference_errors(case, operands[0], outputs)
    assert errors["right"] < 1e-6
    assert errors["shifted"] > 0.1


def test_relative_error() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert timing.relative_error(torch.tensor([3.0, 5.0]), reference) == pytest.approx(0.2)


# Plans and summaries


def test_gemm_shapes_are_measured_once() -> None:
    layers = [p for p in gemm.Plan("all", "bf16", (1,)).products() if p.op == "mm"]
    assert len({(p.N, p.K) for p in layers}) == len(layers) == 15


def test_long_attention_cases_can_be_left_out() -> None:
    cases = list(attention_cases.Plan("all", "bf16", 8, 2048).cases())
    assert max(case.len_kv for case in cases) == 2048
    assert {case.kind for case in cases} == set(attention_cases.KINDS)


def test_gemm_summary() -> None:
    rows = [
        {"M": 1, "speedup": 2.0, "correct": True},
        {"M": 1, "speedup": 0.5, "correct": False},
        {"M": 8, "speedup": 4.0, "correct": True},
    ]
    found = gemm.summarise(rows)
    assert found["geomean speedup"] == pytest.approx(4 ** (1 / 3))
    assert found["least speedup"] == 0.5
    assert found["wrong rows"] == found["rows slower than cuBLAS"] == 1
    assert found["geomean speedup by M"] == pytest.approx({1: 1.0, 8: 4.0})


def test_batched_products_are_of_attention_and_experts() -> None:
    batched = gemm.Plan("batched", "bf16", (1,)).products()
    assert {p.op for p in batched} == {"bmm", "baddbmm"}
    assert all(p.M is not None and p.batch > 1 for p in batched)
    assert {p.name.split()[0] for p in batched} == {"attention", "8", "64"}


@pytest.mark.parametrize("op", ["mm", "bmm", "baddbmm"])
@pytest.mark.parametrize("k_contiguous", [True, False])
def test_bench_gemm_with_played_times(
    op: str, k_contiguous: bool, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command but for the clock: what is called, checked, written and drawn."""
    batch, M = (1, None) if op == "mm" else (3, 5)
    product = gemm.Product("small", 24, 40, op, batch, M)
    monkeypatch.setitem(gemm.SHAPES, "small", (product,))
    monkeypatch.setattr(gemm, "require_gpu", lambda: torch.device(device))
    monkeypatch.setattr(gemm, "ceilings", lambda dtype: timing.Ceilings(1e12, 1e12, "played"))
    monkeypatch.setattr(gemm, "copies_for", lambda size: 2)
    monkeypatch.setattr(gemm, "compile_ahead", lambda plan, device: None)  # a process a core
    times = {gemm.OURS: 2.0, gemm.CUBLAS: 3.0, gemm.INDUCTOR: 4.0}
    shapes = []

    def played(calls: Any, reps: int) -> dict[str, float]:
        shapes.extend(tuple(fns[1]().shape) for fns in calls.values())
        return times

    monkeypatch.setattr(gemm, "measure_in_turn", played)
    # Inductor has no Triton template for the CPU, and on a GPU they take long to compile.
    monkeypatch.setattr(gemm.torch, "compile", lambda function, **_: function)
    plan = gemm.Plan("small", "fp32", (4, 16), gemm.PROVIDERS, k_contiguous)
    path, plot = tmp_path / "gemm.json", tmp_path / "gemm.svg"
    text = io.StringIO()
    assert gemm.run(plan, Console(file=text, width=200), path, "bench", plot) == 0
    written = json.loads(path.read_text())
    rows = written["rows"]
    assert [row["M"] for row in rows] == ([4, 16] if op == "mm" else [5])
    assert all(row["speedup"] == 1.5 and row["speedup_over_inductor"] == 2 for row in rows)
    assert all(row["correct"] and 0 < row["error"] < 1e-5 for row in rows)
    assert set(shapes) == {(4, 24), (16, 24)} if op == "mm" else {(3, 5, 24)}
    assert written["summary"]["geomean speedup over Inductor"] == pytest.approx(2)
    assert "150%" not in text.getvalue() and "1.500" in text.getvalue()
    assert "24 × 40" in plot.read_text() or "<svg" in plot.read_text()


@pytest.mark.parametrize("k_contiguous", [True, False])
def test_what_is_compiled_ahead_is_what_runs(
    k_contiguous: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = (gemm.Product("layer", 24, 40), gemm.Product("batch", 24, 40, "bmm", 3, 5))
    monkeypatch.setitem(gemm.SHAPES, "small", shapes)
    plan = gemm.Plan("small", "fp32", (4, 16), k_contiguous=k_contiguous)
    here = hardware.of(torch.device(device))
    ahead = [(job.problem.bucketed(), job.config) for job in compile_ahead.jobs(plan, here)]
    ran = []
    for layer, M in ((shapes[0], 4), (shapes[0], 16), (shapes[1], 5)):
        a = torch.randn(3, M, 40, device=device)
        weights = torch.randn(3, 24, 40, device=device)
        b = weights.mT if k_contiguous else weights.mT.contiguous()
        with tuned.recording() as recorded:
            if layer.op == "mm":
                torch.ops.triton_only.mm(a[0], b[0])
            else:
                torch.ops.triton_only.bmm(a, b)
        ran += [(p.bucketed(), select_config(p, here)) for _, p in recorded]
    assert ahead == ran


def test_bench_gemm_notices_wrong_products(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    product = gemm.Product("small", 24, 40)
    a, weights = torch.randn(4, 40, device=device), [torch.randn(24, 40, device=device)]
    limits = timing.Ceilings(1e12, 1e12, "played")
    monkeypatch.setattr(gemm, "measure_in_turn", lambda calls, reps: dict.fromkeys(calls, 1.0))
    functions = gemm.calls("mm", (gemm.OURS, gemm.CUBLAS), weights_ready=True)
    assert gemm.measure_product(product, a, weights, limits, functions)["correct"]
    wrong = {**functions, gemm.OURS: lambda a, b, bias: 1.001 * (a @ b)}
    assert not gemm.measure_product(product, a, weights, limits, wrong)["correct"]


def test_no_garbage_is_collected_during_a_capture() -> None:
    """Of a graph that is garbage the end of a capture would be an error; what held before holds."""
    assert gc.isenabled()
    with timing._no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with timing._no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "length"), [(512, 256, 768), (8, 2, 16), (12, 2, 32)]
)
def test_cache_holds_all_steps(prompt: int, new_tokens: int, length: int) -> None:
    plan = dataclasses.replace(PLAN, prompt=prompt, new_tokens=new_tokens)
    assert plan.cache_length == length


def test_comparison_with_other_providers() -> None:
    rows = [
        {"provider": "eager", "prefill_ms": 30.0, "ms_per_token": 20.0, "logits_error": 0.02},
        {"provider": "triton_only", "prefill_ms": 20.0, "ms_per_token": 4.0, "logits_error": 0.01},
    ]
    assert comparison.compare(rows[:1]) == {}
    assert comparison.compare(rows) == {
        "prefill speedup over eager": 1.5,
        "decode speedup over eager": 5.0,
        "logits error over that of eager": 0.5,
    }


def test_providers_that_take_minutes_to_compile_are_left_to_be_asked_for() -> None:
    options = inspect.signature(cli_bench.bench_model).parameters["providers"]
    default = options.default.split(",")
    assert set(default) <= set(providers.PROVIDERS)
    left_out = {"triton-eager", "max-autotune", "inductor-triton"}
    left_out |= {"triton_only-shipped", "triton_only-heuristic"}
    assert set(providers.PROVIDERS) - set(default) == left_out
    assert all(re.search(rf"\b{name}\b", str(options.annotation)) for name in providers.PROVIDERS)


def test_how_near_a_provider_comes_to_the_floors() -> None:
    row = {"prefill_ms": 25.0, "ms_per_token": 5.0}
    limits = {"floor_ms_per_token": 4.0, "floor_prefill_ms": 20.0}
    assert comparison.shares(row, limits) == {"floor_share": 0.8, "prefill_floor_share": 0.8}
    assert comparison.shares(row, {}) == {}
    assert {"floor_share", "peak_memory_gib", "compile_seconds"} <= set(generation.COLUMNS)


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("triton_only", tuned.Sources(database="user.db")),
        ("triton_only-shipped", tuned.Sources()),
        ("triton_only-heuristic", tuned.Sources(measured=False)),
    ],
)
def test_where_a_provider_has_its_configurations_from(
    name: str, sources: tuned.Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda fn, **options: seen.update(options) or fn)
    monkeypatch.setenv("TRITON_ONLY_DATABASE", "user.db")
    providers.PROVIDERS[name].prepare(len, on_gpu=True)
    assert seen["backend"] is triton_only
    assert seen["options"]["triton.cudagraphs"]
    assert tuned.Sources.of(settings.parse(None, seen["options"])) == sources


def test_max_autotune_is_what_it_says() -> None:
    """Inductor's own mode: cuBLAS and Triton templates compete, and CUDA graphs are on."""
    from torch._inductor import config

    provider = providers.PROVIDERS["max-autotune"]
    assert provider.options is None and not provider.is_ours
    options = inductor.mode_options()[provider.mode]
    assert options["max_autotune"] and options["triton.cudagraphs"]
    backends = options.get("max_autotune_gemm_backends", config.max_autotune_gemm_backends)
    assert {"ATEN", "TRITON"} <= set(backends.split(","))


# Records


def test_record_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    found = record.Record({"gpu": "H200"}, "triton-only bench", [{"M": 1}])
    found.write(path)
    found.rows.append({"M": 2})
    found.write(path)
    assert json.loads(path.read_text()) == {
        "environment": {"gpu": "H200"},
        "command": "triton-only bench",
        "rows": [{"M": 1}, {"M": 2}],
        "summary": {},
    }
    assert list(path.parent.iterdir()) == [path]


def test_record_as_markdown() -> None:
    rows = [{"layer": "o", "us": 13.456, "error": None}, {"layer": "qkv", "us": 1234.5}]
    found = record.Record({"gpu": "H200", "torch": "2.11", "rocm": None}, "", rows)
    assert found.to_markdown(["layer", "us", "error"]).splitlines() == [
        "gpu H200, torch 2.11",
        "",
        "| layer | us | error |",
        "|---|---:|---:|",
        "| o | 13.5 | – |",
        "| qkv | 1,234 | – |",
    ]


def test_driver_version_is_read_from_the_driver(tmp_path: Path) -> None:
    nvidia, missing = tmp_path / "version", tmp_path / "missing"
    nvidia.write_text("NVRM version: NVIDIA UNIX Open Kernel Module  580.159.04  Release Build\n")
    assert environment.driver_version(nvidia, missing) == "580.159.04"
    assert environment.driver_version(missing, nvidia).startswith("NVRM")  # type: ignore[union-attr]
    assert environment.driver_version(missing, missing) is None


# Whole models


def test_each_provider_is_recorded_as_soon_as_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")

    def measure_provider(provider: Any, *_: Any) -> dict[str, Any]:
        if provider.name != "eager":
            raise TimeoutError
        figures = {"prefill_ms": 2.0, "ms_per_token": 1.0, "compile_seconds": None}
        return {"provider": provider.name, **figures}

    monkeypatch.setattr(generation, "measure_provider", measure_provider)
    path = tmp_path / "model.json"
    with pytest.raises(TimeoutError):
        generation.run(PLAN, Console(file=io.StringIO()), path, "")
    assert [row["provider"] for row in json.loads(path.read_text())["rows"]] == ["eager"]


def test_logits_in_fp32_are_those_of_the_model() -> None:
    pytest.importorskip("transformers")
    model = models.build(models.MODELS["llama-tiny"], torch.float32, torch.device("cpu"), 2, 16)
    plan = dataclasses.replace(PLAN, dtype="fp32")
    with torch.no_grad():
        trial = generation.Trial(model, generation.providers.PROVIDERS["eager"], plan)
        logits = generation.compared_logits(trial)
    reference = models.reference_logits(model, trial.tokens, generation.COMPARED_STEPS + 1)
    assert logits.shape == reference.shape == (2, 5, 256)
    assert timing.relative_error(logits, reference) < 1e-5


@pytest.mark.cpu
def test_bench_model_in_the_interpreter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "model.json"
    arguments = [
        *("bench", "model", "--model", "llama-tiny", "--batch", "2", "--prompt", "4"),
        *("--new-tokens", "2", "--providers", "eager,triton-eager,triton_only"),
        "--no-logits-error",
        *("--json", str(path)),
    ]
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert not stopped.value.code, capsys.readouterr().err
    assert "decode speedup over eager" in capsys.readouterr().out
    eager, uncompiled, ours = json.loads(path.read_text())["rows"]
    assert eager["triton_share_decode"] == 0
    assert 0 < uncompiled["triton_share_decode"] < 1
    assert eager["compile_seconds"] is uncompiled["compile_seconds"] is None
    assert ours["triton_share_decode"] == ours["triton_share_prefill"] == 1
    assert ours["graphs"] == 2
    assert ours["kernels_per_step"] > 0
    assert ours["ms_per_token"] > 0


def test_parts_of_a_step_add_up_to_its_time() -> None:
    ours, theirs = Provider.TRITON_OURS, Provider.TRITON_INDUCTOR
    events = (
        KernelEvent("linear_gemv_kernel", ours, 10.0, 5.0),
        KernelEvent("rope_cache_attention_kernel", ours, 8.0, 11.0),  # launched early: ends at 19
        KernelEvent("triton_poi_fused_0", theirs, 2.0, 20.0),
        KernelEvent("Memcpy DtoD", Provider.MEMCPY, 1.0, 22.0),
        KernelEvent("ampere_gemm", Provider.CUBLAS, 3.0, 25.0),
    )
    rows = tuple(KernelRow(e.name, e.provider, 1, e.time_us, 0.2) for e in events)
    found = breakdown.breakdown(KernelReport(rows, "gpu", events))
    assert found == {
        breakdown.PRODUCTS: 10.0,
        breakdown.ATTENTION: 4.0,
        breakdown.INDUCTOR: 2.0,
        breakdown.COPIES: 1.0,
        breakdown.LIBRARIES: 3.0,
        breakdown.GAPS: 3.0,
    }
    assert sum(found.values()) == 28.0 - 5.0
    assert set(breakdown.breakdown(KernelReport((), "gpu")).values()) == {0.0}


def test_passes_are_switched_on_one_after_another() -> None:
    sets = ablation.disabled_sets()
    assert set(ablation.PASSES) <= set(pipeline.NAMES)
    assert [len(disabled) for _, disabled in sets] == list(range(len(ablation.PASSES), -1, -1))


def test_charts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"provider": name, "ms_per_token": ms, "prefill_ms": 10 * ms}
        for name, ms in (("eager", 4.13), ("triton_only", 1.07))
    ]
    plan = {"model": "llama-tiny", "dtype": "bf16", "batch": 2, "prompt": 4}
    record, other = tmp_path / "record.json", tmp_path / "other.json"
    found = {"environment": {"gpu": "H200"}, "summary": {"plan": plan}, "rows": rows}
    record.write_text(json.dumps(found))
    other.write_text(json.dumps({**found, "rows": rows[1:]}))  # one of the providers only
    picture = tmp_path / "pictures" / "models.svg"

    def chart(*records: Path, out: Path = picture) -> str:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", "chart", *map(str, records), "--out", str(out)])
        assert stopped.value.code in (None, 0, 2)
        error = capsys.readouterr().err
        assert (stopped.value.code == 2) == bool(error), error
        return error

    assert chart(record, other) == ""
    drawn = re.findall("<!-- (.*?) -->", picture.read_text())  # texts are drawn as outlines
    assert "One token and one prefill, by provider, on H200" in drawn
    assert [text.split(":")[0] for text in drawn if ":" in text] == ["eager", "triton_only"]
    assert all(drawn.count(name) == 2 for name in ("record", "other"))  # told apart, twice
    assert [drawn.count(height) for height in ("4.13", "1.07", "41.3", "10.7")] == [1, 2, 1, 2]
    assert chart(record) == ""
    assert "record" not in re.findall("<!-- (.*?) -->", picture.read_text())

    assert "suffix is none of" in chart(record, out=tmp_path / "models.xyz")
    record.write_text(json.dumps({**found, "rows": []}))
    assert "record.json holds no measurement" in chart(record)
    record.write_text(json.dumps({**found, "rows": [{"passes": "all", "ms_per_token": 1.0}]}))
    assert "record.json is no record of bench model (KeyError('provider'))" in chart(record)
    record.write_text("[]")
    assert "record.json is no record of bench model" in chart(record)

    parts = dict.fromkeys(breakdown.PARTS, 2.0)
    steps = [{"passes": "all", "ms_per_token": 0.0125, "breakdown_decode": parts}]
    plots.plot_steps(steps, tmp_path / "steps.svg", "a step")
    drawn = (tmp_path / "steps.svg").read_text()
    assert "between kernels" in drawn
    assert re.search(r"<!--\s+12\s+-->", drawn), "not the measured step's microseconds"


def test_the_plain_model_is_a_llama() -> None:
    """Its cache and rotation give what the whole sequence at once gives."""
    torch.manual_seed(0)
    shape = models.MODELS["plain-tiny"]
    model = models.build(shape, torch.float32, torch.device("cpu"), 2, 16)
    tokens = torch.randint(shape.vocabulary, (2, 9))
    with torch.no_grad():
        whole = model(tokens, torch.arange(9))
        model.reset()
        model.logits(tokens[:, :6], torch.arange(6))
        for i in range(6, 9):
            step = model.logits(tokens[:, i : i + 1], torch.tensor([i]))
            torch.testing.assert_close(step, whole[:, i], rtol=1e-4, atol=1e-5)


def test_fewer_layers():
    """The plan's shape says so, and the model is built by it."""
    pytest.importorskip("transformers")
    plan = dataclasses.replace(PLAN, layers=1, providers=("eager",))
    whole = models.MODELS[plan.model]
    assert plan.shape == dataclasses.replace(whole, layers=1)
    assert PLAN.shape == whole
    model = models.build(plan.shape, torch.bfloat16, torch.device("cpu"), 2, 16)
    assert sum(name.endswith("q_proj.weight") for name, _ in model.named_parameters()) == 1
