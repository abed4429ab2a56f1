"""The ops that run between a model's graphs: what graph breaks leave to PyTorch's own kernels."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

from triton_only_backend import interpreter
from triton_only_backend.audit import policy
from triton_only_backend.audit.graph import GraphOp, dtypes_of, tensor_text, tensors_in
from triton_only_backend.audit.places import is_torch_file, line_of_frame
from triton_only_backend.audit.policy import Provider, Reason
from triton_only_backend.audit.report import AuditReport

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

    import torch

GRAPH = "eager, between the graphs"
_REMEDY = 'mend the graph break that leaves it out of the graphs, or allow=["{op}*"] lets it stay'
# Whatever these call belongs to a compiled graph (AOTAutograd's wrappers, Inductor's output code),
# or to a kernel, whose arguments Triton's interpreter copies.
_COMPILED = (
    f"{os.sep}_functorch{os.sep}_aot_autograd{os.sep}",
    f"{os.sep}_inductor{os.sep}",
    f"{os.sep}triton{os.sep}runtime{os.sep}",
)
_OURS = __name__.split(".")[0]


class EagerOps(TorchDispatchMode):
    """Notes each op that is dispatched outside of compiled graphs while it is active.

    torch.compile compiles as if it were not there. What compiled code calls is left out (the other
    proofs read it), and so is what this package calls, what runs on the CPU beside a GPU, and what
    computes nothing.

    Attributes:
        ops: in the order in which they ran.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[GraphOp] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compilation goes on as without the mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = policy.op_name(func)
        provider = policy.eager_provider(name)
        if provider is Provider.NONE or provider.is_triton:
            return result
        operands, results = list(tensors_in([args, kwargs])), list(tensors_in(result))
        is_compiled, frame = _caller()
        if is_compiled or not _is_on_device([*operands, *results]):
            return result
        violation = provider.is_violation
        op = GraphOp(
            name=name,
            op=name,
            provider=provider,
            reason=Reason.EAGER if violation else None,
            detail="called by autograd" if violation and frame is None else "",
            remedy=_REMEDY.format(op=policy.packet(name)) if violation else "",
            inputs=tuple(map(tensor_text, operands)),
            outputs=tuple(map(tensor_text, results)),
            dtypes=dtypes_of([*operands, *results]),
            source_line="" if frame is None else line_of_frame(frame),
        )
        self.ops.append(op)
        return result

    def report(self, allow: Iterable[str] = ()) -> AuditReport:
        """What they make up. It counts as no graph: nothing was compiled."""
        report = AuditReport.from_graph(self.ops, None, graph_name=GRAPH, allow=allow)
        return replace(report, graphs=[])


def _caller() -> tuple[bool, FrameType | None]:
    """Whether compiled code is calling, and the innermost frame of the user's code, if any.

    The backward of eager code is called by autograd, on behalf of no line in particular.
    """
    frame: FrameType | None = sys._getframe(2)
    innermost: FrameType | None = None
    while frame is not None:
        path = frame.f_code.co_filename
        if any(folder in path for folder in _COMPILED):
            return True, None
        if not is_torch_file(path):
            innermost = innermost or frame
        frame = frame.f_back
    if innermost is None or innermost.f_globals.get("__name__", "").split(".")[0] == _OURS:
        return False, None
    return False, innermost


def _is_on_device(tensors: list[torch.Tensor]) -> bool:
    """Whether one of them is where Triton's kernels run; the CPU is, under the interpreter."""
    return interpreter.is_installed() or any(tensor.device.type != "cpu" for tensor in tensors)
