"""Configurations that were measured: the user's database first, then the tables shipped here.

    database   what `triton-only tune` found, by GPU, Triton version and hash of kernel sources
    tables     tables/*.json: those of this GPU by name, then those of its architecture

`select` is what the `select_*` functions call. Everything is read once a process; after that a
choice is one dictionary access.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from triton_only_backend import database, settings
from triton_only_backend.kernels.shipped_tables import shipped_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from triton_only_backend.kernels.hardware import Hardware

log = logging.getLogger("triton_only")

KERNELS = Path(__file__).parent
# The kernels of each kind, by their files: what is measured with others says nothing of these.
SOURCES = {
    "gemm": (
        "gemm", "gemm_tma", "gemm_hopper", "hopper_gemm_pipeline", "stream_k", "wide_mma",
        "ring_linear", "ring_copies", "ring_pipeline", "ring_shares", "tma_ring",
        "gemv", "split_k", "epilogue", "eights", "dependent_launch", "realign",
    ),
    "flash_attention": (
        "flash_attention", "online_softmax", "attention_tiles", "mask_spans", "eights",
        "dependent_launch",
    ),
    "decode_attention": (
        "decode_attention", "split_kv", "online_softmax", "attention_tiles", "mask_spans",
        "eights", "dependent_launch",
    ),
}  # fmt: skip


class Problem(Protocol):
    """What a kind's problems have in common, beside being frozen dataclasses."""

    def __hash__(self) -> int: ...

    def bucketed(self) -> Any:
        """The problem under whose configuration this one runs."""


C = TypeVar("C")
P = TypeVar("P", bound=Problem)
Recorded = dict[tuple[str, Any], None]


@dataclass(frozen=True)
class Sources:
    """Where configurations may come from.

    Attributes:
        measured: whether from anywhere but the heuristics.
        database: path of the user's database, or None for none.
    """

    measured: bool = True
    database: str | None = None

    @staticmethod
    def of(chosen: settings.Settings) -> Sources:
        """What the options `tuning` and `database` mean."""
        if chosen.tuning == "heuristic":
            return Sources(measured=False)
        if chosen.database == "none":
            return Sources()
        return Sources(database=chosen.database or str(database.default_path()))


_current: contextvars.ContextVar[Sources | None] = contextvars.ContextVar("sources", default=None)


@dataclass
class _Hooks:
    """What tuning hangs into every choice of this process; falsy where there is nothing."""

    recorded: Recorded | None = None
    forced: tuple[str, Any] | None = None

    def __bool__(self) -> bool:
        return self.recorded is not None or self.forced is not None


_hooks = _Hooks()


@functools.cache
def default_sources() -> Sources:
    """Those of the environment, read once."""
    return Sources.of(settings.from_environment())


def sources() -> Sources:
    """Those in force here."""
    return _current.get() or default_sources()


@contextlib.contextmanager
def using(chosen: Sources) -> Iterator[None]:
    """Puts `chosen` in force in this thread."""
    token = _current.set(chosen)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[Recorded]:
    """Collects the (kind, problem) of every choice made in this process, each once, in order."""
    recorded: Recorded = {}
    before, _hooks.recorded = _hooks.recorded, recorded
    try:
        yield recorded
    finally:
        _hooks.recorded = before


@contextlib.contextmanager
def forcing(kind: str, config: Any) -> Iterator[None]:
    """Makes every choice of this kind in this process `config`."""
    before, _hooks.forced = _hooks.forced, (kind, config)
    try:
        yield
    finally:
        _hooks.forced = before


def is_forced(kind: str) -> bool:
    """Whether every choice of this kind is made already: no other kernel may run in its place."""
    return _hooks.forced is not None and _hooks.forced[0] == kind


