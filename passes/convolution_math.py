"""Convolutions of any number of dimensions as products and sums, and their gradients.

    y[n, o, t] = Σ over c, i of w[o, c, i] · x[n, c, s t + d i − p]

with t a place of the output, i of the kernel, s the stride, d the dilation and p the padding. Three
functions do for the convolution, for the transposed one and for the gradients of both:

    forward(x, w)            y: the windows of x, as rows, times w
    of_input(g, w, x)        x's gradient: rows of g times w, laid back to where they were read
    of_weight(g, x)          w's gradient: rows of gᵀ times the windows of x

The transposed convolution of x is `transposed`, which works as `of_input`, its input's gradient
`forward`, its weight's `of_weight` with the arguments exchanged. A depthwise convolution (each
channel by itself) has no product: it is a sum over the kernel's places of a slice of x times a
number a channel, in fp32.

All are functions of (batch, channels, *sizes) tensors, to be traced into a graph.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Tensor = torch.Tensor


class Window(NamedTuple):
    """How a convolution walks over its input, one number a dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    depthwise: bool = False

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return math.prod(self.kernel)

    @property
    def overlaps(self) -> bool:
        """Whether two windows read the same place."""
        return any(k > s for k, s in zip(self.kernel, self.stride, strict=True))

    @property
    def is_pointwise(self) -> bool:
        """Whether each place of the input gives one place of the output."""
        return self.taps == 1 and set(self.stride) == {1} and not any(self.padding)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, window: Window) -> tuple[Tensor]:
    """(N, C, *sizes) and (O, C, *kernel), or (C · m, 1, *kernel), to (N, O, *places)."""
    if window.depthwise:
        return (_depthwise(x, weight, bias, window),)
    flat = weight.flatten(1)
    if window.is_pointwise and x.is_contiguous():
        columns = x.flatten(2)
        matrices = flat.expand(x.shape[0], *flat.shape)
        if bias is None:
            y = torch.bmm(matrices, columns)
        else:
            y = torch.baddbmm(bias[:, None].expand(-1, columns.shape[2]), matrices, columns)
        return (y.unflatten(2, x.shape[2:]),)
    windows = _windows(_padded(x, window), window)
    places = windows.shape[2 : x.dim()]
    rows = _rows(windows, len(places))
    y = rows @ flat.t() if bias is None else torch.addmm(bias, rows, flat.t())
    return (y.view(x.shape[0], *places, weight.shape[0]).movedim(-1, 1),)


def of_input(grad: Tensor, weight: Tensor, x: Tensor, *, window: Window) -> tuple[Tensor]:
    """The gradient of a forward's input x (N, C, *sizes) from its output's (N, O, *places)."""
    return (_laid_back(grad, weight, None, window, x.shape[1], x.shape[2:]),)


def transposed(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, window: Window, more: Sequence[int]
) -> tuple[Tensor]:
    """(N, O, *places) and (O, C, *kernel), or (C, 1, *kernel), to (N, C, *sizes).

    `more` is the output's padding: places at the end that no window may read.
    """
    sizes = [
        (places - 1) * s - 2 * p + d * (k - 1) + 1 + o
        for places, k, s, p, d, o in zip(x.shape[2:], *window[:4], more, strict=True)
    ]
    channels = x.shape[1] if window.depthwise else weight.shape[1]
    return (_laid_back(x, weight, bias, window, channels, sizes),)


def _laid_back(
    grad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    channels: int,
    sizes: Sequence[int],
) -> Tensor:
    dims = len(sizes)
    padded = [size + 2 * p for size, p in zip(sizes, window.padding, strict=True)]
    if window.depthwise:
        flat = weight.flatten(1).float()
        wide = grad.float()
        taps: Iterator[Tensor] = (wide * _broadcast(flat[:, i], dims) for i in range(window.taps))
    else:
        rows = grad.movedim(1, -1)
        parts = _matrix(rows, dims + 1) @ weight.flatten(1)
        folded = parts.view(*rows.shape[:-1], weight.shape[1], *window.kernel).movedim(dims + 1, 1)
        if not window.overlaps:
            x = _side_by_side(folded, window, padded)
            return _finish(x, sizes, window, grad.dtype, bias)
        taps = (part.float() for part in folded.flatten(dims + 2).unbind(-1))
    x = grad.new_zeros((), dtype=torch.float32)
    for place, tap in zip(itertools.product(*map(range, window.kernel)), taps, strict=True):
        x = x + _placed(tap, place, window, padded)
    if window.depthwise and grad.shape[1] != channels:  # several filters a channel
        x = x.unflatten(1, (channels, -1)).sum(2)
    return _finish(x, sizes, window, grad.dtype, bias)


def of_weight(grad: Tensor, x: Tensor, *, window: Window) -> tuple[Tensor]:
    """The gradient (O, C, *kernel) of a forward's weight."""
    padded = _padded(x, window)
    if window.depthwise:
        wide = grad.float()
        dims = tuple(d for d in range(grad.dim()) if d != 1)
        sums = [(wide * tap).sum(dims) for tap in _taps(padded, window, grad.shape)]
        return (torch.stack(sums, 1).view(grad.shape[1], 1, *window.kernel).to(grad.dtype),)
    rows = _rows(_windows(padded, window), len(window.kernel))
    by_channel = _matrix(grad.movedim(1, 0), 1)
    return ((by_channel @ rows).view(grad.shape[1], x.shape[1], *window.kernel),)


