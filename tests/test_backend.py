"""The backend from outside: torch.compile(model, backend="triton_only") and what comes of it."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import triton_only_backend as tob
from triton_only_backend import inductor, interpreter
from triton_only_backend.backend import compiled_reports
from triton_only_backend.errors import AuditError, DeviceError, SettingsError

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@pytest.fixture
def net(device) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).to(
        device
    )


def compiled(function, **options):
    return torch.compile(function, backend="triton_only", **options)


def float64_product(x: torch.Tensor) -> torch.Tensor:
    return x.double() @ x.double()


def assert_compiles(function, *args: torch.Tensor, **options) -> None:
    """Compiled output and gradients equal eager's, and every graph is Triton-only."""
    before = len(compiled_reports())
    actual, expected = compiled(function, **options)(*args), function(*args)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    wanted = [a for a in args if a.requires_grad]
    if wanted:
        ours = torch.autograd.grad(actual.sum(), wanted)
        theirs = torch.autograd.grad(expected.sum(), wanted)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    reports = compiled_reports()[before:]
    assert len(reports) == (2 if wanted else 1)
    assert all(report.is_triton_only for report in reports)


def test_needs_no_import_of_ours():
    code = (
        "import sys, torch\n"
        "assert 'triton_only' in torch._dynamo.list_backends()\n"
        "assert not [m for m in sys.modules if m.startswith('triton_only')]\n"
        "x = torch.ones(2, 2, device='cuda' if torch.cuda.is_available() else 'cpu')\n"
        "print(torch.compile(torch.mm, backend='triton_only')(x, x).sum().item())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "8.0\n", run.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"fullgraph": True},
        {"dynamic": True},
        {"options": {"max_autotune": True, "triton.unique_kernel_names": True}},
        {"options": {"pattern_matcher": False}},
    ],
    ids=str,
)
def test_modes_and_options(options, net, device):
    x = torch.randn(3, 8, device=device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(net, **options)(x), net(x), rtol=1e-4, atol=1e-5)
    assert compiled_reports()[-1].is_triton_only


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"options": {"alow": []}}, r"did you mean \"allow\""),
        (
            {"options": {"disable_passes": ["rewrite_matmu"]}},
            r"no pass is named 'rewrite_matmu'; did you mean \"rewrite_matmul\"",
        ),
    ],
    ids=["mode", "option", "pass"],
)
def test_wrong_settings_are_named(options, message, net, device):
    with pytest.raises(SettingsError, match=message):
        compiled(net, **options)(torch.ones(3, 8, device=device))


def test_an_unknown_variable_is_named(net, device, monkeypatch):
    monkeypatch.setenv("TRITON_ONLY_ALOW", "nccl")
    with pytest.raises(SettingsError, match="TRITON_ONLY_ALOW"):
        compiled(net)(torch.ones(3, 8, device=device))


@pytest.mark.parametrize("suppress", [False, True], ids=["plain", "suppress_errors"])
def test_a_cpu_without_the_interpreter_is_refused(suppress, net, monkeypatch):
    monkeypatch.setattr(interpreter, "install_if_wanted", lambda: False)
    with (
        torch._dynamo.config.patch(suppress_errors=suppress),
        pytest.raises(DeviceError, match=r"device 'cpu'; move the model .*TRITON_INTERPRET=1"),
    ):
        compiled(net.cpu())(torch.ones(3, 8))


@pytest.mark.parametrize("suppress", [False, True], ids=["plain", "suppress_errors"])
def test_a_violation_is_raised_unwrapped_with_its_source_line(suppress, device):
    with (
        torch._dynamo.config.patch(suppress_errors=suppress),
        pytest.raises(AuditError) as caught,
    ):
        compiled(float64_product)(torch.ones(2, 2, device=device))
    assert type(caught.value) is AuditError
    (finding,) = caught.value.report.findings
    assert (finding.op, finding.refused) == ("aten.mm.default", "UNSUPPORTED_DTYPE")
    assert finding.source_line.endswith("in float64_product: return x.double() @ x.double()")
    assert "cast the operands" in str(caught.value)
    with pytest.raises(AuditError):  # and again, on each call
        compiled(float64_product)(torch.ones(2, 2, device=device))


