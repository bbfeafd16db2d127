"""Prepared directories: a corpus as shards of token ids, with the tokenizer and a manifest that says what they are.

`train-00000.bin`, `train-00001.bin`, ..., `val-00000.bin`, ... hold nothing but ids, little-endian uint16 or uint32:
one document after another, each followed by end-of-text where the tokenizer has one. The tokenizer's files lie beside
them, as in a model directory. `manifest.json` is written last:

- "format": 1
- "tokenizer": the SHA-256 of each of its files, by name
- "vocab_size", "dtype", "largest_id"
- "train" and "val": the numbers of "documents" and "tokens", and "shards", each with "file", "tokens" and "sha256"
- "documents", "tokens", "text_bytes": the totals
- "made_from": the input files and the settings

Until then `progress.json` stands in its place; preparation.py says what it holds.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ..common import disk
from .tokenizer import Tokenizer, from_files

FORMAT = 1
MANIFEST, PROGRESS = "manifest.json", "progress.json"
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_BLOCK = 1 << 22  # bytes read at a time, to compute a checksum


@dataclass(frozen=True)
class Prepared:
    """A prepared directory, opened."""

    path: Path
    name: str
    tokenizer: Tokenizer
    train: list[np.memmap]  # each (n,), uint16 or uint32
    val: list[np.memmap]
    manifest: Mapping[str, Any]
    fingerprint: str  # SHA-256 of the manifest, which holds the SHA-256 of each shard: the same for the same data

    def check_tokenizer(self, other: Tokenizer, source: str) -> None:
        """ValueError unless `other`, the tokenizer of `source`, gives every id the same meaning."""
        ours = self.tokenizer
        rule = f"expected that of {source}: the shards are of another tokenizer"
        if (ours.vocab_size, ours.end_of_text) != (other.vocab_size, other.end_of_text):
            raise ValueError(
                f"{self.path}: its vocabulary is of {ours.vocab_size} ids with end-of-text {ours.end_of_text}, {rule} "
                f"({other.vocab_size}, {other.end_of_text})"
            )
        for token in range(ours.vocab_size):
            if ours.token_bytes(token) != other.token_bytes(token):
                raise ValueError(
                    f"{self.path}: its token {token} is {ours.token_bytes(token)!r}, {rule} "
                    f"({other.token_bytes(token)!r})"
                )


def is_prepared(path: str | Path) -> bool:
    """Whether a path is a prepared directory, finished or not."""
    path = Path(path).expanduser()
    return any((path / name).is_file() for name in (MANIFEST, PROGRESS))


def dtype_of(vocab_size: int) -> np.dtype:
    """The type of ids in shards, for a vocabulary of this size."""
    return _DTYPES["uint16" if vocab_size <= 2**16 else "uint32"]


def open_prepared(path: str | Path) -> Prepared:
    """Opens a prepared directory and checks everything that can be checked without reading the shards.

    FileNotFoundError for a file that is missing; ValueError in one line for a directory that is still being
    prepared, and for a manifest that contradicts itself, the files or the tokenizer, or has a newer format.
    """
    path = Path(path).expanduser()
    manifest = read_manifest(path)
    files = {}
    for name, sha256 in manifest["tokenizer"].items():
        files[name] = _existing(path / name).read_bytes()
        if (found := hashlib.sha256(files[name]).hexdigest()) != sha256:
            raise ValueError(
                f"{path / name}: its SHA-256 is {found}, expected {sha256}: the shards are of another tokenizer"
            )
    tokenizer = from_files(files, str(path))
    if (size := tokenizer.vocab_size) != manifest["vocab_size"]:
        raise ValueError(f"{path / MANIFEST}: vocab_size is {manifest['vocab_size']}, expected {size}, the tokenizer's")
    dtype = _DTYPES[manifest["dtype"]]
    maps: dict[Split, list[np.memmap]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for shard in manifest[split]["shards"]:
            file, expected = path / shard["file"], shard["tokens"] * dtype.itemsize
            if (size := _existing(file).stat().st_size) != expected:
                raise ValueError(
                    f"{file}: it has {size} bytes, expected {expected} of {shard['tokens']} {manifest['dtype']} tokens"
                )
            maps[split].append(open_shard(file, dtype))
    fingerprint = disk.sha256(path / MANIFEST)
    return Prepared(path, path.resolve().name, tokenizer, maps["train"], maps["val"], manifest, fingerprint)


def open_shard(file: Path, dtype: np.dtype) -> np.memmap:
    """A shard (n,), memory-mapped. Reading ahead is off: for windows at random places it reads far too much."""
    shard = np.memmap(file, dtype, "r")
    shard._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return shard


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a prepared directory, checked for contradictions in itself. Errors as in `open_prepared`."""
    file = path / MANIFEST
    if not file.is_file() and (path / PROGRESS).is_file():
        progress = disk.read_json(path / PROGRESS)
        done, total = progress.get("input_done", 0), progress.get("input_total", 0)
        raise ValueError(
            f"{path}: it is still being prepared ({done / 1e6:,.1f} of {total / 1e6:,.1f} MB are done): "
            "wait, or run the same command again to continue"
        )
    manifest = disk.read_json(_existing(file))
    if (version := manifest.get("format")) != FORMAT:
        newer = "; a newer mlxgpt wrote it" if isinstance(version, int) and version > FORMAT else ""
        raise ValueError(f"{file}: format is {version!r}, expected {FORMAT}{newer}")
    try:
        _check(manifest, file)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file}: not a manifest of shards: {reason}") from None
    return manifest


