"""Windows of tokens to train on: drawn from shards in a seeded order without replacement, and drawn ahead of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

Result = TypeVar("Result")


class Windows:
    """Windows of `block_size` tokens, in an endless seeded order: each epoch sees nearly every token once.

    A window follows from its number alone, so that there is no state to save, and readers that draw different
    numbers draw different windows. Windows lie side by side in a shard and never cross its end. Each epoch has its
    own order, and its own offsets in the shards, so that it cuts the text at other places. Only the shards are held.
    """

    def __init__(self, shards: Sequence[np.ndarray], block_size: int, seed: int, name: str, vocab_size: int) -> None:
        """shards: arrays (n,) of uint8, uint16 or uint32, which may be memory-mapped: only windows are read.

        name: "training" or "validation", for messages. ValueError if no shard holds block_size + 1 tokens.
        """
        for shard in shards:
            if shard.ndim != 1 or shard.dtype.kind != "u" or shard.dtype.itemsize > 4:
                raise ValueError(
                    f"data: a {name} shard is {shard.dtype} {shard.shape}, expected (n,) of uint8, uint16 or uint32"
                )
        lengths = np.array([len(shard) for shard in shards], np.int64)
        if (longest := lengths.max(initial=0)) <= block_size:
            text = "text" if len(shards) == 1 else "text's longest shard"
            raise ValueError(
                f"data: the {name} {text} has {longest} tokens, fewer than block_size + 1 = {block_size + 1}"
            )
        self.block_size, self.vocab_size = block_size, vocab_size
        self._key = _hash(np.full(1, seed, np.uint64))
        self._names = [getattr(shard, "filename", None) or f"{name} shard {n}" for n, shard in enumerate(shards)]
        self._shards = [np.asarray(shard) for shard in shards]  # indexing a memmap itself is slow
        counts = np.where(lengths > block_size, np.maximum(1, lengths // block_size - 1), 0)  # windows of each shard
        self._ends = np.cumsum(counts)
        self._begins = self._ends - counts
        self._offsets = np.maximum(1, lengths - counts * block_size).astype(
            np.uint64
        )  # leaves room for the last target
        self.per_epoch = int(self._ends[-1])

    def draw(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows first, first + 1, ... of the endless order, `count` of them.

        Returns inputs (count, T) and targets (count, T), the inputs shifted by one token; both int32.
        ValueError names the shard and the position of an id that is not in the vocabulary.
        """
        epochs, places = np.divmod(np.arange(first, first + count), self.per_epoch)  # (count,)
        keys = _hash(self._key + epochs.view(np.uint64))
        windows = permuted(places, self.per_epoch, keys)
        shards = np.searchsorted(self._ends, windows, "right")
        offsets = _round(shards.view(np.uint64), keys) % self._offsets[shards]
        starts = offsets.view(np.int64) + (windows - self._begins[shards]) * self.block_size
        tokens = np.empty((count, self.block_size + 1), np.int32)  # (count, T + 1)
        for row, shard, start in zip(tokens, shards.tolist(), starts.tolist(), strict=True):
            row[:] = self._shards[shard][start : start + self.block_size + 1]
        unsigned = tokens.view(np.uint32)
        if unsigned.max(initial=0) >= self.vocab_size:
            row, column = np.argwhere(unsigned >= self.vocab_size)[0]
            raise ValueError(
                f"{self._names[shards[row]]}: token {starts[row] + column} is id {unsigned[row, column]}, "
                f"expected less than vocab_size = {self.vocab_size}"
            )
        return tokens[:, :-1], tokens[:, 1:]


def permuted(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Maps each place by the pseudorandom permutation of 0 .. size - 1 that its key selects. Nothing is stored.

    places (n,) int64 below size, keys (n,) uint64 -> (n,) int64. A Feistel network over pairs of mixed-radix digits;
    a result that is not below size is mapped again until it is (cycle walking: Black and Rogaway 2002, Ciphers with
    arbitrary finite domains).
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    a, b = np.uint64(rows), np.uint64(columns)
    left, right = np.divmod(places.view(np.uint64), b)
    round_keys = keys ^ _ROUNDS  # (rounds, n)
    for n in range(0, len(_ROUNDS), 2):
        left = (left + _round(right, round_keys[n])) % a
        right = (right + _round(left, round_keys[n + 1])) % b
    x = left * b + right
    if (outside := x >= size).any():
        x[outside] = permuted(x[outside], size, keys[outside])
    return x.view(np.int64)


_ROUNDS = np.arange(1, 7, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
_HALF = np.uint64(32)


def _round(x: np.ndarray, key: np.ndarray) -> np.ndarray:
    """32 bits that mix a number with a key, in fewer steps than `_hash`, because a permutation has six rounds."""
    x = (x ^ key) * _MULTIPLIERS[0]
    return ((x ^ (x >> _HALF)) * _MULTIPLIERS[1]) >> _HALF


def _hash(x: np.ndarray) -> np.ndarray:
    """64 well-mixed bits of 64 (splitmix64's finalizer: Steele, Lea, Flood 2014, Fast splittable generators)."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIERS[0]
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIERS[1]
    return x ^ (x >> np.uint64(31))


class Prefetch(Generic[Result]):
    """Computes a function of a number ahead of time: while the caller uses the result for n, a thread computes n + 1.

    An exception is raised by the call that asks for its number. A number that is not the next is computed at once.
    """

    def __init__(self, function: Callable[[int], Result]) -> None:
        self._function, self._thread = function, ThreadPoolExecutor(1, "prefetch")
        self._number, self._next = -1, Future[Result]()

    def __call__(self, number: int) -> Result:
        future = self._next if number == self._number else self._thread.submit(self._function, number)
        self._number = -1  # so that a failed number is computed afresh when it is asked for again
        result = future.result()
        self._number, self._next = number + 1, self._thread.submit(self._function, number + 1)
        return result
