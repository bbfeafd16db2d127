"""What a run trains on and validates with: tokens, of a text that is encoded here or of a prepared directory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..training.recipe import TrainConfig
from . import corpus as data
from . import shards
from . import tokenizer as tokenizers
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Dataset:
    """Shards of tokens (n,), unsigned integers, in memory or memory-mapped."""

    name: str
    what: str  # for a person: how many files, what was skipped
    tokenizer: Tokenizer
    train: Sequence[np.ndarray]
    val: Sequence[np.ndarray]
    fingerprint: str  # SHA-256 of the tokens, or of the manifest that has theirs

    def sizes(self) -> tuple[int, int]:
        """Tokens to train on and to validate with."""
        n_train, n_val = (sum(map(len, part)) for part in (self.train, self.val))
        return n_train, n_val


def load(
    config: TrainConfig, tokenizer_asked: bool, given: Tokenizer | None = None, source: Path | None = None
) -> Dataset:
    """The data that a run's settings name, in the tokens of the model that it starts from, if it does.

    FileNotFoundError; ValueError for what is missing or damaged, or was made with another tokenizer.
    """
    path = Path(config.data).expanduser()
    if config.data and shards.is_prepared(path):
        prepared = shards.open_prepared(path)
        kind = tokenizers.kind_of(prepared.tokenizer)
        if given is not None:
            prepared.check_tokenizer(given, str(source))
        if given is None and tokenizer_asked and config.tokenizer != kind:
            raise ValueError(f"tokenizer is {config.tokenizer}, but {path} was prepared with {kind}")
        n_shards = len(prepared.train) + len(prepared.val)
        return Dataset(
            prepared.name, f"{n_shards} shards", given or prepared.tokenizer, prepared.train, prepared.val,
            prepared.fingerprint,
        )  # fmt: skip
    corpus = data.load_corpus(config.data)
    tokenizer = given or _tokenizer(config, corpus)
    try:
        train, val = (data.encode(tokenizer, documents) for documents in (corpus.train, corpus.val))
    except ValueError as error:
        raise ValueError(f"data: {corpus.name} does not fit the tokenizer of {source}: {error}") from None
    digest = hashlib.sha256()
    for tokens in (train, val):
        digest.update(f"{tokens.dtype} {len(tokens)} ".encode())
        digest.update(tokens.data)
    return Dataset(corpus.name, _files(corpus, config), tokenizer, [train], [val], digest.hexdigest())


def _tokenizer(config: TrainConfig, corpus: data.Corpus) -> Tokenizer:
    if config.tokenizer == "gpt2":
        return tokenizers.BPETokenizer.gpt2()
    return tokenizers.CharTokenizer.of(*corpus.train, *corpus.val)


def _files(corpus: data.Corpus, config: TrainConfig) -> str:
    files = f"{len(corpus.train)} + {len(corpus.val)} files" if len(corpus.train) > 1 else "one file"
    skipped = corpus.skipped and config.data != "stdlib"
    return f"{files}, {corpus.skipped} skipped as not UTF-8 text" if skipped else files
