"""Text from a model, in Python: mlxgpt.load, mlxgpt.sample and mlxgpt.stream.

model, tokenizer = mlxgpt.load("runs/cpu")
print(mlxgpt.sample(model, tokenizer, "def main(", temperature=0))
for piece in mlxgpt.stream(model, tokenizer, "def main(", top_k=40):
    print(piece.text, end="", flush=True)
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from ..data import tokenizer as tokenizers
from ..data.tokenizer import Tokenizer
from ..formats import model_directory as checkpoint
from ..model import ops
from ..model.gpt import GPT
from .decoding import Decoder
from .sampling import Sampler
from .text_stream import TextStream

Finish = Literal["length", "stop", "end_of_text", "full", "interrupted"]
OnFull = Literal["slide", "stop"]


@dataclass
class Sample:
    """What a model made of one prompt. str() of it is its text."""

    prompt: str
    prompt_tokens: list[int]
    text: str = ""  # without the prompt and a stop string
    tokens: list[int] = field(default_factory=list)  # without end-of-text, but with those of a stop string
    logprobs: list[float] | None = None  # of the tokens, by the model itself: temperature 1, nothing cut
    finish: Finish | None = None
    """length: max_new_tokens; stop: a stop string; end_of_text: that token; full: the model's positions are used up;
    interrupted: by Ctrl-C"""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Piece:
    """What one token adds to a text."""

    text: str  # may be empty: a character's first bytes, or what may become a stop string, are held back
    token: int
    logprob: float | None = None
    finish: Finish | None = None  # in the last piece: why it is the last, as in Sample


def load(path: str | os.PathLike[str], device: Literal["auto", "cpu", "gpu"] = "auto") -> tuple[GPT, Tokenizer]:
    """The model and tokenizer in a model directory, or of a training run, and MLX's default device set.

    FileNotFoundError; ValueError for files that are no such model, and a device that is not there.
    """
    ops.use_device(device)
    return load_named(Path(path), "model")


@overload
def sample(model: GPT, tokenizer: Tokenizer, prompt: str, **settings: Any) -> Sample: ...
@overload
def sample(model: GPT, tokenizer: Tokenizer, prompt: Sequence[str], **settings: Any) -> list[Sample]: ...
def sample(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    *,
    max_new_tokens: int = 500,
    stop: str | Sequence[str] = (),
    on_full: OnFull = "slide",
    draft: GPT | None = None,
    n_draft: int = 4,
    logprobs: bool = False,
    **settings: Any,
) -> Sample | list[Sample]:
    """Goes on from a prompt, or from several as one batch: a Sample for one text, a list of them for several.

    stop ends a text and is left out of it. on_full: past the model's positions "slide" goes on from the last ones,
    "stop" ends the text. draft: a smaller model of the same vocabulary, which proposes n_draft tokens at a time for
    a single prompt.
    settings: those of sampling.Sampler: temperature, top_k, top_p, min_p, repetition_penalty, logit_bias, seed.
    An empty prompt starts from the end-of-text token, or a line break where tokens are characters.
    ValueError for a setting out of its range, and text that the tokenizer doesn't know.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not prompts:
        return []
    batch = Batch(
        model, tokenizer, [start(model, tokenizer, text, on_full) for text in prompts], Sampler(**settings),
        max_new_tokens=max_new_tokens, stop=stop, on_full=on_full, draft=draft, n_draft=n_draft, logprobs=logprobs,
    )  # fmt: skip
    for _ in batch:
        pass
    return batch.samples[0] if isinstance(prompt, str) else batch.samples


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 500,
    stop: str | Sequence[str] = (),
    on_full: OnFull = "slide",
    draft: GPT | None = None,
    n_draft: int = 4,
    logprobs: bool = False,
    **settings: Any,
) -> Iterator[Piece]:
    """As `sample` of one prompt, a Piece for each token as it comes. Their texts joined are the Sample's."""
    batch = Batch(
        model, tokenizer, [start(model, tokenizer, prompt, on_full)], Sampler(**settings),
        max_new_tokens=max_new_tokens, stop=stop, on_full=on_full, draft=draft, n_draft=n_draft, logprobs=logprobs,
    )  # fmt: skip
    return (piece for _, piece in batch)


