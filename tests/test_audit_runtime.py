"""The run-time audit: every kernel that ran, by whose it is. Triton's are known, not guessed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import record_function

from triton_only_backend import interpreter
from triton_only_backend.audit import Provider, kernel_names, profile, runtime
from triton_only_backend.audit.runtime import KernelEvent, report_of

REAL = {
    "triton_poi_fused_add_0": Provider.TRITON_INDUCTOR,
    "gemm_kernel": Provider.TRITON_OURS,
}

needs_interpreter = pytest.mark.skipif(
    not interpreter.install_if_wanted(), reason="reads the CPU's ops, which takes no GPU"
)


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("triton_poi_fused_add_0", Provider.TRITON_INDUCTOR),
        ("gemm_kernel", Provider.TRITON_OURS),  # by its exact name, whatever it looks like
        ("triton_fake", Provider.UNKNOWN),
        ("triton_poi_fused_add_0_", Provider.UNKNOWN),
        ("nvjet_sm90_tst_128x64_64x8_1x2_h_bz_TNT", Provider.CUBLAS),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>(float)", Provider.CUBLAS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", Provider.CUBLAS),
        ("ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_stages_64x4_nn", Provider.CUBLAS),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_64x64_16x6_nn>()", Provider.CUBLAS),
        ("void gemv2T_kernel_val<int, int, float>(float)", Provider.CUBLAS),
        ("void gemmSN_TN_kernel<float, 128, 16>(float)", Provider.CUBLAS),
        ("void dot_kernel<float, 128, 0, cublasDotParams<float>>(float)", Provider.CUBLAS),
        ("Cijk_Ailk_Bljk_HHS_BH_MT128x128x32", Provider.CUBLAS),
        ("cudnn_generated_fort_native_sdpa_sm90_knob_7_64x128x128", Provider.CUDNN),
        ("void cudnn::fusion::compute_dot_do_o<true>(float)", Provider.CUDNN),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", Provider.CUDNN),
        ("void implicit_convolve_sgemm<float, float>(float)", Provider.CUDNN),
        ("void cutlass::device_kernel<GroupProblemShape>(int)", Provider.CUTLASS),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>(int)", Provider.FLASH),
        ("void flash::flash_bwd_dq_dk_dv_loop_kernel<int>(int)", Provider.FLASH),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(int)", Provider.EFFICIENT),
        ("void at::native::vectorized_elementwise_kernel<4, gemm>(int)", Provider.ATEN),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<int>(int)", Provider.ATEN),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<int>(int)", Provider.CUB),
        ("void cub::DeviceScanKernel<int>(int)", Provider.CUB),
        ("void regular_fft<256u, 16u>(float)", Provider.CUFFT),
        ("void vector_fft<64u>(float)", Provider.CUFFT),
        ("void getrf_wo_pivot<float>(float)", Provider.CUSOLVER),
        ("magma_sgemm_batched", Provider.CUSOLVER),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(int)", Provider.NCCL),
        ("Memcpy DtoD (Device -> Device)", Provider.MEMCPY),
        ("Memset (Device)", Provider.MEMSET),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::"
            "(anonymous namespace)::UnaryOpFunctor<long, 2>, at::native::Copy<long, long> >()",
            Provider.MEMCPY,
        ),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::"
            "(anonymous namespace)::UnaryOpFunctor<float, 2>, at::native::Copy<float, half> >()",
            Provider.ATEN,
        ),
        ("my_hand_written_cuda_kernel(float*)", Provider.UNKNOWN),
    ],
)
def test_kernels_are_classified(name, provider):
    assert kernel_names.classify_kernel(name, REAL) is provider


def report(*events: tuple[str, float]):
    kernels = [KernelEvent(n, kernel_names.classify_kernel(n, REAL), t) for n, t in events]
    return report_of(kernels, "gpu")


def test_shares_count_compute_only():
    found = report(
        ("triton_poi_fused_add_0", 30.0),
        ("triton_poi_fused_add_0", 30.0),
        ("nvjet_x", 40.0),
        ("Memcpy DtoH (Device -> Pageable)", 500.0),
        ("ncclDevKernel_AllReduce", 700.0),
    )
    rows = {row.name: row for row in found.rows}
    assert rows["triton_poi_fused_add_0"].count == 2
    assert rows["triton_poi_fused_add_0"].share == pytest.approx(0.6)
    assert found.triton_time_share == pytest.approx(0.6)
    assert [row.name for row in found.violations] == ["nvjet_x"]
    assert rows["Memcpy DtoH (Device -> Pageable)"].share == 0
    assert found.launches == 5
    assert not found.is_triton_only
    assert [row.time_us for row in found.rows] == sorted(r.time_us for r in found.rows)[::-1]


def test_a_kernel_that_only_looks_like_triton_is_a_violation():
    found = report(("triton_fake", 1.0))
    assert [row.provider for row in found.violations] == [Provider.UNKNOWN]
    assert found.triton_time_share == 0


def test_a_run_of_copies_alone_proves_nothing():
    found = report(("Memcpy DtoD (Device -> Device)", 1.0))
    assert found.violations == ()
    assert not found.is_triton_only
    assert found.triton_time_share == 0


def test_reports_can_be_written():
    found = report(("triton_poi_fused_add_0", 30.0), ("nvjet_x", 10.0))
    data = json.loads(found.to_json())
    assert data["triton_time_share"] == pytest.approx(0.75)
    assert data["rows"][1] == {
        "name": "nvjet_x",
        "provider": "cuBLAS",
        "count": 1,
        "time_us": 10.0,
        "share": 0.25,
        "is_violation": True,
    }
    text = found.to_text()
    assert "75.0% of compute time in Triton; 1 kernel outside Triton" in text
    assert "nvjet_x" in text


class FakeKineto:
    """A device event as Kineto hands it over."""

    def __init__(
        self,
        name: str,
        device: str = "CUDA",
        activity: str | None = "kernel",
        threads: int | None = None,
    ) -> None:
        self._name, self._device = name, device
        block = "" if threads is None else f'"grid": [7, 1, 1], "block": [{threads}, 1, 1]'
        self.metadata_json = lambda: block
        if activity is not None:
            self.activity_type = lambda: activity
        self.is_user_annotation = lambda: "annotation" in (activity or name)

    def name(self) -> str:
        return self._name

    def device_type(self):
        return getattr(torch._C._autograd.DeviceType, self._device)

    def start_ns(self) -> int:
        return 5000

    def duration_ns(self) -> int:
        return 2000


def test_device_events_are_read_and_annotations_are_not_kernels():
    events = [
        FakeKineto("nvjet_x"),
        FakeKineto("aten::mm", device="CPU", activity="cpu_op"),
        FakeKineto("## my block ##", activity="gpu_user_annotation"),
        FakeKineto("an annotation", activity=None),
        FakeKineto("Memset (Device)", activity="gpu_memset"),
        FakeKineto("nvjet_y", activity=None),
    ]
    results = SimpleNamespace(events=lambda: events)
    profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    found = runtime._device_events(profiler)
    assert [event.name for event in found] == ["nvjet_x", "Memset (Device)", "nvjet_y"]
    assert found[0].time_us == 2.0


def test_triton_names_come_from_live_compiled_kernels():
    from triton.compiler.compiler import CompiledKernel

    def planted_kernel():
        pass

    planted_kernel.__module__ = "triton_only_backend.kernels.gemm"
    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.module = None  # nothing to unload
    kernel.name = "planted_kernel"
    kernel.src = SimpleNamespace(fn=planted_kernel)
    loaded = CompiledKernel.__new__(CompiledKernel)
    loaded.name, loaded.src, loaded.module = "loaded_kernel", "kernel.ttir", None
    found = kernel_names.triton_kernels()
    assert found["planted_kernel"] is Provider.TRITON_OURS
    assert found["loaded_kernel"] is Provider.TRITON_USER
    assert "triton_fake" not in found


@pytest.mark.parametrize(
    ("threads", "provider"),
    [(128, Provider.TRITON_USER), (256, Provider.UNKNOWN), (None, Provider.TRITON_USER)],
)
def test_a_kernel_of_a_triton_kernels_name_but_not_its_blocks_is_not_believed(threads, provider):
    from triton.compiler.compiler import CompiledKernel

    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.name, kernel.src, kernel.module = "copied_name", "kernel.ttir", None
    kernel.metadata = SimpleNamespace(num_warps=4)
    events = [FakeKineto("copied_name", threads=threads)]
    results = SimpleNamespace(events=lambda: events)
    profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    (found,) = runtime._device_events(profiler)
    assert found.provider is provider


def test_triton_names_come_from_inductors_static_launcher_too():
    launcher = pytest.importorskip("torch._inductor.runtime.static_triton_launcher")
    kernel = launcher.StaticallyLaunchedCudaKernel.__new__(launcher.StaticallyLaunchedCudaKernel)
    kernel.name = "triton_red_planted_7"
    assert kernel_names.triton_kernels()["triton_red_planted_7"] is Provider.TRITON_INDUCTOR


def scoped(name: str):
    return record_function(runtime.INTERPRETER_SCOPE + name)


def providers(fn) -> dict[str, Provider]:
    return {row.name: row.provider for row in profile(fn, warmup=1).rows}


@needs_interpreter
def test_without_a_gpu_scopes_are_triton_and_other_ops_are_violations():
    a, b = torch.randn(8, 8), torch.randn(8, 8)

    def run():
        with scoped("my_kernel"):
            torch.softmax(a @ b, -1)
        with scoped("my_kernel"), scoped("inner"):
            torch.relu(a)
        return torch.nn.functional.linear(a, b)

    found = profile(run)
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {"my_kernel", "aten::linear"}  # the outermost op only
    assert (rows["my_kernel"].provider, rows["my_kernel"].count) == (Provider.TRITON_USER, 2)
    assert [row.name for row in found.violations] == ["aten::linear"]
    assert rows["aten::linear"].provider is Provider.CPU
    assert found.device == "interpreter"
    assert 0 < found.triton_time_share < 1


@needs_interpreter
def test_views_allocations_and_copies_are_not_compute():
    a = torch.randn(8, 8)

    def run():
        with scoped("k"):
            a + 1
        torch.empty(4).copy_(a.view(-1)[:4])
        a.t().contiguous()
        torch.zeros(3)
        return a.expand(2, 8, 8).detach()

    found = profile(run)
    assert found.violations == ()
    assert found.is_triton_only
    assert found.triton_time_share == 1.0
    assert {row.provider for row in found.rows} == {
        Provider.TRITON_USER,
        Provider.MEMCPY,
        Provider.MEMSET,
    }


@needs_interpreter
@pytest.mark.parametrize(
    "op",
    ["mm", "addmm", "bmm", "softmax", "sort", "scaled_dot_product_attention", "add", "fill_"],
)
def test_cpu_compute_ops_are_violations(op):
    x = torch.randn(1, 8, 8)
    runs = {
        "mm": lambda: x[0].mm(x[0]),
        "addmm": lambda: torch.addmm(x[0], x[0], x[0]),
        "bmm": lambda: x.bmm(x),
        "softmax": lambda: x.softmax(-1),
        "sort": lambda: x.sort(),
        "scaled_dot_product_attention": lambda: torch.nn.functional.scaled_dot_product_attention(
            x[None], x[None], x[None]
        ),
        "add": lambda: x + x,
        "fill_": lambda: x.clone().fill_(1.0),
    }
    found = providers(runs[op])
    assert found[f"aten::{op}"] is Provider.CPU


@needs_interpreter
def test_an_aten_op_that_a_triton_kernel_implements_is_taken_apart():
    a = torch.randn(8, 8)

    def event(name, *children, annotation=False):
        made = SimpleNamespace(
            name=name,
            cpu_children=list(children),
            cpu_parent=None,
            cpu_time_total=5.0,
            time_range=SimpleNamespace(start=0.0),
            is_user_annotation=annotation,
        )
        for child in children:
            child.cpu_parent = made
        return made

    scope = event(runtime.INTERPRETER_SCOPE + "gemm", event("aten::mul"), annotation=True)
    ours = event("triton_only::mm", event("aten::empty"), scope)
    outer = event("aten::linear", event("aten::t"), event("aten::mm", ours), event("aten::add_"))
    found = runtime.cpu_events([outer, ours, scope])
    assert [(e.name, e.provider) for e in found] == [
        ("gemm", Provider.TRITON_USER),
        ("aten::add_", Provider.CPU),
    ]
    assert a.shape == (8, 8)


@needs_interpreter
def test_a_custom_op_that_shows_nothing_is_not_believed():
    library = torch.library.Library("audit_runtime_test", "DEF")
    library.define("opaque(Tensor x) -> Tensor")
    library.impl("opaque", lambda x: x, "CompositeExplicitAutograd")
    found = providers(lambda: torch.ops.audit_runtime_test.opaque(torch.ones(2).view(2)))
    library._destroy()
    assert found["audit_runtime_test::opaque"] is Provider.USER


@needs_interpreter
def test_a_real_interpreted_kernel_is_ours_by_its_module():
    import triton

    def kernel_of_ours():
        pass

    kernel_of_ours.__module__ = "triton_only_backend.kernels.gemm"
    interpreted = type(triton.jit(kernel_of_ours))
    assert interpreted.__name__ == "InterpretedFunction"
    wrapped = triton.jit(kernel_of_ours)
    assert kernel_names.interpreted_kernels()["kernel_of_ours"] is Provider.TRITON_OURS
    assert wrapped.fn is kernel_of_ours


@needs_interpreter
def test_arguments_reach_the_function_and_warm_up_runs_first():
    seen = []

    def run(*args, **kwargs):
        seen.append((args, kwargs))

    found = profile(run, 1, 2, warmup=2, key=3)
    assert seen == [((1, 2), {"key": 3})] * 3
    assert found.rows == ()


@needs_interpreter
def test_profiling_starts_no_gpu():
    profile(lambda: None)
    assert not torch.cuda.is_initialized()
