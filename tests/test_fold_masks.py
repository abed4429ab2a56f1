"""Masks that a graph builds from positions: which are folded, into what, and which are left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import triton_only_backend as tob
from triton_only_backend.passes.fold_masks import MASK_OF, fold_masks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ours = torch.ops.triton_only


def arange(n):
    return torch.arange(n, device=DEVICE)


def additive(seen, hidden=float("-inf"), dtype=torch.float32):
    return torch.zeros(seen.shape, dtype=dtype, device=DEVICE).masked_fill(~seen, hidden)


def triu_of_infinity(n, m):
    return torch.triu(torch.full((n, m), float("-inf"), device=DEVICE), diagonal=1)


def distance(n, m):
    return arange(m)[None, :] - arange(n)[:, None]


def ones(n, m):
    return torch.ones(n, m, dtype=torch.bool, device=DEVICE)


CAUSAL = {"is_causal": True}
MASKS = {
    "tril of ones": (lambda n, m: torch.tril(ones(n, m)), CAUSAL),
    "tril, four dimensions": (lambda n, m: ones(n, m).tril()[None, None].expand(2, 3, n, m), CAUSAL),
    "not triu": (lambda n, m: ~torch.triu(ones(n, m), 1), CAUSAL),
    "triu of -inf": (triu_of_infinity, CAUSAL),
    "aranges": (lambda n, m: arange(m)[None] <= arange(n)[:, None], CAUSAL),
    "aranges, turned": (lambda n, m: arange(n)[:, None] >= arange(m)[None], CAUSAL),
    "additive": (lambda n, m: additive(distance(n, m) <= 0), CAUSAL),
    "additive, the dtype's least": (
        lambda n, m: additive(distance(n, m) <= 0, torch.finfo(torch.float32).min), CAUSAL,
    ),
    "window": (lambda n, m: (distance(n, m) <= 0) & (distance(n, m) > -4),
               {"is_causal": True, "window_left": 3}),
    "band": (lambda n, m: distance(n, m).abs() <= 2, {"window_left": 2, "window_right": 2}),
    "bottom right": (lambda n, m: distance(n, m) <= m - n, {"window_right": 0}),
    "all seen": (lambda n, m: ones(n, m), {}),
    "all seen, one row": (lambda n, m: ones(1, m), {}),
}  # fmt: skip
LEFT_ALONE = {
    "strictly below": lambda n, m: distance(n, m) < 0,
    "every other key": lambda n, m: (arange(m) % 2 == 0).expand(n, m),
    "one more key": lambda n, m: torch.tril(ones(n, m)).index_fill(1, arange(m)[-1:], True),
    "slopes": lambda n, m: -0.5 * distance(n, m).abs().float(),
    "random": lambda n, m: torch.rand(n, m, device=DEVICE) > 0.5,
    "finite values": lambda n, m: additive(distance(n, m) <= 0, -10.0),
    "nothing seen": lambda n, m: ~ones(n, m),
    "heads differ": lambda n, m: distance(n, m) <= arange(3)[:, None, None] - 1,
    "the first key, one row for all queries": lambda n, m: arange(m)[None] < 1,
    "the last keys, one row for all queries": lambda n, m: arange(m)[None] >= m - 2,
    "not the first query, one column": lambda n, m: arange(n)[:, None] >= 1,
}


def operands(n, m):
    return [torch.randn(2, 3, length, 16, device=DEVICE) for length in (n, m, m)]


def folded(build, n, m):
    gm = make_fx(lambda q, k, v: ours.attention(q, k, v, build(n, m)), tracing_mode="fake")(
        *operands(n, m)
    )
    fired = fold_masks(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm, fired


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("n", "m"), [(9, 9), (6, 11)])
def test_masks_of_positions_are_folded(name, n, m):
    build, expected = MASKS[name]
    if n != m:
        shift = m - n
        expected = {
            key: value + {"window_left": shift, "window_right": -shift}.get(key, 0)
            if key != "is_causal" and name != "bottom right" else value
            for key, value in expected.items()
        }  # fmt: skip
        if min(expected.get("window_right", 0), 0) < 0:
            pytest.skip("a window cannot end before the last query's place")
    if name == "bottom right" and n == m:
        expected = CAUSAL
    gm, fired = folded(build, n, m)
    (node,) = gm.graph.find_nodes(op="call_function", target=ours.attention.default)
    assert fired == 1
    assert node.args[3] is None
    assert node.kwargs == expected
    assert len([x for x in gm.graph.nodes if x.op == "call_function"]) == 1
    args = operands(n, m)
    mask = build(n, m)
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(*args, mask)
    torch.testing.assert_close(gm(*args), want, rtol=1e-4, atol=1e-5)
    assert fold_masks(gm.graph) == 0


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_masks_are_left_alone(name):
    gm, fired = folded(LEFT_ALONE[name], 7, 7)
    (node,) = gm.graph.find_nodes(op="call_function", target=ours.attention.default)
    assert fired == 0
    assert isinstance(node.args[3], torch.fx.Node)
    assert node.kwargs == {}


def test_masks_of_inputs_and_of_symbolic_lengths_are_left_alone():
    query, key, value = operands(7, 7)
    padding = torch.ones(7, dtype=torch.bool, device=DEVICE)
    gm = make_fx(
        lambda q, k, v, p: ours.attention(q, k, v, torch.tril(ones(7, 7)) & p), tracing_mode="fake"
    )(query, key, value, padding)
    assert fold_masks(gm.graph) == 0

    def model(q, k, v):
        return ours.attention(q, k, v, torch.tril(ones(q.shape[2], k.shape[2])))

    gm = make_fx(model, tracing_mode="symbolic")(query, key, value)
    guards = len(gm.shape_env.guards)
    assert fold_masks(gm.graph) == 0
    assert len(gm.shape_env.guards) == guards


def test_forward_and_backward_are_folded_alike(device):
    def model(q, k, v):
        y = F.scaled_dot_product_attention(q, k, v, triu_of_infinity(6, 6))
        return F.scaled_dot_product_attention(y, k, v, is_causal=True)

    args = [t.requires_grad_() for t in operands(6, 6)]
    report = tob.audit(model, *args)
    assert report.is_triton_only
    assert [row.fired for row in report.passes if row.name == "fold_masks"] == [2]
    compiled = torch.compile(model, backend="triton_only")
    actual = torch.autograd.grad(compiled(*args).square().sum(), args)
    expected = torch.autograd.grad(model(*args).square().sum(), args)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


def test_transformers_causal_mask(device):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(device).eval()
    ids = torch.randint(0, 64, (2, 9), device=device)
    with torch.no_grad():
        report = tob.audit(model, ids)
        masked = [row for row in report.passes if row.name == "fold_masks"]
        compiled = torch.compile(model, backend="triton_only")
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    # Where transformers leaves the mask out by itself, there is nothing to fold.
    assert sum(row.fired for row in masked) in (0, 2)


def test_every_attention_op_has_its_masks_place():
    for op, position in MASK_OF.items():
        assert op._schema.arguments[position].name == "attn_mask"
