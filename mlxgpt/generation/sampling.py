"""From logits to the next token: one function for each setting of the Sampler, which applies them in order.

Each function takes logits (B, V) float32 and returns new logits of that shape, with -inf for a token that is left out.
All take NumPy arrays and MLX arrays alike, and treat each row by itself. A new setting is a function here, and a field
of the Sampler at the place where it applies.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, TypeVar

import mlx.core as mx
import numpy as np

from ..common.settings import require, require_seed

Array = TypeVar("Array", mx.array, np.ndarray)
Check = Callable[[str, Any], None]  # of a setting's name and value: ValueError for one out of its range

_BLOCK = 256  # a sum over V tokens is searched as V / 256 blocks and then the 256 tokens of one block
_GREEDY_BELOW = 1e-5  # logits divided by a smaller temperature would leave float32's range


def logit_bias(logits: Array, bias: Mapping[int, float]) -> Array:
    """Adds a number to the logits of some ids; -inf forbids one.

    ValueError for an id outside [0, V), and in NumPy where every token of a row is forbidden.
    """
    if not bias:
        return logits
    V = logits.shape[-1]
    ids = list(bias)
    for token in ids:
        if not 0 <= token < V:
            raise ValueError(f"logit_bias: id {token}, expected 0 to {V - 1}")
    values = np.array(list(bias.values()), np.float32)
    if isinstance(logits, mx.array):
        return logits.at[:, mx.array(ids)].add(mx.array(values))
    logits = logits.copy()
    logits[:, ids] += values
    _require_finite(logits)
    return logits


def repetition_penalty(logits: Array, penalty: float, seen: Array | None) -> Array:
    """Makes ids that have occurred less likely, where penalty > 1: divides logits above 0 by it, multiplies others.

    seen (B, V) bool: the ids in each row's text so far; ValueError for None, unless the penalty is 1.
    Keskar et al. 2019, https://arxiv.org/abs/1909.05858; the rule for logits below 0 is from transformers.
    """
    if penalty == 1:
        return logits
    if seen is None:
        raise ValueError(f"repetition_penalty is {penalty}, but the ids seen are not given")
    if isinstance(logits, mx.array):
        return mx.where(seen, mx.where(logits < 0, logits * penalty, logits / penalty), logits)
    logits = logits.copy()
    some = logits[seen]
    logits[seen] = np.where(some < 0, some * penalty, some / penalty)
    return logits


def temperature(logits: Array, value: float) -> Array:
    """Divides the logits: below 1 likely tokens become more likely, above 1 less likely."""
    return logits if value == 1 else logits / value


def top_k(logits: Array, k: int) -> Array:
    """Keeps the k most likely tokens, and all that are as likely as the k-th. 0 keeps all."""
    V = logits.shape[-1]
    if not 0 < k < V:
        return logits
    if isinstance(logits, mx.array):
        kth = mx.topk(logits, k, axis=-1).min(axis=-1, keepdims=True)  # (B, 1)
        return mx.where(logits < kth, -mx.inf, logits)
    kth = np.partition(logits, V - k, axis=-1)[:, V - k, None]  # (B, 1)
    return np.where(logits < kth, -np.inf, logits)


def top_p(logits: Array, p: float) -> Array:
    """Keeps the nucleus: the fewest tokens whose probabilities sum to p or more. Of equal tokens lower ids come first.

    Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
    """
    if p >= 1:
        return logits
    if isinstance(logits, np.ndarray):
        return np.stack([_nucleus(row, p) for row in logits])
    probability = mx.softmax(logits, axis=-1)  # (B, V)
    falling = -mx.sort(-probability, axis=-1)
    last = mx.sum(mx.cumsum(falling, axis=-1) < p, axis=-1, keepdims=True)  # (B, 1), index of the first sum >= p
    last = mx.minimum(last, logits.shape[-1] - 1)
    least = mx.take_along_axis(falling, last, axis=-1)  # (B, 1)
    more, equal = probability > least, probability == least
    room = last + 1 - mx.sum(more, axis=-1, keepdims=True)
    return mx.where(more | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= room)), logits, -mx.inf)


def _nucleus(row: np.ndarray, p: float) -> np.ndarray:
    """top_p of one row, (V,) -> (V,)."""
    weight = np.exp(row - row.max())
    total = weight.sum(dtype=np.float64)
    # The tokens whose probability is below (1 - p) / V sum to less than 1 - p, so the nucleus needs none of them:
    # far fewer are left to sort.
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


def typical_p(logits: Array, mass: float) -> Array:
    """Keeps the tokens whose information content -log p is closest to its mean, the entropy of p = softmax(logits):
    the fewest whose probabilities sum to `mass` or more. Of equally close tokens lower ids come first. 1 keeps all.

    Locally typical sampling, Meister et al. 2022, https://arxiv.org/abs/2202.00666.
    """
    if mass >= 1:
        return logits
    xp: Any = mx if isinstance(logits, mx.array) else np
    exact: Any = logits if isinstance(logits, mx.array) else logits.astype(np.float64)
    shifted = exact - exact.max(axis=-1, keepdims=True)
    information = xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True)) - shifted  # (B, V), in nats
    probability = xp.exp(-information)
    entropy = (probability * xp.where(probability > 0, information, 0)).sum(axis=-1, keepdims=True)  # (B, 1)
    distance = xp.abs(information - entropy)
    order = xp.argsort(distance, axis=-1)
    sums = xp.cumsum(xp.take_along_axis(probability, order, axis=-1), axis=-1)
    last = xp.minimum((sums < mass).sum(axis=-1, keepdims=True), logits.shape[-1] - 1)  # (B, 1), index of a sum >= mass
    largest = xp.take_along_axis(distance, xp.take_along_axis(order, last, axis=-1), axis=-1)
    closer, equal = distance < largest, distance == largest
    before = xp.where(closer, probability, 0).sum(axis=-1, keepdims=True)
    of_equal = xp.where(equal, probability, 0)
    needed = before + xp.cumsum(of_equal, axis=-1) - of_equal < mass  # what is kept so far does not reach the mass
    return xp.where(closer | (equal & needed), logits, -xp.inf)


def _within(rule: Callable[[Any], bool], expected: str) -> Check:
    """The check that a rule holds for a setting's value."""
    return lambda name, value: require(rule(value), name, value, expected)


