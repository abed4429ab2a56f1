"""Rotary embedding, the write to the cache and attention become one op, or stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusing import (
    DEVICE,
    compile_step,
    fired_passes,
    fired_passes_of,
    random,
)

from triton_only_backend.bench.plain_llama import rotate as rotate_pairs


def rotate_half(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def halves_model(q, k, v, cos, sin, keys, values, position, mask):
    q, k = rotate_half(q, cos[:, None], sin[:, None]), rotate_half(k, cos[:, None], sin[:, None])
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def pairs_model(q, k, v, cos, sin, keys, values, position, mask):
    table = torch.stack([cos[0, :, :8], sin[0, :, :8]], -1)
    q = rotate_pairs(q.transpose(1, 2), table).transpose(1, 2)
    k = rotate_pairs(k.transpose(1, 2), table).transpose(1, 2)
    keys[:, :, position] = k
    values[:, :, position] = v
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def plain_model(q, k, v, cos, sin, keys, values, position, mask):
    keys.index_copy_(2, position, k.cos())
    values.index_copy_(2, position, v)
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def decode_arguments(length=1, dtype=torch.float32, slots=24, position=7):
    q, k, v = (random(2, n, length, 16, dtype=dtype) for n in (4, 2, 2))
    angles = random(1, length, 8)
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
    keys, values = (random(2, 2, slots, 16, dtype=dtype) for _ in range(2))
    positions = torch.arange(position, position + length, device=DEVICE)
    mask = torch.arange(slots, device=DEVICE)[None] <= positions[:, None]
    return [q, k, v, cos, sin, keys, values, positions, mask[None, None]]


def assert_one_op(model, args, reference):
    """Fused, a step gives what the model gives in fp32 (`reference`), and writes the same caches."""
    for mine, other in zip(args, reference, strict=True):
        other.copy_(mine)
    fired, result = fired_passes(model, args)
    assert fired["fuse_rope_cache"] == 1
    with torch.no_grad():
        expected = model(*reference)
    limit = 2e-2 if result.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result.float(), expected, rtol=limit, atol=limit)
    for mine, other in zip(args[5:7], reference[5:7], strict=True):
        torch.testing.assert_close(mine.float(), other, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", [halves_model, pairs_model, plain_model])
def test_decoding_writes_the_cache_and_attends_in_one_op(model, dtype):
    args, reference = decode_arguments(dtype=dtype), decode_arguments()
    assert_one_op(model, args, reference)
    for mine, other in zip(args[5:7], reference[5:7], strict=True):
        untouched = torch.arange(24, device=DEVICE) != 7
        assert torch.equal(mine[:, :, untouched].float(), other[:, :, untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["shared angles", "angles a sequence"])
@pytest.mark.parametrize("model", [halves_model, pairs_model])
def test_a_prefill_rotates_and_writes_the_cache_in_one_op(model, batched, dtype):
    args, reference = (decode_arguments(5, kind) for kind in (dtype, torch.float32))
    if batched and model is halves_model:
        args[3:5] = (torch.stack([t[0], t[0].flip(0)]) for t in args[3:5])
        reference[3:5] = (t.float() for t in args[3:5])
    assert_one_op(model, args, reference)


def test_a_negative_position_counts_from_the_end():
    def model(q, k, v, cos, sin, keys, values, position, mask):
        keys[:, :, position] = k
        values[:, :, position] = v
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    args, reference = decode_arguments(), decode_arguments()
    for mine, other in zip(args, reference, strict=True):
        other.copy_(mine)
    args[7].fill_(-3)
    reference[7].fill_(21)
    fired, result = fired_passes(model, args)
    assert fired["fuse_rope_cache"] == 1
    torch.testing.assert_close(result, model(*reference), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(args[5:7], reference[5:7])


def test_decoding_left_alone():
    def reads_the_cache(*args):
        return halves_model(*args), args[5].sum()

    def other_positions(q, k, v, cos, sin, keys, values, position, mask):
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position + 1, v)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    def returned_cache(q, k, v, cos, sin, keys, values, position, mask):
        keys = keys.index_copy(2, position, k)
        values = values.index_copy(2, position, v)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True), keys

    def capped(q, k, v, cos, sin, keys, values, position, mask):
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        op = torch.ops.triton_only.attention
        return op(q, keys, values, mask, enable_gqa=True, softcap=3.0)

    for model, args in (
        (plain_model, decode_arguments(length=3)),
        (capped, decode_arguments()),
        (reads_the_cache, decode_arguments()),
        (other_positions, decode_arguments()),
        (returned_cache, decode_arguments()),
    ):
        reference = [a.clone() for a in args]
        fired, result = fired_passes(model, args)
        assert "fuse_rope_cache" not in fired, model
        with torch.no_grad():
            torch.testing.assert_close(result, model(*reference), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(args, reference)


def write_and_attend(q, k, v, keys, values, position, mask):
    keys[:, :, position] = k
    values[:, :, position] = v
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def broadcast_writes():
    """Writes of one token to two positions, and of one head to all."""

    def two_positions(q, k, v, cos, sin, keys, values, position, mask):
        position = torch.cat([position, position + 1])
        return write_and_attend(q, k, v, keys, values, position, mask)

    def key_of_one_head(q, k, v, cos, sin, keys, values, position, mask):
        return write_and_attend(q, k[:, :1], v, keys, values, position, mask)

    def value_of_one_head(q, k, v, cos, sin, keys, values, position, mask):
        return write_and_attend(q, k, v[:, :1], keys, values, position, mask)

    def value_of_one_dim(q, k, v, cos, sin, keys, values, position, mask):
        return write_and_attend(q, k, v[..., :1], keys, values, position, mask)

    return two_positions, key_of_one_head, value_of_one_head, value_of_one_dim


@pytest.mark.parametrize("model", broadcast_writes(), ids=lambda model: model.__name__)
def test_writes_that_are_broadcast_are_left_alone(model):
    args = decode_arguments()
    reference = [a.clone() for a in args]
    fired, result = fired_passes(model, args)
    assert "fuse_rope_cache" not in fired
    torch.testing.assert_close(result, model(*reference), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(args, reference)


def other_rotations():
    """What looks like a rotary embedding that the kernel has, and is none."""

    def halves(q, k, cos, sin):
        return rotate_half(q, cos, sin), rotate_half(k, cos, sin)

    def table_of_each_head(q, k, cos, sin):
        tables = cos[:, None] * torch.arange(2, device=DEVICE)[:, None, None], sin[:, None]
        return halves(q[:, :2], k, *tables)

    def one_angle(q, k, cos, sin):
        return halves(q, k, cos[..., :1], sin[..., :1])

    def one_pair(q, k, cos, sin):
        table = torch.stack([cos[:, :, None, :1], sin[:, :, None, :1]], -1)
        pairs = [x.transpose(1, 2).unflatten(-1, (-1, 2)) for x in (q, k)]
        rotated = [
            torch.stack(
                [
                    p[..., 0] * table[..., 0] - p[..., 1] * table[..., 1],
                    p[..., 1] * table[..., 0] + p[..., 0] * table[..., 1],
                ],
                -1,
            )
            for p in pairs
        ]
        return tuple(r.flatten(3).transpose(1, 2) for r in rotated)

    def promoted(q, k, cos, sin):
        return halves(q.bfloat16(), k.bfloat16(), cos[:, None], sin[:, None])

    return table_of_each_head, one_angle, one_pair, promoted


def one_angle_for_all_tokens(q, k, cos, sin):
    return rotate_half(q, cos[:, None, :1], sin[:, None, :1]), rotate_half(
        k, cos[:, None, :1], sin[:, None, :1]
    )


@pytest.mark.parametrize(
    "rotation", [*other_rotations(), one_angle_for_all_tokens], ids=lambda f: f.__name__
)
def test_a_prefill_with_other_rotations_is_left_alone(rotation):
    def model(q, k, v, cos, sin, keys, values, position, mask):
        return write_and_attend(*rotation(q, k, cos, sin), v, keys, values, position, mask)

    args = decode_arguments(length=3)
    reference = [a.clone() for a in args]
    fired, result = fired_passes(model, args)
    assert "fuse_rope_cache" not in fired
    torch.testing.assert_close(result, model(*reference), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(args, reference, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rotation", other_rotations(), ids=lambda f: f.__name__)
def test_other_rotations_stay_before_the_fused_op(rotation):
    def model(q, k, v, cos, sin, keys, values, position, mask):
        return write_and_attend(*rotation(q, k, cos, sin), v, keys, values, position, mask)

    args = decode_arguments()
    reference = [a.clone() for a in args]
    fired, result = fired_passes(model, args)
    assert fired["fuse_rope_cache"] == 1
    torch.testing.assert_close(result, model(*reference), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(args, reference, rtol=1e-2, atol=1e-2)


def rotated_and_written(rotate, tables):
    """A step or a prefill whose queries and keys are rotated so, by tables that both share."""

    def model(q, k, v, cos, sin, keys, values, position, mask):
        given = tables(cos, sin)
        q, k = (rotate(x, *given) for x in (q, k))
        return write_and_attend(q, k, v, keys, values, position, mask)

    return model


def rotate_half_tokens_first(x, cos, sin):
    return rotate_half(x.transpose(1, 2), cos, sin).transpose(1, 2)


def rotate_pairs_tokens_first(x, table):
    return rotate_pairs(x.transpose(1, 2), table).transpose(1, 2)


@pytest.mark.parametrize(
    ("rotate", "tables"),
    [
        (rotate_half, lambda *t: [x[0, 0] for x in t]),
        (rotate_half_tokens_first, lambda *t: [x[0, 0] for x in t]),
        (rotate_half_tokens_first, lambda *t: [x[0, :1] for x in t]),
    ],
    ids=["heads first", "tokens first", "tokens first, a row"],
)
def test_a_table_without_tokens_is_no_table_of_each(rotate, tables):
    args = decode_arguments(length=3)
    reference = [a.clone() for a in args]
    model = rotated_and_written(rotate, tables)
    fired, result = fired_passes(model, args)
    assert "fuse_rope_cache" not in fired
    torch.testing.assert_close(result, model(*reference), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(args, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(
    ("rotate", "kind", "dtype"),
    [
        (rotate_half, torch.float32, torch.int64),
        (rotate_half, torch.float32, torch.bool),
        (rotate_pairs_tokens_first, torch.float32, torch.int64),
        (rotate_pairs_tokens_first, torch.bfloat16, torch.float64),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_tables_that_the_kernel_cannot_read_stay_outside(rotate, kind, dtype, length):
    def tables(cos, sin):
        cos, sin = (t[:, None].mul(3).to(dtype) for t in (cos, sin))
        both = torch.stack([cos[..., :8], sin[..., :8]], -1)
        return (cos, sin) if rotate is rotate_half else (both,)

    args = decode_arguments(length, kind)
    reference = [a.clone() for a in args]
    model = rotated_and_written(rotate, tables)
    fired, result = fired_passes(model, args)
    assert fired.get("fuse_rope_cache", 0) == (length == 1)
    tolerance = 1e-5 if kind == torch.float32 else 6e-2
    torch.testing.assert_close(result, model(*reference), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(args, reference, rtol=tolerance, atol=tolerance)


# Shapes of query, key and value: (batch, heads) of each, that SDPA broadcasts.
UNLIKE = [
    ((2, 1), (2, 4), (2, 4)),
    ((2, 4), (2, 4), (2, 1)),
    ((2, 4), (2, 1), (2, 4)),
    ((2, 4), (2, 4), (1, 4)),
]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("lead", UNLIKE, ids=str)
def test_caches_that_attention_broadcasts_are_left_alone(lead, length):
    def model(q, k, v, cos, sin, keys, values, position, mask):
        q, k = (rotate_half(x, cos[:, None], sin[:, None]) for x in (q, k))
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return F.scaled_dot_product_attention(q, keys, values, mask)

    args = decode_arguments(length)
    args[:3] = (random(*shape, length, 16) for shape in lead)
    args[5:7] = (random(*shape, 24, 16) for shape in lead[1:])
    reference = [a.clone() for a in args]
    fired, result = fired_passes(model, args)
    assert "fuse_rope_cache" not in fired
    torch.testing.assert_close(result, model(*reference), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(args, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "length"), [(0, 1), (0, 3), (2, 0)], ids=str)
def test_no_sequences_and_no_tokens(batch, length):
    args = decode_arguments(length)
    for i in (0, 1, 2, 5, 6):
        args[i] = args[i][:batch].clone()
    reference = [a.clone() for a in args]
    _, result = fired_passes(halves_model, args)
    assert result.shape == (batch, 4, length, 16)
    torch.testing.assert_close(args, reference)


@pytest.mark.parametrize("batch", [3, 4])
@pytest.mark.parametrize("batched", [False, True], ids=["shared angles", "angles a sequence"])
def test_a_prefill_of_a_symbolic_batch(batched, batch):
    """Also where the batch is as large as the prompt is long, which must not be compared."""

    def of(batch):
        args = decode_arguments(3)
        for i in (0, 1, 2, 5, 6, *((3, 4) if batched else ())):
            args[i] = random(batch, *args[i].shape[1:])
        return args

    compiled = compile_step(halves_model)
    first = of(batch)
    for i in (0, 1, 2, 5, 6, *((3, 4) if batched else ())):
        torch._dynamo.mark_dynamic(first[i], 0)
    for call, args in enumerate((first, of(5))):
        reference = [a.clone() for a in args]
        with torch.no_grad():
            fired, result = fired_passes_of(compiled, args)
            torch.testing.assert_close(result, halves_model(*reference), rtol=1e-5, atol=1e-5)
        count = fired.get("fuse_rope_cache", 0)
        # Before torch 2.13 a write to a cache does not tell that its batch is the tokens'.
        assert count == (call == 0) or (count == 0 and torch.__version__ < "2.13")
        torch.testing.assert_close(args, reference, rtol=1e-5, atol=1e-5)


def test_a_scaled_position_is_no_slot():
    def model(q, k, v, cos, sin, keys, values, position, mask):
        twice = torch.add(torch.arange(1, device=DEVICE), position[0], alpha=2)
        return write_and_attend(q, k, v, keys, values, twice, mask)

    args = decode_arguments()
    reference = [a.clone() for a in args]
    _, result = fired_passes(model, args)
    torch.testing.assert_close(result, model(*reference), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(args, reference)
