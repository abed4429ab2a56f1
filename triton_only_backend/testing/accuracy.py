"""Error against fp64, judged by the vendor library's own error on the same input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

WIDE = {torch.complex32: torch.complex128, torch.complex64: torch.complex128}


@dataclass(frozen=True)
class Accuracy:
    """One output's errors, relative to the exact result.

    Attributes:
        error: ‖actual - exact‖ / ‖exact‖.
        vendor_error: the same of the reference function in the arguments' own dtypes.
        worst: max |actual - exact| / max |exact|.
        vendor_worst: the same of the reference function.
        rounding: what is always granted: half a unit in the last place of the output, and of fp32
            sums. On a handful of elements the vendor's error may be zero by luck.
        factor: how many times the vendor's error is allowed.
    """

    error: float
    vendor_error: float
    worst: float
    vendor_worst: float
    rounding: float
    factor: float

    @property
    def is_accurate(self) -> bool:
        """Whether both errors are within their bounds; the maximum's is twice as wide."""
        bound = self.factor * max(self.vendor_error, self.rounding)
        worst_bound = 2 * self.factor * max(self.vendor_worst, self.rounding)
        return self.error <= bound and self.worst <= worst_bound

    def __str__(self) -> str:
        return (
            f"error {self.error:.2e} (vendor {self.vendor_error:.2e}), worst element "
            f"{self.worst:.2e} (vendor {self.vendor_worst:.2e}), {self.factor:g} times the "
            f"vendor's or the rounding, {self.rounding:.2e}, allowed"
        )


