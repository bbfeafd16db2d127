"""How well a model predicts a text: every token of it, in windows that overlap."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..data.tokenizer import Tokenizer
from ..model import ops
from ..model.gpt import GPT


@dataclass(frozen=True)
class Evaluation:
    """How well a model has predicted the tokens of a text."""

    nats: float  # the sum of -log p(token | the tokens before it)
    counts: np.ndarray  # (V,) int64: how often each id was predicted

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def loss(self) -> float:
        """Nats per token: the mean cross entropy."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e^loss."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    def bytes(self, tokenizer: Tokenizer) -> int:
        """The size in UTF-8 of the predicted tokens' text. An end-of-text between two documents has no bytes."""
        ids = (int(token) for token in np.flatnonzero(self.counts) if token != tokenizer.end_of_text)
        return sum(int(self.counts[token]) * len(tokenizer.token_bytes(token)) for token in ids)

    def bits_per_byte(self, tokenizer: Tokenizer) -> float:
        """nats / ln 2 per byte of the predicted text: a measure that models with different tokenizers share."""
        return self.nats / math.log(2) / self.bytes(tokenizer)


def windows(tokens: np.ndarray, block_size: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts a text into windows that predict every token but the first once -> inputs and targets, each (T,) int32.

    tokens (n,) of any integer type, n at least 2; T is block_size, or n - 1 if that is less. Windows begin every
    `stride` tokens. A target is -1 where an earlier window predicts it already, and where the last window is padded.
    So a token is predicted from at least block_size - stride + 1 tokens, or from all tokens before it.
    Source: the strided windows of Hugging Face's "Perplexity of fixed-length models".
    """
    n = len(tokens) - 1
    T = min(block_size, n)
    counted = 0
    for start in range(0, n, stride):
        size = min(T, n - start)
        ids, targets = np.zeros(T, np.int32), np.full(T, -1, np.int32)
        ids[:size] = tokens[start : start + size]
        targets[counted - start : size] = tokens[counted + 1 : start + size + 1]
        yield ids, targets
        counted = start + size
        if counted == n:
            return


def default_stride(model: GPT) -> int:
    """Half of block_size, in tokens: a token then has at least half of the model's context."""
    return max(1, model.config.block_size // 2)


def evaluate(
    model: GPT,
    tokens: np.ndarray,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int, float], None] = lambda tokens, nats: None,
) -> Evaluation:
    """A model's loss on every token of a text but the first. tokens (n,) of any integer type, ids below V.

    stride is as in `windows`; None is `default_stride`. batch_size windows are computed together. on_batch is called
    with the number of tokens and the nats of each batch. Batches are summed in float64. The model is left in
    evaluation mode.
    ValueError for fewer than 2 tokens, a stride outside of 1 to block_size, and a loss that is not finite.
    """
    block_size = model.config.block_size
    stride = default_stride(model) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride is {stride}, expected 1 to block_size = {block_size}")
    if len(tokens) < 2:
        raise ValueError(f"data: {len(tokens)} tokens, expected at least 2: one to begin with, and one to predict")
    model.eval()  # no dropout
    nats, counts = 0.0, np.zeros(model.config.vocab_size, np.int64)
    for targets, loss in _losses(model, _batches(windows(tokens, block_size, stride), batch_size)):
        predicted = targets[targets >= 0]
        batch_nats = float(loss) * len(predicted)
        if not math.isfinite(batch_nats):
            raise ValueError(f"model: the loss is {batch_nats} after {counts.sum()} tokens, expected a finite number")
        nats += batch_nats
        counts += np.bincount(predicted, minlength=len(counts))
        on_batch(len(predicted), batch_nats)
    return Evaluation(nats, counts)


def _losses(model: GPT, batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, Any]]:
    """Each batch's targets and its loss. Off the kernels MLX computes the next one while the caller reads this one."""
    unread: list[tuple[np.ndarray, Any]] = []
    for ids, targets in batches:
        unread.append((targets, ops.without_gradient(model, GPT.loss, ids, targets)))
        mx.async_eval(unread[-1][1])
        if len(unread) > 1 or ops.on_kernels(model):
            yield unread.pop(0)
    yield from unread


def _batches(
    pairs: Iterator[tuple[np.ndarray, np.ndarray]], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Stacks windows of (T,) to batches: inputs and targets, each (B, T). The last B may be below batch_size."""
    while batch := list(itertools.islice(pairs, batch_size)):
        ids, targets = zip(*batch, strict=True)
        yield np.stack(ids), np.stack(targets)
