"""linear_fused against fp64, its error beside that of PyTorch's own chain of ops on the same input."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import triton_only_backend  # noqa: F401
from triton_only_backend.errors import UnsupportedProblemError
from triton_only_backend.kernels.limits import ACTIVATIONS

ours = torch.ops.triton_only
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 0.125  # against a mean square of 0.25: it shows when it is left out
ROWS = (1, 2, 3, 5, 16, 33, 130)
ACT = {
    "none": lambda x: x,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}


@dataclass
class Problem:
    """A call of the op, and what PyTorch makes of it."""

    input: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    options: dict[str, Any]

    def run(self) -> list[torch.Tensor]:
        return ours.linear_fused(self.input, self.weights, self.biases, **self.options)

    def reference(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """The same in another dtype, an op at a time: in fp64 exact, in the input's the vendor's."""
        options = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()
        }
        x = self.input.to(dtype)
        if options.get("norm_centered"):
            weight, bias = options.get("norm_weight"), options.get("norm_bias")
            weight = (
                None if weight is None else (weight + options.get("norm_offset", 0.0)).to(dtype)
            )
            x = F.layer_norm(x, x.shape[1:], weight, bias, options["norm_eps"])
        elif "norm_weight" in options:
            wide = x if dtype == torch.float64 else x.float()
            rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + options["norm_eps"])
            x = (wide * rstd).to(dtype) * (options["norm_weight"] + options["norm_offset"])
        biases = [b.to(dtype) for b in self.biases] or [None] * len(self.weights)
        ys = [F.linear(x, w.to(dtype), b) for w, b in zip(self.weights, biases, strict=True)]
        activation = ACT[options.get("activation", "none")]
        gated = options.get("gated")
        ys = [activation(ys[0]) * ys[1]] if gated else [activation(y) for y in ys]
        if len(ys) == 1:
            y = ys[0] * options.get("multiplier", 1) * options.get("scale", 1.0)
            ys = [y + options.get("residual", 0)]
        return ys

    def check(self, allowance: float = 0.0) -> None:
        outs = self.run()
        exact, vendor = self.reference(torch.float64), self.reference(self.input.dtype)
        assert len(outs) == len(exact)
        for out, right, theirs in zip(outs, exact, vendor, strict=True):
            assert out.shape == right.shape
            assert out.dtype == self.input.dtype
            assert out.is_contiguous()
            error, vendor_error = ((t.double() - right).norm().item() for t in (out, theirs))
            # The output is rounded, and where more than two rows are normalised, so is the input.
            roundings = 2 if "norm_eps" in self.options else 1
            rounding = torch.finfo(out.dtype).eps / 2 * roundings
            rounding += torch.finfo(torch.float32).eps * 16
            # A residual may cancel most of what it is added to.
            residual = self.options.get("residual")
            size = right if residual is None else right.abs() + residual.double().abs()
            # On a handful of elements the vendor's error may be small by luck.
            factor = 2 if right.numel() > 100 else 4
            rounding_error = rounding * size.norm().item() + allowance
            assert error <= factor * max(vendor_error, rounding_error)


def problem(
    device: str,
    M: int,
    columns: tuple[int, ...],
    K: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    norm: torch.dtype | None = None,
    layer: str | None = None,
    conv1d: bool = False,
    multiplier: bool = False,
    residual: bool = False,
    **options: Any,
) -> Problem:
    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    if norm is not None:
        options |= {"norm_weight": normal(K, dtype=norm), "norm_eps": EPS}
        options.setdefault("norm_offset", 0.0)
    if layer is not None:
        options |= {f"norm_{name}": normal(K) for name in layer.split()}
        options |= {"norm_eps": EPS, "norm_centered": True}
    if multiplier:
        options["multiplier"] = normal(M, columns[0])
    if residual:
        options["residual"] = normal(M, columns[0])
    weights = [normal(K, n).T if conv1d else normal(n, K) for n in columns]
    biases = [normal(n) for n in columns] if bias else []
    return Problem(normal(M, K) / 2, weights, biases, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", ROWS)
def test_decode_step_of_a_llama(M, dtype, device):
    """q, k, v with the norm; o with the residual; gate and up; down with the residual."""
    problem(device, M, (64, 16, 16), 96, dtype, norm=dtype).check()
    problem(device, M, (96,), 64, dtype, residual=True).check()
    gate = problem(device, M, (112, 112), 96, dtype, norm=dtype, gated=True, activation="silu")
    gate.check()
    problem(device, M, (96,), 112, dtype, residual=True).check()


LAYER_NORMS = ("weight bias", "weight", "bias", "")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", ROWS)
def test_decode_step_of_gpt2(M, dtype, device):
    """c_attn with the norm; c_proj with the residual; c_fc with norm and GELU; c_proj."""
    conv1d = {"conv1d": True, "bias": True}
    problem(device, M, (144,), 48, dtype, layer="weight bias", **conv1d).check()
    problem(device, M, (48,), 48, dtype, residual=True, **conv1d).check()
    problem(
        device, M, (192,), 48, dtype, layer="weight bias", activation="gelu_tanh", **conv1d
    ).check()
    problem(device, M, (48,), 192, dtype, residual=True, **conv1d).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYER_NORMS, ids=lambda v: v or "neither")
@pytest.mark.parametrize("M", [1, 2, 3, 40])
def test_layer_norm(M, layer, dtype, device):
    for conv1d in (False, True):
        for columns, gated in (((33, 7, 40), False), ((24, 24), True)):
            problem(
                device, M, columns, 70, dtype, layer=layer, norm_offset=0.5 * ("weight" in layer),
                conv1d=conv1d, bias=gated, gated=gated, activation="gelu_tanh",
            ).check()  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [70, 4096, 70001])
@pytest.mark.parametrize("M", [1, 2, 5])
def test_layer_norm_of_a_mean_of_a_thousand_deviations(M, K, dtype, device):
    """As exact as PyTorch's: squares of x would leave nothing of the variance."""
    p = problem(device, M, (12,), K, dtype, layer="weight bias", bias=True)
    p.input = (torch.randn(M, K, device=device) + 1000).to(dtype)
    p.options["norm_eps"] = 1e-5
    # The mean is a number of fp32 itself: half a unit of its last place moves the whole row.
    rounding = torch.finfo(torch.float32).eps / 2 * 1000
    scale = (p.options["norm_weight"] + p.options.get("norm_offset", 0.0)).double()
    moved = F.linear(scale, p.weights[0].double()).norm().item() * M**0.5
    p.check(allowance=rounding * moved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 5])
