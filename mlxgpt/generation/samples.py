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

from ..common.settings import nearest, require_at_least, settings
from ..data import tokenizer as tokenizers
from ..data.tokenizer import Tokenizer
from ..formats import model_directory
from ..model import ops
from ..model.gpt import GPT
from .decoding import Decoder
from .sampling import Sampler
from .text_stream import TextStream

Finish = Literal["length", "stop", "end_of_text", "full", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Sampler):
    """How a sample is made: how its tokens are drawn, as a Sampler says, how many they are, and what ends it."""

    max_new_tokens: int = 500
    """tokens to generate per sample"""
    stop: tuple[str, ...] = ()
    """a text that ends a sample and is left out of it; may be given several times, on the command line with escapes
    as in \\n and \\t"""
    on_full: Literal["slide", "stop"] = "slide"
    """when all of the model's positions are taken: slide drops the oldest half of what the model sees and reads the
    rest again, stop ends the sample"""
    draft_tokens: int = 4
    """tokens that the draft proposes at a time"""
    logprobs: bool = False
    """give each token's log-probability by the model, before temperature and the like"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "max_new_tokens", "draft_tokens")

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> SampleOptions:
        """From the names of these fields; `stop` may be a string or any sequence of strings.

        TypeError, with the nearest name, for an unknown one; ValueError for a value out of its range.
        """
        valid = settings(cls)
        for name in keywords:
            if name not in valid:
                raise TypeError(f"unknown option '{name}'{nearest(name, valid)}")
        if "stop" in keywords:
            stop = keywords["stop"]
            keywords = keywords | {"stop": (stop,) if isinstance(stop, str) else tuple(stop)}
        return cls(**keywords)


@dataclass
class Sample:
    """The text that a model has added to one prompt. str() of it is that text."""

    prompt: str
    prompt_tokens: list[int]
    text: str = ""  # without the prompt and without the stop string that ended it
    tokens: list[int] = field(default_factory=list)  # without end-of-text, but with the tokens of a stop string
    logprobs: list[float] | None = None  # the model's own log-probability of each token: temperature 1, nothing cut
    finish: Finish | None = None
    """why the text ends. length: max_new_tokens; stop: a stop string; end_of_text: that token; full: the model's
    positions are used up; interrupted: by Ctrl-C"""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Piece:
    """The text that one token adds."""

    text: str  # may be empty: a character's first bytes, or what may become a stop string, are held back
    token: int
    logprob: float | None = None
    finish: Finish | None = None  # in the last piece only: why the text ends, as in Sample


def load(path: str | os.PathLike[str], device: Literal["auto", "cpu", "gpu"] = "auto") -> tuple[GPT, Tokenizer]:
    """The model and tokenizer in the directory of a model or of a training run. Sets MLX's default device.

    FileNotFoundError; ValueError for files that hold no such model, and for a device that this machine does not have.
    """
    ops.use_device(device)
    return load_named(Path(path), "model")


@overload
def sample(model: GPT, tokenizer: Tokenizer, prompt: str, *, draft: GPT | None = None, **options: Any) -> Sample: ...
@overload
def sample(
    model: GPT, tokenizer: Tokenizer, prompt: Sequence[str], *, draft: GPT | None = None, **options: Any
) -> list[Sample]: ...
def sample(
    model: GPT, tokenizer: Tokenizer, prompt: str | Sequence[str], *, draft: GPT | None = None, **options: Any
) -> Sample | list[Sample]:
    """Continues a prompt, or several prompts as one batch: a Sample for one text, a list of Samples for several.

    options are the fields of SampleOptions, such as max_new_tokens, stop and temperature.
    draft: a smaller model of the same vocabulary, which proposes tokens for a single prompt.
    An empty prompt starts from the end-of-text token, or from a line break where tokens are characters.
    TypeError for an unknown option; ValueError for a value out of its range, and for text that the tokenizer can't
    encode.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    parsed = SampleOptions.from_keywords(options)
    if not prompts:
        return []
    batch = SampleBatch(
        model, tokenizer, [empty_sample(model, tokenizer, text, parsed) for text in prompts], parsed, draft
    )
    for _ in batch:
        pass
    return batch.samples[0] if isinstance(prompt, str) else batch.samples


def stream(
    model: GPT, tokenizer: Tokenizer, prompt: str, *, draft: GPT | None = None, **options: Any
) -> Iterator[Piece]:
    """`sample` of one prompt, token by token: a Piece as soon as each is drawn. Their texts joined are the Sample's."""
    parsed = SampleOptions.from_keywords(options)
    batch = SampleBatch(model, tokenizer, [empty_sample(model, tokenizer, prompt, parsed)], parsed, draft)
    return (piece for _, piece in batch)


