"""What a run trains on and validates with: the tokens of a text that is encoded here, or of a prepared directory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import shards
from .corpus import Corpus, encode, load_corpus
from .tokenizer import BPETokenizer, CharTokenizer, Tokenizer, kind_of


@dataclass(frozen=True)
class Dataset:
    """Shards of tokens (n,), unsigned integers, in memory or memory-mapped."""

    name: str
    description: str  # for a person: how many files or shards, and what was skipped
    tokenizer: Tokenizer
    train: Sequence[np.ndarray]
    val: Sequence[np.ndarray]
    fingerprint: str  # SHA-256 of the tokens, or of the manifest, which holds the SHA-256 of each shard

    def sizes(self) -> tuple[int, int]:
        """Numbers of tokens to train on and to validate with."""
        n_train, n_val = (sum(map(len, split)) for split in (self.train, self.val))
        return n_train, n_val


def load(
    data: str,
    tokenizer: str,
    tokenizer_asked: bool = False,
    model_tokenizer: Tokenizer | None = None,
    model: Path | None = None,
) -> Dataset:
    """The data that the setting `data` names, as the tokens of the tokenizer that `tokenizer` names: char or gpt2.

    A run that starts from a model uses the model's tokenizer, whatever `tokenizer` is; `model` is its path, for
    messages. A prepared directory has its own tokenizer: it must agree with the model's and, where somebody has asked
    for one (`tokenizer_asked`), with `tokenizer`. FileNotFoundError or ValueError for data that is missing, damaged,
    or of another tokenizer.
    """
    path = Path(data).expanduser()
    if data and shards.is_prepared(path):
        prepared = shards.open_prepared(path)
        kind = kind_of(prepared.tokenizer)
        if model_tokenizer is not None:
            prepared.check_tokenizer(model_tokenizer, str(model))
        elif tokenizer_asked and tokenizer != kind:
            raise ValueError(f"tokenizer is {tokenizer}, but {path} was prepared with {kind}")
        return Dataset(
            prepared.name, f"{len(prepared.train) + len(prepared.val)} shards", model_tokenizer or prepared.tokenizer,
            prepared.train, prepared.val, prepared.fingerprint,
        )  # fmt: skip
    corpus = load_corpus(data)
    chosen = model_tokenizer or _new_tokenizer(tokenizer, corpus)
    try:
        train, val = (encode(chosen, documents) for documents in (corpus.train, corpus.val))
    except ValueError as error:
        raise ValueError(f"data: {corpus.name} does not fit the tokenizer of {model}: {error}") from None
    digest = hashlib.sha256()
    for tokens in (train, val):
        digest.update(f"{tokens.dtype} {len(tokens)} ".encode())
        digest.update(tokens.data)
    return Dataset(corpus.name, _description(corpus, data), chosen, [train], [val], digest.hexdigest())


def _new_tokenizer(kind: str, corpus: Corpus) -> Tokenizer:
    return BPETokenizer.gpt2() if kind == "gpt2" else CharTokenizer.of(*corpus.train, *corpus.val)


def _description(corpus: Corpus, data: str) -> str:
    files = f"{len(corpus.train)} + {len(corpus.val)} files" if len(corpus.train) > 1 else "one file"
    if corpus.skipped and data != "stdlib":
        return f"{files}, {corpus.skipped} skipped as not UTF-8 text"
    return files
