"""Mends the Triton interpreter, so that the kernels can be tested on machines without a GPU.

As it comes, the interpreter (Triton 3.6 to 3.9) is silently wrong where our kernels need it:

- bf16 tiles are held as their bits, and tl.dot multiplies those as integers; fp32 is truncated to bf16, not rounded.
- tl.dot ignores input_precision. Here "tf32" drops all but ten bits of the mantissas, as the tensor cores do, and
  "tf32x3" makes the three products that the compiler makes of the two parts of each operand.
- Descriptors have no atomic_add.
- A load or store may touch any address, and 32-bit offsets wrap around. Here an access outside of the tensors given to
  the kernel and an overflow raise, and a masked load without `other` gives NaN where the hardware gives anything.
- A tl.constexpr of a module that meets a tensor from the left makes a constexpr of it, which no function of tl takes.
- Each launch and each call of a device function maps all of tl anew, which takes longer than a small kernel, and every
  tensor works out its type anew; two threads that launch at once use each other's program ids; and 3.6 with NumPy 2.4
  has no loops over run-time bounds.

bf16 operands serve to load, cast, multiply with tl.dot, select and store. Other arithmetic on them raises.

Call `patch()` once, with TRITON_INTERPRET=1 set since before triton was imported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, InterpreterOptions, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_numbers import rounded_to_bf16, tf32_product, widened

_PRECISIONS = (ir.INPUT_PRECISION.IEEE, ir.INPUT_PRECISION.TF32, ir.INPUT_PRECISION.TF32x3)
_OPERATORS = [f"__{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "lt", "le", "gt", "ge")]
_launch_lock = threading.RLock()
_original: dict[str, Callable[..., Any]] = {}
_np_dtypes: dict[str, np.dtype] = {}
_reversed = False


def patch() -> None:
    """Replace what is wrong, for the rest of the process. A second call does nothing."""
    if _original:
        return
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    _original["_get_np_dtype"] = interpreter._get_np_dtype
    interpreter._get_np_dtype = _get_np_dtype
    # tl computes every integer sum and product twice, for an assertion that is off; _binary_op looks for overflows.
    interpreter.interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)
    for owner, methods in _MENDED.items():
        for name, method in methods.items():
            known = f"{owner.__name__}.{name}" if name == "__init__" else name
            _original[known] = getattr(owner, name, None)
            setattr(owner, name, method)


@contextmanager
def reversed_programs() -> Iterator[None]:
    """Run the programs of every grid in the opposite order: on a GPU they run in any."""
    global _reversed
    _reversed = True
    try:
        yield
    finally:
        _reversed = False


def _set_grid_idx(self: InterpreterBuilder, *index: int) -> None:
    if _reversed:
        index = tuple(size - 1 - i for size, i in zip(self.grid_dim, index, strict=True))
    _original["set_grid_idx"](self, *index)


def _launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
    with _launch_lock, np.errstate(all="ignore"):
        _original["__call__"](self, *args, **kwargs)


# ---- numbers


def _get_np_dtype(kind: tl.dtype) -> np.dtype:
    """As it was, without sixteen hashes of types a call."""
    kind = kind.scalar
    if kind.is_ptr():
        return np.dtype(np.uint64)
    if kind.name not in _np_dtypes:
        _np_dtypes[kind.name] = _original["_get_np_dtype"](kind)
    return _np_dtypes[kind.name]


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    if target.scalar == tl.bfloat16 and not _is_bf16(source):
        return TensorHandle(rounded_to_bf16(source.data.astype(np.float32)), tl.bfloat16)
    if _is_bf16(source) and target.scalar != tl.bfloat16:
        source = TensorHandle(widened(source.data), tl.float32)
    return _original["cast_impl"](self, source, target)


def _get_bf16(self: InterpreterBuilder, value: float) -> TensorHandle:
    return TensorHandle(rounded_to_bf16(np.array([value], np.float32)), tl.bfloat16)


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, imprecise: int
) -> TensorHandle:
    """a @ b + d, sums in fp32."""
    if precision not in _PRECISIONS or a.dtype.scalar not in (tl.float16, tl.bfloat16, tl.float32):
        raise NotImplementedError(f"tl.dot of {a.dtype.scalar} with input_precision {precision} is not interpreted")
    left, right = (widened(h.data) if _is_bf16(h) else h.data.astype(np.float32, copy=False) for h in (a, b))
    if a.dtype.scalar == tl.float32 and precision != ir.INPUT_PRECISION.IEEE:
        product = tf32_product(left, right, corrected=precision == ir.INPUT_PRECISION.TF32x3)
    else:
        product = left @ right
    return TensorHandle((product + d.data).astype(d.data.dtype, copy=False), d.dtype.scalar)


def _refuse_bf16(*handles: TensorHandle) -> None:
    if any(map(_is_bf16, handles)):
        raise NotImplementedError("arithmetic on bf16 is not interpreted: cast to fp32 first")


def _binary_op(self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, op: np.ufunc) -> TensorHandle:
    _refuse_bf16(left, right)
    result = _original["binary_op"](self, left, right, op)
    if op in (np.add, np.subtract, np.multiply) and left.dtype.scalar in (tl.int32, tl.uint32):
        exact = op(left.data.astype(np.int64), right.data.astype(np.int64))
        if not np.array_equal(exact, result.data):
            raise OverflowError(f"{op.__name__} of {left.dtype.scalar} overflows: {exact.min()} to {exact.max()}")
    return result


def _unary_op(self: InterpreterBuilder, argument: TensorHandle, op: np.ufunc) -> TensorHandle:
    _refuse_bf16(argument)
    return _original["unary_op"](self, argument, op)


def _leaving_tensors(name: str) -> Callable[..., Any]:
    """The operator `name` of tl.constexpr, but a tensor on its right decides, as in compiled kernels."""
    original = getattr(tl.constexpr, name)
    return lambda self, other: NotImplemented if isinstance(other, tl.tensor) else original(self, other)


def _fma(self: InterpreterBuilder, *args: TensorHandle) -> TensorHandle:
    _refuse_bf16(*args)
    return _original["create_fma"](self, *args)


def _check_reduced(self: Any, inputs: tuple[tl.tensor, ...]) -> None:
    _refuse_bf16(*(tensor.handle for tensor in inputs))
    _original["check_tensor"](self, inputs)


# ---- memory


class _Region:
    """The bytes between the first and the last element of a tensor given to the kernel that runs."""

    def __init__(self, tensor: Any) -> None:
        size, start = tensor.element_size(), tensor.data_ptr()
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.start, self.end = start, start + (last + 1) * size
        memory = {"data": (start, False), "shape": (self.end - start,), "typestr": "|u1", "version": 3}
        self.bytes = np.asarray(SimpleNamespace(__array_interface__=memory))


_regions: list[_Region] = []


def _collect_regions(value: Any) -> Iterator[_Region]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _collect_regions(item)
    elif isinstance(value, TensorDescriptor):
        yield from _collect_regions(value.base)
    elif hasattr(value, "data_ptr"):
        tensor = interpreter._unwrap_tensor(value)
        if tensor.numel():
            yield _Region(tensor)


def _prepare_arguments(self: GridExecutor, args: Any, kwargs: Any) -> tuple[Any, Any]:
    on_host = _original["_init_args_hst"](self, args, kwargs)
    _regions[:] = _collect_regions((*on_host[0], *on_host[1].values()))
    return on_host


def _nothing_to_bring_back(self: GridExecutor, *args: Any) -> None:
    """The tensors are on the CPU already; each of their storages would be copied to itself, untouched pages too."""


def _reach(pointers: TensorHandle, mask: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(elements of a region, indices into them, mask or None if all are touched).

    Raises IndexError unless every address touched lies within one tensor given to the kernel.
    """
    element = interpreter._get_np_dtype(pointers.get_element_ty())
    inside = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
    whole = bool(inside.all())
    touched = pointers.data if whole else pointers.data[inside]
    if not touched.size:
        return np.empty(1, element), np.zeros(pointers.data.shape, np.intp), inside
    low, high = int(touched.min()), int(touched.max()) + element.itemsize
    for region in _regions:
        if region.start <= low and high <= region.end:
            indices = (pointers.data - np.uint64(region.start)).astype(np.intp) // element.itemsize
            elements = region.bytes[: region.bytes.size // element.itemsize * element.itemsize].view(element)
            return elements, indices, None if whole else inside
    raise IndexError(f"the kernel touches addresses {low:#x} to {high:#x}, which are not within one of its tensors")


def _load(
    self: InterpreterBuilder, pointers: TensorHandle, mask: Any, other: TensorHandle | None, *hints: Any, **named: Any
) -> TensorHandle:
    elements, indices, inside = _reach(pointers, mask)
    kind = pointers.get_element_ty()
    if inside is None:
        return TensorHandle(elements[indices], kind)
    if other is not None:
        fill = other.data
    else:
        fill = elements.dtype.type(0x7FC0 if kind == tl.bfloat16 else np.nan if kind.is_floating() else -1)
    return TensorHandle(np.where(inside, elements[np.where(inside, indices, 0)], fill), kind)


def _store(self: InterpreterBuilder, pointers: TensorHandle, value: TensorHandle, mask: Any, *hints: Any) -> None:
    elements, indices, inside = _reach(pointers, mask)
    values = np.broadcast_to(value.data, indices.shape)
    if inside is not None:
        indices, values = indices[inside], values[inside]
    elements[indices] = values


def _atomic(
    self: InterpreterBuilder, operation: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *how: Any
) -> TensorHandle:
    if _is_bf16(value):
        raise NotImplementedError("atomics on bf16 are not interpreted")
    _reach(pointers, mask)
    return _original["create_atomic_rmw"](self, operation, pointers, value, mask, *how)


def _descriptor_reduce(
    self: InterpreterBuilder, kind: Any, descriptor: Any, value: TensorHandle, offsets: list[TensorHandle]
) -> None:
    if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD:
        raise NotImplementedError(f"descriptor reduction {kind} is not interpreted")
    pointers, mask = descriptor.materialize_pointers(offsets)
    mask = TensorHandle(np.asarray(mask.data, bool), tl.int1)
    add = ir.ATOMIC_OP.FADD if value.dtype.scalar.is_floating() else ir.ATOMIC_OP.ADD
    self.create_atomic_rmw(add, pointers, value, mask, ir.MEM_SEMANTIC.RELAXED, None)


# ---- speed: what depends on a shape alone is worked out once


_shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}


