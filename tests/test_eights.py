"""Sizes and strides that 8 divides and 16 does not are read in whole pieces, and read rightly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cross_compile import rows_of

import triton_only_backend  # noqa: F401
from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.eights import eights, eights_of_heads
from triton_only_backend.kernels.gemm_configs import GemmConfig

ours = torch.ops.triton_only
# Each form with a size that 16 divides and the next that only 8 does: the same loads and stores.
SCRIPT = """
import collections, json, re, sys
from cross_compile import compile_for
compiled = compile_for(sys.argv[1])
import torch
from triton_only_backend.kernels import grouped_gemm, hardware, layer_norm, linear, rms_norm, sdpa
from triton_only_backend.kernels import tuned
from triton_only_backend.kernels.attention_arguments import Inputs, Options
from triton_only_backend.kernels.gemm_configs import GemmConfig
from triton_only_backend.kernels.matmul import matmul

def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)

TILES = GemmConfig("gemm", 64, 64, 32, 1, 8, 4, 3)
ROWS = GemmConfig("gemv", 1, 16, 256, 1, 1, 4, 4)

def product(M, N, K, config, k_major=True, batch=1):
    b = empty(batch, N, K).mT if k_major else empty(batch, K, N)
    with tuned.forcing("gemm", config):
        matmul(empty(batch, M, K), b, None, empty(batch, M, N))

def gated(M, K):
    linear.linear(
        empty(M, K), [empty(3072, K), empty(3072, K)], None, [empty(M, 3072)], gated=True,
        epilogue=linear.Epilogue("silu"),
    )

def layers(M, K, N, k_major=True):
    weights = [empty(n, K) if k_major else empty(K, n).mT for n in (N, 1024, 1024)]
    outs = [empty(M, n) for n in (N, 1024, 1024)]
    linear.linear(empty(M, K), weights, None, outs, norm=linear.Norm(empty(K), 1e-5, 0.0))

def grouped(K, k_major):
    b = empty(4, 512, K).mT if k_major else empty(4, K, 512)
    config = grouped_gemm.select_config(64, 2, hardware.of(None))
    offs = torch.empty(4, dtype=torch.int32)
    grouped_gemm.grouped_rows(
        empty(100, K), b, offs, empty(100, 512), config=config, precision="ieee"
    )

def heads(length, D, dense):
    return empty(2, 16, length, D) if dense else empty(2, length, 16, D).transpose(1, 2)

def attention(length, D, dense):
    q, k, v = heads(length, D, dense), heads(512, D, dense), heads(512, D, dense)
    sdpa.forward(Inputs(q, k, v), Options(), with_logsumexp=False)

def gradients(D, dense):
    q, k, v, out, grad = (heads(512, D, dense) for _ in range(5))
    sdpa.backward(grad, Inputs(q, k, v), out, torch.empty(2, 16, 512), Options())

FORMS = {
    "tiles": lambda n: product(64, 384, n + 1440, TILES),
    "tiles along n": lambda n: product(64, n + 1440, 1536, TILES, False),
    "tiles, batched": lambda n: product(64, 384, n + 1440, TILES, batch=4),
    "columns": lambda n: product(64, n + 1440, 1536, TILES),
    "a row": lambda n: product(1, 384, n + 1440, ROWS),
    "two rows, along n": lambda n: product(2, n + 1440, 1536, ROWS, False),
    "gated row": lambda n: gated(1, n + 1440),
    "layers of a row": lambda n: layers(2, n + 1440, n + 2992),
    "layers of a row, along n": lambda n: layers(2, 1536, n + 2992, k_major=False),
    "gated": lambda n: gated(256, n + 1440),
    "groups": lambda n: grouped(n + 1440, False),
    "groups along k": lambda n: grouped(n + 1440, True),
    "root mean square": lambda n: rms_norm.rms_norm(
        empty(64, n), rms_norm.Norm(empty(n), 1e-5, 0.0), empty(64, n)
    ),
    "layer norm": lambda n: layer_norm.layer_norm(
        empty(64, n), rms_norm.Norm(empty(n), 1e-5, 0.0, True, empty(n)), empty(64, n)
    ),
    "prefill": lambda n: attention(512, n, False),
    "prefill, heads first": lambda n: attention(511, n, True),
    "decoding": lambda n: attention(1, n, False),
    "decoding, heads first": lambda n: attention(1, n, True),
    "gradients": lambda n: gradients(n, False),
    "gradients, heads first": lambda n: gradients(n, True),
}
ACCESS = r"(?:cp\\.async\\.c\\w\\.\\S*|cp\\.async\\.bulk\\.tensor|(?:ld|st)\\.global\\S*|(?:buffer|global)_(?:load|store)\\w*)"
for name, form in FORMS.items():
    for size in (80, 72):
        form(size)
        kernels = []
        for kernel in compiled:
            text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
            found = re.findall(ACCESS + r"|(?<=\\], )0x[48]|(?<=\\], )0x10", text)
            kernels.append([kernel.name, kernel.spilled, dict(collections.Counter(found))])
        compiled.clear()
        print(json.dumps([name, size, kernels]))
