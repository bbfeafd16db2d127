"""Tokens one after another: prompts are read into a key/value cache, and each token then costs one position.

When all of a model's positions are taken, either the sequence ends or the window slides: the oldest half of what the
model sees is dropped, and the rest is recomputed from position 0, because GPT-2's position embeddings are absolute.
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

PREFILL_CHUNK = 512  # positions of a prompt computed at once: bounds the memory of activations and attention scores
_REPEATED_STEP_MAX = 16  # more positions than this are prefilled: a repeated step has to be built for each length


@dataclass
class Step:
    """The next token of each of B sequences."""

    tokens: np.ndarray  # (B,) int32; -1 for a sequence that has ended
    logprobs: np.ndarray | None  # (B,) float32: the model's log-probability of each token, before any sampler


class Decoder:
    """The tokens that follow some prompts: an iterator of Steps, until all sequences have ended.

    Each sequence gets the tokens that it would get alone: sequence n draws with seed + n. vocab_size > 0 restricts ids
    to those below it, since a model's vocabulary may be padded. on_full is "slide" or "stop".
    A draft, a smaller model with the same vocabulary, proposes draft_tokens tokens at a time for a single sequence,
    which the model checks all at once. That leaves greedy tokens, and the distribution of drawn ones, unchanged:
    Leviathan et al. 2022, https://arxiv.org/abs/2211.17192.

    ValueError for no prompts or an empty one; an id outside the vocabulary, in a prompt or in logit_bias; another
    on_full; a prompt longer than block_size that may not slide; a draft with another vocabulary or for several
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
        sequences = _Sequences(model, ids, sampler, vocab_size or V, on_full == "slide", logprobs)
        # The generator holds no reference to the Decoder, so the arrays of an abandoned Decoder are freed at once.
        self._sequences = sequences
        self._steps = sequences.speculative_steps(draft, draft_tokens) if draft else sequences.steps()
        self.full = sequences.full  # (B,) bool: sequences that ended because the model's positions are all taken

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def __next__(self) -> Step:
        return next(self._steps)

    def finish(self, row: int) -> None:
        """Ends a sequence: its later tokens are -1."""
        self._sequences.ended[row] = True


