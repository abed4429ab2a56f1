"""The options `tuning` and `database` of a compiled model, down to the choice of a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from triton_only_backend import backend, settings
from triton_only_backend import database as databases
from triton_only_backend.kernels import gemm_choice, gemm_configs, hardware, tuned
from triton_only_backend.kernels.hardware import Hardware
from triton_only_backend.tuning import at_compile

if TYPE_CHECKING:
    from pathlib import Path

H200 = Hardware("NVIDIA H200", "cuda", "sm90", 132, 232448)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuned.Sources]]:
    """Each problem that a kernel is chosen for, with the sources in force."""
    found: list[tuple[Any, tuned.Sources]] = []
    select = tuned.select

    def spy(kind: str, problem: Any, *rest: Any) -> Any:
        found.append((problem, tuned.sources()))
        return select(kind, problem, *rest)

    monkeypatch.setattr(tuned, "select", spy)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"tuning": "heuristic"}, {"database": "elsewhere.db"}, {"database": "none"}],
    ids=str,
)
def test_a_models_options_hold_in_its_forward_and_backward(
    options: dict[str, Any], seen: Any, device: str
) -> None:
    layer = torch.nn.Linear(32, 48, device=device)
    compiled = torch.compile(layer, backend="triton_only", options=options)
    compiled(torch.randn(5, 32, device=device, requires_grad=True)).sum().backward()
    expected = tuned.Sources.of(settings.parse(options=options))
    assert len(seen) >= 3
    assert {sources for _, sources in seen} == {expected}
    assert tuned.sources() == tuned.default_sources()


def uuids(**options: Any) -> set[str]:
    parsed = settings.parse(options=options)
    config = backend.Compilation(parsed)._config(interpreted=True)
    return {
        config[hook].uuid() for hook in ("joint_custom_post_pass", "post_grad_custom_post_pass")
    }


def test_inductors_cache_key_follows_database_and_options(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    without = uuids(database=str(path))
    with databases.writing(path) as database:
        place = tuned.place("gemm", H200)
        database.add(place, databases.Trial("gemm", "{}", "{}", databases.MEASURED, 1.0))
    assert uuids(database=str(path)) == without  # read once a process
    tuned.forget()
    assert not uuids(database=str(path)) & without
    assert not uuids(tuning="heuristic") & uuids()


@pytest.fixture
def graph(device: str) -> torch.fx.Graph:
    """The aten graph of two layers after the passes."""
    kept: list[torch.fx.GraphModule] = []
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 40))

    class Keeping(backend.Compilation):
        def _inner_compile(self, inner: Any, gm: Any, inputs: Any, **kwargs: Any) -> Any:
            def keep(gm: Any, inputs: Any, **kwargs: Any) -> Any:
                kept.append(gm.__copy__())
                return inner(gm, inputs, **kwargs)

            return super()._inner_compile(keep, gm, inputs, **kwargs)

    def compile_with(gm: Any, inputs: Any) -> Any:
        return Keeping(settings.parse()).compile(gm, inputs)

    with torch.no_grad():
        torch.compile(model.to(device), backend=compile_with)(torch.randn(5, 64, device=device))
    return kept[0].graph


def test_the_problems_of_a_graph_are_those_it_runs(graph: Any, seen: Any) -> None:
    found = at_compile.problems_of(graph)
    assert {(p.M, p.N, p.K) for _, p in found} == {(8, 128, 64), (8, 64, 96)}
    assert {p for _, p in found} == {p.bucketed() for p, _ in seen}


@pytest.mark.cpu
def test_search_has_nothing_to_do_in_the_interpreter(graph: Any, tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    assert at_compile.search_graph(graph, tuned.Sources(database=str(path))) == []
    assert not path.exists()


@pytest.mark.cpu
@pytest.mark.parametrize("broken", [False, True], ids=["", "broken database"])
def test_what_no_table_knows_is_searched_once(
    broken: bool, graph: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """With all that needs the GPU played; the problems are those of the graph."""
    path = tmp_path / "tuning.db"
    chosen = tuned.Sources(database=str(path))
    if broken:
        path.write_bytes(b"precious" * 500)
    monkeypatch.setattr(at_compile.hardware, "of", lambda device: H200)
    problems = [
        ("gemm", gemm_configs.GemmProblem(1, 8, N, K, 2, False, True, True))
        for N, K in ((128, 64), (64, 96))
    ]
    monkeypatch.setattr(at_compile, "problems_of", lambda graph: problems)
    monkeypatch.setattr(at_compile, "_calls", lambda graph: [(None, torch.device("cuda", 0))])
    monkeypatch.setattr(at_compile, "current_target", lambda: None)
    made: list[Any] = []

    class Pool:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, job: Any) -> None: ...
        def result(self, job: Any) -> None: ...

    class Trial:
        def check(self, config: Any) -> None: ...
        def compare_us(self, configs: Any, work_us: float) -> list[float]:
            return [50.0 + config.num_stages for config in configs]

    def make_trial(kind: str, problem: Any, device: Any) -> Trial:
        made.append(problem)
        return Trial()

    monkeypatch.setattr(at_compile, "Pool", Pool)
    monkeypatch.setattr(at_compile, "make_trial", make_trial)
    outcomes = at_compile.search_graph(graph, chosen)
    if broken:
        assert outcomes == [] and made == []
        assert "left as it is" in caplog.text
        return
    assert [o.problem for o in outcomes] == made == [p for _, p in problems]
    with tuned.using(chosen):
        for outcome in outcomes:
            assert gemm_choice.select_config(outcome.problem, H200) == outcome.config
    assert at_compile.search_graph(graph, chosen) == []
    assert len(made) == 2


@pytest.mark.gpu
def test_search_on_the_gpu(tmp_path: Path, device: str) -> None:
    path = tmp_path / "tuning.db"
    model = torch.nn.Linear(256, 512, dtype=torch.bfloat16, device=device)
    options = {"tuning": "search", "database": str(path)}
    compiled = torch.compile(model, backend="triton_only", options=options)
    x = torch.randn(64, 256, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    here = hardware.of(torch.device(device, 0))
    assert len(tuned.measured("gemm", here, str(path))) == 1


@pytest.fixture(autouse=True)
def fresh_lookups() -> Any:
    tuned.forget()
    yield
    tuned.forget()