def _check_biases(name: str, biases: Mapping[int, float]) -> None:
    for token, bias in biases.items():
        require(token >= 0, f"{name}: id", token, "at least 0")
        require(bias < math.inf, f"{name}: {token}'s", bias, "a finite number, or -inf")


def _setting(function: Callable[..., Any], default: Any, *checks: Check, needs_seen: bool = False) -> Any:
    """A field of the Sampler: the function that applies it to logits, its default (or what makes it), and its checks.

    The function is called with the logits, the setting's value and, if it needs them, the ids seen so far.
    """
    metadata = {"function": function, "checks": checks, "needs_seen": needs_seen}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the next token is chosen: each of these settings in turn changes the logits, in transformers' order; then a
    token is drawn."""

    # The name on the right is the function above.
    logit_bias: Mapping[int, float] = _setting(logit_bias, dict, _check_biases)
    """numbers added to the logits of some ids, on the command line as ID:BIAS,ID:BIAS; -inf forbids one"""
    repetition_penalty: float = _setting(
        repetition_penalty, 1.0, _within(lambda x: 0 < x < math.inf, "a finite number above 0"), needs_seen=True
    )
    """above 1, tokens of the text so far become less likely"""
    temperature: float = _setting(
        temperature, 0.8, _within(lambda x: x >= 0, "at least 0"), _within(lambda x: x < math.inf, "a finite number")
    )
    """divides the logits; 0 takes the most likely token"""
    top_k: int = _setting(top_k, 0, _within(lambda k: k >= 0, "at least 0"))
    """sample among the k most likely tokens; 0 among all"""
    top_p: float = _setting(top_p, 1.0, _within(lambda p: 0 < p <= 1, "0 < top_p <= 1"))
    """sample among the fewest tokens whose probabilities sum to this"""
    min_p: float = _setting(min_p, 0.0, _within(lambda p: 0 <= p <= 1, "0 <= min_p <= 1"))
    """sample among tokens of at least this times the most likely one's probability"""
    typical_p: float = _setting(typical_p, 1.0, _within(lambda p: 0 < p <= 1, "0 < typical_p <= 1"))
    """sample among the tokens whose information content is closest to the entropy, the fewest whose probabilities sum
    to this"""

    seed: int = 1337
    """same seed, same text"""

    def __post_init__(self) -> None:
        for setting in fields(self):
            for check in setting.metadata.get("checks", ()):
                check(setting.name, getattr(self, setting.name))
        require_seed(self.seed)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a draw: where temperature is 0, or less than 1e-5."""
        return self.temperature < _GREEDY_BELOW

    def process(self, logits: Array, seen: Array | None = None) -> Array:
        """The logits whose softmax is drawn from. logits (B, V), seen (B, V) bool -> (B, V).

        seen, the ids in each row's text so far, is needed only where repetition_penalty is not 1. A greedy sampler
        ignores the settings after temperature.
        ValueError for NumPy logits that are NaN or infinite, and where every token of a row is forbidden. MLX arrays
        are lazy and not looked at here: see __call__.
        """
        _require_finite(logits)
        for function, value, needs_seen in self._steps:
            logits = function(logits, value, seen) if needs_seen else function(logits, value)
        return logits

    @cached_property
    def _steps(self) -> list[tuple[Callable[..., Any], Any, bool]]:
        """The functions that `process` calls in order, each with its setting's value and whether it needs seen."""
        steps = []
        for setting in fields(self):
            if setting.name == "temperature" and self.greedy:
                break
            if function := setting.metadata.get("function"):
                steps.append((function, getattr(self, setting.name), setting.metadata["needs_seen"]))
        return steps

    def __call__(self, logits: Array, seen: Array | None = None, u: np.ndarray | None = None) -> Array:
        """The next token of each row: (B, V) -> (B,) int32. u (B,) in [0, 1), random numbers; a greedy sampler needs
        none.

        ValueError as `process`, for NumPy arrays. For MLX arrays, the row that it would be raised for gets token -1.
        """
        given, logits = logits, self.process(logits, seen)
        if self.greedy:
            tokens = most_likely(logits)
        elif u is None:
            raise ValueError(f"temperature is {self.temperature}, but no random numbers are given")
        else:
            tokens = draw(logits, u)
        if isinstance(logits, mx.array):
            is_valid = mx.all(given < mx.inf, axis=-1) & mx.any(logits > -mx.inf, axis=-1)  # NaN < inf is false
            tokens = mx.where(is_valid, tokens, -1)
        return tokens

    def probabilities(self, logits: Array, seen: Array | None = None) -> Array:
        """The probability that each token is drawn with: (B, V) -> (B, V); 1 for the one token of a greedy sampler."""
        logits = self.process(logits, seen)
        if isinstance(logits, mx.array):
            if self.greedy:
                return (mx.arange(logits.shape[-1]) == most_likely(logits)[:, None]).astype(mx.float32)
            return mx.softmax(logits, axis=-1)
        if self.greedy:
            return (np.arange(logits.shape[-1]) == most_likely(logits)[:, None]).astype(np.float32)
        weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weight / weight.sum(axis=-1, keepdims=True)


