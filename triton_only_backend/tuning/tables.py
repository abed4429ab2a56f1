"""Writing what was measured as a table that the package ships: kernels/tables/*.json."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from triton_only_backend import files
from triton_only_backend.database import MEASURED, Database, DatabaseError, Place
from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.shipped_tables import TABLE_FORMAT
from triton_only_backend.tuning import spaces

if TYPE_CHECKING:
    from pathlib import Path


def export(database: Database, path: Path, gpu: str | None = None) -> int:
    """Writes the best configuration of each problem of one GPU, in the order of the problems.

    Args:
        gpu: its name; None where the database knows only one.

    Returns:
        How many problems the table holds.

    Raises:
        DatabaseError: nothing was measured there with these kernels, or on several GPUs.
    """
    best: dict[tuple[str, str, str], dict[tuple[str, str], tuple[float, str]]] = {}
    for place, trial in database.trials():
        current = trial.kind in spaces.SPACES and place.source == tuned.source_hash(trial.kind)
        if not current or trial.outcome != MEASURED or trial.us is None:
            continue
        problems = best.setdefault((place.gpu, place.arch, place.triton), {})
        key, found = (trial.kind, trial.problem), (trial.us, trial.config)
        problems[key] = min(found, problems.get(key, found))
    chosen = {where: found for where, found in best.items() if gpu in (None, where[0])}
    if len(chosen) != 1:
        known = ", ".join(f"{name} (triton {triton})" for name, _, triton in best) or "nothing"
        raise DatabaseError(
            f"triton_only: {database.path} holds measurements of these kernels on {known}; "
            "a table is of one GPU and one version of Triton"
        )
    ((where, problems),) = chosen.items()
    files.write_text(path, render(Place(*where, source=""), problems))
    return len(problems)


def render(place: Place, problems: dict[tuple[str, str], tuple[float, str]]) -> str:
    """A table as text: a problem a line, sorted, so that two tables compare line by line."""
    head = {
        "format": TABLE_FORMAT, "gpu": place.gpu, "arch": place.arch, "triton": place.triton
    }  # fmt: skip
    kinds = []
    for kind in sorted({kind for kind, _ in problems}):
        rows = sorted(
            (_order(kind, problem), problem, config, us)
            for (of_kind, problem), (us, config) in problems.items()
            if of_kind == kind
        )
        lines = ",\n".join(
            f'   {{"problem": {problem}, "config": {config}, "us": {us:.2f}}}'
            for _, problem, config, us in rows
        )
        kinds.append(f'  "{kind}": [\n{lines}\n  ]')
    fields = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in head.items())
    entries = ",\n".join(kinds)
    return f'{{\n{fields} "entries": {{\n{entries}\n }}\n}}\n'


def _order(kind: str, problem: str) -> tuple[Any, ...]:
    return tuple(vars(spaces.decode_problem(kind, problem)).values())
