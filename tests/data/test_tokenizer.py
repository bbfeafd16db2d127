"""Tokenizers of characters and of GPT-2's byte pairs: encoded and decoded, saved and loaded, beside known ids."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.data import tokenizer
from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer, decode

GPT2 = BPETokenizer.gpt2()


def saved_and_loaded(original: tokenizer.Tokenizer, directory) -> tokenizer.Tokenizer:
    for name, content in original.files().items():
        (directory / name).write_bytes(content)
    return tokenizer.load(directory)


def test_characters_are_numbered_by_code_point():
    chars = CharTokenizer.of("hello\n", "wörld")
    assert chars.characters == sorted("helo\nwörd")
    assert chars.encode("hello").tolist() == [chars.characters.index(c) for c in "hello"]
    assert chars.start == 0
    assert chars.end_of_text is None


def test_unknown_character_is_named():
    with pytest.raises(ValueError, match=r"character 'é' at position 2 is not among the 3 "):
        CharTokenizer.of("abc").encode("abé")


@given(st.text(min_size=1), st.randoms())
def test_characters_are_decoded_as_they_were_encoded(text, random):
    chars = CharTokenizer.of(text)
    shuffled = "".join(random.sample(text, len(text)))
    ids = chars.encode(shuffled)
    assert ids.dtype == np.int32
    assert decode(chars, ids.tolist()) == shuffled.encode("utf-8", "replace").decode()


def test_a_character_tokenizer_is_loaded_as_it_was_saved(tmp_path):
    chars = CharTokenizer.of('\n "\\ aéλ😀\u2028')
    loaded = saved_and_loaded(chars, tmp_path)
    assert loaded.characters == chars.characters
    assert loaded.start == chars.start


def test_gpt2s_known_ids():
    assert GPT2.encode("Hello, world! Don't   stop\n").tolist() == [
        15496, 11, 995, 0, 2094, 470, 220, 220, 2245, 198,
    ]  # fmt: skip
    assert GPT2.encode("<|endoftext|>").tolist() != [50256]  # in text it is only text
    assert (GPT2.vocab_size, GPT2.end_of_text, GPT2.start) == (50257, 50256, 50256)
    assert GPT2.token_bytes(50256) == b"<|endoftext|>"


def test_gpt2_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert BPETokenizer.gpt2().encode("offline").tolist() == [2364, 1370]


def test_the_bytes_of_all_tokens_are_those_of_each():
    assert GPT2._all_bytes() == [GPT2.token_bytes(token) for token in range(50256)]
    assert sorted(GPT2._all_bytes()[:256]) == [bytes([byte]) for byte in range(256)]


@given(st.text())
def test_gpt2s_tokens_are_decoded_as_they_were_encoded(text):
    assert decode(GPT2, GPT2.encode(text).tolist()) == text


def test_gpt2s_tokenizer_is_loaded_as_it_was_saved(tmp_path):
    loaded = saved_and_loaded(GPT2, tmp_path)
    text = "The quick brown fox — naïve café"
    assert loaded.encode(text).tolist() == GPT2.encode(text).tolist()
    assert loaded.end_of_text == GPT2.end_of_text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, "tokenizer.json: not a tokenizer"),
        ({"tokenizer.json": '{"model": {"type": "WordLevel", "vocab": {"ab": 0}}}'}, "'ab' is not one character"),
        ({"tokenizer.json": '{"model": {"type": "WordLevel", "vocab": {"a": 1}}}'}, "neither one token per character"),
        ({"tokenizer.json": "[]"}, "tokenizer.json: not a tokenizer"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version\na b\n"}, "vocab.json: not a tokenizer"),
    ],
)
def test_bad_files_are_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(tmp_path)


def vocabulary(change) -> dict[str, bytes]:
    files = GPT2.files()
    vocab, lines = json.loads(files["vocab.json"]), files["merges.txt"].decode().splitlines()
    change(vocab, lines)
    return {"vocab.json": json.dumps(vocab).encode(), "merges.txt": "\n".join(lines).encode()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vocab, lines: vocab.update({"Ġt": vocab["Ġa"], "Ġa": vocab["Ġt"]}), "in the order of their merges"),
        (lambda vocab, lines: lines.insert(1, lines.pop(2)), "in the order of their merges"),
        (lambda vocab, lines: lines.pop(), "in the order of their merges"),
        (lambda vocab, lines: vocab.pop("!"), "in the order of their merges"),
        (lambda vocab, lines: vocab.update({"\n": vocab.pop("!")}), r"'\\n' in its tokens stands for no byte"),
        (lambda vocab, lines: vocab.update({"猫": vocab.pop("!")}), "'猫' in its tokens stands for no byte"),
    ],
)
def test_byte_pairs_that_tiktoken_would_number_otherwise_are_refused(change, message):
    with pytest.raises(ValueError, match=rf"here: vocab\.json: not a tokenizer .*{message}"):
        tokenizer.from_files(vocabulary(change), "here")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("merges", [lambda pairs: pairs, lambda pairs: [pair.split(" ") for pair in pairs]])
def test_byte_pairs_are_read_from_one_json_file(merges):
    """transformers saves GPT-2's fast tokenizer like this; older versions write each merge as one string."""
    files = tokenizer.BPETokenizer.gpt2().files()
    vocab = json.loads(files["vocab.json"])
    pairs = files["merges.txt"].decode().splitlines()[1:]
    end = {"id": vocab.pop(tokenizer.END_OF_TEXT), "content": tokenizer.END_OF_TEXT}
    content = {"added_tokens": [end], "model": {"type": "BPE", "vocab": vocab, "merges": merges(pairs)}}
    loaded = tokenizer.from_files({"tokenizer.json": json.dumps(content).encode()}, "here")
    text = "Hello, wörld 123\n\n\tdef f(x):"
    assert loaded.encode(text).tolist() == tokenizer.BPETokenizer.gpt2().encode(text).tolist()
    assert loaded.end_of_text == 50256
