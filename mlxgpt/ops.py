"""The seam between devices: each operation of a GPT, once, with its shapes.

On a GPU an operation is MLX's own: lazy, and compiled with the graph around it. Without the C++ extension,
or with MLXGPT_KERNELS=0, it is that on a CPU too.

On a CPU with the extension a model's methods marked `entry` run on NumPy arrays instead of MLX's. An
operation that is given one calls its kernel at once, and notes on a tape how gradients flow back; to MLX the
whole method is one function with a gradient of its own. Between two kernels there is no graph to build, no
thread to wake (120 us for each evaluation in MLX), and no fresh memory to fault in.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

_core: Any = None
if os.environ.get("MLXGPT_KERNELS") != "0" and find_spec("mlxgpt._core"):
    try:
        _core = import_module("mlxgpt._core")
    except ImportError:
        # The extension looks for its BLAS beside itself; where packages are installed in several places
        # it may lie elsewhere, and is found when it is loaded already.
        blas = find_spec("scipy_openblas32")
        if blas is None or not blas.submodule_search_locations:
            raise
        for library in Path(blas.submodule_search_locations[0], "lib").glob("libscipy_openblas.*"):
            ctypes.CDLL(str(library))
        _core = import_module("mlxgpt._core")

Array = TypeVar("Array", mx.array, np.ndarray)


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


# ---- the operations ----


def linear(
    x: Array, weight: mx.array, bias: mx.array | None = None, residual: Array | None = None, dropout_p: float = 0.0
) -> Array:
    """residual + dropout(x W^T + b). x (..., n_in), weight (n_out, n_in), bias (n_out,) -> (..., n_out)."""
    if isinstance(x, np.ndarray):
        return _linear(x, weight, bias, residual, dropout_p)
    y = x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    return dropout(y, dropout_p, residual)


def embedding(ids: mx.array, weight: mx.array) -> mx.array:
    """Rows of weight (V, C), one for each of ids (...), int32 in [0, V) -> (..., C)."""
    return weight[ids]


def embeddings(ids: Array, tokens: mx.array, positions: mx.array, start: int) -> Array:
    """Token and position embeddings summed. ids (B, T), tokens (V, C), positions (T_max, C), of which the T from
    `start` on are those of ids -> (B, T, C)."""
    if isinstance(ids, np.ndarray):
        return _embeddings(ids, tokens, positions, start)
    at = mx.arange(start, start + ids.shape[1])  # (T,)
    return embedding(ids, tokens) + embedding(at, positions)  # (B, T, C) + (T, C)


def layer_norm(x: Array, weight: mx.array, bias: mx.array | None, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. x (..., C) -> (..., C).

    Ba et al. 2016, https://arxiv.org/abs/1607.06450; the variance is the biased one.
    """
    if isinstance(x, np.ndarray):
        return _layer_norm(x, weight, bias, eps)
    return mx.fast.layer_norm(x, weight, bias, eps)


def gelu(x: mx.array, exact: bool) -> mx.array:
    """x Phi(x), Phi the normal distribution's, element by element. x (...) -> (...).

    Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415: exact by erf, else GPT-2's tanh form.
    """
    if exact:
        return 0.5 * x * (1 + mx.erf(x * math.sqrt(0.5)))
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def mlp(x: Array, c_fc: nn.Module, c_proj: nn.Module, exact: bool, residual: Array, dropout_p: float) -> Array:
    """residual + dropout(c_proj(gelu(c_fc(x)))), of two linear layers. x, residual (..., C) -> (..., C)."""
    if isinstance(x, np.ndarray):
        return _mlp(x, c_fc, c_proj, exact, residual, dropout_p)
    return c_proj(gelu(c_fc(x), exact), residual, dropout_p)  # (..., C) -> (..., 4C) -> (..., C)


def dropout(x: Array, p: float, residual: Array | None = None) -> Array:
    """Zeroes elements of x (...) with probability p, scales the others by 1 / (1 - p), and adds residual (...)."""
    if isinstance(x, np.ndarray):
        return _dropout(x, p, residual)
    if p > 0:
        x = x * (mx.random.bernoulli(1 - p, x.shape) * (1 / (1 - p))).astype(x.dtype)
    return x if residual is None else residual + x


