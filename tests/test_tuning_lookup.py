"""Where configurations come from: database, tables, heuristic; and a database that is none."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import multiprocessing
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from on_hopper import unknown_gluon
from sharing import write_rows

from triton_only_backend import database as databases
from triton_only_backend import settings
from triton_only_backend.database import MEASURED, DatabaseError, Place, Trial
from triton_only_backend.kernels import shipped_tables, tuned
from triton_only_backend.kernels.epilogue_traits import EpilogueTraits, with_staging
from triton_only_backend.kernels.gemm_choice import heuristic_config, select_config
from triton_only_backend.kernels.gemm_configs import GemmConfig, GemmProblem
from triton_only_backend.kernels.hardware import INTERPRETER, Hardware
from triton_only_backend.kernels.linear_configs import PairConfig, select_pair

if TYPE_CHECKING:
    from pathlib import Path

H200 = Hardware("NVIDIA H200", "cuda", "sm90", 132, 232448)
H100 = Hardware("NVIDIA H100", "cuda", "sm90", 132, 232448)
A100 = Hardware("A100", "cuda", "sm80", 108, 166912)
PROBLEM = GemmProblem(1, 64, 4096, 4096, 2, False, True, True)
CONFIG = GemmConfig("gemm", 64, 64, 64, 2, 8, 4, 3)
OTHER = GemmConfig("gemm", 128, 64, 64, 1, 8, 4, 3)


@pytest.fixture(autouse=True)
def fresh_lookups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """No table and no database but those that a test makes."""
    monkeypatch.setattr(shipped_tables, "TABLES", tmp_path / "tables")
    (tmp_path / "tables").mkdir()
    clear()
    yield
    clear()


def clear() -> None:
    tuned.forget()
    shipped_tables.shipped_tables.cache_clear()


def row(config: Any = CONFIG, us: float | None = 9.0, outcome: str = MEASURED) -> Trial:
    return Trial("gemm", tuned.encode(PROBLEM), tuned.encode(config), outcome, us)


@pytest.fixture
def place() -> Place:
    return tuned.place("gemm", H200)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tuning.db"


def fill(path: Path, *rows: tuple[Place, Trial]) -> None:
    with databases.writing(path) as database:
        for where, trial in rows:
            database.add(where, trial)
    tuned.forget()


def ship(name: str, hardware: Hardware, config: Any, problem: Any = PROBLEM) -> None:
    entry = {"problem": json.loads(tuned.encode(problem)),
             "config": json.loads(tuned.encode(config)), "us": 1.0}  # fmt: skip
    table = {"format": 1, "gpu": hardware.name, "arch": hardware.arch, "triton": "3.6.0",
             "entries": {"gemm": [entry]}}  # fmt: skip
    (shipped_tables.TABLES / name).write_text(json.dumps(table))
    clear()


def choose(path: Path | None = None, hardware: Hardware = H200, **fields: Any) -> GemmConfig:
    chosen = tuned.Sources(database=None if path is None else str(path), **fields)
    with tuned.using(chosen):
        return select_config(PROBLEM, hardware)


# The order


def test_database_then_name_then_architecture_then_heuristic(path: Path, place: Place) -> None:
    heuristic = heuristic_config(PROBLEM, H200)
    assert choose(path) == heuristic
    by_arch = dataclasses.replace(CONFIG, group_m=1)
    ship("a.json", H100, by_arch)
    assert choose(path) == by_arch
    by_name = dataclasses.replace(CONFIG, group_m=2)
    ship("b.json", H200, by_name)
    assert choose(path) == by_name
    assert choose(path, H100) == by_arch
    fill(path, (place, row(OTHER)))
    assert choose(path) == OTHER
    assert choose(None) == by_name
    assert choose(path, measured=False) == heuristic
    assert choose(path, A100) == heuristic_config(PROBLEM, A100)
    assert choose(path, INTERPRETER) == heuristic_config(PROBLEM, INTERPRETER)


def test_the_least_time_counts(path: Path, place: Place) -> None:
    fill(
        path,
        (place, row(CONFIG, 9.0)),
        (place, row(OTHER, 8.0)),
        (place, row(dataclasses.replace(OTHER, group_m=4), None, "error 1.0")),
    )
    assert choose(path) == OTHER


@pytest.mark.parametrize("field", ["gpu", "arch", "triton", "source"])
def test_a_measurement_elsewhere_says_nothing_here(path: Path, place: Place, field: str) -> None:
    fill(path, (dataclasses.replace(place, **{field: "another"}), row()))
    assert choose(path) == heuristic_config(PROBLEM, H200)


@pytest.mark.parametrize(
    "config",
    [
        GemmConfig("gemv", 1, 16, 256, 1, 1, 4, 4),  # 64 rows are too many
        GemmConfig("gemm", 256, 256, 128, 1, 8, 8, 4),  # does not fit the memory
        {"kernel": "gemm", "block_m": 64},
        {"kernel": "gemm", "unknown": 3},
    ],
    ids=str,
)
def test_what_does_not_compute_the_problem_is_ignored(
    config: Any, path: Path, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    text = json.dumps(config) if isinstance(config, dict) else tuned.encode(config)
    fill(path, (place, dataclasses.replace(row(), config=text)))
    with caplog.at_level(logging.WARNING, "triton_only"):
        assert choose(path) == heuristic_config(PROBLEM, H200)
        choose(path)
    assert caplog.text.count("what was measured for GemmProblem") == 1


def test_a_descriptor_kernel_only_where_there_are_descriptors(path: Path) -> None:
    ship("a.json", A100, GemmConfig("gemm_tma", 64, 64, 64, 1, 8, 4, 2))
    assert choose(None, A100) == heuristic_config(PROBLEM, A100)


def test_defaults_may_be_added_to_problems_and_configurations() -> None:
    """What was measured before a field was there still holds for the field's default."""
    fields = json.loads(tuned.encode(PROBLEM))
    assert "aligned" not in fields
    assert "aligned" in json.loads(tuned.encode(dataclasses.replace(PROBLEM, aligned=False)))
    assert GemmConfig(**json.loads(tuned.encode(CONFIG))) == CONFIG


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2}', '{"format": 1, "entries": []}', "[]"])
def test_a_table_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(shipped_tables.TableError, match="is no table of configurations"):
        shipped_tables.read_table(path)


