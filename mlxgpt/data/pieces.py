"""Input files of any size - text, JSONL, parquet - cut into small pieces, and the tokens of a piece.

The cutter only finds byte ranges in a plain file; the workers read them. Compressed JSONL and parquet can only be read
from the beginning: there the cutter reads, and a piece carries its content. Where the pieces end depends on the input
alone, and so do the tokens.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from .corpus import validation_names
from .shards import SPLITS, Split, dtype_of
from .tokenizer import Tokenizer

PIECE_BYTES = 1 << 20  # of text in a piece, or a little more
SCAN_BYTES = 1 << 16  # read at a time to find a place to cut

Kind = Literal["text", "jsonl", "jsonl.gz", "parquet"]
Place = tuple[int, int]  # a file's number among the inputs, and the position in it: in bytes of text, or in rows


@dataclass(frozen=True)
class InputFile:
    """A file of the text to be prepared."""

    path: Path
    name: str  # the path below the folder that all inputs have in common
    kind: Kind
    size: int  # in bytes
    changed: int  # when it was changed last: st_mtime_ns


@dataclass(frozen=True)
class FilePiece:
    """Some documents of a file, or a part of one document."""

    source: InputFile
    begin: int  # in bytes of text, or in rows
    end: int
    file_done: int  # the bytes of the file up to the piece's end, for a progress bar
    split: Split | None = None  # of a text file; in other files each document has its own
    ends_document: bool = True
    content: bytes | list[Any] | None = None  # None: the worker reads it from the file


@dataclass
class Encoded:
    """The tokens of some pieces, and counts."""

    tokens: dict[Split, np.ndarray]  # (n,), of the type of the shards
    documents: dict[Split, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: int = 0
    largest_id: int = 0


def find_inputs(names: Sequence[str]) -> tuple[list[InputFile], int]:
    """The files that paths, directories and globs name, sorted by path, and how many were left out.

    A file in a directory or glob is left out if it is empty or does not begin as UTF-8 text; hidden files are ignored.
    FileNotFoundError for a name without a file; ValueError if a file is empty that is named itself, or if no file is
    left.
    """
    paths: dict[Path, bool] = {}  # path -> whether it is named itself
    for name in names:
        path = Path(name).expanduser()
        if path.is_file():
            paths[path.resolve()] = True
            continue
        found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        given = len(path.parts) if path.is_dir() else 0  # parts of the path that may be hidden: the name gives them
        files = [p for p in found if p.is_file() and not any(map(_is_hidden, p.parts[given:]))]
        if not files and not path.is_dir():
            raise FileNotFoundError(f"input: there is no file or directory {name}, and as a glob it matches no file")
        for file in files:
            paths.setdefault(file.resolve(), False)
    inputs, left_out = [], 0
    parent = Path(os.path.commonpath([p.parent for p in paths])) if paths else Path()
    for path, named in sorted(paths.items()):
        source = _input_file(path, path.relative_to(parent).as_posix())
        if source.size == 0 and named:
            raise ValueError(f"{path}: it is empty")
        if source.size == 0 or (source.kind == "text" and not named and not _begins_as_text(path)):
            left_out += 1
        else:
            inputs.append(source)
    if not inputs:
        raise ValueError(f"input: {', '.join(names)} holds no text ({left_out} other or empty files)")
    return inputs, left_out


def _is_hidden(part: str) -> bool:
    return part.startswith(".") and part != ".."


def _input_file(path: Path, name: str) -> InputFile:
    status = path.stat()
    kind: Kind = "text"
    if path.name.endswith(".jsonl"):
        kind = "jsonl"
    elif path.name.endswith(".jsonl.gz"):
        kind = "jsonl.gz"
    elif path.suffix == ".parquet":
        kind = "parquet"
    elif path.suffix in (".gz", ".zst", ".xz", ".bz2", ".zip"):
        raise ValueError(f"{path}: of compressed files only .jsonl.gz is read; unpack it")
    return InputFile(path, name, kind, status.st_size, status.st_mtime_ns)


def _begins_as_text(path: Path) -> bool:
    with open(path, "rb") as file:
        begin = file.read(SCAN_BYTES)
    try:
        begin.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(begin) == SCAN_BYTES and error.start > SCAN_BYTES - _CHARACTER  # the last character is cut off
    return b"\0" not in begin


def split_of(name: str, position: int, val_fraction: float) -> Split:
    """The split of a document. A hash chooses: of its file's name and its position there, in bytes or rows."""
    digest = hashlib.blake2b(f"{name}\0{position}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") < val_fraction * 2**64 else "train"


# ---- cutting ----


