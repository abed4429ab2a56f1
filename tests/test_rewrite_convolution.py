"""Convolutions as products and short sums: graphs, numbers, gradients, and what is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import triton_only_backend as tob
from triton_only_backend import testing
from triton_only_backend.errors import AuditError
from triton_only_backend.passes.refusal import META_KEY
from triton_only_backend.passes.rewrite_convolution import rewrite_convolution


def last(x):
    """The same numbers with the channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


# name -> (function of input, weight, bias), and their shapes
CASES = {
    "patches": (lambda x, w, b: F.conv2d(x, w, b, stride=4), (2, 3, 9, 10), (8, 3, 4, 4), 8),
    "gaps and padding": (
        lambda x, w, b: F.conv2d(x, w, b, stride=3, padding=1),
        (2, 3, 7, 8), (8, 3, 2, 2), 8,
    ),
    "pointwise": (F.conv2d, (2, 3, 5, 4), (8, 3, 1, 1), 8),
    "pointwise, channels last": (
        lambda x, w, b: F.conv2d(last(x), w, b), (2, 3, 5, 4), (8, 3, 1, 1), 8,
    ),
    "pointwise, strided": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2), (2, 3, 5, 4), (8, 3, 1, 1), 8,
    ),
    "three dimensions": (
        lambda x, w, b: F.conv3d(x, w, b, stride=(1, 2, 2)), (2, 3, 3, 4, 5), (8, 3, 1, 2, 2), 8,
    ),
    "overlapping": (
        lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1), (2, 3, 9), (8, 3, 3), 8,
    ),
    "overlapping, dense": (lambda x, w, b: F.conv1d(x, w, b, padding=1), (2, 3, 9), (8, 3, 3), 8),
    "depthwise, causal": (
        lambda x, w, b: F.conv1d(x, w, b, padding=3, groups=6)[..., :7], (2, 6, 7), (6, 1, 4), 6,
    ),
    "depthwise, strided": (
        lambda x, w, b: F.conv2d(x, w, b, padding=1, stride=2, groups=6),
        (2, 6, 7, 8), (6, 1, 3, 3), 6,
    ),
    "depthwise, several filters, dilated": (
        lambda x, w, b: F.conv2d(x, w, b, padding=2, dilation=2, groups=3),
        (2, 3, 7, 8), (6, 1, 3, 3), 6,
    ),
    "transposed": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), (2, 3, 4, 5), (3, 6, 2, 2), 6,
    ),
    "transposed, padded": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=3, padding=1, output_padding=1),
        (2, 3, 4, 5), (3, 6, 2, 2), 6,
    ),
    "transposed, overlapping": (
        lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2, padding=1), (2, 3, 6), (3, 6, 4), 6,
    ),
    "transposed, depthwise": (
        lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2, padding=1, groups=6),
        (2, 6, 6), (6, 1, 4), 6,
    ),
}  # fmt: skip


def tensors(name, device="cpu"):
    _, *shapes = CASES[name]
    return [torch.randn(shape, device=device) for shape in shapes]


