"""Packed sequences and nested tensors: each sequence as if it were alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import triton_only_backend as tob
from triton_only_backend.errors import UnsupportedProblemError
from triton_only_backend.kernels.nested_attention import nested_attention
from triton_only_backend.passes.capture_attention import capture_attention
from triton_only_backend.passes.refusal import META_KEY

ours = torch.ops.triton_only
LENGTHS = ((5, 17, 1, 40), (5, 17, 1, 40))
UNEQUAL = ((5, 0, 9, 33), (12, 7, 0, 20))


def packed(lengths, *, heads=2, kv_heads=2, dim=16, dtype=torch.float32, device, grad=True):
    """Query, key and value with where their sequences begin."""
    totals = [sum(part) for part in lengths]
    shapes = ((totals[0], heads, dim), (totals[1], kv_heads, dim), (totals[1], kv_heads, dim))
    tensors = [torch.randn(s, device=device).to(dtype).requires_grad_(grad) for s in shapes]
    starts = [
        torch.tensor([sum(part[:i]) for i in range(len(part) + 1)], device=device)
        for part in lengths
    ]
    return tensors, starts, [max(part) for part in lengths]


def one_by_one(tensors, starts, attend):
    """The outputs of attention on each sequence by itself, packed again."""
    query, key, value = tensors
    outputs = []
    for i in range(len(starts[0]) - 1):
        rows, keys = (slice(int(s[i]), int(s[i + 1])) for s in starts)
        q, k, v = (t.transpose(0, 1)[None] for t in (query[rows], key[keys], value[keys]))
        outputs.append(attend(q, k, v)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [LENGTHS, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"window_right": 0}, {"window_left": 6, "softcap": 4.0}],
    ids=lambda o: ",".join(o) or "full",
)
def test_each_sequence_as_if_alone(options, lengths, kv_heads, index, device):
    tensors, starts, longest = packed(lengths, heads=4, kv_heads=kv_heads, device=device)
    starts = [s.to(index) for s in starts]
    out = ours.attention_varlen(*tensors, *starts, *longest, **options)

    def alone(q, k, v):
        return ours.attention(q, k, v, enable_gqa=True, **options)

    expected = one_by_one(tensors, starts, alone)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, tensors, grad)
    for a, e in zip(actual, torch.autograd.grad(expected, tensors, grad), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_as_pytorch(dtype, device):
    tensors, starts, longest = packed(LENGTHS, dtype=dtype, device=device, grad=False)
    out = ours.attention_varlen(*tensors, *starts, *longest, is_causal=True)

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    exact = one_by_one([t.double() for t in tensors], starts, torchs)
    error, yardstick = (
        (x.double() - exact).norm() for x in (out, one_by_one(tensors, starts, torchs))
    )
    assert error <= 1.5 * yardstick


def test_neighbours_do_not_leak_into_each_other(device):
    tensors, starts, longest = packed(LENGTHS, device=device, grad=False)
    before = ours.attention_varlen(*tensors, *starts, *longest)
    for tensor in tensors:
        tensor[5:22] = float("nan")  # the second sequence
    after = ours.attention_varlen(*tensors, *starts, *longest)
    assert torch.equal(after[:5], before[:5])
    assert torch.equal(after[22:], before[22:])
    assert after[5:22].isnan().all()


def test_logsumexp_and_strides(device):
    (query, key, value), starts, longest = packed(LENGTHS, device=device, grad=False)
    wide = torch.cat([query, key, value], -1)  # as a projection of all three leaves them
    views = wide.split(16, -1)
    out, lse = ours.attention_varlen_forward(*views, *starts, *longest)
    assert out.is_contiguous()
    assert lse.shape == (2, 63)
    torch.testing.assert_close(out, ours.attention_varlen(query, key, value, *starts, *longest))
    scores = query[5:22].transpose(0, 1) @ key[5:22].permute(1, 2, 0) / 4
    torch.testing.assert_close(lse[:, 5:22], scores.logsumexp(-1), rtol=1e-4, atol=1e-5)


def test_dropout_has_a_gradient_of_its_own_weights(device):
    tensors, starts, longest = packed(LENGTHS, device=device)
    seed = torch.tensor([5], device=device)

    def attend(q, k, v, seed=seed):
        return ours.attention_varlen(q, k, v, *starts, *longest, seed, dropout_p=0.4)

    out = attend(*tensors)
    assert torch.equal(out, attend(*tensors))
    assert not torch.equal(out, attend(*tensors, seed=seed + 1))
    direction = torch.randn_like(tensors[2])
    grad = torch.randn_like(out)
    (by_autograd,) = torch.autograd.grad(out, tensors[2], grad)
    moved = attend(tensors[0], tensors[1], tensors[2] + direction)  # linear in the values
    torch.testing.assert_close(
        ((moved - out) * grad).sum(), (by_autograd * direction).sum(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("op", ["attention_varlen", "attention_varlen_forward"])
def test_opcheck(op, device):
    tensors, starts, longest = packed(UNEQUAL, device=device)
    result = torch.library.opcheck(
        getattr(ours, op).default, (*tensors, *starts, *longest), {"is_causal": True}
    )
    assert set(result.values()) == {"SUCCESS"}, result


def test_opcheck_of_the_backward(device):
    tensors, starts, longest = packed(LENGTHS, device=device, grad=False)
    out, lse = ours.attention_varlen_forward(*tensors, *starts, *longest)
    args = (torch.randn_like(out), *tensors, *starts, *longest, out, lse)
    result = torch.library.opcheck(ours.attention_varlen_backward.default, args)
    assert set(result.values()) == {"SUCCESS"}, result


def test_refusals_name_the_argument(device):
    (query, key, value), (starts, _), (longest, _) = packed(LENGTHS, device=device, grad=False)
    more = starts, starts, longest, longest
    with pytest.raises(UnsupportedProblemError, match=r"attention_varlen.*total length"):
        ours.attention_varlen(query[None], key, value, *more)
    with pytest.raises(UnsupportedProblemError, match=r"cu_seqlens_q is torch\.float32"):
        ours.attention_varlen(query, key, value, starts.float(), *more[1:])
    with pytest.raises(UnsupportedProblemError, match="2 query heads cannot share 3"):
        ours.attention_varlen(query, *(torch.randn(63, 3, 16, device=device),) * 2, *more)
    with pytest.raises(UnsupportedProblemError, match="seed"):
        ours.attention_varlen(query, key, value, *more, dropout_p=0.5)
    with pytest.raises(RuntimeError, match="as many sequences"):
        ours.attention_varlen(query, key, value, starts[1:], *more[1:])


# nested tensors


def jagged(seed, device, lengths=(3, 7, 1, 5), heads=2):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, heads * 8, generator=generator).to(device) for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


def heads_of(x):
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


def expected_of(query, key, value, is_causal):
    def split(x):
        return [t.unflatten(-1, (2, 8)).transpose(0, 1)[None] for t in x.unbind()]

    with sdpa_kernel(SDPBackend.MATH):
        outputs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)[0].transpose(0, 1)
            for q, k, v in zip(*map(split, (query, key, value)), strict=True)
        ]
    return torch.cat(outputs).flatten(1)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_nested_tensors_in_eager_mode(is_causal, device):
    tensors = [jagged(seed, device) for seed in range(3)]
    with tob.eager():
        out = F.scaled_dot_product_attention(*map(heads_of, tensors), is_causal=is_causal)
    expected = expected_of(*tensors, is_causal)
    flat = out.transpose(1, 2).flatten(2).values()
    torch.testing.assert_close(flat, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(expected)
    actual = torch.autograd.grad(flat, tensors, grad)
    for a, e in zip(actual, torch.autograd.grad(expected, tensors, grad), strict=True):
        torch.testing.assert_close(a.values(), e.values(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "through", ["ours", pytest.param("sdpa", marks=pytest.mark.gpu)]
)  # on a CPU, PyTorch's own cannot be traced
def test_nested_tensors_compiled(through, device):
    attend = torch.compiler.allow_in_graph(nested_attention)
    if through == "sdpa":
        attend = F.scaled_dot_product_attention

    def model(q, k, v):
        return attend(*map(heads_of, (q, k, v)), is_causal=True).transpose(1, 2).flatten(2)

    x = jagged(0, device)

    def with_itself(x):
        return model(x, x, x)

    compiled = torch.compile(with_itself, backend="triton_only", fullgraph=True)
    out = compiled(x).values()
    expected = expected_of(x, x, x, True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    actual, exact = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(actual.values(), exact.values(), rtol=1e-4, atol=1e-5)


def graph_of(*tensors, **options):
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in "qkv"]
    for node, tensor in zip(nodes, tensors, strict=True):
        node.meta["example_value"] = tensor
    call = graph.call_function(F.scaled_dot_product_attention, tuple(nodes), options)
    call.meta["example_value"] = tensors[0]
    graph.output(call)
    return graph, call


def test_nested_tensors_are_captured(device):
    graph, call = graph_of(*(heads_of(jagged(0, device)),) * 3, is_causal=True)
    assert capture_attention(graph) == 1
    assert call.target is nested_attention
    assert call.kwargs == {"is_causal": True}


def test_nested_tensors_that_are_not_taken_are_refused_with_the_reason(device):
    rows = [torch.randn(2, n, 8, device=device) for n in (3, 4)]
    strided = torch.nested.nested_tensor(rows)
    graph, call = graph_of(strided, strided, strided)
    assert capture_attention(graph) == 0
    assert "jagged layout" in call.meta[META_KEY]["detail"]
    with pytest.raises(UnsupportedProblemError, match="jagged"), tob.eager():
        F.scaled_dot_product_attention(strided, strided, strided)
    x = heads_of(jagged(0, device))
    with pytest.raises(UnsupportedProblemError, match="mask"), tob.eager():
        F.scaled_dot_product_attention(x, x, x, torch.ones(3, 3, device=device))


def test_heads_of_nested_tensors_are_shared_on_request(device):
    query = jagged(0, device, heads=4).unflatten(-1, (4, 8)).transpose(1, 2)
    key = heads_of(jagged(1, device))
    with tob.eager():
        with pytest.raises(UnsupportedProblemError, match="4 query heads over 2 key and 2 value"):
            F.scaled_dot_product_attention(query, key, key)
        out = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    last = [t.transpose(1, 2).unbind()[-1].transpose(0, 1)[None] for t in (query, key, out)]
    expected = F.scaled_dot_product_attention(last[0], last[1], last[1], enable_gqa=True)
    torch.testing.assert_close(last[2], expected, rtol=1e-4, atol=1e-5)
