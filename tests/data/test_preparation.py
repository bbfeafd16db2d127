"""Preparing text: the shards are the same whatever the pieces, the processes and the moment of a kill."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from mlxgpt import prepare as verb
from mlxgpt.common import disk
from mlxgpt.data import pieces, preparation, shards
from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer

GPT2 = BPETokenizer.gpt2()
SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_text.py"


def prepare(*args, workers=1):
    verb.main([*map(str, args), "--workers", str(workers)])


def ids(directory, split="train"):
    return np.concatenate(getattr(shards.open_prepared(directory), split))


def content(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def write_jsonl(file, texts, opened=open):
    with opened(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts))


@pytest.fixture
def texts():
    words = [
        "the",
        "of",
        "Straße",
        "naïve",
        "日本語",
        "x=1;",
        "\n",
        "  ",
        "\r\n",
        "it's",
        "1234",
        "— ",
        "<|endoftext|>",
    ]
    chooser = random.Random(0)
    return [" ".join(chooser.choices(words, k=chooser.randrange(1, 60))) for _ in range(300)]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    monkeypatch.setattr(pieces, "SCAN_BYTES", 64)


def test_a_single_text_is_complete_and_its_end_is_held_out(tmp_path, small_pieces, texts):
    text = "\n".join(texts)
    (tmp_path / "text.txt").write_text(text, newline="")
    prepare(tmp_path / "text.txt", "--out", tmp_path / "out", "--val_fraction", "0.2", "--shard_tokens", "1000")
    train, val = ids(tmp_path / "out"), ids(tmp_path / "out", "val")
    assert train[-1] == val[-1] == GPT2.end_of_text
    assert np.concatenate([train[:-1], val[:-1]]).tolist() == GPT2.encode(text).tolist()
    assert 0.15 < len(val) / (len(train) + len(val)) < 0.25


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "txt"])
def test_every_document_is_in_one_split_and_followed_by_end_of_text(kind, tmp_path, small_pieces, texts):
    source = tmp_path / f"docs.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), source, row_group_size=130)
    elif kind == "txt":
        source.mkdir()
        for n, text in enumerate(texts):
            (source / f"{n:03}.txt").write_text(text, newline="")
    else:
        write_jsonl(source, texts, gzip.open if kind.endswith("gz") else open)
    prepare(source, "--out", tmp_path / "out", "--val_fraction", "0.1")
    end = GPT2.end_of_text
    expected = sorted([*GPT2.encode(text).tolist(), end] for text in texts)
    found = []
    for split in ("train", "val"):
        tokens = ids(tmp_path / "out", split)
        assert tokens[-1] == end
        documents = np.split(tokens, np.flatnonzero(tokens == end)[:-1] + 1)
        assert len(documents) == shards.open_prepared(tmp_path / "out").manifest[split]["documents"]
        found += [d.tolist() for d in documents]
        assert 0.05 < len(documents) / 300 < 0.95
    assert sorted(found) == expected
    manifest = shards.verify(tmp_path / "out").manifest
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["tokens"] == sum(map(len, expected))


def test_characters_are_found_before_the_text_is_tokenized(tmp_path, small_pieces):
    texts = ["abc" * 500, "déf" * 500, "日本" * 500, *(["abc"] * 50)]
    write_jsonl(tmp_path / "docs.jsonl", texts)
    prepare(tmp_path / "docs.jsonl", "--out", tmp_path / "out", "--tokenizer", "char", "--val_fraction", "0.3")
    text = shards.open_prepared(tmp_path / "out").tokenizer
    assert isinstance(text, CharTokenizer)
    assert text.characters == sorted(set("".join(texts)))
    assert len(ids(tmp_path / "out")) + len(ids(tmp_path / "out", "val")) == len("".join(texts))


def test_the_tokenizer_of_a_model_directory_is_used(tmp_path):
    (tmp_path / "text.txt").write_text("abc\ncab\n" * 200)
    prepare(tmp_path / "text.txt", "--out", tmp_path / "one", "--tokenizer", "char")
    (tmp_path / "one" / "config.json").write_text("{}")
    prepare(tmp_path / "text.txt", "--out", tmp_path / "two", "--tokenizer", tmp_path / "one")
    assert ids(tmp_path / "one").tolist() == ids(tmp_path / "two").tolist()
    (tmp_path / "other.txt").write_text("abc\nxyz\n" * 200)
    with pytest.raises(ValueError, match=r"other.txt: character 'x' at position \d+ is not among the 4"):
        prepare(tmp_path / "other.txt", "--out", tmp_path / "three", "--tokenizer", tmp_path / "one")


# ---- processes and kills ----


@pytest.fixture
def corpus(tmp_path, texts):
    write_jsonl(tmp_path / "in.jsonl", texts * 15)
    (tmp_path / "in.txt").write_text("\n".join(texts * 15), newline="")
    return tmp_path


def test_the_number_of_processes_changes_nothing(corpus):
    sources = corpus / "in.jsonl", corpus / "in.txt"
    for workers in (1, 2):
        prepare(*sources, "--out", corpus / f"out{workers}", "--val_fraction", "0.1", workers=workers)
    assert content(corpus / "out1") == content(corpus / "out2")


def test_killed_at_any_write_it_continues_and_ends_the_same(corpus, monkeypatch):
    """In this process: an exception at any write of a whole file ends it, as a kill would."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(preparation, "COMMIT_SECONDS", 0.0)
    arguments = (corpus / "in.jsonl", corpus / "in.txt", "--val_fraction", "0.1", "--shard_tokens", "30000", "--out")
    prepare(*arguments, corpus / "whole")

    class Killed(BaseException):
        pass

    chooser, kills, write = random.Random(1), 0, disk.write_file
    for _ in range(100):
        left = chooser.randrange(30)

        def dying(file, content):
            nonlocal left
            left -= 1
            if left < 0 and chooser.random() < 0.5:
                raise Killed
            write(file, content)
            if left < 0:
                raise Killed

        monkeypatch.setattr(disk, "write_file", dying)
        try:
            prepare(*arguments, corpus / "killed")
            break
        except Killed:
            kills += 1
    assert kills > 3
    assert content(corpus / "killed") == content(corpus / "whole")


