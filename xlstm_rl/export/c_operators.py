"""Operators of a traced step as C loops over arrays whose shapes and strides are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_rl.export.onnx_file import ExportError

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bool: "uint8_t",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
}


class Buffer:
    """An array of the C file.

    Args:
        name: in C.
        dtype: of its elements; one of `C_TYPES`.
        size: number of elements.
        values: of a constant, in its own shape; None where steps write.
        scratch: whether it is forgotten after a step.
    """

    def __init__(
        self, name: str, dtype: torch.dtype, size: int, values: Tensor | None = None, *, scratch: bool = False
    ) -> None:
        self.name, self.dtype, self.size, self.values, self.scratch = name, dtype, size, values, scratch
        # in which forms a constant is read; one that is read in neither is not written
        self.plain = self.quantized = False

    def read(self) -> str:
        """The name, for C that reads the array."""
        self.plain = True
        return self.name

    def read_quantized(self) -> tuple[str, str]:
        """Names of the array as int8, and of the scales of its rows, which lie along its last axis."""
        self.quantized = True
        return f"{self.name}_int8", f"{self.name}_scale"


class Value(NamedTuple):
    """A tensor of the traced graph: a view of a buffer."""

    buffer: Buffer
    view: Tensor
    """On the device "meta": shape, strides and offset."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.buffer.dtype

    def constant(self) -> Tensor | None:
        """Its elements where they are known when the file is written."""
        values = self.buffer.values
        if values is None:
            return None
        return values.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset())


class Statement(NamedTuple):
    """Lines of C, which read and write buffers by their names."""

    lines: list[str]
    reads: list[Buffer]
    writes: Buffer


def whole(buffer: Buffer, shape: Sequence[int]) -> Value:
    """All of a buffer, as a tensor of that shape."""
    return Value(buffer, torch.empty(tuple(shape), dtype=buffer.dtype, device="meta"))


# Of an element in terms of those of the arguments; {f} is the suffix of C's functions for the type.
ELEMENTWISE = {
    "aten.add.Tensor": "{0} + {1}",
    "aten.sub.Tensor": "{0} - {1}",
    "aten.mul.Tensor": "{0} * {1}",
    "aten.div.Tensor": "{0} / {1}",
    "aten.add.Scalar": "{0} + {1}",
    "aten.sub.Scalar": "{0} - {1}",
    "aten.mul.Scalar": "{0} * {1}",
    "aten.div.Scalar": "{0} / {1}",
    "aten.neg.default": "-{0}",
    "aten.abs.default": "fabs{f}({0})",
    "aten.exp.default": "exp{f}({0})",
    "aten.log.default": "log{f}({0})",
    "aten.log1p.default": "log1p{f}({0})",
    "aten.sqrt.default": "sqrt{f}({0})",
    "aten.rsqrt.default": "1 / sqrt{f}({0})",
    "aten.tanh.default": "tanh{f}({0})",
    "aten.erf.default": "erf{f}({0})",
    "aten.sigmoid.default": "1 / (1 + exp{f}(-{0}))",
    # other than C's fmin and fmax they keep NaN
    "aten.relu.default": "{0} < 0 ? 0 : {0}",
    "aten.minimum.default": "{1} < {0} || isnan({1}) ? {1} : {0}",
    "aten.maximum.default": "{1} > {0} || isnan({1}) ? {1} : {0}",
    "aten.where.self": "{0} ? {1} : {2}",
    "aten.pow.Tensor_Scalar": "pow{f}({0}, {1})",
    "aten.eq.Scalar": "{0} == {1}",
    "aten.eq.Tensor": "{0} == {1}",
    "aten.ne.Scalar": "{0} != {1}",
    "aten.gt.Scalar": "{0} > {1}",
    "aten.gt.Tensor": "{0} > {1}",
    "aten.ge.Scalar": "{0} >= {1}",
    "aten.lt.Scalar": "{0} < {1}",
    "aten.lt.Tensor": "{0} < {1}",
    "aten.le.Scalar": "{0} <= {1}",
    "aten.le.Tensor": "{0} <= {1}",
    "aten.logical_not.default": "!{0}",
    "aten.bitwise_not.default": "!{0}",
    "aten.logical_and.default": "{0} && {1}",
    "aten.logical_or.default": "{0} || {1}",
    "aten.bitwise_or.Tensor": "{0} | {1}",
    "aten.bitwise_and.Tensor": "{0} & {1}",
}
_VIEWS = {
    "aten.permute.default",
    "aten.unsqueeze.default",
    "aten.squeeze.dims",
    "aten.squeeze.dim",
    "aten.select.int",
    "aten.slice.Tensor",
    "aten.expand.default",
    "aten.split_with_sizes.default",
}
_SAME = {"aten.alias.default", "aten.clone.default", "aten.detach.default"}
_RESHAPES = {"aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"}

