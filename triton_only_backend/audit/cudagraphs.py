"""Whether CUDA graphs are on and, where PyTorch went without, its reason and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Iterable


class CudaGraphs(TypedDict):
    """What is known of CUDA graphs.

    Attributes:
        on: whether the compilation asked for them.
        skipped: for each graph that PyTorch runs without one, the reason as PyTorch gives it.
    """

    on: bool
    skipped: list[str]


# What to do, by a word of PyTorch's reason; the first that occurs counts.
_ADVICE = (
    (
        "mutated input",
        "mark the tensors that the graph writes into with torch._dynamo.mark_static_address "
        "before compiling, or return new tensors",
    ),
    ("cpu device", 'move that tensor to the GPU, or make it a Python number ("x.item()" outside)'),
    ("multiple devices", "put every tensor of the graph on one GPU"),
    ("index put", "leave torch.use_deterministic_algorithms off around this graph"),
    ("incompatible op", "move that op out of the compiled function, or write it another way"),
    ("overlap", "give the graph contiguous inputs: call .contiguous() on expanded ones"),
    ("symbolic", "compile with dynamic=False, or for a few fixed shapes"),
    ("dynamic", "compile with dynamic=False, or for a few fixed shapes"),
    ("non-tensor", "pass tensors only, and close over the rest"),
)


def merge(parts: Iterable[CudaGraphs | None]) -> CudaGraphs | None:
    """What the graphs of a model say together; None if none says anything."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    skipped = dict.fromkeys(reason for part in known for reason in part["skipped"])
    return {"on": any(part["on"] for part in known), "skipped": list(skipped)}


def headline(state: CudaGraphs) -> str:
    """ "on", "off", or how many reasons there are for which they were skipped."""
    if not state["on"]:
        return "off"
    count = len(state["skipped"])
    return f"skipped for {count} reason{'' if count == 1 else 's'}" if count else "on"


def advice(reason: str) -> str:
    """What to do about one of PyTorch's reasons; "" where nothing is known."""
    lowered = reason.lower()
    return next((remedy for word, remedy in _ADVICE if word in lowered), "")