def test_the_epilogue_has_shared_memory_left() -> None:
    """128 × 256 × 64 in bf16: a stage is 48 KiB, the output's tile 64, halved 32."""
    wide = GemmConfig("gemm_tma", 128, 256, 64, 1, 8, 8, 4, store_halves=True)
    few = GemmProblem(1, 1024, 4096, 4096, 2, False, True, True)  # 128 tiles
    many = dataclasses.replace(few, M=8192)
    assert with_staging(wide, many, EpilogueTraits(2), H200) == wide
    # An operand: whole, or for many tiles in halves, with 32 KiB to change its layout.
    for problem in (few, many):
        config = with_staging(wide, problem, EpilogueTraits(2, 2), H200)
        assert (config.num_stages, config.store_halves) == (3, problem is many)
        assert (config.block_n, config.flatten) == (256, True)
    whole = dataclasses.replace(wide, store_halves=False, num_stages=3)
    assert with_staging(whole, many, EpilogueTraits(2), H200) == whole
    # Partials in fp32 change their layout beside the stages of a flattened loop, if they fit.
    split = dataclasses.replace(wide, split_k=2)
    apart = dataclasses.replace(split, flatten=False)
    assert with_staging(split, many, EpilogueTraits(2, 2), H200) == apart
    small = dataclasses.replace(split, block_m=64, block_n=64)
    assert with_staging(small, many, EpilogueTraits(2, 2), H200) == small
    assert with_staging(CONFIG, many, EpilogueTraits(2, 4), H200) == CONFIG


