"""Tokens one after another: prompts are read into a key/value cache, and each token then costs one position.

When all of a model's positions are taken, the window slides (the oldest half of what the model sees is dropped, and
the rest read again from position 0, since GPT-2's positions are learned and can't be moved), or the sequence ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..model import ops
from ..model.cache import KVCache
from ..model.gpt import GPT
from . import sampling
from .sampling import Sampler

_CHUNK = 512  # positions of a prompt at once: bounds the memory of activations, and of scores on a GPU
_FEW = 16  # positions that are read by a repeated step, which has no cost per call but is made for one length


@dataclass
class Step:
    """What comes out for the next position of each of B sequences."""

    tokens: np.ndarray  # (B,) int32; -1 for a sequence that has ended
    logprobs: np.ndarray | None  # (B,) float32: the model's own log-probability of each, at temperature 1, nothing cut


class Decoder:
    """The tokens that follow some prompts: an iterator of Steps, until all sequences have ended.

    Each sequence gets the tokens that it would get alone: sequence n's draws are those of seed + n. vocab_size > 0
    keeps ids below it, for the model's vocabulary may be padded. on_full is "slide" or "stop". With a draft, a
    smaller model with the same vocabulary, draft_tokens tokens at a time are proposed by it and checked by the model
    at once (for one sequence): the same tokens if they are greedy, the same distribution if they are drawn.
    Leviathan et al. 2022, https://arxiv.org/abs/2211.17192.

    ValueError for no prompt or an empty one, an id outside the vocabulary (in a prompt or a logit_bias), an on_full of
    another name, a prompt past block_size that may not slide, and a draft with another vocabulary or for several
    prompts.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        *,
        vocab_size: int = 0,
        on_full: str = "slide",
        logprobs: bool = False,
        draft: GPT | None = None,
        draft_tokens: int = 4,
    ) -> None:
        size, V = model.config.block_size, model.config.vocab_size
        if on_full not in ("slide", "stop"):
            raise ValueError(f"on_full is {on_full!r}, expected 'slide' or 'stop'")
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("prompt: no tokens, expected at least one")
        longest = max(map(len, prompts))
        if on_full == "stop" and longest > size:
            raise ValueError(f"prompt: {longest} tokens, at most block_size = {size} unless the window slides")
        if draft and draft.config.vocab_size != V:
            raise ValueError(f"draft: its vocab_size is {draft.config.vocab_size}, the model's {V}")
        if draft and (len(prompts) != 1 or draft_tokens < 1):
            raise ValueError(
                f"draft: {len(prompts)} prompts and draft_tokens = {draft_tokens}, expected one and at least 1"
            )
        ids: list[list[int]] = [np.asarray(prompt).tolist() for prompt in prompts]
        for wrong in (t for prompt in ids for t in prompt if not 0 <= t < V):
            raise ValueError(f"prompt: it holds id {wrong}, expected 0 <= id < vocab_size = {V}")
        if beyond := [token for token in sampler.logit_bias if token >= (vocab_size or V)]:
            raise ValueError(f"logit_bias: id {beyond[0]}, expected 0 to {(vocab_size or V) - 1}")
        model.eval()  # no dropout
        rows = _Rows(model, ids, sampler, vocab_size or V, on_full == "slide", logprobs)
        # The generator belongs to what it refers to by no way back: else all arrays would wait for Python to look
        # for cycles when a Decoder is left before its end.
        self._rows, self._steps = rows, rows.speculate(draft, draft_tokens) if draft else rows.decode()
        self.full = rows.full  # (B,) bool: sequences that ended because the model's positions are taken

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def __next__(self) -> Step:
        return next(self._steps)

    def finish(self, row: int) -> None:
        """Nothing more is wanted of a sequence."""
        self._rows.ended[row] = True


