"""The kit's graphs: captured at each stage, built by hand, shown as text."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from triton_only_backend.testing import (
    CaptureError,
    GraphBuilder,
    capture,
    count_ops,
    random_inputs,
    render,
    run_graph,
    sizes_of,
)
from triton_only_backend.testing.building import BuildError

aten = torch.ops.aten


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.norm(x)) + torch.arange(4, device=x.device)


def softmax(x):
    return torch.softmax(x.view(-1, 4), -1)


def test_stage_dynamo_shows_torch_functions():
    assert_expected_inline(
        render(capture(softmax, torch.randn(2, 2, 4), stage="dynamo")),
        """\
L_x_: f32[2, 2, 4]
view: f32[4, 4] = .view(L_x_, -1, 4)
softmax: f32[4, 4] = torch.softmax(view, -1)
return (softmax,)""",
    )


def test_stage_post_grad_is_what_a_custom_pass_is_given(device):
    """Views are reshapes there, and decompositions have run."""
    seen = []

    from triton_only_backend import inductor

    hook = inductor.graph_pass("see", "0", lambda graph: seen.append(render(graph)))
    gm = capture(softmax, torch.randn(2, 2, 4))
    assert_expected_inline(
        render(gm),
        """\
arg0_1: f32[2, 2, 4]
reshape: f32[4, 4] = aten.reshape(arg0_1, [-1, 4])
amax: f32[4, 1] = aten.amax(reshape, [-1], True)
sub: f32[4, 4] = aten.sub.Tensor(reshape, amax)
exp: f32[4, 4] = aten.exp(sub)
sum: f32[4, 1] = aten.sum.dim_IntList(exp, [-1], True)
div: f32[4, 4] = aten.div.Tensor(exp, sum)
return (div,)""",
    )
    options = {"post_grad_custom_pre_pass": hook, "fx_graph_cache": False}
    with torch.no_grad():
        compiled = torch.compile(softmax, backend="triton_only", options=options)
        compiled(torch.randn(2, 2, 4, device=device))
    assert seen == [render(gm)]


def test_stage_joint_shows_forward_and_backward():
    gm = capture(lambda x, w: (x @ w).relu(), torch.randn(2, 3), torch.randn(3, 4), stage="joint",
                 training=True)  # fmt: skip
    assert count_ops(gm)["aten.mm"] == 3
    assert [n.target for n in gm.graph.find_nodes(op="placeholder")][-1] == "tangents_1"


def test_post_grad_has_a_graph_for_each_direction():
    function, x = (lambda x, w: (x @ w).relu()), torch.randn(2, 3)
    args = (function, x, torch.randn(3, 4))
    assert count_ops(capture(*args, training=True))["aten.mm"] == 1
    backward = capture(*args, training=True, part="backward")
    assert count_ops(backward)["aten.mm"] == 2
    assert x.requires_grad is False
    assert x.grad is None


@pytest.mark.parametrize("stage", ["dynamo", "joint", "post_grad"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_gpus_graph_without_a_gpu(stage, training, dynamic):
    """Every tensor and every device in the graph is the GPU's, whatever the machine has."""
    gm = capture(Block(), torch.randn(5, 8), stage=stage, training=training, dynamic=dynamic,
                 device="cuda")  # fmt: skip
    text = render(gm, device=True)
    assert "cuda:0" in text
    assert "cpu" not in text
    assert bool(sizes_of(gm)) == dynamic


def test_dynamic_sizes_are_numbered_symbols():
    gm = capture(lambda x, y: x[:, None] * y, torch.randn(3), torch.randn(5), dynamic=True)
    lines = render(gm).splitlines()
    assert "mul: f32[s0, s1] = aten.mul.Tensor(unsqueeze, arg3_1)" in lines


def test_nothing_runs_and_nothing_changes():
    x = torch.zeros(3)
    capture(lambda x: x.add_(1), x)
    assert x.tolist() == [0, 0, 0]


def test_the_same_function_is_captured_any_number_of_times():
    for size in range(2, 14):
        assert f"f32[{size}]" in render(capture(torch.sin, torch.randn(size), stage="dynamo"))


def test_another_backends_graph_holds_its_own_ops(device):
    a, b = torch.randn(4, 8, device=device), torch.randn(8, 4, device=device)
    gm = capture(lambda a, b: torch.sin(a @ b), a, b, backend="triton_only")
    assert count_ops(gm) == {"triton_only.mm": 1, "aten.sin": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "postgrad"}, 'did you mean "post_grad"'),
        ({"part": "backward"}, "training=True"),
        ({"part": "backward", "training": True}, "no backward graph"),
        ({"backend": "eager"}, "does not compile through Inductor"),
    ],
)
def test_what_is_not_there_is_named(options, message):
    with pytest.raises(CaptureError, match=message):
        capture(lambda x: x > 0, torch.randn(3), **options)


def test_a_graph_break_is_an_error_and_names_its_line():
    def broken(x):
        print("here")
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported, match="print"):
        capture(broken, torch.randn(3))


# by hand


def small_graph():
    b = GraphBuilder(device="cuda")
    x = b.input("x", (b.size("rows"), 8), torch.bfloat16)
    w = b.input("w", (16, 8), torch.bfloat16, strides=(1, 16))
    product = b.call(aten.mm, x, b.call(aten.permute.default, w, [1, 0]))
    return b.output(product, b.call(aten.sum.dim_IntList, product, [0], dtype=torch.float32))


def test_builder_gives_dtypes_shapes_strides_and_devices():
    gm = small_graph()
    assert_expected_inline(
        render(gm),
        """\
x: bf16[s0, 8]
w: bf16[16, 8][1, 16]
permute: bf16[8, 16] = aten.permute(w, [1, 0])
mm: bf16[s0, 16] = aten.mm(x, permute)
sum: f32[16] = aten.sum.dim_IntList(mm, [0], dtype=torch.float32)
return (mm, sum)""",
    )
    assert "bf16[s0, 16] cuda:0" in render(gm, device=True)
    x, w = random_inputs(gm, sizes=dict.fromkeys(sizes_of(gm), 3))
    assert (x.shape, w.stride()) == ((3, 8), (1, 16))
    product, total = run_graph(gm, [x, w])
    torch.testing.assert_close(product, x @ w.T)
    torch.testing.assert_close(total, (x @ w.T).sum(0, dtype=torch.float32))


def test_the_same_name_is_the_same_size():
    b = GraphBuilder()
    x, y = (b.input(name, (b.size("n"), 2)) for name in "xy")
    assert "mm: f32[2, 2]" in render(b.output(b.call(aten.mm, b.call(aten.t, x), y)))


def test_builder_names_operands_that_do_not_fit():
    b = GraphBuilder()
    x = b.input("x", (4, 8), torch.bfloat16)
    with pytest.raises(BuildError, match=r"aten\.mm.*bf16\[4, 8\], bf16\[4, 8\]"):
        b.call(aten.mm, x, x)


def test_names_are_counted_and_never_clash():
    b = GraphBuilder()
    first = b.input("add_1", (2,))
    total = b.call(aten.add.Tensor, first, first)
    assert_expected_inline(
        render(b.output(b.call(aten.add.Tensor, total, b.call(aten.add.Tensor, total, 1)))),
        """\
add_1: f32[2]
add: f32[2] = aten.add.Tensor(add_1, add_1)
add_2: f32[2] = aten.add.Tensor(add, 1)
add_3: f32[2] = aten.add.Tensor(add, add_2)
return add_3""",
    )
