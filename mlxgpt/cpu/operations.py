"""The operations of a GPT on the CPU's kernels, each with its gradient beside it.

What they compute, and the papers they come from, stands in model/ops.py. x, y and the like are Arrays (array.py),
weights are Parameters or a Quantized of some (model/ops.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import extension
from .array import Array, Deferred
from .memory import empty
from .tape import Gradient, Parameter, ParameterGradient, PartOfGradient, Seeds, Tape

_core = extension.core


def _rows(x: np.ndarray | None) -> Any:
    """(..., C) -> (N, C). None for None."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def _matrix(weight: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A matrix as kernels take it: its values, and of quantized ones the scales and biases too."""
    if hasattr(weight, "scales"):
        return weight.weight.values, {"scales": weight.scales.values, "biases": weight.biases.values}
    return weight.values, {}


def _gradient_of(weight: Any) -> ParameterGradient | None:
    """The gradient of a Parameter that is trained. None for one that is frozen, for quantized weights and for None."""
    return getattr(weight, "gradient", None)


def _memory(gradient: ParameterGradient | None) -> np.ndarray | None:
    """What a kernel adds a parameter's gradient to. None for None."""
    return None if gradient is None else gradient.memory()


def _values(parameter: Any) -> np.ndarray | None:
    return None if parameter is None else parameter.values


class Linear(Deferred):
    """scale x W^T + b, which a sum or a GELU that reads it computes in the same pass."""

    __slots__ = ()

    def __init__(self, x: Array, weight: Any, bias: Any, scale: float = 1.0) -> None:
        shape = (*x.shape[:-1], weight.shape[0])
        gradient = x.tape.gradient_for(shape, x, weight, bias)

        def kernel(gradient: Gradient | None, residual: Array | None = None, **activated: Any) -> np.ndarray:
            out, (matrix, parts) = empty(shape), _matrix(weight)
            added = None if residual is None else _rows(residual.values)
            _core.linear_forward(
                _rows(x.values), matrix, _values(bias), _rows(out), residual=added, scale=scale, **parts, **activated
            )
            backward = _linear_backward(x, weight, bias, scale, None if residual is None else residual.gradient)
            x.tape.record(gradient, backward)
            return out

        super().__init__(shape, x.tape, gradient, kernel)

    def activate(self, activation: str) -> np.ndarray:
        """Computes the values, and in the same pass their GELU, which is returned."""
        activated = empty(self.shape)
        # only a linear layer's kernel takes these, which the type Kernel does not say
        self._values = self.kernel(self.gradient, activated=_rows(activated), activation=activation)  # type: ignore[call-arg]
        del self.kernel
        return activated


def _linear_backward(
    x: Array, weight: Any, bias: Any, scale: float, dresidual: Gradient | None
) -> Callable[[np.ndarray], None]:
    """dx = dout W, dW += dout^T x, db += the sum of dout's rows, and the residual stream's gradient is dout itself."""
    matrix, dweight, dbias, dx = getattr(weight, "values", None), _gradient_of(weight), _gradient_of(bias), x.gradient
    x_values = x.for_backward() if dweight is not None else None
    gelu = x.recompute if isinstance(x.recompute, _Gelu) and dx is not None else None

    def backward(dout: np.ndarray) -> None:
        rows = _rows(dout if scale == 1 else dout * np.float32(scale))
        if gelu is not None:  # back through the GELU as well, in the same pass
            gelu.linear_backward(rows, matrix, dweight, dbias)
        else:
            into = None if dx is None else dx.memory()
            of_x = None if x_values is None else _rows(x_values())
            _core.linear_backward(rows, of_x, matrix, _rows(into), _memory(dweight), _memory(dbias), accumulate=True)
            if dx is not None and into is not None:
                dx.add(into)
        if dresidual is not None:
            dresidual.add(dout)

    return backward


def linear(x: Array, weight: Any, bias: Any = None) -> Array:
    return Linear(x, weight, bias)


def scaled_linear(x: Array, weight: Any, scale: float) -> Array:
    return Linear(x, weight, None, scale)


class _Gelu:
    """The GELU of an array, computed once more where its values are wanted in the backward pass."""

    def __init__(self, pre: np.ndarray, gradient: Gradient | None, activation: str) -> None:
        self.pre, self.gradient, self.activation = pre, gradient, activation

    def __call__(self) -> np.ndarray:
        out = empty(self.pre.shape)
        _core.gelu_forward(_rows(self.pre), _rows(out), self.activation)
        return out

    def linear_backward(
        self,
        dout: np.ndarray,
        matrix: np.ndarray | None,
        dweight: ParameterGradient | None,
        dbias: ParameterGradient | None,
    ) -> None:
        """The backward pass of a linear layer that reads the GELU, and of the GELU: its values, which the weight's
        gradient needs, are computed in passing."""
        assert self.gradient is not None
        dpre, pre = self.gradient.memory(), _rows(self.pre)
        activated = None if dweight is None else _rows(empty(self.pre.shape))
        _core.linear_backward(
            dout, None, matrix, _rows(dpre), None, None, pre=pre, activated=activated, activation=self.activation
        )
        _core.linear_backward(dout, activated, matrix, None, _memory(dweight), _memory(dbias), accumulate=True)
        self.gradient.add(dpre)


