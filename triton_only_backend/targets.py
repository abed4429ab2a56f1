"""What a target on the command line stands for: a model and the arguments to call it with."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import os
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_only_backend.errors import TritonOnlyError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable


class UsageError(TritonOnlyError):
    """The command line asks for something that is not there."""


def load_target(target: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model and the arguments that `module:factory` or `file.py:factory` stands for.

    Raises:
        UsageError: there is no such thing, or it gives something else than a model.
    """
    if target.endswith(".pt2"):
        return _load_program(Path(target))
    place, separator, attribute = target.rpartition(":")
    if not separator or not place or not attribute:
        raise UsageError(f"{target!r} is not of the form module:factory or path/to/file.py:factory")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    try:
        found = operator.attrgetter(attribute)(module)
    except AttributeError:
        names = [name for name, value in vars(module).items() if callable(value)]
        hint = nearest(attribute, names)
        raise UsageError(f"{place} has no attribute {attribute!r}{hint}") from None
    import torch

    if not callable(found):
        raise UsageError(f"{target} is a {type(found).__name__}, not a factory or a model")
    made = found if isinstance(found, torch.nn.Module) else found()
    return _model_and_arguments(target, made)


def _load_program(path: Path) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A program that torch.export.save wrote, with its example inputs."""
    import torch

    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path} is not what torch.export.save writes")
    try:
        program = torch.export.load(path)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f"cannot load an exported program from {path}: {error}") from error
    if program.example_inputs is None:
        raise UsageError(f"{path} was saved without example inputs")
    args, kwargs = program.example_inputs
    return program.module(), tuple(args), dict(kwargs)


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.append(str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"cannot load {path}: {error}") from error
    return module


def _load_module(name: str) -> Any:
    # At the end, so that a folder of the current directory shadows nothing that is installed.
    sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"cannot import {name}: {error}") from error


def _model_and_arguments(
    target: str, made: Any
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    import torch

    if not isinstance(made, tuple):
        inputs = getattr(made, "example_inputs", None)
        if not callable(made) or inputs is None:
            raise UsageError(
                f"{target} gave a {type(made).__name__}; it must give (model, args), "
                "(model, args, kwargs), or a model with an attribute example_inputs"
            )
        inputs = inputs if isinstance(inputs, tuple | list | dict | torch.Tensor) else inputs()
        made = (made, (), inputs) if isinstance(inputs, dict) else (made, inputs)
    if len(made) not in (2, 3) or not callable(made[0]):
        raise UsageError(
            f"{target} gave {len(made)} values; (model, args) or (model, args, kwargs) is needed"
        )
    model, args, kwargs = (*made, {}) if len(made) == 2 else made
    args = (args,) if isinstance(args, torch.Tensor) else args
    if not isinstance(args, tuple | list) or not isinstance(kwargs, dict):
        raise UsageError(
            f"{target}: args must be a tuple and kwargs a dict, got "
            f"{type(args).__name__} and {type(kwargs).__name__}"
        )
    return model, tuple(args), kwargs
