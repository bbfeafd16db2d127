"""Text files, JSONL and parquet of any size as a row of small pieces, and a piece as tokens.

Who cuts reads next to nothing of a plain file: a piece says where it lies, and whoever encodes it reads it. What can
only be read from its beginning, compressed JSONL and parquet, comes along in the piece. Pieces, and so the tokens,
depend on the input alone.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from .shards import SPLITS, Split, dtype_of
from .tokenizer import Tokenizer

PIECE = 1 << 20  # bytes of text, or a little more
_WINDOW = 1 << 16  # bytes looked at to find a place to cut


@dataclass(frozen=True)
class Input:
    """A file of the corpus."""

    path: Path
    name: str  # among the others, wherever they lie
    kind: Literal["text", "jsonl", "jsonl.gz", "parquet"]
    size: int
    changed: int  # st_mtime_ns


@dataclass(frozen=True)
class Piece:
    """Some documents of a file, or a part of one."""

    source: Input
    begin: int  # in bytes of the text, or in rows
    end: int
    done: int  # bytes of the file that are done with it
    split: Split | None = None  # of a text's; each document of the others has its own
    last: bool = True  # its end is a document's
    content: bytes | list[Any] | None = None  # None: to be read from the file


@dataclass
class Encoded:
    """The tokens of some pieces, and what is counted of them."""

    tokens: dict[Split, np.ndarray]  # (n,) of the shards' type
    documents: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: int = 0
    largest: int = 0


def find_inputs(names: Sequence[str]) -> tuple[list[Input], int]:
    """The files that some paths and globs name, in an order of their own, and how many were left out.

    In directories hidden files and those that are empty or begin as no UTF-8 text does are left out.
    FileNotFoundError; ValueError for a file of those named that is empty, or if there is nothing else.
    """
    paths: dict[Path, bool] = {}  # to whether it was named itself
    for name in names:
        path = Path(name).expanduser()
        if path.is_file():
            paths[path.resolve()] = True
            continue
        found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        hidden = len(path.parts) if path.is_dir() else 0
        files = [p for p in found if p.is_file() and not any(part.startswith(".") for part in p.parts[hidden:])]
        if not files and not path.is_dir():
            raise FileNotFoundError(f"input: there is no file or directory {name}, and as a glob it matches no file")
        for file in files:
            paths.setdefault(file.resolve(), False)
    inputs, left_out = [], 0
    parent = Path(os.path.commonpath([p.parent for p in paths])) if paths else Path()
    for path, named in sorted(paths.items()):
        source = _input(path, path.relative_to(parent).as_posix())
        if source.size == 0 and named:
            raise ValueError(f"{path}: it is empty")
        if source.size == 0 or (source.kind == "text" and not named and not _begins_as_text(path)):
            left_out += 1
        else:
            inputs.append(source)
    if not inputs:
        raise ValueError(f"input: {', '.join(names)} holds no text ({left_out} other or empty files)")
    return inputs, left_out


def _input(path: Path, name: str) -> Input:
    status = path.stat()
    kind: Literal["text", "jsonl", "jsonl.gz", "parquet"] = "text"
    if path.name.endswith(".jsonl"):
        kind = "jsonl"
    elif path.name.endswith(".jsonl.gz"):
        kind = "jsonl.gz"
    elif path.suffix == ".parquet":
        kind = "parquet"
    elif path.suffix in (".gz", ".zst", ".xz", ".bz2", ".zip"):
        raise ValueError(f"{path}: of compressed files only .jsonl.gz is read; unpack it")
    return Input(path, name, kind, status.st_size, status.st_mtime_ns)


def _begins_as_text(path: Path) -> bool:
    with open(path, "rb") as file:
        begin = file.read(_WINDOW)
    try:
        begin.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(begin) == _WINDOW and error.start > _WINDOW - 4  # a character cut off by the window
    return b"\0" not in begin


def split_of(name: str, number: int, val_fraction: float) -> Split:
    """The side that a document falls on: by a hash of its file's name and its number (of a byte or row) there."""
    digest = hashlib.blake2b(f"{name}\0{number}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") < val_fraction * 2**64 else "train"


# ---- cutting ----


