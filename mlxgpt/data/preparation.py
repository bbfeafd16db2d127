"""Tokenizes text files, JSONL and parquet in parallel to shards that training reads.

python scripts/prepare_text.py INPUT... --out DIR [--tokenizer gpt2|char|MODEL_DIR]; --verify DIR
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from ..common import cli, disk
from ..common.console import say
from ..common.settings import require, require_at_least
from ..formats import model_directory as checkpoint
from . import pieces as text_pieces
from . import shards, tokenizer
from .pieces import Input, Piece
from .shards import MANIFEST, PROGRESS, SPLITS, ShardWriter
from .tokenizer import Tokenizer

COMMIT_SECONDS = 1.0  # at most so much is done again after a crash
Result = TypeVar("Result")
Place = tuple[int, int]  # where in the input: a file's number, and where in it


@dataclass(frozen=True)
class PrepareConfig:
    """Tokenize text into shards to train on. Killed at any moment, the same command goes on where it was."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")] = ()
    """text files, .jsonl, .jsonl.gz and .parquet files, directories or globs of them"""
    out: str = ""
    """the directory to write: shards, manifest and tokenizer"""
    tokenizer: str = "gpt2"
    """gpt2; char, for the characters that occur; or a model directory, for its tokenizer"""
    val_fraction: float = 0.005
    """of the documents, chosen by their places in the input, that validate; of a single text it is the end"""
    field: str = "text"
    """the field of a JSONL line, or the column of a parquet file, that is the document"""
    shard_tokens: int = 100_000_000
    """tokens in a shard"""
    workers: int | None = None
    """processes that tokenize; None is one for each processor"""
    verify: str = ""
    """a prepared directory to check, shards' checksums and all, in place of preparing one"""

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
    config = cli.parse(PrepareConfig, args, "prepare_text")
    console = Console(stderr=True)
    if config.verify:
        _verify(Path(config.verify).expanduser(), console)
        return
    out = Path(config.out).expanduser()
    inputs, left_out = text_pieces.find_inputs(config.inputs)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        speed = Preparation(config, out, inputs, console).run()
    if left_out:
        say(console, f"left out: {left_out} files that are empty or no UTF-8 text")
    _summary(shards.open_prepared(out), console, speed)