def select(
    kind: str,
    problem: P,
    hardware: Hardware,
    config_type: Any,
    supports: Callable[[P, C, Hardware], bool],
    heuristic: Callable[[P, Hardware], C],
) -> C:
    """The configuration measured best for a problem, or else what the heuristic says.

    Args:
        kind: a key of `SOURCES`.
        problem: a dataclass of plain values; `bucketed` is it with its sizes rounded as they are
            tuned.
        config_type: the dataclass of the kind's configurations.
        supports: whether a configuration computes a problem.
        heuristic: the choice where nothing was measured.
    """
    if _hooks:
        if _hooks.recorded is not None:
            _hooks.recorded[kind, problem.bucketed()] = None
        if _hooks.forced is not None and _hooks.forced[0] == kind:
            forced: C = _hooks.forced[1]
            return forced
    chosen: C = _select(kind, problem, hardware, config_type, supports, heuristic, sources())
    return chosen


@functools.lru_cache(maxsize=4096)
def _select(
    kind: str,
    problem: Any,
    hardware: Hardware,
    config_type: Any,
    supports: Callable[[Any, Any, Hardware], bool],
    heuristic: Callable[[Any, Hardware], Any],
    chosen: Sources,
) -> Any:
    known = {} if hardware.is_interpreter else entries(kind, hardware, chosen)
    text = known.get(encode(problem.bucketed())) if known else None
    if text is not None:
        try:
            config = config_type(**json.loads(text))
            if supports(problem, config, hardware):
                return config
            cause = "it does not compute that"
        except (TypeError, ValueError) as error:
            cause = str(error)
        log.warning(
            "triton_only: what was measured for %s is ignored: %s: %s", problem, text, cause
        )
    return heuristic(problem, hardware)


def encode(value: Any) -> str:
    """A problem or configuration as JSON text without the fields that have their default."""
    fields = {
        f.name: getattr(value, f.name)
        for f in dataclasses.fields(value)
        if getattr(value, f.name) != f.default
    }
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


@functools.cache
def entries(kind: str, hardware: Hardware, chosen: Sources) -> Mapping[str, str]:
    """Configurations by problem, both as JSON text: of the database where it has one."""
    found: dict[str, str] = {}
    if chosen.measured:
        tables = shipped_tables()
        for table in (
            *(t for t in tables if t["arch"] == hardware.arch and t["gpu"] != hardware.name),
            *(t for t in tables if t["gpu"] == hardware.name),
        ):
            found.update(table["entries"].get(kind, {}))
        found.update(measured(kind, hardware, chosen.database))
    return found


def measured(kind: str, hardware: Hardware, path: str | None) -> dict[str, str]:
    """The best configuration of each problem in a database, for this GPU, Triton and sources."""
    here = place(kind, hardware)
    best: dict[str, tuple[float, str]] = {}
    for where, trial in _rows(path) if path is not None else ():
        if where != here or trial.kind != kind or trial.us is None:
            continue
        if trial.outcome == database.MEASURED:
            known = best.get(trial.problem)
            if known is None or (trial.us, trial.config) < known:
                best[trial.problem] = (trial.us, trial.config)
    return {problem: config for problem, (_, config) in best.items()}


def place(kind: str, hardware: Hardware) -> database.Place:
    """What measurements of this kind on this GPU hold for."""
    import triton

    return database.Place(hardware.name, hardware.arch, triton.__version__, source_hash(kind))


@functools.cache
def source_hash(kind: str) -> str:
    """Hash of the sources of a kind's kernels."""
    digest = hashlib.sha256()
    for name in SOURCES[kind]:
        digest.update((KERNELS / f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _rows(path: str) -> tuple[tuple[database.Place, database.Trial], ...]:
    """The rows of a database; of one that cannot be read none, and that is said once."""
    if not Path(path).exists():
        return ()
    try:
        with database.reading(Path(path)) as found:
            return tuple(found.trials())
    except database.DatabaseError as error:
        log.warning("%s", error)
        return ()


@functools.cache
def fingerprint(chosen: Sources) -> str:
    """Hash of what a database holds: for caches of what was compiled under its choices.

    Of the shipped tables `passes.pipeline.source_hash` takes care.
    """
    rows = _rows(chosen.database) if chosen.measured and chosen.database is not None else ()
    kept = sorted(repr(row) for row in rows if row[1].outcome == database.MEASURED)
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16] if kept else "none"


def forget() -> None:
    """Reads everything anew when it is next needed: after a search has added to the database."""
    for cached in (_select, entries, _rows, fingerprint):
        cached.cache_clear()
