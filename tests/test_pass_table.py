"""The table in docs/passes.md says what the passes do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.cpu
def test_rows_of_the_table_are_true():
    command = [
        sys.executable,
        str(REPOSITORY / "tests" / "pass_table.py"),
        "Llama",
        "GPT-2",
        "BERT",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 7
    documented = (REPOSITORY / "docs" / "passes.md").read_text().splitlines()
    assert set(table) <= set(documented)