class Preparation:
    """The making of a prepared directory, from the beginning or from where an earlier one was ended.

    `progress.json` says how far it is; what the shards hold beyond that is written anew.
    """

    def __init__(self, config: PrepareConfig, out: Path, inputs: Sequence[Input], console: Console) -> None:
        """ValueError for a directory that holds something else, or the beginnings of other data."""
        self.config, self.out, self.inputs, self.console = config, out, inputs, console
        self.workers = config.workers or os.cpu_count() or 1
        chosen = _chosen_tokenizer(config.tokenizer)
        made_from = {
            "inputs": [{"name": i.name, "bytes": i.size} for i in inputs],
            "tokenizer": _checksums(chosen) if chosen else config.tokenizer,
            **{name: getattr(config, name) for name in ("val_fraction", "field", "shard_tokens")},
        }
        self.progress: dict[str, Any] = {
            "format": shards.FORMAT, "made_from": made_from, "changed": [i.changed for i in inputs], "tokenizer": None,
            "input_done": 0, "input_total": sum(i.size for i in inputs), "place": [0, 0], "text_bytes": 0,
            "largest_id": 0, "documents": dict.fromkeys(SPLITS, 0), "seconds": 0.0,
            **{split: ShardWriter.nothing() for split in SPLITS},
        }  # fmt: skip
        self.finished = (out / MANIFEST).is_file()
        if self.finished:
            _require_same(shards.read_manifest(out)[0]["made_from"], made_from, out)
        elif (out / PROGRESS).is_file():
            begun = shards.read_json(out / PROGRESS)
            if begun.get("format") != shards.FORMAT:
                raise ValueError(f"{out / PROGRESS}: format is {begun.get('format')!r}, expected {shards.FORMAT}")
            _require_same(begun["made_from"], made_from, out)
            for source, changed in zip(inputs, begun["changed"], strict=True):
                if source.changed != changed:
                    raise ValueError(f"{source.path}: it has changed since {out} was begun; remove {out} to begin anew")
            self.progress = begun
        elif any(out.iterdir()):
            raise ValueError(f"out: {out} holds other files, expected a new directory or one that was being prepared")
        else:
            self._save()
        if chosen or not self.progress["tokenizer"]:
            self.tokenizer = chosen
        else:
            self.tokenizer = tokenizer.load(out)

    def run(self) -> str:
        """All that is left to do -> how fast it was. OSError when the disk is full: it can go on where it was."""
        if self.finished:
            return "prepared already"
        try:
            self._tokenize(self.tokenizer or self._find_characters())
        except OSError as error:
            reason = f"{error.strerror or error}; the same command goes on from {self._percent()} %"
            raise OSError(error.errno, reason, error.filename or str(self.out)) from None
        except BrokenProcessPool:
            reason = "a worker process was killed, perhaps for lack of memory"
            raise ChildProcessError(f"{reason}; the same command goes on from {self._percent()} %") from None
        except KeyboardInterrupt:
            say(self.console, f"stopped; the same command goes on from {self._percent()} %")
            raise
        progress = self.progress
        speed = progress["text_bytes"] / 1e6 / max(progress["seconds"], 1e-9)
        return f"{speed:,.1f} MB/s on {self.workers} processes, {progress['seconds']:,.1f} s"

    def _find_characters(self) -> Tokenizer:
        found: set[str] = set()
        work = functools.partial(text_pieces.characters, column=self.config.field)
        with self._bar("characters", 0) as advance:
            for characters, _, done in self._results(work, (0, 0)):
                found |= characters
                advance(done)
        if not found:
            raise ValueError(f"input: none of its {len(self.inputs)} files holds any text")
        return tokenizer.CharTokenizer(sorted(found))

    def _tokenize(self, text: Tokenizer) -> None:
        config, progress, out = self.config, self.progress, self.out
        if not progress["tokenizer"]:
            for name, content in text.files().items():
                disk.write_file(out / name, content)
            progress["tokenizer"] = _checksums(text)
            self._save()
        dtype = shards.dtype_of(text.vocab_size)
        work = functools.partial(
            text_pieces.encode, tokenizer=text, column=config.field, val_fraction=config.val_fraction
        )
        with contextlib.ExitStack() as stack:
            writers = {s: ShardWriter(out, s, dtype, config.shard_tokens, progress[s]) for s in SPLITS}
            for writer in writers.values():
                stack.callback(writer.close)
            advance = stack.enter_context(self._bar("tokens", progress["input_done"]))
            committed = time.monotonic()
            for encoded, place, done in self._results(work, (progress["place"][0], progress["place"][1])):
                for split, writer in writers.items():
                    writer.write(encoded.tokens[split])
                    progress["documents"][split] += encoded.documents[split]
                progress["text_bytes"] += encoded.text_bytes
                progress["largest_id"] = max(progress["largest_id"], encoded.largest)
                progress["place"], progress["input_done"] = list(place), done
                advance(done)
                if (now := time.monotonic()) - committed >= COMMIT_SECONDS:
                    progress["seconds"] += now - committed
                    self._commit(writers)
                    committed = now
            progress["seconds"] += time.monotonic() - committed
            self._finish(text, writers)

    def _commit(self, writers: Mapping[shards.Split, ShardWriter]) -> None:
        for split, writer in writers.items():
            self.progress[split] = writer.commit()
        self._save()

    def _finish(self, text: Tokenizer, writers: Mapping[shards.Split, ShardWriter]) -> None:
        progress = self.progress
        written = {split: writer.finish() for split, writer in writers.items()}
        self._commit(writers)
        manifest: dict[str, Any] = {
            "format": shards.FORMAT, "tokenizer": progress["tokenizer"], "vocab_size": text.vocab_size,
            "dtype": shards.dtype_of(text.vocab_size).name, "largest_id": progress["largest_id"],
            "documents": sum(progress["documents"].values()),
            "tokens": sum(shard["tokens"] for split in SPLITS for shard in written[split]),
            "text_bytes": progress["text_bytes"], "made_from": progress["made_from"],
        }  # fmt: skip
        for split in SPLITS:
            documents, tokens = progress["documents"][split], sum(shard["tokens"] for shard in written[split])
            if not tokens:
                side = "to train on" if split == "train" else "to validate with"
                raise ValueError(
                    f"input: of its {manifest['documents']} documents val_fraction {self.config.val_fraction} leaves "
                    f"none {side}; remove {self.out} and give a {'smaller' if split == 'train' else 'larger'} one"
                )
            manifest[split] = {"documents": documents, "tokens": tokens, "shards": written[split]}
        _write_json(self.out / MANIFEST, manifest)
        (self.out / PROGRESS).unlink()

    def _results(self, work: Callable[[list[Piece]], Result], begin: Place) -> Iterator[tuple[Result, Place, int]]:
        """What the workers make of the pieces from a place on, in order; the place after them, and the bytes done."""
        config = self.config
        before = list(itertools.accumulate((source.size for source in self.inputs), initial=0))
        groups = _grouped(text_pieces.cut(self.inputs, config.field, config.val_fraction, begin))
        places = deque[tuple[Place, int]]()

        def taken() -> Iterator[list[Piece]]:
            for pieces, place in groups:
                places.append((place, before[place[0]] + pieces[-1].done))
                yield pieces

        for result in _in_order(work, taken(), self.workers):
            yield (result, *places.popleft())

    def _save(self) -> None:
        _write_json(self.out / PROGRESS, self.progress)

    def _percent(self) -> int:
        return math.floor(100 * self.progress["input_done"] / max(1, self.progress["input_total"]))

    @contextlib.contextmanager
    def _bar(self, what: str, done: int) -> Iterator[Callable[[int], None]]:
        with _progress(self.console, what, self.progress["input_total"], done) as set_done:
            yield set_done


