"""A linear layer's matrix, an array or quantized, and products with it by MLX's operations."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Quantized(NamedTuple):
    """A matrix (n_out, n_in) in groups along its rows: scale * number + bias, as mx.quantize makes it."""

    weight: mx.array  # (n_out, n_in * bits / 32) uint32
    scales: mx.array  # (n_out, n_in / group_size)
    biases: mx.array  # as scales
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[0], self.scales.shape[1] * self.group_size

    @property
    def bits(self) -> int:
        return self.weight.shape[1] * 32 // self.shape[1]

    @property
    def dtype(self) -> mx.Dtype:
        """What products with it are computed in on a GPU."""
        return self.scales.dtype


Matrix = mx.array | Quantized


def product(x: mx.array, matrix: Matrix) -> mx.array:
    """x W^T. x (..., n_in), matrix (n_out, n_in) -> (..., n_out)."""
    return _quantized(x, matrix, True) if isinstance(matrix, Quantized) else x @ matrix.T


def product_gradient(dy: mx.array, matrix: Matrix) -> mx.array:
    """dy W, the gradient of x in x W^T. dy (..., n_out), matrix (n_out, n_in) -> (..., n_in)."""
    return _quantized(dy, matrix, False) if isinstance(matrix, Quantized) else dy @ matrix


def _quantized(x: mx.array, matrix: Quantized, transpose: bool) -> mx.array:
    packed, scales, biases, group_size = matrix
    return mx.quantized_matmul(x, packed, scales, biases, transpose=transpose, group_size=group_size, bits=matrix.bits)
