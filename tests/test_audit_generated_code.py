"""The generated-code audit: nothing that runs outside Triton may hide in Inductor's output code."""

from __future__ import annotations

import textwrap

import pytest

from triton_only_backend.audit import CodeCall, Provider, Reason, audit_source

PREAMBLE = """
from ctypes import c_void_p
import torch
import math
from torch import device, empty_strided
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels
import triton
import triton.language as tl
from torch._C import _cuda_getCurrentRawStream as get_raw_stream

aten = torch.ops.aten
inductor_ops = torch.ops.inductor
_quantized = torch.ops._quantized
assert_size_stride = torch._C._dynamo.guards.assert_size_stride
empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda
reinterpret_tensor = torch._C._dynamo.guards._reinterpret_tensor
alloc_from_pool = torch.ops.inductor._alloc_from_pool
async_compile = AsyncCompile()
empty_strided_p2p = torch._C._distributed_c10d._SymmetricMemory.empty_strided_p2p
"""


def audit_body(body: str, prologue: str = "") -> list[CodeCall]:
    """Audits output code whose `call` has this body."""
    function = "def call(args):\n" + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    return audit_source(f"{PREAMBLE}\n{textwrap.dedent(prologue)}\n{function}\n")


def violations(body: str, prologue: str = "") -> list[str]:
    return [call.op for call in audit_body(body, prologue) if call.is_violation]


def test_bookkeeping_is_no_finding():
    body = """
        arg0_1, arg1_1 = args
        args.clear()
        assert_size_stride(arg0_1, (16, 16), (16, 1), 'input')
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            buf0 = empty_strided_cuda((32, 16), (16, 1), torch.float32)
            buf1 = reinterpret_tensor(buf0, (16, 32), (1, 16), 0)
            pool = alloc_from_pool(buf0, 0, torch.float32, (4,), (1,))
            view = torch.ops.inductor._reinterpret_tensor(buf0, (4,), (1,), 0)
            shaped = torch.as_strided(buf0, (4,), (1,))
            stream0 = get_raw_stream(0)
            del buf0
        return (buf1, math.floor(2.5), torch.device("cuda:0"), torch.empty_strided((1,), (1,)))
    """
    calls = audit_body(body)
    assert [call.op for call in calls if call.is_violation] == []
    assert {call.provider for call in calls} <= {Provider.NONE}


@pytest.mark.parametrize(
    ("line", "op", "provider"),
    [
        ("extern_kernels.mm(a, b, out=c)", "aten.mm", Provider.CUBLAS),
        ("extern_kernels.bias_addmm(a, b, c, out=d)", "aten.bias_addmm", Provider.CUBLAS),
        ("extern_kernels._mm_plus_mm(a, b, c, d, out=e)", "inductor._mm_plus_mm", Provider.CUBLAS),
        ("extern_kernels.mm_dtype(a, b, out=c)", "aten.mm_dtype", Provider.CUBLAS),
        ("c = extern_kernels.convolution(a, b, stride=(1,))", "aten.convolution", Provider.CUDNN),
        ("extern_kernels.something_new(a)", "aten.something_new", Provider.UNKNOWN),
        ("b = torch.ops.aten.sort.stable(a, stable=True)", "aten.sort.stable", Provider.CUB),
        ("b = torch.ops.aten.cumsum.default(a, 0)", "aten.cumsum.default", Provider.ATEN),
        ("aten.index_put_(a, [i], v, True)", "aten.index_put_", Provider.ATEN),
        ("aten.randint.low_out(0, 9, [1], out=a)", "aten.randint.low_out", Provider.ATEN),
        ("_quantized.wrapped_quantized_linear(a)", "", Provider.CPU),
        ("b = torch.ops.mylib.foo.default(a, k=3)", "mylib.foo.default", Provider.USER),
        ("b = torch.mm(a, a)", "aten.mm", Provider.CUBLAS),
        ("b = torch.nn.functional.linear(a, a)", "aten.linear", Provider.CUBLAS),
        ("b = torch.linalg.qr(a)", "aten.linalg_qr", Provider.CUSOLVER),
        ("b = torch.stack(a, dim=0)", "aten.stack", Provider.ATEN),
        ("b = a @ a", "aten.matmul", Provider.CUBLAS),
        ("b = a.bmm(a)", "aten.bmm", Provider.CUBLAS),
        ("b = mystery(a)", "mystery_lib.mystery", Provider.UNKNOWN),
        ("exec('import os')", "exec", Provider.UNKNOWN),
        ("a @= b", "aten.matmul", Provider.CUBLAS),
        ("b = torch.compile(f)(a)", "torch.compile", Provider.UNKNOWN),
        ("b = torch.special.i0(a)", "torch.special.i0", Provider.UNKNOWN),
    ],
)
def test_calls_outside_triton_are_found(line, op, provider):
    calls = audit_body(line, prologue="from mystery_lib import mystery")
    (call,) = [call for call in calls if call.is_violation]
    assert call.provider is provider
    assert call.op == (op or call.op)
    assert call.reason is not None


