"""libdevice for Triton's interpreter, computed by torch.

The interpreter's own functions are empty stubs that return None; Inductor's code calls them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from triton_only_backend.interpreter_mends import as_float32, bfloat16_bits

if TYPE_CHECKING:
    from collections.abc import Callable


class Libdevice:
    """libdevice's functions for the interpreter: `libdevice.tanh(x)`."""

    def __init__(self) -> None:
        import torch

        self._functions: dict[str, Callable[..., Any]] = {
            "atan2": torch.atan2,
            "copysign": torch.copysign,
            "cyl_bessel_i0": torch.special.i0,
            "fast_expf": torch.exp,
            "fdividef": torch.div,
            "finitef": torch.isfinite,
            "fmod": torch.fmod,
            "isinf": torch.isinf,
            "isnan": torch.isnan,
            "j0": torch.special.bessel_j0,
            "j1": torch.special.bessel_j1,
            "llrint": lambda x: torch.round(x).long(),
            "nearbyint": torch.round,
            "nextafter": torch.nextafter,
            "pow": torch.pow,
            "rint": torch.round,
        }

    def __getattr__(self, name: str) -> Callable[..., Any]:
        import torch

        if name.startswith("__"):
            raise AttributeError(name)
        function = self._functions.get(name) or getattr(torch, name, None)
        function = function or getattr(torch.special, name, None)
        if function is None:
            raise AttributeError(f"libdevice.{name} has no counterpart in the Triton interpreter")

        def call(*args: Any, **_: Any) -> Any:
            return _call_torch(function, args)

        call.__name__ = name
        return call


def _call_torch(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    first = next(a for a in args if isinstance(a, tl.core.tensor))
    scalar = first.type.scalar
    values = [
        torch.from_numpy(np.ascontiguousarray(as_float32(a.handle).data))
        if isinstance(a, tl.core.tensor)
        else torch.as_tensor(getattr(a, "value", a))
        for a in args
    ]
    result = function(*values)
    if result.dtype == torch.bool:
        scalar, data = tl.int1, result.numpy()
    elif result.dtype == torch.int64:
        scalar, data = tl.int64, result.numpy()
    elif scalar == tl.bfloat16:
        data = bfloat16_bits(result.numpy())
    elif scalar == tl.float16:
        data = result.to(torch.float16).numpy()
    else:
        data = result.numpy()
    type_ = tl.block_type(scalar, list(data.shape)) if first.type.is_block() else scalar
    return tl.core.tensor(TensorHandle(data, scalar), type_)
