"""A model's methods on the CPU's kernels: how MLX's arrays enter the CPU path, and results come out of it.

A method marked `entry` computes by MLX's operations, unless the kernels can compute it. Then it runs on Arrays, over a
copy of the module tree whose leaves are Parameters (common/modules.py), and to MLX the whole method is one function
with a gradient of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..common.modules import with_parameters
from . import extension
from .array import Array
from .memory import pool, without_bfloat16
from .tape import Parameter, ParameterGradient, Tape

Method = TypeVar("Method", bound=Callable[..., Any])


def runs(model: Any) -> bool:
    """Whether a model computes on the kernels where no gradient is wanted."""
    return extension.can_read(w.dtype for w in model.named_weights().values())


def trains(model: Any) -> bool:
    """Whether a model computes on the kernels where a gradient is wanted, which takes float32 weights."""
    return all(extension.available(w.dtype) for w in model.named_weights().values())


def entry(method: Method) -> Method:
    """Marks the methods of a model through which callers run it: MLX arrays in, one MLX array out.

    On the kernels the method runs at once. With a cache among its arguments (whatever is not an MLX array) the result
    has no gradient, and the parameters may be stored in any way; else they are float32.
    """

    @functools.wraps(method)
    def call(model: Any, *args: Any) -> Any:
        if args and isinstance(args[0], Array):  # called by OnKernels
            return method(model, *args)
        has_cache = any(a is not None and not isinstance(a, mx.array) for a in args)
        if not (runs(model) if has_cache else trains(model)):
            return method(model, *args)
        if has_cache:
            return mx.array(without_gradient(model, call, *args))
        return _differentiable(model, call, *args)

    return call  # type: ignore[return-value]


class OnKernels:
    """A model whose methods run on the kernels, over its parameters as they are now."""

    def __init__(self, model: Any, gradients: Mapping[str, ParameterGradient] | None = None) -> None:
        """gradients are those of the parameters that are trained, by name; without any, nothing is."""
        arrays = tree_map(without_bfloat16, model.parameters())
        mx.eval(arrays)
        self._model = with_parameters(model, tree_map(Parameter, arrays))
        if gradients:
            weights = dict(tree_flatten(arrays))
            trained = [(name, Parameter(weights[name], gradient)) for name, gradient in gradients.items()]
            self._model = with_parameters(self._model, tree_unflatten(trained))

    def run(self, method: Callable[..., Any], tape: Tape, *args: Any) -> Array:
        """Calls a method marked `entry`, as GPT.loss, of which NumPy arrays among the arguments become Arrays."""
        arrays = (Array(a, tape) if isinstance(a, np.ndarray) else a for a in args)
        try:
            output: Array = method(self._model, *arrays)
            output.compute()
        finally:
            pool.forget_unused()
        return output


def without_gradient(model: Any, method: Callable[..., Any], *args: Any) -> np.ndarray:
    """A model's method marked `entry`, as GPT.loss, run on the kernels: keeps nothing for a backward pass.

    Arrays among the arguments may be MLX's or NumPy's.
    """
    return OnKernels(model).run(method, Tape(records=False), *map(_to_numpy, args)).values


def _to_numpy(argument: Any) -> Any:
    return np.asarray(argument) if isinstance(argument, mx.array) else argument


def _differentiable(model: Any, method: Callable[..., Any], *args: Any) -> mx.array:
    """A model's method as a function in MLX's graph, whose gradient is the one that the tape gives."""
    arrays = [_to_numpy(a) for a in args]  # at once: where MLX compiles this, its arguments have no values yet
    weights = model.trainable_weights()
    gradients = {name: ParameterGradient(w.shape) for name, w in weights.items()}
    outputs: list[Array] = []

    @mx.custom_function
    def forward(*trained: mx.array) -> mx.array:
        # While a model is trained it is the loss that is asked for, and its gradient is computed with it.
        tape = Tape(loss_scale=1.0 if model.training else 0.0)
        outputs.append(OnKernels(model, gradients).run(method, tape, *arrays))
        return mx.array(outputs[0].values)

    @forward.vjp
    def backward(trained: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        if not outputs:
            raise ValueError("a model's gradient was asked for twice; call the model again")
        outputs.pop().backward(np.asarray(cotangent))
        return tuple(gradient.array for gradient in gradients.values())

    return forward(*weights.values())  # type: ignore[return-value]


class Repeated:
    """A model's method of ids (B, T) and a cache as a function of the ids alone, for many calls.

    The first call runs the method, and records the kernels that it calls together with the arrays that they are given.
    The calls after it replay the recording: nothing is left of Python's 60 us or so for each layer. Ids and the result
    are NumPy arrays; the result is overwritten by the next call. The parameters are those of the first call.
    """

    def __init__(self, model: Any, method: Callable[..., Any], cache: Any) -> None:
        self._model, self._method, self._cache = model, method, cache
        self._recording: Any = None

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        if self._recording is None:
            self._ids, recording = np.array(ids, np.int32), extension.core.Recording()
            with recording:
                self._output = without_gradient(self._model, self._method, self._ids, self._cache)
            self._recording = recording  # only now that it is whole
        else:
            self._ids[...] = ids
            self._cache.reserve(*ids.shape)
            self._recording.replay()
            self._cache.advance(ids.shape[1])
        return self._output
