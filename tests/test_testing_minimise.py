"""A failing graph is cut down to a script that shows the failure by itself; and the example."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triton_only_backend import cli, testing
from triton_only_backend.testing.minimising import NothingFailsError

aten = torch.ops.aten
ROOT = Path(__file__).parent.parent

PASS = """
import torch

aten = torch.ops.aten


def tanh_is_linear(graph: torch.fx.Graph) -> int:
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.tanh.default):
        if node.args[0].target is aten.mm.default:
            node.replace_all_uses_with(node.args[0])
            count += 1
    return count


def raises_on_tanh(graph: torch.fx.Graph) -> int:
    for node in graph.find_nodes(op="call_function", target=aten.tanh.default):
        raise KeyError(node.name)
    return 0


def sound(graph: torch.fx.Graph) -> int:
    return 0


def model():
    layers = [torch.nn.Linear(8, 8, bias=False), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8, bias=False)]
    return torch.nn.Sequential(*layers, torch.nn.Tanh(), torch.nn.Softmax(-1)), (torch.randn(4, 8),)
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A module of a user's, in the current directory."""
    (tmp_path / "user_passes.py").write_text(PASS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "user_passes", raising=False)
    import user_passes

    return user_passes


def run_script(path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path.parent}"}
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=environment, check=False
    )


def test_wrong_numbers_are_cut_down(user, tmp_path):
    model, args = user.model()
    gm = testing.capture(model, *args)
    reduced = testing.minimise(gm, user.tanh_is_linear)
    assert reduced.nodes == 2 < reduced.nodes_before
    assert testing.count_ops(reduced.gm) == {"aten.mm": 1, "aten.tanh": 1}
    assert reduced.failure.where == "numerics"
    script = tmp_path / "shows_it.py"
    statement = "from user_passes import tanh_is_linear as graph_pass"
    script.write_text(testing.reproducer(reduced, statement, graph_pass=user.tanh_is_linear))
    assert "testing.draw(" in script.read_text()
    run = run_script(script)
    assert run.returncode == 1
    assert "AssertionError: output 0" in run.stderr
    assert "not accurate" in run.stderr
    script.write_text(script.read_text().replace("tanh_is_linear as", "sound as"))
    assert run_script(script).returncode == 0


def test_inputs_that_matter_are_written_out(user, tmp_path):
    """Only a large value shows the failure: the script holds it."""

    def clamps(graph: torch.fx.Graph) -> int:
        nodes = graph.find_nodes(op="call_function", target=aten.sin.default)
        for node in nodes:
            with graph.inserting_before(node):
                clamped = graph.call_function(aten.clamp.default, (node.args[0], -50, 50))
            clamped.meta["val"] = node.meta["val"]
            node.args = (clamped,)
        return len(nodes)

    gm = testing.capture(lambda x: x.sin().exp() * 2, torch.zeros(3))
    inputs = [torch.tensor([1.0, 77.0, -2.0])]
    reduced = testing.minimise(gm, clamps, inputs)
    assert testing.count_ops(reduced.gm) == {"aten.sin": 1}
    text = testing.reproducer(reduced, "from m import clamps as graph_pass", graph_pass=clamps)
    assert "torch.tensor([1.0, 77.0, -2.0], dtype=torch.float32)" in text


def test_any_error_of_a_pass_is_cut_down(user):
    gm = testing.capture(lambda x: (x.sin() + x.tanh()).relu().sum(), torch.randn(5))
    reduced = testing.minimise(gm, user.raises_on_tanh)
    assert testing.count_ops(reduced.gm) == {"aten.tanh": 1}
    assert (reduced.failure.where, reduced.failure.error) == ("pass", "KeyError")


def test_a_question_of_ones_own(user):
    """Any backend can be asked: here one that fails on every product of more than four columns."""
    from triton_only_backend.testing.minimising import Failure

    def fails(gm, inputs):
        wide = [n for n in gm.graph.find_nodes(op="call_function", target=aten.mm.default)
                if n.meta["val"].shape[1] > 4]  # fmt: skip
        return Failure("backend", "RuntimeError", "wide") if wide else None

    gm = testing.capture(
        lambda a, b, c: (a @ b).relu() @ c, *(torch.randn(s) for s in ((2, 3), (3, 4), (4, 5)))
    )
    reduced = testing.minimise(gm, fails=fails)
    assert testing.count_ops(reduced.gm) == {"aten.mm": 1}


def test_nothing_to_reduce(user):
    with pytest.raises(NothingFailsError, match="nothing fails"):
        testing.minimise(testing.capture(torch.sin, torch.randn(3)), user.sound)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["minimise", *arguments])
    return exit_.value.code or 0


def test_command(user, tmp_path, capsys):
    target = str(tmp_path / "user_passes.py:model")
    record = tmp_path / "record.json"
    status = call(
        target, "--pass", "user_passes:tanh_is_linear", "--out", "small.py", "--json", str(record)
    )
    assert status == 1
    assert "reduced to 2; python small.py shows it" in capsys.readouterr().out
    data = json.loads(record.read_text())
    assert data["failure"]["where"] == "numerics"
    assert data["calls"]["after"] == 2
    run = run_script(tmp_path / "small.py")
    assert run.returncode == 1
    assert "not accurate" in run.stderr


def test_command_finds_nothing(user, tmp_path, capsys):
    assert call(str(tmp_path / "user_passes.py:model"), "--pass", "user_passes:sound") == 0
    assert "nothing fails" in capsys.readouterr().out
    assert not (tmp_path / "reproducer.py").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pass", "user_passes:sounds"], 'did you mean "sound"'),
        (["--pass", "user_passes"], "is not of the form"),
        (["--pass", "no_such_module:x"], "cannot import no_such_module"),
        (["--pass", "nowhere.py:x"], "there is no file"),
        (["--pass", "user_passes:sound", "--check", "numeric"], 'did you mean "numerics"'),
        (["--pass", "user_passes:sound", "--stage", "postgrad"], 'did you mean "post_grad"'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_names_what_is_wrong(user, tmp_path, capsys, arguments, message):
    assert call(str(tmp_path / "user_passes.py:model"), *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_example_passes_and_is_short():
    folder = ROOT / "examples" / "fuse_swiglu"
    lines = sum(len(path.read_text().splitlines()) for path in folder.glob("*.py"))
    assert lines < 60
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert "3 passed" in run.stdout


@pytest.mark.parametrize("package", ["expecttest", "hypothesis"])
def test_what_is_not_installed_is_named(package):
    name = {"expecttest": "PassTestCase", "hypothesis": "strategies"}[package]
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from triton_only_backend import testing\n"
        "testing.capture, testing.assert_accurate, testing.assert_pass\n"
        f"testing.{name}"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"needs {package}: pip install 'triton-only-backend[test]'" in run.stderr


def test_every_public_name_resolves():
    assert all(getattr(testing, name) is not None for name in testing.__all__)
    assert set(testing.__all__) <= set(dir(testing))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = testing.nothing
