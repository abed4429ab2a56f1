"""What Triton's interpreter computes wrongly, or slowly, done properly.

1. `tl.dot` on bfloat16 multiplies the raw bits (it carries bf16 as uint16), and on fp16 goes
   through numpy's slow half-precision loop; both are converted to fp32 first.
2. Conversions to bfloat16 truncate, and conversions between bfloat16 and anything but fp32 take the
   raw bits for a number; both are done properly, rounding to nearest even.
3. libdevice functions are empty stubs that return None; Inductor calls them. They get the bodies
   of `interpreter_libdevice`.
4. A reduction with a combine function of its own (argmax, Welford) runs it once an element; it is
   run on halves instead, log2(n) times, in the same order.
5. Every call of a device function replaces all of triton.language's functions again, a quarter of
   all time; once a launch is enough.
6. Atomics read broadcast operands (a mask of shape (1, 1), say) past their end; they are
   written out. Nor do they add bfloat16, as a GPU does and Inductor's gradient of an index asks.
7. Triton 3.6's makes indices of arrays with one element, which numpy 2.4 refuses.
8. `not x` of a block is False, whatever is in it: Inductor's argmax asks `not isnan`. It is
   answered for each element.
9. What a comparison yields keeps the type of its operands: spread over a block it becomes a block
   of that type, which Triton 3.9 refuses as a mask. It is made an int1.
10. A scan with a combine function of its own (Inductor's cumsum) runs it once an element too; it is
   run on whole blocks, log2(n) times.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def mend() -> None:
    """Replaces those of the interpreter's functions, in this process."""
    _mend_dot()
    _mend_casts()
    _mend_reductions()
    _mend_scans()
    _mend_not()
    _mend_comparisons()
    _mend_atomics()
    _patch_once_a_launch()