def empty_sample(model: GPT, tokenizer: Tokenizer, prompt: str, options: SampleOptions, name: str = "prompt") -> Sample:
    """A Sample that holds its prompt alone.

    ValueError, which calls the prompt `name`, for characters that the tokenizer doesn't know, and for a prompt longer
    than block_size that may not slide.
    """
    try:
        tokens = tokenizer.encode(prompt).tolist() or [tokenizer.start]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if options.on_full == "stop" and len(tokens) > model.config.block_size:
        raise ValueError(f"{name}: {len(tokens)} tokens, at most block_size = {model.config.block_size}")
    return Sample(prompt, tokens)


class SampleBatch:
    """Samples that are made together. Iterating it gives (row, Piece) as tokens are drawn: at each position, one for
    each row of the batch that has not ended."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        samples: list[Sample],
        options: SampleOptions,
        draft: GPT | None = None,
    ) -> None:
        """Fills `samples`, which begin as `empty_sample` makes them. ValueError as Decoder, and for a stop string that
        the tokenizer can't encode."""
        for text in options.stop:
            _check_stop(tokenizer, text)
        self.samples, self._tokenizer, self._max_new_tokens = samples, tokenizer, options.max_new_tokens
        if options.logprobs:
            for sample in samples:
                sample.logprobs = []
        self._pieces: list[list[str]] = [[] for _ in samples]
        self._streams = [TextStream(tokenizer.token_bytes, options.stop) for _ in samples]
        # on time.perf_counter's clock
        self.started_at = self.first_token_at = self.last_token_at = time.perf_counter()
        self._decoder = Decoder(
            model, [sample.prompt_tokens for sample in samples], options, vocab_size=tokenizer.vocab_size,
            on_full=options.on_full, logprobs=options.logprobs, draft=draft, draft_tokens=options.draft_tokens,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[int, Piece]]:
        unfinished = list(range(len(self.samples)))
        for step in self._decoder:
            self.last_token_at = time.perf_counter()
            if self.first_token_at == self.started_at:
                self.first_token_at = self.last_token_at
            for row in unfinished:
                logprob = float(step.logprobs[row]) if step.logprobs is not None else None
                yield row, self._add_token(row, int(step.tokens[row]), logprob)
            unfinished = [row for row in unfinished if self.samples[row].finish is None]
            if not unfinished:
                return

    def _add_token(self, row: int, token: int, logprob: float | None) -> Piece:
        sample, text = self.samples[row], ""
        is_end_of_text = token == self._tokenizer.end_of_text
        if not is_end_of_text:
            text = self._streams[row].push(token)
            sample.tokens.append(token)
            if sample.logprobs is not None and logprob is not None:
                sample.logprobs.append(logprob)
        reasons: list[tuple[Finish, bool]] = [
            ("end_of_text", is_end_of_text),
            ("stop", self._streams[row].stopped),
            ("length", len(sample.tokens) == self._max_new_tokens),
            ("full", bool(self._decoder.full[row])),
        ]
        finish = next((name for name, holds in reasons if holds), None)
        if finish:
            text += self._streams[row].close()
        self._pieces[row].append(text)
        if finish:
            self._finish(row, finish)
        return Piece(text, token, logprob, finish)

    def _finish(self, row: int, finish: Finish) -> None:
        self.samples[row].text = "".join(self._pieces[row])
        self.samples[row].finish = finish
        self._decoder.finish(row)

    def interrupt(self) -> None:
        """Ends all unfinished samples with the text that they have."""
        for row, sample in enumerate(self.samples):
            if sample.finish is None:
                self._pieces[row].append(self._streams[row].close())
                self._finish(row, "interrupted")


def _check_stop(tokenizer: Tokenizer, text: str) -> None:
    """ValueError for a stop string that no text can hold."""
    if not text:
        raise ValueError("stop is '', expected at least one character")
    try:
        text.encode()
        tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"stop: {error}") from None


def load_named(path: Path, setting: str) -> tuple[GPT, Tokenizer]:
    """`load` on MLX's default device, with errors that name the setting which gave the path."""
    directory = model_directory.find_model(path.expanduser(), setting)
    with ThreadPoolExecutor(1) as executor:  # GPT-2's model takes 0.3 s to load, its tokenizer 0.15 s
        future = executor.submit(_load_tokenizer, directory)
        model = model_directory.load_model(directory, None)
        tokenizer = future.result()
    if tokenizer.vocab_size > model.config.vocab_size:
        counts = f"its tokenizer has {tokenizer.vocab_size} ids, its model vocab_size = {model.config.vocab_size}"
        raise ValueError(f"{setting}: {directory}: {counts}")
    return model, tokenizer


def _load_tokenizer(directory: Path) -> Tokenizer:
    """Loads a tokenizer and makes its encoder, for which the first text would have to wait."""
    tokenizer = tokenizers.load(directory)
    tokenizer.encode("")
    return tokenizer
