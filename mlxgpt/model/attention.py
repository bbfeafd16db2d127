"""Causal attention in training, by MLX's operations: which way a device takes, and attention in blocks of queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import mlx.core as mx

from .differentiable import after, dropout_mask

QUERIES = 128  # rows of a block: scores are (B, n_head, 128, T_k) at a time

Way = Literal["blocks", "fused forward", "mlx"]
_forced: list[Way] = []

# Head sizes that MLX's kernels have: on Metal with more than 8 queries, and with cuDNN (multiples of 8, in half
# precision, with a gradient for multiples of 128 positions).
_METAL_HEAD_DIMS = (64, 72, 80, 96, 128)


def way(q: mx.array, dropout_p: float) -> Way:
    """How attention is computed where it may have a gradient. q (B, n_head, T_q, head_dim).

    "mlx" is MLX's own function, which has a fused gradient on CUDA. "blocks" is BlockedAttention, and "fused forward"
    the same with MLX's kernel for the forward pass. MLX's gradient on Metal holds more (scripts/LOG.md).
    """
    if _forced:
        return _forced[-1]
    T_q, head_dim = q.shape[2:]
    if dropout_p or mx.default_device().type != mx.gpu:
        return "blocks"
    if mx.metal.is_available():
        return "fused forward" if head_dim in _METAL_HEAD_DIMS and T_q > 8 else "blocks"
    has_gradient = q.dtype != mx.float32 and T_q % 128 == 0 and head_dim % 8 == 0 and head_dim <= 128
    return "mlx" if has_gradient else "blocks"


@contextmanager
def forced(name: Way) -> Iterator[None]:
    """While it is entered, attention is computed in this way."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


class _Block(NamedTuple):
    """The rows of queries start to stop, which see the first n_keys keys."""

    start: int
    stop: int
    n_keys: int


def _blocks(T_q: int, T_k: int) -> list[_Block]:
    stops = range(QUERIES, T_q + QUERIES, QUERIES)
    return [_Block(stop - QUERIES, min(stop, T_q), min(stop, T_q) + T_k - T_q) for stop in stops]


class BlockedAttention:
    """Causal attention over blocks of queries. Each reads the keys up to its diagonal only.

    Beside its arguments and results it holds O(block x T_k) numbers for each head. The backward pass computes a block's
    softmax once more, as in Dao et al. 2022, https://arxiv.org/abs/2205.14135, and draws its dropout mask again.
    """

    def __init__(self, dropout_p: float, key: mx.array | None, fused_forward: bool) -> None:
        """The key is that of the dropout masks. With fused_forward the forward pass is MLX's own kernel."""
        self._p, self._key, self._fused_forward = dropout_p, key, fused_forward

    def forward(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """q (B, n_head, T_q, head_dim), k and v (B, n_head, T_k, head_dim) -> as q."""
        if self._fused_forward:
            scale = q.shape[-1] ** -0.5
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal", force_fused=True)
        blocks = _blocks(q.shape[2], k.shape[2])
        parts: list[mx.array] = []
        for (start, stop, n_keys), key in zip(blocks, self._keys(len(blocks), self._key), strict=True):
            rows = after(q[:, :, start:stop], parts[-1:])
            weights = self._weights(rows, k[:, :, :n_keys])  # (B, n_head, rows, n_keys)
            if key is not None:
                weights = weights * dropout_mask(self._p, weights.shape, key, weights.dtype)
            parts.append(weights @ v[:, :, :n_keys])
        return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]

    def backward(self, arrays: Sequence[mx.array], out: mx.array, dout: mx.array) -> list[mx.array]:
        """-> dq, dk, dv. Blocks are taken from the last: no earlier one adds to the keys of its diagonal."""
        q, k, v = arrays
        scale, blocks = q.shape[-1] ** -0.5, _blocks(q.shape[2], k.shape[2])
        dq: list[mx.array] = []
        done: list[list[mx.array]] = [[], []]  # parts of dk and dv that are complete, the last ones first
        sums: list[mx.array] = []  # of dk and dv, for the keys before those
        block_keys = self._keys(len(blocks), None if self._key is None else after(self._key, [dout]))
        for (start, stop, n_keys), key in zip(reversed(blocks), reversed(block_keys), strict=True):
            drows = after(dout[:, :, start:stop], [*dq[-1:], *sums])
            rows, keys, values = after(q[:, :, start:stop], [drows]), k[:, :, :n_keys], v[:, :, :n_keys]
            weights = self._weights(rows, keys)  # (B, n_head, rows, n_keys)
            dweights = drows @ values.swapaxes(-1, -2)
            dropped = weights
            if key is not None:
                mask = dropout_mask(self._p, weights.shape, key, weights.dtype)
                dropped, dweights = weights * mask, dweights * mask
            dv = dropped.swapaxes(-1, -2) @ drows  # (B, n_head, n_keys, head_dim)
            # sum(weights * dweights) over the keys, in a cheaper way
            mean = (drows.astype(mx.float32) * out[:, :, start:stop]).sum(axis=-1, keepdims=True).astype(q.dtype)
            dscores = weights * (dweights - mean)
            dq.append((dscores @ keys) * scale)
            dk = dscores.swapaxes(-1, -2) @ (rows * scale)  # (B, n_head, n_keys, head_dim)
            new = [dk.astype(mx.float32), dv.astype(mx.float32)]
            if sums:
                for sum_, parts in zip(sums, done, strict=True):
                    parts.append(mx.contiguous(sum_[:, :, n_keys:]))
                new = [sum_[:, :, :n_keys] + one for sum_, one in zip(sums, new, strict=True)]
            sums = new
        for sum_, parts in zip(sums, done, strict=True):
            parts.append(sum_)
        dk, dv = (mx.concatenate(parts[::-1], axis=2).astype(q.dtype) for parts in done)
        return [mx.concatenate(dq[::-1], axis=2), dk, dv]

    def _weights(self, rows: mx.array, keys: mx.array) -> mx.array:
        """The softmax of the scores of a block's last rows: rows (B, n_head, n, head_dim) and keys (B, n_head, n_keys,
        head_dim) -> (B, n_head, n, n_keys)."""
        n, n_keys = rows.shape[2], keys.shape[2]
        scores = (rows * rows.shape[-1] ** -0.5) @ keys.swapaxes(-1, -2)
        visible = mx.arange(n_keys) <= mx.arange(n_keys - n, n_keys)[:, None]  # (n, n_keys)
        return mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1, precise=True)

    def _keys(self, count: int, key: mx.array | None) -> Sequence[mx.array | None]:
        """The keys of the blocks' dropout masks, from one for all; None without dropout."""
        return [None] * count if key is None else list(mx.random.split(key, count))
