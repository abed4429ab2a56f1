"""Where in the user's code something stands, in one line: "model.py:12 in forward: y = f(x)"."""

from __future__ import annotations

import functools
import linecache
import os
import re
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')

# After a graph break Dynamo goes on in a function of its own making.
_RESUMED = re.compile(r"torch_dynamo_resume_in_(?P<function>.+)_at_\d+$")


@functools.lru_cache(maxsize=4096)
def source_line(stack_trace: str) -> str:
    """The innermost frame of a node's stack trace that is not torch's own, in one line.

    >>> source_line('File "net/model.py", line 12, in forward\\n    y = self.l(x)')
    'model.py:12 in forward: y = self.l(x)'
    """
    frames: list[tuple[re.Match[str], str]] = []
    lines = stack_trace.splitlines()
    for number, line in enumerate(lines):
        match = _FRAME.search(line) if 'File "' in line else None
        if match:
            code = lines[number + 1].strip() if number + 1 < len(lines) else ""
            frames.append((match, "" if _FRAME.search(code) else code))
    if not frames:
        return ""
    users = [frame for frame in frames if not is_torch_file(frame[0]["file"])]
    match, code = (users or frames)[-1]
    resumed = _RESUMED.match(match["function"])
    function = resumed["function"] if resumed else match["function"]
    place = f"{short_path(match['file'])}:{match['line']} in {function}"
    return f"{place}: {code}" if code else place


def line_of_frame(frame: FrameType) -> str:
    """The place of a running frame, in one line."""
    code = frame.f_code
    text = linecache.getline(code.co_filename, frame.f_lineno).strip()
    place = f"{short_path(code.co_filename)}:{frame.f_lineno} in {code.co_name}"
    return f"{place}: {text}" if text else place


@functools.lru_cache(maxsize=4096)
def is_torch_file(path: str) -> bool:
    """Whether a file is PyTorch's own."""
    import torch

    normal = path.replace(os.sep, "/")
    root = str(PurePath(torch.__file__).parent).replace(os.sep, "/")
    return normal.startswith(f"{root}/") or "-packages/torch/" in normal


def short_path(path: str) -> str:
    """Relative to site-packages or to the working directory, else the file's name."""
    normal = path.replace(os.sep, "/")
    if "-packages/" in normal:
        return normal.rsplit("-packages/", 1)[1]
    working = os.getcwd().replace(os.sep, "/") + "/"
    return normal.removeprefix(working) if normal.startswith(working) else PurePath(normal).name
