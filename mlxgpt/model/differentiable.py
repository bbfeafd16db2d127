"""MLX's operations with gradients written out, for training: they keep and compute less than the derived ones.

MLX derives the gradient of an expression from that of each step in it, and keeps the result of each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .matrices import Quantized, product, product_gradient


@dataclass(frozen=True)
class Differentiable:
    """A function of arrays, to an array, with its gradient.

    backward(arrays, output, cotangent) returns the gradient of each of the arrays.
    """

    forward: Callable[..., mx.array]
    backward: Callable[[Sequence[mx.array], mx.array, mx.array], Sequence[mx.array]]

    def __call__(self, *arrays: mx.array) -> mx.array:
        return self._custom(self.forward, arrays)

    def recalled(self, output: mx.array, *arrays: mx.array) -> mx.array:
        """`output`, which forward(*arrays) returned before, as a function of the arrays."""
        return self._custom(lambda *_: output, arrays)

    def _custom(self, forward: Callable[..., mx.array], arrays: Sequence[mx.array]) -> mx.array:
        function = mx.custom_function(forward)

        @function.vjp
        def vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
            if len(arrays) == 1:  # then MLX gives and takes an array, not a tuple
                return self.backward([primals], output, cotangent)[0]
            return tuple(self.backward(primals, output, cotangent))

        return function(*arrays)  # type: ignore[return-value]  # one array, as forward returns


def after(array: mx.array, others: Sequence[mx.array]) -> mx.array:
    """The same array, which is only there once the others are."""
    return mx.depends([array], list(others))[0] if others else array


def column_sums(rows: mx.array) -> mx.array:
    """The sum of rows (N, n) -> (n,).

    MLX adds numbers of half precision in half precision, where a sum of many stops growing. In its matrix products it
    adds in float32.
    """
    return rows.sum(axis=0) if rows.dtype == mx.float32 else (mx.ones((1, len(rows)), rows.dtype) @ rows)[0]


# ---- embedding ----


def rows(weight: mx.array, ids: mx.array) -> mx.array:
    """weight[ids]: weight (V, C), ids (...) -> (..., C). Its gradient is summed in float32: in bfloat16 that of a
    frequent id would stop growing."""

    def backward(_: Sequence[mx.array], __: mx.array, dy: mx.array) -> list[mx.array]:
        return [mx.zeros(weight.shape).at[ids].add(dy.astype(mx.float32)).astype(weight.dtype)]

    return Differentiable(lambda weight: weight[ids], backward)(weight)


# ---- linear ----


def _linear(x: mx.array, weight: mx.array, *bias: mx.array) -> mx.array:
    return mx.addmm(bias[0], x, weight.T) if bias else x @ weight.T


def _linear_backward(arrays: Sequence[mx.array], _: mx.array, dy: mx.array) -> list[mx.array]:
    x, weight, *bias = arrays
    n_out, n_in = weight.shape
    dy_rows, x_rows = dy.reshape(-1, n_out), x.reshape(-1, n_in)  # (..., n) -> (N, n)
    gradients = [dy_rows.T @ x_rows]  # (n_out, n_in)
    if bias:
        gradients.append(column_sums(dy_rows))  # (n_out,)
    return [dy @ weight, *gradients]


linear = Differentiable(_linear, _linear_backward)  # x (..., n_in), weight (n_out, n_in), bias (n_out,) or none


def linear_with(weight: Quantized) -> Differentiable:
    """x W^T with a quantized weight, as a function of x alone."""
    return Differentiable(lambda x: product(x, weight), lambda _, __, dy: [product_gradient(dy, weight)])


# ---- layer norm ----


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array:
    """MLX's layer norm over the last axis of x (..., C) -> (..., C)."""
    if x.dtype == mx.float32:
        return mx.fast.layer_norm(x, weight, bias, eps)

    def forward(x: mx.array, weight: mx.array, *bias: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, weight, bias[0] if bias else None, eps)

    def backward(arrays: Sequence[mx.array], _: mx.array, dy: mx.array) -> list[mx.array]:
        x, weight, *biases = arrays
        (dx,) = mx.vjp(lambda x: forward(x, weight), [x], [dy])[1]
        normalized, C = mx.fast.layer_norm(x, None, None, eps), x.shape[-1]
        sums = [dy * normalized, *(dy for _ in biases)]
        return [dx, *(column_sums(of_rows.reshape(-1, C)) for of_rows in sums)]  # (..., C) -> (N, C)

    return Differentiable(forward, backward)(x, weight, *([] if bias is None else [bias]))


# ---- GELU ----


def _gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.erf(x * math.sqrt(0.5)))


def _gelu_backward(arrays: Sequence[mx.array], _: mx.array, dy: mx.array) -> list[mx.array]:
    (x,) = arrays
    density = mx.exp(-0.5 * (x * x)) * (1 / math.sqrt(2 * math.pi))
    return [dy * (0.5 * (1 + mx.erf(x * math.sqrt(0.5))) + x * density)]


def _gelu_new(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def _gelu_new_backward(arrays: Sequence[mx.array], _: mx.array, dy: mx.array) -> list[mx.array]:
    (x,) = arrays
    squared = x * x
    tanh = mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (squared * x)))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * squared)  # of what the tanh is taken of
    return [dy * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope)]


gelu = Differentiable(_gelu, _gelu_backward)
gelu_new = Differentiable(_gelu_new, _gelu_new_backward)


# ---- dropout ----


def dropout_mask(p: float, shape: Sequence[int], key: mx.array, dtype: mx.Dtype) -> mx.array:
    """0 with probability p, else 1 / (1 - p)."""
    return (mx.random.bernoulli(1 - p, shape, key) * (1 / (1 - p))).astype(dtype)


def dropout(x: mx.array, p: float, key: mx.array) -> mx.array:
    """Dropout of x (...), whose mask is made from the key in each pass. -> (...)."""

    def masked(x: mx.array, key: mx.array = key) -> mx.array:
        return x * dropout_mask(p, x.shape, key, x.dtype)

    return Differentiable(masked, lambda _, __, dy: [masked(dy, after(key, [dy]))])(x)
