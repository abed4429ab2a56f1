"""The first witness: the aten graph after the passes, each op against the policy.

A flagged op is one that Inductor is likely to hand to a library. The generated code has the last
word (a convolution may still become a Triton template); the graph knows the shapes, the module
and the source line.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triton_only_backend.audit import policy
from triton_only_backend.audit.places import source_line as source_line
from triton_only_backend.audit.policy import Provider, Reason, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from torch.fx import GraphModule, Node

REFUSAL_KEY = "triton_only_refusal"


@dataclass(frozen=True)
class GraphOp:
    """One op of a graph.

    Attributes:
        name: the FX node, prefixed by its subgraph ("true_graph_0/mm").
        op: "aten.mm.default".
        provider: who would run it on CUDA.
        reason: why it is not Triton; None where it is no violation.
        detail: the facts of a refusal by a pass, such as "fp64 operands".
        remedy: what to do about it.
        inputs, outputs: "bf16[2, 4096]" for each tensor.
        dtypes: the distinct dtypes, inputs first.
        module_path: "model.layers.0.mlp.up_proj", or "" outside any submodule.
        source_line: "model.py:12 in forward: y = self.l(x)", or "" where none was recorded.
        source_nodes: names by which Inductor's comments call this op.
        refused: the name of the reason for which a pass declined to rewrite it, "" if none did.
    """

    name: str
    op: str
    provider: Provider
    reason: Reason | None = None
    detail: str = ""
    remedy: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    module_path: str = ""
    source_line: str = ""
    source_nodes: tuple[str, ...] = ()
    refused: str = ""

    @property
    def is_violation(self) -> bool:
        """Whether the op breaks "Triton only", before anything is allowed."""
        return self.provider.is_violation

    @property
    def shapes(self) -> str:
        """`bf16[2, 4096], bf16[4096, 64] -> bf16[2, 64]`."""
        return f"{', '.join(self.inputs)} -> {', '.join(self.outputs)}".strip()


def audit_graph(gm: GraphModule) -> list[GraphOp]:
    """Judges every op of a graph and of the subgraphs that its control flow runs.

    Python's own operators (getitem, arithmetic on sizes) launch nothing and are left out; every
    other node is listed, `Provider.UNKNOWN` when nothing is known of it.
    """
    return list(_Reader().walk(gm, ""))


def refused_ops(gm: GraphModule) -> list[GraphOp]:
    """The ops alone of a graph, and of those nested in it, that a pass declined to rewrite."""
    from torch.fx import GraphModule

    return [
        _graph_op(node)
        for module in gm.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
        if REFUSAL_KEY in node.meta
    ]


class _Reader:
    """Reads one graph; each op is judged once."""

    def __init__(self) -> None:
        self._visited: set[int] = set()
        self._verdicts: dict[str, Verdict] = {}

    def walk(self, gm: GraphModule, prefix: str) -> Iterator[GraphOp]:
        self._visited.add(id(gm))
        for node in gm.graph.nodes:
            if node.op == "call_function" and not _is_python_operator(node.target):
                op = _wrapped_op(node) or policy.op_name(node.target)
                yield _describe(node, prefix, op, self._classify(op))
                yield from self._walk_subgraphs(gm, node, prefix)
            elif node.op in ("call_module", "call_method"):
                name = f"{node.op}.{node.target}"
                yield _describe(node, prefix, name, Verdict(Provider.UNKNOWN, Reason.UNKNOWN_OP))

    def _classify(self, op: str) -> Verdict:
        if op not in self._verdicts:
            self._verdicts[op] = policy.classify(op)
        return self._verdicts[op]

    def _walk_subgraphs(self, gm: GraphModule, node: Node, prefix: str) -> Iterator[GraphOp]:
        from torch.fx import GraphModule

        constants = [argument for argument in node.all_input_nodes if argument.op == "get_attr"]
        if not constants or self._classify(policy.op_name(node.target)).provider.is_triton:
            return  # score_mod and combine_fn are compiled into their Triton kernel
        for argument in constants:
            submodule = _attribute(gm, str(argument.target))
            if isinstance(submodule, GraphModule) and id(submodule) not in self._visited:
                yield from self.walk(submodule, f"{prefix}{argument.target}/")


def _attribute(gm: GraphModule, path: str) -> object:
    value: object = gm
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _is_python_operator(target: object) -> bool:
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__name__", "")
    if module in ("_operator", "operator", "math", "builtins"):
        return name not in ("matmul", "imatmul")
    return module == "torch" and name.startswith(("sym_", "_sym_"))


def _graph_op(node: Node) -> GraphOp:
    op = _wrapped_op(node) or policy.op_name(node.target)
    return _describe(node, "", op, policy.classify(op))


def _wrapped_op(node: Node) -> str | None:
    """The op that auto_functionalized(op, …), with_effects(token, op, …) and their like run."""
    import torch

    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    for argument in node.args:
        if isinstance(argument, torch._ops.OpOverload):
            return policy.op_name(argument)
    return None


def _describe(node: Node, prefix: str, op: str, verdict: Verdict) -> GraphOp:
    tensors = list(tensors_in([n.meta.get("val") for n in node.all_input_nodes]))
    results = list(tensors_in(node.meta.get("val")))
    reason, detail, remedy, refused = verdict.reason, "", verdict.remedy, ""
    refusal = node.meta.get(REFUSAL_KEY)
    if refusal is not None:
        refused = str(refusal.get("reason") or Reason.REFUSED_BY_PASS.name)
        kind = str(refusal.get("kind") or refused)
        reason = Reason.__members__.get(kind, Reason.REFUSED_BY_PASS)
        detail = str(refusal.get("detail") or refused)
        remedy = str(refusal.get("remedy") or verdict.remedy)
    origins = node.meta.get("from_node") or ()
    return GraphOp(
        name=f"{prefix}{node.name}",
        op=op,
        provider=verdict.provider,
        reason=reason,
        detail=detail,
        remedy=remedy,
        inputs=tuple(tensor_text(t) for t in tensors),
        outputs=tuple(tensor_text(t) for t in results),
        dtypes=dtypes_of([*tensors, *results]),
        module_path=module_path(node),
        source_line=source_line(str(node.meta.get("stack_trace") or "")),
        source_nodes=tuple(dict.fromkeys([*(str(o.name) for o in origins[:1]), node.name])),
        refused=refused,
    )


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def dtypes_of(tensors: Iterable[torch.Tensor]) -> tuple[str, ...]:
    """Their distinct dtypes: "bf16", "i64"."""
    return tuple(dict.fromkeys([_dtype_text(tensor.dtype) for tensor in tensors]))


@functools.cache
def _dtype_text(dtype: torch.dtype) -> str:
    """bfloat16 -> bf16, float8_e4m3fn -> f8e4m3fn, int64 -> i64, bool stays."""
    name = str(dtype).removeprefix("torch.")
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i")):
        if name.startswith(long):
            return short + name.removeprefix(long).replace("_", "")
    return name.replace("complex", "c")


def tensor_text(tensor: torch.Tensor) -> str:
    """`bf16[2, 4096]`."""
    return f"{_dtype_text(tensor.dtype)}[{', '.join(map(str, tensor.shape))}]"


def module_path(node: Node) -> str:
    """The innermost module of `nn_module_stack`: "model.layers.0.mlp.up_proj"."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    stack = stack or node.meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return ""
    innermost = list(stack.values())[-1]
    path = innermost[0] if isinstance(innermost, list | tuple) else innermost
    return clean_module_path(str(path))


@functools.lru_cache(maxsize=4096)
def clean_module_path(path: str) -> str:
    """`L['self'].layers.0`, `L['self']._modules['layers']._modules['0']` -> `layers.0`."""
    path = re.sub(r"^L\[(['\"])\w+\1\]", "", path)
    path = re.sub(r"\.?(?:_modules)?\[(['\"]?)([^'\"\]]+)\1\]", r".\2", path)
    path = path.replace("._modules.", ".").replace("._orig_mod", "")
    return path.strip(".")