def test_integer_products_are_violations_too(device):
    with pytest.raises(AuditError, match=r"i32\[2, 2\]"):
        compiled(torch.mm)(*(torch.ones(2, 2, dtype=torch.int32, device=device),) * 2)


class DoubleBackward(torch.autograd.Function):
    """Its backward, and only that, has a product in float64."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return (grad.double() @ grad.double()).float()


@pytest.mark.parametrize("suppress", [False, True], ids=["plain", "suppress_errors"])
def test_a_violation_in_the_backward_is_raised_by_the_backward(suppress, device):
    x = torch.ones(2, 2, device=device, requires_grad=True)
    with torch._dynamo.config.patch(suppress_errors=suppress):
        output = compiled(lambda x: DoubleBackward.apply(x) * 3)(x)
        with pytest.raises(AuditError, match="backward"):
            output.sum().backward()


@pytest.mark.parametrize("pattern", ["aten.mm*", "cublas", "CUBLAS", "*"])
def test_allow_takes_ops_and_providers(pattern, device):
    x = torch.ones(2, 2, device=device)
    result = compiled(float64_product, options={"allow": [pattern]})(x)
    assert torch.equal(result, float64_product(x))
    report = compiled_reports()[-1]
    assert report.is_triton_only
    assert [finding.op for finding in report.allowed] == ["aten.mm.default"]


@pytest.mark.parametrize(("policy", "logged"), [("warn", 1), ("ignore", 0)])
def test_on_violation(policy, logged, device, caplog):
    x = torch.ones(2, 2, device=device)
    with caplog.at_level(logging.WARNING, logger="triton_only"):
        result = compiled(float64_product, options={"on_violation": policy})(x)
    assert torch.equal(result, float64_product(x))
    assert sum("would run outside Triton" in record.message for record in caplog.records) == logged


def test_disabled_passes_leave_their_operations(net, device):
    options = {"disable_passes": ["rewrite_matmul"], "on_violation": "ignore"}
    with torch.no_grad():
        compiled(net, options=options)(torch.ones(3, 8, device=device))
    assert {finding.provider.name for finding in compiled_reports()[-1].findings} == {"CUBLAS"}


def test_reports_are_added_to_a_file(net, device, tmp_path):
    path = tmp_path / "new" / "report.json"
    x = torch.randn(3, 8, device=device)
    compiled(net, options={"report": str(path)})(x).sum().backward()
    reports = json.loads(path.read_text())
    assert [report["graphs"][0].split()[-1] for report in reports] == ["(forward)", "(backward)"]
    assert all(report["is_triton_only"] for report in reports)
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", ["{}", "not JSON", None], ids=["dict", "text", "folder"])
def test_a_file_of_something_else_is_not_overwritten(content, net, device, tmp_path):
    path = tmp_path / "report.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(SettingsError, match="report"):
        compiled(net, options={"report": path})(torch.ones(3, 8, device=device))
    assert content is None or path.read_text() == content


# attention


def heads(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(shape, device=device, requires_grad=True)


ATTENTION = {
    "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, key=k, value=v, is_causal=True),
    "scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.2),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=k[:, :1] @ v[0, 0].mT > 0
    ),
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[:, :2], v[:, :2], enable_gqa=True
    ),
    "math": lambda q, k, v: math_attention(q, k, v),
    "by hand": lambda q, k, v: torch.softmax(q @ k.mT * 0.3, -1) @ v,
    "view": lambda q, k, v: F.scaled_dot_product_attention(q, k, v).view(2, -1),
}


def math_attention(q, k, v):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("name", ATTENTION, ids=lambda name: name.replace(" ", "-"))
def test_attention(name, device):
    if name == "view" and device == "cuda":
        pytest.skip("eager's kernel on a GPU gives a layout that does not allow this view")
    assert_compiles(ATTENTION[name], *(heads(2, 4, 16, 8, device=device) for _ in range(3)))
    operations = compiled_reports()[-2].operations
    assert {p.name for p in operations} <= {"TRITON_OURS", "TRITON_INDUCTOR"}


def test_attention_by_hand_runs_in_our_attention_kernel(device):
    """Inductor's fuse_attention makes a library op of it, which our joint pass takes."""
    report = tob.audit(ATTENTION["by hand"], *(heads(2, 4, 16, 8, device=device) for _ in range(3)))
    ours = [n for provider, n in report.operations.items() if provider.name == "TRITON_OURS"]
    assert report.is_triton_only
    if interpreter.is_installed():  # on a GPU Inductor fuses fp32 under TF32 only
        assert ours == [2]  # attention_forward and attention_backward; six bmm otherwise


