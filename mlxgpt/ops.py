"""The seam between devices: each operation of a GPT, once, with its shapes.

On a GPU an operation is MLX's own: lazy, and compiled with the graph around it. On a CPU it is a kernel
of the C++ extension where there is one: it runs at once and brings its own gradient. Without the
extension, or with MLXGPT_KERNELS=0, every operation is the plain MLX expression.
"""

from __future__ import annotations

import math
import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np

_core: Any = None
if os.environ.get("MLXGPT_KERNELS") != "0" and find_spec("mlxgpt._core"):
    _core = import_module("mlxgpt._core")


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


def kernels(dtype: mx.Dtype = mx.float32) -> bool:
    """Whether operations on arrays of this type run in the C++ extension."""
    return _core is not None and dtype == mx.float32 and mx.default_device().type == mx.cpu


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x W^T + b. x (..., C_in), weight (C_out, C_in), bias (C_out,) -> (..., C_out)."""
    if bias is None:
        return x @ weight.T
    return mx.addmm(bias, x, weight.T)


def embedding(ids: mx.array, weight: mx.array) -> mx.array:
    """Rows of weight (V, C), one for each of ids (...), int32 in [0, V) -> (..., C)."""
    return weight[ids]


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. x (..., C) -> (..., C).

    Ba et al. 2016, https://arxiv.org/abs/1607.06450; the variance is the biased one.
    """
    return mx.fast.layer_norm(x, weight, bias, eps)


def gelu(x: mx.array, exact: bool) -> mx.array:
    """x Phi(x), Phi the normal distribution's, element by element. x (...) -> (...).

    Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415: exact by erf, else GPT-2's tanh form.
    """
    if exact:
        return 0.5 * x * (1 + mx.erf(x * math.sqrt(0.5)))
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def dropout(x: mx.array, p: float) -> mx.array:
    """Zeroes elements of x (...) with probability p, and scales the others by 1 / (1 - p)."""
    if p == 0:
        return x
    return x * (mx.random.bernoulli(1 - p, x.shape) * (1 / (1 - p))).astype(x.dtype)


def attention(q: mx.array, k: mx.array, v: mx.array, dropout_p: float = 0.0) -> mx.array:
    """Causal attention, softmax(q k^T / sqrt(head_dim)) v, for each head.

    q (B, n_head, T_q, head_dim); k, v (B, n_head, T_k, head_dim), T_q <= T_k -> (B, n_head, T_q, head_dim).
    The queries are the last T_q positions: query i sees the keys 0 .. i + T_k - T_q.
    dropout_p drops attention weights. Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.
    """
    scale = q.shape[-1] ** -0.5
    if kernels(q.dtype):
        return _attention_kernel(q, k, v, scale, dropout_p)
    if dropout_p == 0:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    T_q, T_k = q.shape[2], k.shape[2]
    scores = (q * scale) @ k.swapaxes(-1, -2)  # (B, n_head, T_q, T_k)
    visible = mx.arange(T_k) <= mx.arange(T_k - T_q, T_k)[:, None]  # (T_q, T_k)
    weights = mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1, precise=True)
    return dropout(weights, dropout_p) @ v


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Mean of -log softmax(logits)[target] over the targets that are not -1, in float32.

    logits (..., V), targets (...) int32 in [0, V), or -1 to be ignored -> scalar.
    """
    logits = logits.astype(mx.float32)
    counted = targets >= 0
    picked = mx.take_along_axis(logits, mx.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses = mx.where(counted, mx.logsumexp(logits, axis=-1) - picked, 0)  # (...)
    return losses.sum() / mx.maximum(counted.sum(), 1)


def _attention_kernel(q: mx.array, k: mx.array, v: mx.array, scale: float, dropout_p: float) -> mx.array:
    # The backward pass draws the forward pass's dropout mask again, from the same seed.
    seed = int(mx.random.randint(0, 2**31 - 1)) if dropout_p else 0
    options: dict[str, Any] = dict(scale=scale, dropout=dropout_p, seed=seed)

    @mx.custom_function
    def forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        out, lse = _empty_heads(q), mx.zeros(q.shape[:3])
        mx.eval(q, k, v, out, lse)
        _core.attention_forward(*_views(q, k, v, out, lse), **options)
        return out, lse

    @forward.vjp
    def backward(
        primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        dq, dk, dv = (_empty_heads(a) for a in primals)
        d_out = cotangents[0]
        mx.eval(*primals, *outputs, d_out, dq, dk, dv)
        _core.attention_backward(*_views(*primals, *outputs, d_out, dq, dk, dv), **options)
        return dq, dk, dv

    result: Any = forward(q, k, v)
    return result[0]


def _empty_heads(like: mx.array) -> mx.array:
    """An array for a kernel to write, seen as (B, n_head, T, head_dim), in memory (B, T, n_head, head_dim):
    as c_attn wrote q, k and v, and as c_proj reads their sum."""
    B, n_head, T, head_dim = like.shape
    return mx.zeros((B, T, n_head, head_dim)).swapaxes(1, 2)


def _views(*arrays: mx.array) -> list[np.ndarray]:
    """NumPy views of the memory of evaluated MLX arrays: nothing is copied, writes reach the MLX array."""
    return [np.array(a, copy=False) for a in arrays]