"""


@pytest.mark.parametrize("target", ["sm80", "sm90", "gfx942"])
def test_the_same_loads_as_of_a_size_that_16_divides(target):
    rows = rows_of(SCRIPT, target)
    assert len(rows) == 40
    for (name, _, sixteen), (_, _, eight) in zip(rows[::2], rows[1::2], strict=True):
        assert [kernel for kernel, _, _ in sixteen] == [kernel for kernel, _, _ in eight], name
        for (kernel, spilled, by_16), (_, more, by_8) in zip(sixteen, eight, strict=True):
            assert by_16 == by_8, (name, kernel)
            assert sum(by_16.values()) > 0, (name, kernel)
            assert more <= spilled + 16, (name, kernel)


def test_which_numbers_are_said():
    assert eights(16, 8, 24, 1, 0, 12, 1512) == 0b1000110
    query, value = torch.empty(2, 4, 5, 72), torch.empty(2, 4, 7, 64)
    assert eights_of_heads((64, 128), query, value) == 0
    # The head dimensions, 4 · 5 · 72, 5 · 72, 72, 1; 4 · 7 · 64, 7 · 64, 64, 1.
    assert eights_of_heads((72, 64), query, value) == 0b0000_0110_01


TILES = GemmConfig("gemm", 32, 32, 32, 1, 8, 4, 2)
TWO = GemmConfig("gemm", 16, 32, 32, 2, 8, 4, 2, swap_operands=True)
ROW = GemmConfig("gemv", 1, 16, 64, 1, 1, 4, 2)


@pytest.mark.parametrize("config", [TILES, TWO, ROW], ids=["tiles", "in parts", "a row"])
@pytest.mark.parametrize(("N", "K"), [(40, 72), (56, 8), (24, 136), (72, 64)])
@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
def test_products(config, layout, N, K, device):
    torch.manual_seed(0)
    M = 2 if config.kernel == "gemv" else 24
    a = torch.randn(K, M, device=device).T if layout[0] == "t" else torch.randn(M, K, device=device)
    b = torch.randn(K, N, device=device) if layout[1] == "t" else torch.randn(N, K, device=device).T
    bias = torch.randn(N, device=device)
    with tuned.forcing("gemm", config):
        out = ours.addmm(bias, a, b)
    torch.testing.assert_close(out, bias + a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dims", [(72, 72), (8, 24), (64, 40), (88, 16)], ids=str)
@pytest.mark.parametrize("length", [1, 7, 32])
@pytest.mark.parametrize("dense", [True, False])
def test_attention(head_dims, length, dense, device):
    torch.manual_seed(0)

    def heads(length, head_dim):
        shape = (2, 3, length, head_dim) if dense else (2, length, 3, head_dim)
        x = torch.randn(shape, device=device)
        return (x if dense else x.transpose(1, 2)).requires_grad_()

    inputs = heads(length, head_dims[0]), heads(33, head_dims[0]), heads(33, head_dims[1])
    results = []
    for attend in (ours.attention, F.scaled_dot_product_attention):
        out = attend(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
