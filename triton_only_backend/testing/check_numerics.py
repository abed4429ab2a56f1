"""Does the graph still compute the same: functions that raise AssertionError."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from triton_only_backend.testing.accuracy import check_tensor, widen
from triton_only_backend.testing.capturing import placeholder_values
from triton_only_backend.testing.check_ops import assert_fired
from triton_only_backend.testing.running import (
    PassRun,
    clone,
    flat_outputs,
    gradients,
    random_inputs,
    random_like,
    run_graph,
    run_pass,
    run_wide,
    sizes_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from triton_only_backend.testing.accuracy import Accuracy

SWEEP = (2, 3, 5, 16, 17, 31)


def _as_run(run: PassRun | Any, gm: torch.fx.GraphModule | None) -> PassRun:
    if isinstance(run, PassRun):
        return run
    if gm is None:
        raise TypeError("give a PassRun (of run_pass), or a pass and a graph")
    return run_pass(run, gm)


def assert_numerics(
    run: PassRun | Any,
    gm: torch.fx.GraphModule | None = None,
    *,
    inputs: Sequence[Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    backward: bool = False,
    factor: float = 2.0,
    seed: int = 0,
    exact: Callable[..., Any] | None = None,
) -> list[Accuracy]:
    """Asserts that the graph after a pass is as accurate as the one before it, against fp64.

    The graph before is run in fp64, which is taken as exact, and as it is; the graph after may have
    `factor` times the latter's error.

    Args:
        run: of `run_pass`, or a pass, to be run on `gm`.
        inputs: real tensors; random ones like the graph's inputs by default.
        sizes: numbers for symbolic sizes, see `sizes_of`.
        backward: also the gradients of the floating inputs.
        exact: computes the exact outputs from the inputs in fp64, where the graph itself holds an
            op that does not take fp64.
    """
    run = _as_run(run, gm)
    given = random_inputs(run.before, sizes=sizes, seed=seed) if inputs is None else inputs

    def truth(wide: Sequence[Any]) -> list[Any]:
        return run_wide(run.before, wide) if exact is None else flat_outputs(exact(*wide))

    with torch.no_grad():
        actual, vendor = (run_graph(g, clone(given)) for g in (run.after, run.before))
        expected = truth(widen(clone(given)))
    if len(actual) != len(vendor):
        raise AssertionError(f"the graph gave {len(vendor)} outputs, after the pass {len(actual)}")
    named = [(f"output {i}", *t) for i, t in enumerate(zip(actual, vendor, expected, strict=True))]
    if backward:
        cotangents = random_like(vendor, seed)
        named += _gradients_of(run, given, cotangents, truth)
    checked = [check_tensor(*item, factor) for item in named]
    return [accuracy for accuracy in checked if accuracy is not None]


def _gradients_of(
    run: PassRun,
    given: Sequence[Any],
    cotangents: Sequence[Any],
    truth: Callable[[Sequence[Any]], list[Any]],
) -> list[tuple[str, Any, Any, Any]]:
    actual, vendor = (
        gradients(lambda x, g=g: run_graph(g, x), clone(given), cotangents)  # type: ignore[misc]
        for g in (run.after, run.before)
    )
    expected = gradients(truth, widen(clone(given)), widen(list(cotangents)))
    names = [
        f"the gradient of {node.name}"
        for node, value_ in zip(run.before.graph.find_nodes(op="placeholder"), given, strict=True)
        if isinstance(value_, torch.Tensor) and value_.is_floating_point()
    ]
    return list(zip(names, actual, vendor, expected, strict=True))


def assert_mutation_safe(
    run: PassRun | Any,
    gm: torch.fx.GraphModule | None = None,
    *,
    inputs: Sequence[Any] | None = None,
) -> None:
    """Asserts that a pass changes neither what is written to inputs nor who shares memory.

    Both graphs run on the same inputs. The same inputs must have been written to, and the outputs
    must share memory with the same inputs and with each other: Inductor plans memory by it.
    """
    run = _as_run(run, gm)
    given = random_inputs(run.before) if inputs is None else inputs
    old_written, old_shared = _effects(run.before, given)
    new_written, new_shared = _effects(run.after, given)
    names = [node.name for node in run.before.graph.find_nodes(op="placeholder")]
    if old_written != new_written:
        before, after = ([names[i] for i in sorted(w)] for w in (old_written, new_written))
        raise AssertionError(f"the graph wrote to the inputs {before}, after the pass to {after}")
    if old_shared != new_shared:
        raise AssertionError(
            "who shares memory changed: "
            f"before {_shown(old_shared, names)}, after the pass {_shown(new_shared, names)}"
        )


def _shown(pairs: set[tuple[int, int]], names: list[str]) -> str:
    def name(i: int) -> str:
        return names[i] if i < len(names) else f"output {i - len(names)}"

    return ", ".join(f"{name(a)} and {name(b)}" for a, b in sorted(pairs)) or "nothing"


def _effects(
    gm: torch.fx.GraphModule, given: Sequence[Any]
) -> tuple[set[int], set[tuple[int, int]]]:
    inputs = clone(given)
    kept = clone(given)
    with torch.no_grad():
        outputs = run_graph(gm, inputs)
    written = {
        i
        for i, (old, new) in enumerate(zip(kept, inputs, strict=True))
        if isinstance(old, torch.Tensor) and not torch.equal(_bits(old), _bits(new))
    }
    places = [
        t.untyped_storage().data_ptr() if isinstance(t, torch.Tensor) and t.numel() else None
        for t in [*inputs, *outputs]
    ]
    shared = {
        (a, b)
        for b in range(len(inputs), len(places))
        for a in range(b)
        if places[a] is not None and places[a] == places[b]
    }
    return written, shared


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, so that a NaN equals itself."""
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def guards_of(gm: torch.fx.GraphModule) -> list[str]:
    """The guards on a graph's symbolic sizes."""
    for leaf in tree_leaves(placeholder_values(gm)):
        mode = getattr(leaf, "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return [str(guard.expr) for guard in mode.shape_env.guards]
    return []


def assert_dynamic(
    graph_pass: Any,
    gm: torch.fx.GraphModule,
    *,
    sweep: Iterable[int] = SWEEP,
    factor: float = 2.0,
    backward: bool = False,
    exact: Callable[..., Any] | None = None,
) -> PassRun:
    """Asserts that a pass fires on symbolic sizes, adds no guard, and is right for many sizes.

    Each symbol takes each size of the sweep, the others keeping theirs, then all take it together.

    Args:
        gm: a graph with symbols: `capture(…, dynamic=True)` or `GraphBuilder.size`.
    """
    symbols = sizes_of(gm)
    if not symbols:
        raise AssertionError("the graph has no symbolic size; capture it with dynamic=True")
    before = guards_of(gm)
    run = assert_fired(graph_pass, gm)
    added = [guard for guard in guards_of(gm) if guard not in before]
    if added:
        raise AssertionError(
            f"the pass added guards: {', '.join(added)}; compare sizes as they are written, or "
            "with statically_known_true"
        )
    for number in sweep:
        choices = [{**symbols, name: number} for name in symbols]
        for sizes in [*choices, dict.fromkeys(symbols, number)]:
            try:
                assert_numerics(run, sizes=sizes, factor=factor, backward=backward, exact=exact)
            except AssertionError as error:
                raise AssertionError(f"with sizes {sizes}: {error}") from error
    return run
