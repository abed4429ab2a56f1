"""The two sides of `flash_attention_hopper`: the warp that loads, the groups of warps that compute.

They meet in shared memory: a place for each group's queries, and a ring for tiles of keys and
values, which all groups read. The loading warp puts them in in the order in which groups read them:

    K(n-1)  K(n-2) V(n-1)  K(n-3) V(n-2)  …  K(0) V(1)  V(0)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_only_backend.kernels import hopper_attention_configs as configs
from triton_only_backend.kernels.hopper_attention_tiles import (
    hide,
    hide_by_mask,
    load_mask,
    opaque,
    pack,
    pass_turn,
    rounds_of_section,
    take_turn,
    tiles_of_keys,
    work_item,
)
from triton_only_backend.kernels.tma_ring import advance, load_tile, store_tile

GROUP_ROWS = gl.constexpr(configs.GROUP_ROWS)
BLOCK_N = gl.constexpr(configs.BLOCK_N)
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def load_one(desc, b, h, row, ring, full, empty, stage, phase, STAGES: gl.constexpr):
    """Asks for a tile once its stage is free; returns the ring's next stage."""
    mbarrier.wait(empty.index(stage), phase)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    load_tile(desc, [b, h, row, 0], full.index(stage), ring.index(stage))
    return advance(stage, phase, STAGES)


@gluon.jit
def load_tiles(arguments, CONFIG: gl.constexpr, FORM: gl.constexpr):
    """The loading warp: queries, then keys and values in the order in which groups read them."""
    (
        q_desc, k_desc, v_desc, mask, q_smem, kv_smem, q_full, q_empty, full, empty, num_tiles,
        heads, num_heads, group_size, section_heads, len_q, len_kv,
    ) = arguments  # fmt: skip
    GROUPS: gl.constexpr = CONFIG.groups
    STAGES: gl.constexpr = CONFIG.stages
    BLOCK_M: gl.constexpr = GROUPS * GROUP_ROWS
    q_phase = gl.to_tensor(1)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    for section in range(gl.cdiv(heads, section_heads)):
        turns, before = rounds_of_section(section, num_tiles, heads, section_heads)
        for turn in range(turns):
            start_m, head = work_item(
                section, turn, before, num_tiles, heads, section_heads, BLOCK_M
            )
            b = head // num_heads
            h = head % num_heads
            kv_head = h // group_size
            for group in gl.static_range(GROUPS):
                row = start_m + group * GROUP_ROWS
                mbarrier.wait(q_empty.index(group), q_phase)
                mbarrier.expect(q_full.index(group), q_desc.block_type.nbytes)
                load_tile(q_desc, [b, h, row, 0], q_full.index(group), q_smem.index(group))
            q_phase ^= 1
            tiles, _ = tiles_of_keys(mask, b, h, start_m, len_q, len_kv, BLOCK_M, 1, FORM.is_causal)
            for left in range(tiles, -1, -1):
                if left > 0:
                    stage, phase = load_one(
                        k_desc, b, kv_head, (left - 1) * BLOCK_N, kv_smem, full, empty, stage,
                        phase, STAGES,
                    )  # fmt: skip
                if left < tiles:
                    stage, phase = load_one(
                        v_desc, b, kv_head, left * BLOCK_N, kv_smem, full, empty, stage, phase,
                        STAGES,
                    )  # fmt: skip


@gluon.jit
def skip_tile(full, empty, stage, phase, STAGES: gl.constexpr):
    """Passes over a tile that this group does not need; returns the ring's next stage."""
    mbarrier.wait(full.index(stage), phase)
    mbarrier.arrive(empty.index(stage))
    return advance(stage, phase, STAGES)