def split_heads(qkv: Array, n_head: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values side by side, (B, T, 3C) -> q, k, v, each (B, n_head, T, head_dim)."""
    if isinstance(qkv, np.ndarray):
        return _split_heads(qkv, n_head)
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
        return _attention(q, k, v, dropout_p)
    scale = q.shape[-1] ** -0.5
    if dropout_p == 0:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    T_q, T_k = q.shape[2], k.shape[2]
    scores = (q * scale) @ k.swapaxes(-1, -2)  # (B, n_head, T_q, T_k)
    visible = mx.arange(T_k) <= mx.arange(T_k - T_q, T_k)[:, None]  # (T_q, T_k)
    weights = mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1, precise=True)
    return dropout(weights, dropout_p) @ v


def merge_heads(y: Array) -> Array:
    """Heads side by side, (B, n_head, T, head_dim) -> (B, T, C)."""
    B, n_head, T, head_dim = y.shape
    merged = y.swapaxes(1, 2).reshape(B, T, n_head * head_dim)  # by way of (B, T, n_head, head_dim)
    if isinstance(y, np.ndarray):
        _record(lambda g: g.put(y, _heads_of(g.take(merged), n_head)))
    return merged


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Mean of -log softmax(logits)[target] over the targets that are not -1, in float32.

    logits (..., V), targets (...) int32 in [0, V), or -1 to be ignored -> scalar.
    """
    logits = logits.astype(mx.float32)
    counted = targets >= 0
    picked = mx.take_along_axis(logits, mx.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses = mx.where(counted, mx.logsumexp(logits, axis=-1) - picked, 0)  # (...)
    return losses.sum() / mx.maximum(counted.sum(), 1)


def linear_cross_entropy(x: Array, weight: mx.array, targets: Array) -> Array:
    """cross_entropy(x W^T, targets). x (..., C), weight (V, C), targets (...) -> scalar.

    The kernel makes the logits (..., V) of some rows at a time, and their gradient with them.
    """
    if isinstance(x, np.ndarray):
        return _linear_cross_entropy(x, weight, targets)
    return cross_entropy(linear(x, weight), targets)


# ---- running a model on the kernels ----

Method = TypeVar("Method", bound=Callable[..., Any])


def entry(method: Method) -> Method:
    """Marks the methods of a model through which callers run it: arrays in, one array out.

    Where there are kernels for the model's parameters, the method runs on NumPy arrays. With arguments that
    are not arrays (a cache) the result has no gradient.
    """

    @functools.wraps(method)
    def call(model: nn.Module, *args: Any) -> Any:
        weights = [w for _, w in cast(Any, tree_flatten(model.parameters()))]
        if not all(kernels(w.dtype) for w in weights):
            return method(model, *args)
        arrays = [np.asarray(a) if isinstance(a, mx.array) else a for a in args]
        if any(a is not None and not isinstance(a, mx.array) for a in args):
            mx.eval(weights)
            return _run(None, method, model, arrays)
        tape = _Tape(weights, [mx.zeros(w.shape) for w in weights] if model.training else [])

        @mx.custom_function
        def forward(*weights: mx.array) -> mx.array:
            mx.eval(weights, tape.memory)
            return _run(tape, method, model, arrays)

        @forward.vjp
        def backward(weights: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
            return tape.backward(np.asarray(cotangent))

        return forward(*weights)

    return call  # type: ignore[return-value]


def add_gradients(
    weights: list[mx.array], gradients: list[mx.array], scale: float, method: Callable[..., Any], *args: mx.array
) -> mx.array:
    """A model's method marked `entry`, run on the kernels without MLX around it -> what it returns, a scalar.

    weights are all of the model's; scale times their gradients is added to those of `gradients`, in place.
    """
    tape = _Tape(weights, gradients, scale)
    arrays = [np.asarray(a) for a in args]
    value = _run(tape, method.__wrapped__, method.__self__, arrays)  # type: ignore[attr-defined]
    tape.backward(np.array(scale, np.float32))
    return value


def zero(arrays: list[mx.array]) -> None:
    """Fills arrays with 0 in place."""
    mx.eval(arrays)
    for array in arrays:
        _view(array).fill(0)


def adamw(
    parameters: list[mx.array], gradients: list[mx.array], m: list[mx.array], v: list[mx.array], **options: Any
) -> float:
    """A step of AdamW in place, on evaluated arrays that nobody else holds -> the norm of all gradients.

    m and v are the averages of the gradients and of their squares. Parameters of two or more dimensions are
    decayed. Options: learning_rate, beta1, beta2, eps, weight_decay, step (from 1), max_norm to clip to (0 for
    none). Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
    """
    return _core.adamw(parameters, gradients, m, v, [p.ndim >= 2 for p in parameters], **options)


class _Tape:
    """How gradients flow back: one step for each operation that ran, the last one first.

    A gradient belongs to an array by identity. Each step takes its output's gradient off and puts its inputs'
    there, so that memory is free as soon as it can be.
    """

    def __init__(self, weights: list[mx.array], memory: list[mx.array], scale: float = 1.0) -> None:
        self._weights = weights
        self.memory = memory  # the weights' gradients; if empty, made by the backward pass
        self.training = bool(memory)
        self.scale = np.float32(scale)  # what the gradient of a loss will be, as far as can be foretold
        self.steps: list[Callable[[_Tape], None]] = []
        self.output: np.ndarray | None = None
        self._activations: dict[int, np.ndarray] = {}
        self._parts: dict[int, Callable[[_Tape], np.ndarray]] = {}

    @functools.cached_property
    def _of_weights(self) -> dict[int, mx.array]:
        if not self.memory:
            self.memory = [mx.zeros(w.shape) for w in self._weights]
            mx.eval(self.memory)
        return {id(w): m for w, m in zip(self._weights, self.memory, strict=True)}

    def of(self, weight: mx.array | None) -> Any:
        """The sum of a weight's gradients so far, for a kernel to add to; none for none."""
        return None if weight is None else self._of_weights[id(weight)]

    def empty(self, array: np.ndarray) -> np.ndarray:
        """Memory for a gradient of an array, to be written and put there."""
        part = self._parts.get(id(array))
        return _empty(array.shape) if part is None else part(self)

    def part(self, array: np.ndarray, memory: Callable[[_Tape], np.ndarray]) -> None:
        """Says where the gradient of an array lies that is a part of another: what is put there is there."""
        self._parts[id(array)] = memory

    def put(self, array: np.ndarray, gradient: np.ndarray) -> None:
        """Adds to the gradient of an array. The memory may be written to later."""
        if id(array) in self._parts:
            return
        if (held := self._activations.get(id(array))) is None:
            self._activations[id(array)] = gradient
        else:
            held += gradient

    def has(self, array: np.ndarray) -> bool:
        return id(array) in self._activations

    def take(self, array: np.ndarray) -> np.ndarray:
        return self._activations.pop(id(array))

    def backward(self, cotangent: np.ndarray) -> tuple[mx.array, ...]:
        if self.output is None:
            raise ValueError("a model's gradient was asked for twice; call the model again")
        gradient = _empty(self.output.shape)
        gradient[...] = cotangent
        self._activations[id(self.output)] = gradient
        self.output = None
        while self.steps:
            self.steps.pop()(self)
        return tuple(self.memory)


class _State(threading.local):
    """Of the method that runs on the kernels in this thread."""

    tape: _Tape | None = None  # none where no gradient is wanted
    seed: int | None = None  # of the dropout masks drawn so far


_state = _State()


def _run(tape: _Tape | None, method: Callable[..., Any], model: nn.Module, args: list[Any]) -> mx.array:
    _state.tape, _state.seed = tape, None
    try:
        output = method(model, *args)
    finally:
        _state.tape = None
        _memory.forget_unused()
    if tape is not None:
        tape.output = output
    return mx.array(output)


def _record(step: Callable[[_Tape], None]) -> None:
    if _state.tape is not None:
        _state.tape.steps.append(step)


def _next_seed() -> int:
    """A dropout mask's: the run's first from MLX's generator, then counted on."""
    if _state.seed is None:
        _state.seed = cast(int, mx.random.randint(0, 2**31 - 1).item()) << 32
    _state.seed += 1
    return _state.seed


def _references(blocks: list[np.ndarray], i: int) -> int:
    return sys.getrefcount(blocks[i])


_UNHELD = _references([np.empty(0)], 0)  # what Python counts where nothing but the list holds a block


class _Memory:
    """float32 arrays that nobody else holds any more, to be used again.

    A step of training asks for the same sizes as the step before; fresh memory would cost a page fault for
    every 4 KB of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, list[np.ndarray]] = {}
        self._used: set[int] = set()  # blocks that were asked for since the last forget_unused

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        n = math.prod(shape)
        with self._lock:
            blocks = self._blocks.setdefault(n, [])
            i = 0
            while i < len(blocks) and _references(blocks, i) > _UNHELD:
                i += 1
            if i == len(blocks):
                blocks.append(np.empty(n, np.float32))
            block = blocks[i]
            self._used.add(id(block))
            return block.reshape(shape)

    def forget_unused(self) -> None:
        with self._lock:
            kept = {n: [b for b in blocks if id(b) in self._used] for n, blocks in self._blocks.items()}
            self._blocks = {n: blocks for n, blocks in kept.items() if blocks}
            self._used.clear()


_memory = _Memory()
_empty = _memory.empty


def _view(array: mx.array) -> np.ndarray:
    """The memory of an evaluated MLX array: nothing is copied, writes reach the MLX array. Kernels take MLX
    arrays as they are, in the same way."""
    return np.array(array, copy=False)


def _rows(x: np.ndarray) -> np.ndarray:
    """(..., C) -> (N, C)."""
    return x.reshape(-1, x.shape[-1])


# ---- the kernels, each with its gradient ----


def _linear(
    x: np.ndarray, weight: mx.array, bias: mx.array | None, residual: np.ndarray | None, dropout_p: float
) -> np.ndarray:
    if dropout_p > 0:
        return _dropout(_linear(x, weight, bias, None, 0.0), dropout_p, residual)
    out = _empty((*x.shape[:-1], weight.shape[0]))
    added = None if residual is None else _rows(residual)
    _core.linear_forward(_rows(x), weight, bias, _rows(out), residual=added)

    def backward(tape: _Tape) -> None:
        dout = tape.take(out)
        dx = tape.empty(x)
        _core.linear_backward(_rows(dout), _rows(x), weight, _rows(dx), tape.of(weight), tape.of(bias), accumulate=True)
        tape.put(x, dx)
        if residual is not None:
            tape.put(residual, dout)

    _record(backward)
    return out


def _mlp(
    x: np.ndarray, c_fc: nn.Module, c_proj: nn.Module, exact: bool, residual: np.ndarray, dropout_p: float
) -> np.ndarray:
    fc, proj, fc_bias, proj_bias = c_fc.weight, c_proj.weight, c_fc.get("bias"), c_proj.get("bias")
    activation = "gelu" if exact else "gelu_new"
    h = _empty((*x.shape[:-1], fc.shape[0]))  # before the GELU
    activated, out = _empty(h.shape), _empty(x.shape)
    _core.linear_forward(_rows(x), fc, fc_bias, _rows(h), activated=_rows(activated), activation=activation)
    added = _rows(residual) if dropout_p == 0 else None
    _core.linear_forward(_rows(activated), proj, proj_bias, _rows(out), residual=added)
    del activated  # the backward pass makes it again, in passing

    def backward(tape: _Tape) -> None:
        dout = tape.take(out)
        dx, dh, activated = tape.empty(x), _rows(_empty(h.shape)), _rows(_empty(h.shape))
        rows = _rows(dout), _rows(h)
        _core.linear_backward(*rows, proj, dh, None, None, pre=rows[1], activated=activated, activation=activation)
        _core.linear_backward(rows[0], activated, proj, None, tape.of(proj), tape.of(proj_bias), accumulate=True)
        _core.linear_backward(dh, _rows(x), fc, _rows(dx), tape.of(fc), tape.of(fc_bias), accumulate=True)
        tape.put(x, dx)
        if added is not None:
            tape.put(residual, dout)

    _record(backward)
    return out if dropout_p == 0 else _dropout(out, dropout_p, residual)


def _embeddings(ids: np.ndarray, tokens: mx.array, positions: mx.array, start: int) -> np.ndarray:
    ids = np.ascontiguousarray(ids, np.int32)
    end = start + ids.shape[1]
    out = _empty((*ids.shape, tokens.shape[1]))
    _core.embedding_forward(ids, tokens, _view(positions)[start:end], out)

    def backward(tape: _Tape) -> None:
        _core.embedding_backward(ids, tape.take(out), tape.of(tokens), _view(tape.of(positions))[start:end])

    _record(backward)
    return out


def _layer_norm(x: np.ndarray, weight: mx.array, bias: mx.array | None, eps: float) -> np.ndarray:
    rows, out = _rows(x), _empty(x.shape)
    mean, rstd = _empty((len(rows),)), _empty((len(rows),))
    _core.layer_norm_forward(rows, weight, bias, eps, _rows(out), mean, rstd)

    def backward(tape: _Tape) -> None:
        dout, add = tape.take(out), tape.has(x)  # what came along the residual stream is added to in place
        dx = tape.take(x) if add else tape.empty(x)
        _core.layer_norm_backward(
            _rows(dout), rows, weight, mean, rstd, _rows(dx), tape.of(weight), tape.of(bias),
            add_to_dx=add, accumulate=True,
        )  # fmt: skip
        tape.put(x, dx)

    _record(backward)
    return out


def _dropout(x: np.ndarray, p: float, residual: np.ndarray | None) -> np.ndarray:
    if p == 0 and residual is None:
        return x
    seed, out = _next_seed(), _empty(x.shape)
    _core.dropout(x, residual, p, seed, out)

    def backward(tape: _Tape) -> None:
        dout, dx = tape.take(out), tape.empty(x)
        _core.dropout(dout, None, p, seed, dx)
        tape.put(x, dx)
        if residual is not None:
            tape.put(residual, dout)

    _record(backward)
    return out


def _heads_of(x: np.ndarray, n_head: int) -> np.ndarray:
    """(B, T, C) seen as (B, n_head, T, head_dim)."""
    return x.reshape(*x.shape[:2], n_head, -1).swapaxes(1, 2)


def _thirds(qkv: np.ndarray, n_head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    C = qkv.shape[-1] // 3
    q, k, v = (_heads_of(qkv[..., n * C : (n + 1) * C], n_head) for n in range(3))
    return q, k, v


def _split_heads(qkv: np.ndarray, n_head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = _thirds(qkv, n_head)
    if (tape := _state.tape) is not None:
        for i, part in enumerate(parts):

            def memory(tape: _Tape, i: int = i) -> np.ndarray:
                whole = tape.take(qkv) if tape.has(qkv) else _empty(qkv.shape)
                tape.put(qkv, whole)
                return _thirds(whole, n_head)[i]

            tape.part(part, memory)
    return parts


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, dropout_p: float) -> np.ndarray:
    B, n_head, T, head_dim = q.shape
    options = dict(scale=head_dim**-0.5, dropout=dropout_p, seed=_next_seed() if dropout_p else 0)
    # In memory (B, T, n_head, head_dim): as c_proj reads it.
    out, lse = _empty((B, T, n_head, head_dim)).swapaxes(1, 2), _empty((B, n_head, T))
    _core.attention_forward(q, k, v, out, lse, **options)

    def backward(tape: _Tape) -> None:
        gradients = [tape.empty(a) for a in (q, k, v)]
        _core.attention_backward(q, k, v, out, lse, tape.take(out), *gradients, **options)
        for array, gradient in zip((q, k, v), gradients, strict=True):
            tape.put(array, gradient)

    _record(backward)
    return out


def _linear_cross_entropy(x: np.ndarray, weight: mx.array, targets: np.ndarray) -> np.ndarray:
    tape, rows = _state.tape, _rows(x)
    targets = np.ascontiguousarray(targets, np.int32).reshape(-1)

    def loss_and_gradients(tape: _Tape) -> tuple[float, np.ndarray]:
        dx = _empty(x.shape)
        into = _rows(dx), tape.of(weight)
        return _core.linear_cross_entropy(rows, weight, targets, *into, accumulate=True, scale=tape.scale), dx

    dx = None
    if tape is not None and tape.training:  # then the logits are made once for the loss and its gradient
        value, dx = loss_and_gradients(tape)
    else:
        value = _core.linear_cross_entropy(rows, weight, targets)
    loss = np.array(value, np.float32)

    def backward(tape: _Tape) -> None:
        cotangent = tape.take(loss)
        gradient = loss_and_gradients(tape)[1] if dx is None else dx
        if cotangent != tape.scale:  # in MLX's graph, where no earlier gradient is in the weight's memory
            gradient *= cotangent / tape.scale
            _view(tape.of(weight))[...] *= cotangent / tape.scale
        tape.put(x, gradient)

    _record(backward)
    return loss
