"""Corpora: what is read, how it is split, and the windows drawn from it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from mlxgpt.data import corpus as data
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


def batches(*lengths, block_size, seed=1, vocab_size=2**16):
    """Over shards that count on: a token's id is its position among all."""
    ends = np.cumsum(lengths)
    shards = [np.arange(end - n, end).astype(np.uint32) for n, end in zip(lengths, ends, strict=True)]
    return data.Batches(shards, block_size, seed, "training", vocab_size)


def test_windows_are_the_files_and_targets_are_the_next_tokens(tmp_path):
    tokens = np.memmap(tmp_path / "tokens", np.uint16, "w+", shape=(500,))
    tokens[:] = np.arange(500)
    x, y = data.Batches([tokens], 16, 1, "training", 500).draw(0, 200)
    assert x.shape == y.shape == (200, 16)
    assert x.dtype == y.dtype == np.int32
    assert (y == x + 1).all()
    assert (x == x[:, :1] + np.arange(16)).all()


@pytest.mark.parametrize(
    ("lengths", "block_size"),
    [((500,), 16), ((17,), 16), ((31,), 16), ((32,), 16), ((33,), 16), ((16, 17, 5, 400, 0, 33), 16), ((9, 9, 9), 1)],
)
def test_an_epoch_sees_windows_of_each_shard_that_do_not_overlap(lengths, block_size):
    b = batches(*lengths, block_size=block_size)
    ends = np.cumsum(lengths)
    for number in range(20):
        x, y = b.draw(number * b.per_epoch, b.per_epoch)
        assert (np.diff(np.concatenate([x, y[:, -1:]], 1)) == 1).all()  # within a shard, and in a row
        shard = np.searchsorted(ends, x[:, 0], "right")
        assert (shard == np.searchsorted(ends, y[:, -1], "right")).all()
        assert len(np.unique(x)) == x.size
        counts = np.bincount(shard, minlength=len(lengths)).tolist()
        assert counts == [max(1, n // block_size - 1) if n > block_size else 0 for n in lengths]


def test_each_epoch_cuts_the_text_at_other_places_and_all_tokens_come_up():
    b = batches(100, 53, block_size=16)
    starts = {int(start) for n in range(500) for start in b.draw(n * b.per_epoch, b.per_epoch)[0][:, 0]}
    assert starts == {*range(100 - 16), *range(100, 153 - 16)}


def test_windows_of_each_epoch_come_in_another_order_of_every_seed():
    epochs = [(batches(16 * 200, block_size=16, seed=seed), n) for seed in (0, 1, 2**63 - 1) for n in (0, 1)]
    orders = [b.draw(n * b.per_epoch, b.per_epoch)[0][:, 0] // 16 for b, n in epochs]
    for n, order in enumerate(orders):
        for other in [np.arange(len(order)), *orders[:n]]:
            assert (order == other).mean() < 0.1
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.25  # 3.5 standard deviations


def test_a_number_says_which_window_it_is_across_epochs_and_ranks():
    b = batches(16 * 10, block_size=16)
    x, y = b.draw(0, 50)
    for first, count in ((0, 1), (7, 5), (8, 20), (49, 1), (30, 0)):
        part = b.draw(first, count)
        assert (part[0] == x[first : first + count]).all()
        assert (part[1] == y[first : first + count]).all()
    again = batches(16 * 10, block_size=16).draw(0, 50)
    assert (again[0] == x).all()


SIZES = sorted({1, 2, 3, 5, 7, 11, 97, 101, 1009, 4099, *(2**k + d for k in range(1, 14, 3) for d in (-1, 0, 1))})


@pytest.mark.parametrize("size", SIZES)
def test_an_order_is_a_permutation(size):
    for key in range(20):
        order = data.permuted(np.arange(size), size, np.full(size, key, np.uint64))
        assert (np.sort(order) == np.arange(size)).all()


@pytest.mark.parametrize("size", [2, 3, 17, 64, 100, 1000])
def test_positions_are_uniform_over_the_keys(size):
    """Pearson's chi-square, of single places and of the distance between two."""
    n = 200 * size
    keys = np.random.default_rng(0).integers(2**63, size=n, dtype=np.uint64)
    places = [data.permuted(np.full(n, place), size, keys) for place in (0, 1, size // 2, size - 1)]
    for counts in [np.bincount(p, minlength=size) for p in places]:
        assert abs(((counts - 200) ** 2 / 200).sum() - (size - 1)) < 5 * np.sqrt(2 * size)
    if size >= 64:  # of fewer, some permutations are a little likelier than others
        counts = np.bincount((places[0] - places[3]) % size, minlength=size)[1:]
        expected = n / (size - 1)
        assert abs(((counts - expected) ** 2 / expected).sum() - (size - 2)) < 5 * np.sqrt(2 * size)


def test_an_order_of_many_windows_needs_only_the_drawn():
    size = 10**15
    places = np.arange(size - 10_000, size)
    order = data.permuted(places, size, np.full(10_000, 3, np.uint64))
    assert len(np.unique(order)) == 10_000
    assert order.min() >= 0
    assert order.max() < size
    counts = np.histogram(order, 100, (0, size))[0]
    assert abs(((counts - 100) ** 2 / 100).sum() - 99) < 5 * np.sqrt(200)


def test_a_text_shorter_than_a_window():
    with pytest.raises(ValueError, match=r"the validation text has 16 tokens, fewer than block_size \+ 1 = 17"):
        data.Batches([np.zeros(16, np.uint8)], 16, 0, "validation", 1)
    with pytest.raises(ValueError, match=r"the training text's longest shard has 16 tokens, fewer than"):
        data.Batches([np.zeros(16, np.uint8)] * 3, 16, 0, "training", 1)
    with pytest.raises(ValueError, match=r"the training text's longest shard has 0 tokens, fewer than"):
        data.Batches([], 16, 0, "training", 1)
    x, _ = data.Batches([np.zeros(17, np.uint8)], 16, 0, "validation", 1).draw(0, 1)
    assert x.shape == (1, 16)


@pytest.mark.parametrize("shard", [np.zeros((2, 50), np.uint16), np.zeros(100, np.int32), np.zeros(100, np.uint64)])
def test_shards_of_another_type(shard):
    with pytest.raises(ValueError, match=r"training shard is .*, expected \(n,\) of uint8, uint16 or uint32"):
        data.Batches([shard], 16, 0, "training", 100)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32])
def test_an_id_that_the_vocabulary_does_not_have_is_named(kind, tmp_path):
    tokens = np.memmap(tmp_path / "train-00001.bin", kind, "w+", shape=(33,))
    worst = np.iinfo(kind).max
    tokens[20] = worst
    b = data.Batches([np.zeros(33, kind), tokens], 8, 0, "training", 200)
    with pytest.raises(ValueError, match=f"train-00001.bin: token 20 is id {worst}, expected less than .* = 200"):
        b.draw(0, 10 * b.per_epoch)
    data.Batches([tokens], 8, 0, "training", worst + 1).draw(0, 100)
    b = data.Batches([np.zeros(33, kind), np.array(tokens)], 8, 0, "training", 200)
    with pytest.raises(ValueError, match=f"training shard 1: token 20 is id {worst}"):
        b.draw(0, 10 * b.per_epoch)


def test_ahead_draws_the_next_while_one_is_used():
    drawn, threads = [], set()

    def draw(n):
        drawn.append(n)
        threads.add(threading.get_ident())
        return n * n

    ahead = data.Ahead(draw)
    assert [ahead(n) for n in (3, 4, 5, 9, 10, 2)] == [9, 16, 25, 81, 100, 4]
    wait_for(lambda: drawn[-1] == 3)
    assert drawn == [3, 4, 5, 6, 9, 10, 11, 2, 3]  # none twice but where the foreseen was not wanted
    assert threading.get_ident() not in threads


def test_ahead_raises_at_the_call_that_wants_it():
    failures = [0, 3, 3]  # the third draw is good on its third attempt

    def draw(n):
        if n in failures:
            failures.remove(n)
            raise ValueError(f"draw {n}")
        return n

    ahead = data.Ahead(draw)
    with pytest.raises(ValueError, match="draw 0"):
        ahead(0)
    assert [ahead(0), ahead(1), ahead(2)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="draw 3"):
            ahead(3)
    assert ahead(3) == 3


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