def strides(tensor):
    """Those that say where something lies: a size of 1 has any (cuDNN's gradients others)."""
    return [n for size, n in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("name", CASES)
def test_the_pass_is_sound(name):
    testing.assert_pass(
        rewrite_convolution, testing.capture(CASES[name][0], *tensors(name)), times=1
    )


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    """Three gradients from one node, each as accurate as ATen's, and laid out as eager's."""
    function, given = CASES[name][0], tensors(name)
    kwargs = {"training": True, "part": "backward"}
    needing = [t.requires_grad_() for t in given]
    gm = testing.capture(function, *needing, **kwargs)
    run = testing.assert_pass(rewrite_convolution, gm, times=1)
    testing.assert_ops(run, vanish=["aten.convolution_backward"])


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [(name, True) for name in CASES]
    + [(name, False) for name in ("patches", "depthwise, causal", "transposed")],
)
def test_compiled_forward_and_backward(name, dynamic, device):
    """Dynamic: each size is a symbol, that of the kernel too, which is guarded."""
    function, given = CASES[name][0], tensors(name, device)
    results = []
    for call, dtype in (
        (torch.compile(function, backend="triton_only", dynamic=dynamic), torch.float32),
        (function, torch.float32),
        (function, torch.float64),
    ):
        inputs = [t.to(dtype).requires_grad_() for t in given]
        y = call(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    for ours, eager, exact in zip(*results, strict=True):
        assert strides(ours) == strides(eager)
        limit = 3 * (eager - exact).norm() + 1e-7 * exact.norm()
        assert (ours - exact).norm() <= limit


class Image(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x):
        return self.embed(x).flatten(2).transpose(1, 2)


class TestGraphs(testing.PassTestCase):
    def test_patch_embedding(self):
        run = self.assertPass(
            rewrite_convolution, testing.capture(Image(), torch.randn(2, 3, 8, 8))
        )
        self.assertGraph(
            run,
            """\
arg0_1: f32[8, 3, 4, 4]
arg1_1: f32[8]
arg2_1: f32[2, 3, 8, 8]
view: f32[8, 48] = aten.view(arg0_1, [8, 48])
unfold: f32[2, 3, 2, 8, 4][192, 64, 32, 1, 8] = aten.unfold(arg2_1, 2, 4, 4)
unfold_1: f32[2, 3, 2, 2, 4, 4][192, 64, 32, 4, 8, 1] = aten.unfold(unfold, 3, 4, 4)
permute: f32[2, 2, 2, 3, 4, 4][192, 32, 4, 64, 8, 1] = aten.permute(unfold_1, [0, 2, 3, 1, 4, 5])
clone: f32[2, 2, 2, 3, 4, 4] = aten.clone(permute, memory_format=torch.contiguous_format)
view_1: f32[8, 48] = aten.view(clone, [8, 48])
permute_1: f32[48, 8][1, 48] = aten.permute(view, [1, 0])
addmm: f32[8, 8] = aten.addmm(arg1_1, view_1, permute_1)
view_2: f32[2, 2, 2, 8] = aten.view(addmm, [2, 2, 2, 8])
permute_2: f32[2, 8, 2, 2][32, 1, 16, 8] = aten.permute(view_2, [0, 3, 1, 2])
clone_1: f32[2, 8, 2, 2] = aten.clone(permute_2, memory_format=torch.contiguous_format)
reshape: f32[2, 8, 4] = aten.reshape(clone_1, [2, 8, 4])
permute_3: f32[2, 4, 8][32, 1, 4] = aten.permute(reshape, [0, 2, 1])
return (permute_3,)""",
        )

    def test_mamba(self):
        convolution = torch.nn.Conv1d(6, 6, 2, groups=6, padding=1)
        gm = testing.capture(lambda x: convolution(x)[..., :5], torch.randn(2, 6, 5))
        self.assertGraph(
            self.assertPass(rewrite_convolution, gm),
            """\
arg0_1: f32[6, 1, 2]
arg1_1: f32[6]
arg2_1: f32[2, 6, 5]
constant_pad_nd: f32[2, 6, 7] = aten.constant_pad_nd(arg2_1, [1, 1], 0.0)
view: f32[6, 2] = aten.view(arg0_1, [6, 2])
view_1: f32[6, 1] = aten.view(arg1_1, [-1, 1])
slice: f32[2, 6, 6][42, 7, 1] = aten.slice.Tensor(constant_pad_nd, 2, 0, 6)
select: f32[6][2] = aten.select.int(view, 1, 0)
view_2: f32[6, 1][2, 2] = aten.view(select, [-1, 1])
mul: f32[2, 6, 6] = aten.mul.Tensor(slice, view_2)
add: f32[2, 6, 6] = aten.add.Tensor(view_1, mul)
slice_1: f32[2, 6, 6][42, 7, 1] = aten.slice.Tensor(constant_pad_nd, 2, 1, 7)
select_1: f32[6][2] = aten.select.int(view, 1, 1)
view_3: f32[6, 1][2, 2] = aten.view(select_1, [-1, 1])
mul_1: f32[2, 6, 6] = aten.mul.Tensor(slice_1, view_3)
add_1: f32[2, 6, 6] = aten.add.Tensor(add, mul_1)
slice_2: f32[2, 6, 5][36, 6, 1] = aten.slice.Tensor(add_1, 2, 0, 5)
return (slice_2,)""",
        )


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Image(), (2, 3, 8, 8)), (torch.nn.Conv1d(6, 6, 4, groups=6, padding=3), (2, 6, 7))],
    ids=["patches of any number of images", "a sequence of any length"],
)
def test_symbolic_sizes(model, shape):
    x = torch.randn(shape)
    torch._dynamo.mark_dynamic(x, 2 if x.dim() == 3 else 0)
    testing.assert_dynamic(rewrite_convolution, testing.capture(model, x))


LEFT = {
    "windows that overlap": (torch.nn.Conv2d(3, 4, 3), (1, 3, 6, 6), "stride [1, 1] reads the input 9 times"),
    "large windows": (torch.nn.Conv2d(3, 4, 9, stride=6), (1, 3, 9, 9), "stride [6, 6]"),
    "groups": (torch.nn.Conv2d(4, 4, 2, stride=2, groups=2), (1, 4, 6, 6), "2 groups"),
    "dilation": (torch.nn.Conv1d(4, 4, 2, stride=2, dilation=2), (1, 4, 6), "dilation [2]"),
    "many weights": (torch.nn.Conv1d(4, 4, 65, groups=4), (1, 4, 65), "65 weights a channel"),
    "fp64": (torch.nn.Conv2d(3, 4, 2, stride=2).double(), (1, 3, 6, 6), "torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_says_why(name):
    model, shape, facts = LEFT[name]
    x = torch.randn(shape, dtype=next(model.parameters()).dtype)
    gm = testing.capture(model, x)
    assert rewrite_convolution(gm.graph) == 0
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    assert facts in node.meta[META_KEY]["detail"]


def test_the_report_says_what_to_do(device):
    model = torch.compile(torch.nn.Conv2d(3, 4, 3).to(device), backend="triton_only")
    with pytest.raises(AuditError, match="reads the input 9 times") as error:
        model(torch.randn(1, 3, 6, 6, device=device))
    assert 'mode="max-autotune"' in str(error.value)


def test_left_out_by_name(device):
    x = torch.randn(2, 3, 8, 8, device=device)
    options = {"disable_passes": ["rewrite_convolution"], "on_violation": "ignore"}
    model = Image().to(device)
    report = tob.audit(torch.compile(model, backend="triton_only"), x)
    assert report.is_triton_only
    torch._dynamo.reset()
    before = len(tob.backend.compiled_reports())
    torch.compile(model, backend="triton_only", options=options)(x)
    assert not tob.backend.compiled_reports()[before].is_triton_only