@pytest.mark.parametrize("case", ["head dimension", "mask gradient"])
def test_attention_beyond_the_kernels_stays_in_triton(case, device):
    dim = 264 if case == "head dimension" else 8
    operands = [heads(1, 2, 4, dim, device=device) for _ in range(3)]
    mask = torch.randn(4, 4, device=device, requires_grad=case == "mask gradient")
    assert_compiles(F.scaled_dot_product_attention, *operands, mask)


# products


def products(device: str) -> dict:
    a, b = heads(4, 6, device=device), heads(6, 5, device=device)
    batch = torch.randn(3, 4, 6, device=device)
    return {
        "every rank": lambda a, b: (
            (a @ b).sum() + (a[0] @ b[:, 0]) + (a @ b[:, 0]).sum() + (a[0] @ b).sum()
            + (batch @ b).sum() + (batch[None] @ b.expand(3, 6, 5)).sum()
        ),
        "einsum": lambda a, b: torch.einsum("bik,kj,ij->bj", batch, b, a @ b),
        "affine": lambda a, b: (
            torch.baddbmm(a[:, :5], batch, b.expand(3, 6, 5), beta=0.5, alpha=2)
            + torch.addmm(b[0], a, b) + torch.addmv(a[:, 0], a, b[:, 0])[:, None]
        ),
        "sums of products": lambda a, b: (
            torch.addbmm(a[:, :5], batch, b.expand(3, 6, 5), beta=0.5, alpha=2)
            + torch.tensordot(a, b, 1) + torch.linalg.multi_dot([a, b, b.T, b])
        ),
        "vectors": lambda a, b: torch.dot(a[0], b[:, 0]) + torch.outer(a[0], b[0]) @ b[0, :5],
        "bilinear": lambda a, b: F.bilinear(a, a, batch.expand(3, 4, 6)[:, :1].expand(3, 6, 6)) @ b[:3],
        "autocast": lambda a, b: autocast_product(a, b),
    }, (a, b)  # fmt: skip


def autocast_product(a, b):
    with torch.autocast(a.device.type, torch.bfloat16):
        return F.linear(a, b.T).float()


@pytest.mark.parametrize("name", products("cpu")[0], ids=lambda name: name.replace(" ", "-"))
def test_every_product_is_ours(name, device):
    functions, operands = products(device)
    assert_compiles(functions[name], *operands)


@pytest.mark.parametrize("op", ["mm", "bmm", "addmm"])
def test_out_dtype(op, device):
    if op == "addmm" and TORCH < (2, 13):
        pytest.skip("before torch 2.13 the decomposition of addmm.dtype raises TypeError itself")
    batch = (2,) if op == "bmm" else ()
    a, b = (torch.randn(*batch, 4, 4, device=device).bfloat16() for _ in range(2))
    bias = (torch.ones(4, 4, device=device),) if op == "addmm" else ()
    function = lambda *args: getattr(torch, op)(*args, out_dtype=torch.float32)  # noqa: E731
    actual = compiled(function)(*bias, a, b)
    assert actual.dtype == torch.float32
    exact = a.double() @ b.double() + (1 if bias else 0)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
    assert compiled_reports()[-1].is_triton_only


# graphs within graphs


