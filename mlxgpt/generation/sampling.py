"""From logits to the next token: small functions, and the Sampler that runs them in order.

Each function takes logits (B, V) float32 and returns new ones of that shape, -inf where a token is cut. NumPy arrays
and MLX arrays go through alike, each row by itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import mlx.core as mx
import numpy as np

from ..common.settings import require, require_seed

Array = TypeVar("Array", mx.array, np.ndarray)

_BLOCK = 256  # V / 256 blocks and then 256 tokens are cumulated, in place of V tokens
_GREEDY_BELOW = 1e-5  # logits divided by less would leave float32's range


def logit_bias(logits: Array, bias: Mapping[int, float]) -> Array:
    """Adds a number to the logits of some ids; -inf forbids one. ValueError for an id outside [0, V)."""
    V = logits.shape[-1]
    ids = list(bias)
    for token in ids:
        if not 0 <= token < V:
            raise ValueError(f"logit_bias: id {token}, expected 0 to {V - 1}")
    values = np.array(list(bias.values()), np.float32)
    if isinstance(logits, mx.array):
        return logits.at[:, mx.array(ids)].add(mx.array(values)) if ids else logits
    logits = logits.copy()
    logits[:, ids] += values
    return logits


def repetition_penalty(logits: Array, seen: Array, penalty: float) -> Array:
    """Makes ids that have occurred less likely, where penalty > 1: divides logits above 0 by it, multiplies others.

    seen (B, V) bool. Keskar et al. 2019, https://arxiv.org/abs/1909.05858, by the rule that transformers made of it.
    """
    if isinstance(logits, mx.array):
        return mx.where(seen, mx.where(logits < 0, logits * penalty, logits / penalty), logits)
    logits = logits.copy()
    some = logits[seen]
    logits[seen] = np.where(some < 0, some * penalty, some / penalty)
    return logits


def temperature(logits: Array, value: float) -> Array:
    """Divides the logits: below 1 the likely tokens gain, above 1 the unlikely."""
    return logits / value


def top_k(logits: Array, k: int) -> Array:
    """Keeps the k most likely tokens, and those as likely as the last of them. 0 keeps all."""
    V = logits.shape[-1]
    if not 0 < k < V:
        return logits
    if isinstance(logits, mx.array):
        kth = mx.topk(logits, k, axis=-1).min(axis=-1, keepdims=True)  # (B, 1)
        return mx.where(logits < kth, -mx.inf, logits)
    kth = np.partition(logits, V - k, axis=-1)[:, V - k, None]  # (B, 1)
    return np.where(logits < kth, -np.inf, logits)


def top_p(logits: Array, p: float) -> Array:
    """Keeps the nucleus: the fewest tokens whose probabilities sum to p or more, of equals those with the lower ids.

    Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
    """
    if p >= 1:
        return logits
    if isinstance(logits, np.ndarray):
        return np.stack([_nucleus(row, p) for row in logits])
    probability = mx.softmax(logits, axis=-1)  # (B, V)
    falling = -mx.sort(-probability, axis=-1)
    last = mx.sum(mx.cumsum(falling, axis=-1) < p, axis=-1, keepdims=True)  # (B, 1): its index is the first to reach p
    last = mx.minimum(last, logits.shape[-1] - 1)
    least = mx.take_along_axis(falling, last, axis=-1)  # (B, 1)
    more, equal = probability > least, probability == least
    room = last + 1 - mx.sum(more, axis=-1, keepdims=True)
    return mx.where(more | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= room)), logits, -mx.inf)


def _nucleus(row: np.ndarray, p: float) -> np.ndarray:
    """top_p of one row (V,)."""
    weight = np.exp(row - row.max())
    total = weight.sum(dtype=np.float64)
    # All tokens below (1 - p) / V together have less than 1 - p, so the nucleus lies above: far fewer to sort.
    rising = np.sort(weight[np.flatnonzero(weight >= (1 - p) / len(row) * total)])
    size = _find(rising[::-1], p * total, "left") + 1
    least = rising[-size]
    n_more = len(rising) - int(rising.searchsorted(least, side="right"))
    kept = np.where(weight > least, row, -np.inf)
    equal = np.flatnonzero(weight == least)[: size - n_more]
    kept[equal] = row[equal]
    return kept


def min_p(logits: Array, p: float) -> Array:
    """Keeps the tokens of at least p times the most likely one's probability. 0 keeps all.

    Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.
    """
    if p <= 0:
        return logits
    if isinstance(logits, mx.array):
        return mx.where(logits < logits.max(axis=-1, keepdims=True) + math.log(p), -mx.inf, logits)
    return np.where(logits < logits.max(axis=-1, keepdims=True) + math.log(p), -np.inf, logits)


def most_likely(logits: Array) -> Array:
    """The token of the largest logit, of equals the lowest. (B, V) -> (B,) int32."""
    if isinstance(logits, mx.array):
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    return logits.argmax(axis=-1).astype(np.int32)


def draw(logits: Array, u: np.ndarray) -> Array:
    """Tokens by their probabilities, softmax(logits): the first whose cumulated probability is above u.

    u (B,) in [0, 1) -> (B,) int32. Never a token of probability 0, however sums are rounded.
    """
    if isinstance(logits, mx.array):
        weight = mx.softmax(logits, axis=-1)  # (B, V)
        # a parallel sum can move by a rounding where a weight is 0
        sums = mx.where(weight > 0, mx.cumsum(weight, axis=-1), 0)
        total = sums.max(axis=-1, keepdims=True)  # (B, 1)
        under = mx.minimum(mx.array(u, mx.float32)[:, None] * total, total * (1 - 2**-23))
        return mx.argmax(sums > under, axis=-1).astype(mx.int32)
    return draw_from(np.exp(logits - logits.max(axis=-1, keepdims=True)), u)


def draw_from(weight: np.ndarray, u: np.ndarray) -> np.ndarray:
    """draw by weights (B, V), which need not sum to 1 and are not all 0. u (B,) -> (B,) int32."""
    shares = u * weight.sum(axis=-1, dtype=np.float64)
    return np.array([_find(row, share, "right") for row, share in zip(weight, shares, strict=True)], np.int32)


def _find(weight: np.ndarray, share: float, side: Literal["left", "right"]) -> int:
    """Where the cumulated weight (V,) passes `share`, or with "left" reaches it; never where the weight is 0."""
    blocks = np.add.reduceat(weight, np.arange(0, len(weight), _BLOCK))
    block, rest = _find_in(blocks, share, side)
    start = block * _BLOCK
    return start + _find_in(weight[start : start + _BLOCK], rest, side)[0]


def _find_in(weight: np.ndarray, share: float, side: Literal["left", "right"]) -> tuple[int, float]:
    """_find without blocks, and what of `share` is left there."""
    sums = weight.cumsum(dtype=np.float64)
    share = min(share, np.nextafter(sums[-1], 0))  # sums are rounded, and there must be one above it
    at = int(sums.searchsorted(share, side))
    return at, share - (sums[at - 1] if at else 0.0)


def logprobs(logits: Array, tokens: Array) -> Array:
    """Log-probability of one token of each row. logits (B, V), tokens (B,) -> (B,) float32."""
    if isinstance(logits, mx.array):
        at = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]  # (B,)
        return at - mx.logsumexp(logits, axis=-1)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    at = np.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0]  # (B,)
    return at - np.log(np.exp(shifted).sum(axis=-1))


def uniforms(seed: int, B: int) -> Iterator[np.ndarray]:
    """Numbers in [0, 1) without end, (B,) at a time: row n's are those of seed + n alone, whatever B is."""
    rows = [random.Random(seed + n).random for n in range(B)]
    while True:
        yield np.array([row() for row in rows])


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. In transformers' order: logit_bias, repetition_penalty, temperature, top_k,
    top_p, min_p, each of what the ones before it left; then a draw. ValueError for a setting out of its range."""

    temperature: float = 0.8
    """divides the logits; 0 takes the most likely token"""
    top_k: int = 0
    """sample among the k most likely tokens; 0 among all"""
    top_p: float = 1.0
    """sample among the fewest tokens whose probabilities sum to this"""
    min_p: float = 0.0
    """sample among tokens of at least this times the most likely one's probability"""
    repetition_penalty: float = 1.0
    """above 1, tokens of the text so far become less likely"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """numbers added to the logits of some ids, on the command line as ID:BIAS,ID:BIAS; -inf forbids one"""
    seed: int = 1337
    """same seed, same text"""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        require(self.temperature < math.inf, "temperature", self.temperature, "a finite number")
        require(self.top_k >= 0, "top_k", self.top_k, "at least 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "0 < top_p <= 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 <= min_p <= 1")
        penalty = self.repetition_penalty
        require(0 < penalty < math.inf, "repetition_penalty", penalty, "a finite number above 0")
        for token, bias in self.logit_bias.items():
            require(token >= 0, "logit_bias: id", token, "at least 0")
            require(bias < math.inf, f"logit_bias: {token}'s", bias, "a finite number, or -inf")
        require_seed(self.seed)

    @property
    def greedy(self) -> bool:
        """No draw: the most likely token."""
        return self.temperature < _GREEDY_BELOW

    def process(self, logits: Array, seen: Array | None = None) -> Array:
        """The logits whose softmax is drawn from. logits (B, V), seen (B, V) bool -> (B, V).

        seen, the ids in each row's text so far, is asked for only where repetition_penalty is not 1. Of a greedy
        sampler, which takes the largest, what can't change that is left out: all from temperature on.
        ValueError for logits that are NaN or infinite, and where every token of a row is forbidden; of MLX arrays,
        which stay lazy, this is asked when they are drawn from.
        """
        _check(logits)
        if self.logit_bias:
            logits = logit_bias(logits, self.logit_bias)
            _check(logits)
        if self.repetition_penalty != 1:
            if seen is None:
                raise ValueError(f"repetition_penalty is {self.repetition_penalty}, but the ids seen are not given")
            logits = repetition_penalty(logits, seen, self.repetition_penalty)
        if self.greedy:
            return logits
        if self.temperature != 1:
            logits = temperature(logits, self.temperature)
        return min_p(top_p(top_k(logits, self.top_k), self.top_p), self.min_p)

    def __call__(self, logits: Array, seen: Array | None = None, u: np.ndarray | None = None) -> Array:
        """The next token of each row: (B, V) -> (B,) int32. u (B,) in [0, 1), which a greedy sampler does without.

        ValueError as `process`; in an MLX array, which stays lazy, a row that it is for has -1 in its place.
        """
        given, logits = logits, self.process(logits, seen)
        if self.greedy:
            tokens = most_likely(logits)
        elif u is None:
            raise ValueError(f"temperature is {self.temperature}, but no random numbers are given")
        else:
            tokens = draw(logits, u)
        if isinstance(logits, mx.array):
            numbers = mx.all(given < mx.inf, axis=-1) & mx.any(logits > -mx.inf, axis=-1)  # NaN < inf is false
            tokens = mx.where(numbers, tokens, -1)
        return tokens

    def probabilities(self, logits: Array, seen: Array | None = None) -> Array:
        """What each token is drawn with: (B, V) -> (B, V), 1 for a greedy sampler's one token."""
        logits = self.process(logits, seen)
        if isinstance(logits, mx.array):
            if self.greedy:
                return (mx.arange(logits.shape[-1]) == most_likely(logits)[:, None]).astype(mx.float32)
            return mx.softmax(logits, axis=-1)
        if self.greedy:
            return (np.arange(logits.shape[-1]) == most_likely(logits)[:, None]).astype(np.float32)
        weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weight / weight.sum(axis=-1, keepdims=True)


def _check(logits: Array) -> None:
    """ValueError unless each row's largest is a finite number. NumPy's maximum is NaN where one element is."""
    if isinstance(logits, np.ndarray) and not np.isfinite(peak := logits.max(axis=-1)).all():
        raise ValueError(f"logits: the largest is {peak[~np.isfinite(peak)][0]}, expected a finite number")