class _Sequences:
    """A Decoder's sequences, and the two ways to continue them: token by token, and with a draft."""

    def __init__(
        self, model: GPT, prompts: list[list[int]], sampler: Sampler, vocab_size: int, slides: bool, logprobs: bool
    ) -> None:
        self.full = np.zeros(len(prompts), bool)
        self.ended = np.zeros(len(prompts), bool)
        self._model, self._sampler, self._vocab_size = model, sampler, vocab_size
        self._slides, self._wants_logprobs = slides, logprobs
        self._uniforms = sampling.uniforms(sampler.seed, len(prompts))
        self._windows = [_SlidingWindow(prompt, model.config.block_size) for prompt in prompts]
        self._seen: Any = None  # (B, vocab_size) bool: the ids in each sequence, if the sampler needs them
        if sampler.repetition_penalty != 1:
            self._seen = np.zeros((len(prompts), vocab_size), bool)
            for row, prompt in zip(self._seen, prompts, strict=True):
                row[[token for token in prompt if token < vocab_size]] = True

    # ---- token by token ----

    def steps(self) -> Iterator[Step]:
        windows, cache = self._windows, _new_cache(self._model, len(self._windows))
        step = ops.repeated(self._model, GPT.next_logits, cache)
        # On the kernels each step is computed on demand. Elsewhere MLX computes the next step while the caller uses
        # this step's tokens, unless a sequence has no free position for it.
        asynchronous = not ops.on_kernels(self._model)
        if asynchronous and self._seen is not None:
            self._seen = mx.array(self._seen)
        logits = self._prefill_windows(cache, range(len(windows)))  # (B, V)
        while True:
            tokens, logprobs = self._choose(logits)  # (B,)
            is_ahead = asynchronous and not (cache.offsets[~self.ended] == cache.block_size).any()
            if is_ahead:
                # Two evaluations, since what belongs to one can be read only when all of it is computed.
                mx.async_eval(tokens, logprobs)
                logits = step(tokens[:, None])  # (B, 1) -> (B, V)
                mx.async_eval(logits)
            yield self._append(tokens, logprobs)
            if self.ended.all():
                return
            cache.offsets[self.ended] = 0  # their results are unused, but their positions must not run out
            if is_ahead:
                continue
            slid = [int(row) for row in np.flatnonzero(~self.ended) if windows[row].slide()]
            cache.offsets[slid] = 0
            if len(slid) < np.count_nonzero(~self.ended):
                logits = step(tokens[:, None])
            if slid:
                for row, row_logits in zip(slid, self._prefill_windows(cache, slid), strict=True):
                    logits[row] = row_logits

    def _prefill_windows(self, cache: KVCache, rows: Sequence[int]) -> Any:
        """Computes the windows of some sequences, each different one once -> the logits of their next tokens,
        (len(rows), V)."""
        prefilled: dict[tuple[int, ...], tuple[KVCache, Any]] = {}
        for row in rows:
            window = tuple(self._windows[row].ids)
            if len(self._windows) == 1:
                cache.offsets[:] = 0
                return _prefill(self._model, window, cache)
            if window not in prefilled:
                one = _new_cache(self._model)
                prefilled[window] = one, _prefill(self._model, window, one)
            cache.put(row, prefilled[window][0])
        logits = [prefilled[tuple(self._windows[row].ids)][1] for row in rows]
        return np.concatenate(logits) if isinstance(logits[0], np.ndarray) else mx.concatenate(logits)

    def _choose(self, logits: Any) -> tuple[Any, Any]:
        """The next tokens (B,) and, if wanted, their log-probabilities (B,), from logits (B, V)."""
        logits = logits[:, : self._vocab_size]
        if isinstance(logits, mx.array):
            logits = logits.astype(mx.float32)  # half precision can't sum so many probabilities
        tokens = self._sampler(logits, self._seen, None if self._sampler.greedy else next(self._uniforms))
        if isinstance(self._seen, mx.array):
            self._seen = mx.put_along_axis(self._seen, tokens[:, None], mx.array(True), axis=-1)
        elif self._seen is not None:
            self._seen[np.arange(len(tokens)), tokens] = True
        return tokens, sampling.logprobs(logits, tokens) if self._wants_logprobs else None

    def _append(self, tokens: Any, logprobs: Any = None) -> Step:
        """Adds a token (B,) to each sequence that has not ended -> the step for the caller."""
        tokens = np.where(self.ended, -1, np.asarray(tokens)).astype(np.int32)
        if (tokens[~self.ended] < 0).any():  # a Sampler's mark for MLX arrays that can't be drawn from
            raise ValueError("logits: not finite numbers, or every token is forbidden")
        for row in np.flatnonzero(~self.ended):
            self._windows[row].tokens.append(int(tokens[row]))
            if self._windows[row].is_too_long and not self._slides:
                self.full[row] = self.ended[row] = True
        return Step(tokens, None if logprobs is None else np.asarray(logprobs))

    # ---- with a draft ----

    def speculative_steps(self, draft: GPT, draft_tokens: int) -> Iterator[Step]:
        (window,), target_model, draft_model = self._windows, _PrefixCachedModel(self._model), _PrefixCachedModel(draft)
        draft_window = _SlidingWindow(window.tokens, draft.config.block_size)
        # The first step, and the first after a slide, compute the whole window exactly as without a draft.
        is_prefilled = False
        while not self.ended.all():
            room = min(draft_tokens, window.size - len(window.ids), draft_window.size // 2 - 1) if is_prefilled else 0
            draft_window.tokens = list(window.tokens)
            q: list[np.ndarray] = []  # the draft's probabilities for each proposal, (vocab_size,)
            proposed: list[int] = []
            while len(proposed) < room:
                draft_window.slide()
                logits = draft_model.logits(draft_window.ids, 1)  # (1, V)
                q.append(self._probabilities(logits[0], proposed))
                proposed.append(self._draw(q[-1]))
                draft_window.tokens.append(proposed[-1])
            logits = target_model.logits(window.ids + proposed, len(proposed) + 1)  # (n_proposed + 1, V)
            for n in range(len(proposed) + 1):
                p = self._probabilities(logits[n], proposed[:n])  # (vocab_size,)
                # Accept a proposal x with probability p(x) / q(x), else draw from the part of p above q.
                accepted = n < len(proposed) and next(self._uniforms)[0] * q[n][proposed[n]] < p[proposed[n]]
                if accepted:
                    token = proposed[n]
                else:
                    token = self._draw(np.maximum(p - q[n], 0) if n < len(proposed) else p)
                tokens = np.array([token])  # (B,) with B = 1
                yield self._append(tokens, self._logprobs(logits[n], tokens))
                if self._seen is not None:
                    self._seen[0, token] = True
                if self.ended.all() or not accepted:
                    break
            is_prefilled = not window.slide()

    def _probabilities(self, logits: np.ndarray, proposed: list[int]) -> np.ndarray:
        """The probabilities of the token after some proposed ones. logits (V,) -> (vocab_size,)."""
        seen = None
        if self._seen is not None:
            seen = self._seen.copy()
            seen[0, proposed] = True
        return self._sampler.probabilities(logits[None, : self._vocab_size], seen)[0]

    def _draw(self, p: np.ndarray) -> int:
        """Draws a token by probabilities (vocab_size,), which need not sum to 1."""
        return int(p.argmax() if self._sampler.greedy else sampling.draw_from(p[None], next(self._uniforms))[0])

    def _logprobs(self, logits: np.ndarray, tokens: np.ndarray) -> np.ndarray | None:
        return sampling.logprobs(logits[None, : self._vocab_size], tokens) if self._wants_logprobs else None


class _SlidingWindow:
    """The tokens of a sequence, and the last of them, which a model with `size` positions sees."""

    def __init__(self, tokens: Sequence[int], size: int) -> None:
        self.tokens, self.size = list(tokens), size
        self._start = max(0, len(self.tokens) - size)

    @property
    def ids(self) -> list[int]:
        """The tokens in the window."""
        return self.tokens[self._start :]

    @property
    def is_too_long(self) -> bool:
        """Whether the model has no position for the last token."""
        return len(self.tokens) - self._start > self.size

    def slide(self) -> bool:
        """Drops the oldest half of a window that is too long -> whether it was."""
        if not self.is_too_long:
            return False
        self._start = len(self.tokens) - max(1, self.size // 2)
        return True


class _PrefixCachedModel:
    """A model that keeps the keys and values of the last sequence it has seen, and reuses those of the tokens that the
    next sequence begins with too."""

    def __init__(self, model: GPT) -> None:
        self._model, self._cache = model, _new_cache(model)
        self._array = np.array if ops.on_kernels(model) else mx.array
        self._cached_ids: list[int] = []
        self._steps: dict[int, Callable[[Any], Any]] = {}  # by the number of positions that a step computes

    def logits(self, ids: list[int], n: int) -> np.ndarray:
        """The logits that follow each of the last n tokens, (n, V)."""
        same = 0
        while same < min(len(ids) - n, len(self._cached_ids)) and ids[same] == self._cached_ids[same]:
            same += 1
        self._cache.offsets[:] = same
        self._cached_ids = ids
        if len(ids) - same > max(n, _REPEATED_STEP_MAX):
            if n == 1:
                return _to_numpy(_prefill(self._model, ids[same:], self._cache))
            _prefill(self._model, ids[same:-n], self._cache)
            same = len(ids) - n
        T = len(ids) - same
        if T not in self._steps:
            self._steps[T] = ops.repeated(self._model, GPT.__call__, self._cache)
        logits = self._steps[T](self._array(np.array([ids[same:]], np.int32)))  # (1, T, V)
        return _to_numpy(logits)[0, -n:]


def _new_cache(model: GPT, batch_size: int = 1) -> KVCache:
    return KVCache(model.config.n_layer, model.config.block_size, batch_size, model.head.dtype)


def _prefill(model: GPT, ids: Sequence[int], cache: KVCache) -> Any:
    """Computes the tokens that follow those in a cache -> the logits of the next, (1, V), in NumPy on the kernels."""
    for start in range(0, len(ids), PREFILL_CHUNK):
        chunk = np.array([ids[start : start + PREFILL_CHUNK]], np.int32)  # (1, T)
        logits = ops.without_gradient(model, GPT.next_logits, chunk, cache)
        if isinstance(logits, mx.array):
            mx.eval(logits)
    return logits


def _to_numpy(logits: Any) -> np.ndarray:
    return logits if isinstance(logits, np.ndarray) else np.asarray(logits.astype(mx.float32))
