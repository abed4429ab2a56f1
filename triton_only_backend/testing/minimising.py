"""Reduces a graph on which a pass fails to a small script that shows the failure."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._functorch.fx_minifier import minifier
from torch._subclasses import FakeTensorMode
from torch.fx.graph_module import _format_import_block
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.package.importer import sys_importer

from triton_only_backend.errors import TritonOnlyError
from triton_only_backend.testing import private
from triton_only_backend.testing.check_meta import assert_meta
from triton_only_backend.testing.check_numerics import assert_mutation_safe, assert_numerics
from triton_only_backend.testing.rendering import render
from triton_only_backend.testing.running import PassRun, clone, random_inputs, run_pass, runnable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType


class NothingFailsError(TritonOnlyError):
    """There is nothing to reduce: the pass does well on the graph."""


CHECKS: dict[str, Callable[[PassRun, Sequence[Any]], Any]] = {
    "numerics": lambda run, inputs: assert_numerics(run, inputs=inputs),
    "meta": lambda run, inputs: assert_meta(run, inputs=inputs),
    "mutation": lambda run, inputs: assert_mutation_safe(run, inputs=inputs),
}


@dataclass(frozen=True)
class Failure:
    """How a pass fails: where ("pass", or one of CHECKS), with which error."""

    where: str
    error: str
    message: str

    def is_like(self, other: Failure | None) -> bool:
        """Whether another failure is one of the same kind; messages name nodes, and may differ."""
        return other is not None and (self.where, self.error) == (other.where, other.error)

    def __str__(self) -> str:
        return f"{self.where}: {self.error}: {self.message.strip().partition(chr(10))[0]}"


class _Caught:
    """Keeps whatever a pass or check raises: any failure may be the one to reduce."""

    error: BaseException | None = None

    def __enter__(self) -> _Caught:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self.error = error
        return isinstance(error, Exception)


def find_failure(
    graph_pass: Any,
    gm: torch.fx.GraphModule,
    inputs: Sequence[Any],
    checks: Sequence[str] = tuple(CHECKS),
) -> Failure | None:
    """The first way in which a pass fails on a graph, or None."""
    with _Caught() as caught:
        run = run_pass(graph_pass, gm)
    if caught.error is not None:
        return Failure("pass", type(caught.error).__name__, str(caught.error))
    for name in checks:
        with _Caught() as caught:
            CHECKS[name](run, inputs)
        if caught.error is not None:
            return Failure(name, type(caught.error).__name__, str(caught.error))
    return None


@dataclass(frozen=True)
class Reduced:
    """A small graph that still fails, with inputs that show it."""

    gm: torch.fx.GraphModule
    inputs: list[Any]
    failure: Failure
    nodes_before: int

    @property
    def nodes(self) -> int:
        """Calls that are left."""
        return calls(self.gm)


def calls(gm: torch.fx.GraphModule) -> int:
    """How many calls a graph makes."""
    return sum(node.op.startswith("call") for node in gm.graph.nodes)


def minimise(
    gm: torch.fx.GraphModule,
    graph_pass: Any = None,
    inputs: Sequence[Any] | None = None,
    *,
    checks: Sequence[str] = tuple(CHECKS),
    fails: Callable[[torch.fx.GraphModule, Sequence[Any]], Failure | None] | None = None,
) -> Reduced:
    """Cuts a graph down while the same failure remains, with functorch's minifier.

    Args:
        gm: the graph, with fake values (see `capture`).
        graph_pass: the pass that fails on it.
        inputs: real tensors that show the failure; random ones by default.
        checks: which of CHECKS to ask when the pass itself does not raise.
        fails: instead of a pass: says how a graph fails, or None. A whole backend can be asked so.

    Raises:
        NothingFailsError: neither the pass nor a check fails.
    """
    gm = runnable(gm)
    given = list(random_inputs(gm) if inputs is None else inputs)

    def failure_of(module: torch.fx.GraphModule, tensors: Sequence[Any]) -> Failure | None:
        if fails is not None:
            return fails(module, clone(tensors))
        return find_failure(graph_pass, module, clone(tensors), checks)

    first = failure_of(gm, given)
    if first is None:
        raise NothingFailsError(
            f"minimise: nothing fails on this graph of {calls(gm)} calls "
            f"(asked: the pass itself, {', '.join(checks)})"
        )

    def still_fails(module: torch.fx.GraphModule, tensors: Sequence[Any]) -> bool:
        return first.is_like(failure_of(private.copy_graph(module.graph, module), tensors))

    copy = private.copy_graph(gm.graph, gm)
    _as_tuple(copy)
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        small, tensors = minifier(copy, clone(given), still_fails, lambda *_: None)
    for node in small.graph.nodes:
        node.meta.pop("concrete_value", None)
    left = failure_of(small, list(tensors))
    assert left is not None
    return Reduced(small, list(tensors), left, calls(gm))


def _as_tuple(gm: torch.fx.GraphModule) -> None:
    """The minifier takes outputs away from a tuple."""
    output = gm.graph.output_node()
    if not isinstance(output.args[0], list | tuple):
        output.args = ((output.args[0],),)
        gm.recompile()


def graph_of(function: Callable[..., Any], inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """The graph of a function that is written in aten ops, op for op, with fake values."""
    gm = torch.fx.symbolic_trace(function)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fakes)
    return gm


def draw(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, seed: int
) -> torch.Tensor:
    """The random input that a reproducer names by shape, strides, dtype and seed."""
    generator = torch.Generator().manual_seed(seed)
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    length = reach if all(shape) else 0
    if dtype.is_floating_point:
        flat = torch.randn(length, generator=generator).to(dtype)
    else:
        flat = torch.randint(0, 2, (length,), generator=generator).to(dtype)
    return flat.as_strided(tuple(shape), tuple(strides))


def reproducer(reduced: Reduced, pass_import: str, *, graph_pass: Any = None) -> str:
    """A script that builds the small graph and shows the failure; it needs no model and no data.

    Args:
        pass_import: statements after which `graph_pass` is the pass.
        graph_pass: the pass itself. With it, inputs are drawn anew from a seed where the failure
            shows on these too; else each number is written out.
    """
    code = reduced.gm.graph.python_code("self")
    names = [n.name for n in reduced.gm.graph.find_nodes(op="placeholder")]
    drawn = [_draw_call(t, seed) for seed, t in enumerate(reduced.inputs)]
    written = [_write(t) for t in reduced.inputs]
    use = written
    if graph_pass is not None:
        again = [
            draw(t.shape, t.stride(), t.dtype, seed) if isinstance(t, torch.Tensor) else t
            for seed, t in enumerate(reduced.inputs)
        ]
        checks = [reduced.failure.where] if reduced.failure.where in CHECKS else []
        if reduced.failure.is_like(find_failure(graph_pass, reduced.gm, again, checks)):
            use = drawn
    forward = code.src.replace("def forward(self, ", "def forward(").replace("(self)", "()")
    attributes = {n.target for n in reduced.gm.graph.find_nodes(op="get_attr")}
    if attributes:
        raise TritonOnlyError(
            f"reproducer: the graph reads constants ({', '.join(map(str, attributes))}) that a "
            "script cannot hold; pass them as inputs"
        )
    shown = {
        "numerics": "testing.assert_numerics(graph_pass, gm, inputs=inputs)",
        "meta": "testing.assert_meta(testing.run_pass(graph_pass, gm), inputs=inputs)",
        "mutation": "testing.assert_mutation_safe(graph_pass, gm, inputs=inputs)",
    }.get(reduced.failure.where, "testing.run_pass(graph_pass, gm)")
    inputs = "\n".join(f"    {text},  # {name}" for name, text in zip(names, use, strict=True))
    comment = "\n".join(f"# {line}" for line in render(reduced.gm).splitlines())
    return f'''"""{reduced.failure}"""

{_imports(code.globals, forward + inputs)}

from triton_only_backend import testing
{pass_import}

{comment}


{forward.strip()}


inputs = [
{inputs}
]
gm = testing.graph_of(forward, inputs)
{shown}
'''


def _imports(names: dict[str, Any], code: str) -> str:
    """What the generated code needs of the names that FX would import for it."""
    used = {name: value for name, value in names.items() if re.search(rf"\b{name}\b", code)}
    block = _format_import_block(used, sys_importer)
    lines = {line for line in block.splitlines() if line.strip()}
    return "\n".join(sorted({"import torch", *lines}))


def _draw_call(value: Any, seed: int) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"testing.draw({list(value.shape)}, {list(value.stride())}, {value.dtype}, seed={seed})"


def _write(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
    flat = value.as_strided((reach if value.numel() else 0,), (1,))
    numbers = repr(flat.tolist()).replace("nan", "float('nan')").replace("inf", "float('inf')")
    return (
        f"torch.tensor({numbers}, dtype={value.dtype})"
        f".as_strided({list(value.shape)}, {list(value.stride())})"
    )
