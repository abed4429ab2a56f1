"""Takes apart the aten ops that hide a product or an attention inside a library's own fusion.

Also two that are a few sums: `histc`, by which mixtures of experts count their tokens, and the
gradient of a weight norm, whose forward Inductor takes apart itself.

AOTAutograd applies the table below the gradient, so that forward and backward hold what the
functions here say, and the passes then find ordinary products. Inductor would call ATen for each:

    aten.addbmm                          a batch of products, summed: one with K times the batch
    aten._addmm_activation               addmm, then relu or gelu
    aten._trilinear                      what F.bilinear is: a product of three, summed
    aten._native_multi_head_attention    nn.MultiheadAttention in eval mode without gradients
    aten._transformer_encoder_layer_fwd  nn.TransformerEncoderLayer likewise
    aten.histc                           with bounds: how many values lie in each bin
    aten._weight_norm_interface_backward the gradient of torch.nn.utils.weight_norm

Left alone: nested tensors, which reach none of these under torch.compile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Tensor = torch.Tensor
aten = torch.ops.aten


def addbmm(
    bias: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """beta · bias + alpha · Σ batch1[i] @ batch2[i], one product with the batch folded into K."""
    batch, rows, inner = batch1.shape
    a = batch1.permute(1, 0, 2).reshape(rows, batch * inner)
    return torch.addmm(bias, a, batch2.reshape(batch * inner, -1), beta=beta, alpha=alpha)


def addmm_activation(
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    use_gelu: bool = False,
) -> Tensor:
    """The activation of beta · bias + alpha · a @ b."""
    out = torch.addmm(bias, a, b, beta=beta, alpha=alpha)
    if not use_gelu:
        return F.relu(out)
    # cuBLASLt's epilogue is the tanh form; ATen's fallback on a CPU is the exact one.
    return F.gelu(out, approximate="tanh" if out.is_cuda else "none")


def trilinear(
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """Σ over `sumdim` of i1 · i2 · i3, each unsqueezed at its `expand` dimensions."""
    product = torch.ones((), dtype=i1.dtype, device=i1.device)
    for operand, dims in ((i1, expand1), (i2, expand2), (i3, expand3)):
        for dim in sorted(dims):
            operand = operand.unsqueeze(dim)
        product = product * operand
    return product.sum(tuple(sumdim)) if sumdim else product


def _allowed(mask: Tensor | None, mask_type: int | None, query: Tensor) -> Tensor | None:
    """The native ops' mask, in which True (or nonzero) bars a key, as True for what may be seen."""
    if mask is None:
        return None
    allowed = mask.logical_not()
    if mask_type == 0:  # (length, length)
        return allowed[None, None]
    if mask_type == 1:  # (batch, length): keys that are padding
        return allowed.view(query.shape[0], 1, 1, -1)
    return allowed  # (batch, heads, length, length)


def native_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Projections, attention and output projection; (batch, length, embed_dim) throughout."""

    def heads(x: Tensor, part: int) -> Tensor:
        rows = slice(part * embed_dim, (part + 1) * embed_dim)
        projected = F.linear(x, qkv_weight[rows], qkv_bias[rows])
        return projected.view(*x.shape[:2], num_head, -1).transpose(1, 2)

    q, k, v = (heads(x, part) for part, x in enumerate((query, key, value)))
    allowed = _allowed(mask, mask_type, query)
    weights = query.new_empty(0)
    if need_weights:
        scores = q @ k.mT * (embed_dim // num_head) ** -0.5
        if allowed is not None:
            scores = scores.masked_fill(allowed.logical_not(), float("-inf"))
        weights = scores.softmax(-1)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        out = torch.ops.triton_only.attention(q, k, v, allowed)
    return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias), weights


def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """One encoder layer, norms before or after, without dropout."""

    def norm1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attend(x: Tensor) -> Tensor:
        return native_multi_head_attention(
            x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias,
            mask, need_weights=False, mask_type=mask_type,
        )[0]  # fmt: skip

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    if norm_first:
        src = src + attend(norm1(src))
        return src + feed_forward(norm2(src))
    src = norm1(src + attend(src))
    return norm2(src + feed_forward(src))


def histc(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """How many values lie in each of `bins` of one width; the last holds its upper bound too."""
    if min >= max:  # the bounds are those of the data, or an error
        return NotImplemented
    values = x.flatten()
    seen = (values >= min) & (values <= max)
    scaled = (values - min) * bins / (max - min)
    places = torch.where(seen, scaled, -1).floor().to(torch.int64).clamp(max=bins - 1)
    each = torch.arange(bins, device=x.device)
    return (places[:, None] == each).sum(0).to(x.dtype)


def weight_norm_backward(
    grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """The gradients of v and g, of the weight v · g / norm(v) over all dimensions but `dim`."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    norms, wide = norms.float(), v.float()
    along = (grad.float() * wide).sum(others, keepdim=True)
    grad_v = g.float() / norms * (grad.float() - wide * (along / (norms * norms)))
    return grad_v.to(v.dtype), (along / norms).to(g.dtype)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.addbmm.default: addbmm,
    aten._addmm_activation.default: addmm_activation,
    aten._trilinear.default: trilinear,
    aten._native_multi_head_attention.default: native_multi_head_attention,
    aten._transformer_encoder_layer_fwd.default: transformer_encoder_layer,
    aten.histc.default: histc,
    aten._weight_norm_interface_backward.default: weight_norm_backward,
}