@pytest.mark.parametrize(
    ("line", "provider"),
    [
        ("b = torch.ops.triton_only.mm.default(a, a)", Provider.TRITON_OURS),
        ("buf0.copy_(arg0_1)", Provider.MEMCPY),
        ("aten.copy_.default(a, b)", Provider.MEMCPY),
        ("torch.ops._c10d_functional.all_reduce_.default(a, 'sum', '0')", Provider.NCCL),
        ("n = arg0_1.item()", Provider.MEMCPY),
        ("b = torch.ops.aten.view_as_real.default(a)", Provider.NONE),
    ],
)
def test_these_calls_are_listed_but_are_no_violation(line, provider):
    (call,) = audit_body(line)
    assert call.provider is provider
    assert not call.is_violation


@pytest.mark.parametrize(
    "body",
    [
        "mm = extern_kernels.mm\nmm(a, b, out=c)",
        "ek = extern_kernels\nek.mm(a, b, out=c)",
        "op = torch.ops.aten.mm.default\nalias = op\nc = alias(a, b)",
        "t = torch\nc = t.ops.aten.mm.default(a, b)",
        "import torch as t2\nc = t2.ops.aten.mm.default(a, b)",
        "from torch._inductor.select_algorithm import extern_kernels as e\ne.mm(a, b, out=c)",
        "c = getattr(extern_kernels, 'mm')(a, b)",
        "c = getattr(torch.ops.aten, 'mm').default(a, b)",
        "f = getattr(torch.ops, 'aten').mm\nc = f(a, b)",
        "def inner(x):\n    return [extern_kernels.mm(x, y) for y in x]\nreturn inner(a)",
        "c = (lambda x: aten.mm.default(x, x))(a)",
        "c = (mm := aten.mm)(a, b)",
        "c = aten.mm(a, b)",
        "for _ in range(3):\n    with guard:\n        extern_kernels.mm(a, b, out=c)",
        "if a.numel():\n    extern_kernels.mm(a, b, out=c)",
        "try:\n    extern_kernels.mm(a, b)\nfinally:\n    pass",
        "c = [aten.mm.default][0](a, b)",
        "table = {'mm': aten.mm.default}\nc = table['mm'](a, b)",
        "c = apply(torch.ops.aten.mm.default, a, b)",
        "c = torch.ops.higher_order.run_and_save_rng_state(torch.ops.aten.mm.default, a, b)",
        "def f(x, op=aten.mm):\n    return op(x, x)\nreturn f(a)",
        "self.op = aten.mm.default",
        "class K:\n    op = aten.mm\n    def f(self, x):\n        return self.op(x)",
        "x, y = aten.mm, 1\nreturn x(a)",
        "return [f(a) for f in [aten.mm]]",
        "f = partial(aten.mm, a)\nreturn f(b)",
        "return aten.mm.default",
        "c = __import__('torch').ops.aten.mm(a, b)",
    ],
)
def test_an_mm_cannot_hide(body):
    assert [op for op in violations(body) if op.startswith("aten.mm")] != []


