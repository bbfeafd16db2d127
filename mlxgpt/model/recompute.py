"""Less memory in training: a block's activations are computed once more in the backward pass, not kept until then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..common.modules import with_parameters
from ..cpu import operations as kernels
from ..cpu.array import Array as CPUArray
from . import ops

Array = TypeVar("Array", mx.array, CPUArray)


def recomputed(module: nn.Module, x: Array) -> Array:
    """module(x), of which the backward pass keeps x alone: it calls the module again. x (...) -> what module returns.

    Dropout draws the same masks both times. Chen et al. 2016, https://arxiv.org/abs/1604.06174.
    """
    if isinstance(x, CPUArray):
        return kernels.recomputed(module, x)
    keys: list[mx.array] = []  # of the dropout masks

    def draw_key() -> mx.array:
        keys.append(ops.new_mask_key())
        return keys[-1]

    def forward(weights: dict[str, Any], x: mx.array, next_key: Callable[[], mx.array] = draw_key) -> mx.array:
        with ops.mask_keys_from(next_key):
            return with_parameters(module, weights)(x)

    call = mx.custom_function(forward)

    @call.vjp
    def backward(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        flat: dict[str, mx.array] = dict(tree_flatten(primals[0]))  # type: ignore[arg-type]
        # Otherwise MLX is free to call all modules again before it goes back through the last one, and to leave the
        # weights' gradients for later: then all activations are held after all.
        x, *same_keys = mx.depends([primals[1], *keys], [cotangent])

        def named(arrays: Sequence[mx.array]) -> Any:
            return tree_unflatten(list(zip(flat, arrays, strict=True)))

        def forward_again(x: mx.array, *weights: mx.array) -> mx.array:
            return forward(named(weights), x, iter(same_keys).__next__)

        _, gradients = mx.vjp(forward_again, [x, *flat.values()], [cotangent])
        (dx,) = mx.depends(gradients[:1], gradients[1:])
        return named(gradients[1:]), dx

    return call(module.trainable_parameters(), x)  # type: ignore[return-value]
