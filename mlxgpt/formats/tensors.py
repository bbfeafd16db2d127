"""Tensors that are read when they are needed, and views of them that are read no sooner."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FLOATS = ("float32", "float16", "bfloat16")  # what the weights of a model may be
_SMALL_FILE_PART = 65536  # bytes, which are read sooner than they are mapped
_BLOCK_ELEMENTS = 1 << 22  # of a tensor that is changed block by block: 16 MB of float32


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array that is read when it is needed.

    dtype is torch's name without "torch.". read() gives an array of that shape, read-only and mapped from the
    file where it can be, with the file's strides; bfloat16 comes as its bits in uint16. read() raises ValueError
    when the bytes are damaged (CRC) or the file has changed since it was opened.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    memory: Any = field(default=None, repr=False, compare=False)  # equal for two views of the same elements

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


def numpy_dtype(dtype: str) -> np.dtype:
    """The NumPy type of a Tensor's array: little-endian, and uint16 for bfloat16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder("<")


def in_file(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor whose row-major elements begin at a byte of a file. read() raises ValueError if the file has become
    shorter."""
    of_numpy = numpy_dtype(dtype)

    def read() -> np.ndarray:
        if math.prod(shape) * of_numpy.itemsize <= _SMALL_FILE_PART:
            return np.fromfile(path, of_numpy, math.prod(shape), offset=offset).reshape(shape)
        return np.memmap(path, of_numpy, "r", offset, shape)  # unmapped when nobody holds the array any more

    return Tensor(dtype, shape, read)


def zeros(dtype: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(dtype, shape, lambda: np.zeros(shape, numpy_dtype(dtype)))


def transposed(tensor: Tensor) -> Tensor:
    """A matrix (m, n) as (n, m)."""
    return Tensor(tensor.dtype, tensor.shape[::-1], lambda: tensor.read().T)


def first_rows(tensor: Tensor, n: int) -> Tensor:
    return Tensor(tensor.dtype, (n, *tensor.shape[1:]), lambda: tensor.read()[:n])


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, compared without holding either whole."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.memory is not None and a.memory == b.memory:
        return True
    return all(
        np.ascontiguousarray(a.read()[rows]).tobytes() == np.ascontiguousarray(b.read()[rows]).tobytes()
        for rows in row_blocks(a)
    )


def is_zero(tensor: Tensor) -> bool:
    """Whether every element is 0."""
    return not np.any(to_float32(tensor.read(), tensor.dtype))


def cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A tensor in another of the FLOATS, rounded to the nearest.

    read() raises ValueError, with the tensor's name, for a finite value that float16 can't hold.
    """
    if tensor.dtype == dtype:
        return tensor

    def rounded(values: np.ndarray) -> np.ndarray:
        if dtype == "bfloat16":
            return _to_bfloat16(values)
        with np.errstate(over="ignore"):
            result = values.astype(dtype)
        if dtype == "float16" and not np.array_equal(np.isinf(result), np.isinf(values)):
            raise ValueError(f"{name} holds {np.abs(values).max():g}, more than float16's 65504: say --dtype bfloat16")
        return result

    def read() -> np.ndarray:
        result = np.empty(tensor.shape, numpy_dtype(dtype))
        for rows in row_blocks(tensor):  # read anew for each block, so that the pages of earlier ones are unmapped
            result[rows] = rounded(to_float32(tensor.read()[rows], tensor.dtype))
        return result

    return Tensor(dtype, tensor.shape, read)


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """The values of an array that Tensor.read gave, in float32: exact, for bfloat16 is float32's upper half."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16 in uint16, rounded to the nearest, and to even where two are as near."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result = rounded.astype(np.uint16)
    if (nan := np.isnan(values)).any():  # rounding could make an infinity of it
        result[nan] = (bits[nan] >> 16) | 0x40
    return result


def row_blocks(tensor: Tensor) -> Iterator[Any]:
    """Indices that each take some of a tensor's rows, of about 16 MB in float32, and together all of them."""
    if not tensor.shape:
        yield ()
        return
    n = max(1, _BLOCK_ELEMENTS // max(1, math.prod(tensor.shape[1:])))
    for first in range(0, tensor.shape[0], n):
        yield slice(first, first + n)


def reporting(content: Any, done: Callable[[int], None]) -> Any:
    """Nested dictionaries and lists with each Tensor in them replaced by one that tells `done` how many bytes it has
    read. A Tensor that is there twice stays one object."""
    replaced: dict[int, Tensor] = {}

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(v) for key, v in value.items()}
        if isinstance(value, list):
            return [replace(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        if id(value) not in replaced:

            def read() -> np.ndarray:
                array = value.read()
                done(array.nbytes)
                return array

            replaced[id(value)] = Tensor(value.dtype, value.shape, read)
        return replaced[id(value)]

    return replace(content)