def cut(
    inputs: Sequence[Input], column: str, val_fraction: float, begin: tuple[int, int] = (0, 0)
) -> Iterator[tuple[Piece, tuple[int, int]]]:
    """The pieces of a corpus from a place on, each with the place that comes after it: a file's number and where there.

    A text among others is on the side that its name's hash says; of texts alone at least one validates; of a
    single one the end does. ValueError for a file that can't be read.
    """
    texts = all(source.kind == "text" for source in inputs)
    held_out = _held_out(inputs, val_fraction) if texts and len(inputs) > 1 else set()
    for number in range(begin[0], len(inputs)):
        source, at = inputs[number], begin[1] if number == begin[0] else 0
        if source.kind == "text":
            spans: list[tuple[int, Split]] = [(source.size, split_of(source.name, 0, val_fraction))]
            if texts and len(inputs) == 1:
                with open(source.path, "rb") as file:
                    middle = _text_cut(file, int(source.size * (1 - val_fraction)), source.size)
                spans = [(middle, "train"), (source.size, "val")]
            elif texts:
                spans = [(source.size, "val" if source.name in held_out else "train")]
            pieces = _cut_text(source, at, spans)
        elif source.kind == "jsonl":
            pieces = _cut_lines(source, at)
        elif source.kind == "jsonl.gz":
            pieces = _unpack_lines(source, at)
        else:
            pieces = _cut_rows(source, at, column)
        for piece in pieces:
            yield piece, (number, piece.end)


def _held_out(inputs: Sequence[Input], val_fraction: float) -> set[str]:
    def rank(name: str) -> tuple[int, str]:
        return zlib.crc32(name.encode("utf-8", "surrogatepass")), name

    ranked = sorted((source.name for source in inputs), key=rank)
    return set(ranked[: max(1, int(len(ranked) * val_fraction))])


def _cut_text(source: Input, at: int, spans: Sequence[tuple[int, Split]]) -> Iterator[Piece]:
    with open(source.path, "rb") as file:
        for end, split in spans:
            while at < end:
                stop = _text_cut(file, at + PIECE, end)
                yield Piece(source, at, stop, stop, split, last=stop == end)
                at = stop


# Where GPT-2's splitting of text into words ends a word whatever lies further left and right: before a line break
# with something visible on both sides, and before a space between two letters.
_BREAK = re.compile(rb"(?<=[^\s])\n(?=[^\s])|(?<=[A-Za-z]) (?=[A-Za-z])")
_CHARACTER = 4  # bytes, at most


def _text_cut(file: BinaryIO, at: int, end: int) -> int:
    """The first place from `at` on where a text can be cut, so that its parts' tokens are the whole's."""
    while at < end:
        begin = max(0, at - _CHARACTER)
        file.seek(begin)
        window = file.read(_WINDOW)
        for match in _BREAK.finditer(window, at - begin):
            i = match.start()
            if i + 1 + _CHARACTER > len(window) and begin + len(window) < end:
                break
            before = window[max(0, i - _CHARACTER) : i].decode("utf-8", "replace")
            after = window[i + 1 : i + 1 + _CHARACTER].decode("utf-8", "replace")
            if begin + i >= end:
                return end
            if not before[-1].isspace() and not after[0].isspace():  # of the many in Unicode, too
                return begin + i
        if begin + len(window) >= end:
            return end
        at = begin + len(window) - _CHARACTER
    return end


def _cut_lines(source: Input, at: int) -> Iterator[Piece]:
    with open(source.path, "rb") as file:
        while at < source.size:
            stop = _line_cut(file, at + PIECE, source.size)
            yield Piece(source, at, stop, stop)
            at = stop


def _line_cut(file: BinaryIO, at: int, end: int) -> int:
    """The first place from `at` on where a line begins."""
    at -= 1
    while at < end:
        file.seek(at)
        window = file.read(_WINDOW)
        if (found := window.find(b"\n")) >= 0:
            return min(end, at + found + 1)
        at += len(window) or 1
    return end


