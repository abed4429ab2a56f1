"""A mask that several attentions read is scanned once: the graph, the results, the launches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.fx.experimental.proxy_tensor import make_fx

from triton_only_backend.backend import compiled_reports
from triton_only_backend.errors import UnsupportedProblemError
from triton_only_backend.kernels import mask_spans as module
from triton_only_backend.passes.share_mask_spans import MASK_SPANS, share_mask_spans
from triton_only_backend.testing import PassTestCase, refusals

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECLINED = "triton_only_declined"
ours = torch.ops.triton_only
Q, KV = (2, 4, 20, 16), (2, 2, 40, 16)


def trace(function, *args, mode="fake"):
    """The aten graph of a function, as passes of the stage `aten` see it."""
    return make_fx(function, tracing_mode=mode)(*args)


def attend(q, k, v, mask, **options):
    return ours.attention(q, k, v, mask, **{"enable_gqa": True, **options})


def layers(q, k, v, mask):
    return attend(attend(q, k, v, mask), k, v, mask)


def arguments(q=Q, kv=KV, mask=None):
    """Query, key, value and a mask: by default that of a static cache that is half full."""
    if mask is None:
        slots = torch.arange(kv[-2], device=DEVICE)
        mask = slots <= torch.arange(3, 3 + q[-2], device=DEVICE)[:, None]
    return [*(torch.randn(shape, device=DEVICE) for shape in (q, kv, kv)), mask]


class TestGraphs(PassTestCase):
    def check(self, model, *args, times=1):
        """The pass fires, changes no result by a bit, and finds nothing more."""
        gm = trace(model, *args)
        run = self.assertFired(share_mask_spans, gm, times=times)
        self.assertIdempotent(share_mask_spans, gm)
        self.assertMeta(run)
        self.assertMutationSafe(run)
        assert len(run.after.graph.find_nodes(op="call_function", target=MASK_SPANS)) == times
        assert torch.equal(run.after(*args), run.before(*args))
        assert torch.equal(run.after(*args), model(*args))
        return run

    def test_two_layers(self):
        self.assertGraph(
            self.check(layers, *arguments()),
            """\
q_1: f32[2, 4, 20, 16]
k_1: f32[2, 2, 40, 16]
v_1: f32[2, 2, 40, 16]
mask_1: b8[20, 40]
mask_spans: i32[2, 1, 2] = triton_only.mask_spans(mask_1)
attention: f32[2, 4, 20, 16][1280, 16, 64, 1] = triton_only.attention(q_1, k_1, v_1, mask_1, enable_gqa=True, spans=mask_spans)
attention_1: f32[2, 4, 20, 16][1280, 16, 64, 1] = triton_only.attention(attention, k_1, v_1, mask_1, enable_gqa=True, spans=mask_spans)
return attention_1""",
        )

    def test_expanded_masks(self):
        def model(q, k, v, mask):
            y = attend(q, k, v, mask[:, None].expand(2, 1, 20, 40))
            return attend(y, k, v, mask[:, None].expand(2, 4, 20, 40))

        mask = torch.rand(1, 20, 40, device=DEVICE).gt(0.2)
        self.assertGraph(
            self.check(model, *arguments(mask=mask)),
            """\
