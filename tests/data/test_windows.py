"""Windows: their order, their bounds and their errors; and drawing them ahead of time."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from mlxgpt.data.windows import Prefetch, Windows, permuted


def counting(*lengths, block_size, seed=1, vocab_size=2**16):
    """Windows of shards of these lengths, in which each token's id is its position among all tokens."""
    ends = np.cumsum(lengths)
    shards = [np.arange(end - n, end).astype(np.uint32) for n, end in zip(lengths, ends, strict=True)]
    return Windows(shards, block_size, seed, "training", vocab_size)


def test_inputs_are_the_files_tokens_and_targets_the_next_ones(tmp_path):
    tokens = np.memmap(tmp_path / "tokens", np.uint16, "w+", shape=(500,))
    tokens[:] = np.arange(500)
    x, y = Windows([tokens], 16, 1, "training", 500).draw(0, 200)
    assert x.shape == y.shape == (200, 16)
    assert x.dtype == y.dtype == np.int32
    assert (y == x + 1).all()
    assert (x == x[:, :1] + np.arange(16)).all()


@pytest.mark.parametrize(
    ("lengths", "block_size"),
    [((500,), 16), ((17,), 16), ((31,), 16), ((32,), 16), ((33,), 16), ((16, 17, 5, 400, 0, 33), 16), ((9, 9, 9), 1)],
)
def test_an_epoch_sees_windows_of_each_shard_that_do_not_overlap(lengths, block_size):
    windows = counting(*lengths, block_size=block_size)
    ends = np.cumsum(lengths)
    for number in range(20):
        x, y = windows.draw(number * windows.per_epoch, windows.per_epoch)
        assert (np.diff(np.concatenate([x, y[:, -1:]], 1)) == 1).all()  # within a shard, and in a row
        shard = np.searchsorted(ends, x[:, 0], "right")
        assert (shard == np.searchsorted(ends, y[:, -1], "right")).all()
        assert len(np.unique(x)) == x.size
        counts = np.bincount(shard, minlength=len(lengths)).tolist()
        assert counts == [max(1, n // block_size - 1) if n > block_size else 0 for n in lengths]


def test_each_epoch_cuts_the_text_at_other_places_and_reaches_every_place():
    windows = counting(100, 53, block_size=16)
    starts = {
        int(start) for n in range(500) for start in windows.draw(n * windows.per_epoch, windows.per_epoch)[0][:, 0]
    }
    assert starts == {*range(100 - 16), *range(100, 153 - 16)}


def test_each_epoch_and_each_seed_has_its_own_order():
    epochs = [(counting(16 * 200, block_size=16, seed=seed), n) for seed in (0, 1, 2**63 - 1) for n in (0, 1)]
    orders = [windows.draw(n * windows.per_epoch, windows.per_epoch)[0][:, 0] // 16 for windows, n in epochs]
    for n, order in enumerate(orders):
        for other in [np.arange(len(order)), *orders[:n]]:
            assert (order == other).mean() < 0.1
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.25  # 3.5 standard deviations


def test_a_number_says_which_window_it_is_across_epochs_and_ranks():
    windows = counting(16 * 10, block_size=16)
    x, y = windows.draw(0, 50)
    for first, count in ((0, 1), (7, 5), (8, 20), (49, 1), (30, 0)):
        part = windows.draw(first, count)
        assert (part[0] == x[first : first + count]).all()
        assert (part[1] == y[first : first + count]).all()
    redrawn, _ = counting(16 * 10, block_size=16).draw(0, 50)
    assert (redrawn == x).all()


SIZES = sorted({1, 2, 3, 5, 7, 11, 97, 101, 1009, 4099, *(2**k + d for k in range(1, 14, 3) for d in (-1, 0, 1))})


@pytest.mark.parametrize("size", SIZES)
def test_an_order_is_a_permutation(size):
    for key in range(20):
        order = permuted(np.arange(size), size, np.full(size, key, np.uint64))
        assert (np.sort(order) == np.arange(size)).all()


@pytest.mark.parametrize("size", [2, 3, 17, 64, 100, 1000])
def test_positions_are_uniform_over_the_keys(size):
    """Pearson's chi-square, of single places and of the distance between two."""
    n = 200 * size
    keys = np.random.default_rng(0).integers(2**63, size=n, dtype=np.uint64)
    places = [permuted(np.full(n, place), size, keys) for place in (0, 1, size // 2, size - 1)]
    for counts in [np.bincount(p, minlength=size) for p in places]:
        assert abs(((counts - 200) ** 2 / 200).sum() - (size - 1)) < 5 * np.sqrt(2 * size)
    if size >= 64:  # with fewer places, some permutations are a little likelier than others
        counts = np.bincount((places[0] - places[3]) % size, minlength=size)[1:]
        expected = n / (size - 1)
        assert abs(((counts - expected) ** 2 / expected).sum() - (size - 2)) < 5 * np.sqrt(2 * size)


def test_an_order_of_many_windows_takes_memory_for_the_drawn_ones_only():
    size = 10**15
    places = np.arange(size - 10_000, size)
    order = permuted(places, size, np.full(10_000, 3, np.uint64))
    assert len(np.unique(order)) == 10_000
    assert order.min() >= 0
    assert order.max() < size
    counts = np.histogram(order, 100, (0, size))[0]
    assert abs(((counts - 100) ** 2 / 100).sum() - 99) < 5 * np.sqrt(200)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match=r"the validation text has 16 tokens, fewer than block_size \+ 1 = 17"):
        Windows([np.zeros(16, np.uint8)], 16, 0, "validation", 1)
    with pytest.raises(ValueError, match=r"the training text's longest shard has 16 tokens, fewer than"):
        Windows([np.zeros(16, np.uint8)] * 3, 16, 0, "training", 1)
    with pytest.raises(ValueError, match=r"the training text's longest shard has 0 tokens, fewer than"):
        Windows([], 16, 0, "training", 1)
    x, _ = Windows([np.zeros(17, np.uint8)], 16, 0, "validation", 1).draw(0, 1)
    assert x.shape == (1, 16)


@pytest.mark.parametrize("shard", [np.zeros((2, 50), np.uint16), np.zeros(100, np.int32), np.zeros(100, np.uint64)])
def test_shards_of_another_type_are_refused(shard):
    with pytest.raises(ValueError, match=r"training shard is .*, expected \(n,\) of uint8, uint16 or uint32"):
        Windows([shard], 16, 0, "training", 100)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32])
def test_an_id_that_the_vocabulary_does_not_have_is_named(kind, tmp_path):
    tokens = np.memmap(tmp_path / "train-00001.bin", kind, "w+", shape=(33,))
    worst = np.iinfo(kind).max
    tokens[20] = worst
    windows = Windows([np.zeros(33, kind), tokens], 8, 0, "training", 200)
    with pytest.raises(ValueError, match=f"train-00001.bin: token 20 is id {worst}, expected less than .* = 200"):
        windows.draw(0, 10 * windows.per_epoch)
    Windows([tokens], 8, 0, "training", worst + 1).draw(0, 100)
    windows = Windows([np.zeros(33, kind), np.array(tokens)], 8, 0, "training", 200)
    with pytest.raises(ValueError, match=f"training shard 1: token 20 is id {worst}"):
        windows.draw(0, 10 * windows.per_epoch)


def test_prefetch_computes_the_next_while_one_is_used():
    drawn, threads = [], set()

    def draw(n):
        drawn.append(n)
        threads.add(threading.get_ident())
        return n * n

    prefetched = Prefetch(draw)
    assert [prefetched(n) for n in (3, 4, 5, 9, 10, 2)] == [9, 16, 25, 81, 100, 4]
    wait_for(lambda: drawn[-1] == 3)
    assert drawn == [
        3,
        4,
        5,
        6,
        9,
        10,
        11,
        2,
        3,
    ]  # 3 twice: what is computed ahead is dropped when another number is asked for
    assert threading.get_ident() not in threads


def test_prefetch_raises_in_the_call_that_asks_for_the_number():
    failures = [0, 3, 3]  # the third draw is good on its third attempt

    def draw(n):
        if n in failures:
            failures.remove(n)
            raise ValueError(f"draw {n}")
        return n

    prefetched = Prefetch(draw)
    with pytest.raises(ValueError, match="draw 0"):
        prefetched(0)
    assert [prefetched(0), prefetched(1), prefetched(2)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="draw 3"):
            prefetched(3)
    assert prefetched(3) == 3


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