def start(model: GPT, tokenizer: Tokenizer, prompt: str, on_full: OnFull, name: str = "prompt") -> Sample:
    """An empty Sample. ValueError, naming the prompt `name`, for one with unknown characters or too long to go on."""
    try:
        tokens = tokenizer.encode(prompt).tolist() or [tokenizer.start]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if on_full == "stop" and len(tokens) > model.config.block_size:
        raise ValueError(f"{name}: {len(tokens)} tokens, at most block_size = {model.config.block_size}")
    return Sample(prompt, tokens)


class Batch:
    """Samples that grow together. Iterating gives (row, Piece), row by row for each position, as they come."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        samples: list[Sample],
        sampler: Sampler,
        *,
        max_new_tokens: int,
        stop: str | Sequence[str],
        on_full: OnFull,
        draft: GPT | None,
        n_draft: int,
        logprobs: bool,
    ) -> None:
        """samples, as `start` makes them, are filled. ValueError for a setting out of its range."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        stops = [stop] if isinstance(stop, str) else list(stop)
        for text in stops:
            _check_stop(tokenizer, text)
        self.samples, self._tokenizer, self._max_new_tokens = samples, tokenizer, max_new_tokens
        if logprobs:
            for sample in samples:
                sample.logprobs = []
        self._texts: list[list[str]] = [[] for _ in samples]
        self._streams = [TextStream(tokenizer.token_bytes, stops) for _ in samples]
        self.began = self.first = self.last = time.perf_counter()  # the clock: first and last tokens are moved on
        self._decoder = Decoder(
            model, [sample.prompt_tokens for sample in samples], sampler, vocab_size=tokenizer.vocab_size,
            on_full=on_full, logprobs=logprobs, draft=draft, n_draft=n_draft,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[int, Piece]]:
        growing = list(range(len(self.samples)))
        for step in self._decoder:
            self.last = time.perf_counter()
            if self.first == self.began:
                self.first = self.last
            for row in growing:
                logprob = float(step.logprobs[row]) if step.logprobs is not None else None
                yield row, self._add(row, int(step.tokens[row]), logprob)
            growing = [row for row in growing if self.samples[row].finish is None]
            if not growing:
                return

    def _add(self, row: int, token: int, logprob: float | None) -> Piece:
        """One more token of a row."""
        sample, text = self.samples[row], ""
        ends = token == self._tokenizer.end_of_text
        if not ends:
            text = self._streams[row].push(token)
            sample.tokens.append(token)
            if sample.logprobs is not None and logprob is not None:
                sample.logprobs.append(logprob)
        reasons: list[tuple[Finish, bool]] = [
            ("end_of_text", ends),
            ("stop", self._streams[row].stopped),
            ("length", len(sample.tokens) == self._max_new_tokens),
            ("full", bool(self._decoder.full[row])),
        ]
        finish = next((name for name, holds in reasons if holds), None)
        if finish:
            text += self._streams[row].close()
        self._texts[row].append(text)
        if finish:
            self._end(row, finish)
        return Piece(text, token, logprob, finish)

    def _end(self, row: int, finish: Finish) -> None:
        self.samples[row].text = "".join(self._texts[row])
        self.samples[row].finish = finish
        self._decoder.finish(row)

    def interrupt(self) -> None:
        """Ends the samples that still grow where they are."""
        for row, sample in enumerate(self.samples):
            if sample.finish is None:
                self._texts[row].append(self._streams[row].close())
                self._end(row, "interrupted")


def _check_stop(tokenizer: Tokenizer, text: str) -> None:
    """ValueError for a stop string that can't occur."""
    if not text:
        raise ValueError("stop is '', expected at least one character")
    try:
        text.encode()
        tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"stop: {error}") from None


def load_named(path: Path, setting: str) -> tuple[GPT, Tokenizer]:
    """`load` of the directory that a setting names, on the device as it is."""
    directory = checkpoint.find_model(path.expanduser(), setting)
    with ThreadPoolExecutor(1) as beside:  # the two take 0.3 s and 0.15 s for GPT-2
        reading = beside.submit(_load_tokenizer, directory)
        model = checkpoint.load_model(directory, None)
        tokenizer = reading.result()
    if tokenizer.vocab_size > model.config.vocab_size:
        counts = f"its tokenizer has {tokenizer.vocab_size} ids, its model vocab_size = {model.config.vocab_size}"
        raise ValueError(f"{setting}: {directory}: {counts}")
    return model, tokenizer


def _load_tokenizer(directory: Path) -> Tokenizer:
    """With the encoder made that the first text would wait for."""
    tokenizer = tokenizers.load(directory)
    tokenizer.encode("")
    return tokenizer