@torch.compiler.nested_compile_region
def region(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.relu(a @ b) + F.scaled_dot_product_attention(a[None], b[None], a[None])[0]


def by_condition(a, b):
    return torch.cond(a.sum() > 0, lambda a, b: a @ b, lambda a, b: F.scaled_dot_product_attention(
        a[None], b[None], a[None])[0] * 1.0, (a, b))  # fmt: skip


NESTED = {
    "cond": by_condition,
    "checkpoint": lambda a, b: checkpoint(
        lambda a, b: F.scaled_dot_product_attention(a[None], b[None], torch.relu(a @ b)[None]) * 2,
        a, b, use_reentrant=False,
    ),
    "checkpoint by hand": lambda a, b: checkpoint(
        lambda q, k: torch.softmax(q @ k.mT * 0.3, -1) @ q * 2,
        a[None, None], b[None, None], use_reentrant=False,
    ),
    "region": lambda a, b: region(region(a, b), b),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED, ids=lambda name: name.replace(" ", "-"))
def test_nested_graphs_are_rewritten_too(name, device):
    assert_compiles(NESTED[name], heads(6, 6, device=device), heads(6, 6, device=device))


def test_loops_are_rewritten_too(device):
    def loop(x):
        step = lambda i, x: (i + 1, x @ x * 0.1)  # noqa: E731
        return torch.while_loop(lambda i, x: i < 3, step, (torch.tensor(0, device=device), x))[1]

    assert_compiles(loop, torch.randn(4, 4, device=device))


# dynamic shapes


def attend(x: torch.Tensor) -> torch.Tensor:
    batch, length, _ = x.shape
    q = x.view(batch, length, 2, 4).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, q, q, is_causal=length > 1)
    return y.transpose(1, 2).reshape(batch, length, 8) @ x.mT


def attend_by_hand(x: torch.Tensor) -> torch.Tensor:
    batch, length, _ = x.shape
    q = x.view(batch, length, 2, 4).transpose(1, 2)
    return torch.addbmm(x[0], torch.softmax(q @ q.mT * 0.3, -1)[:, 0], x)


