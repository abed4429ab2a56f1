"""The graph audit: what the policy says of each op, and where it says the op came from."""

from __future__ import annotations

import ast
import operator
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.fx
from torch.fx.experimental.proxy_tensor import make_fx

import triton_only_backend
from triton_only_backend import audit
from triton_only_backend.audit import GraphOp, Provider, Reason, audit_graph, policy
from triton_only_backend.audit.graph import clean_module_path, source_line

aten = torch.ops.aten


@pytest.fixture(scope="module")
def user_library():
    library = torch.library.Library("audit_graph_test", "DEF")
    library.define("opaque(Tensor x) -> Tensor")
    library.impl("opaque", lambda x: x.clone(), "CompositeExplicitAutograd")
    yield torch.ops.audit_graph_test.opaque.default
    library._destroy()


def one_op_graph(target, *inputs, **meta) -> torch.fx.GraphModule:
    """A graph that calls `target` on fake inputs."""
    graph = torch.fx.Graph()
    nodes = []
    for index, value in enumerate(inputs):
        node = graph.placeholder(f"x{index}")
        node.meta["val"] = value
        nodes.append(node)
    call = graph.call_function(target, tuple(nodes))
    call.meta.update(meta)
    graph.output(call)
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def only(gm: torch.fx.GraphModule) -> GraphOp:
    (op,) = audit_graph(gm)
    return op


@pytest.mark.parametrize(
    ("op", "provider", "reason"),
    [
        ("aten.mm.default", Provider.CUBLAS, Reason.LIBRARY_ONLY),
        ("aten.addmm.default", Provider.CUBLAS, Reason.LIBRARY_ONLY),
        ("aten.addmm_", Provider.CUBLAS, Reason.LIBRARY_ONLY),
        ("aten._int_mm.default", Provider.CUBLAS, Reason.LIBRARY_ONLY),
        ("aten._scaled_mm_v2.default", Provider.CUBLAS, Reason.LIBRARY_ONLY),
        ("aten._grouped_mm.default", Provider.CUTLASS, Reason.LIBRARY_ONLY),
        ("aten.convolution.default", Provider.CUDNN, Reason.LIBRARY_ONLY),
        ("aten.convolution_backward.default", Provider.CUDNN, Reason.LIBRARY_ONLY),
        ("aten.cudnn_batch_norm_backward.default", Provider.CUDNN, Reason.LIBRARY_ONLY),
        ("aten._cudnn_rnn.default", Provider.CUDNN, Reason.LIBRARY_ONLY),
        (
            "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
            Provider.FLASH,
            Reason.LIBRARY_ONLY,
        ),
        (
            "aten._scaled_dot_product_cudnn_attention.default",
            Provider.CUDNN,
            Reason.LIBRARY_ONLY,
        ),
        ("aten._efficient_attention_backward.default", Provider.EFFICIENT, Reason.LIBRARY_ONLY),
        ("aten.sort.stable", Provider.CUB, Reason.NO_TRITON_LOWERING),
        ("aten.topk.default", Provider.ATEN, Reason.NO_TRITON_LOWERING),
        ("aten.nonzero.default", Provider.CUB, Reason.DATA_DEPENDENT),
        ("aten._linalg_svd.default", Provider.CUSOLVER, Reason.NO_TRITON_LOWERING),
        ("aten._fft_r2c.default", Provider.CUFFT, Reason.NO_TRITON_LOWERING),
        ("prims.inductor_seeds.default", Provider.ATEN, Reason.LIBRARY_ONLY),
        ("nobody.knows.default", Provider.USER, Reason.USER_OP),
        ("higher_order.never_heard_of", Provider.UNKNOWN, Reason.UNKNOWN_OP),
    ],
)
def test_policy_flags_library_ops_and_says_what_to_do(op, provider, reason):
    verdict = policy.classify(op)
    assert (verdict.provider, verdict.reason) == (provider, reason)
    assert verdict.is_violation
    assert verdict.remedy