def _require_finite(logits: Array) -> None:
    """ValueError unless the largest logit of each row is a finite number; for NumPy arrays only.

    NumPy's maximum is NaN where any element is.
    """
    if isinstance(logits, np.ndarray) and not np.isfinite(peak := logits.max(axis=-1)).all():
        raise ValueError(f"logits: the largest is {peak[~np.isfinite(peak)][0]}, expected a finite number")


def most_likely(logits: Array) -> Array:
    """The token of the largest logit, the lowest id of equal ones. (B, V) -> (B,) int32."""
    if isinstance(logits, mx.array):
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    return logits.argmax(axis=-1).astype(np.int32)


def draw(logits: Array, u: np.ndarray) -> Array:
    """Draws a token of each row by softmax(logits): the first whose cumulative probability is above u.

    logits (B, V), u (B,) in [0, 1) -> (B,) int32. Never a token of probability 0, however sums are rounded.
    """
    if isinstance(logits, mx.array):
        weight = mx.softmax(logits, axis=-1)  # (B, V)
        # rounding can make a parallel cumulative sum grow where the weight is 0
        sums = mx.where(weight > 0, mx.cumsum(weight, axis=-1), 0)
        total = sums.max(axis=-1, keepdims=True)  # (B, 1)
        under = mx.minimum(mx.array(u, mx.float32)[:, None] * total, total * (1 - 2**-23))
        return mx.argmax(sums > under, axis=-1).astype(mx.int32)
    return draw_from(np.exp(logits - logits.max(axis=-1, keepdims=True)), u)


def draw_from(weight: np.ndarray, u: np.ndarray) -> np.ndarray:
    """`draw` by weights (B, V), of any sum above 0, instead of logits. u (B,) -> (B,) int32."""
    shares = u * weight.sum(axis=-1, dtype=np.float64)
    return np.array([_find(row, share, "right") for row, share in zip(weight, shares, strict=True)], np.int32)


def _find(weight: np.ndarray, share: float, side: Literal["left", "right"]) -> int:
    """Where the cumulative sum of weight (V,) passes `share`, or with "left" reaches it; that weight is above 0."""
    blocks = np.add.reduceat(weight, np.arange(0, len(weight), _BLOCK))
    block, rest = _find_in(blocks, share, side)
    start = block * _BLOCK
    return start + _find_in(weight[start : start + _BLOCK], rest, side)[0]


def _find_in(weight: np.ndarray, share: float, side: Literal["left", "right"]) -> tuple[int, float]:
    """`_find` without blocks -> the index, and `share` less the sum of all weights before it."""
    sums = weight.cumsum(dtype=np.float64)
    share = min(share, np.nextafter(sums[-1], 0))  # rounding must not leave every sum below it
    at = int(sums.searchsorted(share, side))
    return at, share - (sums[at - 1] if at else 0.0)


def logprobs(logits: Array, tokens: Array) -> Array:
    """The log-probability of one token of each row. logits (B, V), tokens (B,) -> (B,) float32, in nats."""
    if isinstance(logits, mx.array):
        at = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]  # (B,)
        return at - mx.logsumexp(logits, axis=-1)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    at = np.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0]  # (B,)
    return at - np.log(np.exp(shifted).sum(axis=-1))


def uniforms(seed: int, B: int) -> Iterator[np.ndarray]:
    """Endless random numbers in [0, 1), (B,) at a time. Row n's depend on seed + n alone, not on B."""
    rows = [random.Random(seed + n).random for n in range(B)]
    while True:
        yield np.array([row() for row in rows])