def of_bias(grad: Tensor) -> tuple[Tensor]:
    """The gradient (O,) of a bias."""
    return (grad.sum([d for d in range(grad.dim()) if d != 1]),)


def _broadcast(per_channel: Tensor, dims: int) -> Tensor:
    return per_channel.view(-1, *[1] * dims)


def _padded(x: Tensor, window: Window) -> Tensor:
    amounts = [p for p in reversed(window.padding) for _ in range(2)]
    return F.pad(x, amounts) if any(amounts) else x


def _windows(x: Tensor, window: Window) -> Tensor:
    """(N, C, *padded) as (N, C, *places, *kernel): a view."""
    for dim, (kernel, stride) in enumerate(zip(window.kernel, window.stride, strict=True)):
        x = x.unfold(dim + 2, kernel, stride)
    return x


def _rows(windows: Tensor, dims: int) -> Tensor:
    """(N, C, *places, *kernel) as (N · Π places, C · Π kernel)."""
    return _matrix(windows.movedim(1, dims + 1), dims + 1)


def _matrix(x: Tensor, dims: int) -> Tensor:
    """A matrix whose rows are the first dimensions; its sizes are given, which adds no guard."""
    sizes = math.prod(x.shape[:dims]), math.prod(x.shape[dims:])
    return x.contiguous().view(sizes)


def _taps(x: Tensor, window: Window, shape: Sequence[int]) -> Iterator[Tensor]:
    """For each place of the kernel what it reads of a padded input: (N, O, *places), in fp32."""
    x = x.float()
    multiplier = shape[1] // x.shape[1]
    if multiplier > 1:
        x = x.repeat_interleave(multiplier, 1)
    for place in itertools.product(*map(range, window.kernel)):
        tap = x
        for dim, at in enumerate(place):
            start = at * window.dilation[dim]
            stop = start + (shape[dim + 2] - 1) * window.stride[dim] + 1
            tap = tap.narrow(dim + 2, start, stop - start)
            if window.stride[dim] > 1:
                tap = tap[(slice(None),) * (dim + 2) + (slice(None, None, window.stride[dim]),)]
        yield tap


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    padded = _padded(x, window)
    spans = [d * (k - 1) + 1 for d, k in zip(window.dilation, window.kernel, strict=True)]
    places = [
        (size - span) // stride + 1
        for size, span, stride in zip(padded.shape[2:], spans, window.stride, strict=True)
    ]
    flat = weight.flatten(1).float()
    dims = len(places)
    y = padded.new_zeros((), dtype=torch.float32)
    y = y if bias is None else _broadcast(bias.float(), dims)
    shape = (x.shape[0], weight.shape[0], *places)
    for i, tap in enumerate(_taps(padded, window, shape)):
        y = y + tap * _broadcast(flat[:, i], dims)
    return y.to(x.dtype)


def _side_by_side(parts: Tensor, window: Window, padded: Sequence[int]) -> Tensor:
    """(N, C, *places, *kernel) of windows that do not overlap as (N, C, *padded)."""
    dims = len(padded)
    gaps = [n for k, s in zip(window.kernel, window.stride, strict=True) for n in (s - k, 0)]
    if any(gaps):
        parts = F.pad(parts, gaps[::-1])
    order = [0, 1, *(d for i in range(dims) for d in (2 + i, 2 + dims + i))]
    x = parts.permute(order)
    for dim in range(dims):
        x = x.flatten(dim + 2, dim + 3)
    return _resized(x, padded)


def _placed(tap: Tensor, place: Sequence[int], window: Window, padded: Sequence[int]) -> Tensor:
    """What one place of the kernel gives, (N, C, *places), where the input had it."""
    for dim, stride in enumerate(window.stride):
        if stride > 1:  # zeros in between
            wide = F.pad(tap.unsqueeze(dim + 3), [0, 0] * (tap.dim() - dim - 3) + [0, stride - 1])
            tap = wide.flatten(dim + 2, dim + 3)
    starts = [at * d for at, d in zip(place, window.dilation, strict=True)]
    ends = [size - n - start for size, n, start in zip(padded, tap.shape[2:], starts, strict=True)]
    return F.pad(tap, [n for pair in reversed([*zip(starts, ends, strict=True)]) for n in pair])


def _resized(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Cut, or filled up with zeros, at the far ends."""
    amounts = [n for size, has in zip(sizes, x.shape[2:], strict=True) for n in (size - has, 0)]
    return F.pad(x, amounts[::-1]) if any(amounts) else x


def _finish(
    x: Tensor, sizes: Sequence[int], window: Window, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    for dim, (size, padding) in enumerate(zip(sizes, window.padding, strict=True)):
        x = x.narrow(dim + 2, padding, size) if padding else x
    x = x.to(dtype)
    return x if bias is None else x + _broadcast(bias, len(sizes))