class _Rows:
    """The sequences of a Decoder, and how they go on."""

    def __init__(
        self, model: GPT, prompts: list[list[int]], sampler: Sampler, vocab_size: int, slides: bool, logprobs: bool
    ) -> None:
        self.full = np.zeros(len(prompts), bool)
        self.ended = np.zeros(len(prompts), bool)
        self._model, self._sampler, self._vocab_size = model, sampler, vocab_size
        self._slides, self._wants_logprobs = slides, logprobs
        self._uniforms = sampling.uniforms(sampler.seed, len(prompts))
        self._texts = [_Text(prompt, model.config.block_size) for prompt in prompts]
        self._seen: Any = None  # (B, vocab_size) bool: the ids in each text, where the sampler asks for them
        if sampler.repetition_penalty != 1:
            self._seen = np.zeros((len(prompts), vocab_size), bool)
            for row, prompt in zip(self._seen, prompts, strict=True):
                row[[token for token in prompt if token < vocab_size]] = True

    # ---- token by token ----

    def decode(self) -> Iterator[Step]:
        texts, cache = self._texts, _cache(self._model, len(self._texts))
        step = ops.repeated(self._model, GPT.next_logits, cache)
        # On the kernels a step is computed when it is asked for. Elsewhere MLX works on the next one while the
        # caller has this one's tokens, unless a sequence has no room for it.
        ahead = not ops.on_kernels(self._model)
        if ahead and self._seen is not None:
            self._seen = mx.array(self._seen)
        logits = self._read(cache, range(len(texts)))  # (B, V)
        while True:
            tokens, logprobs = self._choose(logits)  # (B,)
            is_ahead = ahead and not (cache.offsets[~self.ended] == cache.block_size).any()
            if is_ahead:
                logits = step(tokens[:, None])  # (B, 1) -> (B, V)
                mx.async_eval(tokens, logits)
            yield self._took(tokens, logprobs)
            if self.ended.all():
                return
            cache.offsets[self.ended] = 0  # what is computed for these is not looked at, and must not fill up
            if is_ahead:
                continue
            slid = [int(row) for row in np.flatnonzero(~self.ended) if texts[row].slide()]
            cache.offsets[slid] = 0
            if len(slid) < np.count_nonzero(~self.ended):
                logits = step(tokens[:, None])
            if slid:
                for row, anew in zip(slid, self._read(cache, slid), strict=True):
                    logits[row] = anew

    def _read(self, cache: KVCache, rows: Sequence[int]) -> Any:
        """Reads the windows of some sequences, equal ones once -> the logits behind them, (len(rows), V)."""
        read: dict[tuple[int, ...], tuple[KVCache, Any]] = {}
        for row in rows:
            window = tuple(self._texts[row].window)
            if len(self._texts) == 1:
                cache.offsets[:] = 0
                return _prefill(self._model, window, cache)
            if window not in read:
                one = _cache(self._model)
                read[window] = one, _prefill(self._model, window, one)
            cache.put(row, read[window][0])
        logits = [read[tuple(self._texts[row].window)][1] for row in rows]
        return np.concatenate(logits) if isinstance(logits[0], np.ndarray) else mx.concatenate(logits)

    def _choose(self, logits: Any) -> tuple[Any, Any]:
        """The next tokens (B,) and, if wanted, their log-probabilities (B,), from logits (B, V)."""
        logits = logits[:, : self._vocab_size]
        if isinstance(logits, mx.array):
            logits = logits.astype(mx.float32)  # sums of probabilities are too much for half precision
        tokens = self._sampler(logits, self._seen, None if self._sampler.greedy else next(self._uniforms))
        if isinstance(self._seen, mx.array):
            self._seen = mx.put_along_axis(self._seen, tokens[:, None], mx.array(True), axis=-1)
        elif self._seen is not None:
            self._seen[np.arange(len(tokens)), tokens] = True
        return tokens, sampling.logprobs(logits, tokens) if self._wants_logprobs else None

    def _took(self, tokens: Any, logprobs: Any = None) -> Step:
        """Adds the tokens to the texts -> what the caller sees of them."""
        tokens = np.where(self.ended, -1, np.asarray(tokens)).astype(np.int32)
        if (tokens[~self.ended] < 0).any():  # how a sampler of MLX arrays says it
            raise ValueError("logits: not finite numbers, or every token is forbidden")
        for row in np.flatnonzero(~self.ended):
            self._texts[row].tokens.append(int(tokens[row]))
            if self._texts[row].is_full and not self._slides:
                self.full[row] = self.ended[row] = True
        return Step(tokens, None if logprobs is None else np.asarray(logprobs))

    # ---- with a draft ----

    def speculate(self, draft: GPT, draft_tokens: int) -> Iterator[Step]:
        (text,), target, proposer = self._texts, _Reader(self._model), _Reader(draft)
        drafted = _Text(text.tokens, draft.config.block_size)
        begun = False  # after the beginning and after a slide, all of the window is read as it is without a draft
        while not self.ended.all():
            room = min(draft_tokens, text.size - len(text.window), drafted.size // 2 - 1) if begun else 0
            drafted.tokens = list(text.tokens)
            likely: list[np.ndarray] = []  # what each proposal was drawn from, (V,)
            proposed: list[int] = []
            while len(proposed) < room:
                drafted.slide()
                logits = proposer.read(drafted.window, 1)  # (1, V)
                likely.append(self._probabilities(logits[0], proposed))
                proposed.append(self._draw(likely[-1]))
                drafted.tokens.append(proposed[-1])
            logits = target.read(text.window + proposed, len(proposed) + 1)  # (n_proposed + 1, V)
            for n in range(len(proposed) + 1):
                p = self._probabilities(logits[n], proposed[:n])  # (V,)
                accepted = n < len(proposed) and next(self._uniforms)[0] * likely[n][proposed[n]] < p[proposed[n]]
                if accepted:
                    token = proposed[n]
                else:  # after a refusal, from what the draft proposes too seldom
                    token = self._draw(np.maximum(p - likely[n], 0) if n < len(proposed) else p)
                token_of = np.array([token])
                yield self._took(token_of, self._logprobs(logits[n], token_of))
                if self._seen is not None:
                    self._seen[0, token] = True
                if self.ended.all() or not accepted:
                    break
            begun = not text.slide()

    def _probabilities(self, logits: np.ndarray, proposed: list[int]) -> np.ndarray:
        """What the token after some proposed ones is drawn from. logits (V,) -> (vocab_size,)."""
        seen = None
        if self._seen is not None:
            seen = self._seen.copy()
            seen[0, proposed] = True
        return self._sampler.probabilities(logits[None, : self._vocab_size], seen)[0]

    def _draw(self, p: np.ndarray) -> int:
        """A token by probabilities (V,), which need not sum to 1."""
        return int(p.argmax() if self._sampler.greedy else sampling.draw_from(p[None], next(self._uniforms))[0])

    def _logprobs(self, logits: np.ndarray, tokens: np.ndarray) -> np.ndarray | None:
        return sampling.logprobs(logits[None, : self._vocab_size], tokens) if self._wants_logprobs else None


class _Text:
    """The tokens of a sequence, and the window of them that a model with `size` positions sees."""

    def __init__(self, tokens: Sequence[int], size: int) -> None:
        self.tokens, self.size = list(tokens), size
        self._start = max(0, len(self.tokens) - size)

    @property
    def window(self) -> list[int]:
        return self.tokens[self._start :]

    @property
    def is_full(self) -> bool:
        return len(self.tokens) - self._start > self.size

    def slide(self) -> bool:
        """Drops the oldest half where the window is too long -> whether it was."""
        full = self.is_full
        if full:
            self._start = len(self.tokens) - max(1, self.size // 2)
        return full


class _Reader:
    """A model that reads one sequence after another, anew only from where they differ."""

    def __init__(self, model: GPT) -> None:
        self._model, self._cache = model, _cache(model)
        self._array = np.array if ops.on_kernels(model) else mx.array
        self._held: list[int] = []  # the tokens in the cache
        self._steps: dict[int, Callable[[Any], Any]] = {}

    def read(self, ids: list[int], n: int) -> np.ndarray:
        """The logits behind each of the last n tokens, (n, V)."""
        same = 0
        while same < min(len(ids) - n, len(self._held)) and ids[same] == self._held[same]:
            same += 1
        self._cache.offsets[:] = same
        self._held = ids
        if len(ids) - same > max(n, _FEW):
            if n == 1:
                return _to_numpy(_prefill(self._model, ids[same:], self._cache))
            _prefill(self._model, ids[same:-n], self._cache)
            same = len(ids) - n
        T = len(ids) - same
        if T not in self._steps:
            self._steps[T] = ops.repeated(self._model, GPT.__call__, self._cache)
        logits = self._steps[T](self._array(np.array([ids[same:]], np.int32)))  # (1, T, V)
        return _to_numpy(logits)[0, -n:]


def _cache(model: GPT, batch_size: int = 1) -> KVCache:
    return KVCache(model.config.n_layer, model.config.block_size, batch_size, model.head.dtype)


def _prefill(model: GPT, ids: Sequence[int], cache: KVCache) -> Any:
    """Reads tokens behind those that a cache holds -> the logits of the next, (1, V), of NumPy on the kernels."""
    for start in range(0, len(ids), _CHUNK):
        logits = model.next_logits(mx.array([ids[start : start + _CHUNK]], mx.int32), cache)
        mx.eval(logits)
    return np.asarray(logits) if ops.on_kernels(model) else logits


def _to_numpy(logits: Any) -> np.ndarray:
    return logits if isinstance(logits, np.ndarray) else np.asarray(logits.astype(mx.float32))
