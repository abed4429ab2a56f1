"""Small graphs by hand, with dtypes, shapes and strides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from triton_only_backend.errors import TritonOnlyError
from triton_only_backend.testing import private
from triton_only_backend.testing.rendering import describe, value

if TYPE_CHECKING:
    from collections.abc import Sequence


class BuildError(TritonOnlyError):
    """An operation of a hand-built graph does not take what it is given."""


class GraphBuilder:
    """Builds an aten graph node by node; each node's fake value is there at once.

        b = GraphBuilder()
        x = b.input("x", (4, 8))
        w = b.input("w", (16, 8), torch.bfloat16, strides=(1, 16))
        y = b.call(torch.ops.aten.mm.default, x, b.call(torch.ops.aten.t.default, w))
        gm = b.output(y)

    Args:
        device: where inputs are unless they say otherwise. No such device is needed.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.graph = torch.fx.Graph()
        self.device = device
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._sizes: dict[str, torch.SymInt] = {}

    def size(self, name: str, hint: int = 7) -> torch.SymInt:
        """A symbolic size; the same name is the same size. `hint` is the size it is traced with."""
        if name not in self._sizes:
            self._sizes[name] = private.symbolic_size(self.mode, name, hint)
        return self._sizes[name]

    def input(
        self,
        name: str,
        shape: Sequence[int | torch.SymInt],
        dtype: torch.dtype = torch.float32,
        *,
        strides: Sequence[int | torch.SymInt] | None = None,
        device: str | None = None,
    ) -> torch.fx.Node:
        """An input, contiguous unless `strides` (in elements, 0 for a broadcast) are given."""
        node = self.graph.placeholder(name)
        device = device or self.device
        with self.mode:
            node.meta["val"] = (
                torch.empty(tuple(shape), dtype=dtype, device=device)
                if strides is None
                else torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device=device)
            )
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        """A call of an op (an overload, or a packet's default) or of a function of tensors.

        Raises:
            BuildError: it does not take these operands.
        """
        if isinstance(target, torch._ops.OpOverloadPacket):
            target = target.default if "default" in target.overloads() else target
        fake_args, fake_kwargs = torch.fx.map_arg((args, kwargs), value)
        with self.mode, torch.no_grad():
            try:
                result = target(*fake_args, **fake_kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                operands = [describe(value(a)) or repr(a) for a in (*args, *kwargs.values())]
                reason = str(error).strip().partition("\n")[0]
                raise BuildError(f"{target}({', '.join(operands)}): {reason}") from error
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = result
        return node

    def output(self, *results: Any) -> torch.fx.GraphModule:
        """Ends the graph: one node, or several as a tuple."""
        self.graph.output(results[0] if len(results) == 1 else results)
        self.graph.lint()
        return torch.fx.GraphModule(torch.nn.Module(), self.graph)