def test_each_op_of_a_choice_counts():
    body = "op = aten.mm if flag else aten.bmm\nc = op(a, b)"
    assert sorted(violations(body)) == ["aten.bmm", "aten.mm"]


def test_a_name_bound_twice_means_both():
    body = "op = torch.ops.triton_only.mm.default\nop = aten.mm.default\nc = op(a, b)"
    assert violations(body) == ["aten.mm.default"]


def test_a_functions_names_are_its_own():
    # the graph's partitions are functions one after the other, with names in common
    code = "".join(
        f"def partition_{i}(x):\n    op = {op}\n    return op(x, x)\n"
        for i, op in enumerate(["triton.next_power_of_2", "torch.ops.aten.mm", "aten.bmm"])
    )
    assert [call.op for call in audit_source(code)] == ["aten.mm", "aten.bmm"]


def test_an_op_that_is_named_at_run_time_is_unknown():
    (call,) = audit_body("c = getattr(torch.ops.aten, name)(a, b)")
    assert call.provider is Provider.UNKNOWN
    assert call.reason is Reason.OPAQUE_CODE


def test_comments_strings_and_dead_helpers_do_not_count():
    source = PREAMBLE + textwrap.dedent(
        '''
        # extern_kernels.mm(a, b, out=c)
        """extern_kernels.mm(a, b, out=c)"""
        def call(args):
            # torch.ops.aten.sort.stable(a)
            assert_size_stride(a, (1,), (1,), 'torch.ops.aten.topk.default')
            text = "extern_kernels.mm(a, b, out=c)"
            return (text,)

        def get_args():
            return [torch.mm(a, b)]

        def benchmark_compiled_module(args, times=10):
            return print_performance(lambda: extern_kernels.mm(*args))

        if __name__ == "__main__":
            extern_kernels.mm(1, 2)
        '''
    )
    assert audit_source(source) == []


def test_a_main_guard_of_another_kind_does_count():
    source = PREAMBLE + "if __name__ != 'x':\n    pass\nif __name__ == 'm':\n    aten.mm(a, b)\n"
    assert [call.op for call in audit_source(source)] == ["aten.mm"]


def test_a_parameter_shadows_a_global():
    assert violations("def f(aten):\n    return aten.mm(1)\nreturn f(a)") == ["aten.mm"]
    assert violations("def f(op):\n    return op(1)\nreturn f(a)") == []


def test_a_sorted_python_list_is_not_aten_sort():
    assert violations("names = [3, 1]\nnames.sort()") == []


KERNELS = """
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', '''
@triton_heuristics.pointwise(size_hints={'x': 64})
@triton.jit
def triton_poi_fused_add_0(in_ptr0): pass
''', device_str='cuda')
my_kernel_0 = async_compile.triton('my_kernel', '''
@triton_heuristics.user_autotune(configs=[])
@triton.jit
def my_kernel(x): pass
''', device_str='cuda')
async_compile.wait(globals())
del async_compile
"""


def test_triton_kernels_are_listed_with_their_launches():
    body = """
        for _ in range(2):
            triton_poi_fused_add_0.run(a, 64, stream=stream0)
        k = triton_poi_fused_add_0
        k.run(a, 64, stream=stream0)
        my_kernel_0.run(a, stream=stream0)
        my_kernel_0[(1,)](a)
    """
    calls = {call.name: call for call in audit_body(body, KERNELS)}
    assert set(calls) == {"triton_poi_fused_add_0", "my_kernel"}
    inductors, users = calls["triton_poi_fused_add_0"], calls["my_kernel"]
    assert (inductors.provider, inductors.count) == (Provider.TRITON_INDUCTOR, 2)
    assert (users.provider, users.count) == (Provider.TRITON_USER, 2)
    assert not inductors.is_violation
    assert not users.is_violation


