"""The keys and values of positions already computed, so that each new token costs one position."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np

# MLX's arrays grow by so many positions at a time: what runs on them is compiled anew for each size, and attention
# reads all of it.
_GROWTH = 256


class LayerCache:
    """The keys and values of one layer, each (B, n_head, size, head_dim); None before they are first written.

    Those of the kernels are NumPy arrays for all block_size positions: memory that is not written to costs nothing.
    """

    def __init__(self, offsets: Any, block_size: int, storage: Any) -> None:
        """offsets (B,) int32 are the KVCache's own. storage is the NumPy type of the kernels' arrays."""
        self.offsets = offsets
        self.keys: Any = None
        self.values: Any = None
        self._block_size, self._storage = block_size, storage
        self._capacity = 0  # positions that MLX's arrays have room for

    def arrays(self, like: Any) -> tuple[Any, Any]:
        """Keys and values, made like `like` (.., n_head, .., head_dim) if they are not there yet."""
        if self.keys is None:
            B, n_head, head_dim = len(self.offsets), like.shape[1], like.shape[3]
            if isinstance(like, mx.array):
                shape = (B, n_head, self._capacity, head_dim)
                self.keys, self.values = mx.zeros(shape, like.dtype), mx.zeros(shape, like.dtype)
            else:
                shape = (B, n_head, self._block_size, head_dim)
                self.keys, self.values = np.zeros(shape, self._storage), np.zeros(shape, self._storage)
        return self.keys, self.values

    def write(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Writes the keys and values of T new positions, (B, n_head, T, head_dim), into MLX's arrays.

        -> keys and values (B, n_head, size, head_dim), and where the new positions lie in them, (B, T).
        """
        keys, values = self.arrays(like=k)
        positions = mx.array(self.offsets)[:, None] + mx.arange(k.shape[2])  # (B, T)
        into = mx.broadcast_to(positions[:, None, :, None], k.shape)  # (B, n_head, T, head_dim)
        self.keys = mx.put_along_axis(keys, into, k, axis=2)
        self.values = mx.put_along_axis(values, into, v, axis=2)
        return self.keys, self.values, positions

    def grow(self, capacity: int) -> None:
        """Makes MLX's arrays long enough for so many positions."""
        self._capacity = capacity
        if isinstance(self.keys, mx.array) and self.keys.shape[2] < capacity:
            B, n_head, size, head_dim = self.keys.shape
            more = mx.zeros((B, n_head, capacity - size, head_dim), self.keys.dtype)
            self.keys, self.values = (mx.concatenate([a, more], axis=2) for a in (self.keys, self.values))

    def put(self, b: int, one: LayerCache, n: int) -> None:
        """The first n positions of sequence b become those of the one sequence in another cache."""
        for mine, other in zip(self.arrays(like=one.keys), (one.keys, one.values), strict=True):
            mine[b, :, :n] = other[0, :, :n]


class KVCache:
    """The keys and values of every layer, for B sequences that may be of different lengths.

    Of sequence b the first offsets[b] positions count, offsets (B,) int32; what lies behind is never read, so that a
    smaller offset takes positions back. The arrays are NumPy's on the CPU's kernels, stored as `dtype` (bfloat16 as its
    bits in uint16), elsewhere MLX's, of the type that the model computes in.
    """

    def __init__(self, n_layer: int, block_size: int, batch_size: int = 1, dtype: mx.Dtype = mx.float32) -> None:
        storage = {mx.float16: np.float16, mx.bfloat16: np.uint16}.get(dtype, np.float32)
        self.block_size = block_size
        self.offsets: Any = np.zeros(batch_size, np.int32)
        self._capacity = 0  # positions that MLX's arrays have room for
        self.layers = [LayerCache(self.offsets, block_size, storage) for _ in range(n_layer)]

    @classmethod
    def over(cls, offsets: mx.array, keys: list[mx.array], values: list[mx.array]) -> KVCache:
        """A cache over arrays that are there, as a compiled function sees it. Nothing is checked in it."""
        cache = cls(len(keys), keys[0].shape[2])
        cache.offsets = offsets
        for layer, k, v in zip(cache.layers, keys, values, strict=True):
            layer.offsets, layer.keys, layer.values = offsets, k, v
        return cache

    @property
    def keys(self) -> list[Any]:
        return [layer.keys for layer in self.layers]

    @property
    def values(self) -> list[Any]:
        return [layer.values for layer in self.layers]

    def replace(self, keys: Iterable[Any], values: Iterable[Any]) -> None:
        """Puts other arrays in the place of every layer's keys and values."""
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            layer.keys, layer.values = k, v

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
        capacity = min(self.block_size, -(-n // _GROWTH) * _GROWTH)
        if capacity > self._capacity:
            self._capacity = capacity
            for layer in self.layers:
                layer.grow(capacity)

    def advance(self, T: int) -> None:
        """Counts T more positions of every sequence, when all layers have written them."""
        self.offsets += T

    def put(self, b: int, one: KVCache) -> None:
        """Sequence b becomes a copy of the one sequence that another cache holds."""
        n = int(one.offsets[0])
        self._grow(n)
        for layer, other in zip(self.layers, one.layers, strict=True):
            layer.put(b, other, n)
        self.offsets[b] = n

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, once they are there."""
        return sum(array.nbytes for array in (*self.keys, *self.values) if array is not None)