def test_layer_norm_of_rows_unlike_each_other(M, dtype, device):
    """One element far from the others; all alike, where eps is all there is; all zero."""
    p = problem(device, M, (12,), 300, dtype, layer="weight bias")
    p.input = torch.randn(M, 300, device=device)
    p.input[0, 0] = 1000
    p.input = p.input.to(dtype)
    p.check()
    for level in (3.0, 0.0):
        p.input = torch.full_like(p.input, level)
        for out, exact in zip(p.run(), p.reference(torch.float64), strict=True):
            torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("M", [2, 5])
def test_every_activation(M, gated, activation, device):
    columns = (33, 33) if gated else (33,)
    for dtype in (torch.float32, torch.bfloat16):
        options = {"activation": activation, "gated": gated, "scale": 0.5}
        whole = problem(
            device, M, columns, 70, dtype, bias=True, multiplier=True, residual=True, **options
        )
        whole.check()
        problem(device, M, (40, 7, 9), 64, dtype, activation=activation).check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_where_they_are_delicate(activation, device):
    """Near 0, where tanh must not cancel; far out, where exp overflows; NaN, which must stay."""
    x = torch.tensor(
        [1e-30, -1e-6, 1e-3, 0.29, 0.31, -0.3, 5.0, -9.0, -80.0, 90.0, -200.0, 1e6], device=device
    )
    out = ours.linear_fused(
        x[:, None], [torch.ones(1, 1, device=device)], [], activation=activation
    )
    expected = ACT[activation](x.double())
    torch.testing.assert_close(out[0][:, 0].double(), expected, rtol=2e-6, atol=1e-15)
    nan = torch.full((1, 1), float("nan"), device=device)
    assert ours.linear_fused(nan, [nan], [], activation=activation)[0].isnan().all()


PARTS = ("bias", "multiplier", "residual", "scale", "norm")


@pytest.mark.parametrize("chosen", list(itertools.product([False, True], repeat=5)), ids=str)
def test_every_combination_of_parts(chosen, device):
    parts: dict[str, Any] = dict(zip(PARTS, chosen, strict=True))
    parts["scale"] = -0.75 if parts["scale"] else 1.0
    parts["norm"] = torch.float32 if parts["norm"] else None
    for M in (1, 17):
        problem(device, M, (20,), 48, torch.bfloat16, **parts).check()
        problem(device, M, (20, 20), 48, torch.bfloat16, gated=True, **parts).check()


