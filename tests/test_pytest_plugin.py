"""The pytest plugin: what a test of a user's model says when it passes and when it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_only_backend

pytest_plugins = ("pytester", "triton_only_backend.pytest_plugin")


class Ordered(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(x)[1] * 2


def test_a_clean_model_passes_and_the_report_is_returned(triton_only, device: str) -> None:
    report = triton_only(lambda x, *, scale: x * scale, torch.ones(8, device=device), scale=2.0)
    assert report.is_triton_only
    from triton_only_backend.pytest_plugin import assert_triton_only

    assert triton_only is assert_triton_only


def test_the_failure_is_the_report_in_short(triton_only, device: str) -> None:
    x = torch.eye(4, device=device)
    with pytest.raises(AssertionError) as caught:
        triton_only(Ordered(), x)
    lines = str(caught.value).splitlines()
    assert lines[0] == "1 operation would run outside Triton"
    assert lines[2].startswith("aten.linalg_qr.default ×1  [f32[4, 4] -> ")
    assert lines[3].endswith("in forward: return torch.linalg.qr(x)[1] * 2")
    assert lines[-1].startswith("  do")


@pytest.mark.parametrize("allow", ["cusolver*", ["aten.linalg_qr*"]], ids=["text", "list"])
def test_allow_takes_a_glob_or_several(triton_only, allow, device: str) -> None:
    report = triton_only(Ordered(), torch.eye(4, device=device), allow=allow)
    assert [finding.op for finding in report.allowed] == ["aten.linalg_qr.default"]


def test_a_model_of_which_nothing_was_compiled_fails(triton_only) -> None:
    with pytest.raises(AssertionError, match="Nothing was compiled"):
        triton_only(lambda: None)


def test_a_user_sees_the_report_and_not_our_code(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("pytest_plugins = ['triton_only_backend.pytest_plugin']")
    pytester.makepyfile(
        """
        import torch

        DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

        def test_good(triton_only):
            triton_only(lambda x: x + 1, torch.ones(4, device=DEVICE))

        def test_bad(triton_only):
            triton_only(lambda x: torch.linalg.qr(x)[1] * 2, torch.eye(4, device=DEVICE))
        """
    )
    result = pytester.runpytest_inprocess("-q")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["E*AssertionError: 1 operation would run outside Triton", "E*aten.linalg_qr.default*"]
    )
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")


def test_the_plugin_loads_nothing_heavy_by_itself() -> None:
    code = (
        "import sys, triton_only_backend\n"
        "before = set(sys.modules)\n"
        "import triton_only_backend.pytest_plugin\n"
        "new = {name for name in set(sys.modules) - before if 'pytest' not in name}\n"
        "heavy = {'triton', 'rich', 'jinja2', 'torch._inductor', 'triton_only_backend.backend',"
        " 'triton_only_backend.audit'}\n"
        "assert not heavy & new, heavy & new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pytest_starts_without_torch() -> None:
    entry = Path(triton_only_backend.__file__).parent / "pytest_entry" / "__init__.py"
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('triton_only_pytest', {str(entry)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.triton_only\n"
        "assert not {'torch', 'triton_only_backend'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