def _check(manifest: dict[str, Any], file: Path) -> None:
    def require(rule: bool, name: str, value: object, expected: str) -> None:
        if not rule:
            raise ValueError(f"{file}: {name} is {value!r}, expected {expected}")

    vocab_size, dtype, largest = manifest["vocab_size"], manifest["dtype"], manifest["largest_id"]
    require(_is_count(vocab_size) and vocab_size > 0, "vocab_size", vocab_size, "a whole number above 0")
    require(dtype in _DTYPES, "dtype", dtype, " or ".join(_DTYPES))
    most = np.iinfo(_DTYPES[dtype]).max + 1
    require(vocab_size <= most, "vocab_size", vocab_size, f"at most {most}, which {dtype} holds")
    require(_is_count(largest) and largest < vocab_size, "largest_id", largest, f"less than vocab_size = {vocab_size}")
    for name, sha256 in manifest["tokenizer"].items():
        require(_is_plain(name) and isinstance(sha256, str), "a file of the tokenizer", name, "a name and its SHA-256")
    names = set()
    for split in SPLITS:
        shards = manifest[split]["shards"]
        require(isinstance(shards, list) and bool(shards), f"{split}'s shards", shards, "a list of at least one")
        for shard in shards:
            name, tokens = shard["file"], shard["tokens"]
            require(_is_plain(name) and name not in names, "a shard's file", name, "the name of a file, each once")
            require(_is_count(tokens) and tokens > 0, f"{name}'s tokens", tokens, "a whole number above 0")
            require(isinstance(shard["sha256"], str), f"{name}'s sha256", shard["sha256"], "64 hexadecimal digits")
            names.add(name)
        found, tokens = sum(shard["tokens"] for shard in shards), manifest[split]["tokens"]
        require(tokens == found, f"{split}'s tokens", tokens, f"{found}, the sum of its shards'")
    for name in ("tokens", "documents"):
        total = sum(manifest[split][name] for split in SPLITS)
        require(manifest[name] == total, name, manifest[name], f"{total}, the sum of train's and val's")


