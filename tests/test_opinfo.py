"""PyTorch's own sample inputs of every op that we replace: forward and backward, on our kernels.

The samples are those of torch.testing._internal.common_methods_invocations, which PyTorch tests its
own ops with. All of them run in eager mode, one of each op through torch.compile.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import triton_only_backend as tob
from triton_only_backend.errors import UnsupportedProblemError
from triton_only_backend.testing.accuracy import check_tensor, widen

SDPA = "nn.functional.scaled_dot_product_attention"
NAMES = ("mm", "addmm", "bmm", "baddbmm", "matmul", "nn.functional.linear", "einsum", SDPA)
OPS = {op.name: op for op in op_db if op.name in NAMES and op.variant_test_name == ""}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY = ("mm", "addmm", "bmm", "baddbmm")


class Recorder(TorchDispatchMode):
    """The products and attentions that were called below autograd."""

    def __init__(self):
        super().__init__()
        self.ours, self.library = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.ours += name.startswith("triton_only::")
        if name.removeprefix("aten::") in LIBRARY or "_scaled_dot_product" in name:
            self.library.add(name)
        return func(*args, **(kwargs or {}))


@functools.cache
def samples(name, dtype, device):
    torch.manual_seed(0)
    return list(OPS[name].sample_inputs(device, dtype, requires_grad=True))


def has_dropout(sample) -> bool:
    return sample.kwargs.get("dropout_p", 0.0) != 0.0


def leaves_of(sample):
    """The sample's tensors as leaves of their own, and a call of the op with them."""
    flat, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    tensors = [t.detach() for t in flat if isinstance(t, torch.Tensor)]

    def call(op, given):
        rest = iter(given)
        filled = [next(rest) if isinstance(t, torch.Tensor) else t for t in flat]
        first, args, kwargs = tree_unflatten(filled, spec)
        return op(first, *args, **kwargs)

    return tensors, call


def library_attention(query, key, value, attn_mask=None, *, enable_gqa=False, **options):
    """As the library's fused kernel takes it: four dimensions, no grouped heads.

    Its mathematical kernel would be no measure: it keeps what a fused backward computes anew from
    the rounded output.
    """
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(group, -3) for t in (key, value))
    ranks = 4 - query.dim()
    query, key, value = (t[(None,) * ranks] for t in (query, key, value))
    lead = torch.broadcast_shapes(*(t.shape[:-2] for t in (query, key, value)))
    query, key, value = (t.expand(*lead, *t.shape[-2:]) for t in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    return output[(0,) * ranks]


def library(name):
    return library_attention if name == SDPA else OPS[name].op


def has_other_ranks(name, tensors) -> bool:
    """PyTorch's mathematical kernel broadcasts query, key and value of other ranks, ours do not."""
    return name == SDPA and len({t.dim() for t in tensors[:3]}) > 1


def forward_and_backward(op, sample, tensors, call, cotangent=None):
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    output = call(op, leaves)
    ends = [t for t in leaves if t.requires_grad]
    if cotangent is None:
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    if not output.requires_grad:
        return [output], cotangent
    grads = torch.autograd.grad(output, ends, cotangent, allow_unused=True)
    return [output.detach(), *grads], cotangent


def judge(name, actual, vendor, exact):
    assert len(actual) == len(vendor)
    for i, (ours, theirs, truth) in enumerate(zip(actual, vendor, exact, strict=True)):
        if theirs is None:
            assert ours is None or not ours.any()
            continue
        check_tensor(f"{name} {'gradient' if i else 'output'} {i}", ours, theirs, truth, 3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_eager(name, dtype, device):
    ours = 0
    for sample in samples(name, dtype, device):
        tensors, call = leaves_of(sample)
        if has_dropout(sample):
            continue
        if has_other_ranks(name, tensors):
            with tob.eager(), pytest.raises(UnsupportedProblemError, match="dimensions; reshape"):
                call(OPS[name].op, tensors)
            continue
        vendor, cotangent = forward_and_backward(library(name), sample, tensors, call)
        exact, _ = forward_and_backward(
            OPS[name].op, sample, widen(tensors), call, widen(cotangent)
        )
        recorder = Recorder()
        with recorder, tob.eager():
            actual, _ = forward_and_backward(OPS[name].op, sample, tensors, call, cotangent)
        judge(f"{name} {[list(t.shape) for t in tensors]} {sample.kwargs}", actual, vendor, exact)
        assert not recorder.library
        ours += recorder.ours
    assert ours > 0


def test_attention_with_dropout(device):
    """Its random numbers are our own: shapes, gradients and the mean are what can be said."""
    checked = 0
    for sample in samples(SDPA, torch.float32, device):
        tensors, call = leaves_of(sample)
        if not has_dropout(sample) or has_other_ranks(SDPA, tensors):
            continue
        with tob.eager():
            actual, _ = forward_and_backward(OPS[SDPA].op, sample, tensors, call)
        assert actual[0].shape == (*tensors[0].shape[:-1], tensors[2].shape[-1])
        shapes = [t.shape for t in tensors if t.is_floating_point()]
        assert [t.shape for t in actual[1:] if t is not None] == shapes[: len(actual) - 1]
        assert all(torch.isfinite(t).all() for t in actual if t is not None)
        checked += 1
    assert checked > 0


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name, device):
    """The largest sample of each op, with its gradients."""
    candidates = [
        s
        for s in samples(name, torch.float32, device)
        if not has_dropout(s) and not has_other_ranks(name, leaves_of(s)[0])
    ]
    sample = max(candidates, key=lambda s: sum(t.numel() for t in leaves_of(s)[0]))
    tensors, call = leaves_of(sample)
    vendor, cotangent = forward_and_backward(library(name), sample, tensors, call)
    exact, _ = forward_and_backward(OPS[name].op, sample, widen(tensors), call, widen(cotangent))
    op = F.scaled_dot_product_attention if name == SDPA else OPS[name].op
    compiled = torch.compile(lambda *given: call(op, given), backend="triton_only")
    actual, _ = forward_and_backward(
        None, sample, tensors, lambda _, given: compiled(*given), cotangent
    )
    judge(name, actual, vendor, exact)