@pytest.mark.parametrize("K", [1, 7, 127, 1030])
@pytest.mark.parametrize("N", [1, 5, 67])
@pytest.mark.parametrize("M", [1, 2, 4, 19])
def test_odd_sizes(M, N, K, device):
    parts = {"bias": True, "norm": torch.bfloat16, "norm_offset": 1.0, "residual": True}
    problem(device, M, (N,), K, torch.bfloat16, **parts).check()
    problem(device, M, (N, N), K, torch.float16, gated=True, activation="gelu", **parts).check()
    layer = {"layer": "weight bias", "norm_offset": 0.0, "bias": True, "residual": True}
    for conv1d in (False, True):
        problem(device, M, (N,), K, torch.bfloat16, conv1d=conv1d, **layer).check()


@pytest.mark.parametrize("M", [2, 6])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("what", ["input", "weights", "biases", "all", "everything else"])
def test_any_strides(what, kind, M, device):
    norm: dict[str, Any] = {"norm": torch.bfloat16} if kind == "rms" else {"layer": "weight bias"}
    p = problem(
        device, M, (24, 24), 40, torch.bfloat16, bias=True, gated=True, multiplier=True,
        residual=True, activation="silu", norm_offset=0.0, **norm,
    )  # fmt: skip

    def strided(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full([2 * n + 1 for n in t.shape][::-1], float("nan"), dtype=t.dtype)
        view = wide.to(device).permute(*range(t.dim())[::-1])[(slice(1, None, 2),) * t.dim()]
        return view.copy_(t)

    if what in ("input", "all"):
        p.input = strided(p.input)
    if what in ("weights", "all"):
        p.weights = [p.weights[0].T.contiguous().T, strided(p.weights[1])]
    if what in ("biases", "all"):
        p.biases = [strided(b) for b in p.biases]
    if what in ("everything else", "all"):
        for name in ("norm_weight", "norm_bias", "multiplier", "residual"):
            if name in p.options:
                p.options[name] = strided(p.options[name])
    p.check()


def padded(t: torch.Tensor) -> torch.Tensor:
    """The same matrix with NaN behind the end of each row, which a kernel must not read."""
    wide = torch.full((t.shape[0], t.shape[1] + 64), float("nan"), dtype=t.dtype, device=t.device)
    return wide[:, : t.shape[1]].copy_(t)


@pytest.mark.parametrize("M", [2, 6])
@pytest.mark.parametrize("shape", ["()", "(24,)", "(1, 24)", "(M, 1)", "(1, 1)"])
def test_operands_broadcast(shape, M, device):
    p = problem(device, M, (24,), 40, torch.float32)
    shape = eval(shape, {"M": M})
    p.options |= {"multiplier": torch.randn(shape, device=device)}
    p.check()
    p.options |= {"residual": torch.randn(shape, device=device).double().half()}
    p.check()


@pytest.mark.parametrize("M", [0, 2, 3])
@pytest.mark.parametrize("columns", [(8,), (8, 0, 4), (0,), (8, 8)], ids=str)
@pytest.mark.parametrize("K", [0, 16])
def test_zero_sizes(K, columns, M, device):
    gated = columns == (8, 8)
    p = problem(device, M, columns, K, torch.float32, bias=True, norm=torch.float32, gated=gated)
    if K == 0:
        p.input, p.options["norm_eps"] = p.input.new_zeros(M, 0), 1.0
    outs = p.run()
    p.options.pop("norm_weight" if K == 0 else "", None)
    for out, exact in zip(outs, p.reference(torch.float64), strict=True):
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("M", [0, 1, 4])
def test_layer_norm_of_no_columns(M, device):
    p = problem(device, M, (8, 3), 0, torch.float32, bias=True, layer="weight bias")
    for out, bias in zip(p.run(), p.biases, strict=True):
        assert torch.equal(out, bias.expand(M, -1))


def test_norm_of_a_row_that_is_read_in_parts(device):
    problem(device, 3, (2,), 70000, torch.bfloat16, norm=torch.bfloat16, norm_offset=1.0).check()


def test_five_weights(device):
    problem(
        device, 2, (8, 24, 8, 40, 16), 64, torch.bfloat16, bias=True, norm=torch.float32
    ).check()


@pytest.mark.parametrize("M", [2, 19])
def test_repeats_bitwise(M, device):
    p = problem(
        device, M, (40, 40), 700, torch.bfloat16, norm=torch.bfloat16, gated=True, residual=True
    )
    first = p.run()[0]
    assert all(torch.equal(first, p.run()[0]) for _ in range(3))


def test_does_not_touch_its_operands(device):
    p = problem(
        device, 2, (40, 40), 64, torch.bfloat16, norm=torch.bfloat16, gated=True, bias=True,
        multiplier=True, residual=True,
    )  # fmt: skip
    tensors = [p.input, *p.weights, *p.biases]
    tensors += [v for v in p.options.values() if isinstance(v, torch.Tensor)]
    before = [t.clone() for t in tensors]
    out = p.run()[0]
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert all(out.data_ptr() != t.data_ptr() for t in tensors)


@pytest.mark.parametrize("M", [2, 5])
def test_opcheck(M, device):
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    p = problem(device, M, (16, 24), 32, torch.float32, bias=True, norm=torch.float32)
    opcheck(ours.linear_fused.default, (p.input, p.weights, p.biases), p.options, test_utils=utils)
    p = problem(device, M, (16, 16), 32, torch.float32, gated=True, residual=True, scale=2.0)
    opcheck(ours.linear_fused.default, (p.input, p.weights, p.biases), p.options, test_utils=utils)
    p = problem(device, M, (16, 24), 32, torch.float32, layer="weight bias", conv1d=True)
    opcheck(ours.linear_fused.default, (p.input, p.weights, p.biases), p.options, test_utils=utils)


@pytest.mark.parametrize("kind", ["rms", "layer", "layer without weight"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradients(gated, kind, device):
    norm: dict[str, Any] = {"layer": "" if "without" in kind else "weight bias"}
    norm = {"norm": torch.float32} if kind == "rms" else norm
    p = problem(
        device, 3, (8, 8) if gated else (8,), 16, torch.float32, bias=True, conv1d=kind != "rms",
        multiplier=True, residual=True, gated=gated, activation="gelu_tanh", scale=0.5,
        norm_offset=0.0, **norm,
    )  # fmt: skip
    named = {k: v for k, v in p.options.items() if isinstance(v, torch.Tensor)}
    leaves = [p.input, *p.weights, *p.biases, *named.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    actual = torch.autograd.grad(p.run()[0].sin().sum(), leaves)
    expected = torch.autograd.grad(p.reference(torch.float64)[0].sin().sum(), leaves)
    for ours_, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours_, right, rtol=1e-4, atol=1e-4)


BAD = [
    ({"activation": "swish"}, "unknown activation 'swish'; known are none, relu"),
    ({"weights": []}, "no weights"),
    ({"weights": [(8, 15)]}, r"\[4, 16\] and \[15, 8\] do not multiply"),
    ({"gated": True}, "gated takes two weights"),
    ({"weights": [(8, 16), (9, 16)], "gated": True}, r"gated takes two weights.*\[8, 9\]"),
    ({"biases": [(9,)]}, r"biases of those lengths.*\[\[9\]\]"),
    ({"biases": [(8,), (8,)]}, "biases of those lengths"),
    ({"norm_weight": (15,)}, r"norm_weight \[15\] does not fit the input's 16 columns"),
    (
        {"norm_bias": (16, 1), "norm_centered": True},
        r"norm_bias \[16, 1\] does not fit the input's 16 columns",
    ),
    ({"norm_bias": (16,), "norm_weight": (16,)}, "norm_bias without norm_centered.*=True for Lay"),
    ({"norm_offset": 1.0, "norm_centered": True}, "norm_offset 1.0 without a norm_weight"),
    ({"norm_eps": 1e-5}, "norm_eps 1e-05 without a norm; give norm_weight"),
    ({"weights": [(8, 16), (8, 16)], "residual": (4, 8)}, "single output"),
    ({"weights": [(8, 16), (8, 16)], "scale": 2.0}, "single output"),
    ({"residual": (3, 8)}, r"expand"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(c) for c, _ in BAD])
def test_refuses_by_name(changes, message, device):
    def tensors(shapes: Any) -> Any:
        if isinstance(shapes, list):
            return [torch.randn(s, device=device) for s in shapes]
        return torch.randn(shapes, device=device) if isinstance(shapes, tuple) else shapes

    changes = {k: tensors(v) for k, v in changes.items()}
    weights = changes.pop("weights", [torch.randn(8, 16, device=device)])
    biases = changes.pop("biases", [])
    x = torch.randn(4, 16, device=device)
    with pytest.raises(RuntimeError, match=message):
        ours.linear_fused(x, weights, biases, **changes)


def test_refuses_other_dtypes(device):
    x, w = torch.ones(2, 8, device=device), torch.ones(4, 8, device=device)
    with pytest.raises(UnsupportedProblemError, match=r"triton_only\.linear_fused.*bfloat16.*cast"):
        ours.linear_fused(x, [w.bfloat16()], [])
    with pytest.raises(RuntimeError, match=r"residual is torch.float64; cast it"):
        ours.linear_fused(x, [w], [], residual=torch.ones(2, 4, device=device).double())
    with pytest.raises(RuntimeError, match=r"norm_bias is torch.float64; cast it"):
        ours.linear_fused(x, [w], [], norm_centered=True, norm_bias=x[0].double())


# The kernels, with configurations that the interpreter would not be given


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("k_major", [True, False], ids=["k-major", "n-major"])
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gemv_in_small_blocks(gated, centered, k_major, rows, device, monkeypatch):
    from triton_only_backend.kernels import linear_gemv as module
    from triton_only_backend.kernels.epilogue import Epilogue
    from triton_only_backend.kernels.linear_configs import GemvConfig
    from triton_only_backend.kernels.linear_gemv import linear_gemv
    from triton_only_backend.kernels.rms_norm import Norm

    columns = (40, 40) if gated else (40, 8, 24)
    norm: dict[str, Any] = {"layer": "weight bias"} if centered else {"norm": torch.float32}
    p = problem(
        device, rows, columns, 200, torch.bfloat16, norm_offset=1.0,
        bias=True, gated=gated, activation="silu", **norm,
    )  # fmt: skip
    # A row in one block, and in three and a part.
    monkeypatch.setattr(module, "block_of_row", lambda *_: 256 if gated else 64)
    p.input = padded(p.input)
    p.weights = [padded(w) if k_major else padded(w.T).T for w in p.weights]
    outs = [torch.full((rows, n), float("nan"), device=device).bfloat16() for n in columns]
    outs = outs[:1] if gated else outs
    linear_gemv(
        p.input, p.weights, p.biases, outs,
        config=GemvConfig(16, 64, 1, 3, k_major),
        norm=Norm(p.options["norm_weight"], EPS, 1.0, centered, p.options.get("norm_bias")),
        gated=gated, epilogue=Epilogue("silu"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "run", lambda _: outs)
        p.check()


@pytest.mark.parametrize("M", [3, 16, 40])
@pytest.mark.parametrize("normed", [False, True], ids=["bare", "normed"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("swap", [False, True], ids=["straight", "swapped"])
def test_skinny_linear(swap, gated, normed, M, device):
    from triton_only_backend.kernels.epilogue import Epilogue
    from triton_only_backend.kernels.linear_configs import SkinnyConfig
    from triton_only_backend.kernels.rms_norm import Norm
    from triton_only_backend.kernels.skinny_linear import skinny_linear

    for columns in ((40, 40),) if gated else ((40, 8, 24), (33,)):
        p = problem(
            device, M, columns, 152, torch.bfloat16, norm=torch.bfloat16 if normed else None,
            bias=True, gated=gated, residual=gated, activation="silu",
        )  # fmt: skip
        p.input, p.weights = padded(p.input), [padded(w) for w in p.weights]
        outs = [torch.full((M, n), float("nan"), device=device).bfloat16() for n in columns]
        outs = outs[:1] if gated else outs
        norm = Norm(p.options["norm_weight"], EPS, 0.0) if normed else None
        skinny_linear(
            p.input, p.weights, p.biases, outs,
            config=SkinnyConfig(64, 32, 64, 4, 3, swap), norm=norm, gated=gated,
            epilogue=Epilogue("silu", residual=p.options.get("residual")),
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Problem, "run", lambda _, outs=outs: outs)
            p.check()


@pytest.mark.parametrize("M", [5, 40])
@pytest.mark.parametrize(
    ("tma", "swap"), [(False, False), (False, True), (True, True)],
    ids=["pointers", "pointers, swapped", "descriptors"],
)  # fmt: skip
def test_gated_gemm(tma, swap, M, device):
    from triton_only_backend.kernels.epilogue import Epilogue
    from triton_only_backend.kernels.gated_gemm import gated_gemm
    from triton_only_backend.kernels.linear_configs import GatedConfig

    config = GatedConfig(tma, 16, 32, 32, 2, 4, 3, swap)
    for dtype, N in ((torch.bfloat16, 72), (torch.float16, 33)):
        p = problem(
            device, M, (N, N), 152, dtype, bias=N == 33, residual=True, multiplier=True,
            scale=2.0, gated=True, activation="gelu_tanh",
        )  # fmt: skip
        o = p.options
        p.input, p.weights = padded(p.input), [padded(w) for w in p.weights]
        out = torch.full((M, N), float("nan"), device=device, dtype=dtype)
        epilogue = Epilogue("gelu_tanh", o["multiplier"], 2.0, o["residual"])
        gated_gemm(p.input, p.weights, p.biases, out, config=config, epilogue=epilogue)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Problem, "run", lambda _, out=out: [out])
            p.check()


@pytest.mark.parametrize("order", ["in order", "reversed"])
@pytest.mark.parametrize("case", ["gated", "gated with operands", "two outputs"])
@pytest.mark.parametrize("M", [5, 40])
def test_pair_gemm(M, case, order, device):
    """Weights before and behind each other in memory, with rows and columns past the tiles."""
    from triton_only_backend.kernels.epilogue import Epilogue
    from triton_only_backend.kernels.linear_configs import PairConfig
    from triton_only_backend.kernels.pair_gemm import is_pair, pair_gemm

    config = PairConfig(16, 32, 32, 2, 4, 3)
    gated, operands = case != "two outputs", case == "gated with operands"
    for dtype, N in ((torch.bfloat16, 72), (torch.float16, 33)):
        p = problem(
            device, M, (N, N), 152, dtype, bias=N == 33, residual=operands, multiplier=operands,
            scale=2.0 if gated else 1.0, gated=gated, activation="silu",
        )  # fmt: skip
        o = p.options
        p.input = padded(p.input)
        weights = padded(torch.cat([p.weights[0], torch.zeros_like(p.weights[0]), p.weights[1]]))
        p.weights = [weights[:N], weights[2 * N :]]
        if order == "reversed":
            p.weights.reverse()
        assert is_pair(*p.weights)
        outs = [torch.full((M, N), float("nan"), device=device, dtype=dtype) for _ in range(2)]
        outs = outs[:1] if gated else outs
        epilogue = Epilogue("silu", o.get("multiplier"), o["scale"], o.get("residual"))
        pair_gemm(
            p.input, p.weights, p.biases, outs,
            config=config, num_sms=3, gated=gated, epilogue=epilogue,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Problem, "run", lambda _, outs=outs: outs)
            p.check()


def test_which_weights_one_descriptor_spans():
    from triton_only_backend.kernels.pair_gemm import is_pair

    rows = torch.empty(64, 48, dtype=torch.bfloat16)
    assert is_pair(rows[:16], rows[16:32]) and is_pair(rows[40:56], rows[:16])
    assert not is_pair(rows[:16], rows[:16])  # no distance
    assert not is_pair(rows[:16], rows[16:33])
    assert not is_pair(rows[:16, :40], rows[16:32, 1:41])  # 2 bytes off
    assert not is_pair(rows[:16], rows.view(32, 96)[:16, :48])


@pytest.mark.parametrize("kernel", ["gemm", "gemm_tma", "gemv"])
@pytest.mark.parametrize("swap", [False, True], ids=["straight", "swapped"])
@pytest.mark.parametrize("split_k", [1, 3])
def test_epilogue_in_every_product_kernel(split_k, swap, kernel, device):
    from triton_only_backend.kernels.epilogue import Epilogue
    from triton_only_backend.kernels.gemm import gemm
    from triton_only_backend.kernels.gemm_configs import GemmConfig
    from triton_only_backend.kernels.gemm_tma import gemm_tma
    from triton_only_backend.kernels.gemv import gemv

    M, N, K = (40, 2, 136) if swap else (2, 40, 136)
    p = problem(
        device, M, (N,), K, torch.bfloat16, bias=True, multiplier=True, residual=True,
        scale=0.5, activation="silu",
    )  # fmt: skip
    o = p.options
    epilogue = Epilogue("silu", o["multiplier"], 0.5, o["residual"])
    a, b, bias = p.input, p.weights[0].T, p.biases[0].expand(M, N)
    config = GemmConfig(kernel, 16, 32, 32, split_k, 4, 4, 2, swap_operands=swap)  # type: ignore[arg-type]
    out = torch.full((M, N), float("nan"), device=device, dtype=a.dtype)
    common: dict[str, Any] = {"alpha": 1.0, "beta": 1.0, "epilogue": epilogue}
    if kernel == "gemm_tma":
        for halves in (False, True):
            config = replace(config, store_halves=halves)
            gemm_tma(a, b, bias, out, config=config, num_sms=3, **common)
    elif kernel == "gemm":
        gemm(a[None], b[None], bias[None], out[None], config=config, precision="ieee", **common)
    else:
        gemv(a[None], b[None], bias[None], out[None], config=config, **common)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "run", lambda _: [out])
        p.check()


# What Hopper chooses, in tiles that small problems fill


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """Makes `linear` choose as on Hopper; the kernels that it took."""
    from triton_only_backend.kernels import linear, matmul
    from triton_only_backend.kernels.gemm_choice import heuristic_config
    from triton_only_backend.kernels.gemm_configs import GemmConfig
    from triton_only_backend.kernels.linear_configs import PairConfig, SkinnyConfig

    def pair(M: int, N: int, K: int, traits: Any, hardware: Any) -> PairConfig | None:
        return PairConfig(16, 16, 32, 2, 4, 2, not traits.is_awkward) if M > 16 else None

    def skinny(M: int, N: int, weights: int, *_: Any) -> SkinnyConfig | None:
        return SkinnyConfig(16, 16, 32, 4, 2) if M <= 16 and weights > 1 else None

    def product(problem: Any, hardware: Any) -> GemmConfig:
        if problem.aligned and problem.element_size == 2:
            return GemmConfig("gemm_tma", 16, 32, 32, 1, 2, 4, 2, store_halves=True)
        return heuristic_config(problem, hardware)

    names: list[str] = []

    def noting(module: Any, name: str) -> None:
        kernel = getattr(module, name)

        def note(*args: Any, **options: Any) -> None:
            names.append(name)
            kernel(*args, **options)

        monkeypatch.setattr(module, name, note)

    monkeypatch.setattr(linear, "select_pair", pair)
    monkeypatch.setattr(linear, "select_skinny", skinny)
    monkeypatch.setattr(linear, "select_gated", lambda *_: None)
    monkeypatch.setattr(matmul, "select_config", product)
    for name in ("pair_gemm", "skinny_linear"):
        noting(linear, name)
    for name in ("gemm_tma", "gemm"):
        noting(matmul, name)
    return names


def arranged(weights: list[torch.Tensor], how: str) -> list[torch.Tensor]:
    """The weights, or others of their shapes, where they may lie in memory."""
    N, K = weights[0].shape
    if how == "rows of one":
        return list(torch.cat(weights).split([len(w) for w in weights]))
    if how == "rows of one, reversed":
        return list(torch.cat(weights[::-1]).split([len(w) for w in weights[::-1]]))[::-1]
    if how == "columns of one":  # nearer to each other than a row to the next
        return [
            w[:, K * i : K * (i + 1)] for w in [torch.cat(weights, 1)] for i in range(len(weights))
        ]
    if how == "overlapping":
        rows = torch.cat(weights)
        return [rows[i : i + N] for i in range(len(weights))]
    if how == "the same twice":
        return [weights[0]] * len(weights)
    if how == "one of other strides":
        return [weights[0], *(padded(w) for w in weights[1:])]
    if how == "off 16 bytes":
        wide = torch.empty(
            N, K * len(weights) + 8, dtype=weights[0].dtype, device=weights[0].device
        )
        parts = [wide[:, 1 + K * i : 1 + K * (i + 1)] for i in range(len(weights))]
        return [part.copy_(w) for part, w in zip(parts, weights, strict=True)]
    return weights


ARRANGEMENTS = {
    "apart": True, "rows of one": True, "rows of one, reversed": True, "columns of one": True,
    "overlapping": True, "the same twice": False, "one of other strides": False,
    "off 16 bytes": False,
}  # fmt: skip


@pytest.mark.parametrize("gated", [False, True], ids=["two", "gated"])
@pytest.mark.parametrize("bias", ["no bias", "bias", "strided bias"])
@pytest.mark.parametrize("how", ARRANGEMENTS)
def test_two_weights_anywhere(how, bias, gated, taken, device):
    """Together where one descriptor spans both, else one by one; never wrong."""
    for M, N, dtype in ((20, 24, torch.bfloat16), (37, 40, torch.float16), (5, 24, torch.bfloat16)):
        p = problem(
            device, M, (N, N), 40, dtype, bias=bias != "no bias", gated=gated, activation="silu"
        )
        p.weights = arranged(p.weights, how)
        if bias == "strided bias":
            p.biases = [p.biases[0], p.biases[1][:1].expand(N)]
        taken.clear()
        p.check()
        strided = bias == "strided bias" or how == "off 16 bytes"
        if M == 5:
            assert ("skinny_linear" in taken) != strided
        else:
            assert ("pair_gemm" in taken) == (ARRANGEMENTS[how] and not strided)


def test_pairs_of_many_weights(taken, device):
    """(q, k, v), where two are alike; two pairs; three that are alike; and one alone."""
    for columns, expected in (
        ((64, 16, 16), ["pair_gemm", "gemm_tma"]),
        ((16, 24, 16, 24), ["pair_gemm", "pair_gemm"]),
        ((16, 16, 16), ["pair_gemm", "gemm_tma"]),
        ((16, 24, 32), ["gemm_tma"] * 3),
        ((24,), ["gemm_tma"]),
        ((20, 20), ["gemm_tma"] * 2),  # rows of the outputs are not aligned
        ((24, 0, 24), ["pair_gemm"]),
    ):
        p = problem(
            device, 33, columns, 48, torch.bfloat16, bias=True, norm=torch.bfloat16,
            activation="gelu",
        )  # fmt: skip
        taken.clear()
        p.check()
        assert taken == expected


@pytest.mark.parametrize("conv1d", [False, True], ids=["nn.Linear", "Conv1D"])
def test_layer_norm_before_what_several_rows_take(conv1d, taken, device):
    """The norm has a kernel of its own, the products those that they have without it."""
    for M, columns, expected in (
        (5, (24, 24), ["skinny_linear"]),
        (37, (24, 24), ["pair_gemm"]),
        (37, (24,), ["gemm_tma"]),
    ):
        p = problem(
            device, M, columns, 40, torch.bfloat16, layer="weight bias", bias=True, conv1d=conv1d
        )
        taken.clear()
        p.check()
        assert taken == (["gemm_tma"] * len(columns) if conv1d else expected)


@pytest.mark.parametrize("columns", [24, 20])
@pytest.mark.parametrize("what", ["multiplier", "residual"])
@pytest.mark.parametrize("form", ["plain", "row", "column", "one", "wide", "padded", "transposed"])
def test_gate_with_any_operand(form, what, columns, taken, device):
    p = problem(
        device, 37, (columns, columns), 40, torch.bfloat16, gated=True, activation="silu",
        bias=True, **{what: True},
    )  # fmt: skip
    t = p.options[what]
    p.options[what] = {
        "plain": t, "row": t[:1], "column": t[:, :1], "one": t[0, 0], "wide": t.float(),
        "padded": padded(t), "transposed": t.T.contiguous().T,
    }[form]  # fmt: skip
    p.check()
    assert taken == ["pair_gemm"]


@pytest.mark.parametrize("columns", [(24,), (24, 24), (24, 16, 16)], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("M", [5, 37])
def test_outputs_off_16_bytes(M, gated, columns, taken, device):
    from triton_only_backend.kernels.epilogue import Epilogue
    from triton_only_backend.kernels.linear import linear

    if gated and len(columns) != 2:
        return
    p = problem(device, M, columns, 40, torch.bfloat16, gated=gated, activation="silu")
    shapes = [(M, n) for n in (columns[:1] if gated else columns)]
    outs = [
        torch.full((M * n + 1,), float("nan"), device=device).bfloat16()[1:].view(M, n)
        for _, n in shapes
    ]
    if len(outs) > 1:  # one of a pair is enough
        outs[0] = torch.empty(shapes[0], device=device, dtype=torch.bfloat16)
    linear(p.input, p.weights, None, outs, gated=gated, epilogue=Epilogue("silu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "run", lambda _: outs)
        p.check()


@pytest.mark.parametrize("M", [5, 37])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_no_columns_of_a_wide_input(gated, M, taken, device):
    """K = 0 with strides that descriptors would take: they take no dimension of no size."""
    p = problem(device, M, (24, 24), 40, torch.bfloat16, bias=True, gated=gated)
    p.input, p.weights = p.input[:, :0], [w[:, :0] for w in p.weights]
    for out, exact in zip(p.run(), p.reference(torch.float64), strict=True):
        torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=1e-5)
    assert set(taken) == {"gemm"}