def as_float32(handle: Any) -> Any:
    """A bf16 or fp16 interpreter value as fp32; anything else as it is."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    if handle.dtype.scalar == tl.float16:
        return TensorHandle(handle.data.astype(np.float32), tl.float32)
    return handle


def _mend_dot() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
        return original(self, as_float32(a), as_float32(b), d, *args)

    InterpreterBuilder.create_dot = create_dot


def bfloat16_bits(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers of any type as bfloat16 bit patterns, rounded to nearest even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data.astype(np.float32)), np.uint16(0x7FC0), rounded)


def _mend_casts() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original_cast = InterpreterBuilder.cast_impl
    original_fp_to_fp = InterpreterBuilder.create_fp_to_fp

    def involves_bfloat16(src: Any, dst_type: Any) -> bool:
        return tl.bfloat16 in (src.dtype.scalar, dst_type.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if not involves_bfloat16(src, dst_type):
            return original_cast(self, src, dst_type)
        src = as_float32(src)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(bfloat16_bits(src.data), tl.bfloat16)
        return original_cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        wide = src.dtype.scalar.primitive_bitwidth > 8 and dst_type.scalar.primitive_bitwidth > 8
        if wide and involves_bfloat16(src, dst_type):
            return cast_impl(self, src, dst_type)
        return original_fp_to_fp(self, src, dst_type, rounding_mode)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def _mend_reductions() -> None:
    from triton.runtime.interpreter import ReduceOps

    def generic_reduce(self: Any, tensors: Any) -> list[Any]:
        combine = self.combine_fn.rewrite()
        dtypes = [t.dtype for t in tensors]
        dimensions = tensors[0].handle.data.ndim
        axis = 0 if self.axis is None else self.axis
        parts = [
            np.moveaxis(t.handle.data.ravel() if self.axis is None else t.handle.data, axis, 0)
            for t in tensors
        ]
        while parts[0].shape[0] > 1:
            # Neighbours, so that a combine function that does not commute sees its order.
            pairs = [p[start::2] for start in (0, 1) for p in parts]
            combined = combine(*map(self.to_tensor, pairs, dtypes * 2))
            combined = combined if isinstance(combined, tuple) else (combined,)
            parts = [c.handle.data.reshape(pairs[0].shape) for c in combined]
        results = []
        for part, dtype in zip(parts, dtypes, strict=True):
            data = part[0]
            if self.keep_dims:
                shape = (1,) * dimensions if self.axis is None else None
                data = data.reshape(shape) if shape else np.expand_dims(data, axis)
            results.append(self.to_tensor(data, dtype))
        return results

    ReduceOps.generic_reduce = generic_reduce


def _mend_scans() -> None:
    from triton.runtime.interpreter import ScanOps

    def generic_scan(self: Any, tensors: Any) -> list[Any]:
        combine = self.combine_fn.rewrite()
        dtypes = [t.dtype for t in tensors]
        parts = [np.moveaxis(t.handle.data, self.axis, 0) for t in tensors]
        distance = 1
        while distance < parts[0].shape[0]:
            # Each element with what those before it came to, of twice as many each time; blocks
            # keep their size, a power of 2, so that the first few are computed for nothing.
            pairs = [np.roll(p, distance, 0) for p in parts] + parts
            combined = combine(*map(self.to_tensor, pairs, dtypes * 2))
            combined = combined if isinstance(combined, tuple) else (combined,)
            parts = [
                np.concatenate([p[:distance], c.handle.data.reshape(p.shape)[distance:]])
                for p, c in zip(parts, combined, strict=True)
            ]
            distance *= 2
        return [
            self.to_tensor(np.ascontiguousarray(np.moveaxis(part, 0, self.axis)), dtype)
            for part, dtype in zip(parts, dtypes, strict=True)
        ]

    ScanOps.generic_scan = generic_scan


def _mend_not() -> None:
    import ast

    import triton.language as tl
    from triton.runtime import interpreter

    def not_each(x: Any) -> Any:
        is_block = isinstance(x, tl.tensor) and x.handle.data.size > 1
        return x == 0 if is_block else not x

    def visit_unary(self: Any, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Not):
            return node
        return ast.Call(ast.Name("not_each", ast.Load()), [node.operand], [])

    # A rewritten function sees the names of the interpreter's module.
    interpreter.not_each = not_each
    interpreter.ASTTransformer.visit_UnaryOp = visit_unary


def _mend_comparisons() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = original(self, lhs, rhs, op)
        if result.data.dtype == np.bool_:
            result.dtype = tl.int1
        return result

    InterpreterBuilder.binary_op = binary_op


def _patch_once_a_launch() -> None:
    import inspect

    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    done: set[frozenset[int]] = set()

    @functools.cache
    def languages(fn: Any) -> frozenset[int]:
        modules = (v for v in fn.__globals__.values() if inspect.ismodule(v))
        return frozenset(id(m) for m in modules if m in (tl, tl.core))

    def patch_lang(fn: Any) -> Any:
        if languages(fn) in done:
            return interpreter._LangPatchScope()
        done.add(languages(fn))
        scope = original(fn)
        # Triton 3.6 converts arrays of one element, which numpy 2.4 refuses.
        scope.set_attr(tl.core.tensor, "__index__", lambda self: int(self.handle.data.item()))
        return scope

    run_grid = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()  # the end of the launch before restored the functions
        return run_grid(self, *args, **kwargs)

    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = call


def _mend_atomics() -> None:
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def written_out(value: Any) -> Any:
        if isinstance(value, TensorHandle) and not value.data.flags.c_contiguous:
            return TensorHandle(np.ascontiguousarray(value.data), value.dtype)
        return value

    original_cas = InterpreterBuilder.create_atomic_cas
    original_rmw = InterpreterBuilder.create_atomic_rmw

    def create_atomic_cas(self: Any, *args: Any) -> Any:
        return original_cas(self, *map(written_out, args))

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, value: Any, mask: Any, *args: Any) -> Any:
        ptr, value, mask = map(written_out, (ptr, value, mask))
        if op == ir.ATOMIC_OP.FADD and value.dtype.scalar == tl.bfloat16:
            before = _add_bfloat16(ptr.data.ravel(), value, mask.data.ravel())
            return TensorHandle(before.reshape(value.data.shape), tl.bfloat16)
        return original_rmw(self, op, ptr, value, mask, *args)

    InterpreterBuilder.create_atomic_cas = create_atomic_cas
    InterpreterBuilder.create_atomic_rmw = create_atomic_rmw


def _add_bfloat16(ptrs: Any, value: Any, mask: Any) -> Any:
    """Adds one element after the other, each rounded, and returns what each found there."""
    from triton._C.libtriton import interpreter

    numbers = as_float32(value).data.ravel()
    before = np.zeros(ptrs.shape, np.uint16)
    pending = np.flatnonzero(mask)
    while pending.size > 0:
        _, firsts = np.unique(ptrs[pending], return_index=True)  # of each address
        now = pending[firsts]
        all_of = np.ones(now.shape, np.bool_)
        before[now] = interpreter.load(
            ptrs[now], all_of, np.zeros(now.shape, np.uint16), np.dtype(np.uint16)
        )
        sums = (before[now].astype(np.uint32) << 16).view(np.float32) + numbers[now]
        interpreter.store(ptrs[now], bfloat16_bits(sums), all_of)
        pending = np.delete(pending, firsts)
    return before
