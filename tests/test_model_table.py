"""The table in docs/models.md says what leaves Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.cpu
def test_rows_of_the_table_are_true():
    """One that runs on Triton only, and one of which something is left."""
    script = REPOSITORY / "tests" / "model_table.py"
    command = [sys.executable, str(script), "ViT", "ResNet"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 4
    documented = (REPOSITORY / "docs" / "models.md").read_text().splitlines()
    assert set(table) <= set(documented)
