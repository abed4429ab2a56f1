"""What tests of reports share: samples, how a page is read, a check against a JSON Schema."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from triton_only_backend.audit import (
    AuditReport,
    CodeCall,
    Finding,
    GraphOp,
    KernelReport,
    Provider,
    Reason,
    policy,
)
from triton_only_backend.audit.kernel_report import KernelEvent, report_of

TRITON, CUDNN = Provider.TRITON_INDUCTOR, Provider.CUDNN


def graph_op(op: str, name: str = "", **fields: Any) -> GraphOp:
    verdict = policy.classify(op)
    name = name or op.split(".")[1]
    known = {"provider": verdict.provider, "reason": verdict.reason, "remedy": verdict.remedy}
    return GraphOp(**{"name": name, "op": op, "source_nodes": (name,), **known, **fields})


def call(op: str, *nodes: str, **fields: Any) -> CodeCall:
    verdict = policy.classify_call(op)
    known = {"provider": verdict.provider, "reason": verdict.reason, "remedy": verdict.remedy}
    name = f"extern_kernels.{op.split('.')[1]}"
    return CodeCall(
        **{
            "name": name,
            "op": op,
            "kind": "extern",
            "line": 7,
            "source_nodes": nodes,
            **known,
            **fields,
        }
    )


def kernel(name: str = "triton_poi_0", count: int = 1) -> CodeCall:
    return CodeCall(name, name, "kernel", TRITON, count=count)


def finding(op: str = "aten.sort.default", **fields: Any) -> Finding:
    known = {"provider": Provider.CUB, "reason": Reason.NO_TRITON_LOWERING}
    return Finding(op, **{**known, **fields})


def timed_run() -> KernelReport:
    events = [
        KernelEvent("triton_poi_0", TRITON, 60.0, 100.0),
        KernelEvent("nvjet <&> x", Provider.CUBLAS, 30.0, 165.0),
        KernelEvent("ncclDevKernel_AllReduce", Provider.NCCL, 50.0, 200.0),
        KernelEvent("triton_poi_0", TRITON, 10.0, 260.0),
    ]
    return report_of(events, "gpu")


def sample_report() -> AuditReport:
    """A report in which every part has something."""
    ops = [
        graph_op(
            "aten.convolution.default",
            module_path="vision.0",
            inputs=("f32[1, 3]",),
            outputs=("f32[1, 4]",),
            dtypes=("f32",),
            source_line="net.py:12 in forward: x = self.conv(x) | 1",
        ),
        graph_op("aten.sort.default", source_line="net.py:14 in forward: torch.sort(x)"),
        graph_op(
            "aten.add.Tensor", refused="DROPOUT", reason=None, detail="p=0.1", remedy="set it to 0"
        ),
        graph_op("aten.view.default"),
    ]
    calls = [
        call("aten.convolution", "convolution"),
        call("aten.sort", "sort"),
        call("aten.copy_", provider=Provider.MEMCPY),
        call("_c10d_functional.all_reduce_", provider=Provider.NCCL),
        kernel(count=2),
    ]
    return AuditReport.from_graph(
        ops,
        calls,
        graph_name="graph 0 (forward)",
        allow=["vision.*::aten.conv*"],
        graph_breaks=["call to print\n  Hint: <do> not"],
        environment={"gpu": "H200", "rocm": None},
        cudagraphs={"on": True, "skipped": ["skipping cudagraphs due to mutated inputs"]},
    ).with_run(timed_run())


class Outline(HTMLParser):
    """The tags, the text and the addresses of a page; fails where tags do not match."""

    VOID = frozenset({"meta", "input", "br", "wbr", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        self.addresses += [str(values[key]) for key in ("src", "href") if key in values]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def outline(html: str) -> Outline:
    parsed = Outline()
    parsed.feed(html)
    parsed.close()
    assert parsed.open == []
    return parsed


def page_text(html: str) -> str:
    return " ".join("".join(outline(html).text).split())


def check_schema(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "$") -> None:
    """Asserts that a value fits a JSON Schema, as far as ours goes."""
    if "$ref" in schema:
        return check_schema(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root, at)
    if "anyOf" in schema:
        kinds = [s for s in schema["anyOf"] if (s.get("type") == "null") == (value is None)]
        return check_schema(value, kinds[0], root, at)
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    wanted = schema.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    assert not wanted or any(isinstance(value, types[kind]) for kind in wanted), at
    assert not isinstance(value, bool) or not wanted or "boolean" in wanted, at
    assert "const" not in schema or value == schema["const"], at
    assert "enum" not in schema or value in schema["enum"], at
    if isinstance(value, (int, float)):
        assert schema.get("minimum", value) <= value <= schema.get("maximum", value), at
    if isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1e9), at
        for index, item in enumerate(value):
            check_schema(item, schema.get("items", {}), root, f"{at}[{index}]")
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), at
        for key, item in value.items():
            check_schema(key, schema.get("propertyNames", {}), root, f"{at} key {key}")
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            assert inner is not False, f"{at}.{key}"
            check_schema(item, inner, root, f"{at}.{key}")
    return None
