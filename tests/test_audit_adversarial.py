"""Culprits planted where they are hard to see: each must be found."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import triton_only_backend as tob
from triton_only_backend.audit import Provider, Reason, runtime
from triton_only_backend.model_audit import audit_with

if TYPE_CHECKING:
    from collections.abc import Callable

P = Provider
LIBRARY = torch.library.Library("planted", "FRAGMENT")
LIBRARY.define("mm(Tensor a, Tensor b) -> Tensor")
LIBRARY.impl("mm", lambda a, b: torch.ops.aten.mm(a, b), "CompositeExplicitAutograd")
torch.library.register_fake(
    "planted::mm", lambda a, b: a.new_empty(a.shape[0], b.shape[1]), lib=LIBRARY
)


@torch.compiler.disable
def out_of_sight(a: torch.Tensor) -> torch.Tensor:
    return a @ a.mT


class LibraryInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return torch.relu(a)

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        return (grad.double() @ a.double()).float()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 64, batch_first=True)

    def forward(self, a):
        return self.lstm(a[None])[0] + 1


def fp8(a: torch.Tensor) -> torch.Tensor:
    b = a.to(torch.float8_e4m3fn)
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(b, b.T, one, one, out_dtype=torch.bfloat16)


def broken(a: torch.Tensor) -> torch.Tensor:
    return torch.cos(out_of_sight(torch.sin(a)))


@dataclasses.dataclass(frozen=True)
class Culprit:
    """A function of one (64, 64) float32 matrix with one call of a library somewhere in it.

    Attributes:
        op: what the report must name; a prefix.
        provider: who would run it, in the report before any run.
        kernels: providers of which a run on a GPU must show one.
    """

    function: Callable[..., Any]
    op: str
    provider: Provider
    kernels: frozenset[Provider]


def culprit(function: Any, op: str, provider: Provider, *kernels: Provider) -> Culprit:
    return Culprit(function, op, provider, frozenset(kernels or {provider}))


CULPRITS = {
    "custom op": culprit(lambda a: torch.ops.planted.mm(a, a) + 1, "planted.mm", P.USER, P.CUBLAS),
    "fp8 product": culprit(fp8, "aten._scaled_mm", P.CUBLAS, P.CUBLAS, P.CUTLASS),
    "fp64 product": culprit(lambda a: a.double() @ a.double(), "aten.mm", P.CUBLAS),
    "solve": culprit(
        lambda a: torch.linalg.solve(a, a), "aten._linalg_solve_ex", P.CUSOLVER,
        P.CUSOLVER, P.CUBLAS, P.ATEN, P.UNKNOWN,
    ),
    "fft": culprit(lambda a: torch.fft.rfft(a).abs(), "aten._fft_r2c", P.CUFFT, P.CUFFT, P.UNKNOWN),
    "conv2d": culprit(
        lambda a: F.conv2d(a.view(1, 4, 32, 32), a.view(16, 4, 8, 8)), "aten.convolution", P.CUDNN,
        P.CUDNN, P.CUBLAS, P.CUTLASS, P.UNKNOWN,
    ),
    "sort": culprit(lambda a: a.view(1, -1).sort(-1)[0], "aten.sort", P.CUB, P.CUB, P.ATEN),
    "kthvalue": culprit(lambda a: a.view(1, -1).kthvalue(3)[0], "aten.kthvalue", P.ATEN, P.ATEN, P.CUB),
    "multinomial": culprit(
        lambda a: torch.multinomial(a.abs() + 1, 2), "aten.multinomial", P.ATEN, P.ATEN, P.CUB
    ),
    "graph break": culprit(broken, "aten.mm", P.CUBLAS),
    "lambda in a map": culprit(
        lambda a: torch.stack([*map(torch.linalg.det, a.view(4, 32, 32))]), "aten._linalg_det",
        P.CUSOLVER, P.CUSOLVER, P.CUBLAS, P.ATEN, P.UNKNOWN,
    ),
}  # fmt: skip


@pytest.fixture
def matrix(device) -> torch.Tensor:
    return torch.randn(64, 64, device=device) + 8 * torch.eye(64, device=device)


def named(report: tob.AuditReport, op: str) -> set[Provider]:
    return {finding.provider for finding in report.findings if finding.op.startswith(op)}


@pytest.mark.parametrize("name", CULPRITS)
def test_the_compilation_shows_it(name, matrix):
    planted = CULPRITS[name]
    report = tob.audit(planted.function, matrix)
    assert not report.is_triton_only
    assert named(report, planted.op) == {planted.provider}
    (finding,) = [f for f in report.findings if f.op.startswith(planted.op)]
    assert finding.reason is not None
    assert finding.remedy
    assert "test_audit_adversarial.py" in finding.source_line


@pytest.mark.parametrize("name", [name for name in CULPRITS if name != "graph break"])
def test_the_backend_refuses_it(name, matrix):
    compiled = torch.compile(CULPRITS[name].function, backend="triton_only")
    with pytest.raises(tob.AuditError) as raised:
        compiled(matrix)
    assert named(raised.value.report, CULPRITS[name].op)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CULPRITS)
def test_a_run_shows_it_whatever_is_allowed(name, matrix):
    """Each proof alone: here the policy lets the graph and the code pass."""
    planted = CULPRITS[name]
    options = {"on_violation": "ignore", "allow": ["*"]}
    compiled = torch.compile(planted.function, backend="triton_only", options=options)
    run = tob.profile(compiled, matrix)
    assert {row.provider for row in run.violations} & planted.kernels
    assert not run.is_triton_only


def test_an_allowed_custom_op_does_not_excuse_what_it_runs(matrix):
    """The graph cannot see inside a custom op, and says so; the run does."""
    function = CULPRITS["custom op"].function
    blind = tob.audit(function, matrix)
    assert [f.reason for f in blind.findings] == [Reason.USER_OP]
    allowed = audit_with(function, [matrix], options={"allow": ["planted.*"]})
    assert allowed.is_triton_only
    options = {"allow": ["planted.*"]}
    run = tob.profile(torch.compile(function, backend="triton_only", options=options), matrix)
    joined = allowed.with_run(run)
    assert not joined.is_triton_only
    assert any("mm" in row.name or row.provider is P.CUBLAS for row in joined.run.violations)


def test_a_recurrence_that_dynamo_leaves_to_eager_is_found(device):
    model = Recurrent().to(device)
    report = tob.audit(model, torch.randn(8, 64, device=device))
    assert not report.is_triton_only
    found = [f for f in report.findings if "rnn" in f.op]
    assert {f.reason for f in found} == {Reason.EAGER}
    assert any("backward" in f.op for f in found)
    assert any("lstm" in reason.lower() for reason in report.graph_breaks)


@pytest.mark.gpu
def test_cudnn_is_seen_in_a_run_of_a_recurrence():
    compiled = torch.compile(Recurrent().cuda(), backend="triton_only")
    run = tob.profile(compiled, torch.randn(8, 64, device="cuda"))
    assert {row.provider for row in run.violations} & {P.CUDNN, P.CUBLAS}


def test_a_culprit_between_the_graphs_is_found_forward_and_backward(matrix):
    report = tob.audit(broken, matrix.requires_grad_())
    eager = [f for f in report.findings if f.reason is Reason.EAGER]
    forward = [f for f in eager if "out_of_sight" in f.source_line]
    assert [f.op for f in forward] == ["aten.mm.default"]
    assert sum(f.count for f in eager if f.op == "aten.mm.default") == 3  # two in the backward
    (reason,) = report.graph_breaks
    assert "in broken: return torch.cos(out_of_sight(torch.sin(a)))" in reason
    assert all(name.startswith("graph") for name in report.graphs)


def test_harmless_code_between_the_graphs_is_no_finding(device):
    @torch.compiler.disable
    def views(a):
        return a.view(-1).detach().clone().view_as(a)

    report = tob.audit(lambda a: views(a.sin()).cos(), torch.randn(8, 8, device=device))
    assert report.is_triton_only
    assert report.graph_breaks
    assert [f.op for f in report.listed] == ["aten.clone.default"]


def test_a_culprit_in_the_backward_only_is_found(matrix):
    clean = tob.audit(torch.relu, matrix)
    assert clean.is_triton_only
    function = LibraryInBackward.apply
    report = tob.audit(lambda a: function(a), matrix.requires_grad_())
    assert {f.graph.split("(")[1] for f in report.findings} == {"backward)"}
    assert named(report, "aten.mm") == {P.CUBLAS}
    compiled = torch.compile(lambda a: function(a), backend="triton_only")
    output = compiled(matrix)
    with pytest.raises(tob.AuditError):
        output.sum().backward()


def test_a_culprit_in_a_recompilation_for_other_shapes_is_found(device):
    def by_length(a):
        return a.kthvalue(2)[0] if a.shape[0] > 8 else torch.relu(a)

    compiled = torch.compile(by_length, backend="triton_only", dynamic=True)
    for rows in (3, 5, 8):
        compiled(torch.randn(rows, 16, device=device))
    with pytest.raises(tob.AuditError) as raised:
        compiled(torch.randn(9, 16, device=device))
    assert named(raised.value.report, "aten.kthvalue") == {P.ATEN}


def test_symbolic_shapes_are_told(device):
    def function(a):
        return a.kthvalue(2)[0]

    report = audit_with(function, [torch.randn(9, 16, device=device)], dynamic=True)
    (finding,) = report.findings
    assert "s" in finding.inputs[0].split("[")[1]


def test_a_culprit_in_a_cached_graph_is_found(matrix):
    def function(a):
        return torch.kthvalue(torch.tanh(a), 2)[0]

    reports = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        reports.append(tob.audit(function, matrix))
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    first, second = (r.to_dict()["findings"] for r in reports)
    for finding in (*first, *second):
        finding.pop("graph")
    assert first == second != []
    assert reports[0].to_dict()["coverage"] == reports[1].to_dict()["coverage"]


# Kernels that are not what they are called


class Planted:
    """Device events as Kineto gives them."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def events(self) -> list[Any]:
        cuda = torch._C._autograd.DeviceType.CUDA
        return [
            SimpleNamespace(
                name=lambda name=name: name,
                device_type=lambda: cuda,
                metadata_json=lambda: "",
                is_user_annotation=lambda: False,
                start_ns=lambda: 0,
                duration_ns=lambda: 1000,
            )
            for name in self.names
        ]