@pytest.mark.parametrize(
    ("traits", "block_n", "flatten"),
    [
        (EpilogueTraits(4), 128, True),
        (EpilogueTraits(2, out_aligned=False), 256, True),
        (EpilogueTraits(2, out_aligned=False, activated=True), 128, True),
        (EpilogueTraits(2, 4), 128, False),
        (EpilogueTraits(2, 2, operands_aligned=False), 128, False),
        (EpilogueTraits(2, 2, out_aligned=False), 64, False),
    ],
    ids=str,
)
def test_what_takes_registers_has_smaller_tiles(
    traits: EpilogueTraits, block_n: int, flatten: bool
) -> None:
    """What is not flattened needs no memory beside the pipeline and the output's tile."""
    wide = GemmConfig("gemm_tma", 128, 256, 64, 1, 8, 8, 4, store_halves=True)
    problem = GemmProblem(1, 8192, 4096, 4096, 2, False, True, True)
    config = with_staging(wide, problem, traits, H200)
    assert (config.block_n, config.flatten) == (block_n, flatten)
    assert not (config.store_halves and traits.is_awkward)
    assert config.num_stages >= 3


def test_a_smaller_tile_may_make_many() -> None:
    """128 tiles of 256 columns are 256 of 128: of a flattened loop, with memory of its own."""
    wide = GemmConfig("gemm_tma", 128, 256, 64, 1, 8, 8, 4, store_halves=True)
    problem = GemmProblem(1, 1024, 4096, 4096, 2, False, True, True)
    config = with_staging(wide, problem, EpilogueTraits(4, 2), H200)
    assert (config.block_n, config.store_halves) == (128, True)


def test_a_pair_on_hopper() -> None:
    """What was measured for Llama's gate and up; an operand that is no plain one, not flattened."""
    assert select_pair(1024, 14336, 4096, EpilogueTraits(2), H200) == PairConfig(
        128, 128, 64, 16, 8, 3
    )
    for traits, flatten in (
        (EpilogueTraits(2, 2), True),
        (EpilogueTraits(2, 4), False),
        (EpilogueTraits(2, 2, operands_aligned=False), False),
        (EpilogueTraits(2, 2, out_aligned=False), False),
    ):
        config = select_pair(8192, 14336, 4096, traits, H200)
        assert config is not None
        assert (config.flatten, config.num_stages) == (flatten, 3)
    assert select_pair(1024, 14336, 4096, EpilogueTraits(4), H200) is None


# Cost


def test_everything_is_read_once(path: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path, (place, row()))
    reads = []
    reading = databases.reading
    monkeypatch.setattr(databases, "reading", lambda p: reads.append(p) or reading(p))
    for M in (1, 2, 16, 64, 128):
        with tuned.using(tuned.Sources(database=str(path))):
            select_config(dataclasses.replace(PROBLEM, M=M), H200)
            select_config(PROBLEM, H200)
    assert len(reads) == 1


# Settings


def test_what_the_settings_mean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default = str(databases.default_path())
    assert tuned.Sources.of(settings.Settings()) == tuned.Sources(database=default)
    assert tuned.Sources.of(settings.Settings(database="x.db")).database == "x.db"
    assert tuned.Sources.of(settings.Settings(database="none")) == tuned.Sources()
    heuristic = tuned.Sources.of(settings.Settings(tuning="heuristic", database="x.db"))
    assert not heuristic.measured


def test_the_fingerprint_follows_the_database(path: Path, place: Place) -> None:
    chosen = tuned.Sources(database=str(path))
    empty = tuned.fingerprint(chosen)
    fill(path, (place, row()))
    one = tuned.fingerprint(chosen)
    fill(path, (place, row(OTHER, 3.0)))
    assert len({empty, one, tuned.fingerprint(chosen)}) == 3
    assert tuned.fingerprint(tuned.Sources(measured=False, database=str(path))) == empty


def test_sources_of_one_thread_are_not_anothers(path: Path) -> None:
    import threading

    found = []
    with tuned.using(tuned.Sources(measured=False)):
        thread = threading.Thread(target=lambda: found.append(tuned.sources()))
        thread.start()
        thread.join()
        assert not tuned.sources().measured
    assert found == [tuned.default_sources()]


# The database


