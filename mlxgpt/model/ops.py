"""The seam between devices: each operation of a GPT, once, with its shapes.

On a GPU an operation is MLX's own: lazy, and compiled with the graph around it. Without the C++ extension, or with
MLXGPT_KERNELS=0, it is that on a CPU too. On a CPU with the extension a model's methods marked `entry` run on
cpu.array's Arrays, and an operation that is given one calls its kernel: see cpu/operations.py.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..cpu import entry as on_cpu
from ..cpu import operations as kernels
from ..cpu.array import Array as CPUArray
from . import differentiable
from .attention import BlockedAttention
from .attention import way as attention_way
from .cache import KVCache, LayerCache
from .cross_entropy import linear_mean_loss
from .differentiable import Differentiable
from .matrices import Matrix, Quantized

entry = on_cpu.entry

Array = TypeVar("Array", mx.array, CPUArray)
Function = TypeVar("Function", bound=Callable[..., Any])
Observer = Callable[[str, tuple[Any, ...], Any], None]

_observers: list[Observer] = []


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """While it is entered, each operation's name, arguments and result are given to the observer as it is called."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def operation(function: Function) -> Function:
    """Marks what `observed` observes."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        for observer in _observers:
            observer(function.__name__, args, result)
        return result

    return call  # type: ignore[return-value]


def new_mask_key() -> mx.array:
    """The key of a dropout mask, drawn from MLX's generator."""
    return mx.random.randint(0, 2**32 - 1, (2,), mx.uint32)


class Activations:
    """What becomes of the activations of a layer that is trained by MLX's operations: here MLX keeps them all."""

    def mask_key(self) -> mx.array:
        """The key of the next dropout mask."""
        return new_mask_key()

    def product(self, function: Differentiable, *arrays: mx.array) -> mx.array:
        """function(*arrays), a matrix product, which takes long to compute again."""
        return function(*arrays)


class _Current(threading.local):
    activations = Activations()


_current = _Current()


@contextmanager
def activations_in(activations: Activations) -> Iterator[None]:
    """While it is entered, operations in this thread ask these activations."""
    before, _current.activations = _current.activations, activations
    try:
        yield
    finally:
        _current.activations = before


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


def on_kernels(model: Any) -> bool:
    """Whether a model computes on the CPU's kernels where no gradient is wanted; its results are then NumPy arrays."""
    return on_cpu.runs(model)


def without_gradient(model: Any, method: Callable[..., Any], *args: Any) -> Any:
    """A model's method marked `entry`, as GPT.loss, of arrays (MLX's or NumPy's) and a cache, without a gradient.

    On the CPU's kernels nothing is kept for a backward pass, and the result is a NumPy array; elsewhere MLX's.
    """
    if on_kernels(model):
        return on_cpu.without_gradient(model, method, *args)
    return method(model, *(mx.array(a) if isinstance(a, np.ndarray) else a for a in args))


def repeated(model: Any, method: Callable[..., Any], cache: KVCache) -> Callable[[Any], Any]:
    """A model's method marked `entry`, of ids (B, T) and a cache, as a function of the ids alone, to be called often.

    The T positions follow those that the cache holds, and are added to it; T and B stay the same. On the CPU's
    kernels the calls of the first time are recorded and replayed, on NumPy arrays, and the result is overwritten
    by the next call; elsewhere it is compiled, once for each size that the cache's arrays grow to.
    ValueError where the cache is full.
    """
    if on_kernels(model):
        return on_cpu.Repeated(model, method, cache)

    @functools.partial(mx.compile, inputs=model.state)
    def step(ids: mx.array, offsets: mx.array, keys: list[mx.array], values: list[mx.array]) -> Any:
        inner = KVCache.over(offsets, keys, values)
        return method(model, ids, inner), inner.keys, inner.values

    def call(ids: mx.array) -> mx.array:
        if cache.keys[0] is None:
            return method(model, ids, cache)
        cache.reserve(*ids.shape)
        # The cache's own arrays are not held here: those that nobody else holds are written in place.
        output, *arrays = step(ids, mx.array(cache.offsets), cache.keys, cache.values)
        cache.replace(*arrays)
        cache.advance(ids.shape[1])
        return output

    return call


@operation
def linear(x: Array, weight: Matrix, bias: mx.array | None = None) -> Array:
    """x W^T + b. x (..., n_in), weight (n_out, n_in), bias (n_out,) -> (..., n_out)."""
    if isinstance(x, CPUArray):
        return kernels.linear(x, weight, bias)
    if isinstance(weight, Quantized):
        y = _current.activations.product(differentiable.linear_with(weight), x)
        return y if bias is None else y + bias
    return _current.activations.product(differentiable.linear, x, weight, *([] if bias is None else [bias]))


@operation
def low_rank(x: Array, A: mx.array, B: mx.array, scale: float) -> Array:
    """scale x (B A)^T, what an adapter adds. x (..., n_in), A (rank, n_in), B (n_out, rank) -> (..., n_out).

    Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """
    if isinstance(x, CPUArray):
        return kernels.linear(kernels.scaled_linear(x, A, scale), B, None)
    return scale * (x @ A.T) @ B.T


@operation
def embedding(ids: mx.array, weight: Matrix) -> mx.array:
    """Rows of weight (V, C), one for each of ids (...), int32 in [0, V) -> (..., C)."""
    if isinstance(weight, Quantized):
        packed, scales, biases = (part[ids] for part in weight[:3])
        return mx.dequantize(packed, scales, biases, group_size=weight.group_size, bits=weight.bits)
    return differentiable.rows(weight, ids)


