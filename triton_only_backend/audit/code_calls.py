"""What a name in Inductor's output code runs: an op, a kernel, code that cannot be read, nothing.

`generated_code` walks the code and says how a name is used; which op that is, and who runs it, is
said here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from triton_only_backend.audit import policy
from triton_only_backend.audit.compiled_kernels import Kernel, read_kernel
from triton_only_backend.audit.policy import Provider, Reason, Verdict
from triton_only_backend.audit.references import DYNAMIC, FOREIGN, KERNEL

if TYPE_CHECKING:
    import ast
    from collections.abc import Iterable, Iterator

    from triton_only_backend.audit.references import Origin

# Functions that run code which is not in front of us.
_RUN_CODE = frozenset({"exec", "eval", "compile", "torch.compile"})
_OPAQUE_MODULES = ("torch.nn.", "torch.special.", "torch.sparse.", "torch.jit.")
# extern_kernels names that are not the name of an aten op.
_EXTERN_OPS = {"_mm_plus_mm": "inductor._mm_plus_mm", "mm_plus_mm": "inductor._mm_plus_mm"}
# Functions of torch that share a name with an op of TorchScript and launch nothing.
_NOT_OPS = frozenset({"device", "tensor", "as_tensor", "Size", "dtype"})
_OPAQUE_REMEDY = 'leave the option "cpp_wrapper" off, so that Inductor writes Python'


@dataclass(frozen=True)
class CodeCall:
    """One call site in the output code, or one compiled kernel with all its launches.

    Attributes:
        name: as the code has it, aliases resolved: "extern_kernels.addmm",
            "torch.ops.aten.sort.stable".
        op: the op behind it: "aten.addmm", "aten.sort.stable"; a kernel's own name.
        kind: "extern", "op", "kernel", "method" or "opaque".
        provider: who runs it.
        count: launches of a kernel; 1 for a call site.
        line: where, in the output code.
        reason, remedy: as for `GraphOp`.
        source_nodes, original_aten: the comment that Inductor wrote above it, taken apart.
    """

    name: str
    op: str
    kind: str
    provider: Provider
    count: int = 1
    line: int = 0
    reason: Reason | None = None
    remedy: str = ""
    source_nodes: tuple[str, ...] = ()
    original_aten: tuple[str, ...] = ()

    @property
    def is_violation(self) -> bool:
        """Whether the call breaks "Triton only", before anything is allowed."""
        return self.provider.is_violation


def opaque(name: str, line: int) -> CodeCall:
    """A call of which nothing is known."""
    return CodeCall(
        name=name,
        op=name,
        kind="opaque",
        provider=Provider.UNKNOWN,
        line=line,
        reason=Reason.OPAQUE_CODE,
        remedy=_OPAQUE_REMEDY,
    )


class CodeCalls:
    """The calls and launches found so far; `role` says how an expression is used.

    "call": it is called; "value": it is stored, passed or returned; "alias": it is given a name,
    which the resolver follows; "base": an attribute of it is taken.
    """

    def __init__(self, origins: dict[int, Origin]) -> None:
        self._origins = origins
        self._kernels: dict[str, Kernel] = {}
        self._launches: Counter[str] = Counter()
        self._calls: list[CodeCall] = []
        self._sites: set[int] = set()

    def result(self) -> list[CodeCall]:
        """All of them in the order of the code, each with the comment that Inductor wrote."""
        kernels = [
            CodeCall(
                name=k.name,
                op=k.name,
                kind="kernel",
                provider=k.provider,
                count=max(self._launches[key], int(k.provider.is_violation)),
                line=k.line,
                reason=k.reason,
                remedy=k.remedy,
            )
            for key, k in self._kernels.items()
        ]
        self._sites |= {kernel.line for kernel in kernels}
        calls = self._with_origins([*kernels, *self._calls])
        return sorted(calls, key=lambda call: call.line)

    def _with_origins(self, calls: Iterable[CodeCall]) -> Iterator[CodeCall]:
        """Attaches the nearest comment above a call, unless another call stands between."""
        comments, sites = sorted(self._origins), sorted(self._sites)
        for call in calls:
            above = bisect_left(comments, call.line)
            nearest = comments[above - 1] if above else call.line
            if bisect_right(sites, nearest) < bisect_left(sites, call.line) or not above:
                yield call
                continue
            origin = self._origins[nearest]
            yield replace(
                call, source_nodes=origin.source_nodes, original_aten=origin.original_aten
            )

    def forget_comments(self, text: ast.Constant) -> None:
        """A string over several lines holds no comment."""
        for line in range(text.lineno, (text.end_lineno or text.lineno) + 1):
            self._origins.pop(line, None)

    def use(self, path: str, node: ast.expr, role: str) -> None:
        """Records what using `path` in this way runs, if anything."""
        if role not in ("call", "value"):
            return
        parts = path.split(".")
        if path.startswith(KERNEL):
            if len(parts) == 1 or parts[1:] == ["run"]:
                self._launches[parts[0]] += 1
                self._sites.add(node.lineno)
        elif path.startswith(FOREIGN):
            if role == "call":
                self._add_opaque(path.removeprefix(FOREIGN), node)
        elif path.startswith("torch.ops.") and len(parts) >= 4:
            self.add_op(path, ".".join(parts[2:5]), "op", node)
        elif path in ("torch.ops", "extern_kernels") or path.startswith("torch.ops."):
            if path != "torch.ops.load_library":
                self._add_opaque(path, node)
        elif path.startswith("extern_kernels."):
            op = _EXTERN_OPS.get(parts[1], f"aten.{parts[1]}")
            self.add_op(path, op, "extern", node)
        elif path in _RUN_CODE or _names_cpp_cache(path):
            self._add_opaque(path, node)
        elif parts[0] == "torch":
            self._use_torch_function(path, node, role)
        elif role == "call" and len(parts) > 1:
            self.use_method(parts[-1], node)

    def _use_torch_function(self, path: str, node: ast.expr, role: str) -> None:
        parts = path.split(".")
        for op in (f"aten.{'_'.join(parts[-2:])}", f"aten.{parts[-1]}"):  # torch.linalg.solve
            if policy.in_table(op):
                self.add_op(path, op, "op", node)
                return
        op = f"aten.{parts[-1]}"
        called = role == "call" and len(parts) == 2 and parts[1] not in _NOT_OPS
        if called and policy.exists(op) and policy.classify_call(op).is_violation:
            self.add_op(path, op, "op", node)
        elif role == "call" and path.startswith(_OPAQUE_MODULES):
            self._add_opaque(path, node)

    def use_method(self, method: str, node: ast.expr) -> None:
        """Records a call of a method of something, which may be a tensor."""
        op = f"aten.{method}"
        if method in ("copy_", "item") or (method != "sort" and policy.in_table(op)):
            self.add_op(f"Tensor.{method}", op, "method", node)

    def add_op(self, name: str, op: str, kind: str, node: ast.expr | ast.AugAssign) -> None:
        """Records a call of `op`, which the code calls `name`."""
        verdict = policy.classify_call(op)
        if DYNAMIC in op:
            verdict = Verdict(Provider.UNKNOWN, Reason.OPAQUE_CODE)
        self._sites.add(node.lineno)
        self._calls.append(
            CodeCall(
                name=name,
                op=op,
                kind=kind,
                provider=verdict.provider,
                line=node.lineno,
                reason=verdict.reason,
                remedy=verdict.remedy,
            )
        )

    def _add_opaque(self, name: str, node: ast.expr) -> None:
        self._sites.add(node.lineno)
        self._calls.append(opaque(name, node.lineno))

    def define_kernel(self, language: str, node: ast.Call) -> None:
        """Records a kernel that the code defines; it counts when it is launched."""
        kernel = read_kernel(language, node)
        if kernel is not None:
            self._kernels[kernel.key] = kernel


def _names_cpp_cache(path: str) -> bool:
    return "CodeCache" in path and any(
        name.startswith("Cpp") and name.endswith("CodeCache") for name in path.split(".")
    )