@pytest.mark.parametrize(
    ("op", "provider"),
    [
        ("triton_only.mm.default", Provider.TRITON_OURS),
        ("aten.add.Tensor", Provider.TRITON_INDUCTOR),
        ("aten.cumsum.default", Provider.TRITON_INDUCTOR),  # Inductor lowers it, or falls back
        ("aten._softmax.default", Provider.TRITON_INDUCTOR),  # decomposed
        ("prims.inductor_random.default", Provider.TRITON_INDUCTOR),
        ("higher_order.flex_attention", Provider.TRITON_INDUCTOR),
        ("higher_order.triton_kernel_wrapper_functional", Provider.TRITON_USER),
        ("higher_order.cond", Provider.NONE),
        ("aten.view.default", Provider.NONE),
        ("aten.split.Tensor", Provider.NONE),
        ("aten.empty.memory_format", Provider.NONE),
        ("_c10d_functional.all_reduce.default", Provider.NCCL),
        ("prims.device_put.default", Provider.MEMCPY),
    ],
)
def test_policy_leaves_these_alone(op, provider):
    verdict = policy.classify(op)
    assert verdict.provider is provider
    assert not verdict.is_violation
    assert verdict.remedy == ""


def test_an_op_that_inductor_always_falls_back_on_is_aten():
    assert policy.classify("aten._fused_rms_norm.default").provider is Provider.ATEN
    assert policy.classify("aten.angle.default").reason is Reason.NO_TRITON_LOWERING


def test_a_called_op_is_not_triton_however_well_inductor_could_lower_it():
    assert policy.classify_call("aten.cumsum.default").provider is Provider.ATEN
    assert policy.classify_call("aten.copy_.default").provider is Provider.MEMCPY
    assert policy.classify_call("triton_only.mm.default").provider is Provider.TRITON_OURS


def test_a_traced_function_lists_its_ops_and_not_python_arithmetic():
    gm = make_fx(lambda x, w: torch.sort(torch.relu(x @ w).view(-1))[0])(
        torch.randn(4, 8), torch.randn(8, 2)
    )
    ops = audit_graph(gm)
    assert [op.op for op in ops] == [
        "aten.mm.default",
        "aten.relu.default",
        "aten.view.default",
        "aten.sort.default",
    ]
    assert [op.op for op in ops if op.is_violation] == ["aten.mm.default", "aten.sort.default"]


def test_shapes_and_dtypes():
    gm = make_fx(lambda x, w: x @ w)(
        torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(8, 4, dtype=torch.bfloat16)
    )
    op = only(gm)
    assert op.inputs == ("bf16[2, 8]", "bf16[8, 4]")
    assert op.outputs == ("bf16[2, 4]",)
    assert op.shapes == "bf16[2, 8], bf16[8, 4] -> bf16[2, 4]"
    assert op.dtypes == ("bf16",)


def test_symbolic_sizes_are_shown_as_symbols_and_every_output_is_listed():
    gm = make_fx(lambda x: torch.sort(x)[0], tracing_mode="symbolic")(torch.randn(3, 5))
    sort = next(op for op in audit_graph(gm) if op.op == "aten.sort.default")
    assert sort.inputs == ("f32[s48, s57]",) or sort.inputs[0].startswith("f32[s")
    assert [text.partition("[")[0] for text in sort.outputs] == ["f32", "i64"]


def test_source_line_is_the_innermost_frame_that_is_the_users():
    trace = (
        '  File "/somewhere/train.py", line 90, in main\n    loss = model(x)\n'
        '  File "/somewhere/model.py", line 12, in forward\n    y = self.l(x)\n'
        f'  File "{torch.nn.modules.linear.__file__}", line 125, in forward\n'
        "    return F.linear(input, self.weight, self.bias)\n"
    )
    assert source_line(trace) == "model.py:12 in forward: y = self.l(x)"
    only_torch = "\n".join(trace.splitlines()[-2:])
    assert "linear.py:125 in forward" in source_line(only_torch)
    assert source_line("") == ""


def test_a_user_folder_named_torch_is_the_users():
    trace = '  File "/home/me/torch/net.py", line 3, in forward\n    return x @ w\n'
    assert source_line(trace) == "net.py:3 in forward: return x @ w"


def test_carets_under_the_code_are_not_mistaken_for_it():
    trace = '  File "a.py", line 3, in f\n    return x @ w\n           ^^^^^\n'
    assert source_line(trace) == "a.py:3 in f: return x @ w"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("L['self'].model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("L['self']._modules['layers']._modules['0']", "layers.0"),
        ('L["m"].layers[3].mlp', "layers.3.mlp"),
        ("L['self']", ""),
        ("L['self']._orig_mod.head", "head"),
    ],
)
def test_module_paths_are_cleaned(raw, clean):
    assert clean_module_path(raw) == clean