@gluon.jit
def attend_tile(
    q, kv_smem, full, empty, stage, phase, more, p_operand, acc, alpha, row_max, row_sum, qk_scale,
    words, GROUP: gl.constexpr, CONFIG: gl.constexpr,
):  # fmt: skip
    """The scores of the next tile of keys beside the product of the last one's probabilities.

    The caller has waited for the keys; it waits for the next ones here, if there are `more`.
    """
    BLOCK_D: gl.constexpr = kv_smem.shape[4]
    S_LAYOUT: gl.constexpr = row_max.type.layout.parent
    P_LAYOUT: gl.constexpr = p_operand.type.layout
    O_ROWS: gl.constexpr = alpha.type.layout
    no_scores = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    if CONFIG.ordered:
        take_turn(GROUP)
    k = kv_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    token = warpgroup_mma(q, k, no_scores, use_acc=False, is_async=True)
    v_stage, v_phase = advance(stage, phase, CONFIG.stages)
    mbarrier.wait(full.index(v_stage), v_phase)
    acc = acc * opaque(alpha)[:, None]
    v = kv_smem.index(v_stage).reshape([BLOCK_N, BLOCK_D])
    acc_token = warpgroup_mma(p_operand, v, acc, is_async=True)
    if CONFIG.ordered:
        pass_turn(GROUP)
    scores = warpgroup_mma_wait(1, deps=[token])
    mbarrier.arrive(empty.index(stage))
    if words is not None:
        scores = hide_by_mask(scores, words)
    new_max = gl.maximum(row_max, gl.max(scores, 1) * qk_scale)
    shift = new_max
    if words is not None:
        shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(gl.fma(scores, qk_scale, -shift[:, None]))
    shrink = gl.exp2(row_max - shift)
    row_sum = row_sum * shrink + gl.sum(p, 1)
    alpha = gl.convert_layout(shrink, O_ROWS)
    # The next keys are waited for here because ptxas moves the exponentials to behind the wait for
    # the second product unless the end of a basic block lies between them.
    stage, phase = advance(v_stage, v_phase, CONFIG.stages)
    mbarrier.wait(full.index(stage), phase, pred=more)
    acc, p = warpgroup_mma_wait(0, deps=[acc_token, p])
    mbarrier.arrive(empty.index(v_stage))
    p_operand = gl.convert_layout(p.to(kv_smem.dtype), P_LAYOUT)
    return stage, phase, p_operand, acc, alpha, new_max, row_sum


@gluon.jit
def store(output, out, lse, b, h, row, len_q, GROUP: gl.constexpr, FORM: gl.constexpr):
    """A group's 64 rows of the result, and their log-sum-exp."""
    out_desc, out_smem, out_ptr, out_strides, lse_ptr, lse_strides = output
    if FORM.store_tma:
        tma.store_wait(0)
        out_smem.index(GROUP).reshape(out.shape).store(out)
        fence_async_shared()
        store_tile(out_desc, [b, h, row, 0], out_smem.index(GROUP))
    else:
        rows = row + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, out.type.layout))
        columns = gl.arange(0, out.shape[1], gl.SliceLayout(0, out.type.layout))
        out_ptrs = out_ptr + b.to(gl.int64) * out_strides[0] + h.to(gl.int64) * out_strides[1]
        out_ptrs += rows.to(gl.int64)[:, None] * out_strides[2]
        out_ptrs += columns.to(gl.int64)[None, :] * out_strides[3]
        gl.store(out_ptrs, out, mask=(rows < len_q)[:, None])
    if FORM.has_lse:
        rows = row + gl.arange(0, GROUP_ROWS, lse.type.layout)
        lse_ptrs = lse_ptr + b.to(gl.int64) * lse_strides[0] + h.to(gl.int64) * lse_strides[1]
        gl.store(lse_ptrs + rows.to(gl.int64) * lse_strides[2], lse, mask=rows < len_q)


