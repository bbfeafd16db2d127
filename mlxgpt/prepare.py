"""python -m mlxgpt.prepare: tokenizes text files, JSONL and parquet in parallel to shards that training reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .common import cli
from .common.console import progress, say
from .common.settings import require, require_at_least
from .data import shards
from .data import tokenizer as tokenizers
from .data.pieces import find_inputs
from .data.preparation import Preparation, locked
from .formats import model_directory


@dataclass(frozen=True)
class PrepareConfig:
    """Tokenize text into shards to train on. Killed at any moment, the same command continues where it stopped."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")] = ()
    """text files, .jsonl, .jsonl.gz and .parquet files, directories or globs of them"""
    out: str = ""
    """the directory to write: shards, manifest and tokenizer"""
    tokenizer: str = "gpt2"
    """gpt2; char, for the characters that occur; or a model directory, for its tokenizer"""
    val_fraction: float = 0.005
    """share of documents held out for validation, chosen by a hash; of a single text, its end"""
    field: str = "text"
    """the field of a JSONL line, or the column of a parquet file, that holds the document"""
    shard_tokens: int = 100_000_000
    """tokens in a shard"""
    workers: int | None = None
    """processes that tokenize; None is one for each processor"""
    verify: str = ""
    """a prepared directory to check, each shard's checksum included, instead of preparing one"""

    def __post_init__(self) -> None:
        require_at_least(1, self, "shard_tokens")
        require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "0 < val_fraction < 1")
        if self.workers is not None:
            require_at_least(1, self, "workers")
        require(not (self.verify and self.inputs), "verify", repr(self.verify), "no inputs beside it")
        if not self.verify:
            require(bool(self.inputs), "inputs", "empty", "at least one file, directory or glob")
            require(bool(self.out), "out", "empty", "the directory to write")


def main(args: Sequence[str]) -> None:
    config = cli.parse(PrepareConfig, args, "mlxgpt.prepare")
    console = Console(stderr=True)
    if config.verify:
        _summary(_verified(Path(config.verify).expanduser()), console, "every checksum is right")
        return
    out = Path(config.out).expanduser()
    inputs, left_out = find_inputs(config.inputs)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        preparation = Preparation(
            out, inputs, _tokenizer(config.tokenizer), val_fraction=config.val_fraction, field=config.field,
            shard_tokens=config.shard_tokens, workers=config.workers,
        )  # fmt: skip
        try:
            state = preparation.run()
        except KeyboardInterrupt:
            say(console, f"stopped; {preparation.how_to_continue()}")
            raise
    if left_out:
        say(console, f"left out: {left_out} files that are empty or not UTF-8 text")
    _summary(shards.open_prepared(out), console, state)


def _tokenizer(name: str) -> tokenizers.Tokenizer | None:
    """The tokenizer that the setting names; None for char, whose characters are still to be found."""
    if name == "char":
        return None
    if name == "gpt2":
        return tokenizers.BPETokenizer.gpt2()
    return tokenizers.load(model_directory.find_model(Path(name).expanduser(), "tokenizer"))


def _verified(path: Path) -> shards.Prepared:
    manifest = shards.read_manifest(path)
    total = manifest["tokens"] * shards.dtype_of(manifest["vocab_size"]).itemsize
    with progress("shards", total, in_bytes=True) as advance:
        return shards.verify(path, advance)


def _summary(prepared: shards.Prepared, console: Console, state: str) -> None:
    """Shows what a prepared directory holds. state: what has just happened to it."""
    manifest = prepared.manifest
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for split in shards.SPLITS:
        n = manifest[split]
        shard_word = "shard" if len(n["shards"]) == 1 else "shards"
        table.add_row(
            split, f"{n['tokens']:,} tokens of {n['documents']:,} documents in {len(n['shards'])} {shard_word}"
        )
    per_token = manifest["text_bytes"] / manifest["tokens"]
    table.add_row("text", f"{manifest['text_bytes'] / 1e6:,.1f} MB, {per_token:.2f} bytes per token")
    table.add_row("ids", f"{manifest['vocab_size']:,} in {manifest['dtype']}, the largest is {manifest['largest_id']}")
    table.add_row("state", state)
    table.add_row("next", escape(f"python -m mlxgpt.train --data {prepared.path}"))
    console.print(table, highlight=False)


if __name__ == "__main__":
    cli.run("mlxgpt.prepare", main)
