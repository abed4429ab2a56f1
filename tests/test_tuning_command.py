"""The command triton-only tune, its clock and compiler played."""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from played_tuning import CANDIDATES, H200, PROBLEM, SLOW, FakeCompiler, FakeTrial, rows

from triton_only_backend import cli, cli_tune, tune_report
from triton_only_backend import database as databases
from triton_only_backend.database import MEASURED
from triton_only_backend.kernels import hardware, shipped_tables, tuned
from triton_only_backend.kernels.gemm_choice import select_config
from triton_only_backend.tuning import problems, trial
from triton_only_backend.tuning.search import Search

if TYPE_CHECKING:
    from pathlib import Path

    from triton_only_backend.kernels.gemm_configs import GemmConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tuning.db"


@pytest.fixture(autouse=True)
def fresh_lookups():
    tuned.forget()
    yield
    tuned.forget()


def cli_main(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert not stopped.value.code, stopped.value.code


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    cli_main(["tune", "--dry-run", "--shape", "16x512x1024", "--candidates", "5"])
    assert "16x512x1024 16-bit: 5 candidates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to tune"),
        (["--preset", "nothing"], "--preset 'nothing' is none of llama, all, attention, random"),
        (["--shape", "3"], "'3' is no shape"),
        (["--shape", "1x2x3", "--dtype", "int8"], "--dtype 'int8' is none of"),
        (["--shape", "1x2x3", "--layout", "m"], "--layout 'm' is neither k nor n"),
        (["no_such_module:f", "--dry-run"], "cannot import no_such_module"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", *arguments, "--database", str(path)])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not path.exists()


@pytest.mark.cpu
def test_tuning_needs_a_gpu(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", "--shape", "1x2x3", "--database", str(path)])
    assert stopped.value.code == 2
    assert "need a CUDA or ROCm GPU" in capsys.readouterr().err


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An H200 whose clock and compiler are played; sets what candidates do."""
    from triton_only_backend import timing
    from triton_only_backend.tuning import compilation

    class Pool(FakeCompiler):
        def __init__(self, *_: Any) -> None:
            super().__init__()

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(timing, "require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(cli_tune, "of_current", lambda: torch.device("cpu"))
    monkeypatch.setattr(hardware, "of", lambda device: H200)
    monkeypatch.setattr(compilation, "Pool", Pool)
    monkeypatch.setattr(compilation, "current_target", lambda: None)

    def play(times: Any) -> FakeTrial:
        a_trial = FakeTrial(times)
        monkeypatch.setattr(trial, "make_trial", lambda *_: a_trial)
        return a_trial

    return play


def test_the_command_tunes_exports_and_goes_on(
    played: Any, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, found = tmp_path / "table.json", tmp_path / "found.json"
    arguments = ["tune", "--shape", "32,64x4096x4096", "--candidates", "5", "--database", str(path)]
    a_trial = played(lambda c: 40.0 + c.num_stages)
    cli_main([*arguments, "--export", str(table), "--json", str(found)])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"2 problems tuned, in {path}" in printed
    for choice in ("the heuristic", "what is shipped"):
        assert re.search(rf"{choice} takes [\d.]+ × the best in geometric mean of 2, ", printed)
    outcomes = json.loads(found.read_text())
    assert [outcome["measured"] for outcome in outcomes] == [5, 5]
    assert all(o["speedup over the heuristic"] >= 1 for o in outcomes)
    assert all(o["speedup over what is shipped"] >= 1 for o in outcomes)
    assert len(shipped_tables.read_table(table)["entries"]["gemm"]) == 2
    ran = len(a_trial.ran)
    cli_main(arguments)
    assert len(a_trial.ran) == ran
    only = tmp_path / "only.json"
    cli_main(["tune", "--database", str(path), "--export", str(only)])
    assert only.read_text() == table.read_text()


def test_the_command_stopped_by_hand(
    played: Any, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(config: GemmConfig) -> float:
        if len(a_trial.ran) > 9:  # five, three of them again, and of the next problem two
            raise KeyboardInterrupt
        return 50.0

    a_trial = played(stop)
    with pytest.raises(SystemExit) as stopped:
        cli.main(
            ["tune", "--shape", "32,64x4096x4096", "--candidates", "5", "--database", str(path)]
        )
    assert stopped.value.code == 130
    assert "1 are left: the same command goes on" in " ".join(capsys.readouterr().out.split())
    assert {row.outcome for row in rows(path)} == {MEASURED}


def test_a_foreign_database_ends_the_command(
    played: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "precious.db"
    path.write_bytes(b"precious" * 100)
    played(lambda c: 1.0)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", "--shape", "1x2x3", "--database", str(path)])
    assert stopped.value.code == 2
    assert "it is left as it is" in " ".join(capsys.readouterr().err.split())
    assert path.read_bytes() == b"precious" * 100


def test_the_bar_prints_a_line_a_problem(path: Path) -> None:
    from rich.console import Console

    text = io.StringIO()
    with tune_report.Bar(Console(file=text, width=300)) as bar, databases.writing(path) as database:
        times = {CANDIDATES[3]: 50.0}
        Search(
            H200, database, FakeCompiler(), lambda *_: FakeTrial(lambda c: times.get(c, SLOW)), bar,
            limit=6,
        ).run([("gemm", PROBLEM)])  # fmt: skip
    assert "64x4096x4096 16-bit: 50.0 µs, 2.00 × the heuristic (100.0), of 6: " in text.getvalue()
    assert "6/6" in text.getvalue()


@pytest.mark.gpu
def test_tune_on_the_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, table = tmp_path / "tuning.db", tmp_path / "table.json"
    arguments = ["tune", "--shape", "16,64x512x1024", "--candidates", "4", "--database", str(path)]
    for _ in range(2):
        cli_main([*arguments, "--export", str(table), "--json", str(tmp_path / "found.json")])
        found = json.loads((tmp_path / "found.json").read_text())
        assert [outcome["problem"]["M"] for outcome in found] == [16, 64]
        assert all(outcome["us"] <= outcome["heuristic_us"] * 1.05 for outcome in found)
    chosen = tuned.Sources(database=str(path))
    device = hardware.of(torch.device("cuda"))
    assert len(tuned.measured("gemm", device, str(path))) == 2
    with tuned.using(chosen):
        _, problem = problems.product(1, 16, 512, 1024)
        assert tuned.encode(select_config(problem, device)) in table.read_text()
