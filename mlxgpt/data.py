"""Text to train on: corpora split into training and validation documents, and batches drawn from them."""

from __future__ import annotations

import glob
import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

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
    """Random windows of a token array: the seed and a batch's number say which.

    `tokens` (n,) may be memory-mapped: only the windows are read.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int, name: str) -> None:
        if len(tokens) < block_size + 1:
            raise ValueError(
                f"data: the {name} text has {len(tokens)} tokens, fewer than block_size + 1 = {block_size + 1}"
            )
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed

    def draw(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch number 0, 1, ...: inputs (B, T) and, each shifted by one token, targets (B, T), int32."""
        random = np.random.default_rng((self.seed, number))
        starts = random.integers(len(self.tokens) - self.block_size, size=self.batch_size)  # (B,)
        windows = self.tokens[starts[:, None] + np.arange(self.block_size + 1)].astype(np.int32)  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]