@pytest.mark.parametrize("seed", range(2))
def test_killed_by_the_system_it_continues_and_ends_the_same(corpus, seed, texts):
    write_jsonl(corpus / "in.jsonl", texts * 60)
    command = [
        sys.executable,
        str(SCRIPT),
        str(corpus / "in.jsonl"),
        "--val_fraction",
        "0.1",
        "--workers",
        "2",
        "--out",
    ]
    out, chooser = corpus / "killed", random.Random(seed)
    process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not list(out.glob("train-*.bin")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(chooser.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (out / "manifest.json").exists():  # unless it was faster
        with pytest.raises(ValueError, match=r"killed: it is still being prepared \(.* MB are done\)"):
            shards.open_prepared(out)
    prepare(corpus / "in.jsonl", "--val_fraction", "0.1", "--out", out)
    prepare(corpus / "in.jsonl", "--val_fraction", "0.1", "--out", corpus / "whole")
    assert content(out) == content(corpus / "whole")


def test_a_finished_directory_is_left_as_it_is(corpus, capsys):
    arguments = (corpus / "in.txt", "--out", corpus / "out")
    prepare(*arguments)
    before = {file: file.stat().st_mtime_ns for file in (corpus / "out").iterdir()}
    prepare(*arguments)
    assert "prepared already" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in (corpus / "out").iterdir()} == before
    verb.main(["--verify", str(corpus / "out")])
    assert "every checksum is right" in capsys.readouterr().err


def interrupt(corpus, monkeypatch):
    """Begins to prepare the directory `out`, and interrupts it half-way."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(preparation, "COMMIT_SECONDS", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        encode, calls = pieces.encode, []

        def few(*args, **kwargs):
            calls.append(1)
            if len(calls) > 5:
                raise KeyboardInterrupt
            return encode(*args, **kwargs)

        patch.setattr(pieces, "encode", few)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus / "in.txt", "--out", corpus / "out")
    assert list((corpus / "out").glob("train-*.bin"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--shard_tokens", "5000"], r"begun with another shard_tokens 100000000, now 5000; remove .*out, or give"),
        (["--val_fraction", "0.3"], r"begun with another val_fraction 0.005, now 0.3; remove"),
        (["--tokenizer", "char"], r"begun with another tokenizer; remove"),
        (["in.jsonl"], r"begun with input in.jsonl absent, now \d+ bytes; remove"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_arguments_are_refused(change, message, finished, corpus, monkeypatch):
    if finished:
        prepare(corpus / "in.txt", "--out", corpus / "out")
    else:
        interrupt(corpus, monkeypatch)
    change = [corpus / "in.jsonl"] if change == ["in.jsonl"] else change
    with pytest.raises(ValueError, match=message) as caught:
        prepare(corpus / "in.txt", *change, "--out", corpus / "out")
    assert "\n" not in str(caught.value)


def test_changed_input_is_refused(corpus, monkeypatch):
    interrupt(corpus, monkeypatch)
    text = (corpus / "in.txt").read_bytes()
    (corpus / "in.txt").write_bytes(text[:-1] + b"!")
    os.utime(corpus / "in.txt", (1, 1))
    with pytest.raises(ValueError, match=r"in.txt: it has changed since .*out was begun"):
        prepare(corpus / "in.txt", "--out", corpus / "out")
    (corpus / "in.txt").write_bytes(text[:-1])
    with pytest.raises(ValueError, match=r"begun with input in.txt \d+ bytes, now \d+ bytes"):
        prepare(corpus / "in.txt", "--out", corpus / "out")


def test_a_shard_that_lost_tokens_is_named(corpus, monkeypatch):
    interrupt(corpus, monkeypatch)
    os.truncate(corpus / "out" / "train-00000.bin", 10)
    with pytest.raises(ValueError, match=r"train-00000.bin: it has 10 bytes, expected at least \d+: remove .*out"):
        prepare(corpus / "in.txt", "--out", corpus / "out")


def test_a_full_disk_is_one_line_and_the_preparation_continues(corpus, monkeypatch):
    prepare(corpus / "in.txt", "--out", corpus / "whole")
    interrupt(corpus, monkeypatch)

    class Full(FileIO):
        def write(self, content):
            if self.tell() > 50_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content[:5000])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "FileIO", Full)
        with pytest.raises(
            OSError, match=r"No space left on device; run the same command again to continue from \d+ %"
        ) as caught:
            prepare(corpus / "in.txt", "--out", corpus / "out")
    assert caught.value.filename.endswith("train-00000.bin")
    prepare(corpus / "in.txt", "--out", corpus / "out")
    assert content(corpus / "out") == content(corpus / "whole")


def test_two_preparations_of_one_directory_are_refused(corpus):
    (corpus / "out").mkdir()
    with preparation.locked(corpus / "out"):
        with pytest.raises(ValueError, match=r"out: .*out is being prepared by another process"):
            prepare(corpus / "in.txt", "--out", corpus / "out")


# ---- bad input ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"line 41 is not JSON: Expecting ',' delimiter at column \d+"),
        (b'{"body": "a", "id": 1}', r"line 41 has no field 'text' \(there are body, id\); name one with --field"),
        (b'{"text": null}', r"line 41 has null as its field 'text', expected text"),
        (b'{"text": 5}', r"line 41 has 5 as its field 'text', expected text"),
        (b"[1]", r"line 41 is a JSON list, expected an object with the field 'text'"),
        (b'{"text": "\xff"}', r"line 41 is not UTF-8 text \(byte 0xff\)"),
        (b"[" * 100_000, r"line 41 is not JSON that can be read"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_named(line, message, packed, tmp_path, small_pieces):
    name = "docs.jsonl.gz" if packed else "docs.jsonl"
    with (gzip.open if packed else open)(tmp_path / name, "wb") as out:
        out.write(b'{"text": "some words of a document"}\n' * 38 + b"\n\n" + line + b'\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=f"{name}: {message}") as caught:
        prepare(tmp_path / name, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "latin.txt",
            b"line\n" * 1000 + b"caf\xe9 au lait\n" * 2,
            r"latin.txt: line 1001 is not UTF-8 text .byte 0xe9.",
        ),
        ("empty.txt", b"", r"empty.txt: it is empty"),
        ("a.txt.zst", b"x", r"a.txt.zst: of compressed files only .jsonl.gz is read; unpack it"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-9], r"cut.jsonl.gz: not a whole gzip file: "),
        ("not.jsonl.gz", b"{}", r"not.jsonl.gz: not a whole gzip file: "),
        (
            "few.jsonl",
            b'{"text": "a"}\n',
            r"of its 1 documents val_fraction 0.005 leaves none to validate with; remove",
        ),
        ("none.jsonl", b"\n\n", r"of its 0 documents val_fraction 0.005 leaves none"),
    ],
)
def test_bad_input_is_named(name, content, message, tmp_path, small_pieces):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(tmp_path / name, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_missing_input_and_a_directory_with_other_files_are_refused(tmp_path):
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    with pytest.raises(FileNotFoundError, match=r"no file or directory .*none.txt, and as a glob it matches no file"):
        prepare(tmp_path / "none.txt", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no text \(0 other or empty files\)"):
        (tmp_path / "empty").mkdir()
        prepare(tmp_path / "empty", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="holds other files, expected a new directory"):
        prepare(tmp_path / "text.txt", "--out", tmp_path)


def test_parquet_that_can_not_be_read_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "no.parquet").write_bytes(b"PAR1 no")
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "body.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "number.parquet")
    for name, message in {
        "no": "no.parquet: not a parquet file that can be read: ",
        "body": r"body.parquet: it has no column 'text' \(there are body\); name one with --field",
        "null": "null.parquet: text of row 1 is null, expected text",
        "number": "number.parquet: text of row 0 is int, expected text",
    }.items():
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path / f"{name}.parquet", "--out", tmp_path / name)


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a.parquet: parquet needs pyarrow: pip install 'mlxgpt\[parquet\]'"):
        prepare(tmp_path / "a.parquet", "--out", tmp_path / "out")