def _grouped(pieces: Iterable[tuple[Piece, Place]]) -> Iterator[tuple[list[Piece], Place]]:
    """Small pieces together, as sending one to a worker takes as long as encoding some kilobytes."""
    group: list[Piece] = []
    size = 0
    for piece, place in pieces:
        group.append(piece)
        size += text_pieces.PIECE if isinstance(piece.content, list) else piece.end - piece.begin
        if size >= text_pieces.PIECE:
            yield group, place
            group, size = [], 0
    if group:
        yield group, place


# ---- processes ----


def _in_order(work: Callable[[list[Piece]], Result], groups: Iterable[list[Piece]], workers: int) -> Iterator[Result]:
    """work of each group, in their order, by some processes with a few groups each: memory is bounded."""
    if workers == 1:
        yield from map(work, groups)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks
    with ProcessPoolExecutor(workers, context, _begin_worker, (work,)) as pool:
        try:
            running = deque[Future[Result]]()
            for pieces in groups:
                running.append(pool.submit(_work, pieces))
                if len(running) > 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: Callable[[list[Piece]], Any]


def _begin_worker(work: Callable[[list[Piece]], Any]) -> None:
    """What each process begins with: its work. It ends with its parent, whose Ctrl-C it leaves to that."""
    global _worker
    _worker = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _work(pieces: list[Piece]) -> Any:
    return _worker(pieces)


# ---- what lies in the directory ----


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """ValueError if another process is preparing it."""
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"out: {directory} is being prepared by another process") from None
    finally:
        os.close(lock)


def _chosen_tokenizer(name: str) -> Tokenizer | None:
    """None for char, whose characters are to be found."""
    if name == "char":
        return None
    if name == "gpt2":
        return tokenizer.BPETokenizer.gpt2()
    return tokenizer.load(checkpoint.find_model(Path(name).expanduser(), "tokenizer"))


def _checksums(text: Tokenizer) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in text.files().items()}


def _require_same(begun: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """ValueError for the first difference in what a directory was begun with and what is asked for now."""
    again = f"remove {out}, or give another --out"
    for name, value in now.items():
        if name == "inputs":
            theirs, ours = ({i["name"]: i["bytes"] for i in inputs} for inputs in (begun[name], value))
            for file in sorted(theirs.keys() | ours.keys()):
                if theirs.get(file) != ours.get(file):
                    sizes = [f"{s} bytes" if s is not None else "absent" for s in (theirs.get(file), ours.get(file))]
                    raise ValueError(f"{out}: it was begun with input {file} {sizes[0]}, now {sizes[1]}; {again}")
        elif begun.get(name) != value:
            difference = "" if name == "tokenizer" else f" {begun.get(name)!r}, now {value!r}"
            raise ValueError(f"{out}: it was begun with another {name}{difference}; {again}")


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    disk.write_file(file, (json.dumps(content, indent=1) + "\n").encode())


# ---- what is shown ----


@contextlib.contextmanager
def _progress(console: Console, what: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar over some bytes -> a function that sets how many are done."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total, completed=done)
        yield lambda done: progress.update(task, completed=done)


def _verify(path: Path, console: Console) -> None:
    manifest, read = shards.read_manifest(path)[0], 0
    itemsize = shards.dtype_of(manifest["vocab_size"]).itemsize
    with _progress(console, "shards", manifest["tokens"] * itemsize, 0) as set_done:

        def done(n: int) -> None:
            nonlocal read
            read += n
            set_done(read)

        prepared = shards.verify(path, done)
    _summary(prepared, console, "every checksum is right")


def _summary(prepared: shards.Prepared, console: Console, state: str) -> None:
    manifest = prepared.manifest
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for split in SPLITS:
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
    cli.run("prepare_text", main)
