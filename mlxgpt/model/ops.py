"""The seam between devices: each operation of a GPT, once, with its shapes.

On a GPU an operation is MLX's own: lazy, and compiled with the graph around it. Without the C++ extension,
or with MLXGPT_KERNELS=0, it is that on a CPU too. On a CPU with the extension a model's methods marked `entry`
run on NumPy arrays, and an operation that is given one is a kernel: see kernels.py.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..cpu import operations as kernels
from .cache import KVCache

entry = kernels.entry

Array = TypeVar("Array", mx.array, np.ndarray)


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


def use_device(name: str) -> mx.Device:
    """Makes "cpu", "gpu" or "auto" (the GPU where MLX has one) the default device, and returns it.

    ValueError where MLX has no GPU.
    """
    has_gpu = mx.is_available(mx.gpu)
    if name == "gpu" and not has_gpu:
        raise ValueError("device is gpu, but MLX has no GPU here; expected cpu or auto")
    device = mx.Device(mx.gpu if has_gpu and name != "cpu" else mx.cpu)
    mx.set_default_device(device)
    return device


def on_kernels(model: nn.Module) -> bool:
    """Whether a model generates on the CPU's kernels, and its results are to be NumPy arrays."""
    return kernels.runs(model)


def repeated(method: Callable[..., Any], cache: KVCache) -> Callable[[Any], Any]:
    """A model's method marked `entry`, of ids (B, T) and a cache, as a function of the ids alone, to be called often.

    The T positions follow those that the cache holds, and are added to it; T and B stay the same. On the CPU's
    kernels the calls of the first time are recorded and made again, on NumPy arrays, and the result is overwritten
    by the next call; elsewhere it is compiled, once for each size that the cache's arrays grow to.
    ValueError where the cache is full.
    """
    if on_kernels(method.__self__):  # type: ignore[attr-defined]
        return kernels.Repeated(method, cache)
    model, body = method.__self__, method.__wrapped__  # type: ignore[attr-defined]

    @functools.partial(mx.compile, inputs=model.state)
    def step(ids: mx.array, offsets: mx.array, keys: list[mx.array], values: list[mx.array]) -> Any:
        inner = KVCache.of(offsets, keys, values)
        return body(model, ids, inner), inner.keys, inner.values

    def call(ids: mx.array) -> mx.array:
        if cache.keys[0] is None:
            return method(ids, cache)
        cache.reserve(*ids.shape)
        # The cache's own arrays are not held here: those that nobody else holds are written in place.
        output, cache.keys, cache.values = step(ids, mx.array(cache.offsets), cache.keys, cache.values)
        cache.advance(ids.shape[1])
        return output

    return call


