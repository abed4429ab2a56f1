"""Models through the backend: attention, products, graphs within graphs, dynamic shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import assert_compiles, compiled
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import triton_only_backend as tob
from triton_only_backend import interpreter
from triton_only_backend.backend import compiled_reports

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


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
