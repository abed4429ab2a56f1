"""The command line: exit statuses, messages, and the files that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_only_backend import cli
from triton_only_backend.audit import AuditReport

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = """
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Doubling(torch.nn.Module):
    example_inputs = {"x": torch.ones(2, 16, device=DEVICE)}

    def forward(self, x):
        return x * 2


def frozen(model):
    return model.to(DEVICE).requires_grad_(False)


def linear():
    return frozen(torch.nn.Linear(16, 32)), (torch.ones(4, 16, device=DEVICE),)


def convolution():
    return frozen(torch.nn.Conv2d(3, 4, 3)), torch.ones(1, 3, 8, 8, device=DEVICE)


def double():
    return frozen(torch.nn.Linear(16, 32).double()), (torch.ones(4, 16, device=DEVICE).double(),)


def keywords():
    return (lambda x, *, scale: x * scale), [torch.ones(4, device=DEVICE)], {"scale": 2.0}


def no_model():
    return 3


def too_many():
    return 1, 2, 3, 4


def bad_args():
    return (lambda x: x), 3


instance = Doubling()
number = 3
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models_to_audit.py"
    path.write_text(MODELS)
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return int(stopped.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a wrong command line; returns its one line of explanation."""
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("triton-only: ")
    return lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("audit", "--colour", "m:f"),
        ("audit",),
        ("paint",),
        ("bench", "gemm", "--m"),
        ("demo", "--max-new-tokens", "0"),
        ("bench", "model", "--batch", "two"),
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("audit", "{}:linear", "--mode", "reduce_overhead"), "reduce-overhead"),
        (("profile", "{}:linear", "--mode", "fast"), "unknown mode 'fast'"),
        (("demo", "--mode", "fast"), "unknown mode 'fast'"),
        (("audit", "models_to_audit"), "module:factory"),
        (("audit", "nowhere.py"), "there is no file nowhere.py"),
        (("audit", "{}", "--no-grad"), "a script says so itself"),
        (("audit", "{}:linear", "--", "--epochs", "3"), "only a script takes arguments"),
        (("audit", "{}:linear", "--baseline", "nowhere.json"), "cannot read a report"),
        (("audit", "{}:linear", "--baseline", "{}"), "not JSON"),
        (("audit", "{}:liner"), 'did you mean "linear"?'),
        (("audit", "nowhere/m.py:f"), "there is no file nowhere/m.py"),
        (("audit", "no_such_module:f"), "cannot import no_such_module"),
        (("audit", "{}:number"), "is a int, not a factory or a model"),
        (("audit", "{}:no_model"), "gave a int"),
        (("audit", "{}:too_many"), "gave 4 values"),
        (("audit", "{}:bad_args"), "args must be a tuple"),
        (("bench", "gemm", "--shapes", "llama"), "--shapes 'llama' is not known"),
        (("bench", "gemm", "--m", "1,x"), "positive integers"),
        (("bench", "attention", "--kv-heads", "5"), "does not divide"),
        (("bench", "attention", "--providers", "ours,flex"), "does not compare ours"),
        (("bench", "attention", "--providers", "ours,fa3"), "'fa3' is not known"),
        (("bench", "model", "--model", "llama3"), 'did you mean "llama3-8b"?'),
        (("bench", "model", "--providers", "eager,tritononly"), "triton_only"),
        (("bench", "model", "--model", "llama-tiny", "--prompt", "600"), "shorter --prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_requests_exit_with_2_and_one_line(
    arguments: tuple[str, ...], message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *(argument.format(models) for argument in arguments))
    assert message in line


@pytest.mark.cpu
@pytest.mark.parametrize("what", ["gemm", "attention", "model"])
def test_benchmarks_without_a_gpu_exit_with_2(
    what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "GPU" in refused(capsys, "bench", what)


def test_a_file_with_a_syntax_error_is_a_wrong_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken_model.py"
    path.write_text("def model(:\n")
    assert "broken_model.py" in refused(capsys, "audit", f"{path}:model")


def test_a_directory_cannot_be_written(models: Path) -> None:
    assert run("audit", f"{models}:linear", "--json", str(models.parent)) == 2


def test_audit_of_a_clean_model(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, markdown = tmp_path / "new" / "audit.json", tmp_path / "audit.md"
    arguments = ["audit", f"{models}:linear", "--json", str(result), "--markdown", str(markdown)]
    assert run(*arguments) == 0
    assert "Triton only" in capsys.readouterr().out
    report = json.loads(result.read_text())
    assert report["is_triton_only"]
    assert report["environment"]["torch"] == torch.__version__
    assert markdown.read_text().startswith("**Triton only")
    assert [file.name for file in result.parent.iterdir()] == ["audit.json"]


@pytest.mark.parametrize("factory", ["convolution", "double"])
def test_audit_of_a_model_with_violations(
    factory: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "audit.json"
    assert run("audit", f"{models}:{factory}", "--json", str(result)) == 1
    assert "would run outside Triton" in capsys.readouterr().out
    assert json.loads(result.read_text())["findings"]


def test_audit_allows_what_it_is_told_to(models: Path) -> None:
    assert run("audit", f"{models}:convolution", "--allow", "aten.conv*", "--no-grad") == 0


def test_audit_in_every_form_with_a_run(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = {name: tmp_path / f"audit.{name}" for name in ("json", "markdown", "html", "sarif")}
    options = [text for name, path in forms.items() for text in (f"--{name}", str(path))]
    assert run("audit", f"{models}:linear", "--no-grad", "--run", *options) == 0
    assert "no kernel outside Triton" in capsys.readouterr().out
    report = AuditReport.from_json(forms["json"].read_text())
    assert report.is_triton_only
    assert report.run is not None
    assert report.run.events
    assert report.coverage.time == 1
    assert "Triton only: no library call in 1 graph" in forms["html"].read_text()
    assert "The run, kernel by kernel" in forms["markdown"].read_text()
    assert json.loads(forms["sarif"].read_text())["runs"][0]["results"] == []


def test_a_baseline_fails_on_new_violations_only(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    assert run("audit", f"{models}:convolution", "--no-grad", "--json", old) == 1
    again = ("audit", f"{models}:convolution", "--no-grad", "--baseline", old)
    assert run(*again, "--json", new) == 0
    assert "Against the baseline: 0 new, 0 fixed, 1 unchanged" in capsys.readouterr().out
    assert json.loads(Path(new).read_text())["findings"]  # nothing is hidden
    assert run("audit", f"{models}:double", "--no-grad", "--baseline", old) == 1
    shown = capsys.readouterr().out
    assert "Against the baseline: 1 new, 1 fixed, 0 unchanged" in shown
    assert "+ aten.addmm.default" in shown
    assert "- aten.convolution.default" in shown


SCRIPT = """
import sys
import torch
from models_to_audit import DEVICE, convolution, frozen, linear

print("arguments", sys.argv[1:], "of", __name__)
compiled = torch.compile(linear()[0], mode="reduce-overhead" if DEVICE == "cuda" else None)
compiled(*linear()[1])


@torch.compile(options={"allow": ["aten.sort*"]}, fullgraph=True)
def ordered(x):
    return torch.linalg.qr(x)[1] * 2


ordered(torch.eye(5, device=DEVICE))


@torch.compile(backend="eager")
def elsewhere(x):
    return x + 1


elsewhere(torch.ones(3, device=DEVICE))
if "fail" in sys.argv:
    raise ValueError("on purpose")
if "exit" in sys.argv:
    sys.exit(3)
if "leave" in sys.argv:
    sys.exit()
"""


@pytest.fixture
def script(models: Path) -> Path:
    path = models.with_name("script_to_audit.py")
    path.write_text(SCRIPT)
    return path


def test_audit_of_a_script(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.delitem(sys.modules, "models_to_audit", raising=False)
    before, argv = torch.compile, list(sys.argv)
    result = tmp_path / "script.json"
    assert run("audit", str(script), "--json", str(result), "--", "--epochs", "3", "leave") == 1
    assert (torch.compile, sys.argv) == (before, argv)
    shown = capsys.readouterr().out
    assert "arguments ['--epochs', '3', 'leave'] of __main__" in shown
    report = AuditReport.from_json(result.read_text())
    assert [finding.op for finding in report.findings] == ["aten.linalg_qr.default"]
    assert report.findings[0].source_line.startswith("script_to_audit.py:")
    assert len(report.graphs) == 2  # the one for the backend "eager" is not ours
    assert report.allow == ["aten.sort*"]
    torch._dynamo.reset()
    monkeypatch.delitem(sys.modules, "models_to_audit", raising=False)
    assert run("audit", str(script), "--allow", "cusolver") == 0


@pytest.mark.parametrize(
    ("argument", "message"), [("fail", "raised ValueError"), ("exit", "ended with status 3")]
)
def test_a_script_that_fails_is_not_audited_in_full(
    argument: str, message: str, script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.delitem(sys.modules, "models_to_audit", raising=False)
    assert run("audit", str(script), "--", argument) == 2
    shown = capsys.readouterr()
    assert f"the audit is not complete: {script} {message}" in shown.err
    assert ("on purpose" in shown.err) == (argument == "fail")
    assert "aten.linalg_qr.default" in shown.out  # what was compiled is reported


def test_a_script_that_compiles_nothing_proves_nothing(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("audit", str(models)) == 1
    assert "Nothing was compiled" in capsys.readouterr().out


def test_profile_exits_by_what_ran(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, html = tmp_path / "kernels.json", tmp_path / "kernels.html"
    arguments = ["profile", f"{models}:linear", "--no-grad"]
    assert run(*arguments, "--json", str(result), "--html", str(html)) == 0
    assert "no kernel outside Triton" in capsys.readouterr().out
    data = json.loads(result.read_text())
    assert data["triton_time_share"] == 1
    assert data["environment"]["torch"] == torch.__version__
    assert "100.0% of compute time in Triton" in html.read_text()
    assert run(*arguments, "--eager") == 1
    provider = "cpu" if DEVICE == "cpu" else "cublas"
    run(*arguments, "--eager", "--allow", provider, "--json", str(result))
    assert json.loads(result.read_text())["allow"] == [provider]


def test_env_prints_and_writes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "env.json"
    assert run("env", "--json", str(path)) == 0
    shown = capsys.readouterr().out
    found = json.loads(path.read_text())
    keys = {"torch", "triton", "gpu", "arch", "multiprocessors", "python", "platform", "date"}
    assert keys <= found.keys()
    assert torch.__version__ in shown
    assert all(key in shown for key in found)


@pytest.mark.parametrize("status", [0, 1, 2])
def test_demo_hands_on_what_it_is_given(
    status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    show = pytest.importorskip("triton_only_backend.demo.show")
    received: list[Any] = []

    def run_demo(*arguments: Any) -> int:
        received.extend(arguments)
        return status

    monkeypatch.setattr(show, "run_demo", run_demo)
    path = tmp_path / "demo.json"
    arguments = ["--prompt", "Let there be", "--max-new-tokens", "7", "--mode", "default"]
    assert run("demo", *arguments, "--json", str(path)) == status
    assert received[:3] == ["Let there be", 7, "default"]
    assert received[4] == path


@pytest.mark.parametrize(
    ("attribute", "args", "kwargs"),
    [
        ("linear", 1, set()),
        ("convolution", 1, set()),
        ("keywords", 1, {"scale"}),
        ("Doubling", 0, {"x"}),
        ("instance", 0, {"x"}),
    ],
)
def test_a_target_can_be_given_in_each_way(
    attribute: str, args: int, kwargs: set[str], models: Path
) -> None:
    model, found_args, found_kwargs = cli.load_target(f"{models}:{attribute}")
    assert len(found_args) == args
    assert found_kwargs.keys() == kwargs
    assert isinstance(model(*found_args, **found_kwargs), torch.Tensor)


def test_a_target_in_a_module_of_the_current_directory(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "models_to_audit", raising=False)
    model, _, _ = cli.load_target("models_to_audit:linear")
    assert isinstance(model, torch.nn.Linear)


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys\n"
        "from triton_only_backend import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "heavy = {'triton', 'transformers', 'torch._inductor.config'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
