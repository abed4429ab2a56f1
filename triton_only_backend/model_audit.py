"""The audit of a whole model: compile it, run it once, forward and backward, and gather."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend import inductor, settings
from triton_only_backend.backend import Compilation, raising
from triton_only_backend.errors import TritonOnlyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from triton_only_backend.audit import AuditReport


def audit_model(
    model: Callable[..., Any] | torch.export.ExportedProgram, *args: Any, **kwargs: Any
) -> AuditReport:
    """Compiles and runs a model once and reports what it is made of; `tob.audit` is this.

    Args:
        model: a module or function, compiled or not, or a `torch.export.ExportedProgram`.
        args, kwargs: its arguments, as it would be called; an exported program's example inputs
            if left out. It is run once, so arguments that it mutates (a KV cache) are mutated.

    Returns:
        The report over all graphs; with a gradient to come, of the backward too.
    """
    return audit_with(model, args, kwargs)


def audit_with(
    model: Callable[..., Any] | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    target: str | None = None,
) -> AuditReport:
    """`audit_model` with `mode`, `options` and `dynamic` as `torch.compile` takes them.

    Args:
        target: "cuda:90" for a model on the CPU as it would be compiled for such a GPU, which need
            not be there. The graphs then run uncompiled, with our ops in the interpreter.

    Raises:
        SettingsError: an unknown mode, option or target.
    """
    from triton_only_backend.audit import AuditReport, eager_ops

    parsed = settings.parse(mode, {**(options or {}), "on_violation": "ignore"})
    capability = None
    if target is not None:
        from triton_only_backend import inductor_target

        capability = inductor_target.parse(target)
    kwargs = dict(kwargs or {})
    if isinstance(model, torch.export.ExportedProgram):
        if not args and not kwargs and model.example_inputs is not None:
            args, kwargs = model.example_inputs
        model = model.module()
    model = getattr(model, "_orig_mod", model)
    collected: list[Compilation] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compilation = Compilation(parsed, target=capability)
        collected.append(compilation)
        try:
            return compilation.compile(gm, example_inputs)
        except TritonOnlyError as error:
            return raising(error)

    breaks = inductor.GraphBreaks()
    compiled = inductor.compile_apart(model, backend=backend, dynamic=dynamic)
    eager = eager_ops.EagerOps()
    with inductor.cudagraph_skips() as skips:
        with eager:
            output = compiled(*args, **kwargs)
        backward = _backward_of(output, inputs=(args, kwargs))
        with eager:
            backward()
    reports = [report for compilation in collected for report in compilation.reports]
    if eager.ops:
        reports.append(eager.report(parsed.allow))
    environment = {} if target is None else {"target": target}
    return AuditReport.merge(
        reports,
        graph_breaks=breaks.reasons(),
        environment=environment,
        cudagraphs={"on": True, "skipped": skips} if skips else None,
    )


def _backward_of(output: Any, inputs: Any) -> Callable[[], object]:
    """What runs the backward, whose graph is compiled only then, without touching any `.grad`.

    It ends at the inputs and at the parameters: a graph that the inputs come from is not run.
    """
    tensors = _with_gradient(output)
    tensors = [t for t in tensors if t.grad_fn is not None]
    ends = {id(t): t for t in _with_gradient(inputs)}
    made_by = {t.grad_fn for t in ends.values()}
    stack = [t.grad_fn for t in tensors]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or node in made_by:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # accumulates into a leaf
            ends[id(node.variable)] = node.variable
        stack += [parent for parent, _ in node.next_functions]
    if not tensors or not ends:
        return lambda: None
    grads = [torch.ones_like(t) for t in tensors]
    return functools.partial(
        torch.autograd.grad, tensors, list(ends.values()), grads, allow_unused=True
    )


def _with_gradient(tree: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
