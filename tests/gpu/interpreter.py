"""Triton's CPU interpreter made faithful and suspicious, for tests of the GPU kernels in a process of their own.

As it comes it multiplies the bit patterns of bfloat16, truncates where the GPU rounds, ignores the precision of dots,
and notices neither addresses out of range nor races. `install` mends the first three and checks the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
# Arithmetic that the interpreter would do on the bit patterns of bfloat16.
ARITHMETIC = (
    *("fadd", "fsub", "fmul", "fdiv", "precise_divf", "fneg", "fma", "exp", "exp2", "log", "log2", "sqrt", "fabs"),
    *("maximumf", "minimumf", "maxnumf", "minnumf", "fcmpOLT", "fcmpOGT", "fcmpOLE", "fcmpOGE", "fcmpOEQ", "fcmpUNE"),
)


@cache
def install() -> None:
    """Patch the interpreter of this process; once, however often it is called."""
    # The GPU says nothing when an exponential overflows; what comes of it is for the tests to see.
    np.seterr(over="ignore")
    Builder.cast_impl = _cast
    Builder.create_dot = _dot
    for name in ARITHMETIC:
        if hasattr(Builder, f"create_{name}"):
            setattr(Builder, f"create_{name}", _refusing_bfloat16(name))
    for operations in (interpreter.ReduceOps, interpreter.ScanOps):
        operations.check_tensor = _reduction_refusing_bfloat16(operations.check_tensor)
    Builder.create_masked_load = _checked_load
    Builder.create_masked_store = _checked_store
    interpreter.GridExecutor._init_args_hst = _remember_extents
    _patch_language_once_per_launch()
    _poison_empty_tensors()


def from_bfloat16(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: Any) -> Any:
    """Round to nearest even, as the GPU does."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(x))


