"""Graph tests of the folding passes: what the graph was, what it becomes, what is left alone."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

import triton_only_backend  # noqa: F401
from triton_only_backend.passes.fold_broadcast_bmm import fold_broadcast_bmm
from triton_only_backend.passes.fold_kv_expand import fold_kv_expand
from triton_only_backend.testing import PassTestCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
attention = torch.ops.triton_only.attention


def trace(function, *args, mode="fake"):
    """The aten graph of a function, as passes of the stage `aten` see it."""
    return make_fx(function, tracing_mode=mode)(*args)


def randn(*shapes):
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


def repeat_kv(x, n):
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)


def exact_attention(q, k, v):
    """Our op takes no fp64, in which the exact result is computed."""
    return torch.nn.functional.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2))


Q, KV = (2, 4, 3, 16), (2, 2, 9, 16)


class TestFoldKvExpand(PassTestCase):
    def check(self, model, *shapes, exact=exact_attention, mode="fake"):
        run = self.assertIdempotent(fold_kv_expand, trace(model, *randn(*shapes), mode=mode))
        self.assertMeta(run, same_outputs=False)
        self.assertMutationSafe(run)
        self.assertNumerics(run, exact=exact)
        return run

    def test_repeat_kv(self):
        run = self.check(lambda q, k, v: attention(q, repeat_kv(k, 2), repeat_kv(v, 2)), Q, KV, KV)
        self.assertGraph(
            run,
            """\
q_1: f32[2, 4, 3, 16]
k_1: f32[2, 2, 9, 16]
v_1: f32[2, 2, 9, 16]
attention: f32[2, 4, 3, 16][192, 16, 64, 1] = triton_only.attention(q_1, k_1, v_1, enable_gqa=True)
return attention""",
        )

    def test_repeated_before_the_transpose(self):
        def repeat(x):
            b, s, h, d = x.shape
            return x[:, :, :, None].expand(b, s, h, 2, d).reshape(b, s, 2 * h, d)

        def model(q, k, v):
            return attention(q, *(repeat(x).permute(0, 2, 1, 3) for x in (k, v)))

        def exact(q, k, v):
            return exact_attention(q, k.transpose(1, 2), v.transpose(1, 2))

        shape = (2, 9, 2, 16)
        self.assertGraph(
            self.check(model, Q, shape, shape, exact=exact),
            """\
q_1: f32[2, 4, 3, 16]
k_1: f32[2, 9, 2, 16]
v_1: f32[2, 9, 2, 16]
permute: f32[2, 2, 9, 16][288, 16, 32, 1] = aten.permute(k_1, [0, 2, 1, 3])
permute_1: f32[2, 2, 9, 16][288, 16, 32, 1] = aten.permute(v_1, [0, 2, 1, 3])
attention: f32[2, 4, 3, 16][192, 16, 64, 1] = triton_only.attention(q_1, permute, permute_1, enable_gqa=True)
return attention""",
        )

    def test_symbolic_lengths(self):
        def model(q, k, v):
            return attention(q, repeat_kv(k, 2), repeat_kv(v, 2))

        gm = trace(model, *randn(Q, KV, KV), mode="symbolic")
        guards = len(gm.shape_env.guards)
        run = self.assertFired(fold_kv_expand, gm, times=1)
        assert len(gm.shape_env.guards) == guards
        self.assertNumerics(run, exact=exact_attention)

    def test_left_alone(self):
        # only the keys are repeated; different factors; the groups lie the other way round
        def tiled(x):
            b, h, s, d = x.shape
            return x[:, None].expand(b, 2, h, s, d).reshape(b, 2 * h, s, d)

        for model, *shapes in (
            (lambda q, k, v: attention(q, repeat_kv(k, 2), v), Q, KV, (2, 4, 9, 16)),
            (
                lambda q, k, v: attention(q, repeat_kv(k, 2), repeat_kv(v, 4)),
                Q,
                KV,
                (2, 1, 9, 16),
            ),
            (lambda q, k, v: attention(q, tiled(k), tiled(v)), Q, KV, KV),
        ):
            self.assertRefused(fold_kv_expand, trace(model, *randn(*shapes)))


class TestFoldBroadcastBmm(PassTestCase):
    def test_expanded_weight(self):
        def model(x, w):
            return torch.bmm(x[:, -1:], w.T.expand(2, 64, 128))

        gm = trace(model, *randn((2, 7, 64), (128, 64)))
        run = self.assertPass(fold_broadcast_bmm, gm, times=1)
        self.assertOps(run, appear={"aten.mm": 1}, vanish=["aten.bmm"])
        self.assertGraph(
            run,
            """\
x_1: f32[2, 7, 64]
w_1: f32[128, 64]
slice: f32[2, 1, 64][448, 64, 1] = aten.slice.Tensor(x_1, 1, -1, 9223372036854775807)
permute: f32[64, 128][1, 64] = aten.permute(w_1, [1, 0])
expand: f32[2, 64, 128][0, 1, 64] = aten.expand(permute, [2, 64, 128])
select: f32[64, 128][1, 64] = aten.select.int(expand, 0, 0)
reshape: f32[2, 64][448, 1] = aten.reshape(slice, [2, 64])
mm: f32[2, 128] = aten.mm(reshape, select)
reshape_1: f32[2, 1, 128] = aten.reshape(mm, [2, 1, 128])
return reshape_1""",
        )

    def test_left_alone(self):
        for shapes in (((2, 3, 8), (2, 8, 16)), ((1, 3, 8), (1, 8, 16))):
            self.assertRefused(fold_broadcast_bmm, trace(torch.bmm, *randn(*shapes)))
        gm = trace(lambda a, b: torch.bmm(a, b.expand(2, 8, 4)), *randn((2, 9, 8), (8, 4)))
        self.assertRefused(fold_broadcast_bmm, gm)
