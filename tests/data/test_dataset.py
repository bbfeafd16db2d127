"""Datasets: a text encoded here or a prepared directory, and whose tokenizer its tokens are of."""

from __future__ import annotations

import numpy as np
import pytest

from mlxgpt.data import dataset
from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer, decode

TEXT = "".join(f"line {n} of the text\n" for n in range(300))


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "notes.txt").write_text(TEXT)
    return tmp_path / "notes.txt"


@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_a_text_is_encoded_by_the_tokenizer_that_is_named(text_file, kind):
    found = dataset.load(str(text_file), kind)
    assert (found.name, found.description) == ("notes", "one file")
    assert found.sizes() == (len(found.train[0]), len(found.val[0]))
    end = found.tokenizer.end_of_text
    parts = [decode(found.tokenizer, [i for i in tokens.tolist() if i != end]) for tokens in (*found.train, *found.val)]
    assert "".join(parts) == TEXT
    assert abs(len(parts[1]) / len(TEXT) - 0.1) < 0.01


def test_a_models_tokenizer_is_kept(text_file):
    characters = CharTokenizer.of(TEXT, "xyz")
    found = dataset.load(str(text_file), "gpt2", True, characters, text_file.parent / "model")
    assert found.tokenizer is characters
    assert np.concatenate([*found.train, *found.val]).tolist() == characters.encode(TEXT).tolist()
    with pytest.raises(ValueError, match=r"data: notes does not fit the tokenizer of .*model: character 'l' at"):
        dataset.load(str(text_file), "char", False, CharTokenizer.of("abc"), text_file.parent / "model")


def test_the_fingerprint_is_the_tokens(text_file):
    first = dataset.load(str(text_file), "char").fingerprint
    assert dataset.load(str(text_file), "char").fingerprint == first
    assert dataset.load(str(text_file), "gpt2").fingerprint != first
    text_file.write_text(TEXT.replace("7", "8"))
    assert dataset.load(str(text_file), "char").fingerprint != first


def test_what_was_skipped_in_a_directory_is_told(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    description = dataset.load(str(tmp_path), "char").description
    assert description == "2 + 1 files, 1 skipped as not UTF-8 text"
    assert BPETokenizer.gpt2().vocab_size == dataset.load(str(tmp_path), "gpt2").tokenizer.vocab_size
