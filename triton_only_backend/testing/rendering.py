"""A graph as text: one line a node, dtypes and shapes shown, the same on every torch version."""

from __future__ import annotations

import re
from typing import Any

import torch

DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "b8", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip
_SYMBOL = re.compile(r"\b([su])(\d+)\b")


def value(node: Any) -> Any:
    """A node's fake value, aten's or Dynamo's; a constant as it is."""
    if isinstance(node, torch.fx.Node):
        return node.meta.get("val", node.meta.get("example_value"))
    return node


def target_name(node: torch.fx.Node) -> str:
    """`aten.mm` for aten.mm.default, `aten.add.Tensor`, `operator.getitem`, `.view` of a method."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    if isinstance(target, str):
        return f".{target}" if node.op == "call_method" else target
    module = (getattr(target, "__module__", None) or "").removeprefix("_")
    name = getattr(target, "__name__", str(target))
    short = {"torch.nn.functional": "F", "torch._C._nn": "F", "torch._ops.higher_order": "hop"}
    module = short.get(module, "torch" if not module or module.startswith("torch._") else module)
    return f"{module}.{name}"


def describe(val: Any, *, device: bool = False) -> str:
    """`f32[4, 8]`, with the strides behind it where they are not those of a contiguous tensor."""
    if isinstance(val, torch.Tensor):
        text = f"{DTYPES.get(val.dtype, str(val.dtype).removeprefix('torch.'))}{list(val.shape)}"
        if val.layout == torch.strided and not _is_contiguous(val):
            text += f"{list(val.stride())}"
        elif val.layout != torch.strided:
            text += f" {str(val.layout).removeprefix('torch.')}"
        return f"{text} {val.device}" if device else text
    if isinstance(val, list | tuple):
        return f"({', '.join(describe(v, device=device) for v in val)})"
    if isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool):
        return f"Sym({val})"
    return "" if val is None else type(val).__name__


def _is_contiguous(tensor: torch.Tensor) -> bool:
    """As sizes are written: asking adds no guard. A dimension of one may have any stride."""
    expected: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not (isinstance(size, int) and size == 1) and str(stride) != str(expected):
            return False
        expected = size * expected
    return True


def render(graph: torch.fx.Graph | torch.fx.GraphModule, *, device: bool = False) -> str:
    """The graph as text, of a GraphModule with those nested in it.

        x: f32[4, 8]
        w: f32[16, 8]
        permute: f32[8, 16][1, 8] = aten.permute(w, [1, 0])
        mm: f32[4, 16] = aten.mm(x, permute)
        return (mm,)

    Calls are named after their op and counted, symbols (s0, s1, u0) in the order in which they
    appear, so that the text depends neither on torch's version nor on what was traced before.

    Args:
        device: shows each tensor's device.
    """
    texts = [f"{name}:\n{text}" if name else text for name, text in _texts(graph, device)]
    return _number_symbols("\n\n".join(texts))


def _texts(graph: torch.fx.Graph | torch.fx.GraphModule, device: bool) -> list[tuple[str, str]]:
    if isinstance(graph, torch.fx.Graph):
        return [("", _text(graph, device))]
    nested = [(n, m) for n, m in graph.named_modules() if isinstance(m, torch.fx.GraphModule)]
    return [(name, _text(module.graph, device)) for name, module in nested]


def _text(graph: torch.fx.Graph, device: bool) -> str:
    names: dict[torch.fx.Node, str] = {}
    used: dict[str, int] = {}
    taken: set[str] = set()
    lines = []

    def name_of(node: torch.fx.Node) -> str:
        if node.op in ("placeholder", "get_attr", "output"):
            base = str(node.target)
        else:
            base = target_name(node).rpartition(".")[2]
            if isinstance(node.target, torch._ops.OpOverload):
                base = node.target._opname
        count = used.get(base, 0)
        name = f"{base}_{count}" if count else base
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        used[base] = count + 1
        taken.add(name)
        return name

    def show(argument: Any) -> str:
        if isinstance(argument, torch.fx.Node):
            return names[argument]
        if isinstance(argument, tuple):
            inside = ", ".join(map(show, argument))
            return f"({inside},)" if len(argument) == 1 else f"({inside})"
        if isinstance(argument, list):
            return f"[{', '.join(map(show, argument))}]"
        if isinstance(argument, dict):
            return f"{{{', '.join(f'{k}: {show(v)}' for k, v in argument.items())}}}"
        if isinstance(argument, slice):
            parts = (argument.start, argument.stop, argument.step)
            return f"slice({', '.join(map(show, parts))})"
        named = torch.dtype | torch.device | torch.layout | torch.memory_format
        return str(argument) if isinstance(argument, named) else repr(argument)

    for node in graph.nodes:
        names[node] = name_of(node)
        if node.op == "output":
            lines.append(f"return {show(node.args[0])}")
            continue
        typed = describe(value(node), device=device)
        line = f"{names[node]}: {typed}" if typed else names[node]
        if node.op not in ("placeholder", "get_attr"):
            arguments = [*map(show, node.args), *(f"{k}={show(v)}" for k, v in node.kwargs.items())]
            line += f" = {target_name(node)}({', '.join(arguments)})"
        lines.append(line)
    return "\n".join(lines)


def _number_symbols(text: str) -> str:
    numbers: dict[str, dict[str, int]] = {"s": {}, "u": {}}

    def renumber(match: re.Match[str]) -> str:
        kind, number = match.groups()
        known = numbers[kind]
        return f"{kind}{known.setdefault(number, len(known))}"

    return _SYMBOL.sub(renumber, text)
