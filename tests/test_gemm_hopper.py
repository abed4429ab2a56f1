"""The warp-specialised product on Hopper: who computes what, what is chosen, what it computes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cross_compile import rows_of
from on_hopper import check_replays, unknown_gluon
from test_gemm import assert_as_accurate

from triton_only_backend.kernels.epilogue_traits import EpilogueTraits, with_registers
from triton_only_backend.kernels.gemm_choice import general_config, heuristic_config
from triton_only_backend.kernels.gemm_configs import (
    HOPPER_TILES,
    MOST_HALVED_SUMS,
    GemmConfig,
    GemmProblem,
    shares,
    supports,
)
from triton_only_backend.kernels.hardware import Hardware

H200 = Hardware("NVIDIA H200", "cuda", "sm90", 132, 232448)
A100 = Hardware("NVIDIA A100", "cuda", "sm80", 108, 166912)
PROBLEM = GemmProblem(1, 512, 6144, 4096, 2, False, True, True)


def config_of(
    block_m: int, block_n: int, *, split_k: int = 1, stream_k: bool = False
) -> GemmConfig:
    stages = HOPPER_TILES[block_m, block_n]
    return GemmConfig(
        "gemm_hopper", block_m, block_n, 64, split_k, 16, 8, stages, stream_k=stream_k
    )


STREAMED = [config_of(*tile, stream_k=True) for tile in HOPPER_TILES]
# Of which two programs have a half each: tiles with registers for the other's sums.
HALVED = [
    config_of(*tile, split_k=2) for tile in HOPPER_TILES if tile[0] * tile[1] <= MOST_HALVED_SUMS
]
DIVIDED = STREAMED + HALVED
CONFIGS = [config_of(*tile) for tile in HOPPER_TILES] + DIVIDED


def name_of(config: GemmConfig) -> str:
    how = "-stream" if config.stream_k else "-halves" if config.split_k == 2 else ""
    return f"{config.block_m}x{config.block_n}{how}"


# Who computes what: the kernel's own functions, on integers


class Int(int):
    """An integer that a kernel's functions take for a scalar."""

    def to(self, _dtype: object) -> Int:
        return self

    def __add__(self, other: int) -> Int:
        return Int(int(self) + other)

    def __sub__(self, other: int) -> Int:
        return Int(int(self) - other)

    def __mul__(self, other: int) -> Int:
        return Int(int(self) * other)

    def __floordiv__(self, other: int) -> Int:
        return Int(int(self) // other)

    def __mod__(self, other: int) -> Int:
        return Int(int(self) % other)

    def __eq__(self, other: object) -> bool:
        return int(self) == other

    __hash__ = int.__hash__

    __radd__ = __add__
    __rmul__ = __mul__


@pytest.fixture
def kernel(monkeypatch):
    """The functions of the kernel that say who computes what, for `kernel.program` of some."""
    from triton_only_backend.kernels import stream_k

    here = SimpleNamespace(program=Int(0), programs=Int(1))
    fake = SimpleNamespace(
        program_id=lambda _: here.program,
        num_programs=lambda _: here.programs,
        to_tensor=Int,
        cdiv=lambda a, b: Int(-(-int(a) // int(b))),
        maximum=lambda a, b: Int(max(a, b)),
        minimum=lambda a, b: Int(min(a, b)),
        where=lambda condition, a, b: a if condition else b,
        int32=None,
        int64=None,
    )
    for name in ("run_start", "first_run_behind", "items_of", "item_at", "others_of"):
        function = getattr(stream_k, name).fn
        setattr(here, name, function)
        monkeypatch.setattr(stream_k, name, function)
    monkeypatch.setattr(stream_k, "gl", fake)
    return here


SIZES = [
    (256, 6144, 4096),
    (256, 10240, 8192),
    (512, 28672, 4096),
    (1024, 4096, 4096),
    (4096, 6144, 4096),
    (640, 6144, 4096),
    (896, 1000, 1000),
    (129, 200, 64),
    (70, 130, 1032),
    (2176, 3000, 520),
    (304, 1352, 712),
    (512, 2560, 10240),
    (333, 1000, 520),
    (2000, 6152, 1032),
]


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_every_step_of_every_tile_is_multiplied_once(kernel, size, batch, config):
    """And who owns a tile waits for those that have the rest of it, each with lower ids."""
    M, N, K = size
    share = shares(batch, M, N, K, config, 132)
    halves = config.split_k == 2
    assert (share.programs <= 132 or halves) and share.programs % share.lanes == 0
    tiles = Int(batch * -(-M // config.block_m) * -(-N // config.block_n))
    steps = Int(-(-K // 64))
    kernel.programs = Int(share.programs)
    whole, lanes = Int(share.whole), Int(share.lanes)
    done: dict[int, list[tuple[int, int, int]]] = {}
    waits: dict[int, list[int]] = {}
    given = []
    for program in range(share.programs):
        kernel.program = Int(program)
        how = (share.divided and not halves, halves)
        count, begin, end = kernel.items_of(tiles, whole, lanes, steps, how[0])
        for i in range(count + -(-end // steps) - begin // steps):
            tile, first, last = kernel.item_at(Int(i), count, begin, end, whole, lanes, steps, *how)
            done.setdefault(int(tile), []).append((int(first), int(last), program))
            if halves:
                continue
            if first > 0:
                given.append((program, i, int(count)))
            elif share.divided:
                others = kernel.others_of(tile, last, tiles, whole, lanes, steps)
                waits[int(tile)] = [program - n * share.lanes for n in range(1, others + 1)]
    assert sorted(done) == list(range(tiles))
    for tile, parts in done.items():
        parts.sort()
        assert [first for first, _, _ in parts] == [0, *(last for _, last, _ in parts[:-1])]
        assert parts[-1][1] == steps
        if halves and steps > 1:
            assert [program for _, _, program in parts] == [2 * tile, 2 * tile + 1]
        elif share.divided and not halves:
            assert waits[tile] == [program for _, _, program in parts[1:]]
            assert all(program < parts[0][2] for program in waits[tile])
    # One tile of sums a program, the first that it divides with others.
    assert all(i == count for _, i, count in given)


def test_runs_are_equal():
    """256 × 6144: 96 tiles of 128 × 128, of which each of 66 workers of two has 46 or 47 steps."""
    share = shares(1, 256, 6144, 4096, config_of(128, 128, stream_k=True), 132)
    assert share == (132, 0, 2, True)
    large = config_of(128, 256, stream_k=True)
    assert shares(1, 4096, 28672, 4096, large, 132) == (132, 26 * 132, 4, True)
    assert shares(1, 132 * 128, 256, 512, large, 132) == (132, 132, 1, False)


# What is chosen


def test_the_choice_is_supported_and_has_a_reason():
    for M in (64, 128, 256, 512, 1024, 4096, 8192):
        for N, K in ((6144, 4096), (4096, 14336), (10240, 8192), (57344, 8192)):
            problem = replace(PROBLEM, M=M, N=N, K=K)
            config = heuristic_config(problem, H200)
            assert supports(problem, config, H200)
            if config.kernel == "gemm_hopper":
                divided = config.stream_k or config.split_k == 2
                assert divided == shares(1, M, N, K, config, 132).divided
    # 512 × 6144 is 128 tiles of 128 × 192.
    config = heuristic_config(PROBLEM, H200)
    assert (config.kernel, config.block_m, config.block_n) == ("gemm_hopper", 128, 192)


def test_only_where_it_runs():
    config = config_of(128, 256)
    assert supports(PROBLEM, config, H200)
    for problem in (
        replace(PROBLEM, aligned=False),
        replace(PROBLEM, element_size=4),
    ):
        assert not supports(problem, config, H200)
    for other in (
        replace(config, swap_operands=True),
        replace(config, num_stages=5),
        replace(config, block_m=256),
        replace(config, split_k=2),
        config_of(128, 160, split_k=3),
        config_of(128, 160, split_k=2, stream_k=True),
    ):
        assert not supports(PROBLEM, other, H200)
    assert supports(PROBLEM, config_of(128, 160, split_k=2), H200)
    assert not supports(replace(PROBLEM, K=64), config_of(128, 160, split_k=2), H200)
    assert not supports(PROBLEM, config, replace(H200, arch="sm100"))
    with unknown_gluon():
        assert not supports(PROBLEM, config, H200)
        assert heuristic_config(PROBLEM, H200).kernel == "gemm_tma"


@pytest.mark.parametrize(("M", "copies"), [(4, False), (64, True), (256, True), (4096, True)])
def test_unaligned_operands_are_copied_where_that_pays(M, copies):
    problem = GemmProblem(1, M, 5333, 495, 2, False, True, True, aligned=False)
    assert heuristic_config(problem, H200).realign is copies


@pytest.mark.parametrize("M", [1, 2])
def test_few_rows_of_a_weight_that_lies_along_n(M):
    """They stream through the copy engine; where K is contiguous, or without wgmma, by `gemv`."""
    for N, K in ((10240, 8192), (4096, 4096), (1024, 1024)):
        problem = GemmProblem(1, M, N, K, 2, False, True, False)
        for seen in (problem, problem.transposed):
            assert general_config(seen, H200).kernel in {"gemm_tma", "gemm"}
            assert general_config(seen, A100).kernel == "gemv"
        assert general_config(replace(problem, b_k_contiguous=True), H200).kernel == "gemv"


def test_what_the_epilogue_leaves():
    large = config_of(256, 128)
    assert with_registers(large, EpilogueTraits(2, activated=True)) == large
    with_residual = with_registers(large, EpilogueTraits(2, 2))
    assert with_residual == replace(large, block_m=128, block_n=256)
    wide = config_of(128, 224)
    assert with_registers(wide, EpilogueTraits(2, 2)) == wide
    activated = with_registers(wide, EpilogueTraits(2, 2, activated=True))
    assert activated == config_of(128, 256)
    for traits in (
        EpilogueTraits(4),
        EpilogueTraits(2, out_aligned=False),
        EpilogueTraits(2, 4),
        EpilogueTraits(2, 2, operands_aligned=False),
    ):
        assert with_registers(large, traits) is None


def test_batches_take_it():
    """Attention written out and experts; few rows and other architectures do not."""
    scores = GemmProblem(8, 2048, 2048, 128, 2, False, True, True)
    config = heuristic_config(scores, H200)
    assert (config.kernel, config.alternate, config.stream_k) == ("gemm_hopper", True, False)
    values = heuristic_config(GemmProblem(8, 2048, 128, 2048, 2, False, True, False), H200)
    assert (values.kernel, values.block_m, values.block_n) == ("gemm_hopper", 128, 128)
    experts = replace(scores, M=512, N=4096, K=14336)
    assert heuristic_config(experts, H200).kernel == "gemm_hopper"
    once = heuristic_config(GemmProblem(64, 128, 2048, 1408, 2, False, True, True), H200)
    assert (once.kernel, once.block_m, once.block_n) == ("gemm_hopper", 128, 128)
    for problem, device in (
        (replace(scores, M=16), H200),
        (replace(experts, M=64), H200),
        (replace(scores, element_size=4), H200),
        (scores, replace(H200, arch="sm100")),
    ):
        assert heuristic_config(problem, device).kernel == "gemm"
    for problem in (scores, experts, replace(scores, M=16)):
        assert supports(problem, heuristic_config(problem, H200), H200)


def test_a_row_whose_k_ends_within_a_step_has_no_pipeline():
    config = heuristic_config(GemmProblem(64, 1, 2048, 128, 2, False, True, True), H200)
    assert config == GemmConfig("gemv", 1, 32, 128, 1, 1, 4, 1)
    longer = heuristic_config(GemmProblem(64, 1, 128, 2048, 2, False, True, True), H200)
    assert (longer.kernel, longer.num_stages) == ("gemv", 4)


@pytest.mark.parametrize("tile", HOPPER_TILES, ids=str)
def test_ring_and_staging_fit(tile):
    from triton_only_backend.kernels.gemm_hopper import ring_and_staging
    from triton_only_backend.kernels.hopper_gemm_pipeline import piece_of

    rows, columns = tile
    for wanted in range(2, HOPPER_TILES[tile] + 1):
        config = replace(config_of(*tile), num_stages=wanted)
        stages, buffers = ring_and_staging(config, H200.shared_memory)
        pieces = columns // piece_of(columns)
        assert stages == wanted
        assert 1 <= buffers <= pieces
        used = stages * (rows + columns) * 128 + buffers * rows * piece_of(columns) * 2
        assert used <= H200.shared_memory - 1024


@pytest.mark.parametrize("pieces", range(1, 9))
def test_no_piece_is_staged_where_the_one_before_may_be_read(pieces):
    """Of all stores of some tiles, those that are waited for are the buffer's last and before."""
    from triton_only_backend.kernels.hopper_gemm_pipeline import behind_last_use

    for buffers in range(1, pieces + 1):
        last: dict[int, int] = {}
        for store in range(4 * pieces):
            i = store % pieces
            if i % buffers in last:
                behind = store - 1 - last[i % buffers]
                assert behind_last_use(i, pieces, buffers) <= behind
            last[i % buffers] = store


# What it computes


SCRIPT = """
import json, re, sys
from cross_compile import assembler_warnings, compile_for
compiled = compile_for("sm90")
import torch
from triton_only_backend.kernels import hardware, tuned
from triton_only_backend.kernels.epilogue import Epilogue
from triton_only_backend.kernels.gemm_configs import GemmConfig
from triton_only_backend.kernels.matmul import matmul

def slots_read(ptx):
    "Of the slots that threads read themselves: whether each is handed back behind a fence."
    parts = [re.split(r"ld.shared.v4[^\\n]*\\[%r", part) for part in ptx.split("mbarrier.arrive")]
    return ["fence.proxy.async" in read[-1] for read in parts[:-1] if len(read) > 1]

for fields in json.loads(sys.argv[1]):
    config = GemmConfig(**fields)
    M, N, K = 4096, 8192, 4096
    for k_major, with_operands in ((True, False), (False, False), (True, True)):
        like = dict(dtype=torch.bfloat16)
        a, out = torch.empty(1, M, K, **like), torch.empty(1, M, N, **like)
        b = torch.empty(1, N, K, **like).mT if k_major else torch.empty(1, K, N, **like)
        bias = torch.empty(N, **like) if with_operands else None
        epilogue = Epilogue("silu", None, 1.0, torch.empty(M, N, **like) if with_operands else None)
        with tuned.forcing("gemm", config):
            if config.alternate:
                a, b = a[:, :, :128], b[:, :128]
            matmul(a, b, bias, out, epilogue=epilogue)
        (kernel,) = compiled
        ptx = kernel.asm["ptx"]
        print(json.dumps(dict(
            name=kernel.name, spilled=kernel.spilled, shared=kernel.shared_memory,
            wgmma="wgmma.mma" in ptx, warnings=assembler_warnings(ptx),
            instructions=sorted({int(n) for n in re.findall(r"wgmma.mma_async.*?m64n(\\d+)k16", ptx)}),
            specialised="setmaxnreg" in ptx, stores="bulk.tensor.3d.global" in ptx,
            divides=config.stream_k, tile=(config.block_m, config.block_n), slots_read=slots_read(ptx),
        )))
        compiled.clear()
"""


def compile_all(configs: list[GemmConfig]) -> list[dict]:
    return rows_of(SCRIPT, json.dumps([vars(config) for config in configs]))


def check_compiled(rows: list[dict]) -> None:
    for row in rows:
        assert row["name"] == "gemm_hopper_kernel"
        assert row["shared"] <= H200.shared_memory
        assert row["spilled"] <= 16, row
        assert row["wgmma"] and row["specialised"] and row["stores"], row
        # One instruction for all columns; with an operand 256 × 128 and 128 × 224 become 128 × 256.
        rows, columns = row["tile"]
        assert row["instructions"] in ([columns], [rows], [256]), row
        assert not row["warnings"], row
        # What the copy engine may overwrite is ordered behind the reads; nothing else finds that.
        assert bool(row["slots_read"]) is row["divides"], row
        assert all(row["slots_read"]), row


def test_compiles_without_spills():
    alternate = replace(config_of(256, 128), num_stages=3, alternate=True)
    tiles = [
        config_of(128, 256, stream_k=True), config_of(128, 224), config_of(128, 160, split_k=2),
        config_of(128, 96, stream_k=True), alternate,
    ]  # fmt: skip
    rows = compile_all(tiles)
    assert len(rows) == 3 * len(tiles)
    check_compiled(rows)


@pytest.mark.exhaustive
def test_every_configuration_compiles_without_spills():
    check_compiled(compile_all(CONFIGS))
    whole = [config for config in CONFIGS if config.split_k == 1]
    check_compiled(compile_all([replace(config, alternate=True) for config in whole]))


@pytest.fixture
def hopper(device):
    from triton_only_backend.kernels import hardware

    found = hardware.of(torch.device(device))
    if not found.has_gluon:
        pytest.skip("no Hopper")
    return found


def product(a, b, out, config, hardware, bias=None, epilogue=None, early=False):
    from triton_only_backend.kernels.epilogue import NO_EPILOGUE
    from triton_only_backend.kernels.gemm_hopper import gemm_hopper

    whole = [x if x is None or x.dim() == 3 else x[None] for x in (a, b, bias, out)]
    gemm_hopper(
        *whole, alpha=0.5, beta=2.0, config=config, device=hardware,
        epilogue=epilogue or NO_EPILOGUE, early=early,
    )  # fmt: skip
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["k-major", "other"])
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_as_accurate_as_the_vendors(config, layout, hopper, device):
    dtype = torch.bfloat16 if layout == "k-major" else torch.float16
    for M, N, K in ((256, 6144, 4096), (333, 1000, 520), (2000, 6152, 1032)):
        rows = M if layout == "k-major" else M // 8 * 8
        a = torch.randn(rows, K, device=device).to(dtype)
        b = torch.randn(N, K, device=device).to(dtype).T
        if layout == "other":
            a, b = a.T.contiguous().T, b.contiguous()
        out = torch.full((rows, N), float("nan"), device=device, dtype=dtype)
        product(a, b, out, config, hopper)
        assert_as_accurate(out, 0.5 * (a @ b), 0.5 * (a.double() @ b.double()))
        for early in (False, True):
            again = torch.full_like(out, float("nan"))
            assert torch.equal(product(a, b, again, config, hopper, early=early), out)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [config_of(128, 224), *DIVIDED], ids=name_of)
def test_read_early_behind_what_makes_the_rows(config, hopper, device):
    """In a chain of which each takes the result of the one before, as in a graph."""
    like = {"device": device, "dtype": torch.bfloat16}
    weights = [torch.randn(1024, 1024, **like) / 32 for _ in range(8)]
    start = torch.randn(256, 1024, **like)

    def chain(early):
        x = start
        for weight in weights:
            x = product(x, weight.T, torch.empty_like(x), config, hopper, early=early)
        return x

    check_replays(chain, chain(False))


@pytest.mark.gpu
@pytest.mark.parametrize("k_major", [True, False], ids=["k-major", "other"])
@pytest.mark.parametrize("config", DIVIDED, ids=name_of)
def test_sums_that_are_handed_over_arrive_whole(config, k_major, hopper, device):
    """By a ring of which each slot is filled often while the sums of three programs are added."""
    M, N, K = 304, 1352, 712
    a = torch.randn(M, K, device=device).bfloat16()
    b = torch.randn(N, K, device=device).bfloat16().T
    if not k_major:
        b = b.contiguous()
    exact = 0.5 * (a.double() @ b.double())
    first = product(a, b, a.new_empty(M, N), config, hopper)
    assert_as_accurate(first, 0.5 * (a @ b), exact)
    for _ in range(100):
        assert torch.equal(product(a, b, torch.full_like(first, torch.nan), config, hopper), first)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["k-major", "other", "heads"])
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_batches(config, layout, hopper, device):
    """Whose matrices end within tiles; with `alternate` where the ring holds a tile's operands."""
    dtype = torch.bfloat16 if layout == "k-major" else torch.float16
    for M, N, K in ((200, 328, 128), (128, 128, 72), (513, 136, 520)):
        config = replace(config, alternate=K <= 128)
        rows = M // 8 * 8 if layout == "other" else M
        a = torch.randn(5, rows, K, device=device).to(dtype)
        b = torch.randn(5, N, K, device=device).to(dtype).mT
        if layout == "other":
            a, b = a.mT.contiguous().mT, b.contiguous()
        elif layout == "heads":
            a = torch.randn(rows, 5, K, device=device).to(dtype).transpose(0, 1)
        bias = torch.randn(5, rows, 1, device=device).to(dtype).expand(5, rows, N)
        for added in (None, bias, torch.randn(5, rows, N, device=device).to(dtype)):
            out = torch.full((5, rows, N), float("nan"), device=device, dtype=dtype)
            product(a, b, out, config, hopper, added)
            exact, vendor = 0.5 * (a.double() @ b.double()), 0.5 * (a @ b)
            if added is not None:
                vendor = torch.baddbmm(added, a, b, beta=2.0, alpha=0.5)
                exact += 2 * added.double()
            assert_as_accurate(out, vendor, exact)
            again = torch.full_like(out, float("nan"))
            assert torch.equal(product(a, b, again, config, hopper, added), out)


@pytest.mark.gpu
def test_batches_that_no_descriptor_takes(hopper, device):
    """An operand of one matrix for all, an output in fp32, one whose rows are not aligned."""
    like = {"device": device, "dtype": torch.bfloat16}
    ours = torch.ops.triton_only
    a, b = torch.randn(3, 200, 128, **like), torch.randn(3, 128, 328, **like)
    one = torch.randn(1, 128, 328, **like).expand(3, 128, 328)
    assert_as_accurate(ours.bmm(a, one), a @ one, a.double() @ one.double())
    wide = ours.bmm(a, b, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert_as_accurate(wide, a.float() @ b.float(), a.double() @ b.double())
    odd = torch.randn(3, 331, 128, **like).mT
    assert_as_accurate(ours.bmm(a, odd), a @ odd, a.double() @ odd.double())


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_with_epilogue(config, hopper, device):
    from triton_only_backend.kernels.epilogue import Epilogue

    M, N, K = 333, 1000, 520
    like = {"device": device, "dtype": torch.bfloat16}
    a, b = torch.randn(M, K, **like), torch.randn(N, K, **like).T
    bias, residual = torch.randn(N, **like), torch.randn(M, N, **like)
    out = torch.full((M, N), float("nan"), **like)
    product(a, b, out, config, hopper, bias.expand(M, N), Epilogue("silu", None, 1.0, residual))

    def reference(a, b, bias, residual):
        return torch.nn.functional.silu(0.5 * (a @ b) + 2 * bias) + residual

    operands = (a, b, bias, residual)
    assert_as_accurate(out, reference(*operands), reference(*(x.double() for x in operands)))


@pytest.mark.gpu
@pytest.mark.parametrize("config", DIVIDED, ids=name_of)
def test_replays_leave_no_flag_behind(config, hopper, device):
    """In a graph with two launches, replayed beside eager launches on another stream."""
    like = {"device": device, "dtype": torch.bfloat16}
    a, b = torch.randn(256, 4096, **like), torch.randn(6144, 4096, **like).T
    first = product(a, b, torch.empty(256, 6144, **like), config, hopper)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    outs = [torch.empty_like(first) for _ in range(3)]
    with torch.cuda.graph(graph):
        for out in outs[:2]:
            product(a, b, out, config, hopper)
    beside = torch.cuda.Stream()
    for _ in range(20):
        for out in outs:
            out.fill_(float("nan"))
        beside.wait_stream(torch.cuda.current_stream())
        graph.replay()
        with torch.cuda.stream(beside):
            product(a, b, outs[2], config, hopper)
        torch.cuda.current_stream().wait_stream(beside)
        assert all(torch.equal(out, first) for out in outs)
