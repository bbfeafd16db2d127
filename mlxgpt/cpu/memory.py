"""Memory of the CPU path: arrays that are used again, and MLX's arrays as NumPy sees them."""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import mlx.core as mx
import numpy as np

from . import extension


class Pool:
    """float32 arrays, each of which is used again once nobody else holds it.

    A step of training asks for the same sizes as the step before it, and fresh memory would cost a page fault for
    every 4 KB.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, list[np.ndarray]] = {}  # by the number of elements
        self._used: set[int] = set()  # blocks that were asked for since the last forget_unused

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of some shape, not initialised."""
        n = math.prod(shape)
        with self._lock:
            blocks = self._blocks.setdefault(n, [])
            counts = _reference_counts(blocks)
            if _HELD_BY_LIST in counts:
                block = blocks[counts.index(_HELD_BY_LIST)]
            else:
                block = np.empty(n, np.float32)
                blocks.append(block)
            self._used.add(id(block))
            return block.reshape(shape)

    def forget_unused(self) -> None:
        """Lets go of arrays that nobody asked for since the last time."""
        with self._lock:
            kept = {n: [b for b in blocks if id(b) in self._used] for n, blocks in self._blocks.items()}
            self._blocks = {n: blocks for n, blocks in kept.items() if blocks}
            self._used.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, those in use among them."""
        with self._lock:
            return sum(block.nbytes for blocks in self._blocks.values() for block in blocks)


def _reference_counts(blocks: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(block) for block in blocks]


# The count of an array that only a list holds; how much the loop itself adds depends on the interpreter.
(_HELD_BY_LIST,) = _reference_counts([np.empty(0)])

pool = Pool()
empty = pool.empty


def view(array: mx.array) -> np.ndarray:
    """The memory of an evaluated MLX array, not copied: what is written to it changes the MLX array."""
    return np.array(array, copy=False)


def without_bfloat16(array: mx.array) -> mx.array:
    """A bfloat16 array, of which the buffer protocol knows nothing, as its bits in uint16; any other as it is."""
    return array.view(mx.uint16) if array.dtype == mx.bfloat16 else array


def zero(arrays: list[mx.array]) -> None:
    """Fills MLX arrays with 0, in place."""
    mx.eval(arrays)
    for array in arrays:
        view(array).fill(0)


def copy(x: np.ndarray, out: np.ndarray) -> bool:
    """out = x -> whether every value of out is finite. Works without the extension too.

    x and out are (n,) or (rows, columns), of a floating-point type, bfloat16 as its bits in uint16. x may be a
    transposed matrix, and begin anywhere in memory. out is contiguous, and of x's type or float32.
    """
    x = x.view(x.dtype.newbyteorder("="))  # a mapped file's type says that it is little-endian
    if extension.is_there() and x.dtype != np.float64:
        return extension.core.copy(x, out)
    with np.errstate(all="ignore"):
        if x.dtype != np.uint16:
            out[...] = x
            return bool(np.isfinite(out.sum())) or bool(np.isfinite(out).all())  # a sum tells in one pass
        bits: Any = np.left_shift(x, 16, out=out.view(np.uint32), dtype=np.uint32) if out.dtype == np.float32 else out
        if bits is out:
            out[...] = x
        return not np.any(x & 0x7F80 == 0x7F80)
