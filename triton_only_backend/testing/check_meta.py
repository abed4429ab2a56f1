"""Are the fake values true that a pass leaves on its nodes: functions that raise AssertionError."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves

from triton_only_backend.testing import private
from triton_only_backend.testing.capturing import placeholder_values
from triton_only_backend.testing.rendering import describe, target_name, value
from triton_only_backend.testing.running import (
    PassRun,
    clone,
    concrete,
    flat_outputs,
    random_inputs,
    runnable,
    sizes_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def assert_meta(
    run: PassRun | torch.fx.GraphModule,
    *,
    inputs: Sequence[Any] | None = None,
    execute: bool = True,
    same_outputs: bool = True,
) -> None:
    """Asserts that each node's fake value is true: dtype, shape, strides, device.

    It is compared with what the fake kernels give for the node's arguments and, with `execute`,
    with what the ops really return on (random) inputs. The outputs must be what they were before
    the pass, strides included.

    Args:
        same_outputs: compare them; not asked of a lone graph.
    """
    after = run.after if isinstance(run, PassRun) else run
    _assert_fake_values(after)
    if isinstance(run, PassRun) and same_outputs:
        pairs = (flat_outputs(g.graph.output_node().args[0]) for g in (run.before, run.after))
        for i, (old, new) in enumerate(zip(*pairs, strict=True)):
            _assert_same(f"output {i}", value(new), value(old), "before the pass")
    if execute:
        _assert_real_values(after, random_inputs(after) if inputs is None else inputs)


def _assert_fake_values(gm: torch.fx.GraphModule) -> None:
    values = placeholder_values(gm)
    recorded = {}
    for node in gm.graph.nodes:
        if node.op.startswith("call"):
            recorded[node.name] = value(node)
            if recorded[node.name] is None and not _is_effect(node):
                raise AssertionError(
                    f"{node.name} ({target_name(node)}) has no meta['val']; a pass must give each "
                    "node that it makes one"
                )
    modes = [v.fake_mode for v in tree_leaves([*values, list(recorded.values())])
             if hasattr(v, "fake_mode")]  # fmt: skip
    copy = private.copy_graph(gm.graph, gm)
    if not modes:
        return
    if any(mode is not modes[0] for mode in modes):
        raise AssertionError("the fake values belong to several fake modes; a pass must use V's")
    FakeTensorProp(copy, modes[0]).propagate_dont_convert_inputs(*values)
    for node in copy.graph.nodes:
        if node.name in recorded:
            _assert_same(
                f"{node.name} ({target_name(node)})",
                recorded[node.name],
                node.meta.get("val"),
                "by its fake kernel",
            )


def _is_effect(node: torch.fx.Node) -> bool:
    return not node.users


def _assert_same(name: str, said: Any, true: Any, source: str) -> None:
    old, new = flat_outputs(said), flat_outputs(true)
    if [_facts(v) for v in old] != [_facts(v) for v in new]:
        raise AssertionError(
            f"meta['val'] of {name} says {_full(said)}, {source} it is {_full(true)}"
        )


def _full(val: Any) -> str:
    leaves = flat_outputs(val)
    return ", ".join(
        f"{describe(v, device=True)} strides {list(v.stride())}"
        if isinstance(v, torch.Tensor) and v.layout == torch.strided
        else describe(v)
        for v in leaves
    )


def _facts(val: Any, sizes: Mapping[str, int] | None = None) -> Any:
    if not isinstance(val, torch.Tensor):
        return type(val).__name__
    number: Callable[[Any], Any] = str if sizes is None else (lambda size: concrete(size, sizes))
    shape = [number(size) for size in val.shape]
    if val.layout != torch.strided:
        return str(val.dtype), shape, str(val.layout)
    # The stride of a dimension of one, or of an empty tensor, means nothing.
    strides = [
        number(stride)
        for size, stride in zip(shape, val.stride(), strict=True)
        if str(size) != "1" and "0" not in map(str, shape)
    ]
    return str(val.dtype), [str(s) for s in shape], [str(s) for s in strides], val.device.type


class _Recorder(torch.fx.Interpreter):
    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm)
        self.sizes: dict[str, int] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op.startswith("call") and value(n) is not None:
            said, real = (
                [_facts(v, self.sizes) for v in flat_outputs(x) if isinstance(v, torch.Tensor)]
                for x in (value(n), result)
            )
            if said != real:
                raise AssertionError(
                    f"meta['val'] of {n.name} ({target_name(n)}) says {_full(value(n))}, but the "
                    f"op returned {_full(result)}"
                )
        return result


def _assert_real_values(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> None:
    recorder = _Recorder(runnable(gm))
    recorder.sizes = _sizes_from(gm, inputs)
    with torch.no_grad():
        recorder.run(*clone(inputs))


def _sizes_from(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """The symbols' numbers in real inputs, where an input has a symbol for a size."""
    found = dict(sizes_of(gm))
    for fake, real in zip(placeholder_values(gm), inputs, strict=True):
        fakes = [*fake.shape] if isinstance(fake, torch.Tensor) else [fake]
        reals = [*real.shape] if isinstance(real, torch.Tensor) else [real]
        for size, number in zip(fakes, reals, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found[str(size.node.expr)] = int(number)
    return found