def gelu(x: Array, activation: str) -> Array:
    if isinstance(x, Linear) and not x.is_computed:
        out = x.activate(activation)
    else:
        out = empty(x.shape)
        _core.gelu_forward(_rows(x.values), _rows(out), activation)
    pre, dx, gradient = x.values, x.gradient, x.tape.gradient_for(x.shape, x)

    def backward(dout: np.ndarray) -> None:
        _core.gelu_backward(_rows(pre), _rows(dout), activation)
        dx.add(dout)  # type: ignore[union-attr]  # recorded only where x wants a gradient

    x.tape.record(gradient, backward)
    return Array(out, x.tape, gradient, _Gelu(pre, dx, activation))


def embeddings(ids: Array, tokens: Any, positions: Any, offsets: np.ndarray | None) -> Array:
    at, T = np.ascontiguousarray(ids.values, np.int32), ids.shape[1]
    out = empty((*ids.shape, tokens.shape[1]))
    matrix, parts = _matrix(tokens)
    places = positions.values[:T] if offsets is None else positions.values
    _core.embedding_forward(at, matrix, places, out, offsets=offsets, **parts)
    gradient = ids.tape.gradient_for(out.shape, tokens, positions)
    dtokens, dpositions = _gradient_of(tokens), _gradient_of(positions)

    def backward(dout: np.ndarray) -> None:
        into = _memory(dpositions)
        _core.embedding_backward(at, dout, _memory(dtokens), None if into is None else into[:T])

    ids.tape.record(gradient, backward)
    return Array(out, ids.tape, gradient)


def layer_norm(x: Array, weight: Any, bias: Any, eps: float) -> Array:
    rows, dx = _rows(x.values), x.gradient
    mean, rstd = empty((len(rows),)), empty((len(rows),))
    shape, scale, shift = x.shape, weight.values, _values(bias)
    dweight, dbias = _gradient_of(weight), _gradient_of(bias)

    def compute() -> np.ndarray:
        out = empty(shape)
        _core.layer_norm_forward(rows, scale, shift, eps, _rows(out), mean, rstd)
        return out

    def backward(dout: np.ndarray) -> None:
        # The gradient that came along the residual stream is added to in place.
        present = None if dx is None else dx.take()
        into = empty(shape) if present is None else present
        _core.layer_norm_backward(
            _rows(dout), rows, scale, mean, rstd, _rows(into), _memory(dweight), _memory(dbias),
            add_to_dx=present is not None, accumulate=True,
        )  # fmt: skip
        if dx is not None:
            dx.add(into)

    gradient = x.tape.gradient_for(shape, x, weight, bias)
    x.tape.record(gradient, backward)
    return Array(compute(), x.tape, gradient, compute)


def dropout(x: Array, p: float) -> Array:
    if p == 0:
        return x
    tape, shape, dx, seed = x.tape, x.shape, x.gradient, x.tape.seeds.next()

    def kernel(gradient: Gradient | None, residual: Array | None = None) -> np.ndarray:
        out = empty(shape)
        _core.dropout(x.values, None if residual is None else residual.values, p, seed, out)
        dresidual = None if residual is None else residual.gradient

        def backward(dout: np.ndarray) -> None:
            if dx is not None:
                into = dx.memory()
                _core.dropout(dout, None, p, seed, into)
                dx.add(into)
            if dresidual is not None:
                dresidual.add(dout)

        tape.record(gradient, backward)
        return out

    return Deferred(shape, tape, tape.gradient_for(shape, x), kernel)


def _heads(x: np.ndarray, n_head: int) -> np.ndarray:
    """(B, T, C) seen as (B, n_head, T, head_dim)."""
    return x.reshape(*x.shape[:2], n_head, -1).swapaxes(1, 2)


def _third(qkv: np.ndarray, n: int, n_head: int) -> np.ndarray:
    """The queries (0), keys (1) or values (2) of (B, T, 3C), seen as (B, n_head, T, head_dim)."""
    C = qkv.shape[-1] // 3
    return _heads(qkv[..., n * C : (n + 1) * C], n_head)


def split_heads(qkv: Array, n_head: int) -> tuple[Array, Array, Array]:
    values, whole = qkv.values, qkv.gradient

    def part(n: int) -> Array:
        gradient = None if whole is None else PartOfGradient(whole, lambda array: _third(array, n, n_head))
        return Array(_third(values, n, n_head), qkv.tape, gradient)

    return part(0), part(1), part(2)


