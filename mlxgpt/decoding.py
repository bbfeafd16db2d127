"""Next tokens for a batch of prompts: the plain way, which computes every position of every row again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .model import GPT
from .sampling import Sampler, logprobs, uniforms


@dataclass
class Step:
    """What comes out for one position of all rows."""

    tokens: np.ndarray  # (B,) int32; -1 for a row that has ended
    logprobs: np.ndarray | None  # (B,) float32, by the model itself


class Decoder:
    """An iterator of Steps, which ends when all rows have."""

    def __init__(
        self, model: GPT, prompts: Sequence[Sequence[int]], sampler: Sampler, *, vocab_size: int = 0,
        on_full: str = "slide", logprobs: bool = False, draft: GPT | None = None, n_draft: int = 4,
    ) -> None:  # fmt: skip
        self.model, self.sampler, self.vocab_size, self.on_full = model, sampler, vocab_size, on_full
        self.rows = [list(prompt) for prompt in prompts]
        self.logprobs, self.uniforms = logprobs, uniforms(sampler.seed, len(prompts))
        self.ended = np.zeros(len(prompts), bool)
        self.full = np.zeros(len(prompts), bool)

    def __iter__(self) -> Decoder:
        return self

    def __next__(self) -> Step:
        if self.ended.all():
            raise StopIteration
        u, size = next(self.uniforms), self.model.config.block_size
        step = Step(np.full(len(u), -1, np.int32), np.zeros(len(u), np.float32) if self.logprobs else None)
        for n, row in enumerate(self.rows):
            if not self.ended[n] and self.on_full == "stop" and len(row) > size:
                self.ended[n] = self.full[n] = True
            if self.ended[n]:
                continue
            logits = np.array(self.model(mx.array([row[-size:]]))[:, -1, : self.vocab_size or None])  # (1, V)
            seen = np.zeros(logits.shape, bool)
            seen[0, row] = True
            step.tokens[n : n + 1] = self.sampler(logits, seen, u[n : n + 1])
            row.append(int(step.tokens[n]))
            if step.logprobs is not None:
                step.logprobs[n : n + 1] = logprobs(logits, step.tokens[n : n + 1])
        if self.ended.all():
            raise StopIteration
        return step

    def finish(self, row: int) -> None:
        """Nothing more is wanted of a row."""
        self.ended[row] = True
