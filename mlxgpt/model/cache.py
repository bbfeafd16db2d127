"""The keys and values of positions already computed, so that each new token costs one position."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

# MLX's arrays grow by so many positions: what runs on them is compiled anew for each size, and attention reads
# all of it.
_GROWTH = 256


class KVCache:
    """Keys and values of every layer, for B sequences that may be of different lengths.

    keys[n] and values[n] of layer n are (B, n_head, capacity, head_dim), None before they are first written. Of
    sequence b the first offsets[b] positions count, offsets (B,) int32; what lies behind is never read, so that a
    smaller offset takes positions back. NumPy arrays on the CPU's kernels, for all block_size positions at once
    (memory that is not written to costs nothing), stored as `dtype`, bfloat16 by its bits in uint16; elsewhere
    MLX's, of the type that the model computes in.
    """

    def __init__(self, n_layer: int, block_size: int, batch_size: int = 1, dtype: mx.Dtype = mx.float32) -> None:
        self.block_size = block_size
        self._storage = {mx.float16: np.float16, mx.bfloat16: np.uint16}.get(dtype, np.float32)
        self.capacity = 0  # positions that MLX's arrays have room for
        self.offsets: Any = np.zeros(batch_size, np.int32)
        self.keys: list[Any] = [None] * n_layer
        self.values: list[Any] = [None] * n_layer

    @classmethod
    def of(cls, offsets: mx.array, keys: list[mx.array], values: list[mx.array]) -> KVCache:
        """Over arrays that are there: how a compiled function sees a cache. Nothing is checked in it."""
        cache = cls(0, keys[0].shape[2])
        cache.offsets, cache.keys, cache.values = offsets, list(keys), list(values)
        return cache

    def reserve(self, B: int, T: int) -> None:
        """Makes room for T more positions of each of B sequences. ValueError past block_size, and for another B."""
        if not isinstance(self.offsets, np.ndarray):  # in a compiled function: done before it was called
            return
        if len(self.offsets) != B:
            raise ValueError(f"cache: it is of {len(self.offsets)} sequences, expected {B}")
        held = int(self.offsets.max())
        if held + T > self.block_size:
            raise ValueError(f"cache: {held} + {T} positions, at most block_size = {self.block_size}")
        self._grow(held + T)

    def _grow(self, n: int) -> None:
        """Makes MLX's arrays long enough for n positions."""
        self.capacity = max(self.capacity, min(self.block_size, -(-n // _GROWTH) * _GROWTH))
        for arrays in (self.keys, self.values):
            for layer, array in enumerate(arrays):
                if isinstance(array, mx.array) and array.shape[2] < self.capacity:
                    more = (*array.shape[:2], self.capacity - array.shape[2], array.shape[3])
                    arrays[layer] = mx.concatenate([array, mx.zeros(more, array.dtype)], axis=2)

    def layer(self, n: int, like: Any) -> tuple[Any, Any]:
        """The keys and values of layer n, made if they are not there, as `like` is, keys (.., n_head, .., head_dim)."""
        if self.keys[n] is None:
            on_kernels = isinstance(like, np.ndarray)
            capacity = self.block_size if on_kernels else self.capacity
            shape = (len(self.offsets), like.shape[1], capacity, like.shape[3])
            for arrays in (self.keys, self.values):
                arrays[n] = np.zeros(shape, self._storage) if on_kernels else mx.zeros(shape, like.dtype)
        return self.keys[n], self.values[n]

    def advance(self, T: int) -> None:
        """Counts T more positions of every sequence, when all layers have written them."""
        self.offsets += T

    def put(self, b: int, one: KVCache) -> None:
        """Sequence b becomes a copy of the one that another cache holds."""
        n = int(one.offsets[0])
        self._grow(n)
        for layer, (keys, values) in enumerate(zip(one.keys, one.values, strict=True)):
            self.layer(layer, like=keys)
            self.keys[layer][b, :, :n] = keys[0, :, :n]
            self.values[layer][b, :, :n] = values[0, :, :n]
        self.offsets[b] = n

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, once they are there."""
        return sum(array.nbytes for array in (*self.keys, *self.values) if array is not None)
