"""The backend: settings ► capture ► AOTAutograd ► passes ► Inductor ► audit ► callable."""

from __future__ import annotations

import collections
import functools
import itertools
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triton_only_backend import (
    files,
    inductor,
    inductor_launch,
    inductor_mends,
    interpreter,
    settings,
)
from triton_only_backend.errors import (
    DeviceError,
    SettingsError,
    TritonOnlyError,
    nearest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from triton_only_backend.audit import AuditReport, GraphOp
    from triton_only_backend.passes.pipeline import PassResult, Stage
    from triton_only_backend.settings import Settings

log = logging.getLogger("triton_only")

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
        return raising(error)
    return compiled


triton_only.reset = inductor.reset_cudagraphs  # type: ignore[attr-defined]


def raising(error: TritonOnlyError) -> Callable[..., Any]:
    """What stands in for a graph that was refused: it raises when it is called."""

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
    target: int | None = None  # the capability of a CUDA device that is not there
    passes: list[PassResult] = field(default_factory=list)
    seeded: set[torch.device] = field(default_factory=set)
    lasting: list[bool] = field(default_factory=list)

    def compile(
        self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """The compiled graph; `reports` holds the audit of what was compiled."""
        interpreted = check_devices(gm)
        self.lasting = inductor.attribute_inputs(gm)
        from triton_only_backend.passes import pipeline
        from triton_only_backend.passes.decompositions import DECOMPOSITIONS

        for name in self.settings.disable_passes:
            if name not in pipeline.NAMES:
                raise SettingsError(
                    f"triton_only: no pass is named {name!r}{nearest(name, pipeline.NAMES)} "
                    f"(passes: {', '.join(pipeline.NAMES)})"
                )
        self.passes += pipeline.run_stage("dynamo", gm, self.settings.left_out)
        from triton_only_backend import audit

        self.refused = audit.refused_ops(gm)
        compiled = inductor.compile_graph(
            gm,
            example_inputs,
            config=self._config(interpreted),
            decompositions=DECOMPOSITIONS,
            inner_compile=self._inner_compile,
        )
        return self._following_generators(compiled)

    def _following_generators(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """A graph that draws seeds takes them from where PyTorch's generators stand at the call."""

        def call(*args: Any) -> Any:
            if not self.seeded:
                return compiled(*args)
            from triton_only_backend.kernels import random_seeds

            with random_seeds.following_generator(self.seeded):
                return compiled(*args)

        return call

    def _config(self, interpreted: bool) -> dict[str, Any]:
        from triton_only_backend.kernels import tuned
        from triton_only_backend.passes import pipeline

        config = {**inductor.BASE_CONFIG, **self.settings.inductor}
        if config.get("triton.cudagraphs"):
            config = {**inductor_launch.options(), **config}
        if interpreted:
            config.update(interpreter.INDUCTOR_CONFIG)
        elif config.get("max_autotune"):
            config = {**inductor.AUTOTUNE_CONFIG, **config}
        chosen = tuned.Sources.of(self.settings)
        uuid = f"{pipeline.source_hash()}-{self.settings.key}-{tuned.fingerprint(chosen)}"

        def add(hook: str, stage: Stage) -> None:
            def run(graph: torch.fx.Graph) -> None:
                results = pipeline.run_on_graph(stage, graph, self.settings.disable_passes)
                if stage != "sweep":  # which a hit in Inductor's cache does not run
                    self.passes += results

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
        from triton_only_backend.kernels import tuned
        from triton_only_backend.passes import pipeline, rewrite_seeds

        backward = kwargs.get("is_backward", False)
        kind = "inference" if kwargs.get("is_inference") else "backward" if backward else "forward"
        self.passes += pipeline.run_stage("aten", gm, self.settings.disable_passes)
        passes, self.passes = self.passes, []
        self.seeded |= rewrite_seeds.devices_that_draw(gm)
        chosen = tuned.Sources.of(self.settings)
        if self.settings.tuning == "search":
            from triton_only_backend.tuning import at_compile

            at_compile.search_graph(gm.graph, chosen)
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
            passes=passes,
        )
        inductor.keep_mutated_inputs_in_place(gm, self.lasting, kwargs)
        try:
            compiled, source = self._lower(compile_fx_inner, gm, example_inputs, kwargs)
        except inductor.inductor_error() as error:
            if inductor.is_missing_template(error):
                # The graph alone says which operation that was, and what to do.
                self._record(report(None))
                self.raise_for_violations()
            raise
        calls = None if source is None else audit.audit_source(source)
        graphs = None if self.target else inductor.cudagraphs(compiled)
        self._record(report(calls, cudagraphs=graphs))
        if backward:
            # Compiled when the backward first runs, outside Dynamo: raised at once.
            self.raise_for_violations()
        return compiled

    def _lower(
        self,
        compile_fx_inner: Callable[..., Any],
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Mapping[str, Any],
    ) -> tuple[Any, str | None]:
        """The compiled graph and its code; with a target, the graph as it is and the code there."""
        if self.target is None:
            with inductor_launch.waiting_first(), inductor_mends.mended():
                compiled = compile_fx_inner(gm, example_inputs, **options)
            from triton_only_backend.kernels import tuned

            chosen = tuned.Sources.of(self.settings)
            if chosen != tuned.default_sources():
                inductor.run_within(compiled, lambda: tuned.using(chosen))
            return compiled, inductor.source_code(compiled)
        from triton_only_backend import inductor_target

        with inductor_launch.waiting_first(), inductor_mends.mended():
            source = inductor_target.output_code(
                compile_fx_inner, gm, example_inputs, options, self.target
            )
        return inductor.as_it_is(gm), source

    def _record(self, report: AuditReport) -> None:
        self.reports.append(report)
        _recent.append(report)
        if not report.is_triton_only and self.settings.on_violation == "warn":
            log.warning("%s", report.to_text())
        elif log.isEnabledFor(logging.INFO):
            log.info("%s: %s", report.graphs[0], report.to_short_text())
        name = "triton_only_audit_" + "_".join(re.findall(r"\w+", report.graphs[0]))
        inductor.trace_artifact(f"{name}_text", "string", report.to_text)
        inductor.trace_artifact(name, "json", report.to_json)
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