def cut(
    inputs: Sequence[InputFile], field: str, val_fraction: float, begin: Place = (0, 0)
) -> Iterator[tuple[FilePiece, Place]]:
    """The pieces of all inputs from a place on, each with the place after it.

    Held out for validation are: the end of a single text file; of several text files, and no others, at least one; of
    text files beside others, those that a hash of their names chooses. ValueError for a file that can't be read.
    """
    texts = all(source.kind == "text" for source in inputs)
    held_out = validation_names((source.name for source in inputs), int(len(inputs) * val_fraction))
    for number in range(begin[0], len(inputs)):
        source, at = inputs[number], begin[1] if number == begin[0] else 0
        if source.kind == "text":
            spans: list[tuple[int, Split]] = [(source.size, split_of(source.name, 0, val_fraction))]
            if texts and len(inputs) == 1:
                with open(source.path, "rb") as file:
                    middle = text_cut(file, int(source.size * (1 - val_fraction)), source.size)
                spans = [(middle, "train"), (source.size, "val")]
            elif texts:
                spans = [(source.size, "val" if source.name in held_out else "train")]
            pieces = cut_text(source, at, spans)
        elif source.kind == "jsonl":
            pieces = _cut_lines(source, at)
        elif source.kind == "jsonl.gz":
            pieces = _unpack_lines(source, at)
        else:
            pieces = _cut_rows(source, at, field)
        for piece in pieces:
            yield piece, (number, piece.end)


def cut_text(source: InputFile, at: int, spans: Sequence[tuple[int, Split]]) -> Iterator[FilePiece]:
    """The pieces of a text file from a byte on. spans: where each split of the file ends, and which split it is."""
    with open(source.path, "rb") as file:
        for end, split in spans:
            while at < end:
                stop = text_cut(file, at + PIECE_BYTES, end)
                yield FilePiece(source, at, stop, stop, split, ends_document=stop == end)
                at = stop


# Places where GPT-2's splitting of text ends a word, whatever stands further left and right: before a line break
# between two visible characters, and before a space between two letters.
_BREAK = re.compile(rb"(?<=[^\s])\n(?=[^\s])|(?<=[A-Za-z]) (?=[A-Za-z])")
_CHARACTER = 4  # bytes of a UTF-8 character, at most


def text_cut(file: BinaryIO, at: int, end: int) -> int:
    """The first byte from `at` on where a text can be cut such that the tokens of both parts are those of the whole."""
    while at < end:
        begin = max(0, at - _CHARACTER)
        file.seek(begin)
        window = file.read(SCAN_BYTES)
        for match in _BREAK.finditer(window, at - begin):
            i = match.start()
            if i + 1 + _CHARACTER > len(window) and begin + len(window) < end:
                break
            before = window[max(0, i - _CHARACTER) : i].decode("utf-8", "replace")
            after = window[i + 1 : i + 1 + _CHARACTER].decode("utf-8", "replace")
            if begin + i >= end:
                return end
            if not before[-1].isspace() and not after[0].isspace():  # Unicode has more spaces than _BREAK knows
                return begin + i
        if begin + len(window) >= end:
            return end
        at = begin + len(window) - _CHARACTER
    return end


def _cut_lines(source: InputFile, at: int) -> Iterator[FilePiece]:
    with open(source.path, "rb") as file:
        while at < source.size:
            stop = _line_cut(file, at + PIECE_BYTES, source.size)
            yield FilePiece(source, at, stop, stop)
            at = stop


def _line_cut(file: BinaryIO, at: int, end: int) -> int:
    """The first byte from `at` on where a line begins."""
    at -= 1
    while at < end:
        file.seek(at)
        window = file.read(SCAN_BYTES)
        if (found := window.find(b"\n")) >= 0:
            return min(end, at + found + 1)
        at += len(window) or 1
    return end


