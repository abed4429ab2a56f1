"""Attention's ops on random problems and on each feature, against fp64 and PyTorch's own error.

A family fixes what a kernel is compiled for; its problems differ in sizes, values and layouts. On a
GPU each family has so many problems that the sweep has more than 2,000; in the interpreter a few.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import triton_only_backend  # noqa: F401
from triton_only_backend.errors import UnsupportedProblemError

ours = torch.ops.triton_only
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.float16
BF16 = torch.bfloat16
FP32 = torch.float32


@dataclass(frozen=True)
class Family:
    """What decides which kernel is compiled."""

    dtype: torch.dtype = BF16
    dim: int = 64
    dim_v: int = 64
    group: int = 1
    is_causal: bool = False
    mask: str = "none"  # "bool", "float"
    softcap: float = 0.0
    window: tuple[int, int] = (-1, -1)
    dropout_p: float = 0.0
    scale: float | None = None
    few_queries: bool = False
    even: bool = False
    gradients: bool = False


FAMILIES = {
    "plain": Family(gradients=True),
    "even": Family(even=True, gradients=True),
    "causal": Family(is_causal=True, gradients=True),
    "causal even": Family(is_causal=True, even=True, gradients=True),
    "dim 128": Family(dim=128, dim_v=128, is_causal=True, gradients=True),
    "fp16": Family(HALF, is_causal=True, gradients=True),
    "fp32": Family(FP32, is_causal=True, gradients=True),
    "odd dims": Family(HALF, dim=80, dim_v=40, gradients=True),
    "dim 256": Family(HALF, dim=256, dim_v=256, is_causal=True),
    "grouped": Family(group=4, is_causal=True, gradients=True),
    "bool mask": Family(HALF, mask="bool", gradients=True),
    "float mask": Family(mask="float", gradients=True),
    "scale": Family(scale=0.4),
    "decode": Family(dim=128, dim_v=128, group=4, few_queries=True),
    "decode fp32": Family(FP32, few_queries=True),
    "decode mask": Family(HALF, few_queries=True, mask="bool"),
    "softcap": Family(softcap=5.0, is_causal=True, gradients=True),
    "softcap fp32": Family(FP32, softcap=2.0, gradients=True),
    "window": Family(window=(20, 0), gradients=True),
    "window both": Family(HALF, window=(33, 17), is_causal=True, gradients=True),
    "window right": Family(FP32, window=(-1, 5)),
    "dropout": Family(dropout_p=0.3, is_causal=True, gradients=True),
    "dropout fp32": Family(FP32, dropout_p=0.5, group=2, gradients=True),
    "dropout mask": Family(HALF, dropout_p=0.1, mask="bool"),
    "window and mask": Family(window=(25, 4), mask="bool", is_causal=True, gradients=True),
    "everything": Family(
        HALF, group=2, softcap=8.0, window=(40, 3), dropout_p=0.2, mask="float", gradients=True
    ),
    "decode softcap": Family(softcap=6.0, group=4, few_queries=True),
    "decode window": Family(HALF, window=(30, 0), group=4, few_queries=True),
}
PROBLEMS = 80 if GPU else 2  # of each family: 28 families, 2,240 problems on a GPU
# These compile so many kernels, by their strides, that they are swept in parts beside each other.
MANY_KERNELS = {
    "odd dims", "bool mask", "float mask", "decode mask", "dropout mask", "window and mask",
    "everything",
}  # fmt: skip
PARTS = 4 if GPU else 1
LAYOUTS = ("bhld", "blhd", "lbhd", "sliced")


def philox(seed: int, counters: tuple[np.ndarray, ...], rounds: int = 7) -> list[np.ndarray]:
    """Philox4x32 as in Salmon et al., SC 2011, in numpy: four arrays of uint32."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.asarray(x, dtype=np.uint64) & mask for x in np.broadcast_arrays(*counters)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(rounds):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [b >> np.uint64(32) ^ c[1] ^ key[0], b & mask, a >> np.uint64(32) ^ c[3] ^ key[1],
             a & mask]  # fmt: skip
        key = [key[0] + np.uint64(0x9E3779B9) & mask, key[1] + np.uint64(0xBB67AE85) & mask]
    return c


