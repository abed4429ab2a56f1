"""`tuning="search"`: before a graph is compiled, the search of what no table knows of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend import inductor
from triton_only_backend.database import DatabaseError, writing
from triton_only_backend.kernels import hardware, tuned
from triton_only_backend.tuning.compilation import Pool, current_target
from triton_only_backend.tuning.problems import Problem, recorded
from triton_only_backend.tuning.search import Outcome, Search
from triton_only_backend.tuning.trial import make_trial

if TYPE_CHECKING:
    from collections.abc import Iterator

    from triton_only_backend.kernels.hardware import Hardware
    from triton_only_backend.kernels.tuned import Sources

log = logging.getLogger("triton_only")


def search_graph(graph: torch.fx.Graph, chosen: Sources) -> list[Outcome]:
    """Measures the problems of a graph's operations of ours that nothing is known of, and saves.

    In the interpreter, where nothing can be measured, and with no database to save to it does
    nothing; a database that cannot be written is reported.
    """
    devices = [device for _, device in _calls(graph) if device.type == "cuda"]
    if not devices or chosen.database is None:
        return []
    device = devices[0]
    here = hardware.of(device)
    with tuned.using(chosen), inductor.without_fake_tensors():
        problems = unknown(problems_of(graph), here, chosen)
        if not problems:
            return []
        log.info("tuning: %d problems that no table knows are measured", len(problems))
        try:
            with writing(Path(chosen.database)) as database, Pool(current_target(), here) as pool:
                search = Search(
                    here, database, pool, lambda kind, problem: make_trial(kind, problem, device),
                    Silent(),
                )  # fmt: skip
                outcomes = search.run(problems)
        except DatabaseError as error:
            log.warning("%s", error)
            return []
    tuned.forget()
    return outcomes


def unknown(problems: list[Problem], here: Hardware, chosen: Sources) -> list[Problem]:
    """Those of which neither the database nor a table has a configuration."""
    return [
        (kind, problem)
        for kind, problem in problems
        if tuned.encode(problem) not in tuned.entries(kind, here, chosen)
    ]


def problems_of(graph: torch.fx.Graph) -> list[Problem]:
    """The problems of a graph's operations of ours: each is run once, on zeros.

    Sizes that are symbolic have the value with which the graph was traced.
    """

    def run() -> None:
        for node, _ in _calls(graph):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), _operand)
            target: Any = node.target
            target(*args, **kwargs)

    return recorded(run)


def _calls(graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, torch.device]]:
    """The calls of our operations whose operands are known, with their device."""
    for node in graph.nodes:
        namespace = getattr(node.target, "namespace", None)
        if node.op != "call_function" or namespace != "triton_only":
            continue
        values = [source.meta.get("val") for source in node.all_input_nodes]
        devices = [value.device for value in values if isinstance(value, torch.Tensor)]
        if devices and all(value is not None for value in values):
            yield node, devices[0]


def _operand(node: torch.fx.Node) -> Any:
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        size, stride = ([_hint(n) for n in sizes] for sizes in (value.shape, value.stride()))
        # Zeros: an operand may hold positions.
        return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device).zero_()
    return _hint(value)


def _hint(number: Any) -> Any:
    return number.node.hint if isinstance(number, torch.SymInt | torch.SymFloat) else number


class Silent:
    """A search's progress, in the log."""

    def begin(self, candidates: int) -> None:
        """So many candidates are to be measured."""
        log.info("tuning: %d candidates", candidates)

    def advance(self, candidates: int) -> None:
        """So many of them are done or need not be."""

    def problem(self, found: Outcome) -> None:
        """A problem is done."""
        log.info("tuning: %s: %s µs, %s", found.problem, found.us, found.config)