def to_tf32(x: Any) -> Any:
    """Round to nearest even at 10 bits of mantissa."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 13) & 1) + np.uint32(0x0FFF))) & np.uint32(0xFFFFE000)
    special = (bits & 0x7F800000) == 0x7F800000
    return np.where(special, bits, rounded).astype(np.uint32).view(np.float32).reshape(x.shape)


def _cast(self: Any, source: Any, kind: Any, _old: Any = Builder.cast_impl) -> Any:
    before, after = source.dtype.scalar, kind.scalar
    if before == tl.bfloat16 and after != tl.bfloat16:
        wide = Handle(from_bfloat16(source.data), tl.float32)
        return wide if after == tl.float32 else _old(self, wide, kind)
    if after == tl.bfloat16 and before != tl.bfloat16:
        return Handle(to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
    return _old(self, source, kind)


def _dot(self: Any, a: Any, b: Any, total: Any, precision: Any, *rest: Any) -> Any:
    x, y = a.data, b.data
    kind = a.dtype.scalar
    assert kind == b.dtype.scalar, f"dot of {kind} and {b.dtype.scalar}"
    products = [(x, y)]
    if kind == tl.bfloat16:
        products = [(from_bfloat16(x), from_bfloat16(y))]
    elif precision == ir.INPUT_PRECISION.TF32:
        products = [(to_tf32(x), to_tf32(y))]
    elif precision == ir.INPUT_PRECISION.TF32x3:
        high_x, high_y = to_tf32(x), to_tf32(y)
        low_x, low_y = to_tf32(x - high_x), to_tf32(y - high_y)
        products = [(low_x, high_y), (high_x, low_y), (high_x, high_y)]
    result = total.data
    for left, right in products:
        result = result + np.matmul(left, right, dtype=total.data.dtype)
    return Handle(result, total.dtype.scalar)


def _refusing_bfloat16(name: str) -> Any:
    old = getattr(Builder, f"create_{name}")

    def create(self: Any, *arguments: Any) -> Any:
        if any(getattr(x, "dtype", None) is not None and x.dtype.scalar == tl.bfloat16 for x in arguments):
            raise TypeError(f"{name} of bfloat16 would compute on bit patterns; go to float32 first")
        return old(self, *arguments)

    return create


def _reduction_refusing_bfloat16(old: Any) -> Any:
    def check_tensor(self: Any, tensors: Any) -> Any:
        if any(getattr(getattr(x, "dtype", None), "scalar", None) == tl.bfloat16 for x in tensors):
            raise TypeError("a reduction or scan of bfloat16 would compute on bit patterns; go to float32 first")
        return old(self, tensors)

    return check_tensor


class Extents:
    """The tensors of a launch, and which program stored and loaded each of their elements.

    A program is a number of at least 0; -1 is none and -2 several.
    """

    def __init__(self, tensors: dict[str, Any]) -> None:
        by_address = {x.data_ptr(): (name, x) for name, x in tensors.items() if x.numel() > 0}
        self.addresses = np.array(sorted(by_address), np.uint64)
        ordered = [by_address[int(address)] for address in self.addresses]
        self.names = [name for name, _ in ordered]
        self.sizes = [x.element_size() for _, x in ordered]
        self.counts = [sum((s - 1) * st for s, st in zip(x.shape, x.stride(), strict=True)) + 1 for _, x in ordered]
        self.stored = [np.full(count, -1, np.int64) for count in self.counts]
        self.loaded = [np.full(count, -1, np.int64) for count in self.counts]

    def check(self, pointers: Any, mask: Any, program: int, is_store: bool) -> None:
        """Raise IndexError or RuntimeError if a program must not touch these addresses."""
        pointers, mask = np.broadcast_arrays(pointers, mask)
        touched = pointers[mask.astype(bool)]
        which = np.searchsorted(self.addresses, touched, "right").astype(np.int64) - 1
        for k in np.unique(which):
            self._check_tensor(int(k), touched[which == k], program, is_store)

    def _check_tensor(self, k: int, touched: Any, program: int, is_store: bool) -> None:
        kind = "store" if is_store else "load"
        if k < 0:
            raise IndexError(f"{kind} out of bounds, before every argument")
        element = ((touched - self.addresses[k]) // np.uint64(self.sizes[k])).astype(np.int64)
        if int(element.max()) >= self.counts[k]:
            raise IndexError(f"{kind} out of bounds near {self.names[k]}: {element.max()} of {self.counts[k]}")
        stored, loaded = self.stored[k], self.loaded[k]
        if not np.isin(stored[element], (-1, program)).all():
            raise RuntimeError(f"race on {self.names[k]}: program {program} {kind}s what another stored")
        if not is_store:
            loaded[element] = np.where(np.isin(loaded[element], (-1, program)), program, -2)
            return
        if not np.isin(loaded[element], (-1, program)).all():
            raise RuntimeError(f"race on {self.names[k]}: program {program} stores what another loaded")
        if np.unique(element).size != element.size:
            raise RuntimeError(f"one store writes an element of {self.names[k]} twice")
        stored[element] = program


_extents: list[Extents] = []


def _program(builder: Any) -> int:
    (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
    return int((x * height + y) * depth + z)


def _checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, _old: Any = Builder.create_masked_load) -> Any:
    _extents[-1].check(pointers.data, mask.data, _program(self), is_store=False)
    return _old(self, pointers, mask, *rest)


def _checked_store(
    self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, _old: Any = Builder.create_masked_store
) -> Any:
    _extents[-1].check(pointers.data, mask.data, _program(self), is_store=True)
    return _old(self, pointers, value, mask, *rest)


def _remember_extents(
    self: Any, arguments: Any, kwargs: Any, _old: Any = interpreter.GridExecutor._init_args_hst
) -> Any:
    result = _old(self, arguments, kwargs)
    named = {**dict(zip(self.arg_names, result[0], strict=False)), **result[1]}
    _extents[:] = [Extents(dict(_tensors(named)))]
    return result


def _tensors(named: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensors among arguments, those in tuples too, by full name."""
    for name, x in named.items():
        if isinstance(x, tuple):
            fields = getattr(x, "_fields", map(str, range(len(x))))
            yield from _tensors({f"{name}.{field}": part for field, part in zip(fields, x, strict=True)})
        elif hasattr(x, "data_ptr"):
            yield name, x


def _patch_language_once_per_launch() -> None:
    """Every call of a helper patches the whole language module again, half of the time that the interpreter takes."""
    seen: set[int] = set()
    old = interpreter.GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **kwargs: Any) -> Any:
        seen.clear()
        return old(self, *arguments, **kwargs)

    def call(self: Any, *arguments: Any, **kwargs: Any) -> Any:
        key = id(self.fn.__globals__)
        if key not in seen:
            interpreter._patch_lang(self.fn)
            seen.add(key)
        return self.rewrite()(*arguments, **kwargs)

    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call


def _poison_empty_tensors() -> None:
    """Outputs that a kernel does not write are NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(old: Any) -> Any:
    def empty(*arguments: Any, **kwargs: Any) -> Any:
        result = old(*arguments, **kwargs)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    return empty