def checkpointed(module: nn.Module, x: Array, *args: Any) -> Array:
    """module(x, *args), of which the backward pass keeps x alone: it calls the module again. x (...) -> an array.

    Dropout draws the same masks both times. Chen et al. 2016, https://arxiv.org/abs/1604.06174.
    """
    if isinstance(x, np.ndarray):
        return kernels.checkpointed(module, x, *args)
    keys: list[mx.array] = []

    def run(weights: dict[str, Any], x: mx.array, again: Iterable[mx.array] = ()) -> mx.array:
        held = module.parameters()
        module.update(weights)
        _masks.drawn, _masks.again = keys, iter(again)
        try:
            return module(x, *args)
        finally:
            _masks.drawn, _masks.again = None, iter(())
            module.update(held)

    call = mx.custom_function(run)

    @call.vjp
    def backward(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        flat: dict[str, mx.array] = dict(tree_flatten(primals[0]))  # type: ignore[arg-type]
        # Else MLX is free to call all modules again before it goes back through the last one, and to leave the
        # weights' gradients for later: then all activations are held after all.
        x, *again = mx.depends([primals[1], *keys], [cotangent])

        def call_again(x: mx.array, *weights: mx.array) -> mx.array:
            return run(named(weights), x, again)

        def named(arrays: Sequence[mx.array]) -> Any:
            return tree_unflatten(list(zip(flat, arrays, strict=True)))

        _, gradients = mx.vjp(call_again, [x, *flat.values()], [cotangent])
        (dx,) = mx.depends(gradients[:1], gradients[1:])
        return named(gradients[1:]), dx

    return call(module.trainable_parameters(), x)  # type: ignore[return-value]


class _Masks(threading.local):
    """Of the module that checkpointed() calls: the keys of its dropout masks."""

    drawn: list[mx.array] | None = None  # so far; none outside of such a module
    again: Iterator[mx.array] = iter(())  # those of its first call that are still to be used


_masks = _Masks()


def _next_key() -> mx.array:
    """A dropout mask's."""
    if (key := next(_masks.again, None)) is None:
        key = mx.random.randint(0, 2**32 - 1, (2,), mx.uint32)
        if _masks.drawn is not None:
            _masks.drawn.append(key)
    return key


def linear(
    x: Array, weight: Matrix, bias: mx.array | None = None, residual: Array | None = None, dropout_p: float = 0.0
) -> Array:
    """residual + dropout(x W^T + b). x (..., n_in), weight (n_out, n_in), bias (n_out,) -> (..., n_out)."""
    if isinstance(x, np.ndarray):
        return kernels.linear(x, weight, bias, residual, dropout_p)
    if isinstance(weight, Quantized):
        packed, scales, biases, group_size = weight
        y = mx.quantized_matmul(x, packed, scales, biases, transpose=True, group_size=group_size, bits=weight.bits)
        y = y if bias is None else y + bias
    else:
        y = x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    return dropout(y, dropout_p, residual)


def scaled_linear(x: Array, weight: mx.array, scale: float) -> Array:
    """scale x W^T. x (..., n_in), weight (n_out, n_in) -> (..., n_out)."""
    if isinstance(x, np.ndarray):
        return kernels.scaled_linear(x, weight, scale)
    return scale * (x @ weight.T)


def embedding(ids: mx.array, weight: Matrix) -> mx.array:
    """Rows of weight (V, C), one for each of ids (...), int32 in [0, V) -> (..., C)."""
    if isinstance(weight, Quantized):
        packed, scales, biases = (part[ids] for part in weight[:3])
        return mx.dequantize(packed, scales, biases, group_size=weight.group_size, bits=weight.bits)
    return weight[ids]


def embeddings(ids: Array, tokens: Matrix, positions: Matrix, offsets: Any = None) -> Array:
    """Token and position embeddings summed. ids (B, T), tokens (V, C), positions (T_max, C) -> (B, T, C).

    Sequence b's positions are the T from offsets[b] on, offsets (B,) int32; from 0 on without offsets.
    """
    if isinstance(ids, np.ndarray):
        return kernels.embeddings(ids, tokens, positions, offsets)
    at = mx.arange(ids.shape[1])  # (T,)
    if offsets is not None:
        at = mx.array(offsets)[:, None] + at  # (B, T)
    return embedding(ids, tokens) + embedding(at, positions)  # (B, T, C) + (B, T, C) or (T, C)


def layer_norm(x: Array, weight: mx.array, bias: mx.array | None, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. x (..., C) -> (..., C).

    Ba et al. 2016, https://arxiv.org/abs/1607.06450; the variance is the biased one.
    """
    if isinstance(x, np.ndarray):
        return kernels.layer_norm(x, weight, bias, eps)
    return mx.fast.layer_norm(x, weight, bias, eps)


def gelu(x: Array, exact: bool) -> Array:
    """x Phi(x), Phi the normal distribution's, element by element. x (...) -> (...).

    Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415: exact by erf, else GPT-2's tanh form.
    """
    if isinstance(x, np.ndarray):
        return kernels.gelu(x, exact)
    if exact:
        return 0.5 * x * (1 + mx.erf(x * math.sqrt(0.5)))
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def mlp(x: Array, c_fc: nn.Module, c_proj: nn.Module, exact: bool, residual: Array, dropout_p: float) -> Array:
    """residual + dropout(c_proj(gelu(c_fc(x)))), of two linear layers. x, residual (..., C) -> (..., C)."""
    if isinstance(x, np.ndarray) and not (c_fc.adapted or c_proj.adapted):
        return kernels.mlp(x, c_fc, c_proj, exact, residual, dropout_p)
    return c_proj(gelu(c_fc(x), exact), residual, dropout_p)  # (..., C) -> (..., 4C) -> (..., C)


def dropout(x: Array, p: float, residual: Array | None = None) -> Array:
    """Zeroes elements of x (...) with probability p, scales the others by 1 / (1 - p), and adds residual (...)."""
    if isinstance(x, np.ndarray):
        return kernels.dropout(x, p, residual)
    if p > 0:
        x = x * (mx.random.bernoulli(1 - p, x.shape, _next_key()) * (1 / (1 - p))).astype(x.dtype)
    return x if residual is None else residual + x


def split_heads(qkv: Array, n_head: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values side by side, (B, T, 3C) -> q, k, v, each (B, n_head, T, head_dim)."""
    if isinstance(qkv, np.ndarray):
        return kernels.split_heads(qkv, n_head)
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (
        part.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)  # (B, n_head, T, head_dim)
        for part in mx.split(qkv, 3, axis=-1)  # (B, T, 3C) -> 3 x (B, T, C)
    )
    return q, k, v


def attention(q: Array, k: Array, v: Array, dropout_p: float = 0.0) -> Array:
    """Causal attention, softmax(q k^T / sqrt(head_dim)) v, for each head.

    q (B, n_head, T_q, head_dim); k, v (B, n_head, T_k, head_dim), T_q <= T_k -> (B, n_head, T_q, head_dim).
    The queries are the last T_q positions: query i sees the keys 0 .. i + T_k - T_q.
    dropout_p drops attention weights. Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.
    """
    if isinstance(q, np.ndarray):
        return kernels.attention(q, k, v, dropout_p)
    scale = q.shape[-1] ** -0.5
    if dropout_p == 0:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    T_q, T_k = q.shape[2], k.shape[2]
    scores = (q * scale) @ k.swapaxes(-1, -2)  # (B, n_head, T_q, T_k)
    visible = mx.arange(T_k) <= mx.arange(T_k - T_q, T_k)[:, None]  # (T_q, T_k)
    weights = mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1, precise=True)
    return dropout(weights, dropout_p) @ v


