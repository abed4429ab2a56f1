"""The second witness: Inductor's output code, every call that is not one of its Triton kernels.

The code is parsed, never searched: comments and strings do not count; aliases, nested functions,
`getattr` and ops handed on as arguments do. Not followed: values taken out of containers (the op
is counted where it is put in), names set with `global`, and code that other modules define.
"""

from __future__ import annotations

import ast

from triton_only_backend.audit.code_calls import CodeCall as CodeCall
from triton_only_backend.audit.code_calls import CodeCalls, opaque
from triton_only_backend.audit.references import Resolver, Scope, children, origins, scope_of

# Functions of the output code that only run when someone benchmarks it.
_NOT_RUN = frozenset({"get_args", "benchmark_compiled_module"})


def audit_source(source: str) -> list[CodeCall]:
    """Lists what a piece of Inductor's output code runs, in the order of the code.

    Memory bookkeeping (`empty_strided_*`, `reinterpret_tensor`, `assert_size_stride`, …) is left
    out. Code that cannot be read (not Python, or a C++ wrapper) gives one `Provider.UNKNOWN` call
    of kind "opaque", because nothing is proven about it.
    """
    if not source.strip():
        return [opaque("empty output code", 0)]
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [opaque("output code that is not Python", error.lineno or 0)]
    calls = CodeCalls(origins(source))
    _Reader(calls).visit(tree, scope_of(tree, None))
    return calls.result()


class _Reader:
    """Walks the code once; the roles of expressions are those of `CodeCalls`."""

    def __init__(self, calls: CodeCalls) -> None:
        self._calls = calls
        self._resolver = Resolver()

    def visit(self, node: ast.AST, scope: Scope, role: str = "value") -> None:
        if isinstance(node, (ast.Name, ast.Attribute)):  # the most frequent first
            self._visit_name(node, scope, role)
        elif isinstance(node, ast.Constant):
            if node.end_lineno != node.lineno:
                self._calls.forget_comments(node)
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
            for child in children(node):
                self.visit(child, scope, "value" if child is getattr(node, "test", None) else role)
        elif isinstance(node, ast.Subscript):
            self.visit(node.value, scope, role)  # kernel[grid](…)
            self.visit(node.slice, scope)
        else:
            if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.MatMult):
                self._calls.add_op("@", "aten.matmul", "method", node)
            self._visit_children(node, scope)

    def _visit_children(self, node: ast.AST, scope: Scope) -> None:
        for child in children(node):
            if not isinstance(child, ast.Constant) or child.end_lineno != child.lineno:
                self.visit(child, scope)

    def _visit_definition(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda, scope: Scope
    ) -> None:
        name = getattr(node, "name", "")
        if name in _NOT_RUN and scope.parent is None:
            return
        inner = scope_of(node, scope)
        body: list[ast.AST] = [*node.body] if isinstance(node.body, list) else [node.body]
        for child in children(node):
            self.visit(child, inner if child in body else scope)

    def _visit_call(self, node: ast.Call, scope: Scope, role: str) -> None:
        for path in self._resolver.paths(node.func, scope):
            if path.startswith("async_compile."):
                self._calls.define_kernel(path.removeprefix("async_compile."), node)
            if path == "getattr" and len(node.args) >= 2:
                for found in self._resolver.paths(node, scope):
                    self._calls.use(found, node, role)
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
            self._calls.use(path, node, role)
        if isinstance(node, ast.Attribute) and not paths:
            if role == "call":
                self._calls.use_method(node.attr, node)
            self.visit(node.value, scope, "base")
        elif isinstance(node, ast.Attribute):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if not isinstance(root, ast.Name):  # async_compile.triton(…).run
                self.visit(root, scope, "base")


def _is_main_guard(node: ast.If) -> bool:
    test = node.test
    return (
        isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Name)
        and test.left.id == "__name__"
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value == "__main__"
    )
