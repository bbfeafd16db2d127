"""python -m mlxgpt.evaluate: how well a model predicts a text, every token of it, in windows that overlap."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .common import cli
from .common.console import say
from .common.settings import require_at_least
from .data import corpus as data
from .data.tokenizer import Tokenizer
from .generation.samples import load_named
from .model import ops
from .model.gpt import GPT


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model's loss, perplexity and bits per byte on a whole text."""

    model: str
    """the model directory that training or the converter wrote"""
    data: str
    """a text file, a directory, a glob, or a named corpus, as in training: stdlib or shakespeare"""
    split: Literal["train", "val", "all"] = "all"
    """the part that training trains on, the one that it validates with, or all of the text"""
    stride: int | None = None
    """tokens from one window to the next: the fewer, the more context each token has, and the longer it takes;
    at most block_size; None is half of it"""
    batch_size: int = 8
    """windows computed together"""
    json: bool = False
    """print one JSON object"""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes the GPU where MLX has one"""

    def __post_init__(self) -> None:
        require_at_least(1, self, "batch_size")
        if self.stride is not None:
            require_at_least(1, self, "stride")


@dataclass(frozen=True)
class Evaluation:
    """What the prediction of a text's tokens has cost."""

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
        """Of the predicted tokens' text in UTF-8. An end-of-text between two documents has none."""
        ids = (int(token) for token in np.flatnonzero(self.counts) if token != tokenizer.end_of_text)
        return sum(int(self.counts[token]) * len(tokenizer.token_bytes(token)) for token in ids)

    def bits_per_byte(self, tokenizer: Tokenizer) -> float:
        """All predicted tokens' bits, nats / ln 2, over the bytes of their text: what models with other tokens
        compare by."""
        return self.nats / math.log(2) / self.bytes(tokenizer)


def windows(tokens: np.ndarray, block_size: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts a text into windows that predict every token but the first once -> inputs and targets, each (T,) int32.

    tokens (n,) of any integer type, at least 2; T is block_size, or n - 1 if that is less. Windows begin every
    `stride` tokens. A target that an earlier window has counted is -1, and so is what the last one is filled up
    with: a token is predicted from at least block_size - stride + 1 others, or from all there are before it.
    The strided windows of Hugging Face's "Perplexity of fixed-length models".
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


def evaluate(
    model: GPT,
    tokens: np.ndarray,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    done: Callable[[int, float], None] = lambda tokens, nats: None,
) -> Evaluation:
    """A model's loss on every token of a text but the first. tokens (n,) of any integer type, ids below V.

    stride is that of `windows`, None for half of block_size; batch_size windows are computed together; `done` is
    told the tokens and nats of each batch. Batches are summed in float64. The model stays ready for evaluation.
    ValueError for fewer than 2 tokens, a stride outside of 1 to block_size, and a loss that is not finite.
    """
    block_size = model.config.block_size
    stride = max(1, block_size // 2) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride is {stride}, expected 1 to block_size = {block_size}")
    if len(tokens) < 2:
        raise ValueError(f"data: {len(tokens)} tokens, expected at least 2: one to begin with, and one to predict")
    model.eval()  # no dropout
    nats, counts = 0.0, np.zeros(model.config.vocab_size, np.int64)
    for ids, targets in _batches(windows(tokens, block_size, stride), batch_size):
        predicted = targets[targets >= 0]
        batch_nats = float(ops.without_gradient(model, GPT.loss, ids, targets)) * len(predicted)
        if not math.isfinite(batch_nats):
            raise ValueError(f"model: the loss is {batch_nats} after {counts.sum()} tokens, expected a finite number")
        nats += batch_nats
        counts += np.bincount(predicted, minlength=len(counts))
        done(len(predicted), batch_nats)
    return Evaluation(nats, counts)


def _batches(
    pairs: Iterator[tuple[np.ndarray, np.ndarray]], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows of (T,) put together: inputs and targets, each (B, T). The last ones may be fewer than batch_size."""
    batch: list[tuple[np.ndarray, np.ndarray]] = []
    for pair in pairs:
        batch.append(pair)
        if len(batch) == batch_size:
            yield np.stack([ids for ids, _ in batch]), np.stack([targets for _, targets in batch])
            batch = []
    if batch:
        yield np.stack([ids for ids, _ in batch]), np.stack([targets for _, targets in batch])


def _tokens(config: EvaluateConfig, corpus: data.Corpus, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a corpus, documents one after another, (n,), with an end-of-text between two of them."""
    try:
        tokens = data.encode(tokenizer, corpus.documents(config.split))
    except ValueError as error:
        raise ValueError(f"data: {corpus.name} does not fit the tokenizer of {config.model}: {error}") from None
    return tokens if tokenizer.end_of_text is None else tokens[:-1]


@contextlib.contextmanager
def _progress(n_tokens: int) -> Iterator[Callable[[int, float], None]]:
    """A bar with the loss so far, on standard error where that is a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=n_tokens)
        sums = [0, 0.0]

        def done(tokens: int, nats: float) -> None:
            sums[0] += tokens
            sums[1] += nats
            bar.update(task, completed=sums[0], description=f"loss {sums[1] / sums[0]:.4f}")

        yield done


def main(args: Sequence[str]) -> None:
    config = cli.parse(EvaluateConfig, args, "mlxgpt.evaluate")
    ops.use_device(config.device)
    model, tokenizer = load_named(Path(config.model), "model")
    corpus = data.load_corpus(config.data)
    tokens = _tokens(config, corpus, tokenizer)
    stride = max(1, model.config.block_size // 2) if config.stride is None else config.stride
    with _progress(len(tokens) - 1) as done:
        start = time.perf_counter()
        result = evaluate(model, tokens, stride=stride, batch_size=config.batch_size, done=done)
        seconds = time.perf_counter() - start
    record = {
        "model": config.model, "data": corpus.name, "split": config.split, "block_size": model.config.block_size,
        "stride": stride, "loss": result.loss, "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte(tokenizer), "tokens": result.tokens, "bytes": result.bytes(tokenizer),
        "seconds": seconds, "tokens_per_s": result.tokens / seconds,
    }  # fmt: skip
    if config.json:
        print(json.dumps(record))
        return
    console = Console()
    part = {"all": "", "train": ", training part", "val": ", validation part"}[config.split]
    for line in (
        f"model: {config.model}",
        f"data: {corpus.name}{part}, {record['tokens']:,} tokens, {record['bytes']:,} bytes",
        f"windows: of {model.config.block_size} tokens, {stride} apart",
        f"loss: {result.loss:.4f} nats per token",
        f"perplexity: {result.perplexity:.4f}",
        f"bits per byte: {record['bits_per_byte']:.4f}",
        f"time: {seconds:.1f} s, {record['tokens_per_s']:,.0f} tokens/s",
    ):
        say(console, line)


if __name__ == "__main__":
    cli.run("mlxgpt.evaluate", main)
