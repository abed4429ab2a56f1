"""The program for compute-sanitizer reaches every kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.exhaustive
def test_every_kernel_is_launched():
    script = Path(__file__).parent / "sanitize.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
