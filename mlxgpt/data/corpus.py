"""Text to train on: corpora split into training and validation documents, and windows drawn from them."""

from __future__ import annotations

import glob
import math
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and others to validate with."""

    name: str
    train: list[str]
    val: list[str]
    skipped: int = 0  # files of a directory or glob that hold no UTF-8 text
    one_text: bool = False  # train and val are the beginning and the end of a single document

    def documents(self, split: Literal["train", "val", "all"]) -> list[str]:
        """Those to train on, those to validate with, or all, a single one in one piece again."""
        if split == "all":
            return ["".join(self.train + self.val)] if self.one_text else self.train + self.val
        return self.train if split == "train" else self.val


def load_corpus(data: str) -> Corpus:
    """The corpus that --data names: `stdlib`, `shakespeare`, a file, a directory or a glob.

    Of several files about a tenth validate, chosen by their names; of a single one, its last tenth.
    FileNotFoundError, ValueError naming what is missing, empty or not text.
    """
    if data == "stdlib":
        return _split("stdlib", *_stdlib())
    if data == "shakespeare":
        return _split("shakespeare", {"shakespeare": _read_text(_download_shakespeare())})
    if not data:
        raise ValueError("data: the name is empty, expected a file, a directory, a glob, stdlib or shakespeare")
    path = Path(data).expanduser()
    if path.is_file():
        return _split(path.stem, {path.name: _read_text(path)})
    if path.is_dir():
        paths = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    elif path.exists():
        raise ValueError(f"data: {data} is neither a regular file nor a directory")
    else:
        paths = [Path(p) for p in glob.glob(str(path), recursive=True)]
        if not paths:
            raise FileNotFoundError(f"data: there is no file or directory {data}, and as a glob it matches nothing")
    documents, skipped = {}, 0
    for file in sorted(p for p in paths if p.is_file()):
        try:
            documents[file.relative_to(path).as_posix() if path.is_dir() else file.as_posix()] = _read_text(file)
        except ValueError:  # empty, or not text
            skipped += 1
    if not documents:
        raise ValueError(f"data: {data} holds no UTF-8 text ({skipped} other or empty files)")
    return _split(path.name if path.is_dir() else "corpus", documents, skipped)


def _split(name: str, documents: dict[str, str], skipped: int = 0) -> Corpus:
    if len(documents) == 1:
        (text,) = documents.values()
        cut = len(text) * 9 // 10
        return Corpus(name, [text[:cut]], [text[cut:]], skipped, one_text=True)
    # By a hash of the name, so that a file stays on its side when others come or go.
    ranked = sorted(documents, key=lambda n: (zlib.crc32(n.encode("utf-8", "surrogatepass")), n))
    held_out = set(ranked[: max(1, len(ranked) // 10)])
    train = [text for n, text in documents.items() if n not in held_out]
    return Corpus(name, train, [text for n, text in documents.items() if n in held_out], skipped)


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    if not content:
        raise ValueError(f"data: {path} is empty")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: {path} is not UTF-8 text (byte {error.start} is {content[error.start]:#04x})"
        ) from None


def _stdlib() -> tuple[dict[str, str], int]:
    """The standard library's pure-ASCII Python files, its tests left out: 11 MB, 96 distinct characters."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
    documents, skipped = {}, 0
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if left_out.isdisjoint(name.parts):
            content = path.read_bytes()
            if content.isascii() and content:
                documents[name.as_posix()] = content.decode("ascii")
            else:
                skipped += 1
    if not documents:
        raise FileNotFoundError(
            f"data: this Python's standard library has no source in {root}; name a text with --data"
        )
    return documents, skipped


def _download_shakespeare() -> Path:
    import pooch

    pooch.get_logger().setLevel("ERROR")
    try:
        return Path(
            pooch.retrieve(SHAKESPEARE_URL, f"sha256:{SHAKESPEARE_SHA256}", "shakespeare.txt", pooch.os_cache("mlxgpt"))
        )
    except (OSError, ValueError) as error:
        reason = "its checksum is wrong" if isinstance(error, ValueError) else "no connection"
        raise ConnectionError(
            f"data: can't download shakespeare ({reason}); give a text file of your own with --data FILE"
        ) from None


class _Encoder(Protocol):
    vocab_size: int
    end_of_text: int | None

    def encode(self, text: str) -> np.ndarray: ...


def encode(tokenizer: _Encoder, documents: Sequence[str]) -> np.ndarray:
    """The documents' tokens one after another, each closed by end-of-text where the tokenizer has one.

    An array (n,) of the smallest unsigned type that holds the vocabulary.
    """
    kind = np.uint8 if tokenizer.vocab_size <= 2**8 else np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = [] if tokenizer.end_of_text is None else [np.array([tokenizer.end_of_text], kind)]
    return np.concatenate([part for text in documents for part in (tokenizer.encode(text).astype(kind), *end)])