def test_a_database_keeps_what_it_is_given(path: Path, place: Place) -> None:
    fill(path, (place, row()), (place, row(OTHER, None, "error 2.0")))
    with databases.writing(path) as database:
        assert set(database.trials()) == {(place, row()), (place, row(OTHER, None, "error 2.0"))}
        database.add(place, row(us=5.0))
        assert row(us=5.0) in database.trials_of(place, "gemm", tuned.encode(PROBLEM))
        assert database.trials_of(place, "other", tuned.encode(PROBLEM)) == []
        database.remove(place, row())
        assert list(database.trials()) == [(place, row(OTHER, None, "error 2.0"))]


def make_foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE trials (gpu TEXT)")
        connection.execute("INSERT INTO trials VALUES ('precious')")
    connection.close()


def make_newer(path: Path) -> None:
    with databases.writing(path):
        pass
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {databases.SCHEMA_VERSION + 1}")
    connection.close()


def make_truncated(path: Path) -> None:
    with databases.writing(path) as database:
        for us in range(200):
            config = dataclasses.replace(CONFIG, group_m=us)
            database.add(Place("a", "b", "c", "d"), row(config, float(us)))
    path.write_bytes(path.read_bytes()[:6000])


BROKEN = {
    "no database": lambda path: path.write_bytes(b"precious" * 1000),
    "foreign": make_foreign,
    "newer": make_newer,
    "truncated": make_truncated,
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)
def test_a_broken_or_foreign_database_is_reported_once_and_left_alone(
    make: Any, path: Path, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with caplog.at_level(logging.WARNING, "triton_only"):
        for M in (1, 64, 128):
            with tuned.using(tuned.Sources(database=str(path))):
                problem = dataclasses.replace(PROBLEM, M=M)
                assert select_config(problem, H200) == heuristic_config(problem, H200)
    assert len(caplog.records) == 1
    assert str(path) in caplog.text and "left as it is" in caplog.text
    with pytest.raises(DatabaseError, match="left as it is"), databases.writing(path) as database:
        list(database.trials())
    assert before is None or path.read_bytes() == before


def test_a_database_that_is_not_there_is_no_cause_for_a_report(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose(path) == heuristic_config(PROBLEM, H200)
    assert not caplog.records and not path.exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DatabaseError, match="left as it is"),
        databases.writing(tmp_path / "file" / "tuning.db"),
    ):
        pass


def test_processes_share_a_database(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=write_rows, args=(path, PROBLEM, CONFIG, 50 * i)) for i in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    with databases.reading(path) as database:
        assert sorted(trial.us for _, trial in database.trials()) == list(map(float, range(150)))


def test_what_would_leave_a_wave_half_empty_is_computed_apart() -> None:
    """512 × 28672 in tiles of 128 × 256: 448 of 132 at a time; 396 of them in three waves.

    Where Gluon is not known, whose kernel divides them.
    """
    problem = GemmProblem(1, 512, 28672, 4096, 2, False, True, True)
    with unknown_gluon():
        config = heuristic_config(problem, H200)
        assert (config.block_m, config.block_n, config.columns) == (128, 256, 99 * 256)
        for other in (
            dataclasses.replace(problem, M=1024, N=4096),  # 128 tiles
            dataclasses.replace(problem, M=8192),  # 54 waves
            dataclasses.replace(problem, M=16),
        ):
            assert heuristic_config(other, H200).columns == 0


def test_what_the_kernels_are_made_of_is_in_their_hash():
    """Every file whose jitted functions a file of `SOURCES` imports is in the same list."""

    def jitted(tree):
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        marks = {f.name: [ast.unparse(d) for d in f.decorator_list] for f in functions}
        return {name for name, of in marks.items() if "jit" in str(of) or "constexpr" in str(of)}

    trees = {path.stem: ast.parse(path.read_text()) for path in tuned.KERNELS.glob("*.py")}
    package = "triton_only_backend.kernels."
    for kind, files in tuned.SOURCES.items():
        imports = [
            (name, node.module.removeprefix(package), {alias.name for alias in node.names})
            for name in files
            for node in ast.walk(trees[name])
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(package)
        ]
        needed = {file for _, file, names in imports if names & jitted(trees[file])}
        assert needed, kind
        assert needed <= set(files), kind