@gluon.jit
def attend(arguments, GROUP: gl.constexpr, CONFIG: gl.constexpr, FORM: gl.constexpr):
    """One group of four warps: 64 queries of every work item."""
    (
        output, mask, q_smem, kv_smem, q_full, q_empty, full, empty, scale, num_tiles, heads,
        num_heads, section_heads, len_q, len_kv,
    ) = arguments  # fmt: skip
    STAGES: gl.constexpr = CONFIG.stages
    BLOCK_M: gl.constexpr = CONFIG.groups * GROUP_ROWS
    BLOCK_D: gl.constexpr = kv_smem.shape[4]
    ORDERED: gl.constexpr = CONFIG.ordered
    IS_CAUSAL: gl.constexpr = FORM.is_causal
    EVEN_N: gl.constexpr = FORM.even_n
    MASK_ALIGNED: gl.constexpr = FORM.mask_aligned
    dtype: gl.constexpr = kv_smem.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    CAN_SKIP: gl.constexpr = IS_CAUSAL and BLOCK_M > BLOCK_N

    qk_scale = gl.cast(scale, gl.float32) * LOG2E
    q = q_smem.index(GROUP).reshape([GROUP_ROWS, BLOCK_D])
    no_scores = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    q_phase = gl.to_tensor(0)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    if ORDERED and GROUP == 1:
        pass_turn(GROUP)
    for section in range(gl.cdiv(heads, section_heads)):
        turns, before = rounds_of_section(section, num_tiles, heads, section_heads)
        for turn in range(turns):
            start_m, head = work_item(
                section, turn, before, num_tiles, heads, section_heads, BLOCK_M
            )
            b = head // num_heads
            h = head % num_heads
            row = start_m + GROUP * GROUP_ROWS
            tiles, masked = tiles_of_keys(mask, b, h, start_m, len_q, len_kv, BLOCK_M, 4, IS_CAUSAL)
            # Tiles that are hidden from all of this group's queries: K, then K and V by turns.
            hidden = 0
            if CAN_SKIP:
                hidden = tiles - gl.cdiv(gl.minimum(row + GROUP_ROWS, len_kv), BLOCK_N)
                for i in range(hidden):
                    stage, phase = skip_tile(full, empty, stage, phase, STAGES)
                    if i > 0:
                        stage, phase = skip_tile(full, empty, stage, phase, STAGES)
            last = tiles - 1 - hidden
            mask_tile = None
            if mask[0] is not None:
                mask_tile = load_mask(
                    mask, b, h, row, last * BLOCK_N, len_q, len_kv, EVEN_N, MASK_ALIGNED
                )

            mbarrier.wait(q_full.index(GROUP), q_phase)
            mbarrier.wait(full.index(stage), phase)
            if ORDERED:
                take_turn(GROUP)
            k = kv_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
            token = warpgroup_mma(q, k, no_scores, use_acc=False, is_async=True)
            if ORDERED:
                pass_turn(GROUP)
            if mask[0] is not None:
                words = pack(mask_tile)
            scores = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(empty.index(stage))
            stage, phase = advance(stage, phase, STAGES)
            if CAN_SKIP and hidden > 0:
                stage, phase = skip_tile(full, empty, stage, phase, STAGES)
            if mask[0] is not None:
                scores = hide_by_mask(scores, words)
            elif IS_CAUSAL or not EVEN_N:
                scores = hide(scores, row, last * BLOCK_N, len_kv, IS_CAUSAL, EVEN_N)
            row_max = gl.max(scores, 1) * qk_scale
            shift = row_max
            if mask[0] is not None:
                shift = gl.where(row_max == float("-inf"), 0.0, row_max)
            p = gl.exp2(gl.fma(scores, qk_scale, -shift[:, None]))
            row_sum = gl.sum(p, 1)
            p_operand = gl.convert_layout(p.to(dtype), P_LAYOUT)
            acc = gl.zeros([GROUP_ROWS, BLOCK_D], gl.float32, O_LAYOUT)
            alpha = gl.full([GROUP_ROWS], 1.0, gl.float32, O_ROWS)

            mbarrier.wait(full.index(stage), phase, pred=last > 0)
            if mask[0] is not None:
                masked = gl.minimum(masked, last)
                for left in range(last, masked, -1):
                    mask_tile = load_mask(
                        mask, b, h, row, (left - 1) * BLOCK_N, len_q, len_kv, True, MASK_ALIGNED
                    )
                    stage, phase, p_operand, acc, alpha, row_max, row_sum = attend_tile(
                        q, kv_smem, full, empty, stage, phase, left > 1, p_operand, acc, alpha,
                        row_max, row_sum, qk_scale, pack(mask_tile), GROUP, CONFIG,
                    )  # fmt: skip
                last = masked
            for left in range(last, 0, -1):
                stage, phase, p_operand, acc, alpha, row_max, row_sum = attend_tile(
                    q, kv_smem, full, empty, stage, phase, left > 1, p_operand, acc, alpha, row_max,
                    row_sum, qk_scale, None, GROUP, CONFIG,
                )  # fmt: skip

            mbarrier.arrive(q_empty.index(GROUP))
            q_phase ^= 1
            acc = acc * alpha[:, None]
            mbarrier.wait(full.index(stage), phase)
            v = kv_smem.index(stage).reshape([BLOCK_N, BLOCK_D])
            acc_token = warpgroup_mma(p_operand, v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc_token])
            mbarrier.arrive(empty.index(stage))
            stage, phase = advance(stage, phase, STAGES)

            if mask[0] is not None:
                row_sum = gl.where(row_sum == 0, 1.0, row_sum)
            out = (acc * gl.convert_layout(1.0 / row_sum, O_ROWS)[:, None]).to(dtype)
            store(output, out, (row_max + gl.log2(row_sum)) * LN2, b, h, row, len_q, GROUP, FORM)
    if FORM.store_tma:
        tma.store_wait(0)