def _unpack_lines(source: Input, at: int) -> Iterator[Piece]:
    try:
        with open(source.path, "rb") as packed, gzip.open(packed) as file:
            file.seek(at)
            while content := file.read(PIECE):
                content += file.readline()
                yield Piece(source, at, at + len(content), packed.tell(), content=content)
                at += len(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{source.path}: not a whole gzip file: {error}") from None


def _cut_rows(source: Input, at: int, column: str) -> Iterator[Piece]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{source.path}: parquet needs pyarrow: pip install 'mlxgpt[parquet]'") from None
    try:
        with ParquetFile(source.path, memory_map=True) as file:
            if column not in file.schema_arrow.names:
                there = ", ".join(file.schema_arrow.names)
                raise ValueError(
                    f"{source.path}: it has no column {column!r} (there are {there}); name one with --field"
                )
            first = 0  # row of a group
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first + rows > at:
                    yield from _rows_of_group(source, file, group, column, first, at)
                first += rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{source.path}: not a parquet file that can be read: {error}") from None


def _rows_of_group(source: Input, file: Any, group: int, column: str, first: int, at: int) -> Iterator[Piece]:
    """A row group's rows from number `at` on, `first` being its first's."""
    n_rows, begin, size = file.metadata.num_rows, max(at, first), 0
    rows: list[Any] = []
    for batch in file.iter_batches(64, row_groups=[group], columns=[column]):
        for text in batch.column(0).to_pylist():
            if first >= begin:
                rows.append(text)
                size += len(text) if isinstance(text, str) else 1
            first += 1
        if size >= PIECE:
            yield Piece(source, first - len(rows), first, source.size * first // n_rows, content=rows)
            rows, size = [], 0
    if rows:
        yield Piece(source, first - len(rows), first, source.size * first // n_rows, content=rows)


# ---- reading and encoding ----


def documents(piece: Piece, column: str) -> Iterator[tuple[Split | None, int, str]]:
    """A piece's documents that hold text: their side if they have one, number, and text.

    ValueError names the file and the line, or the row, that is not as it should be.
    """
    if isinstance(piece.content, list):
        for row, text in enumerate(piece.content, piece.begin):
            if not isinstance(text, str):
                what = "null" if text is None else type(text).__name__
                raise ValueError(f"{piece.source.path}: {column} of row {row} is {what}, expected text")
            if text:
                yield None, row, text
        return
    content = _read(piece) if piece.content is None else piece.content
    if piece.source.kind == "text":
        try:
            yield piece.split, 0, content.decode("utf-8")
        except UnicodeDecodeError as error:
            line, byte = _line(piece, error.start), content[error.start]
            raise ValueError(f"{piece.source.path}: line {line} is not UTF-8 text (byte {byte:#04x})") from None
        return
    at = 0
    for record in content.split(b"\n"):
        if record.strip():
            try:
                if text := _field(record, column):
                    yield None, piece.begin + at, text
            except ValueError as error:
                raise ValueError(f"{piece.source.path}: line {_line(piece, at)} {error}") from None
        at += len(record) + 1


def _field(line: bytes, column: str) -> str:
    """The text in a line of JSONL. ValueError says what is wrong with it."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {line[error.start]:#04x})") from None
    except RecursionError:
        raise ValueError("is not JSON that can be read: it is nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError(f"is a JSON {type(record).__name__}, expected an object with the field {column!r}")
    if column not in record:
        raise ValueError(f"has no field {column!r} (there are {', '.join(record)}); name one with --field")
    if not isinstance(record[column], str):
        raise ValueError(f"has {json.dumps(record[column])[:40]} as its field {column!r}, expected text")
    return record[column]  # type: ignore[no-any-return]


def _read(piece: Piece) -> bytes:
    with open(piece.source.path, "rb") as file:
        file.seek(piece.begin)
        return file.read(piece.end - piece.begin)


def _line(piece: Piece, at: int) -> int:
    """The number of the line in which a byte of the piece lies. Read from the file's beginning: once, for an error."""
    left, count = piece.begin + at, 1
    packed = piece.source.kind == "jsonl.gz"
    with gzip.open(piece.source.path) if packed else open(piece.source.path, "rb") as file:
        while left and (block := file.read(min(left, PIECE))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def characters(pieces: Iterable[Piece], column: str) -> set[str]:
    """Those that occur."""
    return set().union(*(set(text) for piece in pieces for _, _, text in documents(piece, column)))


def encode(pieces: Iterable[Piece], tokenizer: Tokenizer, column: str, val_fraction: float) -> Encoded:
    """The tokens of some pieces, in their order. ValueError as `documents`, and for what has no token."""
    kind = dtype_of(tokenizer.vocab_size)
    end = [] if tokenizer.end_of_text is None else [np.array([tokenizer.end_of_text], kind)]
    parts: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
    result = Encoded({})
    for piece in pieces:
        for given, number, text in documents(piece, column):
            split = given or split_of(piece.source.name, number, val_fraction)
            try:
                tokens = tokenizer.encode(text)
            except ValueError as error:
                raise ValueError(f"{piece.source.path}: {error}") from None
            parts[split].append(tokens.astype(kind))
            if piece.last:
                parts[split] += end
                result.documents[split] += 1
            result.text_bytes += len(text.encode("utf-8", "surrogatepass"))
    result.tokens = {split: np.concatenate([np.empty(0, kind), *parts[split]]) for split in SPLITS}
    result.largest = max(int(tokens.max(initial=0)) for tokens in result.tokens.values())
    return result
