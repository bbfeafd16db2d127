"""python -m mlxgpt.generate, on a small model directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlxgpt import checkpoint, generate
from mlxgpt.config import GPTConfig
from mlxgpt.model import GPT
from mlxgpt.tokenizer import BPETokenizer, CharTokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    mx.random.seed(5)
    path = tmp_path_factory.mktemp("model") / "m"
    model = GPT(GPTConfig(block_size=8, vocab_size=12, n_layer=1, n_head=2, n_embd=8))
    model.wte.weight = mx.random.normal((12, 8), scale=0.5)
    checkpoint.save_model(path, model, CharTokenizer("\nabcdefghi"))  # two ids of padding
    return path


def text(capsys, *args: str) -> str:
    generate.main([str(a) for a in args])
    return capsys.readouterr().out


def test_the_prompt_goes_on(capsys, directory):
    out = text(capsys, "--model", directory, "--prompt", "abc", "--max_new_tokens", 40)
    assert out.startswith("abc")
    assert len(out) == 3 + 40 + 1  # past block_size, and a line break at the end


def test_same_seed_same_text(capsys, directory):
    flags = ("--model", directory, "--prompt", "abc", "--max_new_tokens", 30, "--seed")
    assert text(capsys, *flags, 1) == text(capsys, *flags, 1) != text(capsys, *flags, 2)


def test_greedy_and_top_k_1_agree(capsys, directory):
    flags = ("--model", directory, "--prompt", "a", "--max_new_tokens", 20)
    assert text(capsys, *flags, "--temperature", 0) == text(capsys, *flags, "--top_k", 1)


def test_samples_differ_and_are_set_apart(capsys, directory):
    out = text(capsys, "--model", directory, "--num_samples", 3, "--max_new_tokens", 20)
    samples = out.split("\n---------------\n")
    assert len(samples) == len(set(samples)) == 3


def test_an_empty_prompt_starts_from_a_line_break(capsys, directory):
    assert len(text(capsys, "--model", directory, "--max_new_tokens", 5)) == 6


def test_end_of_text_ends_the_sample_and_is_not_printed(capsys, tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=50257, n_layer=1, n_head=1, n_embd=4))
    model.ln_f.weight = mx.zeros((4,))
    model.ln_f.bias = mx.ones((4,))
    model.wte.weight[50256] = 1  # always the most likely
    checkpoint.save_model(tmp_path / "m", model, BPETokenizer.gpt2())
    out = text(capsys, "--model", tmp_path / "m", "--prompt", "Hello", "--temperature", 0)
    assert out == "Hello\n"


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=4))
    checkpoint.save_model(tmp_path / "m", model, CharTokenizer("abcd"))
    with pytest.raises(ValueError, match="its tokenizer has 4 ids, its model vocab_size = 3"):
        generate.main(["--model", str(tmp_path / "m")])


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--prompt", "aé"], 1, "prompt: character 'é' at position 1 is not among the 10"),
        (["--temperature", "-1"], 2, "temperature is -1.0, expected at least 0"),
        (["--max_new_tokens", "0"], 2, "max_new_tokens is 0"),
        (["--top-k", "x"], 2, "top"),
        (["--promt", "a"], 2, "unknown flag --promt (did you mean 'prompt'?)"),
    ],
)
def test_bad_input_is_one_line(directory, args, status, message):
    command = [sys.executable, "-m", "mlxgpt.generate", "--model", str(directory), *args]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (status, "")
    (line,) = result.stderr.splitlines()
    assert message in line


def test_a_reader_that_goes_away_ends_it_quietly(directory):
    command = f"{sys.executable} -m mlxgpt.generate --model {directory} --max_new_tokens 100000 | head -c 20"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=60)
    assert len(result.stdout) == 20
    assert result.stderr == ""
