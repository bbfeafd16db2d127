"""Less memory in training: what the backward pass of a block keeps of the forward pass, and what it recomputes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..common.modules import with_parameters
from ..cpu import operations as kernels
from ..cpu.array import Array as CPUArray
from . import ops
from .differentiable import Differentiable, after

Array = TypeVar("Array", mx.array, CPUArray)


def recomputed(module: nn.Module, x: Array, keeps_products: bool) -> Array:
    """module(x), whose backward pass calls the module again. x (...) -> what the module returns.

    It keeps x alone or, with keeps_products, the results of linear layers and attention too: layer norms, GELUs and
    dropout cost little to compute again. Dropout draws the same masks both times. Chen et al. 2016,
    https://arxiv.org/abs/1604.06174; Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 5.
    """
    if isinstance(x, CPUArray):  # the kernels keep no more than this by themselves
        return module(x) if keeps_products else kernels.recomputed(module, x)
    first = _FirstPass(keeps_products)
    trained: dict[str, mx.array] = dict(tree_flatten(module.trainable_parameters()))  # type: ignore[arg-type]  # pairs

    def call(activations: ops.Activations, x: mx.array, *weights: mx.array) -> mx.array:
        with ops.activations_in(activations):
            return with_parameters(module, tree_unflatten(list(zip(trained, weights, strict=True))) or {})(x)

    def backward(arrays: Sequence[mx.array], _: mx.array, cotangent: mx.array) -> list[mx.array]:
        x, *weights = arrays
        second = functools.partial(call, _SecondPass(first, cotangent))
        dx, *dweights = mx.vjp(second, [after(x, [cotangent]), *weights], [cotangent])[1]
        # MLX is free to leave the weights' gradients for later, and would then hold the activations of all blocks.
        return [after(dx, dweights), *dweights]

    return Differentiable(functools.partial(call, first), backward)(x, *trained.values())


class _FirstPass(ops.Activations):
    """Keeps what the second pass needs."""

    def __init__(self, keeps_products: bool) -> None:
        self.keys: list[mx.array] = []  # of the dropout masks
        self.products: list[mx.array] | None = [] if keeps_products else None

    def mask_key(self) -> mx.array:
        self.keys.append(super().mask_key())
        return self.keys[-1]

    def product(self, function: Differentiable, *arrays: mx.array) -> mx.array:
        output = function.forward(*arrays)
        if self.products is not None:
            self.products.append(output)
        return output


class _SecondPass(ops.Activations):
    """Uses what the first pass has kept, once the gradient of the block's output is there.

    Otherwise MLX is free to call all blocks again before it goes back through the last one; and where it compiles
    them, it would find that both passes compute the same, and keep the first one's results after all.
    """

    def __init__(self, first: _FirstPass, cotangent: mx.array) -> None:
        self._cotangent = cotangent
        self._keys = iter(first.keys)
        self._products: Iterator[mx.array] | None = None if first.products is None else iter(first.products)
        first.keys, first.products = [], None  # held by nobody else, they are freed when they have been used

    def mask_key(self) -> mx.array:
        return after(next(self._keys), [self._cotangent])

    def product(self, function: Differentiable, *arrays: mx.array) -> mx.array:
        if self._products is None:
            return function(*arrays)
        return function.recalled(after(next(self._products), [self._cotangent]), *arrays)