def verify(path: str | Path, done: Callable[[int], None] = lambda n: None) -> Prepared:
    """Opens a prepared directory and reads all shards, to check each SHA-256 and the largest id.

    `done` is called with the number of bytes that were read since the last call. Errors as in `open_prepared`, and
    ValueError for a shard that has changed.
    """
    prepared = open_prepared(path)
    manifest, largest = prepared.manifest, 0
    for split in SPLITS:
        for shard in manifest[split]["shards"]:
            file, sha256 = prepared.path / shard["file"], hashlib.sha256()
            with open(file, "rb") as content:
                while block := content.read(_BLOCK):
                    sha256.update(block)
                    largest = max(largest, int(np.frombuffer(block, _DTYPES[manifest["dtype"]]).max()))
                    done(len(block))
            if sha256.hexdigest() != shard["sha256"]:
                raise ValueError(f"{file}: its SHA-256 is {sha256.hexdigest()}, expected {shard['sha256']}")
    if largest != manifest["largest_id"]:
        file = prepared.path / MANIFEST
        raise ValueError(
            f"{file}: largest_id is {manifest['largest_id']}, expected {largest}, the largest in the shards"
        )
    return prepared


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    return file


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\\" not in name


class ShardWriter:
    """Writes the shards of one split, each of `shard_tokens` ids but the last; it can continue after an interruption.

    It continues from a state that `commit` returned: what the state counts is on the disk, and what was written later
    is written anew.
    """

    def __init__(self, path: Path, split: Split, dtype: np.dtype, shard_tokens: int, state: Mapping[str, Any]) -> None:
        """state: what `commit` returned, or `nothing()`. ValueError if the shards hold fewer tokens than it says."""
        self._path, self._split, self._dtype, self._shard_tokens = path, split, dtype, shard_tokens
        self._closed: list[dict[str, Any]] = list(state["shards"])
        self._tokens, self._sha256 = int(state["open_tokens"]), hashlib.sha256()
        self._out: FileIO | None = None
        held = {shard["file"]: shard["tokens"] for shard in self._closed}
        if self._tokens:
            held[self._file.name] = self._tokens
        for name, tokens in held.items():
            if (size := _existing(path / name).stat().st_size) < tokens * dtype.itemsize:
                raise ValueError(
                    f"{path / name}: it has {size} bytes, expected at least {tokens * dtype.itemsize}: "
                    f"remove {path} and start again"
                )
        for file in path.glob(f"{split}-*.bin"):
            if file.name not in held:
                file.unlink()
        if self._tokens:
            self._out = FileIO(self._file, "r+")
            left = self._tokens * dtype.itemsize
            while left:
                block = self._out.read(min(left, _BLOCK))
                self._sha256.update(block)
                left -= len(block)
            self._out.truncate()

    @staticmethod
    def nothing() -> dict[str, Any]:
        """The state before anything is written."""
        return {"shards": [], "open_tokens": 0}

    @property
    def _file(self) -> Path:
        """The shard that is being written, or is to be written next."""
        return self._path / f"{self._split}-{len(self._closed):05d}.bin"

    def write(self, tokens: np.ndarray) -> None:
        """Appends ids (n,), of the type of the shards. OSError names the shard."""
        while len(tokens):
            part = tokens[: self._shard_tokens - self._tokens]
            try:
                self._out = self._out or FileIO(self._file, "w")
                left = memoryview(part).cast("B")  # type: ignore[arg-type]
                while left:
                    left = left[self._out.write(left) :]
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._file)) from None
            self._sha256.update(part)  # type: ignore[arg-type]
            self._tokens += len(part)
            tokens = tokens[len(part) :]
            if self._tokens == self._shard_tokens:
                self._close_shard()

    def commit(self) -> dict[str, Any]:
        """Syncs everything to the disk -> the state to continue from."""
        if self._out:
            os.fsync(self._out.fileno())
        return {"shards": list(self._closed), "open_tokens": self._tokens}

    def finish(self) -> list[dict[str, Any]]:
        """Closes the last shard -> an entry of the manifest for each shard."""
        if self._tokens:
            self._close_shard()
        return self._closed

    def close(self) -> None:
        """Closes the open file; what it holds stays."""
        if self._out:
            self._out.close()
            self._out = None

    def _close_shard(self) -> None:
        self.commit()
        self.close()
        entry = {"file": self._file.name, "tokens": self._tokens, "sha256": self._sha256.hexdigest()}
        self._closed.append(entry)
        self._tokens, self._sha256 = 0, hashlib.sha256()
