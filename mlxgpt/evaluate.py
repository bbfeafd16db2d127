"""python -m mlxgpt.evaluate: measures how well a model predicts a text."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from .common import cli
from .common.console import progress, say
from .common.settings import require_at_least
from .data.corpus import Corpus, encode, load_corpus
from .data.tokenizer import Tokenizer
from .generation.evaluation import default_stride, evaluate
from .generation.samples import load_named
from .model import ops


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


def _tokens(config: EvaluateConfig, corpus: Corpus, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a corpus, (n,): its documents in order, with an end-of-text between two of them."""
    try:
        tokens = encode(tokenizer, corpus.documents(config.split))
    except ValueError as error:
        raise ValueError(f"data: {corpus.name} does not fit the tokenizer of {config.model}: {error}") from None
    return tokens if tokenizer.end_of_text is None else tokens[:-1]


def main(args: Sequence[str]) -> None:
    config = cli.parse(EvaluateConfig, args, "mlxgpt.evaluate")
    ops.use_device(config.device)
    model, tokenizer = load_named(Path(config.model), "model")
    corpus = load_corpus(config.data)
    tokens = _tokens(config, corpus, tokenizer)
    stride = default_stride(model) if config.stride is None else config.stride
    with progress("", len(tokens) - 1) as advance:
        n_done, nats = 0, 0.0

        def show(batch_tokens: int, batch_nats: float) -> None:
            nonlocal n_done, nats
            n_done, nats = n_done + batch_tokens, nats + batch_nats
            advance(batch_tokens, f"loss {nats / n_done:.4f}")

        start = time.perf_counter()
        result = evaluate(model, tokens, stride=stride, batch_size=config.batch_size, on_batch=show)
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
