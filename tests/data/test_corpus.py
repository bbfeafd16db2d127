"""Corpora: what is read, how it is split, and the tokens of its documents."""

from __future__ import annotations

import numpy as np
import pytest

from mlxgpt.data.corpus import encode, load_corpus
from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer


@pytest.fixture
def folder(tmp_path):
    for n in range(30):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "sub" / f"{n:02}.txt").write_text(f"document {n}\n" * 5)
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden").write_text("hidden")
    return tmp_path


def test_stdlib_is_there_and_split_by_file():
    corpus = load_corpus("stdlib")
    assert sum(map(len, corpus.train)) > 5_000_000
    assert not set(corpus.train) & {text for text in corpus.val if len(text) > 1000}
    assert 0.05 < len(corpus.val) / len(corpus.train) < 0.2
    assert all(text.isascii() for text in corpus.train + corpus.val)
    second = load_corpus("stdlib")
    assert (second.train, second.val) == (corpus.train, corpus.val)


def test_a_single_file_gives_its_last_tenth_to_validation(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("0123456789" * 10, encoding="utf-8")
    corpus = load_corpus(str(file))
    assert corpus.train == ["0123456789" * 9]
    assert corpus.val == ["0123456789"]
    assert corpus.name == "text"


def test_all_documents_are_those_of_both_splits_and_a_single_one_is_whole(folder, tmp_path_factory):
    corpus = load_corpus(str(folder))
    assert sorted(corpus.documents("all")) == sorted(corpus.documents("train") + corpus.documents("val"))
    assert len(corpus.documents("all")) == 30
    assert (corpus.documents("train"), corpus.documents("val")) == (corpus.train, corpus.val)
    file = tmp_path_factory.mktemp("one") / "text.txt"
    file.write_text("0123456789" * 10)
    one = load_corpus(str(file))
    assert one.documents("all") == ["0123456789" * 10]
    assert one.documents("val") == ["0123456789"]
    (file.parent / "other.txt").write_text("other")
    assert sorted(load_corpus(str(file.parent)).documents("all")) == ["0123456789" * 10, "other"]


def test_a_directory_is_read_recursively_and_other_files_are_counted(folder):
    corpus = load_corpus(str(folder))
    assert len(corpus.train) + len(corpus.val) == 30
    assert len(corpus.val) == 3
    assert corpus.skipped == 2


def test_a_file_stays_in_its_split_when_others_are_added(folder):
    before = load_corpus(str(folder))
    for n in range(30, 33):
        (folder / "sub" / f"{n}.txt").write_text(f"document {n}\n" * 5)
    after = load_corpus(str(folder))
    assert len(set(before.val) - set(after.val)) <= 1


def test_a_glob_names_a_corpus(folder):
    corpus = load_corpus(str(folder / "**" / "0*.txt"))
    assert len(corpus.train) + len(corpus.val) == 10


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.txt", None, FileNotFoundError, "no file or directory .*missing.txt"),
        ("*.none", None, FileNotFoundError, "as a glob it matches nothing"),
        ("empty.txt", b"", ValueError, "empty.txt is empty"),
        ("latin.txt", b"caf\xe9 au lait", ValueError, r"latin.txt is not UTF-8 text \(byte 3 is 0xe9\)"),
    ],
)
def test_a_file_that_is_missing_empty_or_not_text_is_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        load_corpus(str(tmp_path / name))


def test_a_directory_without_text_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match=r"holds no UTF-8 text \(1 other or empty files\)"):
        load_corpus(str(tmp_path))


def test_shakespeare_without_a_connection_suggests_a_file(monkeypatch, tmp_path):
    import pooch

    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path)
    monkeypatch.setattr(pooch, "retrieve", refuse)
    with pytest.raises(ConnectionError, match="give a text file of your own with --data FILE"):
        load_corpus("shakespeare")


def test_end_of_text_follows_each_document_where_the_tokenizer_has_it():
    chars = CharTokenizer.of("abc")
    tokens = encode(chars, ["ab", "c"])
    assert tokens.tolist() == [0, 1, 2]
    assert tokens.dtype == np.uint8
    gpt2 = BPETokenizer.gpt2()
    tokens = encode(gpt2, ["Hello", " world"])
    assert tokens.tolist() == [15496, 50256, 995, 50256]
    assert tokens.dtype == np.uint16
