"""The kit's checks: each holds of a sound pass, and finds the fault of one that is not."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from triton_only_backend import testing
from triton_only_backend.testing import GraphBuilder, PassTestCase, capture, render, run_pass

aten = torch.ops.aten


def double(x):
    return (x + x).relu()


def graph(**options):
    return capture(double, torch.randn(3, 5), **options)


def passes(edit):
    """A pass that edits every x + x."""

    def run(graph: torch.fx.Graph) -> int:
        count = 0
        for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            if node.args[0] is node.args[1]:
                edit(graph, node)
                count += 1
        return count

    return run


def replace(graph, node, target, args, val=None):
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta["val"] = node.meta["val"] if val is None else val
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


to_mul = passes(lambda g, n: replace(g, n, aten.mul.Tensor, (n.args[0], 2)))
to_wrong = passes(lambda g, n: replace(g, n, aten.mul.Tensor, (n.args[0], 2.1)))


class TestSoundPass(PassTestCase):
    def test_everything_holds(self):
        run = self.assertPass(to_mul, graph(), times=1, backward=True)
        self.assertOps(run, appear={aten.mul.Tensor: 1}, vanish=["aten.add*"], stay=[aten.relu])
        self.assertGraph(
            run,
            """\
arg0_1: f32[3, 5]
mul: f32[3, 5] = aten.mul.Tensor(arg0_1, 2)
relu: f32[3, 5] = aten.relu(mul)
return (relu,)""",
        )

    def test_it_holds_at_other_stages_sizes_and_devices(self):
        for options in ({"stage": "joint", "training": True}, {"device": "cuda"}):
            self.assertPass(to_mul, graph(**options))
        self.assertDynamic(to_mul, graph(dynamic=True), backward=True)

    def test_the_graph_given_stays_as_it_is(self):
        gm = graph()
        before = render(gm)
        self.run_pass(to_mul, gm)
        assert render(gm) == before

    def test_a_pass_of_the_module_or_of_a_class(self):
        def on_module(gm: torch.fx.GraphModule) -> None:
            to_mul(gm.graph)

        from triton_only_backend import inductor

        for each in (on_module, inductor.graph_pass("to_mul", "0", to_mul)):
            assert self.assertFired(each, graph()).fired == 1


def test_nested_graphs_are_copied_shown_and_counted():
    def branches(x):
        return torch.cond(x.sum() > 0, lambda x: double(x), lambda x: x * 3, (x,))

    def everywhere(gm: torch.fx.GraphModule) -> int:
        inner = [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
        return sum(to_mul(module.graph) for module in inner)

    gm = capture(branches, torch.randn(3))
    run = testing.assert_fired(everywhere, gm, times=1)
    testing.assert_ops(run, vanish=["aten.add"], appear={"aten.mul": 2})
    assert "aten.add.Tensor" in render(gm)
    assert "true_graph_0:" in render(gm)
    testing.assert_numerics(run)


def test_a_pass_that_does_not_match_fails():
    with pytest.raises(AssertionError, match="did not match"):
        testing.assert_fired(to_mul, capture(torch.relu, torch.randn(3)))
    with pytest.raises(AssertionError, match="match 2 times; it matched 1 times"):
        testing.assert_fired(to_mul, graph(), times=2)
    with pytest.raises(AssertionError, match="left the graph as it was"):
        testing.assert_fired(lambda graph: 1, graph())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"appear": ["aten.mu1.Tensor"]}, 'did you mean "aten.mul.Tensor"'),
        ({"appear": {"aten.mul.Tensor": 2}}, "2 times, is there 1"),
        ({"appear": ["aten.relu"]}, "there 1 times before the pass"),
        ({"vanish": ["aten.relu"]}, "still there 1 times"),
        ({"vanish": ["aten.sub.Tensor"]}, "was not in the graph"),
        ({"stay": ["aten.add.Tensor"]}, "was there 1 times and is 0"),
        ({"stay": {"aten.relu": 2}}, "should stay 2 times"),
        ({"stay": ["aten.sub.Tensor"]}, "was there 0 times"),
    ],
    ids=str,
)
def test_ops_are_counted(asked, message):
    with pytest.raises(AssertionError, match=message):
        testing.assert_ops(run_pass(to_mul, graph()), **asked)


def refusing(graph: torch.fx.Graph) -> int:
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        node.meta["why"] = {"reason": "TOO_SMALL", "detail": "3 x 5"}
    return 0


def test_refusal_with_its_reason():
    testing.assert_refused(refusing, graph(), "TOO_SMALL", key="why")
    with pytest.raises(AssertionError, match=r"refuse with TOO_LARGE, gave .*TOO_SMALL"):
        testing.assert_refused(refusing, graph(), "TOO_LARGE", key="why")
    with pytest.raises(AssertionError, match="but changed it"):
        testing.assert_refused(to_mul, graph())


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_numbers_are_found(dtype, backward):
    gm = capture(double, torch.randn(3, 5).to(dtype))
    testing.assert_numerics(to_mul, gm, backward=backward)
    with pytest.raises(AssertionError, match=r"output 0.*not accurate"):
        testing.assert_numerics(to_wrong, gm, backward=backward)


def test_a_wrong_gradient_alone_is_found():
    detach = passes(lambda g, n: replace(
        g, n, aten.add.Tensor, (replace_arg(g, n), n.args[0])
    ))  # fmt: skip

    def replace_arg(graph, node):
        with graph.inserting_before(node):
            new = graph.call_function(aten.detach.default, (node.args[0],))
        new.meta["val"] = node.meta["val"]
        return new

    testing.assert_numerics(detach, graph())
    with pytest.raises(AssertionError, match=r"the gradient of arg0_1.*not accurate"):
        testing.assert_numerics(detach, graph(), backward=True)


def test_a_loss_of_precision_is_found_where_close_would_pass():
    def through_half(graph, node):
        with graph.inserting_before(node):
            args = (node.args[0], torch.bfloat16)
            half = graph.call_function(torch.ops.prims.convert_element_type.default, args)
            wide = graph.call_function(
                torch.ops.prims.convert_element_type.default, (half, torch.float32)
            )
        half.meta["val"] = node.meta["val"].to(torch.bfloat16)
        wide.meta["val"] = node.meta["val"]
        node.args = (wide, wide)

    with pytest.raises(AssertionError, match="not accurate"):
        testing.assert_numerics(passes(through_half), graph())


def test_bfloat16_graphs_are_compared_with_their_own_rounding():
    def function(x):
        return x.to(torch.bfloat16) + x.to(torch.bfloat16)

    def on_the_side(graph, node):
        replace(graph, node, aten.mul.Tensor, (node.args[0], 2))

    testing.assert_numerics(passes(on_the_side), capture(function, torch.randn(64)))


def test_a_pass_that_fires_again_is_not_idempotent():
    again = passes(lambda g, n: replace(g, n, aten.add.Tensor, n.args))
    with pytest.raises(AssertionError, match="left the graph as it was"):
        testing.assert_idempotent(again, graph())

    def grow(graph: torch.fx.Graph) -> int:
        (relu,) = graph.find_nodes(op="call_function", target=aten.relu.default)
        replace(graph, relu, aten.relu.default, (replace_by_abs(graph, relu),))
        return 1

    def replace_by_abs(graph, node):
        with graph.inserting_before(node):
            new = graph.call_function(aten.abs.default, (node.args[0],))
        new.meta["val"] = node.meta["val"]
        return new

    with pytest.raises(AssertionError, match="second run fired 1"):
        testing.assert_idempotent(grow, graph())


def value_of(*shape, dtype=torch.float32, strides=None):
    def make(node):
        with node.meta["val"].fake_mode:
            return torch.empty_strided(shape, strides or (shape[1], 1), dtype=dtype)

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (value_of(3, 4), r"says f32\[3, 4\]"),
        (value_of(3, 5, dtype=torch.bfloat16), r"says bf16\[3, 5\]"),
        (value_of(3, 5, strides=(1, 3)), r"strides \[1, 3\]"),
    ],
    ids=["shape", "dtype", "strides"],
)
def test_false_meta_is_found(make, said):
    false = passes(lambda g, n: replace(g, n, aten.mul.Tensor, (n.args[0], 2), make(n)))
    with pytest.raises(AssertionError, match=said):
        testing.assert_meta(run_pass(false, graph()))


def test_missing_meta_is_found():
    def forget(graph, node):
        replace(graph, node, aten.mul.Tensor, (node.args[0], 2)).meta.clear()

    with pytest.raises(AssertionError, match=r"has no meta\['val'\]"):
        testing.assert_meta(run_pass(passes(forget), graph()))


def test_a_fake_mode_of_ones_own_is_found():
    def other_mode(graph, node):
        with FakeTensorMode():
            replace(graph, node, aten.mul.Tensor, (node.args[0], 2), torch.empty(3, 5))

    with pytest.raises(AssertionError, match="several fake modes"):
        testing.assert_meta(run_pass(passes(other_mode), graph()))


def test_outputs_with_other_strides_are_found():
    b = GraphBuilder()
    x = b.input("x", (3, 5))
    gm = b.output(b.call(aten.add.Tensor, x, x))

    def transpose(graph, node):
        args = (node.args[0], torch.contiguous_format)
        strided = (node.args[0], [3, 5], [1, 3])
        with node.meta["val"].fake_mode:
            val = torch.empty_strided((3, 5), (1, 3))
        del args
        new = replace(graph, node, aten.empty_strided.default, strided[1:], val)
        assert new

    with pytest.raises(AssertionError, match=r"output 0 .*strides \[1, 3\], before the pass"):
        testing.assert_meta(run_pass(passes(transpose), gm))


LYING = torch.library.Library("testing_lies", "DEF")
LYING.define("transposed(Tensor x) -> Tensor")
LYING.impl("transposed", lambda x: (x * 2).T.contiguous().T, "CompositeExplicitAutograd")
torch.library.register_fake("testing_lies::transposed", torch.empty_like, lib=LYING)


def test_a_fake_kernel_that_lies_is_found_by_running_the_op():
    op = torch.ops.testing_lies.transposed.default
    run = run_pass(passes(lambda g, n: replace(g, n, op, (n.args[0],))), graph())
    testing.assert_meta(run, execute=False)
    with pytest.raises(AssertionError, match="but the op returned"):
        testing.assert_meta(run)


def test_a_new_write_to_an_input_is_found():
    in_place = passes(lambda g, n: replace(g, n, aten.mul_.Tensor, (n.args[0], 2)))
    with pytest.raises(AssertionError, match=r"wrote to the inputs \[\], after the pass to"):
        testing.assert_mutation_safe(in_place, graph())


def test_a_lost_write_to_an_input_is_found():
    gm = capture(lambda x, y: x.copy_(y + y), torch.randn(3), torch.randn(3))

    def drop(graph: torch.fx.Graph) -> None:
        (copy,) = graph.find_nodes(op="call_function", target=aten.copy_.default)
        copy.replace_all_uses_with(copy.args[1])
        graph.erase_node(copy)

    testing.assert_mutation_safe(to_mul, gm)
    with pytest.raises(AssertionError, match=r"\['arg0_1'\], after the pass to \[\]"):
        testing.assert_mutation_safe(drop, gm)


def test_new_sharing_of_memory_is_found():
    gm = capture(lambda x: (x.cos(), x.sin()), torch.randn(3))

    def alias(graph: torch.fx.Graph) -> None:
        output = graph.output_node()
        (x,) = graph.find_nodes(op="placeholder")
        output.args = ((x, output.args[0][1]),)

    with pytest.raises(AssertionError, match="arg0_1 and output 0"):
        testing.assert_mutation_safe(alias, gm)


def test_guards_and_special_sizes_are_found():
    def guarding(graph, node):
        if node.meta["val"].shape[0] > 2:
            replace(graph, node, aten.mul.Tensor, (node.args[0], 2))

    gm = capture(double, torch.randn(7, 5), dynamic=True)
    with pytest.raises(AssertionError, match="added guards"):
        testing.assert_dynamic(passes(guarding), gm)

    def for_seven(graph, node):
        args = (node.args[0], [0, 0, 0, 0], 0.0)
        rows = replace(graph, node, aten.constant_pad_nd.default, args)
        with graph.inserting_after(rows):
            head = graph.call_function(aten.mul.Tensor, (rows, 2))
        rows.replace_all_uses_with(head, delete_user_cb=lambda user: user is not head)
        head.meta["val"] = rows.meta["val"]
        for user in list(head.users):
            with graph.inserting_before(user):
                cut = graph.call_function(aten.slice.Tensor, (head, 0, 0, 7))
            cut.meta["val"] = head.meta["val"]
            user.replace_input_with(head, cut)

    gm = capture(double, torch.randn(7, 5), dynamic=True)
    with pytest.raises(AssertionError, match=r"with sizes .*16"):
        testing.assert_dynamic(passes(for_seven), gm)
    with pytest.raises(AssertionError, match="no symbolic size"):
        testing.assert_dynamic(to_mul, graph())


def test_a_graph_that_is_not_valid_is_found():
    def break_(graph, node):
        other = torch.fx.Graph().placeholder("stranger")
        node.args = (other, other)

    with pytest.raises(AssertionError, match="not valid"):
        run_pass(passes(break_), graph())


def test_cache_key():
    from triton_only_backend import inductor

    one, same, other = (inductor.graph_pass("p", uuid, to_mul) for uuid in "112")
    testing.assert_cache_key(one, other)
    testing.assert_cache_key(one, other, graph())
    with pytest.raises(AssertionError, match="does not change with the pass"):
        testing.assert_cache_key(one, same)
    with pytest.raises(AssertionError, match="has no uuid"):
        testing.assert_cache_key(to_mul, other)


def test_source_hash_follows_the_source():
    assert testing.source_hash(double) == testing.source_hash(double)
    assert testing.source_hash(double) != testing.source_hash(graph)


def test_an_op_that_takes_no_fp64(device):
    """The exact result then comes from the caller."""
    import triton_only_backend  # noqa: F401

    mm = torch.ops.triton_only.mm.default
    b = GraphBuilder(device=device)
    x, y = b.input("x", (3, 8), torch.bfloat16), b.input("y", (8, 5), torch.bfloat16)
    gm = b.output(b.call(mm, x, y))

    def to_aten(graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=mm):
            replace(graph, node, aten.mm.default, node.args)

    def to_relu(graph: torch.fx.Graph) -> None:
        to_aten(graph)
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            with graph.inserting_after(node):
                relu = graph.call_function(aten.relu.default, (node,))
            node.replace_all_uses_with(relu)
            relu.args = (node,)

    testing.assert_numerics(to_aten, gm, exact=torch.mm)
    with pytest.raises(AssertionError, match="not accurate"):
        testing.assert_numerics(to_relu, gm, exact=torch.mm)
