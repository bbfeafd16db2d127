"""A model on the CPU's kernels: the operations of ops.py in the C++ extension, each with its gradient.

A model's method marked `entry` runs on NumPy arrays here. Each operation calls its kernel at once, and notes on
a tape how gradients flow back; to MLX the whole method is one function with a gradient of its own. Between two
kernels there is no graph to build, no thread to wake (120 us for each evaluation in MLX), and no fresh memory to
fault in.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import extension
from .extension import available

_core = extension.core


def reads(bits: int) -> bool:
    return extension.computes_quantized(bits)


def runs(model: Any) -> bool:
    """Whether a model's methods marked `entry` run on the kernels when no gradient is wanted."""
    return extension.can_read(w.dtype for w in model.named_weights().values())


Method = TypeVar("Method", bound=Callable[..., Any])


def entry(method: Method) -> Method:
    """Marks the methods of a model through which callers run it: arrays in, one array out.

    Where there are kernels for the model's parameters, the method runs on NumPy arrays. With a cache the result
    has no gradient, and the parameters may be stored in any way; else they are float32.
    """

    @functools.wraps(method)
    def call(model: Any, *args: Any) -> Any:
        has_cache = any(a is not None and not isinstance(a, mx.array) for a in args)
        weights = list(model.named_weights().values())
        if not (runs(model) if has_cache else all(available(w.dtype) for w in weights)):
            return method(model, *args)
        # Not before: where MLX compiles the method, its arguments have no values yet.
        arrays = [np.asarray(a) if isinstance(a, mx.array) else a for a in args]
        if has_cache:
            return _run(None, method, model, arrays)
        trained = list(model.trainable_weights().values())
        tape = _Tape(trained, [mx.zeros(w.shape) for w in trained] if model.training else [])

        @mx.custom_function
        def forward(*trained: mx.array) -> mx.array:
            mx.eval(weights, tape.memory)
            return _run(tape, method, model, arrays)

        @forward.vjp
        def backward(weights: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
            return tape.backward(np.asarray(cotangent))

        return forward(*trained)

    return call  # type: ignore[return-value]


class Repeated:
    """A model's method marked `entry`, of ids and a cache, as a function of the ids alone, for many calls.

    The first call runs the method, and records the kernels that it calls with the arrays that they are given. The
    calls after it are the recording: of Python's 60 us or so for each layer nothing is left. Ids and the result
    are NumPy arrays; the result is overwritten by the next call. The parameters are those of the first call.
    """

    def __init__(self, method: Callable[..., Any], cache: Any) -> None:
        self._model, self._method = method.__self__, method.__wrapped__  # type: ignore[attr-defined]
        self._cache = cache
        self._calls: Any = None

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        if self._calls is None:
            self._ids, calls = np.array(ids, np.int32), _core.Recording()
            with calls:
                self._output = _run_to_numpy(None, self._method, self._model, [self._ids, self._cache])
            self._calls = calls  # only now that it is whole
        else:
            self._ids[...] = ids
            self._cache.reserve(*ids.shape)
            self._calls.replay()
            self._cache.advance(ids.shape[1])
        return self._output


def run(method: Callable[..., Any], *args: mx.array) -> mx.array:
    """A model's method marked `entry`, run on the kernels without a way back for gradients, nor memory for one."""
    return _run(None, method.__wrapped__, method.__self__, [np.asarray(a) for a in args])  # type: ignore[attr-defined]


def add_gradients(
    weights: list[mx.array], gradients: list[mx.array], scale: float, method: Callable[..., Any], *args: mx.array
) -> mx.array:
    """A model's method marked `entry`, run on the kernels without MLX around it -> what it returns, a scalar.

    weights are the model's trainable_weights(); scale times their gradients is added to `gradients`, in place.
    """
    tape = _Tape(weights, gradients, scale)
    arrays = [np.asarray(a) for a in args]
    value = _run(tape, method.__wrapped__, method.__self__, arrays)  # type: ignore[attr-defined]
    tape.backward(np.array(scale, np.float32))
    return value


def copy(x: np.ndarray, out: np.ndarray) -> bool:
    """out = x -> whether every value of out is finite. Runs without the extension too.

    (n,) or (rows, columns), floating-point, bfloat16 as its bits in uint16. x may be a matrix that is turned, and
    begin anywhere in memory. out is contiguous, and of x's type or float32.
    """
    x = x.view(x.dtype.newbyteorder("="))  # a mapped file's is little-endian by name
    if extension.is_there() and x.dtype != np.float64:
        return _core.copy(x, out)
    with np.errstate(all="ignore"):
        if x.dtype != np.uint16:
            out[...] = x
            return bool(np.isfinite(out.sum())) or bool(np.isfinite(out).all())  # a sum shows it in one pass
        bits = np.left_shift(x, 16, out=out.view(np.uint32), dtype=np.uint32) if out.dtype == np.float32 else out
        if bits is out:
            out[...] = x
        return not np.any(x & 0x7F80 == 0x7F80)


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
    decayed. If the norm is not finite nothing is written. Options: learning_rate, beta1, beta2, eps, weight_decay,
    step (from 1), max_norm to clip to (0 for none). Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
    """
    return _core.adamw(parameters, gradients, m, v, [p.ndim >= 2 for p in parameters], **options)


class _Tape:
    """How gradients flow back: one step for each operation that ran, the last one first.

    Operations that no weight to be trained went into have no step, and what they made wants no gradient. A gradient
    belongs to an array by identity (of a _Remade, by that of its source). Each step takes its output's gradient
    off and puts its inputs' there, so that memory is free as soon as it can be.
    """

    def __init__(self, weights: list[mx.array], memory: list[mx.array], scale: float = 1.0) -> None:
        self._weights = weights  # those to be trained
        self.memory = memory  # their gradients; if empty, made by the backward pass
        self.training = bool(memory)
        self.scale = np.float32(scale)  # what the gradient of a loss will be, as far as can be foretold
        self.steps: list[Callable[[_Tape], None]] = []
        self.output: np.ndarray | None = None
        self._activations: dict[int, np.ndarray] = {}
        self._parts: dict[int, Callable[[_Tape], np.ndarray]] = {}
        self._wanted = {id(w) for w in weights}  # of weights and activations whose gradient is wanted

    def record(self, step: Callable[[_Tape], None], output: np.ndarray, *inputs: Any) -> None:
        """Notes how the gradient of an output flows back to those of its inputs that want one, if any does.

        inputs are arrays, weights and None. What makes the gradients keeps the output in memory, and by that its
        identity.
        """
        if any(map(self.wants, inputs)):
            self._wanted.add(_identity(output))
            self.steps.append(step)

    def wants(self, array: Any) -> bool:
        """Whether the gradient of a weight, or of an activation, is wanted."""
        return _identity(array) in self._wanted

    @functools.cached_property
    def _of_weights(self) -> dict[int, mx.array]:
        if not self.memory:
            self.memory = [mx.zeros(w.shape) for w in self._weights]
            mx.eval(self.memory)
        return {id(w): m for w, m in zip(self._weights, self.memory, strict=True)}

    def of(self, weight: mx.array | None) -> Any:
        """The sum of a weight's gradients so far, for a kernel to add to. None of one that is frozen, and of None."""
        return self._of_weights[id(weight)] if self.wants(weight) else None

    def empty(self, array: np.ndarray | _Source) -> np.ndarray | None:
        """Memory for a gradient of an array, to be written and put there. None if it is not wanted."""
        if not self.wants(array):
            return None
        part = self._parts.get(_identity(array))
        return _empty(array.shape) if part is None else part(self)

    def part(self, array: np.ndarray, memory: Callable[[_Tape], np.ndarray]) -> None:
        """Says where the gradient of an array lies that is a part of another: what is put there is there."""
        self._parts[_identity(array)] = memory
        self._wanted.add(_identity(array))

    def put(self, array: np.ndarray | _Source | None, gradient: np.ndarray | None) -> None:
        """Adds to the gradient of an array, if it is wanted. The memory may be written to later."""
        if gradient is None or array is None or not self.wants(array) or _identity(array) in self._parts:
            return
        if (held := self._activations.get(_identity(array))) is None:
            self._activations[_identity(array)] = gradient
        else:
            held += gradient

    def has(self, array: np.ndarray | _Source) -> bool:
        return _identity(array) in self._activations

    def take(self, array: np.ndarray | _Source) -> np.ndarray:
        return self._activations.pop(_identity(array))

    def backward(self, cotangent: np.ndarray) -> tuple[mx.array, ...]:
        if self.output is None:
            raise ValueError("a model's gradient was asked for twice; call the model again")
        gradient = _empty(self.output.shape)
        gradient[...] = cotangent
        output, self.output = self.output, None
        self._unwind(output, gradient)
        return tuple(self._of_weights.values())

    def backward_again(self, call: Callable[[], np.ndarray], gradient: np.ndarray, x: np.ndarray) -> np.ndarray | None:
        """Records a call, whose result's gradient is given, and goes back through it at once -> x's gradient, if it is
        wanted."""
        # A tape of its own, because arrays that are made now may have the identity of some that are gone.
        tape = _Tape(self._weights, list(self._of_weights.values()), float(self.scale))
        if self.wants(x):
            tape._wanted.add(_identity(x))
        _state.tape = tape
        try:
            output = call()
        finally:
            _state.tape = None
        tape._unwind(output, gradient)
        return tape.take(x) if self.wants(x) else None

    def _unwind(self, output: np.ndarray, gradient: np.ndarray) -> None:
        self._activations[_identity(output)] = gradient
        while self.steps:
            self.steps.pop()(self)


class _Source:
    """How to make an array again."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> None:
        self.shape, self.make = shape, make


class _Remade(np.ndarray):
    """An array that is cheap to make: the backward pass makes it again, and its memory is free until then."""

    source: _Source


def _identity(array: Any) -> int:
    return id(getattr(array, "source", array))


def _kept(array: np.ndarray) -> Any:
    """What a step of the backward pass holds of an array, to be _made there."""
    return getattr(array, "source", array)


def _made(kept: Any) -> np.ndarray:
    return kept.make() if isinstance(kept, _Source) else kept


class _State(threading.local):
    """Of the method that runs on the kernels in this thread."""

    tape: _Tape | None = None  # none where no gradient is wanted
    bits: dict[int, mx.array] = {}  # noqa: RUF012 of bfloat16 parameters, by their identity
    seed: int | None = None  # of the dropout masks drawn so far


_state = _State()


def _run(tape: _Tape | None, method: Callable[..., Any], model: Any, args: list[Any]) -> mx.array:
    return mx.array(_run_to_numpy(tape, method, model, args))


def _run_to_numpy(tape: _Tape | None, method: Callable[..., Any], model: Any, args: list[Any]) -> np.ndarray:
    _state.tape, _state.seed = tape, None
    if tape is None:
        # The buffer protocol has no bfloat16: kernels take its bits.
        weights = model.named_weights().values()
        _state.bits = {id(w): w.view(mx.uint16) for w in weights if w.dtype == mx.bfloat16}
        mx.eval(model.parameters(), list(_state.bits.values()))
    try:
        output = method(model, *args)
    finally:
        _state.tape, _state.bits = None, {}
        _memory.forget_unused()
    if tape is not None:
        tape.output = output
    return output


def _record(step: Callable[[_Tape], None], output: np.ndarray, *inputs: Any) -> None:
    if _state.tape is not None:
        _state.tape.record(step, output, *inputs)


def _next_seed() -> int:
    """A dropout mask's: the run's first from MLX's generator, then counted on."""
    if _state.seed is None:
        _state.seed = int(mx.random.randint(0, 2**31 - 1)) << 32
    _state.seed += 1
    return _state.seed


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
            counts = _reference_counts(blocks)
            if _HELD_BY_LIST in counts:
                block = blocks[counts.index(_HELD_BY_LIST)]
            else:
                block = np.empty(n, np.float32)
                blocks.append(block)
            self._used.add(id(block))
            return block.reshape(shape)

    def forget_unused(self) -> None:
        with self._lock:
            kept = {n: [b for b in blocks if id(b) in self._used] for n, blocks in self._blocks.items()}
            self._blocks = {n: blocks for n, blocks in kept.items() if blocks}
            self._used.clear()


def _reference_counts(blocks: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(block) for block in blocks]


# What an array's count is that only a list holds: how many the loop itself adds depends on the interpreter.
(_HELD_BY_LIST,) = _reference_counts([np.empty(0)])

_memory = _Memory()
_empty = _memory.empty


def _view(array: mx.array) -> np.ndarray:
    """The memory of an evaluated MLX array: nothing is copied, writes reach the MLX array. Kernels take MLX
    arrays as they are, in the same way."""
    return np.array(array, copy=False)


def _rows(x: np.ndarray | None) -> Any:
    """(..., C) -> (N, C). None of None."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def checkpointed(module: nn.Module, x: np.ndarray, *args: Any) -> np.ndarray:
    """module(x, *args), of which only x is kept: the backward pass calls it again, with the same dropout masks."""
    tape, seed = _state.tape, _state.seed
    _state.tape = None
    try:
        out = module(x, *args)
    finally:
        _state.tape = tape
    if seed is None and _state.seed is not None:
        seed = _state.seed >> 32 << 32  # the run's first, which was drawn here

    def backward(tape: _Tape) -> None:
        _state.seed = seed
        tape.put(x, tape.backward_again(lambda: module(x, *args), tape.take(out), x))

    _record(backward, out, x, *dict(tree_flatten(module.parameters())).values())
    return out


# ---- the kernels, each with its gradient ----


def _stored(weight: Any) -> tuple[mx.array, dict[str, mx.array]]:
    """A matrix as kernels take it: an array, and of an ops.Quantized its scales and biases too."""
    if isinstance(weight, mx.array):
        return _state.bits.get(id(weight), weight), {}
    parts = (_state.bits.get(id(part), part) for part in (weight.scales, weight.biases))
    return weight.weight, dict(zip(("scales", "biases"), parts, strict=True))


def linear(
    x: np.ndarray, weight: Any, bias: mx.array | None, residual: np.ndarray | None, dropout_p: float
) -> np.ndarray:
    if dropout_p > 0:
        return dropout(linear(x, weight, bias, None, 0.0), dropout_p, residual)
    out = _empty((*x.shape[:-1], weight.shape[0]))
    matrix, parts = _stored(weight)
    _core.linear_forward(_rows(x), matrix, bias, _rows(out), residual=_rows(residual), **parts)
    kept = _kept(x)

    def backward(tape: _Tape) -> None:
        dout, dx, dweight = tape.take(out), tape.empty(kept), tape.of(weight)
        rows = None if dweight is None else _rows(_made(kept))
        _core.linear_backward(_rows(dout), rows, weight, _rows(dx), dweight, tape.of(bias), accumulate=True)
        tape.put(kept, dx)
        tape.put(residual, dout)

    _record(backward, out, x, weight, bias, residual)
    return out


def scaled_linear(x: np.ndarray, weight: mx.array, scale: float) -> np.ndarray:
    out = _empty((*x.shape[:-1], weight.shape[0]))
    _core.linear_forward(_rows(x), weight, None, _rows(out), scale=scale)
    kept = _kept(x)

    def backward(tape: _Tape) -> None:
        dout, dx, dweight = tape.take(out), tape.empty(kept), tape.of(weight)
        dout *= np.float32(scale)
        rows = None if dweight is None else _rows(_made(kept))
        _core.linear_backward(_rows(dout), rows, weight, _rows(dx), dweight, None, accumulate=True)
        tape.put(kept, dx)

    _record(backward, out, x, weight)
    return out


def mlp(
    x: np.ndarray, c_fc: nn.Module, c_proj: nn.Module, exact: bool, residual: np.ndarray, dropout_p: float
) -> np.ndarray:
    (fc, fc_parts), (proj, proj_parts) = _stored(c_fc.matrix), _stored(c_proj.matrix)
    fc_bias, proj_bias = c_fc.get("bias"), c_proj.get("bias")
    activation = "gelu" if exact else "gelu_new"
    h = _empty((*x.shape[:-1], fc.shape[0]))  # before the GELU
    activated, out = _empty(h.shape), _empty(x.shape)
    gelu = dict(activated=_rows(activated), activation=activation)
    _core.linear_forward(_rows(x), fc, fc_bias, _rows(h), **gelu, **fc_parts)
    added = residual if dropout_p == 0 else None
    _core.linear_forward(_rows(activated), proj, proj_bias, _rows(out), residual=_rows(added), **proj_parts)
    del activated  # the backward pass makes it again, in passing
    kept = _kept(x)

    def backward(tape: _Tape) -> None:
        dout, dx, dfc, dproj = tape.take(out), tape.empty(kept), tape.of(fc), tape.of(proj)
        dh, pre, rows = _rows(_empty(h.shape)), _rows(h), _rows(dout)
        activated = None if dproj is None else _rows(_empty(h.shape))
        _core.linear_backward(rows, None, proj, dh, None, None, pre=pre, activated=activated, activation=activation)
        _core.linear_backward(rows, activated, proj, None, dproj, tape.of(proj_bias), accumulate=True)
        rows = None if dfc is None else _rows(_made(kept))
        _core.linear_backward(dh, rows, fc, _rows(dx), dfc, tape.of(fc_bias), accumulate=True)
        tape.put(kept, dx)
        tape.put(added, dout)

    _record(backward, out, x, added, fc, fc_bias, proj, proj_bias)
    return out if dropout_p == 0 else dropout(out, dropout_p, residual)


def embeddings(ids: np.ndarray, tokens: Any, positions: Any, offsets: np.ndarray | None) -> np.ndarray:
    ids, T = np.ascontiguousarray(ids, np.int32), ids.shape[1]
    out = _empty((*ids.shape, tokens.shape[1]))
    matrix, parts = _stored(tokens)
    at = _view(positions)[:T] if offsets is None else positions
    _core.embedding_forward(ids, matrix, at, out, offsets=offsets, **parts)

    def backward(tape: _Tape) -> None:
        dpositions = tape.of(positions)
        dpositions = None if dpositions is None else _view(dpositions)[:T]
        _core.embedding_backward(ids, tape.take(out), tape.of(tokens), dpositions)

    _record(backward, out, tokens, positions)
    return out


def layer_norm(x: np.ndarray, weight: mx.array, bias: mx.array | None, eps: float) -> np.ndarray:
    rows = _rows(x)
    mean, rstd = _empty((len(rows),)), _empty((len(rows),))

    def make() -> np.ndarray:
        out = _empty(x.shape)
        _core.layer_norm_forward(rows, weight, bias, eps, _rows(out), mean, rstd)
        return out

    out = make().view(_Remade)
    out.source = source = _Source(x.shape, make)

    def backward(tape: _Tape) -> None:
        dout, add = tape.take(source), tape.has(x)  # what came along the residual stream is added to in place
        dx = tape.take(x) if add else tape.empty(x)
        if dx is None:  # the kernel makes it all the same
            dx = _empty(x.shape)
        _core.layer_norm_backward(
            _rows(dout), rows, weight, mean, rstd, _rows(dx), tape.of(weight), tape.of(bias),
            add_to_dx=add, accumulate=True,
        )  # fmt: skip
        tape.put(x, dx)

    _record(backward, out, x, weight, bias)
    return out


def gelu(x: np.ndarray, exact: bool) -> np.ndarray:
    activation = "gelu" if exact else "gelu_new"

    def make() -> np.ndarray:
        out = _empty(x.shape)
        _core.gelu_forward(_rows(x), _rows(out), activation)
        return out

    out = make().view(_Remade)
    out.source = source = _Source(x.shape, make)

    def backward(tape: _Tape) -> None:
        gradient = tape.take(source)
        _core.gelu_backward(_rows(x), _rows(gradient), activation)
        tape.put(x, gradient)

    _record(backward, out, x)
    return out


def dropout(x: np.ndarray, p: float, residual: np.ndarray | None) -> np.ndarray:
    if p == 0 and residual is None:
        return x
    seed, out = _next_seed(), _empty(x.shape)
    _core.dropout(x, residual, p, seed, out)

    def backward(tape: _Tape) -> None:
        dout, dx = tape.take(out), tape.empty(x)
        if dx is not None:
            _core.dropout(dout, None, p, seed, dx)
        tape.put(x, dx)
        tape.put(residual, dout)

    _record(backward, out, x, residual)
    return out


def _heads_of(x: np.ndarray, n_head: int) -> np.ndarray:
    """(B, T, C) seen as (B, n_head, T, head_dim)."""
    return x.reshape(*x.shape[:2], n_head, -1).swapaxes(1, 2)


def _thirds(qkv: np.ndarray, n_head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values side by side, (B, T, 3C), seen as three (B, n_head, T, head_dim)."""
    C = qkv.shape[-1] // 3
    q, k, v = (_heads_of(qkv[..., n * C : (n + 1) * C], n_head) for n in range(3))
    return q, k, v


def split_heads(qkv: np.ndarray, n_head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = _thirds(qkv, n_head)
    if (tape := _state.tape) is not None and tape.wants(qkv):
        for i, part in enumerate(parts):

            def memory(tape: _Tape, i: int = i) -> np.ndarray:
                whole = tape.take(qkv) if tape.has(qkv) else _empty(qkv.shape)
                tape.put(qkv, whole)
                return _thirds(whole, n_head)[i]

            tape.part(part, memory)
    return parts


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, dropout_p: float) -> np.ndarray:
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

    _record(backward, out, q, k, v)
    return out


def cached_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, keys: np.ndarray, values: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    B, n_head, T, head_dim = q.shape
    out = _empty((B, T, n_head, head_dim)).swapaxes(1, 2)
    _core.attention_cached(q, k, v, keys, values, offsets, out, scale=head_dim**-0.5)
    return out


def merge_heads(y: np.ndarray) -> np.ndarray:
    B, n_head, T, head_dim = y.shape
    merged = y.swapaxes(1, 2).reshape(B, T, n_head * head_dim)  # no copy: attention writes (B, T, n_head, head_dim)
    _record(lambda tape: tape.put(y, _heads_of(tape.take(merged), n_head)), merged, y)
    return merged


def linear_cross_entropy(x: np.ndarray, weight: Any, targets: np.ndarray) -> np.ndarray:
    tape, rows = _state.tape, _rows(x)
    targets = np.ascontiguousarray(targets, np.int32).reshape(-1)

    def loss_and_gradients(tape: _Tape) -> tuple[float, np.ndarray | None]:
        dx = tape.empty(x)
        into = _rows(dx), tape.of(weight)
        return _core.linear_cross_entropy(rows, weight, targets, *into, accumulate=True, scale=tape.scale), dx

    at_once = None
    if tape is not None and tape.training:  # then the logits are made once for the loss and its gradient
        value, _ = at_once = loss_and_gradients(tape)
    else:
        matrix, parts = _stored(weight)
        value = _core.linear_cross_entropy(rows, matrix, targets, **parts)
    loss = np.array(value, np.float32)

    def backward(tape: _Tape) -> None:
        cotangent = tape.take(loss)
        _, gradient = at_once or loss_and_gradients(tape)
        if cotangent != tape.scale:  # in MLX's graph, where no earlier gradient is in the weight's memory
            for array in (gradient, tape.of(weight)):
                if array is not None:
                    np.array(array, copy=False)[...] *= cotangent / tape.scale
        tape.put(x, gradient)

    _record(backward, loss, x, weight)
    return loss