def kept(seed: int, heads: int, len_q: int, len_kv: int, p: float) -> torch.Tensor:
    """Which weights dropout keeps: (heads, len_q, len_kv) bool, the heads of all batches."""
    head, row = np.arange(heads)[:, None, None], np.arange(len_q)[None, :, None]
    quad = np.arange(-(-len_kv // 4))[None, None, :]
    words = np.stack(philox(seed, (quad, row, head, np.zeros_like(quad))), -1)
    words = words.reshape(heads, len_q, -1)[..., :len_kv]
    return torch.from_numpy(words >= min(round(p * 2**32), 2**32 - 1))


def reference(query, key, value, mask, family: Family, keep=None, flash=False):
    """Output and log-sum-exp by the mathematics, in the operands' dtype.

    `flash` rounds as a flash kernel of the operands' dtype does: scores and sums in fp32, the
    weights in the dtype before the product with the values.
    """
    dtype = query.dtype
    if flash:
        query, key, value = query.float(), key.float(), value.float()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scale = query.shape[-1] ** -0.5 if family.scale is None else family.scale
    scores = query @ key.mT * scale
    if family.softcap:
        scores = family.softcap * torch.tanh(scores / family.softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    len_q, len_kv = scores.shape[-2:]
    distance = torch.arange(len_kv) - torch.arange(len_q)[:, None]
    hidden = distance > 0 if family.is_causal else torch.zeros_like(distance, dtype=torch.bool)
    left, right = family.window
    if left >= 0:
        hidden = hidden | (distance - (len_kv - len_q) < -left)
    if right >= 0:
        hidden = hidden | (distance - (len_kv - len_q) > right)
    scores = scores.masked_fill(hidden.to(scores.device), -math.inf)
    lse = scores.logsumexp(-1)
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights if flash else weights / total.clamp(min=torch.finfo(scores.dtype).tiny)
    if keep is not None:
        weights = weights * keep / (1 - family.dropout_p)
    if flash:
        out = weights.to(dtype).float() @ value / total.clamp(min=1e-30)
        return out.to(dtype), lse
    return weights @ value, lse


def draw(family: Family, seed: int):
    """Query, key, value and mask of a random problem of the family.

    On a GPU each part has masks of its own shape, and values of its own layout where 16 does not
    divide their size: what decides kernels, so that parts compile few that another compiles too.
    """
    rng = random.Random(seed)
    part = seed * PARTS // PROBLEMS % 4
    generator = torch.Generator().manual_seed(seed)

    def length(most: int) -> int:
        if family.even:
            return rng.choice([128, 256] if GPU else [64])
        return rng.randrange(most // 16) * 16 + rng.choice([1, 3, 7, 10, 15])

    kv_heads = rng.choice([2, 3, 5]) if GPU else 1
    batch, heads = rng.choice([2, 3]) if GPU else rng.choice([1, 2]), kv_heads * family.group
    len_kv = length(600 if GPU else 90)
    len_q = rng.choice([1, 2, 3]) if family.few_queries else length(300 if GPU else 70)
    if family.few_queries:
        len_kv += 16 * len_q

    def make(count: int, size: int, dim: int) -> torch.Tensor:
        layout = LAYOUTS[part] if GPU and dim % 16 else rng.choice(LAYOUTS)
        order = {"bhld": (0, 1, 2), "blhd": (0, 2, 1), "lbhd": (2, 0, 1), "sliced": (0, 1, 2)}
        shape = (batch, count, size)
        wide = dim + 16 if layout == "sliced" else dim
        stored = torch.randn(*(shape[i] for i in order[layout]), wide, generator=generator)
        back = [order[layout].index(i) for i in range(3)]
        tensor = stored.to(family.dtype).to(DEVICE).permute(*back, 3)
        return tensor[..., :dim]

    query = make(heads, len_q, family.dim)
    key, value = make(kv_heads, len_kv, family.dim), make(kv_heads, len_kv, family.dim_v)
    mask = None
    if family.mask != "none":
        one_batch, one_head = rng.random() < 0.5, rng.random() < 0.5
        if GPU:
            one_batch, one_head = divmod(part, 2)
        shape = (1 if one_batch else batch, 1 if one_head else heads, len_q, len_kv)
        mask = torch.randn(shape, generator=generator)
        mask = (mask > -0.5 if family.mask == "bool" else mask).to(DEVICE)
    return query, key, value, mask


def options(family: Family) -> dict[str, object]:
    return {
        "is_causal": family.is_causal,
        "scale": family.scale,
        "enable_gqa": family.group > 1,
        "softcap": family.softcap,
        "window_left": family.window[0],
        "window_right": family.window[1],
        "dropout_p": family.dropout_p,
    }


def torchs_own(query, key, value, mask, family: Family, keep, grad):
    """The yardstick: PyTorch's kernel where it does the same, else the same roundings in eager."""
    leaves = [t.detach().clone().requires_grad_(family.gradients) for t in (query, key, value)]
    plain = not family.softcap and family.window == (-1, -1) and keep is None
    if plain:
        bias = mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
        out = F.scaled_dot_product_attention(
            *leaves, bias, is_causal=family.is_causal, scale=family.scale,
            enable_gqa=family.group > 1,
        )  # fmt: skip
        grads = torch.autograd.grad(out, leaves, grad) if family.gradients else ()
        return out.detach(), grads
    out, _ = reference(*leaves, mask, family, keep, flash=True)
    if not family.gradients:
        return out.detach(), ()
    grads = torch.autograd.grad(reference(*leaves, mask, family, keep)[0], leaves, grad)
    return out.detach(), grads


def norm(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().norm())


def check(family: Family, number: int) -> None:
    """One problem: output, log-sum-exp and gradients."""
    query, key, value, mask = draw(family, number)
    seed = 987654321987654321 + number
    keep = None
    if family.dropout_p:
        heads = query.shape[0] * query.shape[1]
        keep = kept(seed, heads, query.shape[2], key.shape[2], family.dropout_p).to(DEVICE)
        keep = keep.view(*query.shape[:2], query.shape[2], key.shape[2])
    seeds = torch.tensor([seed], device=DEVICE) if family.dropout_p else None
    leaves = [t.detach().requires_grad_(family.gradients) for t in (query, key, value)]
    exact_leaves = [t.double().detach().requires_grad_(family.gradients) for t in leaves]
    exact, exact_lse = reference(*exact_leaves, mask, family, keep)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(number))
    grad = grad.to(query.dtype).to(DEVICE)
    own, own_grads = torchs_own(query, key, value, mask, family, keep, grad)

    out, lse = ours.attention_forward(*leaves, mask, seeds, **options(family))
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-5, atol=2e-5)
    floor = torch.finfo(query.dtype).eps * (4 if query.dtype == FP32 else 0.5)
    where = f"{family}, problem {number}, {[list(t.shape) for t in (query, key, value)]}"
    error, yardstick = norm(out.double() - exact), norm(own.nan_to_num().double() - exact)
    assert error <= 1.5 * yardstick + floor * norm(exact), f"{where}: {error:.3g} {yardstick:.3g}"
    if not family.gradients:
        return
    grads = torch.autograd.grad(out, leaves, grad)
    exact_grads = torch.autograd.grad(exact, exact_leaves, grad.double())
    # Dropout scales the output, whose rounding then leaves a query of one key a gradient.
    rounded = floor * norm(grad.double() * exact) if family.dropout_p else 0.0
    for name, actual, torchs, true in zip("qkv", grads, own_grads, exact_grads, strict=True):
        error = norm(actual.double() - true)
        yardstick = norm(torchs.nan_to_num().double() - true)
        # A query that sees one key has no gradient: what is left is rounding of the output's.
        bound = 1.5 * yardstick + 2 * floor * norm(true) + 1e-3 * floor * norm(grad) + rounded
        assert error <= bound, f"{where}: gradient of {name}: {error:.3g} {yardstick:.3g}"


def sweeps():
    """Parameters (family, problems): all of a family, or a part of one that has many kernels."""
    for name in FAMILIES:
        parts = PARTS if name in MANY_KERNELS else 1
        size = PROBLEMS // parts
        for part in range(parts):
            ident = name if parts == 1 else f"{name}, part {part}"
            yield pytest.param(name, range(part * size, (part + 1) * size), id=ident)


@pytest.mark.parametrize(("name", "problems"), list(sweeps()))
def test_sweep(name, problems):
    first = 1000 * list(FAMILIES).index(name)
    for number in problems:
        check(FAMILIES[name], first + number)


def test_a_planted_fault_is_found(monkeypatch):
    """Each feature must matter to the check: a reference without it is refused."""
    wrong = {
        "softcap": {"softcap": 0.0},
        "window": {"window": (21, 0)},
        "dropout": {"dropout_p": 0.31},
        "causal": {"is_causal": False},
        "scale": {"scale": 0.41},
    }
    true_options = options
    for name, change in wrong.items():
        monkeypatch.setitem(
            globals(), "options", lambda family, c=change: true_options(replace(family, **c))
        )
        with pytest.raises(AssertionError):
            for number in range(3):
                check(FAMILIES[name], number)


def test_opcheck_with_every_option():
    query, key, value, mask = draw(FAMILIES["everything"], 0)
    leaves = [t.detach().float().requires_grad_() for t in (query, key, value)]
    seed = torch.tensor([7], device=DEVICE)
    arguments = {**options(FAMILIES["everything"]), "contiguous": True}
    result = torch.library.opcheck(ours.attention.default, (*leaves, mask, seed), arguments)
    assert set(result.values()) == {"SUCCESS"}, result


def test_the_output_is_contiguous_on_request():
    query, key, value, _ = draw(FAMILIES["plain"], 1)
    merged = ours.attention(query, key, value)
    assert merged.transpose(1, 2).is_contiguous()
    separate = ours.attention(query, key, value, contiguous=True)
    assert separate.is_contiguous()
    assert torch.equal(merged, separate)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"dropout_p": 0.5}, "without a seed"),
        ({"dropout_p": 1.5}, "from 0 to 1"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"window_left": -2}, r"window of \(-2, -1\)"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(bad, named):
    query, key, value, _ = draw(FAMILIES["plain"], 1)
    with pytest.raises(UnsupportedProblemError, match=rf"triton_only\.attention.*{named}"):
        ours.attention(query, key, value, **bad)


# FlashAttention-2 itself, and what only a GPU has


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [512, 1000])
def test_gradients_err_no_more_than_flash_attention_2(dim, is_causal, length):
    generator = torch.Generator("cuda").manual_seed(length)
    shape = (2, 4, length, dim)
    query, key, value, grad = (
        torch.randn(shape, generator=generator, device="cuda").to(BF16) for _ in range(4)
    )
    exact = [t.double().requires_grad_() for t in (query, key, value)]
    family = Family(dim=dim, dim_v=dim, is_causal=is_causal)
    true = torch.autograd.grad(reference(*exact, None, family)[0], exact, grad.double())
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(*leaves, is_causal=is_causal)
    flash = torch.autograd.grad(out, leaves, grad)
    mine = torch.autograd.grad(ours.attention(*leaves, is_causal=is_causal), leaves, grad)
    for name, a, b, t in zip("qkv", mine, flash, true, strict=True):
        assert norm(a.double() - t) <= 1.5 * norm(b.double() - t), name