def has_rounding(tensor: torch.Tensor) -> bool:
    """Whether it is floating or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def widen(tree: Any) -> Any:
    """Floating and complex tensors in double precision; the rest as it is."""

    def wide(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not has_rounding(leaf):
            return leaf
        return leaf.detach().to(WIDE.get(leaf.dtype, torch.float64))

    return tree_map(wide, tree)


def compare(
    actual: torch.Tensor, vendor: torch.Tensor, exact: torch.Tensor, factor: float = 2.0
) -> Accuracy:
    """Errors of two results against an exact one, all of one shape."""

    def of(result: torch.Tensor) -> tuple[float, float]:
        difference = (result.detach().to(wide.dtype) - wide)[finite]
        if not difference.numel():
            return 0.0, 0.0
        return difference.norm().item() / norm, difference.abs().max().item() / largest

    wide = widen(exact)
    # Where the narrow type overflows, as the vendor's does, there is no error to measure.
    finite = torch.isfinite(wide) & torch.isfinite(vendor)
    norm = wide[finite].norm().item() or 1.0
    largest = wide[finite].abs().max().item() if finite.any() else 1.0
    largest = largest or 1.0
    real = actual.dtype if actual.dtype.is_floating_point else torch.float32
    rounding = torch.finfo(real).eps / 2 + torch.finfo(torch.float32).eps * 16
    if real == torch.float64:
        rounding = torch.finfo(torch.float64).eps * 16
    (error, worst), (vendor_error, vendor_worst) = of(actual), of(vendor)
    return Accuracy(error, vendor_error, worst, vendor_worst, rounding, factor)


def assert_accurate(
    actual: Any,
    reference_fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    factor: float = 2.0,
    check_dtype: bool = True,
) -> list[Accuracy]:
    """Asserts that a result is about as accurate as the vendor library's.

        assert_accurate(my_mm(a, b), torch.mm, (a, b))

    `reference_fn(*args)` is computed twice: in fp64, which is taken as exact, and in the arguments'
    own dtypes, which is what the vendor library does. The error of `actual` may be `factor` times
    the latter's. Both the norm and the worst element are judged, so that one wrong row, or one
    wrong element, does not drown in the others. Integers, booleans, infinities and NaNs must agree
    exactly.

    Args:
        actual: a tensor, or a nest of them as `reference_fn` returns.
        reference_fn: mathematically the same, in PyTorch; it must not name a floating dtype.
        args: tensors of any dtypes, and other arguments.

    Returns:
        The errors of each floating tensor.

    Raises:
        AssertionError: with both errors and the place of the worst element.
    """
    kwargs = dict(kwargs or {})
    with torch.no_grad():
        exact = reference_fn(*widen(tuple(args)), **widen(kwargs))
        vendor = reference_fn(*args, **kwargs)
    leaves, spec = tree_flatten(actual)
    vendor_leaves, vendor_spec = tree_flatten(vendor)
    exact_leaves, _ = tree_flatten(exact)
    if len(leaves) != len(vendor_leaves):
        raise AssertionError(f"the result is {spec}, the reference's {vendor_spec}")
    found = []
    triples = zip(leaves, vendor_leaves, exact_leaves, strict=True)
    for i, (leaf, theirs, truth) in enumerate(triples):
        name = "the result" if len(leaves) == 1 else f"output {i}"
        accuracy = check_tensor(name, leaf, theirs, truth, factor, check_dtype)
        if accuracy is not None:
            found.append(accuracy)
    return found


def assert_repeatable(
    function: Callable[..., Any], args: Sequence[Any] = (), *, times: int = 3
) -> None:
    """Asserts that a function gives the same bits each time: that it adds in a fixed order."""
    first = tree_flatten(function(*args))[0]
    for _ in range(times - 1):
        for i, (old, new) in enumerate(zip(first, tree_flatten(function(*args))[0], strict=True)):
            old, new = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (old, new))
            if not torch.equal(old, new):
                raise AssertionError(f"output {i} has other bits from run to run")


def check_tensor(
    name: str, actual: Any, vendor: Any, exact: Any, factor: float, check_dtype: bool = True
) -> Accuracy | None:
    """One output of `assert_accurate`; None where it is not floating."""
    if not isinstance(vendor, torch.Tensor):
        if actual != vendor:
            raise AssertionError(f"{name} is {actual!r}, the reference's {vendor!r}")
        return None
    if not isinstance(actual, torch.Tensor) or actual.shape != vendor.shape:
        shape = list(actual.shape) if isinstance(actual, torch.Tensor) else actual
        raise AssertionError(f"{name} has shape {shape}, the reference's {list(vendor.shape)}")
    if check_dtype and actual.dtype != vendor.dtype:
        raise AssertionError(f"{name} is {actual.dtype}, the reference's {vendor.dtype}")
    actual, vendor, exact = (t.detach().to(vendor.device) for t in (actual, vendor, exact))
    if not has_rounding(vendor):
        if not torch.equal(actual.to(vendor.dtype), vendor):
            wrong = int((actual != vendor).sum())
            raise AssertionError(f"{name} differs in {wrong} of {vendor.numel()} elements")
        return None
    for kind in (torch.isnan, torch.isinf):
        # An infinity may come of the narrow dtype alone: the vendor's are granted.
        there, expected = kind(actual), kind(vendor)
        if kind is torch.isnan:
            expected = expected & torch.isnan(exact)
        stray = there & ~(expected | kind(vendor))
        missing = expected & ~there
        if stray.any() or missing.any():
            index = tuple((stray | missing).nonzero()[0].tolist())
            what = "inf" if kind is torch.isinf else "NaN"
            raise AssertionError(
                f"{name} has {int(stray.sum())} {what} too many and {int(missing.sum())} too few, "
                f"the first at {index}: {actual[index].item()}, exactly {exact[index].item()}"
            )
    accuracy = compare(actual, vendor, exact, factor)
    if not accuracy.is_accurate:
        difference = (actual.to(exact.dtype) - exact).abs().nan_to_num(0, 0, 0)
        index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        raise AssertionError(
            f"{name} ({actual.dtype}, {list(actual.shape)}) is not accurate: {accuracy}; the worst "
            f"at {index}: {actual[index].item():.6g}, exactly {exact[index].item():.6g}"
        )
    return accuracy
