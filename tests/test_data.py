"""Corpora: what is read, how it is split, and the batches drawn from it."""

from __future__ import annotations

import numpy as np
import pytest

from mlxgpt import data
from mlxgpt.tokenizer import BPETokenizer, CharTokenizer


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
    corpus = data.load_corpus("stdlib")
    assert sum(map(len, corpus.train)) > 5_000_000
    assert not set(corpus.train) & {text for text in corpus.val if len(text) > 1000}
    assert 0.05 < len(corpus.val) / len(corpus.train) < 0.2
    assert all(text.isascii() for text in corpus.train + corpus.val)
    again = data.load_corpus("stdlib")
    assert (again.train, again.val) == (corpus.train, corpus.val)


def test_a_single_file_gives_its_last_tenth_to_validation(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("0123456789" * 10, encoding="utf-8")
    corpus = data.load_corpus(str(file))
    assert corpus.train == ["0123456789" * 9]
    assert corpus.val == ["0123456789"]
    assert corpus.name == "text"


def test_all_documents_are_those_of_both_sides_and_a_single_one_is_whole(folder, tmp_path_factory):
    corpus = data.load_corpus(str(folder))
    assert sorted(corpus.documents("all")) == sorted(corpus.documents("train") + corpus.documents("val"))
    assert len(corpus.documents("all")) == 30
    assert (corpus.documents("train"), corpus.documents("val")) == (corpus.train, corpus.val)
    file = tmp_path_factory.mktemp("one") / "text.txt"
    file.write_text("0123456789" * 10)
    one = data.load_corpus(str(file))
    assert one.documents("all") == ["0123456789" * 10]
    assert one.documents("val") == ["0123456789"]
    (file.parent / "other.txt").write_text("other")
    assert sorted(data.load_corpus(str(file.parent)).documents("all")) == ["0123456789" * 10, "other"]


def test_a_directory_is_read_below_and_what_is_not_text_is_counted(folder):
    corpus = data.load_corpus(str(folder))
    assert len(corpus.train) + len(corpus.val) == 30
    assert len(corpus.val) == 3
    assert corpus.skipped == 2


def test_a_file_stays_on_its_side_when_others_come(folder):
    before = data.load_corpus(str(folder))
    for n in range(30, 33):
        (folder / "sub" / f"{n}.txt").write_text(f"document {n}\n" * 5)
    after = data.load_corpus(str(folder))
    assert len(set(before.val) - set(after.val)) <= 1


def test_a_glob(folder):
    corpus = data.load_corpus(str(folder / "**" / "0*.txt"))
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
def test_bad_data_is_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        data.load_corpus(str(tmp_path / name))


def test_a_directory_without_text(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match=r"holds no UTF-8 text \(1 other or empty files\)"):
        data.load_corpus(str(tmp_path))


def test_shakespeare_offline_names_data(monkeypatch, tmp_path):
    import pooch

    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path)
    monkeypatch.setattr(pooch, "retrieve", refuse)
    with pytest.raises(ConnectionError, match="give a text file of your own with --data FILE"):
        data.load_corpus("shakespeare")


def test_encode_separates_documents_where_there_is_a_token_for_it():
    chars = CharTokenizer.of("abc")
    tokens = data.encode(chars, ["ab", "c"])
    assert tokens.tolist() == [0, 1, 2]
    assert tokens.dtype == np.uint8
    gpt2 = BPETokenizer.gpt2()
    tokens = data.encode(gpt2, ["Hello", " world"])
    assert tokens.tolist() == [15496, 50256, 995, 50256]
    assert tokens.dtype == np.uint16


def test_batches_are_windows_and_targets_are_the_next_tokens(tmp_path):
    tokens = np.memmap(tmp_path / "tokens", np.uint16, "w+", shape=(500,))
    tokens[:] = np.arange(500)
    batches = data.Batches(tokens, block_size=16, batch_size=64, seed=1, name="training")
    starts = set()
    for n in range(200):
        x, y = batches.draw(n)
        assert x.shape == y.shape == (64, 16)
        assert x.dtype == y.dtype == np.int32
        assert (y == x + 1).all()
        assert (x == x[:, :1] + np.arange(16)).all()
        starts |= set(x[:, 0].tolist())
    assert starts == set(range(500 - 16))  # the first and the last window among them


def test_batches_repeat_with_the_seed():
    tokens = np.arange(200, dtype=np.uint8)

    def batch(seed, number):
        return data.Batches(tokens, 8, 4, seed, "training").draw(number)[0].tolist()

    assert batch(1, 0) == batch(1, 0) != batch(2, 0)
    assert batch(1, 5) == batch(1, 5) != batch(1, 0)


def test_a_text_shorter_than_a_window():
    with pytest.raises(ValueError, match=r"the validation text has 16 tokens, fewer than block_size \+ 1 = 17"):
        data.Batches(np.zeros(16, np.uint8), 16, 1, 0, "validation")
    x, _ = data.Batches(np.zeros(17, np.uint8), 16, 1, 0, "validation").draw(0)
    assert x.shape == (1, 16)
