"""Attention configurations: pure choices, and what they compile to for GPUs that are not here.

The compile tests run this file as a script in a process of its own, where Triton compiles rather
than interprets. By hand, `python tests/test_attention_configs.py all` prints the table.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import cross_compile
import pytest
import triton
from torch.torch_version import TorchVersion

from triton_only_backend.kernels import attention_backward_configs as backward_configs
from triton_only_backend.kernels import attention_configs as configs
from triton_only_backend.kernels import decode_configs
from triton_only_backend.kernels.attention_configs import AttentionProblem
from triton_only_backend.kernels.hardware import INTERPRETER
from triton_only_backend.kernels.sizes import next_power_of_2

GPUS = {name: gpu for name, (_, _, gpu) in cross_compile.TARGETS.items()}
H200 = GPUS["sm90"]
PREFILL = AttentionProblem(2, 32, 8, 4096, 4096, 128, 128, 2, True, False)
DECODE = replace(PREFILL, len_q=1, is_causal=False)


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("has_mask", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("element_size", [2, 4], ids=["bf16", "fp32"])
@pytest.mark.parametrize("head_dim", [1, 64, 80, 128, 256])
def test_configurations_fit_shared_memory(head_dim, element_size, has_mask, arch):
    gpu = GPUS[arch]
    problem = replace(
        PREFILL,
        head_dim=head_dim,
        head_dim_v=head_dim,
        element_size=element_size,
        has_mask=has_mask,
    )
    flash = configs.select_flash_config(problem, gpu)
    assert configs.flash_shared_memory(problem, flash, gpu) <= gpu.shared_memory
    assert not flash.tma or gpu.has_wgmma
    problem = replace(problem, len_q=1)
    decode = decode_configs.select_decode_config(problem, gpu)
    assert decode_configs.decode_shared_memory(problem, decode, gpu) <= gpu.shared_memory


def test_hopper_prefill():
    assert configs.select_flash_config(PREFILL, H200) == configs.FlashConfig(64, 64, 4, 3, tma=True)
    masked = replace(PREFILL, has_mask=True)
    assert configs.select_flash_config(masked, H200) == configs.FlashConfig(64, 64, 4, 2, tma=True)


def test_few_tiles_take_half_the_rows():
    wide = replace(PREFILL, head_dim=256, head_dim_v=256)
    assert configs.select_flash_config(wide, H200).block_m == 128
    small = replace(wide, batch=1, len_q=256, len_kv=256)
    assert configs.select_flash_config(small, H200).block_m == 64


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"len_kv": 1}, True),
        ({"len_q": 16}, True),
        ({"len_q": 17}, False),
        ({"len_q": 16, "len_kv": 32}, False),
        ({"num_kv_heads": 32, "len_q": 64}, True),
        ({"num_kv_heads": 32, "len_q": 64, "len_kv": 64}, False),
        ({"len_q": 4096}, False),
    ],
    ids=str,
)
def test_which_kernel(changes, expected):
    assert configs.uses_decode_kernel(replace(DECODE, **changes)) is expected


@pytest.mark.parametrize(
    ("batch", "len_kv", "splits"),
    [
        (1, 0, 1),
        (1, 63, 1),
        (1, 512, 8),
        (2, 768, 8),
        (1, 2048, 32),
        (1, 4095, 32),
        (1, 4096, 16),
        (1, 32768, 16),
        (16, 2048, 1),
        (64, 4096, 1),
    ],
)
def test_splits_fill_the_multiprocessors_once_or_twice(batch, len_kv, splits):
    config = decode_configs.select_decode_config(replace(DECODE, batch=batch, len_kv=len_kv), H200)
    assert config.num_splits == splits


def test_short_splits_take_fine_tiles():
    def tile(len_kv, batch=1, select=decode_configs.select_decode_config):
        return select(replace(DECODE, batch=batch, len_kv=len_kv), H200).block_n

    assert [tile(n) for n in (768, 2048, 4096, 131072)] == [64, 64, 128, 128]
    assert [tile(n, batch=64) for n in (1024, 4096)] == [32, 128]
    between = decode_configs.select_rope_cache_config
    assert [tile(n, select=between) for n in (768, 4096)] == [32, 128]


def test_interpreter_takes_large_blocks():
    assert configs.select_flash_config(PREFILL, INTERPRETER).block_n == 256
    assert decode_configs.select_decode_config(DECODE, INTERPRETER).num_splits == 1
    assert backward_configs.select_backward_config(PREFILL, INTERPRETER).block_m1 == 128
    tiny = replace(PREFILL, len_q=5, len_kv=5)
    assert configs.select_flash_config(tiny, INTERPRETER).block_m == 16


@pytest.mark.parametrize("number", [0, 1, 2, 3, 17, 64, 65])
def test_next_power_of_2(number):
    power = next_power_of_2(number)
    assert power >= number
    assert power == 1 or power // 2 < number


# --- compiling for GPUs that are not here ---------------------------------------------------------

# (architecture, dtype, head dimension, causal, mask dtype)
QUICK = [
    ("sm90", "bfloat16", 64, True, None),
    ("sm90", "bfloat16", 128, True, None),
    ("sm90", "bfloat16", 128, False, "bool"),
    ("sm80", "bfloat16", 128, True, None),
    ("gfx942", "float32", 64, True, "float32"),
]
ALL = [
    (arch, dtype, head_dim, causal, mask)
    for arch in GPUS
    for dtype in ("bfloat16", "float32")
    for head_dim in (64, 128, 256)
    for causal, mask in ((True, None), (False, "bool"), (True, "float32"))
]
# What may stand in the mask's place.
MODIFIED = ("dropout", "softcap", "window", "varlen")
COLUMNS = ("arch", "dtype", "head_dim", "causal", "mask")
DECODE_KERNEL = "decode_attention_kernel"
KERNELS = {
    "flash_attention_kernel", "row_statistics_kernel", "key_value_gradient_kernel",
    "query_gradient_kernel",
}  # fmt: skip
QUICK_MODIFIED = [
    ("sm90", "bfloat16", 128, True, "dropout"),
    ("sm90", "bfloat16", 128, True, "softcap"),
    ("sm90", "bfloat16", 64, True, "window"),
    ("gfx942", "bfloat16", 64, True, "varlen"),
]
ALL_MODIFIED = [
    (arch, "bfloat16", head_dim, True, modifier)
    for arch in GPUS
    for head_dim in (64, 128, 256)
    for modifier in MODIFIED
]


def compile_in_a_process(cases, without_tma=False):
    """One row a kernel: what it is, registers, spills, shared memory, instructions."""
    rows = []
    for arch in dict.fromkeys(case[0] for case in cases):
        chosen = json.dumps([case for case in cases if case[0] == arch])
        rows += cross_compile.rows_of(__file__, chosen, *(["pointers"] if without_tma else []))
    return rows


def check_rows(rows, cases):
    for case in cases:
        mine = [row for row in rows if tuple(row[key] for key in COLUMNS) == tuple(case)]
        decodes = case[-1] not in ("dropout", "varlen")
        assert {row["kernel"] for row in mine} >= KERNELS | ({DECODE_KERNEL} if decodes else set())
    for row in rows:
        print(row)
        assert row["shared"] <= GPUS[row["arch"]].shared_memory, row
        if row["arch"] == "sm90" and row["dtype"] == "bfloat16" and row["head_dim"] <= 128:
            packed = row["kernel"] == "flash_attention_kernel" and row["mask"] == "varlen"
            # Triton 3.9 keeps eight registers of the packed forward on the stack.
            newer = TorchVersion(triton.__version__) >= "3.9"
            assert row["spilled"] <= (32 if packed and newer else 0), row
            if row["kernel"] in ("flash_attention_kernel", "query_gradient_kernel"):
                assert row["wgmma"] > 0, row
            if row["kernel"] not in ("row_statistics_kernel", "mask_spans_kernel"):
                assert row["cp_async"] + row["tma"] > 0, row


@pytest.mark.parametrize("arch", dict.fromkeys(case[0] for case in QUICK))
def test_kernels_compile(arch):
    cases = [case for case in QUICK if case[0] == arch]
    check_rows(compile_in_a_process(cases), cases)


@pytest.mark.parametrize("arch", dict.fromkeys(case[0] for case in QUICK_MODIFIED))
def test_modified_kernels_compile(arch):
    cases = [case for case in QUICK_MODIFIED if case[0] == arch]
    check_rows(compile_in_a_process(cases), cases)


@pytest.mark.exhaustive
def test_all_configurations_compile():
    check_rows(compile_in_a_process(ALL), ALL)


@pytest.mark.exhaustive
def test_all_modified_configurations_compile():
    check_rows(compile_in_a_process(ALL_MODIFIED), ALL_MODIFIED)


@pytest.mark.exhaustive
def test_hopper_pointer_loads_compile():
    cases = [case for case in ALL if case[0] == "sm90" and case[1] == "bfloat16"]
    for row in compile_in_a_process(cases, without_tma=True):
        print(row)
        assert row["tma"] == 0, row
        assert row["shared"] <= H200.shared_memory, row


def make_modifiers(name):
    import torch

    from triton_only_backend.kernels.attention_modifiers import Modifiers

    seed = torch.empty(1, dtype=torch.int64, device="meta")
    starts = torch.empty(5, dtype=torch.int32, device="meta")
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_q": 4096, "max_k": 4096}
    return {
        None: Modifiers(),
        "dropout": Modifiers(dropout_p=0.1, seed=seed),
        "softcap": Modifiers(softcap=30.0),
        "window": Modifiers(window=(1024, 0)),
        "varlen": Modifiers(**packed),
    }[name]


def launch_all(arch, dtype, head_dim, causal, mask, without_tma):
    """Forward, backward and decoding with the selected configurations."""
    import torch

    from triton_only_backend.kernels import (
        decode_attention,
        flash_attention,
        flash_attention_backward,
    )

    gpu, dtype, len_kv = GPUS[arch], getattr(torch, dtype), 4096
    batch = 2 if without_tma else 1

    def empty(*shape, dtype=dtype):
        tensor = torch.empty(1, *shape, dtype=dtype, device="meta")
        return tensor.expand(batch, *shape)

    key = empty(8, len_kv, head_dim)
    options = {"is_causal": causal, "scale": 0.1, "precision": "ieee"}
    modified, mask = (mask, None) if mask in MODIFIED else (None, mask)
    modifiers = make_modifiers(modified)
    for len_q in (4096, 1):
        problem = AttentionProblem(
            1, 32, 8, len_q, len_kv, head_dim, head_dim, dtype.itemsize, causal, mask is not None,
            has_dropout=modified == "dropout", has_softcap=modified == "softcap",
            has_window=modified == "window",
        )  # fmt: skip
        query = empty(32, len_q, head_dim)
        lse = empty(32, len_q, dtype=torch.float32)
        bias = None
        if mask is not None:
            bias = empty(1, len_q, len_kv, dtype=getattr(torch, mask)).expand(-1, 32, -1, -1)
        if len_q == 1 and modified in ("dropout", "varlen"):
            continue
        options["modifiers"] = modifiers
        if len_q == 1:
            config = decode_configs.select_decode_config(problem, gpu)
            decode_attention.decode_attention(
                query, key, key, bias, query, lse, config=config, **options
            )
            continue
        config = configs.select_flash_config(problem, gpu)
        if modified == "varlen" and config.tma:
            config = configs.without_tma(config, problem.block_d)
        flash_attention.flash_attention(query, key, key, bias, query, lse, config=config, **options)
        config = backward_configs.select_backward_config(problem, gpu)
        flash_attention_backward.flash_attention_backward(
            query, query, key, key, bias, query, lse, query, key, key, config=config, **options
        )


def compile_cases(cases, without_tma):
    """Prints a row of JSON for each kernel of each case; the cases share an architecture."""
    compiled = cross_compile.compile_for(cases[0][0])
    for case in cases:
        compiled.clear()
        launch_all(*case, without_tma)
        for kernel in compiled:
            ptx = kernel.asm.get("ptx", "")
            row = dict(zip(COLUMNS, case, strict=True))
            row.update(
                kernel=kernel.name,
                registers=kernel.registers,
                spilled=kernel.spilled,
                shared=kernel.shared_memory,
                wgmma=ptx.count("wgmma.mma_async"),
                cp_async=len(re.findall(r"cp\.async\.c[ag]", ptx)),
                tma=ptx.count("cp.async.bulk.tensor"),
            )
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    # `all` prints what the exhaustive test checks; else the cases, as JSON, of one architecture.
    if sys.argv[1] == "all":
        print(*compile_in_a_process(ALL), sep="\n")
    else:
        compile_cases(json.loads(sys.argv[1]), "pointers" in sys.argv)
