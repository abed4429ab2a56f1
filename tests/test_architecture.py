"""The layers, read from the imports: who may know whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import triton_only_backend

PACKAGE = Path(triton_only_backend.__file__).parent
NAME = "triton_only_backend"

# Bottom up: a module may import from its own row and from those above it in this table. What is not
# named here (the command line and its helpers) stands on top of all: nothing below may import it.
LAYERS = (
    ("errors", "files", "database", "timing"),
    (
        "inductor",
        "inductor_launch",
        "inductor_mends",
        "inductor_target",
        "settings",
        "interpreter",
        "interpreter_libdevice",
        "interpreter_mends",
    ),
    ("kernels",),
    ("passes", "tuning"),
    ("backend", "eager_mode", "environment"),
    ("model_audit",),
    ("testing",),
    ("demo", "bench"),
)
# The audit is a witness apart: it may know only these, and nothing below the backend knows it.
AUDIT_KNOWS = {"audit", "errors", "inductor", "interpreter"}
# Imported by name on first use: the public function `tob.audit`.
AUDIT_CALLS = ("audit/__init__.py", "model_audit")
BELOW_AUDIT = {part for row in LAYERS[:4] for part in row} | {"eager_mode", "environment"}

PRIVATE = ("torch._inductor", "torch._dynamo")
# What may name them beside inductor.py, and why.
PRIVATE_ALLOWED = {
    "inductor_launch.py": "how its kernels are launched",
    "inductor_mends.py": "what it lowers wrongly",
    "inductor_target.py": "the same for a device that is not there",
    "bench/providers.py": "reads and clears Dynamo's counters between measurements",
    "testing/private.py": "stops a compilation at a stage, for whatever backend; pattern matcher",
}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts) + sorted(
        p for folder in ("kernels", "passes") for p in (PACKAGE / folder).rglob("*.py")
    )


MODULES = {str(path.relative_to(PACKAGE)): path for path in modules()}


def imports(path: Path) -> set[str]:
    """Every module or name that a file imports at run time, anywhere in it."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    typing_only: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            typing_only.update(child for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def part_of(module: str) -> str | None:
    """`triton_only_backend.kernels.ops` -> `kernels`; None for other packages and `__version__`."""
    names = module.split(".")
    inside = names[0] == NAME and len(names) > 1 and not names[1].startswith("__")
    return names[1] if inside else None


def own_part(relative: str) -> str:
    return Path(relative).parts[0].removesuffix(".py")


def level(part: str) -> int:
    return next((index for index, row in enumerate(LAYERS) if part in row), len(LAYERS))


def test_every_layer_is_read():
    assert {part for row in LAYERS for part in row} <= {own_part(name) for name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_the_layers(name):
    own = own_part(name)
    if own in ("__init__", "audit"):
        return
    known = {part for module in imports(MODULES[name]) if (part := part_of(module))}
    too_high = {p for p in known - {"audit"} if p != own and level(p) > level(own)}
    assert not too_high
    assert "audit" not in known or own not in BELOW_AUDIT


def test_the_audit_knows_neither_passes_nor_kernels():
    for name, path in MODULES.items():
        if own_part(name) == "audit":
            known = {part for module in imports(path) if (part := part_of(module))}
            if name == AUDIT_CALLS[0]:
                known -= {AUDIT_CALLS[1]}
            assert known <= AUDIT_KNOWS, name


@pytest.mark.parametrize("name", MODULES)
def test_private_names_of_torch_are_in_one_file(name):
    private = {module for module in imports(MODULES[name]) if module.startswith(PRIVATE)}
    assert not private or name == "inductor.py" or name in PRIVATE_ALLOWED


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_a_stray_import_of_the_folders_registers_nothing(folder):
    (docstring,) = ast.parse((PACKAGE / folder / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)


def test_importing_the_package_loads_neither_triton_nor_inductor():
    code = (
        "import sys, triton_only_backend as tob\n"
        "heavy = ('triton', 'torch._inductor.compile_fx', 'triton_only_backend.backend')\n"
        "print([m for m in heavy if m in sys.modules], sorted(tob.__all__) == list(tob.__all__))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "[] True\n", run.stderr


def test_every_public_name_resolves():
    assert all(
        getattr(triton_only_backend, name) is not None for name in triton_only_backend.__all__
    )
    assert set(triton_only_backend.__all__) <= set(dir(triton_only_backend))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = triton_only_backend.nothing
