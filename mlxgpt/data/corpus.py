"""Text to train on: a corpus, split into training and validation documents."""

from __future__ import annotations

import glob
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .tokenizer import Tokenizer

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and documents held out for validation."""

    name: str
    train: list[str]
    val: list[str]
    skipped: int = 0  # files of a directory or glob that are empty or not UTF-8 text
    one_text: bool = False  # train and val are the beginning and the end of a single document

    def documents(self, split: Literal["train", "val", "all"]) -> list[str]:
        """The documents of a split, or all of them; a single document that was split is joined again."""
        if split == "all":
            return ["".join(self.train + self.val)] if self.one_text else self.train + self.val
        return self.train if split == "train" else self.val


def load_corpus(data: str) -> Corpus:
    """The corpus that --data names: `stdlib`, `shakespeare`, a file, a directory or a glob.

    About a tenth of several files is held out for validation, chosen by their names; of a single file, its last
    tenth. FileNotFoundError or ValueError names what is missing, empty or not text.
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
    held_out = validation_names(documents, len(documents) // 10)
    train = [text for n, text in documents.items() if n not in held_out]
    return Corpus(name, train, [text for n, text in documents.items() if n in held_out], skipped)


def validation_names(names: Iterable[str], count: int) -> set[str]:
    """The names of `count` files, at least one, to hold out for validation.

    A hash of the name chooses, so that a file stays in its split when others are added or removed.
    """
    ranked = sorted(names, key=lambda name: (zlib.crc32(name.encode("utf-8", "surrogatepass")), name))
    return set(ranked[: max(1, count)])


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
    """The standard library's pure-ASCII Python files without its tests, and how many others there are.

    11 MB, 96 distinct characters.
    """
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


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """The tokens of all documents, each followed by end-of-text where the tokenizer has one.

    An array (n,) of the smallest unsigned type that holds the vocabulary. ValueError for text that has no token.
    """
    kind = np.uint8 if tokenizer.vocab_size <= 2**8 else np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = [] if tokenizer.end_of_text is None else [np.array([tokenizer.end_of_text], kind)]
    return np.concatenate([part for text in documents for part in (tokenizer.encode(text).astype(kind), *end)])