# What the loops call.
FUNCTIONS = """\
/* Eight sums side by side, which compilers turn into vector instructions. */
#define DEFINE_DOT(NAME, TYPE)                                  \\
    static inline float NAME(const float *a, const TYPE *b, int n) { \\
        float sums[8] = {0}, total = 0;                         \\
        int i = 0;                                              \\
        for (; i + 8 <= n; i += 8)                              \\
            for (int j = 0; j < 8; j++) sums[j] += a[i + j] * (float)b[i + j]; \\
        for (; i < n; i++) total += a[i] * (float)b[i];         \\
        for (int j = 0; j < 8; j++) total += sums[j];           \\
        return total;                                           \\
    }
DEFINE_DOT(dot, float)
DEFINE_DOT(dot_int8, int8_t)

static inline void normalize_row(const float *x, float *y, int n, float epsilon) {
    float mean = 0, variance = 0;
    for (int i = 0; i < n; i++) mean += x[i];
    mean /= n;
    for (int i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    const float scale = 1 / sqrtf(variance / n + epsilon);
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * scale;
}
"""


class Lowering:
    """Turns the nodes of a traced graph into statements, in their order.

    Args:
        int8: store the weights of matrix products as int8, with a scale for each row.
    """

    def __init__(self, *, int8: bool) -> None:
        self.statements: list[Statement] = []
        self.constants: list[Buffer] = []
        self._int8 = int8
        self._count = 0
        self._operators: dict[str, Callable[..., Any]] = {
            "aten._to_copy.default": self._cast,
            "aten.clamp.default": self._clamp,
            "aten.clamp.Tensor": self._clamp,
            "aten.gelu.default": self._gelu,
            "aten.cat.default": self._cat,
            "aten.sum.dim_IntList": self._sum,
            "aten.mean.dim": self._mean,
            "aten.mm.default": self._mm,
            "aten.addmm.default": self._addmm,
            "aten.bmm.default": self._bmm,
            "aten.argmax.default": self._argmax,
            "aten.native_layer_norm.default": self._layer_norm,
        }

    def lower(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """The value, or the list of values, of a node.

        Args:
            target: its operator.
            args, kwargs: of the call, with a `Value` for each tensor.
            result: what the tracer noted of it: a tensor without numbers, or several.

        Raises:
            ExportError: the operator has no form in C here.
        """
        name = str(target)
        if name in _SAME:
            return args[0]
        if name in _VIEWS:
            made = target(args[0].view, *args[1:], **kwargs)
            return Value(args[0].buffer, made) if isinstance(made, Tensor) else [Value(args[0].buffer, v) for v in made]
        if name in _RESHAPES:
            return self._reshaped(args[0], args[1])
        if all(value.constant() is not None for value in _values_in(args)):
            return self._folded(target, args, kwargs)
        if name in ELEMENTWISE:
            return self._elementwise(ELEMENTWISE[name], name, args, kwargs, result)
        if name not in self._operators:
            raise _no_form(name)
        return self._operators[name](*args, result=result, **kwargs)

    def constant(self, name: str, values: Tensor) -> Value:
        """A constant array."""
        values = values.detach().cpu().contiguous()
        buffer = Buffer(name, values.dtype, values.numel(), values)
        self.constants.append(buffer)
        return whole(buffer, values.shape)

    def kept(self, value: Value) -> Value:
        """The same in scratch memory, unless it lies there already."""
        return value if value.buffer.scratch else self._copied(value)

    def write_to(self, target: Buffer, value: Value) -> None:
        """Copy a value to where the caller looks for it."""
        self._map("{0}", [value], whole(target, value.view.shape), value.dtype)

    def _new(self, shape: Sequence[int], dtype: torch.dtype) -> Value:
        self._count += 1
        buffer = Buffer(f"t{self._count}", dtype, math.prod(shape), scratch=True)
        return whole(buffer, shape)

    def _folded(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        """The result of an operation on what is known now."""
        given = _known(list(args))
        options = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "layout")}
        self._count += 1
        return self.constant(f"c{self._count}", target(*given, **options))

    def _write(self, lines: Sequence[str], reads: Sequence[Any], out: Value) -> Value:
        read = [value.buffer for value in reads if isinstance(value, Value)]
        self.statements.append(Statement(list(lines), read, out.buffer))
        return out

    def _map(self, expression: str, operands: Sequence[Any], out: Value, compute: torch.dtype) -> Value:
        """Every element of `out` as an expression of elements of operands, which are values or numbers."""
        if not out.view.numel():
            # C has no arrays without elements
            return out
        seen = [value.view.expand(out.view.shape) if isinstance(value, Value) else None for value in operands]
        views = [out.view, *(view for view in seen if view is not None)]
        loops = _Loops(tuple(out.view.shape), [view.stride() for view in views])
        places = iter([loops.place(index, view.storage_offset()) for index, view in enumerate(views)])
        target = f"{out.buffer.name}[{next(places)}]"
        terms = [
            _element(value, next(places), compute) if isinstance(value, Value) else literal(value, compute)
            for value in operands
        ]
        suffix = "f" if compute == torch.float32 else ""
        return self._write(loops.around([f"{target} = {expression.format(*terms, f=suffix)};"]), operands, out)

    def _elementwise(
        self, expression: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> Value:
        compute = result.dtype
        if compute == torch.bool:
            compute = args[0].dtype
        elif name.startswith("aten.bitwise"):
            raise _no_form(f"{name} of {result.dtype}")
        if not compute.is_floating_point:
            expression = expression.replace(" || isnan({1})", "")
        alpha = kwargs.get("alpha", 1)
        if alpha != 1:
            expression = expression.replace("{1}", f"{literal(alpha, compute)} * {{1}}")
        return self._map(expression, args, self._new(result.shape, result.dtype), compute)

    def _copied(self, value: Value) -> Value:
        return self._map("{0}", [value], self._new(value.view.shape, value.dtype), value.dtype)

    def _contiguous(self, value: Value) -> Value:
        return value if value.view.is_contiguous() else self._copied(value)

    def _reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        try:
            return Value(value.buffer, value.view.view(shape))
        # strides do not allow it
        except RuntimeError:
            copied = self._copied(value)
            return Value(copied.buffer, copied.view.view(shape))

    def _cast(self, value: Value, *, result: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Value:
        if result.dtype == value.dtype:
            return value
        expression = "{0} != 0" if result.dtype == torch.bool else "{0}"
        compute = value.dtype if result.dtype == torch.bool else result.dtype
        return self._map(expression, [value], self._new(result.shape, result.dtype), compute)

    def _clamp(self, value: Value, low: Any = None, high: Any = None, *, result: Tensor, **_: Any) -> Value:
        bounds = {"<": low, ">": high}
        operands, expression = [value], "{0}"
        for sign, bound in bounds.items():
            if bound is not None:
                operands.append(bound)
                # where the first bound has done its work, the second looks at what it made
                mark = f"{{{len(operands) - 1}}}"
                expression = f"{{0}} {sign} {mark} ? {mark} : {expression}"
        return self._map(expression, operands, self._new(result.shape, result.dtype), result.dtype)

    def _gelu(self, value: Value, *, result: Tensor, approximate: str = "none") -> Value:
        half, root, slope, cubic = (
            literal(number, result.dtype) for number in (0.5, math.sqrt(0.5), math.sqrt(2 / math.pi), 0.044715)
        )
        inside = {
            "none": f"erf{{f}}({root} * {{0}})",
            "tanh": f"tanh{{f}}({slope} * ({{0}} + {cubic} * {{0}} * {{0}} * {{0}}))",
        }[approximate]
        expression = f"{half} * {{0}} * (1 + {inside})"
        return self._map(expression, [value], self._new(result.shape, result.dtype), result.dtype)

    def _cat(self, values: Sequence[Value], dim: int = 0, *, result: Tensor) -> Value:
        out, start = self._new(result.shape, result.dtype), 0
        for value in values:
            size = value.view.shape[dim]
            self._map("{0}", [value], Value(out.buffer, out.view.narrow(dim, start, size)), out.dtype)
            start += size
        return out

    def _sum(self, value: Value, dims: Sequence[int] | None, keep: bool = False, *, result: Tensor, **_: Any) -> Value:
        return self._reduced(value, dims, result, "")

    def _mean(self, value: Value, dims: Sequence[int] | None, keep: bool = False, *, result: Tensor, **_: Any) -> Value:
        count = value.view.numel() // max(1, math.prod(result.shape))
        return self._reduced(value, dims, result, f" / {count}")

    def _reduced(self, value: Value, dims: Sequence[int] | None, result: Tensor, after: str) -> Value:
        out = self._new(result.shape, result.dtype)
        view = value.view
        summed = [dim % view.ndim for dim in (dims or range(view.ndim))]
        kept = [dim for dim in range(view.ndim) if dim not in summed]
        ordered = view.permute(*kept, *summed)
        rows = out.view.view([view.shape[dim] for dim in kept])
        outer = _Loops(rows.shape, [rows.stride(), ordered.stride()[: len(kept)]])
        inner = _Loops(ordered.shape[len(kept) :], [ordered.stride()[len(kept) :]], first=outer.depth)
        place = _sum_of([outer.place(1, view.storage_offset()), inner.place(0, 0)])
        lines = [
            f"{C_TYPES[out.dtype]} sum = 0;",
            *inner.around([f"sum += {_element(value, place, out.dtype)};"]),
            f"{out.buffer.name}[{outer.place(0, 0)}] = sum{after};",
        ]
        return self._write(outer.around(lines), [value], out)

    def _argmax(self, value: Value, dim: int | None = None, keep: bool = False, *, result: Tensor) -> Value:
        out = self._new(result.shape, result.dtype)
        view = value.view.reshape(-1) if dim is None else value.view.movedim(dim, -1)
        outer = _Loops(view.shape[:-1], [_strides_of(view.shape[:-1]), view.stride()[:-1]])
        at, step = outer.place(1, view.storage_offset()), view.stride(-1)
        name = value.buffer.read()
        lines = [
            "int best = 0;",
            f"for (int k = 1; k < {view.shape[-1]}; k++)",
            f"    if ({name}[{_sum_of([at, f'{step} * k'])}] > {name}[{_sum_of([at, f'{step} * best'])}]) best = k;",
            f"{out.buffer.name}[{outer.place(0, 0)}] = best;",
        ]
        return self._write(outer.around(lines), [value], out)

    def _layer_norm(
        self,
        value: Value,
        shape: Sequence[int],
        weight: Value | None,
        bias: Value | None,
        epsilon: float,
        *,
        result: Sequence[Tensor],
    ) -> list[Value]:
        value = self._contiguous(value)
        normalized = self._new(value.view.shape, value.dtype)
        size, start = math.prod(shape), value.view.storage_offset()
        call = f"normalize_row({value.buffer.read()} + {start} + {size} * i0, {normalized.buffer.name} + {size} * i0, "
        loop = f"for (int i0 = 0; i0 < {value.view.numel() // size}; i0++)"
        self._write([loop, f"    {call}{size}, {literal(epsilon, torch.float32)});"], [value], normalized)
        out = normalized
        for sign, operand in (("*", weight), ("+", bias)):
            if operand is not None:
                target = self._new(value.view.shape, value.dtype)
                out = self._map(f"{{0}} {sign} {{1}}", [out, operand], target, value.dtype)
        return [out]

    def _mm(self, left: Value, right: Value, *, result: Tensor) -> Value:
        out = self._new(result.shape, result.dtype)
        self._product(left, right, None, Value(out.buffer, out.view[None]))
        return out

    def _addmm(self, bias: Value, left: Value, right: Value, *, result: Tensor) -> Value:
        out = self._new(result.shape, result.dtype)
        seen = Value(bias.buffer, bias.view.expand(result.shape)[None])
        self._product(left, right, seen, Value(out.buffer, out.view[None]))
        return out

    def _bmm(self, left: Value, right: Value, *, result: Tensor) -> Value:
        out = self._new(result.shape, result.dtype)
        self._product(left, right, None, out)
        return out

    def _product(self, left: Value, right: Value, bias: Value | None, out: Value) -> None:
        """[B, M, K] times [B, K, N], by rows of weights where they lie in rows."""
        if left.buffer.values is not None and right.buffer.values is None:
            # weights on the left: the same product turned over
            left, right = (Value(value.buffer, value.view.mT) for value in (right, left))
            bias = None if bias is None else Value(bias.buffer, bias.view.mT)
            out = Value(out.buffer, out.view.mT)
        x, w = (value.view if value.view.ndim == 3 else value.view[None] for value in (left, right))
        inner = x.shape[2]
        outer = _Loops(
            tuple(out.view.shape),
            [
                out.view.stride(),
                (x.stride(0), x.stride(1), 0),
                (w.stride(0), 0, w.stride(2)),
                *([] if bias is None else [bias.view.stride()]),
            ],
            merge=False,
        )
        target = f"{out.buffer.name}[{outer.place(0, 0)}]"
        start = "0" if bias is None else f"{bias.buffer.read()}[{outer.place(3, bias.view.storage_offset())}]"
        x_at, w_at = outer.place(1, x.storage_offset()), outer.place(2, w.storage_offset())
        reads = [left, right, bias]
        if w.stride(1) == 1 and (x.stride(2) == 1 or inner == 1):
            values = right.buffer.values
            if self._int8 and values is not None and values.shape[-1] == inner:
                rows, scales = right.buffer.read_quantized()
                dot = (
                    f"{scales}[({w_at}) / {inner}] * dot_int8({left.buffer.read()} + {x_at}, {rows} + {w_at}, {inner})"
                )
            else:
                dot = f"dot({left.buffer.read()} + {x_at}, {right.buffer.read()} + {w_at}, {inner})"
            self._write(outer.around([f"{target} = {start} + {dot};"]), reads, out)
            return
        self._write(outer.around([f"{target} = {start};"]), reads, out)
        sums = _Loops(
            (x.shape[0], x.shape[1], inner, w.shape[2]),
            [
                (out.view.stride(0), out.view.stride(1), 0, out.view.stride(2)),
                (x.stride(0), x.stride(1), x.stride(2), 0),
                (w.stride(0), 0, w.stride(1), w.stride(2)),
            ],
            merge=False,
        )
        factors = [
            f"{value.buffer.read()}[{sums.place(index, view.storage_offset())}]"
            for index, (value, view) in enumerate(((left, x), (right, w)), 1)
        ]
        target = f"{out.buffer.name}[{sums.place(0, 0)}]"
        self._write(sums.around([f"{target} += {factors[0]} * {factors[1]};"]), reads, out)


class _Loops:
    """Nested loops over an index space, and the places of elements of several arrays in it.

    Args:
        shape: of the index space.
        strides: of every array.
        first: number of the first loop variable.
        merge: make one loop of two where every array allows it.
    """

    def __init__(
        self, shape: Sequence[int], strides: Sequence[Sequence[int]], *, first: int = 0, merge: bool = True
    ) -> None:
        axes = [(size, [stride[dim] for stride in strides]) for dim, size in enumerate(shape) if size != 1]
        merged: list[tuple[int, list[int]]] = []
        for size, steps in axes:
            if merge and merged and all(a == b * size for a, b in zip(merged[-1][1], steps, strict=True)):
                merged[-1] = (merged[-1][0] * size, steps)
            else:
                merged.append((size, steps))
        self._axes, self._first = merged, first

    @property
    def depth(self) -> int:
        """Number of the next free loop variable."""
        return self._first + len(self._axes)

    def place(self, array: int, offset: int | torch.SymInt) -> str:
        """Index of the element of an array."""
        terms = [str(offset)] if offset else []
        for index, (_, steps) in enumerate(self._axes):
            if steps[array]:
                factor = "" if steps[array] == 1 else f"{steps[array]} * "
                terms.append(f"{factor}i{self._first + index}")
        return _sum_of(terms)

    def around(self, lines: Sequence[str]) -> list[str]:
        """Lines inside the loops, in a scope of their own if there are several."""
        if not self._axes and len(lines) > 1:
            return ["{", *(f"    {line}" for line in lines), "}"]
        out = []
        for index, (size, _) in enumerate(self._axes):
            variable = f"i{self._first + index}"
            brace = " {" if index == len(self._axes) - 1 and len(lines) > 1 else ""
            out.append("    " * index + f"for (int {variable} = 0; {variable} < {size}; {variable}++){brace}")
        pad = "    " * len(self._axes)
        out += [pad + line for line in lines]
        if self._axes and len(lines) > 1:
            out.append("    " * (len(self._axes) - 1) + "}")
        return out


def _no_form(operator: str) -> ExportError:
    return ExportError(
        f"the operator {operator} of this policy has no form in C here: export it as ONNX, to a file that ends in .onnx"
    )


def _values_in(arguments: Any) -> Iterator[Value]:
    """All values in nested lists."""
    if isinstance(arguments, Value):
        yield arguments
    elif isinstance(arguments, list | tuple):
        for argument in arguments:
            yield from _values_in(argument)


def _known(argument: Any) -> Any:
    """The same with the elements of constants in their places."""
    if isinstance(argument, Value):
        return argument.constant()
    return [_known(part) for part in argument] if isinstance(argument, list | tuple) else argument


def literal(number: float | bool, dtype: torch.dtype) -> str:
    """A number in C, exact in that type."""
    if not dtype.is_floating_point:
        return str(int(number))
    if math.isinf(number):
        return "-INFINITY" if number < 0 else "INFINITY"
    if math.isnan(number):
        return "NAN"
    text = f"{number:.9g}" if dtype == torch.float32 else f"{number:.17g}"
    text += "" if set(text) & set(".e") else ".0"
    return text + ("f" if dtype == torch.float32 else "")


def _element(value: Value, place: str, compute: torch.dtype) -> str:
    constant = value.constant()
    if constant is not None and constant.numel() == 1:
        return literal(constant.item(), compute)
    text = f"{value.buffer.read()}[{place}]"
    # what is asked for its truth is not converted
    return text if value.dtype in (compute, torch.bool) else f"({C_TYPES[compute]}){text}"


def _strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


def _sum_of(terms: Sequence[str]) -> str:
    return " + ".join(term for term in terms if term != "0") or "0"