def _tensor_init(self: tl.tensor, handle: TensorHandle, kind: tl.dtype) -> None:
    shape = tuple(kind.shape) if kind.is_block() else ()
    if shape not in _shapes:
        _original["tensor.__init__"](self, handle, kind)
        _shapes[shape] = self.numel, self.shape
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.numel, self.shape = _shapes[shape]


def _block_type_init(self: tl.block_type, element: tl.dtype, shape: Any) -> None:
    key = element.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    if key not in _block_types:
        _original["block_type.__init__"](self, element, shape)
        _block_types[key] = dict(vars(self))
    vars(self).update(_block_types[key], element_ty=element)


def _min_max(self: Any, tensors: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
    """np.nanmax and np.nanmin as they are, without a warning where all is NaN."""
    quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}
    return _original["min_max"](self, tensors, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)


_MENDED: dict[type, dict[str, Callable[..., Any]]] = {
    GridExecutor: {
        "__call__": _launch,
        "_init_args_hst": _prepare_arguments,
        "_restore_args_dev": _nothing_to_bring_back,
    },
    interpreter.ReduceScanOpInterface: {"check_tensor": _check_reduced},
    interpreter.ReduceOps: {"min_max": _min_max},
    tl.tensor: {"__init__": _tensor_init},
    tl.block_type: {"__init__": _block_type_init},
    tl.constexpr: {name: _leaving_tensors(name) for name in _OPERATORS},
    InterpreterBuilder: {
        "set_grid_idx": _set_grid_idx,
        "cast_impl": _cast,
        "get_bf16": _get_bf16,
        "create_dot": _dot,
        "binary_op": _binary_op,
        "unary_op": _unary_op,
        "create_fma": _fma,
        "create_masked_load": _load,
        "create_masked_store": _store,
        "create_atomic_rmw": _atomic,
        "create_descriptor_reduce": _descriptor_reduce,
    },
}
