"""Prepared directories: what is written can be read, and every contradiction is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import time

import numpy as np
import pytest

from mlxgpt import prepare as verb
from mlxgpt.data import shards
from mlxgpt.data.tokenizer import CharTokenizer
from mlxgpt.data.windows import Windows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    (root / "text.txt").write_text("".join(f"line {n} of the text\n" for n in range(300)))
    prepare(root / "text.txt", root / "out", "--tokenizer", "char", "--val_fraction", "0.1", "--shard_tokens", "2000")
    return root / "out"


@pytest.fixture
def prepared(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def prepare(source, out, *flags):
    verb.main([str(source), "--out", str(out), "--workers", "1", *flags])


def edit(directory, change):
    file = directory / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def test_shards_are_the_text_in_order(prepared):
    p = shards.open_prepared(str(prepared))
    text = "".join(f"line {n} of the text\n" for n in range(300))
    ids = np.concatenate([*p.train, *p.val])
    assert "".join(p.tokenizer.token_bytes(i).decode() for i in ids) == text
    assert [len(shard) for shard in p.train[:-1]] == [2000] * (len(p.train) - 1)
    assert abs(sum(map(len, p.val)) / len(text) - 0.1) < 0.01
    assert {shard.dtype for shard in p.train + p.val} == {np.dtype("<u2")}
    assert (p.name, p.tokenizer.vocab_size) == ("out", len(set(text)))
    assert shards.verify(prepared).fingerprint == p.fingerprint
    x, y = Windows(p.train, 16, 0, "training", p.tokenizer.vocab_size).draw(0, 8)
    assert (x[:, 1:] == y[:, :-1]).all()


def test_the_same_content_has_the_same_fingerprint(prepared, made, tmp_path):
    fingerprint = shards.open_prepared(prepared).fingerprint
    assert fingerprint == shards.open_prepared(made).fingerprint
    (tmp_path / "text.txt").write_text("".join(f"line {n} of the text\n" for n in range(300)).replace("7", "8"))
    prepare(tmp_path / "text.txt", tmp_path / "other", "--tokenizer", "char", "--shard_tokens", "2000")
    assert shards.open_prepared(tmp_path / "other").fingerprint != fingerprint


def test_a_prepared_directory_is_recognised(prepared, tmp_path):
    assert shards.is_prepared(prepared)
    assert not shards.is_prepared(tmp_path)
    assert not shards.is_prepared("stdlib")
    (prepared / "manifest.json").rename(prepared / "progress.json")
    assert shards.is_prepared(prepared)


def test_a_directory_being_prepared_says_how_far_it_is(prepared):
    (prepared / "manifest.json").unlink()
    (prepared / "progress.json").write_text('{"format": 1, "input_done": 12000000, "input_total": 33000000}')
    with pytest.raises(ValueError, match=r"out: it is still being prepared \(12.0 of 33.0 MB are done\): wait, or run"):
        shards.open_prepared(prepared)


def val_shard(manifest):
    return manifest["val"]["shards"][0]


MANIFESTS = {
    "newer": (lambda m: m.update(format=2), "manifest.json: format is 2, expected 1; a newer mlxgpt wrote it"),
    "no format": (lambda m: m.pop("format"), "manifest.json: format is None, expected 1"),
    "tokens": (lambda m: m["train"].update(tokens=5), r"train's tokens is 5, expected \d+, the sum of its shards'"),
    "total": (lambda m: m.update(tokens=5), r"tokens is 5, expected \d+, the sum of train's and val's"),
    "documents": (lambda m: m.update(documents=9), r"documents is 9, expected 2, the sum"),
    "largest": (lambda m: m.update(largest_id=200), r"largest_id is 200, expected less than vocab_size = \d+"),
    "dtype": (lambda m: m.update(dtype="float32"), r"dtype is 'float32', expected uint16 or uint32"),
    "narrow": (lambda m: m.update(vocab_size=70000), r"vocab_size is 70000, expected at most 65536, which uint16"),
    "vocabulary": (lambda m: m.update(vocab_size=300), r"vocab_size is 300, expected \d+, the tokenizer's"),
    "lacking": (lambda m: m.pop("val"), "manifest.json: not a manifest of shards: it has no 'val'"),
    "type": (lambda m: m.update(train=[1]), "manifest.json: not a manifest of shards: list indices"),
    "no shards": (lambda m: m["val"].update(shards=[]), r"val's shards is \[\], expected a list of at least one"),
    "twice": (lambda m: val_shard(m).update(file="train-00000.bin"), "a shard's file is 'train-00000.bin', expected"),
    "outside": (lambda m: val_shard(m).update(file="../x.bin"), "a shard's file is '../x.bin', expected the name"),
    "negative": (lambda m: val_shard(m).update(tokens=-1), "val-00000.bin's tokens is -1, expected a whole number"),
    "gone": (lambda m: val_shard(m).update(file="val-7.bin"), "val-7.bin: there is no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_contradicts_itself_or_the_files_is_refused(case, prepared):
    change, message = MANIFESTS[case]
    edit(prepared, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        shards.open_prepared(prepared)
    assert "\n" not in str(caught.value)
    assert str(prepared) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("manifest.json", lambda b: b[:100], "manifest.json: not JSON: "),
        ("manifest.json", lambda b: b"[]", "manifest.json: it holds a JSON list, expected an object"),
        ("manifest.json", lambda b: b"\xff" + b, "manifest.json: not JSON: "),
        ("val-00000.bin", lambda b: b[:-1], r"val-00000.bin: it has \d+ bytes, expected \d+ of \d+ uint16 tokens"),
        ("val-00000.bin", lambda b: b + b"\0\0", r"val-00000.bin: it has \d+ bytes, expected \d+ of \d+ uint16"),
        ("tokenizer.json", lambda b: b + b" ", "tokenizer.json: its SHA-256 .*: the shards are of another tokenizer"),
        ("tokenizer.json", None, "tokenizer.json: there is no such file"),
        ("train-00001.bin", None, "train-00001.bin: there is no such file"),
        ("manifest.json", None, "manifest.json: there is no such file"),
    ],
)
def test_files_that_contradict_the_manifest_are_refused(name, change, message, prepared):
    file = prepared / name
    if change:
        file.write_bytes(change(file.read_bytes()))
    else:
        file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        shards.open_prepared(prepared)
    assert "\n" not in str(caught.value)


def test_a_wrong_count_is_found_even_where_all_sums_agree(prepared):
    def change(manifest):
        val_shard(manifest)["tokens"] = manifest["val"]["tokens"] = 7
        manifest["tokens"] = 7 + manifest["train"]["tokens"]

    edit(prepared, change)
    with pytest.raises(ValueError, match=r"val-00000.bin: it has \d+ bytes, expected 14 of 7 uint16 tokens"):
        shards.open_prepared(prepared)


def test_verifying_reads_the_shards(prepared):
    read = []
    shards.verify(prepared, read.append)
    assert sum(read) == sum(file.stat().st_size for file in prepared.glob("*.bin"))
    file = prepared / "train-00001.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    shards.open_prepared(prepared)  # does not read the shards
    with pytest.raises(ValueError, match=r"train-00001.bin: its SHA-256 is \w{64}, expected \w{64}"):
        shards.verify(prepared)
    content[100] ^= 1
    file.write_bytes(content)
    edit(prepared, lambda m: m.update(largest_id=1))
    with pytest.raises(ValueError, match=r"largest_id is 1, expected \d+, the largest in the shards"):
        shards.verify(prepared)


def test_another_tokenizer_is_refused(prepared):
    p = shards.open_prepared(prepared)
    p.check_tokenizer(p.tokenizer, "runs/x")
    with pytest.raises(ValueError, match=r"vocabulary is of \d+ ids .* expected that of runs/x: .* another tokenizer"):
        p.check_tokenizer(CharTokenizer.of("abc"), "runs/x")
    characters = [*p.tokenizer.characters[:-1], "z"]
    with pytest.raises(ValueError, match=r"its token \d+ is b'x', expected that of runs/x: .* \(b'z'\)"):
        p.check_tokenizer(CharTokenizer(characters), "runs/x")


def test_a_writer_continues_after_what_was_committed(tmp_path):
    tokens = np.arange(25, dtype=np.uint16)
    writer = shards.ShardWriter(tmp_path, "train", tokens.dtype, 10, shards.ShardWriter.nothing())
    writer.write(tokens[:13])
    state = writer.commit()
    writer.write(tokens)  # lost
    writer.close()
    writer = shards.ShardWriter(tmp_path, "train", tokens.dtype, 10, state)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes == {"train-00000.bin": 20, "train-00001.bin": 6}
    writer.write(tokens[13:])
    written = writer.finish()
    content = [(tmp_path / shard["file"]).read_bytes() for shard in written]
    assert b"".join(content) == tokens.tobytes()
    assert [shard["tokens"] for shard in written] == [10, 10, 5]
    assert [shard["sha256"] for shard in written] == [hashlib.sha256(c).hexdigest() for c in content]


def test_windows_of_100_gb_are_drawn_at_once(tmp_path):
    """From a sparse file: only the windows that are drawn are read."""
    file = tmp_path / "train-00000.bin"
    with open(file, "wb") as out:
        out.truncate(100_000_000_000)
    start = time.perf_counter()
    windows = Windows([shards.open_shard(file, np.dtype("<u2"))], 1024, 0, "training", 50257)
    shapes = {windows.draw(n * 12, 12)[0].shape for n in range(100)}
    assert time.perf_counter() - start < 1
    assert shapes == {(12, 1024)}
    assert windows.per_epoch == 50_000_000_000 // 1024 - 1