def _unpack_lines(source: InputFile, at: int) -> Iterator[FilePiece]:
    try:
        with open(source.path, "rb") as packed, gzip.open(packed) as file:
            file.seek(at)
            while content := file.read(PIECE_BYTES):
                content += file.readline()
                yield FilePiece(source, at, at + len(content), packed.tell(), content=content)
                at += len(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{source.path}: not a whole gzip file: {error}") from None


def _cut_rows(source: InputFile, at: int, field: str) -> Iterator[FilePiece]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{source.path}: parquet needs pyarrow: pip install 'mlxgpt[parquet]'") from None
    try:
        with ParquetFile(source.path, memory_map=True) as file:
            if field not in file.schema_arrow.names:
                there = ", ".join(file.schema_arrow.names)
                raise ValueError(
                    f"{source.path}: it has no column {field!r} (there are {there}); name one with --field"
                )
            first = 0  # the row that a group begins with
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first + rows > at:
                    yield from _rows_of_group(source, file, group, field, first, at)
                first += rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{source.path}: not a parquet file that can be read: {error}") from None


def _rows_of_group(source: InputFile, file: Any, group: int, field: str, first: int, at: int) -> Iterator[FilePiece]:
    """The pieces of a row group from row `at` of the file on. first: the number of the group's first row."""
    n_rows, begin, size = file.metadata.num_rows, max(at, first), 0
    rows: list[Any] = []
    for batch in file.iter_batches(64, row_groups=[group], columns=[field]):
        for text in batch.column(0).to_pylist():
            if first >= begin:
                rows.append(text)
                size += len(text) if isinstance(text, str) else 1
            first += 1
        if size >= PIECE_BYTES:
            yield FilePiece(source, first - len(rows), first, source.size * first // n_rows, content=rows)
            rows, size = [], 0
    if rows:
        yield FilePiece(source, first - len(rows), first, source.size * first // n_rows, content=rows)


# ---- reading and encoding ----


def documents(piece: FilePiece, field: str) -> Iterator[tuple[Split | None, int, str]]:
    """The documents of a piece that hold text, each as (its split if that is fixed, its position, the text).

    ValueError names the file and the line, or the row, that can't be read.
    """
    if isinstance(piece.content, list):
        for row, text in enumerate(piece.content, piece.begin):
            if not isinstance(text, str):
                what = "null" if text is None else type(text).__name__
                raise ValueError(f"{piece.source.path}: {field} of row {row} is {what}, expected text")
            if text:
                yield None, row, text
        return
    content = _read(piece) if piece.content is None else piece.content
    if piece.source.kind == "text":
        try:
            yield piece.split, 0, content.decode("utf-8")
        except UnicodeDecodeError as error:
            number, byte = _line_number(piece, error.start), content[error.start]
            raise ValueError(f"{piece.source.path}: line {number} is not UTF-8 text (byte {byte:#04x})") from None
        return
    at = 0
    for line in content.split(b"\n"):
        if line.strip():
            try:
                if text := _text_of_line(line, field):
                    yield None, piece.begin + at, text
            except ValueError as error:
                raise ValueError(f"{piece.source.path}: line {_line_number(piece, at)} {error}") from None
        at += len(line) + 1


def _text_of_line(line: bytes, field: str) -> str:
    """The text in a line of JSONL. ValueError says what is wrong with the line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {line[error.start]:#04x})") from None
    except RecursionError:
        raise ValueError("is not JSON that can be read: it is nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError(f"is a JSON {type(record).__name__}, expected an object with the field {field!r}")
    if field not in record:
        raise ValueError(f"has no field {field!r} (there are {', '.join(record)}); name one with --field")
    if not isinstance(record[field], str):
        raise ValueError(f"has {json.dumps(record[field])[:40]} as its field {field!r}, expected text")
    return record[field]  # type: ignore[no-any-return]


def _read(piece: FilePiece) -> bytes:
    with open(piece.source.path, "rb") as file:
        file.seek(piece.begin)
        return file.read(piece.end - piece.begin)


def _line_number(piece: FilePiece, at: int) -> int:
    """The number of the line that holds a byte of the piece. For errors only: it reads the file from its beginning."""
    left, count = piece.begin + at, 1
    compressed = piece.source.kind == "jsonl.gz"
    with gzip.open(piece.source.path) if compressed else open(piece.source.path, "rb") as file:
        while left and (block := file.read(min(left, PIECE_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def characters(pieces: Iterable[FilePiece], field: str) -> set[str]:
    """The characters that occur in some pieces."""
    return set().union(*(set(text) for piece in pieces for _, _, text in documents(piece, field)))


def encode(pieces: Iterable[FilePiece], tokenizer: Tokenizer, field: str, val_fraction: float) -> Encoded:
    """The tokens of some pieces, in their order. ValueError as in `documents`, and for text that has no token."""
    kind = dtype_of(tokenizer.vocab_size)
    end = [] if tokenizer.end_of_text is None else [np.array([tokenizer.end_of_text], kind)]
    parts: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
    result = Encoded({})
    for piece in pieces:
        for fixed, position, text in documents(piece, field):
            split = fixed or split_of(piece.source.name, position, val_fraction)
            try:
                tokens = tokenizer.encode(text)
            except ValueError as error:
                raise ValueError(f"{piece.source.path}: {error}") from None
            parts[split].append(tokens.astype(kind))
            if piece.ends_document:
                parts[split] += end
                result.documents[split] += 1
            result.text_bytes += len(text.encode("utf-8", "surrogatepass"))
    result.tokens = {split: np.concatenate([np.empty(0, kind), *parts[split]]) for split in SPLITS}
    result.largest_id = max(int(tokens.max(initial=0)) for tokens in result.tokens.values())
    return result
