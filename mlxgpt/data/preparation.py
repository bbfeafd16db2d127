"""The making of a prepared directory: input files are tokenized in parallel to shards.

Killed at any moment, the same preparation continues where it stopped, and the shards are the same to the bit.
`progress.json` says how far it is: "format"; "made_from" and "changed", which tell whether the input is the same;
"tokenizer", once its files are written; "train" and "val", the states of their ShardWriters; "place", where in the
input to continue; and counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
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
from pathlib import Path
from typing import Any, TypeVar

from ..common import console, disk
from . import pieces, shards
from .pieces import FilePiece, InputFile, Place
from .shards import MANIFEST, PROGRESS, SPLITS, ShardWriter
from .tokenizer import CharTokenizer, Tokenizer
from .tokenizer import load as load_tokenizer

COMMIT_SECONDS = 1.0  # between commits: a crash loses no more work than this
Result = TypeVar("Result")


class Preparation:
    """One making of a prepared directory: from the beginning, or from where an interrupted one stopped."""

    def __init__(
        self,
        out: Path,
        inputs: Sequence[InputFile],
        tokenizer: Tokenizer | None,
        *,
        val_fraction: float,
        field: str,
        shard_tokens: int,
        workers: int | None = None,
    ) -> None:
        """tokenizer: None for one token per character, where the characters are found first.

        field: the field of a JSONL line, or the column of a parquet file, that is the text. workers: processes; None
        is one for each processor. ValueError if the directory holds other files, or was made from other input or with
        other settings.
        """
        self.out, self.inputs, self.tokenizer = out, inputs, tokenizer
        self.val_fraction, self.field, self.shard_tokens = val_fraction, field, shard_tokens
        self.workers = workers or os.cpu_count() or 1
        made_from = {
            "inputs": [{"name": i.name, "bytes": i.size} for i in inputs],
            "tokenizer": _checksums(tokenizer) if tokenizer else "char",
            "val_fraction": val_fraction,
            "field": field,
            "shard_tokens": shard_tokens,
        }
        self.progress: dict[str, Any] = {
            "format": shards.FORMAT, "made_from": made_from, "changed": [i.changed for i in inputs], "tokenizer": None,
            "input_done": 0, "input_total": sum(i.size for i in inputs), "place": [0, 0], "text_bytes": 0,
            "largest_id": 0, "documents": dict.fromkeys(SPLITS, 0), "seconds": 0.0,
            **{split: ShardWriter.nothing() for split in SPLITS},
        }  # fmt: skip
        self.finished = (out / MANIFEST).is_file()
        if self.finished:
            _require_same(shards.read_manifest(out)["made_from"], made_from, out)
        elif (out / PROGRESS).is_file():
            self._continue(disk.read_json(out / PROGRESS))
        elif any(out.iterdir()):
            raise ValueError(f"out: {out} holds other files, expected a new directory or one that was being prepared")
        else:
            self._save()

    def _continue(self, progress: dict[str, Any]) -> None:
        if progress.get("format") != shards.FORMAT:
            raise ValueError(f"{self.out / PROGRESS}: format is {progress.get('format')!r}, expected {shards.FORMAT}")
        _require_same(progress["made_from"], self.progress["made_from"], self.out)
        for source, changed in zip(self.inputs, progress["changed"], strict=True):
            if source.changed != changed:
                raise ValueError(
                    f"{source.path}: it has changed since {self.out} was begun; remove {self.out} to start again"
                )
        self.progress = progress
        if self.tokenizer is None and progress["tokenizer"]:
            self.tokenizer = load_tokenizer(self.out)

    def run(self) -> str:
        """Does all that is left to do -> how fast it was, for a person.

        OSError when the disk is full and ChildProcessError when a worker was killed; the preparation can be continued.
        ValueError for input that can't be read, and when no document falls to one of the splits.
        """
        if self.finished:
            return "prepared already"
        try:
            self._tokenize(self.tokenizer or self._find_characters())
        except OSError as error:
            reason = f"{error.strerror or error}; {self.how_to_continue()}"
            raise OSError(error.errno, reason, error.filename or str(self.out)) from None
        except BrokenProcessPool:
            reason = "a worker process was killed, perhaps for lack of memory"
            raise ChildProcessError(f"{reason}; {self.how_to_continue()}") from None
        progress = self.progress
        speed = progress["text_bytes"] / 1e6 / max(progress["seconds"], 1e-9)
        return f"{speed:,.1f} MB/s on {self.workers} processes, {progress['seconds']:,.1f} s"

    def how_to_continue(self) -> str:
        """What to tell a person when it was interrupted."""
        percent = math.floor(100 * self.progress["input_done"] / max(1, self.progress["input_total"]))
        return f"run the same command again to continue from {percent} %"

    def _find_characters(self) -> Tokenizer:
        found: set[str] = set()
        work = functools.partial(pieces.characters, field=self.field)
        total, done_before = self.progress["input_total"], 0
        with console.progress("characters", total, in_bytes=True) as advance:
            for characters, _, done in self._results(work, (0, 0)):
                found |= characters
                advance(done - done_before)
                done_before = done
        if not found:
            raise ValueError(f"input: none of its {len(self.inputs)} files holds any text")
        return CharTokenizer(sorted(found))

    def _tokenize(self, tokenizer: Tokenizer) -> None:
        progress, out = self.progress, self.out
        if not progress["tokenizer"]:
            for name, content in tokenizer.files().items():
                disk.write_file(out / name, content)
            progress["tokenizer"] = _checksums(tokenizer)
            self._save()
        dtype = shards.dtype_of(tokenizer.vocab_size)
        work = functools.partial(pieces.encode, tokenizer=tokenizer, field=self.field, val_fraction=self.val_fraction)
        with contextlib.ExitStack() as stack:
            writers = {s: ShardWriter(out, s, dtype, self.shard_tokens, progress[s]) for s in SPLITS}
            for writer in writers.values():
                stack.callback(writer.close)
            bar = console.progress("tokens", progress["input_total"], done=progress["input_done"], in_bytes=True)
            advance = stack.enter_context(bar)
            committed = time.monotonic()
            for encoded, place, done in self._results(work, (progress["place"][0], progress["place"][1])):
                for split, writer in writers.items():
                    writer.write(encoded.tokens[split])
                    progress["documents"][split] += encoded.documents[split]
                progress["text_bytes"] += encoded.text_bytes
                progress["largest_id"] = max(progress["largest_id"], encoded.largest_id)
                advance(done - progress["input_done"])
                progress["place"], progress["input_done"] = list(place), done
                if (now := time.monotonic()) - committed >= COMMIT_SECONDS:
                    progress["seconds"] += now - committed
                    self._commit(writers)
                    committed = now
            progress["seconds"] += time.monotonic() - committed
            self._finish(tokenizer, writers)

    def _commit(self, writers: Mapping[shards.Split, ShardWriter]) -> None:
        for split, writer in writers.items():
            self.progress[split] = writer.commit()
        self._save()

    def _finish(self, tokenizer: Tokenizer, writers: Mapping[shards.Split, ShardWriter]) -> None:
        progress = self.progress
        written = {split: writer.finish() for split, writer in writers.items()}
        self._commit(writers)
        manifest: dict[str, Any] = {
            "format": shards.FORMAT, "tokenizer": progress["tokenizer"], "vocab_size": tokenizer.vocab_size,
            "dtype": shards.dtype_of(tokenizer.vocab_size).name, "largest_id": progress["largest_id"],
            "documents": sum(progress["documents"].values()),
            "tokens": sum(shard["tokens"] for split in SPLITS for shard in written[split]),
            "text_bytes": progress["text_bytes"], "made_from": progress["made_from"],
        }  # fmt: skip
        for split in SPLITS:
            documents, tokens = progress["documents"][split], sum(shard["tokens"] for shard in written[split])
            if not tokens:
                purpose, better = ("to train on", "smaller") if split == "train" else ("to validate with", "larger")
                raise ValueError(
                    f"input: of its {manifest['documents']} documents val_fraction {self.val_fraction} leaves "
                    f"none {purpose}; remove {self.out} and give a {better} one"
                )
            manifest[split] = {"documents": documents, "tokens": tokens, "shards": written[split]}
        disk.write_file(self.out / MANIFEST, disk.json_bytes(manifest, indent=1))
        (self.out / PROGRESS).unlink()

    def _results(self, work: Callable[[list[FilePiece]], Result], begin: Place) -> Iterator[tuple[Result, Place, int]]:
        """What the workers return for the pieces from a place on, in order; the place after them; the bytes done."""
        before = list(itertools.accumulate((source.size for source in self.inputs), initial=0))
        groups = _grouped(pieces.cut(self.inputs, self.field, self.val_fraction, begin))
        places = deque[tuple[Place, int]]()

        def submitted() -> Iterator[list[FilePiece]]:
            for group, place in groups:
                places.append((place, before[place[0]] + group[-1].file_done))
                yield group

        for result in _in_order(work, submitted(), self.workers):
            yield (result, *places.popleft())

    def _save(self) -> None:
        disk.write_file(self.out / PROGRESS, disk.json_bytes(self.progress, indent=1))


def _grouped(cut: Iterable[tuple[FilePiece, Place]]) -> Iterator[tuple[list[FilePiece], Place]]:
    """Small pieces in groups, because sending a piece to a worker takes as long as encoding some kilobytes."""
    group: list[FilePiece] = []
    size = 0
    for piece, place in cut:
        group.append(piece)
        size += pieces.PIECE_BYTES if isinstance(piece.content, list) else piece.end - piece.begin
        if size >= pieces.PIECE_BYTES:
            yield group, place
            group, size = [], 0
    if group:
        yield group, place


# ---- processes ----


def _in_order(
    work: Callable[[list[FilePiece]], Result], groups: Iterable[list[FilePiece]], workers: int
) -> Iterator[Result]:
    """The results of `work` for each group, in order. Each process has a few groups at a time: memory is bounded."""
    if workers == 1:
        yield from map(work, groups)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks that other threads hold
    with ProcessPoolExecutor(workers, context, _start_worker, (work,)) as pool:
        try:
            running = deque[Future[Result]]()
            for group in groups:
                running.append(pool.submit(_work, group))
                if len(running) > 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: Callable[[list[FilePiece]], Any]  # of this process


def _start_worker(work: Callable[[list[FilePiece]], Any]) -> None:
    """Starts a worker process: it ignores Ctrl-C, which its parent handles, and ends when its parent ends."""
    global _worker
    _worker = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _work(group: list[FilePiece]) -> Any:
    return _worker(group)


# ---- the directory ----


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other processes from preparing the directory. ValueError if one is preparing it."""
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"out: {directory} is being prepared by another process") from None
    finally:
        os.close(lock)


def _checksums(tokenizer: Tokenizer) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in tokenizer.files().items()}


def _require_same(begun: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """ValueError for the first difference between what a directory was begun with and what is asked for now."""
    remedy = f"remove {out}, or give another --out"
    for name, value in now.items():
        if name == "inputs":
            before, after = ({i["name"]: i["bytes"] for i in inputs} for inputs in (begun[name], value))
            for file in sorted(before.keys() | after.keys()):
                if before.get(file) != after.get(file):
                    sizes = [f"{s} bytes" if s is not None else "absent" for s in (before.get(file), after.get(file))]
                    raise ValueError(f"{out}: it was begun with input {file} {sizes[0]}, now {sizes[1]}; {remedy}")
        elif begun.get(name) != value:
            difference = "" if name == "tokenizer" else f" {begun.get(name)!r}, now {value!r}"
            raise ValueError(f"{out}: it was begun with another {name}{difference}; {remedy}")
