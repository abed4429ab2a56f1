"""The tables of configurations that the package ships: tables/*.json, read strictly.

`triton-only tune --export` writes them, see `tuning.tables`; `tuned` looks into them.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_only_backend.errors import TritonOnlyError

if TYPE_CHECKING:
    from collections.abc import Mapping

TABLES = Path(__file__).parent / "tables"
TABLE_FORMAT = 1


class TableError(TritonOnlyError, ValueError):
    """A shipped table that is not what `triton-only tune --export` writes."""


@functools.cache
def shipped_tables() -> tuple[dict[str, Any], ...]:
    """The tables of this installation, by file name."""
    return tuple(read_table(path) for path in sorted(TABLES.glob("*.json")))


def read_table(path: Path) -> dict[str, Any]:
    """A table: gpu, arch, triton, and `entries`, by kind the configurations by problem.

    Raises:
        TableError: it has another form.
    """
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if table["format"] != TABLE_FORMAT:
            raise ValueError(f"format {table['format']}, not {TABLE_FORMAT}")
        table["entries"] = {
            kind: {_canonical(row["problem"]): _canonical(row["config"]) for row in rows}
            for kind, rows in table["entries"].items()
        }
        return {key: table[key] for key in ("gpu", "arch", "triton", "entries")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TableError(
            f"triton_only: {path} is no table of configurations ({error!r}); "
            "write it anew with triton-only tune --export"
        ) from error


def _canonical(fields: Mapping[str, Any]) -> str:
    return json.dumps(dict(fields), sort_keys=True, separators=(",", ":"))