def cached_attention(q: Array, k: Array, v: Array, cache: KVCache, layer: int) -> Array:
    """Causal attention of T new positions over those that a cache holds and themselves, which it is given first.

    q, k, v (B, n_head, T, head_dim) -> (B, n_head, T, head_dim). Position i of sequence b sees offsets[b] + i + 1.
    """
    keys, values = cache.layer(layer, like=k)  # (B, n_head, capacity, head_dim)
    if isinstance(q, np.ndarray):
        return kernels.cached_attention(q, k, v, keys, values, cache.offsets)
    at = mx.array(cache.offsets)[:, None] + mx.arange(q.shape[2])  # (B, T)
    into = mx.broadcast_to(at[:, None, :, None], k.shape)  # (B, n_head, T, head_dim)
    cache.keys[layer] = keys = mx.put_along_axis(keys, into, k, axis=2)
    cache.values[layer] = values = mx.put_along_axis(values, into, v, axis=2)
    visible = (mx.arange(keys.shape[2]) <= at[:, :, None])[:, None]  # (B, 1, T, capacity)
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=q.shape[-1] ** -0.5, mask=visible)


def merge_heads(y: Array) -> Array:
    """Heads side by side, (B, n_head, T, head_dim) -> (B, T, C)."""
    if isinstance(y, np.ndarray):
        return kernels.merge_heads(y)
    B, n_head, T, head_dim = y.shape
    return y.swapaxes(1, 2).reshape(B, T, n_head * head_dim)  # by way of (B, T, n_head, head_dim)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Mean of -log softmax(logits)[target] over the targets that are not -1, in float32.

    logits (..., V), targets (...) int32 in [0, V), or -1 to be ignored -> scalar.
    """
    logits = logits.astype(mx.float32)
    counted = targets >= 0
    picked = mx.take_along_axis(logits, mx.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses = mx.where(counted, mx.logsumexp(logits, axis=-1) - picked, 0)  # (...)
    return losses.sum() / mx.maximum(counted.sum(), 1)


def linear_cross_entropy(x: Array, weight: Matrix, targets: Array) -> Array:
    """cross_entropy(x W^T, targets). x (..., C), weight (V, C), targets (...) -> scalar.

    The kernel makes the logits (..., V) of some rows at a time, and their gradient with them.
    """
    if isinstance(x, np.ndarray):
        return kernels.linear_cross_entropy(x, weight, targets)
    return cross_entropy(linear(x, weight), targets)
