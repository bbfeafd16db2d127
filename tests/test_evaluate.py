"""python -m mlxgpt.evaluate: its numbers, its output and its error messages."""

from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlxgpt import evaluate
from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer
from mlxgpt.formats import model_directory
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT

CHARACTERS = "\nabcdé€"


def save(directory: Path, tokenizer: CharTokenizer | BPETokenizer, block_size: int = 8, padding: int = 0) -> Path:
    """Saves a model to which all ids are equally likely: log2(V) bits each."""
    shape = dict(block_size=block_size, n_layer=1, n_head=1, n_embd=4)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size + padding, **shape))
    model.wte.weight = mx.zeros(model.wte.weight.shape)
    model_directory.save_model(directory, model, tokenizer)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "m", CharTokenizer(CHARACTERS), padding=1)  # V = 8: 3 bits


def record(capsys, *args: object) -> dict:
    evaluate.main([*map(str, args), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_bits_per_byte_of_characters(capsys, directory, tmp_path):
    (tmp_path / "t.txt").write_text("éa€b\n" * 10, encoding="utf-8")
    said = record(capsys, "--model", directory, "--data", tmp_path / "t.txt", "--stride", 3)
    assert said["tokens"] == 49
    assert said["bytes"] == 10 * (2 + 1 + 3 + 1 + 1) - 2  # without the first character's
    assert said["loss"] == pytest.approx(math.log(8))
    assert said["perplexity"] == pytest.approx(8)
    assert said["bits_per_byte"] == pytest.approx(49 * 3 / 78)
    assert (said["data"], said["split"], said["stride"], said["block_size"]) == ("t", "all", 3, 8)
    assert said["tokens_per_s"] == pytest.approx(49 / said["seconds"])


def test_bits_per_byte_of_byte_pairs_in_documents(capsys, tmp_path):
    """The end-of-text between two documents is predicted too, and has no bytes."""
    tokenizer = BPETokenizer.gpt2()
    texts = ["naïve café, naïve\n", "€ 100 and more", "a third document"]
    (tmp_path / "docs").mkdir()
    for n, text in enumerate(texts):
        (tmp_path / "docs" / f"{n}.txt").write_text(text, encoding="utf-8")
    model = save(tmp_path / "m", tokenizer)
    said = record(capsys, "--model", model, "--data", tmp_path / "docs")
    ids = [tokenizer.encode(text) for text in texts]
    assert said["tokens"] == sum(map(len, ids)) + 2 - 1
    total = sum(len(text.encode()) for text in texts)
    firsts = [len(tokenizer.token_bytes(int(document[0]))) for document in ids]
    assert total - said["bytes"] in firsts
    assert said["bits_per_byte"] == pytest.approx(said["tokens"] * math.log2(50257) / said["bytes"])


def test_a_single_text_is_tokenized_in_one_piece(capsys, tmp_path):
    tokenizer = BPETokenizer.gpt2()
    text = "the internationalization"  # training would cut its last word in two
    (tmp_path / "t.txt").write_text(text)
    model = save(tmp_path / "m", tokenizer)
    assert record(capsys, "--model", model, "--data", tmp_path / "t.txt")["tokens"] == len(tokenizer.encode(text)) - 1


def test_splits_are_the_same_as_in_training(capsys, directory, tmp_path):
    (tmp_path / "t.txt").write_text("abcd\n" * 20)
    flags = ("--model", directory, "--data", tmp_path / "t.txt", "--split")
    assert [record(capsys, *flags, split)["tokens"] for split in ("train", "val", "all")] == [89, 9, 99]


def test_the_lines_without_json(capsys, directory, tmp_path):
    (tmp_path / "t.txt").write_text("éa€b\n" * 10, encoding="utf-8")
    evaluate.main(["--model", str(directory), "--data", str(tmp_path / "t.txt")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"model: {directory}"
    assert lines[1:6] == [
        "data: t, 49 tokens, 78 bytes",
        "windows: of 8 tokens, 4 apart",
        "loss: 2.0794 nats per token",
        "perplexity: 8.0000",
        "bits per byte: 1.8846",
    ]
    assert lines[6].startswith("time: ")


def test_progress_is_shown_on_standard_error_if_that_is_a_terminal(directory, tmp_path):
    (tmp_path / "t.txt").write_text("abcd\n" * 200)
    command = [sys.executable, "-m", "mlxgpt.evaluate", "--model", str(directory), "--data", str(tmp_path / "t.txt")]
    quiet = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert (quiet.stderr, json.loads(quiet.stdout)["tokens"]) == ("", 999)
    main_end, terminal = pty.openpty()
    shown = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, stderr=terminal, text=True, check=True)
    os.close(terminal)
    assert json.loads(shown.stdout)["tokens"] == 999
    assert b"loss 2.0794" in os.read(main_end, 100_000)
    os.close(main_end)


@pytest.mark.parametrize(
    ("text", "args", "status", "message"),
    [
        (b"", [], 1, "t.txt is empty"),
        (b"a", [], 1, "data: 1 tokens, expected at least 2"),
        (b"abxd", [], 1, "data: t does not fit the tokenizer of MODEL: character 'x' at position 2"),
        (b"caf\xe9", [], 1, "t.txt is not UTF-8 text (byte 3 is 0xe9)"),
        (b"abcd", ["--stride", "9"], 1, "stride is 9, expected 1 to block_size = 8"),
        (b"abcd", ["--stride", "0"], 2, "stride is 0, expected at least 1"),
        (b"abcd", ["--batch_size", "0"], 2, "batch_size is 0, expected at least 1"),
        (b"abcd", ["--split", "test"], 2, "split"),
        (b"abcd", ["--model", "nowhere"], 1, "model: there is no directory nowhere"),
        (b"abcd", ["--data", "nowhere.txt"], 1, "data: there is no file or directory nowhere.txt"),
        (b"abcd", ["--strid", "2"], 2, "unknown flag --strid (did you mean 'stride'?)"),
    ],
)
def test_bad_input_is_one_line(directory, tmp_path, text, args, status, message):
    (tmp_path / "t.txt").write_bytes(text)
    flags = {"--model": str(directory), "--data": str(tmp_path / "t.txt")} | dict([args] if args else [])
    command = [sys.executable, "-m", "mlxgpt.evaluate", *(word for flag in flags.items() for word in flag)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (status, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("mlxgpt.evaluate: error: ")
    assert message.replace("MODEL", str(directory)) in line


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model_directory.save_model(
        tmp_path / "m", GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=4)), CharTokenizer("abcd")
    )
    with pytest.raises(ValueError, match="its tokenizer has 4 ids, its model vocab_size = 3"):
        evaluate.main(["--model", str(tmp_path / "m"), "--data", "stdlib"])
