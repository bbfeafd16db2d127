"""The cross entropy of a linear layer's outputs, in chunks of rows: logits (N, V) never exist all at one time."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .differentiable import Differentiable, after
from .matrices import Matrix, product, product_gradient

LOGITS = 2**22  # in a chunk, at least: with much fewer a GPU would not be busy
_ROWS = 4096  # in a chunk, at most: the sum of more rows' gradients might exceed float16


def linear_mean_loss(
    x: mx.array, matrix: Matrix, targets: mx.array, training: bool = False, is_frozen: bool = False
) -> mx.array:
    """Mean of -log softmax(x W^T)[target] over the targets that are not -1, in float32.

    x (N, C), matrix (V, C), targets (N,) int32 in [0, V), or -1 to be ignored -> scalar.

    In training the gradients are computed together with the loss, from the same logits. Else the loss alone is, and
    its gradient takes the logits once more. A frozen matrix has no gradient, and a quantized one never has.
    """
    trained = [] if is_frozen or not isinstance(matrix, mx.array) else [matrix]
    chunked = _Chunked(matrix, targets, is_frozen=not trained)
    at_once: list[list[mx.array]] = []

    def forward(x: mx.array, *_: mx.array) -> mx.array:
        if not training:
            return chunked.loss(x)
        loss, *gradients = chunked.loss_and_gradients(x)
        at_once.append(gradients)
        return loss

    def backward(arrays: Sequence[mx.array], _: mx.array, cotangent: mx.array) -> list[mx.array]:
        gradients = at_once.pop() if at_once else chunked.loss_and_gradients(arrays[0])[1:]
        # A float16 gradient is multiplied by the loss scale, which the cotangent has, before it is divided by N.
        factor = cotangent / _count(targets)
        return [(g * factor).astype(a.dtype) for g, a in zip(gradients, arrays, strict=True)]

    return Differentiable(forward, backward)(x, *trained)


def chunk_rows(N: int, C: int, V: int) -> int:
    """Rows of a chunk of N rows, at most: their logits are a quarter as many as the matrix has numbers, or LOGITS.

    With fewer rows, adding to the matrix's gradient would take longer than computing what is added.
    """
    return min(N, _ROWS, max(C // 4, LOGITS // V, 1))


class _Chunked:
    """The sum of the losses over chunks of rows, each of which is made to wait for the one before it."""

    def __init__(self, matrix: Matrix, targets: mx.array, is_frozen: bool) -> None:
        self._matrix, self._targets, self._is_frozen = matrix, targets, is_frozen

    def _chunks(self, N: int) -> list[slice]:
        count = -(-N // chunk_rows(N, *reversed(self._matrix.shape)))
        return [slice(N * n // count, N * (n + 1) // count) for n in range(count)]

    def loss(self, x: mx.array) -> mx.array:
        total: list[mx.array] = []
        for rows in self._chunks(len(x)):
            logits = product(after(x[rows], total), self._matrix).astype(mx.float32)  # (n, V)
            total = [sum(total, _losses(logits, self._targets[rows])[0].sum())]
        return total[0] / _count(self._targets)

    def loss_and_gradients(self, x: mx.array) -> list[mx.array]:
        """The mean loss, and the gradients of the losses' sum: of x (N, C) and, unless it is frozen, of the matrix in
        float32 (V, C)."""
        dx: list[mx.array] = []
        sums: list[mx.array] = []  # the losses, and the matrix's gradient
        for rows in self._chunks(len(x)):
            part, targets = after(x[rows], [*dx[-1:], *sums]), self._targets[rows]  # (n, C), (n,)
            logits = product(part, self._matrix).astype(mx.float32)  # (n, V)
            losses, normalizer = _losses(logits, targets)  # (n,), (n, 1)
            normalizer = mx.where((targets >= 0)[:, None], normalizer, mx.inf)  # ignored rows have no gradient
            is_target = mx.arange(logits.shape[1]) == targets[:, None]  # (n, V)
            dlogits = (mx.exp(logits - normalizer) - is_target).astype(x.dtype)  # (n, V)
            dx.append(product_gradient(dlogits, self._matrix))  # (n, C)
            sums = self._add(sums, losses.sum(), dlogits, part)
        loss, *dmatrix = sums
        return [loss / _count(self._targets), mx.concatenate(dx), *dmatrix]

    def _add(self, sums: list[mx.array], loss: mx.array, dlogits: mx.array, part: mx.array) -> list[mx.array]:
        """The sums of the losses and, unless it is frozen, of the matrix's gradient, with those of one more chunk."""
        total = [sum(sums[:1], loss)]
        if self._is_frozen:
            return total
        if not sums:
            return [*total, (dlogits.T @ part).astype(mx.float32)]  # (V, n) (n, C) -> (V, C)
        if part.dtype == mx.float32:
            return [*total, mx.addmm(sums[1], dlogits.T, part)]
        return [*total, sums[1] + dlogits.T @ part]


def _losses(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Each row's loss, 0 where the target is ignored, and log-sum-exp. logits (..., V), targets (...) -> (...) and
    (..., 1)."""
    normalizer = mx.logsumexp(logits, axis=-1, keepdims=True)  # (..., 1)
    picked = mx.take_along_axis(logits, mx.maximum(targets, 0)[..., None], axis=-1)  # (..., 1)
    return mx.where(targets >= 0, (normalizer - picked)[..., 0], 0), normalizer


def _count(targets: mx.array) -> mx.array:
    return mx.maximum((targets >= 0).sum(), 1)
