"""The backend: settings ► capture ► AOTAutograd ► passes ► Inductor ► audit ► callable."""

from __future__ import annotations

import collections
import functools
import itertools
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend import files, inductor, interpreter, settings
from triton_only_backend.errors import (
    DeviceError,
    SettingsError,
    TritonOnlyError,
    nearest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from triton_only_backend.audit import AuditReport, GraphOp
    from triton_only_backend.passes.pipeline import Stage
    from triton_only_backend.settings import Settings

log = logging.getLogger("triton_only_backend")

_serial = itertools.count()
KEPT_REPORTS = 256
_recent: collections.deque[AuditReport] = collections.deque(maxlen=KEPT_REPORTS)


def triton_only(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`torch.compile`'s backend. Not called by hand: `torch.compile(m, backend="triton_only")`.

    Raises, when the compiled function is first called:
        SettingsError: an unknown mode or option.
        DeviceError: tensors on a device that Triton cannot drive.
        AuditError: an operation is left to a library and `on_violation` is "error".
    """
    try:
        compilation = Compilation(settings.parse(mode, options))
        compiled = compilation.compile(gm, example_inputs)
        compilation.raise_for_violations()
    except TritonOnlyError as error:
        # Dynamo would wrap the error into its own, and suppress it under suppress_errors.
        return _raises(error)
    return compiled


triton_only.reset = inductor.reset_cudagraphs  # type: ignore[attr-defined]


def _raises(error: TritonOnlyError) -> Callable[..., Any]:
    def refused(*_: Any) -> Any:
        raise error

    return refused


def compiled_reports() -> list[AuditReport]:
    """Reports of the graphs compiled lately in this process, oldest first; KEPT_REPORTS at most."""
    return list(_recent)


@dataclass
class Compilation:
    """One Dynamo graph on its way to a callable. The backward comes later, on its first call."""

    settings: Settings
    serial: int = field(default_factory=lambda: next(_serial))
    reports: list[AuditReport] = field(default_factory=list)
    refused: list[GraphOp] = field(default_factory=list)

    def compile(
        self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """The compiled graph; `reports` holds the audit of what was compiled."""
        interpreted = check_devices(gm)
        from triton_only_backend.passes import pipeline
        from triton_only_backend.passes.decompositions import DECOMPOSITIONS

        for name in self.settings.disable_passes:
            if name not in pipeline.NAMES:
                raise SettingsError(
                    f"triton_only: no pass is named {name!r}{nearest(name, pipeline.NAMES)} "
                    f"(passes: {', '.join(pipeline.NAMES)})"
                )
        pipeline.run_stage("dynamo", gm, self.settings.disable_passes)
        from triton_only_backend import audit

        self.refused = [op for op in audit.audit_graph(gm) if op.refused]
        return inductor.compile_graph(
            gm,
            example_inputs,
            config=self._config(interpreted),
            decompositions=DECOMPOSITIONS,
            inner_compile=self._inner_compile,
        )

    def _config(self, interpreted: bool) -> dict[str, Any]:
        from triton_only_backend.passes import pipeline

        config = {**inductor.BASE_CONFIG, **self.settings.inductor}
        if interpreted:
            config.update(interpreter.INDUCTOR_CONFIG)
        elif config.get("max_autotune"):
            config = {**inductor.AUTOTUNE_CONFIG, **config}
        uuid = f"{pipeline.source_hash()}-{self.settings.key}"

        def add(hook: str, stage: Stage) -> None:
            def run(graph: torch.fx.Graph) -> None:
                pipeline.run_on_graph(stage, graph, self.settings.disable_passes)

            ours = inductor.graph_pass(stage, uuid, run)
            config[hook] = inductor.after(config.get(hook), ours)

        add("joint_custom_post_pass", "joint")
        add("post_grad_custom_post_pass", "sweep")
        return config

    def _inner_compile(
        self,
        compile_fx_inner: Callable[..., Any],
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        **kwargs: Any,
    ) -> Any:
        """Each aten graph: our passes, then Inductor, then the audit of both."""
        from triton_only_backend.passes import pipeline

        backward = kwargs.get("is_backward", False)
        kind = "inference" if kwargs.get("is_inference") else "backward" if backward else "forward"
        pipeline.run_stage("aten", gm, self.settings.disable_passes)
        from triton_only_backend import audit

        # Before Inductor, whose passes mutate the graph; they add nothing a library would run
        # that the generated code does not show.
        graph_ops = audit.audit_graph(gm)
        report = functools.partial(
            audit.AuditReport.from_graph,
            graph_ops,
            graph_name=f"graph {self.serial} ({kind})",
            allow=self.settings.allow,
            refused=() if backward else self.refused,
        )
        try:
            compiled = compile_fx_inner(gm, example_inputs, **kwargs)
        except inductor.inductor_error() as error:
            if inductor.is_missing_template(error):
                # The graph alone says which operation that was, and what to do.
                self._record(report(None))
                self.raise_for_violations()
            raise
        source = inductor.source_code(compiled)
        calls = None if source is None else audit.audit_source(source)
        self._record(report(calls, cudagraphs=inductor.cudagraphs(compiled)))
        if backward:
            # Compiled when the backward first runs, outside Dynamo: raised at once.
            self.raise_for_violations()
        return compiled

    def _record(self, report: AuditReport) -> None:
        self.reports.append(report)
        _recent.append(report)
        if not report.is_triton_only and self.settings.on_violation == "warn":
            log.warning("%s", report.to_text())
        if self.settings.report is not None:
            write_reports(Path(self.settings.report), report)

    def raise_for_violations(self) -> None:
        """Raises AuditError for the graphs compiled so far, if the settings say so."""
        if self.settings.on_violation == "error":
            for report in self.reports:
                report.raise_for_violations()


def check_devices(gm: torch.fx.GraphModule) -> bool:
    """Refuses devices that Triton cannot drive. Returns whether kernels are interpreted.

    Raises:
        DeviceError: naming the device and the remedy.
    """
    devices: dict[str, torch.device] = {}
    for node in gm.graph.nodes:
        for leaf in torch.utils._pytree.tree_leaves(node.meta.get("example_value")):
            if isinstance(leaf, torch.Tensor):
                devices.setdefault(leaf.device.type, leaf.device)
    for device in devices.values():
        if device.type not in ("cuda", "xpu", "cpu", "meta"):
            raise DeviceError(device)
    if set(devices) <= {"cpu", "meta"} and devices:
        if not interpreter.install_if_wanted():
            raise DeviceError(devices.get("cpu", next(iter(devices.values()))))
        interpreter.announce()
        return True
    return False


def write_reports(path: Path, report: AuditReport) -> None:
    """Adds a report to the JSON list in a file, which is replaced whole or not at all.

    Raises:
        SettingsError: the file holds something else, or cannot be written.
    """
    try:
        reports = json.loads(path.read_text()) if path.exists() else []
        if not isinstance(reports, list):
            raise ValueError("it holds no list")
        files.write_json(path, [*reports, report.to_dict()])
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"triton_only: option 'report' is {str(path)!r}, to which no report can be added "
            f"({error}); name a new file, or one that this backend wrote"
        ) from error


def audit_model(model: Callable[..., Any], *args: Any, **kwargs: Any) -> AuditReport:
    """Compiles and runs a model once and reports what it is made of; `tob.audit` is this.

    Args:
        model: a module or function, compiled or not.
        args, kwargs: its arguments, as it would be called. It is run once, so arguments that it
            mutates (a KV cache) are mutated.

    Returns:
        The report over all graphs; with a gradient to come, of the backward too.
    """
    return audit_with(model, args, kwargs)


def audit_with(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> AuditReport:
    """`audit_model` with `mode`, `options` and `dynamic` as `torch.compile` takes them.

    Raises:
        SettingsError: an unknown mode or option.
    """
    from triton_only_backend.audit import AuditReport

    parsed = settings.parse(mode, {**(options or {}), "on_violation": "ignore"})
    model = getattr(model, "_orig_mod", model)
    kwargs = dict(kwargs or {})
    collected: list[Compilation] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compilation = Compilation(parsed)
        collected.append(compilation)
        try:
            return compilation.compile(gm, example_inputs)
        except TritonOnlyError as error:
            return _raises(error)

    breaks_before = inductor.graph_breaks()
    compiled = inductor.compile_apart(model, backend=backend, dynamic=dynamic)
    _run_backward(compiled(*args, **kwargs), inputs=(args, kwargs))
    return AuditReport.merge(
        [report for compilation in collected for report in compilation.reports],
        graph_breaks=inductor.graph_breaks(since=breaks_before),
    )


def _run_backward(output: Any, inputs: Any) -> None:
    """Runs the backward, whose graph is compiled only then, without touching any `.grad`.

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
    if tensors and ends:
        grads = [torch.ones_like(t) for t in tensors]
        torch.autograd.grad(tensors, list(ends.values()), grads, allow_unused=True)


def _with_gradient(tree: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