@pytest.mark.parametrize(
    ("function", "dynamic"), [(attend, None), (attend_by_hand, True)], ids=["automatic", "dynamic"]
)
def test_as_many_graphs_as_inductor(function, dynamic, device):
    """Our passes add no guards: the same sequence of shapes gives as many recompiles."""
    graphs = {}
    for backend in ("aot_eager", "triton_only"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        run = torch.compile(function, backend=counter, dynamic=dynamic)
        for shape in [(2, 5, 8), (2, 6, 8), (3, 7, 8), (2, 1, 8)]:
            x = torch.randn(shape, device=device)
            torch.testing.assert_close(run(x), function(x), rtol=1e-4, atol=1e-5)
        graphs[backend] = counter.frame_count
    assert graphs["triton_only"] == graphs["aot_eager"]


# tob.audit


def test_audit_covers_graph_breaks_and_the_backward(device):
    layer = torch.nn.Linear(4, 4, device=device)

    def broken(x):
        y = layer(x)
        torch._dynamo.graph_break()
        return y.double() @ y.double()

    report = tob.audit(broken, torch.ones(4, 4, device=device))
    kinds = [graph.split()[-1] for graph in report.graphs]
    assert sorted(kinds) == ["(backward)", "(backward)", "(forward)", "(forward)"]
    assert len(report.graph_breaks) == 1
    assert {f.graph.split()[-1] for f in report.findings} == {"(forward)", "(backward)"}
    assert layer.weight.grad is None


def test_audit_sees_refusals_of_the_joint_graph(device):
    def by_hand(q):
        return torch.softmax(q @ q.mT * 0.3, -1) @ q

    # Without a gradient: torch 2.11's own CPU attention fails on float64 in the backward.
    report = tob.audit(by_hand, torch.randn(1, 2, 4, 8, device=device, dtype=torch.float64))
    assert not report.is_triton_only
    assert {finding.refused for finding in report.findings} == {"UNSUPPORTED_DTYPE"}


def test_audit_leaves_the_users_compiled_model_alone(net, device):
    x = torch.ones(3, 8, device=device)
    counter = CompileCounterWithBackend("eager")
    model = torch.compile(net, backend=counter)
    model(x)
    apart = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # torch 2.13
    with torch._dynamo.config.patch(recompile_limit=3 if apart else 8):
        for audited in (net, model, net, model):  # more than the limit of 3
            assert tob.audit(audited, x).is_triton_only
        model(x)
        assert counter.frame_count == 1
        model(torch.ones(5, 8, device=device))
        assert counter.frame_count == 2
    assert all(parameter.grad is None for parameter in net.parameters())


def test_audit_takes_models_compiled_in_place_and_functions(net, device):
    x = torch.ones(3, 8, device=device)
    net.compile(backend="eager")
    net(x)
    assert len(tob.audit(net, x).graphs) == 2
    assert len(tob.audit(torch.compile(torch.relu, backend="eager"), x).graphs) == 1


def test_audit_stops_at_its_inputs(device):
    """The graph that the inputs come from is neither run nor freed."""
    leaf = torch.ones(3, 3, device=device, requires_grad=True)
    x = (leaf * 2).exp()
    report = tob.audit(lambda x: x @ x, x)
    assert [graph.split()[-1] for graph in report.graphs] == ["(forward)", "(backward)"]
    x.sum().backward()
    assert leaf.grad is not None


def test_profile_sees_only_triton(net, device):
    model = compiled(net)
    x = torch.randn(3, 8, device=device)
    with torch.no_grad():
        report = tob.profile(model, x, warmup=1)
    assert report.is_triton_only
    assert report.triton_time_share == 1.0


def test_a_decomposed_attention_is_noted(device):
    query = torch.randn(1, 2, 4, 264, device=device)
    report = tob.audit(F.scaled_dot_product_attention, query, query, query)
    assert report.is_triton_only
    assert "the head dimension exceeds 256" in report.to_text(width=300)


# CUDA graphs


class Cache:
    """Holds a tensor, as a KV cache does."""

    def __init__(self, device: str) -> None:
        self.keys = torch.zeros(4, device=device)


@pytest.mark.parametrize("cudagraphs", [False, True])
def test_what_a_graph_writes_for_good_is_no_copy(cudagraphs, device, monkeypatch):
    """Of what a graph writes, CUDA graphs are told that attributes of objects stay in place."""
    told = []
    original = inductor.keep_mutated_inputs_in_place

    def keep(gm, lasting, kwargs):
        # Inductor has no CUDA graphs on a CPU.
        kwargs = {**kwargs, "cudagraphs": cudagraphs, "static_input_idxs": ()}
        original(gm, lasting, kwargs)
        inputs = gm.graph.find_nodes(op="placeholder")
        told.append([tuple(inputs[i].meta["val"].shape) for i in kwargs["static_input_idxs"]])

    monkeypatch.setattr(inductor, "keep_mutated_inputs_in_place", keep)

    def step(x, cache, read, fresh):
        cache.keys.add_(x)
        fresh.mul_(2)
        return cache.keys.sum() + read.keys.sum()

    read = Cache(device)
    read.keys = torch.ones(5, device=device)
    with torch.no_grad():
        cache, fresh = Cache(device), torch.ones(3, device=device)
        compiled(step)(torch.ones(4, device=device), cache, read, fresh)
    assert told == [[(4,)] if cudagraphs else []]
    assert cache.keys.tolist() == [1.0] * 4
    assert fresh.tolist() == [2.0] * 3


@pytest.mark.gpu
def test_a_cache_first_seen_in_the_graph_has_its_cuda_graph(device):
    """PyTorch does without one there; a token took twice as long."""

    def step(x, cache):
        cache.keys.add_(x)
        return cache.keys * 2

    function = torch.compile(step, backend="triton_only", mode="reduce-overhead")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for _ in range(3):  # caches of their own: each is recorded, none is mixed up
            cache, x = Cache(device), torch.ones(4, device=device)
            for i in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                assert function(x, cache).tolist() == [2.0 * (i + 1)] * 4
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