class Batches:
    """Windows of some shards, in a seeded order without replacement: each epoch sees nearly every token once.

    A window's number alone says which it is, so that no state is to be saved, and whoever draws other numbers draws
    other windows. They lie side by side in a shard and never cross its end; each epoch has an order of its own and
    begins at other offsets in the shards, so that it cuts the text at other places. Nothing is held but the shards.
    """

    def __init__(self, shards: Sequence[np.ndarray], block_size: int, seed: int, name: str, vocab_size: int) -> None:
        """shards: arrays (n,) of uint8, uint16 or uint32, which may be memory-mapped: only windows are read.

        ValueError if none holds block_size + 1 tokens; the name is for that.
        """
        for shard in shards:
            if shard.ndim != 1 or shard.dtype.kind != "u" or shard.dtype.itemsize > 4:
                raise ValueError(
                    f"data: a {name} shard is {shard.dtype} {shard.shape}, expected (n,) of uint8, uint16 or uint32"
                )
        lengths = np.array([len(shard) for shard in shards], np.int64)
        if (longest := lengths.max(initial=0)) <= block_size:
            text = "text" if len(shards) == 1 else "text's longest shard"
            raise ValueError(
                f"data: the {name} {text} has {longest} tokens, fewer than block_size + 1 = {block_size + 1}"
            )
        self.block_size, self.vocab_size = block_size, vocab_size
        self._key = _hash(np.full(1, seed, np.uint64))
        self._names = [getattr(shard, "filename", None) or f"{name} shard {n}" for n, shard in enumerate(shards)]
        self._shards = [np.asarray(shard) for shard in shards]  # a memmap's own indexing is slow
        windows = np.where(lengths > block_size, np.maximum(1, lengths // block_size - 1), 0)
        self._ends = np.cumsum(windows)
        self._begins = self._ends - windows
        self._offsets = np.maximum(1, lengths - windows * block_size).astype(np.uint64)  # room for the last target
        self.per_epoch = int(self._ends[-1])

    def draw(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows first, first + 1, ... of the endless order, `count` of them.

        Inputs (count, T) and, each shifted by one token, targets (count, T), int32.
        ValueError names the shard and position of an id that the vocabulary doesn't have.
        """
        epochs, places = np.divmod(np.arange(first, first + count), self.per_epoch)  # (count,)
        keys = _hash(self._key + epochs.view(np.uint64))
        windows = permuted(places, self.per_epoch, keys)
        shards = np.searchsorted(self._ends, windows, "right")
        offsets = _round(shards.view(np.uint64), keys) % self._offsets[shards]
        starts = offsets.view(np.int64) + (windows - self._begins[shards]) * self.block_size
        tokens = np.empty((count, self.block_size + 1), np.int32)  # (count, T + 1)
        for row, shard, start in zip(tokens, shards.tolist(), starts.tolist(), strict=True):
            row[:] = self._shards[shard][start : start + self.block_size + 1]
        unsigned = tokens.view(np.uint32)
        if unsigned.max(initial=0) >= self.vocab_size:
            row, column = np.argwhere(unsigned >= self.vocab_size)[0]
            raise ValueError(
                f"{self._names[shards[row]]}: token {starts[row] + column} is id {unsigned[row, column]}, "
                f"expected less than vocab_size = {self.vocab_size}"
            )
        return tokens[:, :-1], tokens[:, 1:]


def permuted(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where permutations of 0 .. size - 1, each given by its key, take some places, in no memory but theirs.

    places (n,) int64 below size, keys (n,) uint64; -> (n,) int64. A Feistel network over pairs of digits in mixed
    radix, walked on from what is not below size (Black and Rogaway 2002, Ciphers with arbitrary finite domains).
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    a, b = np.uint64(rows), np.uint64(columns)
    left, right = np.divmod(places.view(np.uint64), b)
    round_keys = keys ^ _ROUNDS  # (rounds, n)
    for n in range(0, len(_ROUNDS), 2):
        left = (left + _round(right, round_keys[n])) % a
        right = (right + _round(left, round_keys[n + 1])) % b
    x = left * b + right
    if (outside := x >= size).any():
        x[outside] = permuted(x[outside], size, keys[outside])
    return x.view(np.int64)


def _round(x: np.ndarray, key: np.ndarray) -> np.ndarray:
    """32 bits of a number and a key, in few steps, for there are several rounds."""
    x = (x ^ key) * _MULTIPLIERS[0]
    return ((x ^ (x >> _HALF)) * _MULTIPLIERS[1]) >> _HALF


_ROUNDS = np.arange(1, 7, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
_HALF = np.uint64(32)


def _hash(x: np.ndarray) -> np.ndarray:
    """64 well-mixed bits of 64 (splitmix64's finalizer: Steele, Lea, Flood 2014, Fast splittable generators)."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIERS[0]
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIERS[1]
    return x ^ (x >> np.uint64(31))


Drawn = TypeVar("Drawn")


class Ahead(Generic[Drawn]):
    """A function of a number, called ahead of time: while n is used, a thread draws n + 1.

    What it raises is raised by the call that asks for that number. A number that is not the next is drawn at once.
    """

    def __init__(self, draw: Callable[[int], Drawn]) -> None:
        self._draw, self._thread = draw, ThreadPoolExecutor(1, "ahead")
        self._number, self._next = -1, Future[Drawn]()

    def __call__(self, number: int) -> Drawn:
        ahead = self._next if number == self._number else self._thread.submit(self._draw, number)
        self._number = -1  # until it is known that this one can be drawn
        drawn = ahead.result()
        self._number, self._next = number + 1, self._thread.submit(self._draw, number + 1)
        return drawn