def test_a_name_makes_no_triton_kernel():
    names = ["triton_fake", "triton_poi_fused_fake_0", "_triton_fake_kernel", "gemm_kernel_v2"]
    results = SimpleNamespace(kineto_results=Planted(*names))
    events = runtime._device_events(SimpleNamespace(profiler=results))
    report = runtime.report_of(events, "gpu")
    assert {row.name for row in report.violations} == set(names)
    assert report.triton_time_share == 0


CUDA_SOURCE = """
extern "C" __global__ void NAME(float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = 2.0f * out[i];
}
"""


def cuda_kernel(name: str, threads: int) -> Callable[[torch.Tensor], None]:
    kernel = torch.cuda._compile_kernel(CUDA_SOURCE.replace("NAME", name), name)

    def launch(out: torch.Tensor) -> None:
        blocks = -(-out.numel() // threads)
        kernel(grid=(blocks, 1, 1), block=(threads, 1, 1), args=[out, out.numel()])

    return launch


@pytest.mark.gpu
def test_a_cuda_kernel_that_is_called_triton_fake_is_found():
    fake, out = cuda_kernel("triton_fake", 128), torch.ones(1024, device="cuda")
    compiled = torch.compile(lambda a: torch.relu(a) + 1, backend="triton_only")
    run = tob.profile(lambda: (compiled(out), fake(out)))
    assert [row.name for row in run.violations] == ["triton_fake"]
    assert run.violations[0].provider is P.UNKNOWN


@pytest.mark.gpu
def test_a_cuda_kernel_with_the_name_of_a_triton_kernel_is_found():
    out = torch.ones(1024, device="cuda")
    compiled = torch.compile(lambda a: torch.relu(a) * 3 + 1, backend="triton_only")
    honest = tob.profile(compiled, out)
    assert honest.is_triton_only
    (name,) = [row.name for row in honest.rows if row.provider.is_triton]
    counterfeit = cuda_kernel(name, 96)  # Triton's blocks are powers of two
    run = tob.profile(lambda: (compiled(out), counterfeit(out)))
    assert [row.name for row in run.violations] == [name]
    assert not run.is_triton_only


@pytest.mark.gpu
def test_library_calls_in_a_cuda_graph_are_found():
    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda a: torch.relu(a) + 1, backend="triton_only")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compiled(x @ x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compiled(x @ x)
    run = tob.profile(graph.replay)
    assert {row.provider for row in run.violations} == {P.CUBLAS}
    assert any(row.provider is P.TRITON_INDUCTOR for row in run.rows)


@pytest.mark.gpu
def test_our_own_cuda_graphs_are_clean():
    layer = nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="triton_only", mode="reduce-overhead")
        run = tob.profile(compiled, x, warmup=5)
    assert run.is_triton_only, run.to_text()
