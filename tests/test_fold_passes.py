"""Graph tests of the folding passes: what the graph was, what it becomes, what is left alone."""

from __future__ import annotations

from collections import Counter

import expecttest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import triton_only_backend  # noqa: F401
from triton_only_backend.passes.fold_broadcast_bmm import fold_broadcast_bmm
from triton_only_backend.passes.fold_kv_expand import fold_kv_expand

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
attention = torch.ops.triton_only.attention


def trace(function, *args):
    """The aten graph of a function on fake tensors of the arguments' shapes."""
    return make_fx(function, tracing_mode="fake")(*args)


def render(gm):
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    lines = []
    for node in gm.graph.nodes:
        if node.op == "call_function":
            shape = list(node.meta["val"].shape)
            args = ", ".join(str(a) for a in node.args)
            options = "".join(f", {k}={v}" for k, v in node.kwargs.items())
            lines.append(f"{node.name}: {shape} = {node.target}({args}{options})")
    return "\n".join(lines)


def ops(gm):
    return Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function")


def repeat_kv(x, n):
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)


Q, KV = (2, 4, 3, 16), (2, 2, 9, 16)


class TestFoldKvExpand(expecttest.TestCase):
    def test_repeat_kv(self):
        def model(q, k, v):
            return attention(q, repeat_kv(k, 2), repeat_kv(v, 2))

        args = [torch.randn(s, device=DEVICE) for s in (Q, KV, KV)]
        gm = trace(model, *args)
        assert fold_kv_expand(gm.graph) == 1
        self.assertExpectedInline(
            render(gm),
            """\
attention: [2, 4, 3, 16] = triton_only.attention.default(q_1, k_1, v_1, enable_gqa=True)""",
        )
        torch.testing.assert_close(gm(*args), model(*args))
        assert fold_kv_expand(gm.graph) == 0

    def test_repeated_before_the_transpose(self):
        def repeat(x):
            b, s, h, d = x.shape
            return x[:, :, :, None].expand(b, s, h, 2, d).reshape(b, s, 2 * h, d)

        def model(q, k, v):
            return attention(q, *(repeat(x).permute(0, 2, 1, 3) for x in (k, v)))

        args = [torch.randn(s, device=DEVICE) for s in (Q, (2, 9, 2, 16), (2, 9, 2, 16))]
        gm = trace(model, *args)
        assert fold_kv_expand(gm.graph) == 1
        self.assertExpectedInline(
            render(gm),
            """\
permute_default: [2, 2, 9, 16] = aten.permute.default(k_1, [0, 2, 1, 3])
permute_default_1: [2, 2, 9, 16] = aten.permute.default(v_1, [0, 2, 1, 3])
attention: [2, 4, 3, 16] = triton_only.attention.default(q_1, permute_default, permute_default_1, enable_gqa=True)""",
        )
        torch.testing.assert_close(gm(*args), model(*args))

    def test_symbolic_lengths(self):
        def model(q, k, v):
            return attention(q, repeat_kv(k, 2), repeat_kv(v, 2))

        args = [torch.randn(s, device=DEVICE) for s in (Q, KV, KV)]
        gm = make_fx(model, tracing_mode="symbolic")(*args)
        guards = len(gm.shape_env.guards)
        assert fold_kv_expand(gm.graph) == 1
        gm.graph.eliminate_dead_code()
        gm.recompile()
        assert len(gm.shape_env.guards) == guards
        torch.testing.assert_close(gm(*args), model(*args))

    def left_alone(self, model, *shapes):
        gm = trace(model, *(torch.randn(s, device=DEVICE) for s in shapes))
        before = render(gm)
        assert fold_kv_expand(gm.graph) == 0
        assert render(gm) == before

    def test_left_alone(self):
        # only the keys are repeated; different factors; the groups lie the other way round
        self.left_alone(lambda q, k, v: attention(q, repeat_kv(k, 2), v), Q, KV, (2, 4, 9, 16))
        self.left_alone(
            lambda q, k, v: attention(q, repeat_kv(k, 2), repeat_kv(v, 4)), Q, KV, (2, 1, 9, 16)
        )

        def tiled(x):
            b, h, s, d = x.shape
            return x[:, None].expand(b, 2, h, s, d).reshape(b, 2 * h, s, d)

        self.left_alone(lambda q, k, v: attention(q, tiled(k), tiled(v)), Q, KV, KV)


class TestFoldBroadcastBmm(expecttest.TestCase):
    def test_expanded_weight(self):
        def model(x, w):
            return torch.bmm(x[:, -1:], w.T.expand(2, 64, 128))

        args = [torch.randn(2, 7, 64, device=DEVICE), torch.randn(128, 64, device=DEVICE)]
        gm = trace(model, *args)
        assert fold_broadcast_bmm(gm.graph) == 1
        self.assertExpectedInline(
            render(gm),
            """\
slice_1: [2, 1, 64] = aten.slice.Tensor(x_1, 1, -1, 9223372036854775807)
permute: [64, 128] = aten.permute.default(w_1, [1, 0])
expand: [2, 64, 128] = aten.expand.default(permute, [2, 64, 128])
select_int: [64, 128] = aten.select.int(expand, 0, 0)
reshape_default: [2, 64] = aten.reshape.default(slice_1, [2, 64])
mm_default: [2, 128] = aten.mm.default(reshape_default, select_int)
reshape_default_1: [2, 1, 128] = aten.reshape.default(mm_default, [2, 1, 128])""",
        )
        torch.testing.assert_close(gm(*args), model(*args))
        assert fold_broadcast_bmm(gm.graph) == 0

    def test_left_alone(self):
        for shapes in (((2, 3, 8), (2, 8, 16)), ((1, 3, 8), (1, 8, 16))):
            gm = trace(torch.bmm, *(torch.randn(s, device=DEVICE) for s in shapes))
            assert fold_broadcast_bmm(gm.graph) == 0
        gm = trace(
            lambda a, b: torch.bmm(a, b.expand(2, 8, 4)),
            torch.randn(2, 9, 8, device=DEVICE),
            torch.randn(8, 4, device=DEVICE),
        )
        assert fold_broadcast_bmm(gm.graph) == 0