@pytest.mark.parametrize(
    ("language", "provider"),
    [
        ("cpp_pybinding", Provider.CPU),
        ("cpp", Provider.CPU),
        ("cutlass", Provider.CUTLASS),
        ("cuda", Provider.CUTLASS),
        ("rocm", Provider.CUTLASS),
        ("cutedsl", Provider.CUTLASS),
        ("something_new", Provider.UNKNOWN),
    ],
)
def test_kernels_in_other_languages_are_violations(language, provider):
    prologue = f"fused_0 = async_compile.{language}('fused_0', 'source')"
    (call,) = audit_body("fused_0(a)", prologue)
    assert (call.name, call.provider, call.is_violation) == ("fused_0", provider, True)


def test_cpp_kernels_in_inductors_own_spelling():
    prologue = "cpp_fused_add_0 = async_compile.cpp_pybinding(['float*'], '''void k() {}''')"
    (call,) = audit_body("cpp_fused_add_0(a)\ncpp_fused_add_0(b)", prologue)
    assert (call.provider, call.count, call.reason) == (Provider.CPU, 2, Reason.CPU_KERNEL)


def test_a_kernel_launched_without_a_name_is_seen():
    (call,) = audit_body("async_compile.cuda('k', 'so').run(a)")
    assert (call.name, call.count) == ("k", 1)


def test_code_that_cannot_be_read_is_not_believed():
    for source in ("", "#include <torch/csrc/api.h>\nint main() {}"):
        (call,) = audit_source(source)
        assert call.kind == "opaque"
        assert call.is_violation
    wrapper = """
from torch._inductor.codecache import CppWrapperCodeCache
inductor_entry = CppWrapperCodeCache.load_pybinding(argtypes=[], main_code='...')
call = inductor_entry
"""
    assert [call.kind for call in audit_source(wrapper)] == ["opaque"]


def test_origins_are_read_from_the_comment_above():
    body = """
        # Topologically Sorted Source Nodes: [linear, y, topk], Original ATen: [aten.b, aten.topk]
        raw_stream0 = get_raw_stream(0)
        buf4 = torch.ops.aten.topk.default(buf3, 4, -1, True, True)
        buf5 = extern_kernels.mm(buf4, buf4)
        # Unsorted Source Nodes: [], Original ATen: []
        aten.randint.low_out(0, 9, [1], out=buf2)
    """
    topk, mm, randint = audit_body(body)
    assert topk.source_nodes == ("linear", "y", "topk")
    assert topk.original_aten == ("aten.b", "aten.topk")
    assert mm.source_nodes == ()  # a comment describes one call
    assert randint.original_aten == ()


def test_line_numbers_point_into_the_code():
    source = "import torch\n\n\ndef call(args):\n    return torch.ops.aten.sort.stable(args[0])\n"
    (call,) = audit_source(source)
    assert (call.line, call.name, call.op) == (5, "torch.ops.aten.sort.stable", "aten.sort.stable")


def test_subgraphs_and_partitions_are_read():
    source = PREAMBLE + textwrap.dedent(
        """
        def true_graph_0(args):
            extern_kernels.mm(args[0], args[1], out=args[2])
            return (args[2],)

        def partition_0(args):
            return (torch.ops.aten.topk.default(args[0], 2),)

        class Runner:
            def __init__(self, partitions):
                self.partitions = partitions

            def call(self, args):
                if args[0].item():
                    return true_graph_0(args)
                partition0_args = [args[0]]
                return self.partitions[0](partition0_args)

        runner = Runner(partitions=[partition_0])
        call = runner.call
        """
    )
    found = [call.op for call in audit_source(source) if call.is_violation]
    assert found == ["aten.mm", "aten.topk.default"]