def attention(q: Array, k: Array, v: Array, dropout_p: float) -> Array:
    B, n_head, T, head_dim = q.shape
    arrays = [x.values for x in (q, k, v)]
    options = dict(scale=head_dim**-0.5, dropout=dropout_p, seed=q.tape.seeds.next() if dropout_p else 0)
    # In memory (B, T, n_head, head_dim), as merge_heads wants it.
    out, lse = empty((B, T, n_head, head_dim)).swapaxes(1, 2), empty((B, n_head, T))
    _core.attention_forward(*arrays, out, lse, **options)
    gradients = [x.gradient for x in (q, k, v)]

    def backward(dout: np.ndarray) -> None:
        into = [empty(a.shape) if g is None else g.memory() for a, g in zip(arrays, gradients, strict=True)]
        _core.attention_backward(*arrays, out, lse, dout, *into, **options)
        for gradient, contribution in zip(gradients, into, strict=True):
            if gradient is not None:
                gradient.add(contribution)

    gradient = q.tape.gradient_for(out.shape, q, k, v)
    q.tape.record(gradient, backward)
    return Array(out, q.tape, gradient)


def cached_attention(q: Array, k: Array, v: Array, keys: np.ndarray, values: np.ndarray, offsets: np.ndarray) -> Array:
    B, n_head, T, head_dim = q.shape
    out = empty((B, T, n_head, head_dim)).swapaxes(1, 2)
    _core.attention_cached(q.values, k.values, v.values, keys, values, offsets, out, scale=head_dim**-0.5)
    return Array(out, q.tape)


def merge_heads(y: Array) -> Array:
    B, n_head, T, head_dim = y.shape
    merged = y.values.swapaxes(1, 2).reshape(B, T, n_head * head_dim)  # not copied: attention writes it so
    dy, gradient = y.gradient, y.tape.gradient_for(merged.shape, y)

    def backward(dout: np.ndarray) -> None:
        dy.add(_heads(dout, n_head))  # type: ignore[union-attr]  # recorded only where y wants a gradient

    y.tape.record(gradient, backward)
    return Array(merged, y.tape, gradient)


def linear_cross_entropy(x: Array, weight: Any, targets: Array) -> Array:
    tape, rows, dx, dweight = x.tape, _rows(x.values), x.gradient, _gradient_of(weight)
    ids = np.ascontiguousarray(targets.values, np.int32).reshape(-1)  # (N,)
    matrix, parts = _matrix(weight)
    gradient = tape.gradient_for((), x, weight)
    scale = tape.loss_scale or np.float32(1)

    def loss_and_gradients() -> tuple[float, np.ndarray | None]:
        into = None if dx is None else dx.memory()
        outputs = _rows(into), _memory(dweight)
        return _core.linear_cross_entropy(rows, matrix, ids, *outputs, accumulate=True, scale=scale), into

    # Where the loss's gradient is known beforehand, the logits are computed once for the loss and for its gradient.
    at_once = loss_and_gradients() if gradient is not None and tape.loss_scale else None
    value = at_once[0] if at_once else _core.linear_cross_entropy(rows, matrix, ids, **parts)

    def backward(dloss: np.ndarray) -> None:
        _, into = at_once or loss_and_gradients()
        if dloss != scale:  # in MLX's graph, where no other gradient is in the weight's memory yet
            for array in (into, _memory(dweight)):
                if array is not None:
                    array *= dloss / scale
        if dx is not None and into is not None:
            dx.add(into)

    tape.record(gradient, backward)
    return Array(np.array(value, np.float32), tape, gradient)


def recomputed(module: nn.Module, x: Array) -> Array:
    parameters = (value for _, value in tree_flatten(dict(module)))  # type: ignore[str-unpack]
    tape, before, values, dx = x.tape, x.tape.seeds.count, x.values, x.gradient
    out = module(Array(values, Tape(records=False, seeds=tape.seeds))).values
    trained = (p for p in parameters if isinstance(p, Parameter))
    gradient = tape.gradient_for(out.shape, x, *trained)

    def backward(dout: np.ndarray) -> None:
        again = Tape(loss_scale=float(tape.loss_scale), seeds=Seeds(tape.seeds.first, before))
        inner = Array(values, again, None if dx is None else Gradient(x.shape))
        module(inner).backward(dout)
        if dx is not None and inner.gradient is not None and (contribution := inner.gradient.take()) is not None:
            dx.add(contribution)

    tape.record(gradient, backward)
    return Array(out, tape, gradient)


def adamw(
    parameters: list[mx.array], gradients: list[mx.array], m: list[mx.array], v: list[mx.array], **options: Any
) -> float:
    """A step of AdamW in place, on evaluated arrays that nobody else holds -> the norm of all gradients.

    m and v are the averages of the gradients and of their squares. Parameters of two or more dimensions are
    decayed. If the norm is not finite nothing is written. Options: learning_rate, beta1, beta2, eps, weight_decay,
    step (from 1), max_norm to clip to (0 for none). Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
    """
    return _core.adamw(parameters, gradients, m, v, [p.ndim >= 2 for p in parameters], **options)