@operation
def embeddings(ids: Array, tokens: Matrix, positions: Matrix, offsets: Any = None) -> Array:
    """Token and position embeddings summed. ids (B, T), tokens (V, C), positions (T_max, C) -> (B, T, C).

    Sequence b's positions are the T from offsets[b] on, offsets (B,) int32; from 0 on without offsets.
    """
    if isinstance(ids, CPUArray):
        return kernels.embeddings(ids, tokens, positions, offsets)
    at = mx.arange(ids.shape[1])  # (T,)
    if offsets is not None:
        at = mx.array(offsets)[:, None] + at  # (B, T)
    return embedding(ids, tokens) + embedding(at, positions)  # (B, T, C) + (B, T, C) or (T, C)


@operation
def layer_norm(x: Array, weight: mx.array, bias: mx.array | None, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. x (..., C) -> (..., C).

    Ba et al. 2016, https://arxiv.org/abs/1607.06450; the variance is the biased one.
    """
    if isinstance(x, CPUArray):
        return kernels.layer_norm(x, weight, bias, eps)
    return differentiable.layer_norm(x, weight, bias, eps)


@operation
def gelu(x: Array) -> Array:
    """x Phi(x), where Phi is the normal distribution's, element by element. x (...) -> (...).

    Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415.
    """
    if isinstance(x, CPUArray):
        return kernels.gelu(x, "gelu")
    return differentiable.gelu(x)


@operation
def gelu_new(x: Array) -> Array:
    """The GELU by tanh, as GPT-2 computes it, element by element. x (...) -> (...).

    Hendrycks & Gimpel 2016, section 2; the name is transformers'.
    """
    if isinstance(x, CPUArray):
        return kernels.gelu(x, "gelu_new")
    return differentiable.gelu_new(x)


GELU: dict[str, Callable[[Any], Any]] = {"gelu": gelu, "gelu_new": gelu_new}  # by GPTConfig.activation


@operation
def dropout(x: Array, p: float) -> Array:
    """Zeroes elements of x (...) with probability p, and scales the others by 1 / (1 - p). -> (...).

    Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html.
    """
    if p == 0:
        return x
    if isinstance(x, CPUArray):
        return kernels.dropout(x, p)
    return differentiable.dropout(x, p, _current.activations.mask_key())


@operation
def split_heads(qkv: Array, n_head: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values side by side, (B, T, 3C) -> q, k, v, each (B, n_head, T, head_dim)."""
    if isinstance(qkv, CPUArray):
        return kernels.split_heads(qkv, n_head)
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (
        part.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)  # (B, n_head, T, head_dim)
        for part in mx.split(qkv, 3, axis=-1)  # (B, T, 3C) -> 3 x (B, T, C)
    )
    return q, k, v


@operation
def attention(q: Array, k: Array, v: Array, dropout_p: float = 0.0) -> Array:
    """Causal attention, softmax(q k^T / sqrt(head_dim)) v, for each head.

    q (B, n_head, T_q, head_dim); k, v (B, n_head, T_k, head_dim), T_q <= T_k -> (B, n_head, T_q, head_dim).
    The queries are the last T_q positions: query i sees the keys 0 .. i + T_k - T_q.
    dropout_p drops attention weights. Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.
    """
    if isinstance(q, CPUArray):
        return kernels.attention(q, k, v, dropout_p)
    if (way := attention_way(q, dropout_p)) == "mlx":
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
    key = _current.activations.mask_key() if dropout_p else None
    blocked = BlockedAttention(dropout_p, key, fused_forward=way == "fused forward")
    return _current.activations.product(Differentiable(blocked.forward, blocked.backward), q, k, v)


@operation
def cached_attention(q: Array, k: Array, v: Array, cache: LayerCache) -> Array:
    """Causal attention of T new positions, whose keys and values the layer's cache is given first, over all that it
    holds. q, k, v (B, n_head, T, head_dim) -> (B, n_head, T, head_dim).

    Query i of sequence b sees offsets[b] + i + 1 positions.
    """
    if isinstance(q, CPUArray):
        return kernels.cached_attention(q, k, v, *cache.arrays(like=k), cache.offsets)
    keys, values, positions = cache.write(k, v)  # (B, n_head, size, head_dim), and (B, T)
    visible = (mx.arange(keys.shape[2]) <= positions[:, :, None])[:, None]  # (B, 1, T, size)
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=q.shape[-1] ** -0.5, mask=visible)


@operation
def merge_heads(y: Array) -> Array:
    """Heads side by side, (B, n_head, T, head_dim) -> (B, T, C)."""
    if isinstance(y, CPUArray):
        return kernels.merge_heads(y)
    B, n_head, T, head_dim = y.shape
    return y.swapaxes(1, 2).reshape(B, T, n_head * head_dim)  # by way of (B, T, n_head, head_dim)


@operation
def linear_cross_entropy(
    x: Array, weight: Matrix, targets: Array, training: bool = False, is_frozen: bool = False
) -> Array:
    """Mean of -log softmax(x W^T)[target] over the targets that are not -1, in float32.

    x (..., C), weight (V, C), targets (...) int32 in [0, V), or -1 to be ignored -> scalar. The logits (..., V) of some
    rows exist at a time. In training the gradients, of x and unless it is frozen of the weight, are computed with them.
    """
    if isinstance(x, CPUArray):
        return kernels.linear_cross_entropy(x, weight, targets)
    rows = x.reshape(-1, x.shape[-1])  # (..., C) -> (N, C)
    return linear_mean_loss(rows, weight, targets.reshape(-1), training, is_frozen)