def test_planted_metadata_reaches_the_graph_op():
    gm = one_op_graph(
        aten.mm.default,
        torch.empty(2, 3, dtype=torch.float64),
        torch.empty(3, 4, dtype=torch.float64),
        val=torch.empty(2, 4, dtype=torch.float64),
        nn_module_stack={
            "a": ("L['self'].layers.1", torch.nn.Module),
            "b": ("L['self'].layers.1.up", torch.nn.Linear),
        },
        stack_trace='  File "m.py", line 7, in forward\n    return self.up(x)',
        triton_only_refusal={
            "reason": "UNSUPPORTED_DTYPE",
            "detail": "fp64 operands",
            "remedy": "call .float() on the model",
        },
    )
    op = only(gm)
    assert op.module_path == "layers.1.up"
    assert op.source_line == "m.py:7 in forward: return self.up(x)"
    assert (op.reason, op.detail) == (Reason.UNSUPPORTED_DTYPE, "fp64 operands")
    assert op.remedy == "call .float() on the model"
    assert op.refused == "UNSUPPORTED_DTYPE"
    assert op.shapes == "f64[2, 3], f64[3, 4] -> f64[2, 4]"


def test_a_refusal_with_a_reason_of_its_own_is_kept_in_words():
    refusal = {"reason": "HEAD_DIM", "detail": "head_dim 300"}
    op = only(one_op_graph(aten.bmm.default, triton_only_refusal=refusal))
    assert op.reason is Reason.REFUSED_BY_PASS
    assert (op.refused, op.detail) == ("HEAD_DIM", "head_dim 300")
    assert op.remedy == policy.classify("aten.bmm").remedy


def test_backward_nodes_fall_back_on_the_forward_module():
    stack = {"a": ("L['self'].head", torch.nn.Linear)}
    assert only(one_op_graph(aten.mm.default, fwd_nn_module_stack=stack)).module_path == "head"


def test_a_user_op_is_a_violation(user_library):
    op = only(one_op_graph(user_library, torch.empty(2)))
    assert (op.op, op.provider) == ("audit_graph_test.opaque.default", Provider.USER)
    assert op.reason is Reason.USER_OP
    assert 'allow=["audit_graph_test.opaque*"]' in op.remedy


def test_an_op_inside_a_higher_order_op_is_judged_and_not_its_wrapper():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    hop = torch._higher_order_ops.auto_functionalize.auto_functionalized
    graph.output(graph.call_function(hop, (aten.sort.default,), {"self": x}))
    op = only(torch.fx.GraphModule(torch.nn.Module(), graph))
    assert (op.op, op.provider) == ("aten.sort.default", Provider.CUB)


def test_branches_of_a_cond_are_audited_too():
    def branching(p, x):
        return torch.cond(p, lambda x: x @ x, lambda x: torch.sort(x)[0] + 1, (x,))

    gm = make_fx(branching)(torch.tensor(True), torch.randn(4, 4))
    found = {op.op: op.name for op in audit_graph(gm) if op.is_violation}
    assert found == {
        "aten.mm.default": "true_graph_0/mm",
        "aten.sort.default": "false_graph_0/sort",
    }


def test_nothing_is_dropped_in_silence():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_method("frobnicate", (x,))
    z = graph.call_function(torch.special.i0, (y,))
    w = graph.call_function(operator.matmul, (z, z))
    graph.output(graph.call_function(operator.add, (w, 1)))
    ops = audit_graph(torch.fx.GraphModule(torch.nn.Module(), graph))
    assert len(ops) == 3
    assert all(op.is_violation for op in ops)
    assert ops[0].op == "call_method.frobnicate"


def test_importing_the_audit_is_light_and_starts_no_gpu():
    code = (
        "import sys, triton_only_backend.audit, torch; "
        "assert 'torch._inductor.lowering' not in sys.modules; "
        "assert 'rich' not in sys.modules; "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_audit_is_an_independent_witness():
    package = Path(audit.__file__).parent
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                for forbidden in ("passes", "kernels"):
                    assert not f"{name}.".startswith(f"triton_only_backend.{forbidden}."), path


def test_the_audit_package_is_callable(monkeypatch):
    asked = []
    module = types.ModuleType("triton_only_backend.model_audit")
    module.audit_model = lambda model, *args, **kwargs: asked.append((model, args, kwargs)) or "r"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(triton_only_backend, "model_audit", module, raising=False)
    assert audit("model", 1, key=2) == "r"
    assert asked == [("model", (1,), {"key": 2})]
