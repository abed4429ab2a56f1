"""The second witness: Inductor's output code, every call that is not one of its Triton kernels.

The code is parsed, never searched: comments and strings do not count; aliases, nested functions,
`getattr` and ops handed on as arguments do. Not followed: values taken out of containers (the op
is counted where it is put in), names set with `global`, and code that other modules define.
"""

from __future__ import annotations

import ast
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from triton_only_backend.audit import policy
from triton_only_backend.audit.compiled_kernels import Kernel, read_kernel
from triton_only_backend.audit.policy import Provider, Reason, Verdict
from triton_only_backend.audit.references import (
    DYNAMIC,
    FOREIGN,
    KERNEL,
    Origin,
    Resolver,
    Scope,
    origins,
    scope_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Functions of the output code that only run when someone benchmarks it.
_NOT_RUN = frozenset({"get_args", "benchmark_compiled_module"})
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


def audit_source(source: str) -> list[CodeCall]:
    """Lists what a piece of Inductor's output code runs, in the order of the code.

    Memory bookkeeping (`empty_strided_*`, `reinterpret_tensor`, `assert_size_stride`, …) is left
    out. Code that cannot be read (not Python, or a C++ wrapper) gives one `Provider.UNKNOWN` call
    of kind "opaque", because nothing is proven about it.
    """
    if not source.strip():
        return [_opaque("empty output code", 0)]
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [_opaque("output code that is not Python", error.lineno or 0)]
    reader = _Reader(origins(source))
    reader.visit(tree, scope_of(tree, None))
    return reader.result()


def _opaque(name: str, line: int) -> CodeCall:
    return CodeCall(
        name=name,
        op=name,
        kind="opaque",
        provider=Provider.UNKNOWN,
        line=line,
        reason=Reason.OPAQUE_CODE,
        remedy=_OPAQUE_REMEDY,
    )


class _Reader:
    """Walks the code once; `role` says how an expression is used.

    "call": it is called; "value": it is stored, passed or returned; "alias": it is given a name,
    which the resolver follows; "base": an attribute of it is taken.
    """

    def __init__(self, origins: dict[int, Origin]) -> None:
        self._origins = origins
        self._resolver = Resolver()
        self._kernels: dict[str, Kernel] = {}
        self._launches: Counter[str] = Counter()
        self._calls: list[CodeCall] = []
        self._sites: set[int] = set()
        self._texts: list[ast.Constant] = []  # strings over several lines; they hold no comment

    def result(self) -> list[CodeCall]:
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
        for text in self._texts:
            for line in range(text.lineno, (text.end_lineno or text.lineno) + 1):
                self._origins.pop(line, None)
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

    def visit(self, node: ast.AST, scope: Scope, role: str = "value") -> None:
        if isinstance(node, (ast.Name, ast.Attribute)):  # the most frequent first
            self._visit_name(node, scope, role)
        elif isinstance(node, ast.Constant):
            if node.end_lineno != node.lineno:
                self._texts.append(node)
        elif isinstance(node, (ast.expr_context, ast.operator)):
            return
        elif isinstance(node, ast.Call):
            self._visit_call(node, scope, role)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            self._visit_definition(node, scope)
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            self._visit_children(node, scope_of(node, scope))
        elif isinstance(node, ast.If) and _is_main_guard(node):
            for statement in node.orelse:
                self.visit(statement, scope)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = not scope.is_class and all(isinstance(t, ast.Name) for t in targets)
            for target in targets:
                self.visit(target, scope)
            # a walrus has a value of its own: (f := op)(x)
            walrus = role if isinstance(node, ast.NamedExpr) else "alias"
            self.visit(node.value, scope, walrus if named else "value")
        elif isinstance(node, (ast.IfExp, ast.BoolOp)):
            for child in ast.iter_child_nodes(node):
                self.visit(child, scope, "value" if child is getattr(node, "test", None) else role)
        elif isinstance(node, ast.Subscript):
            self.visit(node.value, scope, role)  # kernel[grid](…)
            self.visit(node.slice, scope)
        else:
            if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.MatMult):
                self._add_op("@", "aten.matmul", "method", node)
            self._visit_children(node, scope)

    def _visit_children(self, node: ast.AST, scope: Scope) -> None:
        for child in ast.iter_child_nodes(node):
            self.visit(child, scope)

    def _visit_definition(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda, scope: Scope
    ) -> None:
        name = getattr(node, "name", "")
        if name in _NOT_RUN and scope.parent is None:
            return
        inner = scope_of(node, scope)
        body: list[ast.AST] = [*node.body] if isinstance(node.body, list) else [node.body]
        for child in ast.iter_child_nodes(node):
            self.visit(child, inner if child in body else scope)

    def _visit_call(self, node: ast.Call, scope: Scope, role: str) -> None:
        for path in self._resolver.paths(node.func, scope):
            if path.startswith("async_compile."):
                self._define_kernel(path.removeprefix("async_compile."), node)
            if path == "getattr" and len(node.args) >= 2:
                for found in self._resolver.paths(node, scope):
                    self._use(found, node, role)
                if self._resolver.paths(node.args[0], scope):
                    return
        self.visit(node.func, scope, "call")
        for child in [*node.args, *node.keywords]:
            self.visit(child, scope)

    def _visit_name(self, node: ast.Name | ast.Attribute, scope: Scope, role: str) -> None:
        if isinstance(node.ctx, (ast.Store, ast.Del)):
            return
        paths = self._resolver.paths(node, scope)
        for path in paths:
            self._use(path, node, role)
        if isinstance(node, ast.Attribute) and not paths:
            if role == "call":
                self._use_method(node.attr, node)
            self.visit(node.value, scope, "base")
        elif isinstance(node, ast.Attribute):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if not isinstance(root, ast.Name):  # async_compile.triton(…).run
                self.visit(root, scope, "base")

    def _use(self, path: str, node: ast.expr, role: str) -> None:
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
            self._add_op(path, ".".join(parts[2:5]), "op", node)
        elif path in ("torch.ops", "extern_kernels") or path.startswith("torch.ops."):
            if path != "torch.ops.load_library":
                self._add_opaque(path, node)
        elif path.startswith("extern_kernels."):
            op = _EXTERN_OPS.get(parts[1], f"aten.{parts[1]}")
            self._add_op(path, op, "extern", node)
        elif path in _RUN_CODE or any(_is_cpp_cache(part) for part in parts):
            self._add_opaque(path, node)
        elif parts[0] == "torch":
            self._use_torch_function(path, node, role)
        elif role == "call" and len(parts) > 1:
            self._use_method(parts[-1], node)

    def _use_torch_function(self, path: str, node: ast.expr, role: str) -> None:
        parts = path.split(".")
        for op in (f"aten.{'_'.join(parts[-2:])}", f"aten.{parts[-1]}"):  # torch.linalg.solve
            if policy.in_table(op):
                self._add_op(path, op, "op", node)
                return
        op = f"aten.{parts[-1]}"
        called = role == "call" and len(parts) == 2 and parts[1] not in _NOT_OPS
        if called and policy.exists(op) and policy.classify_call(op).is_violation:
            self._add_op(path, op, "op", node)
        elif role == "call" and path.startswith(_OPAQUE_MODULES):
            self._add_opaque(path, node)

    def _use_method(self, method: str, node: ast.expr) -> None:
        op = f"aten.{method}"
        if method in ("copy_", "item") or (method != "sort" and policy.in_table(op)):
            self._add_op(f"Tensor.{method}", op, "method", node)

    def _add_op(self, name: str, op: str, kind: str, node: ast.expr | ast.AugAssign) -> None:
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
        self._calls.append(_opaque(name, node.lineno))

    def _define_kernel(self, language: str, node: ast.Call) -> None:
        kernel = read_kernel(language, node)
        if kernel is not None:
            self._kernels[kernel.key] = kernel


def _is_main_guard(node: ast.If) -> bool:
    test = node.test
    return (
        isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Name)
        and test.left.id == "__name__"
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value == "__main__"
    )


def _is_cpp_cache(name: str) -> bool:
    return name.startswith("Cpp") and name.endswith("CodeCache")