q_1: f32[2, 4, 20, 16]
k_1: f32[2, 2, 40, 16]
v_1: f32[2, 2, 40, 16]
mask_1: b8[1, 20, 40]
unsqueeze: b8[1, 1, 20, 40] = aten.unsqueeze(mask_1, 1)
expand: b8[2, 1, 20, 40][0, 800, 40, 1] = aten.expand(unsqueeze, [2, 1, 20, 40])
mask_spans: i32[1, 1, 2, 1, 2] = triton_only.mask_spans(unsqueeze)
attention: f32[2, 4, 20, 16][1280, 16, 64, 1] = triton_only.attention(q_1, k_1, v_1, expand, enable_gqa=True, spans=mask_spans)
unsqueeze_1: b8[1, 1, 20, 40] = aten.unsqueeze(mask_1, 1)
expand_1: b8[2, 4, 20, 40][0, 0, 40, 1] = aten.expand(unsqueeze_1, [2, 4, 20, 40])
attention_1: f32[2, 4, 20, 16][1280, 16, 64, 1] = triton_only.attention(attention, k_1, v_1, expand_1, enable_gqa=True, spans=mask_spans)
return attention_1""",
        )

    def test_a_row_of_keys(self):
        def model(q, k, v, mask):
            wide = mask.expand(2, 1, 20, 40)
            return attend(attend(q, k, v, wide), k, v, mask)

        mask = torch.rand(2, 1, 1, 40, device=DEVICE).gt(0.2)
        run = self.check(model, *arguments(mask=mask))
        (spans,) = run.after.graph.find_nodes(op="call_function", target=MASK_SPANS)
        assert spans.meta["val"].shape == (2, 1, 1, 1, 2)

    def test_each_mask_by_itself(self):
        def model(q, k, v, mask):
            y = layers(q, k, v, mask)
            return layers(y, k, v, mask[:, 1:2]) + layers(y, k, v, mask[:, 2:3])

        mask = torch.rand(1, 4, 20, 40, device=DEVICE).gt(0.2)
        self.check(model, *arguments(mask=mask), times=3)

    def test_expanded_over_the_keys(self):
        def model(q, k, v, mask):
            return layers(q, k, v, mask.expand(20, 40))

        mask = torch.arange(20, device=DEVICE)[:, None].gt(3)
        self.check(model, *arguments(mask=mask))

    def test_symbolic_sizes(self):
        def model(q, k, v, mask):
            wide = mask[None, None].expand(q.shape[0], 1, q.shape[2], k.shape[2])
            return attend(attend(q, k, v, wide), k, v, wide)

        gm = trace(model, *arguments(), mode="symbolic")
        guards = len(gm.shape_env.guards)
        run = self.assertFired(share_mask_spans, gm, times=1)
        assert len(gm.shape_env.guards) == guards
        for queries, keys in ((20, 40), (1, 300), (70, 130), (17, 5)):
            args = arguments((2, 4, queries, 16), (2, 2, keys, 16))
            assert torch.equal(run.after(*args), model(*args))

    def test_left_alone(self):
        wide = torch.rand(20, 40, device=DEVICE).gt(0.2)
        models = {
            "one reader": (lambda q, k, v, m: attend(q, k, v, m) + attend(q, k, v, ~m), wide),
            "no boolean": (layers, torch.randn(20, 40, device=DEVICE)),
            "a window": (
                lambda q, k, v, m: attend(attend(q, k, v, m, window_left=9), k, v, m), wide,
            ),
            "by the decoding kernel": (
                lambda q, k, v, m: layers(q[:, :, :8], k, v, m[:8]), wide,
            ),
            "one dimension": (layers, wide[0]),
            "with a backward": (
                lambda q, k, v, m: sum(
                    ours.attention_forward(q, k, v, m, enable_gqa=True)[0] for _ in range(2)
                ),
                wide,
            ),
        }  # fmt: skip
        for name, (model, mask) in models.items():
            gm = trace(model, *arguments(mask=mask))
            with self.subTest(name):
                assert share_mask_spans(gm.graph) == 0
                assert not refusals(gm, DECLINED)

    def test_a_mask_that_attention_broadcasts_over_the_keys_is_declined(self):
        for mask in (torch.ones(20, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE)):
            gm = trace(layers, *arguments(mask=mask.bool()))
            assert share_mask_spans(gm.graph) == 0
            declined = refusals(gm, DECLINED)
            assert len(declined) == 2
            assert "one scan of the mask for all" in declined[0]


# Query, key and value, mask, of several numbers of dimensions.
SHAPES = [
    (Q, KV, (20, 40)),
    (Q, KV, (1, 40)),
    (Q, KV, (2, 1, 1, 40)),
    (Q, KV, (4, 20, 40)),
    ((33, 16), (150, 16), (33, 150)),
    ((2, 33, 16), (2, 150, 16), (2, 1, 150)),
    ((2, 3, 4, 33, 16), (2, 3, 2, 140, 16), (2, 1, 1, 33, 140)),
    ((2, 4, 20, 16), (2, 2, 0, 16), (20, 0)),
    ((2, 4, 0, 16), (2, 2, 9, 16), (0, 9)),
    ((2, 4, 1, 16), (2, 2, 300, 16), (1, 300)),
]


@pytest.mark.parametrize(("q", "kv", "shape"), SHAPES, ids=str)
def test_spans_that_are_given_change_no_bit(q, kv, shape):
    args = arguments(q, kv, torch.rand(shape, device=DEVICE).gt(0.02).tril(shape[-1] // 2))
    gqa = len(q) > 3
    alone = attend(*args, enable_gqa=gqa)
    assert torch.equal(attend(*args, enable_gqa=gqa, spans=ours.mask_spans(args[3])), alone)


def test_they_take_the_place_of_a_scan():
    args = arguments()
    nothing = torch.zeros_like(ours.mask_spans(args[3]))
    assert attend(*args).abs().sum() > 0
    assert attend(*args, spans=nothing).abs().sum() == 0


def test_wrong_spans_are_refused():
    q, k, v, mask = arguments()
    spans = ours.mask_spans(mask)
    for other in (None, mask.float()):
        with pytest.raises(UnsupportedProblemError, match="of a boolean mask"):
            attend(q, k, v, other, spans=spans)
    with pytest.raises(UnsupportedProblemError, match=r"torch.int64 spans"):
        attend(q, k, v, mask, spans=spans.long())
    for wrong in (spans[..., :1], spans[:, 0], ours.mask_spans(mask.repeat(1, 9))):
        with pytest.raises(RuntimeError, match="spans"):
            attend(q, k, v, mask, spans=wrong)
    with pytest.raises(RuntimeError, match="must match"):
        attend(q, k, v, mask, spans=ours.mask_spans(mask.repeat(3, 1)))


def test_gradients_with_spans():
    *tensors, mask = arguments()
    gradients = []
    for spans in (None, ours.mask_spans(mask)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        attend(*leaves, mask, spans=spans).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for alone, given in zip(*gradients, strict=True):
        assert torch.equal(alone, given)


def test_opcheck():
    q, k, v, mask = arguments()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    options = {"enable_gqa": True, "spans": ours.mask_spans(mask)}
    for op, args, kwargs in (
        (ours.attention.default, (*leaves, mask), options),
        (ours.mask_spans.default, (mask,), {}),
        (ours.mask_spans.default, (mask[None].expand(3, 20, 40),), {}),
    ):
        assert set(torch.library.opcheck(op, args, kwargs).values()) == {"SUCCESS"}


class Launches:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):
        self.count += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch):
    counted = Launches(module.mask_spans_kernel)
    monkeypatch.setattr(module, "mask_spans_kernel", counted)
    return counted


class Prefill:
    """A prompt through two layers of Llama with a static cache, filled from the first slot on."""

    def __init__(self):
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(config).to(DEVICE).eval()
        self.cache = transformers.StaticCache(config=config, max_cache_len=64)
        self(torch.ones(2, 3, dtype=torch.int64, device=DEVICE))

    @torch.no_grad()
    def __call__(self, ids, step=None):
        self.cache.reset()
        return (step or self.step)(ids, torch.arange(ids.shape[1], device=DEVICE))

    def step(self, ids, positions):
        slots = torch.arange(64, device=ids.device)
        return self.model(
            input_ids=ids,
            attention_mask=(slots <= positions[:, None])[None, None],
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits


@pytest.mark.parametrize(("disabled", "scans"), [((), 1), (("share_mask_spans",), 2)], ids=str)
def test_one_scan_a_prefill(disabled, scans, launches):
    prefill, ids = Prefill(), torch.randint(64, (2, 40), device=DEVICE)
    expected = prefill(ids)
    options = {"disable_passes": list(disabled)}
    compiled = torch.compile(prefill.step, backend="triton_only", fullgraph=True, options=options)
    torch.testing.assert_close(prefill(ids, compiled), expected, rtol=1e-4, atol=1e-5)
    assert launches.count == scans
    assert compiled_reports()[-1].is_triton_only


def test_one_scan_a_prefill_of_any_length(launches):
    prefill = Prefill()
    compiled = torch.compile(prefill.step, backend="triton_only", fullgraph=True, dynamic=True)
    before = len(compiled_reports())
    for call, length in enumerate((40, 50, 33), 1):
        ids = torch.randint(64, (2, length), device=DEVICE)
        torch.testing.assert_close(prefill(ids, compiled), prefill(ids), rtol=1e-4, atol=1e-5)
        assert launches.count == call
    assert len(compiled_reports()) == before + 1


def test_training_is_left_alone():
    def model(q, k, v, mask):
        for _ in range(2):
            q = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return q.square().sum()

    *tensors, mask = arguments()
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.compile(model, backend="triton_only")(*leaves, mask).backward()
    references = [t.clone().requires_grad_() for t in tensors]
    model(*references, mask).backward()
    for leaf, reference in zip(leaves, references, strict=True):
        torch.testing.assert_close(leaf.grad, reference.grad, rtol=1e-4, atol=1e-5)
