"""The keys and values of positions already computed, so that each new token costs one position."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


class KVCache:
    """Keys and values of every layer, in arrays allocated once for all `block_size` positions.

    After `offset` positions, layer n holds k and v of shape (B, n_head, offset, head_dim).
    """

    def __init__(self, n_layer: int, block_size: int) -> None:
        self.block_size = block_size
        self.offset = 0  # positions that every layer holds
        self._layers: list[tuple[mx.array, mx.array] | None] = [None] * n_layer

    def append(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Adds T positions, k and v (B, n_head, T, head_dim), to a layer -> all it holds, (.., offset + T, ..).

        The last layer's append moves `offset` on. ValueError past block_size.
        """
        B, n_head, T, head_dim = k.shape
        end = self.offset + T
        if end > self.block_size:
            raise ValueError(f"cache: {self.offset} + {T} positions, at most block_size = {self.block_size}")
        held = self._layers[layer]
        if held is None:
            shape = (B, n_head, self.block_size, head_dim)
            zeros = np.zeros if isinstance(k, np.ndarray) else mx.zeros  # as the kernels or MLX make them
            held = (zeros(shape, k.dtype), zeros(shape, v.dtype))
        for buffer, new in zip(held, (k, v), strict=True):
            buffer[:, :, self.offset : end] = new
        self._layers[layer] = held
        if layer == len(self._layers) - 1:
            self.offset = end
        return held[0][:, :, :end], held[1][:, :, :end]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of all layers, once they are allocated."""
        return sum(buffer.nbytes for held in self._layers if held for buffer in held)
