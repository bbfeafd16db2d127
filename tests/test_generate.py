"""python -m mlxgpt.generate, on a small model directory."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlxgpt import generate
from mlxgpt.common import cli
from mlxgpt.common.settings import settings
from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer
from mlxgpt.formats import model_directory
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    mx.random.seed(5)
    path = tmp_path_factory.mktemp("model") / "m"
    model = GPT(GPTConfig(block_size=8, vocab_size=12, n_layer=1, n_head=2, n_embd=8))
    model.wte.weight = mx.random.normal((12, 8), scale=0.5)
    model_directory.save_model(path, model, CharTokenizer("\nabcdefghi"))  # two ids of padding
    return path


def text(capsys, *args: str) -> str:
    generate.main([str(a) for a in args])
    return capsys.readouterr().out


def test_the_prompt_is_continued(capsys, directory):
    out = text(capsys, "--model", directory, "--prompt", "abc", "--max_new_tokens", 40)
    assert out.startswith("abc")
    assert len(out) == 3 + 40 + 1  # past block_size, and a line break at the end


def test_same_seed_same_text(capsys, directory):
    flags = ("--model", directory, "--prompt", "abc", "--max_new_tokens", 30, "--seed")
    assert text(capsys, *flags, 1) == text(capsys, *flags, 1) != text(capsys, *flags, 2)


def test_greedy_and_top_k_1_agree(capsys, directory):
    flags = ("--model", directory, "--prompt", "a", "--max_new_tokens", 20)
    assert text(capsys, *flags, "--temperature", 0) == text(capsys, *flags, "--top_k", 1)


def test_samples_differ_and_have_a_line_between_them(capsys, directory):
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
    model_directory.save_model(tmp_path / "m", model, BPETokenizer.gpt2())
    out = text(capsys, "--model", tmp_path / "m", "--prompt", "Hello", "--temperature", 0)
    assert out == "Hello\n"


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=4))
    model_directory.save_model(tmp_path / "m", model, CharTokenizer("abcd"))
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
        (["--top_p", "0"], 2, "top_p is 0.0, expected 0 < top_p <= 1"),
        (["--top_p", "1.1"], 2, "top_p is 1.1, expected 0 < top_p <= 1"),
        (["--min_p", "2"], 2, "min_p is 2.0"),
        (["--repetition_penalty", "0"], 2, "repetition_penalty is 0.0, expected a finite number above 0"),
        (["--logit_bias", "3"], 2, "logit_bias is '3', expected ID:BIAS,ID:BIAS"),
        (["--logit_bias", "3:1,10:2"], 1, "logit_bias: id 10, expected 0 to 9"),
        (["--stop", "xa"], 1, "stop: character 'x' at position 0 is not among the 10"),
        (["--stop", ""], 1, "stop is '', expected at least one character"),
        (["--stop", r"\q"], 2, r"stop: unknown escape \q, expected \n, \t"),
        (["--stop", r"\xff"], 2, r"stop is '\\xff', expected UTF-8"),
        (["--stop"], 2, "--stop has no value"),
        (["--prompt", "abcabcabc", "--on_full", "stop"], 1, "prompt: 9 tokens, at most block_size = 8"),
        (["--on_full", "fly"], 2, "fly"),
        (["--prompt", "a", "--prompts", "f"], 2, "prompts is 'f', expected none beside a prompt"),
        (["--prompts", "no-such-file"], 1, "no-such-file"),
        (["--prompts", os.devnull], 1, "is empty, expected a prompt a line"),
        (["--draft", "no-such-dir"], 1, "draft: there is no directory no-such-dir"),
        (["--draft_tokens", "0"], 2, "draft_tokens is 0"),
    ],
)
def test_bad_input_is_one_line(directory, args, status, message):
    command = [sys.executable, "-m", "mlxgpt.generate", "--model", str(directory), *args]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (status, "")
    (line,) = result.stderr.splitlines()
    assert message in line


def test_a_bad_value_is_named_as_in_python(directory):
    """Although the sampler's settings stand in a dataclass within a dataclass within the command's."""
    with pytest.raises(cli.UsageError, match=r"^temperature is -1\.0, expected at least 0$"):
        generate.main(["--model", str(directory), "--temperature", "-1"])
    with pytest.raises(cli.UsageError, match=r"^draft_tokens is 0, expected at least 1$"):
        generate.main(["--model", str(directory), "--draft_tokens", "0"])
    with pytest.raises(cli.UsageError, match=r"^logit_bias is '3', expected ID:BIAS,ID:BIAS$"):
        generate.main(["--model", str(directory), "--logit_bias", "3"])


def test_every_setting_is_a_flag(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    text = capsys.readouterr().out
    for name in settings(generate.SampleConfig):
        assert f"--{name}" in text


def test_a_closed_pipe_ends_the_command_without_a_message(directory):
    command = f"{sys.executable} -m mlxgpt.generate --model {directory} --max_new_tokens 100000 | head -c 20"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=60)
    assert len(result.stdout) == 20
    assert result.stderr == ""


@pytest.fixture
def command(directory):
    """Runs the command in a process of its own -> its stdout and stderr."""

    def run(*args: object, text_in: str = "", status: int = 0) -> tuple[str, str]:
        words = [sys.executable, "-m", "mlxgpt.generate", "--model", str(directory), *map(str, args)]
        result = subprocess.run(words, input=text_in, capture_output=True, text=True, check=False, timeout=100)
        assert result.returncode == status, result.stderr
        return result.stdout, result.stderr

    return run


def test_standard_input_is_the_prompt(capsys, directory, command):
    flags = ("--max_new_tokens", 5, "--temperature", 0)
    expected = text(capsys, "--model", directory, "--prompt", "ab\nc", *flags)
    assert command("--prompt", "-", *flags, text_in="ab\nc\n") == (expected, "")
    assert expected.startswith("ab\nc")


def test_a_prompt_may_look_like_a_flag(capsys, tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    model_directory.save_model(tmp_path / "m", model, CharTokenizer("\n-=ab"))
    out = text(capsys, "--model", tmp_path / "m", "--prompt", "--a=b", "--max_new_tokens", 1, "--stop", "--")
    assert out.startswith("--a=b")


def test_several_stop_strings_with_escapes(capsys, directory):
    flags = ("--model", directory, "--prompt", "abc", "--max_new_tokens", 200, "--seed", 3)
    whole = text(capsys, *flags)[3:]
    stops = ["\n", whole[20:23]]
    end = min(whole.find(stop) for stop in stops if stop in whole)
    out = text(capsys, *flags, "--stop", r"\n", "--stop=" + stops[1].replace("\n", r"\x0a"))
    assert out == "abc" + whole[:end] + "\n"


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_json_of_several_samples(capsys, directory):
    flags = ("--model", directory, "--prompt", "abc", "--num_samples", 3, "--max_new_tokens", 6)
    lines = records(text(capsys, *flags, "--json", "--logprobs"))
    plain = text(capsys, *flags).removesuffix("\n").split("\n---------------\n")
    assert [line["prompt"] + line["text"] for line in lines] == plain
    for line in lines:
        assert list(line) == ["prompt", "text", "tokens", "logprobs", "finish"]
        assert (len(line["tokens"]), len(line["logprobs"]), line["finish"]) == (6, 6, "length")
        assert all(logprob < 0 for logprob in line["logprobs"])
    (line,) = records(text(capsys, *flags[:4], "--max_new_tokens", 30, "--json", "--on_full", "stop", "--verbose"))
    assert (line["finish"], line["prompt_tokens"], len(line["tokens"])) == ("full", 3, 6)
    assert 0 < line["seconds_to_first_token"] < line["seconds"]


def test_logprobs_are_printed_below_the_sample(capsys, directory):
    flags = ("--model", directory, "--prompt", "ab", "--max_new_tokens", 3, "--logprobs")
    sample, *tokens = text(capsys, *flags).rsplit("\n", 4)[:4]
    assert [eval(line.split()[1]) for line in tokens] == list(sample[2:])
    (line,) = records(text(capsys, *flags, "--json"))
    assert [float(row.split()[0]) for row in tokens] == pytest.approx(line["logprobs"], abs=1e-4)


def test_a_file_of_prompts_gives_the_same_samples_in_any_batch_size(capsys, directory, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"abc\r\n\ndef\nabcdefghi\n")
    flags = (
        "--model",
        directory,
        "--prompts",
        file,
        "--num_samples",
        2,
        "--max_new_tokens",
        5,
        "--temperature",
        4,
        "--json",
    )
    lines = records(text(capsys, *flags, "--batch_size", 8))
    assert [line["prompt"] for line in lines] == [p for p in ("abc", "", "def", "abcdefghi") for _ in range(2)]
    assert records(text(capsys, *flags, "--batch_size", 1)) == lines
    assert lines[0]["text"] != lines[1]["text"]
    plain = text(capsys, *flags[:-1]).removesuffix("\n").split("\n---------------\n")
    assert plain == [line["prompt"] + line["text"] for line in lines]


def test_a_bad_prompt_is_named_by_its_line(directory, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("abc\nabz\n")
    with pytest.raises(ValueError, match="prompts: line 2: character 'z' at position 2"):
        generate.main(["--model", str(directory), "--prompts", str(file)])
    file.write_bytes(b"abc\n\xff")
    with pytest.raises(ValueError, match=r"prompts: .*prompts\.txt is not UTF-8 at byte 4"):
        generate.main(["--model", str(directory), "--prompts", str(file)])


def test_a_cropped_prompt_is_reported(capsys, directory):
    generate.main(["--model", str(directory), "--prompt", "a" * 11, "--max_new_tokens", "2"])
    error = capsys.readouterr().err
    assert error == "mlxgpt.generate: prompt: of 11 tokens the model sees the last 8 (block_size)\n"


def test_verbose_ends_with_times_on_standard_error(command):
    out, error = command("--prompt", "abc", "--max_new_tokens", 20, "--verbose")
    assert len(out) == 24
    first, second = error.splitlines()
    start, prompt = (float(part.split(" s ")[0]) for part in first.split("first token ")[1].split(", "))
    assert "3 prompt tokens" in first
    assert 0 < prompt < start < 60
    assert float(second.split("20 tokens, ")[1].split(" tokens/s")[0]) > 0
    assert int(second.split("peak memory ")[1].removesuffix(" MB").replace(",", "")) > 20


@pytest.mark.parametrize("flags", [(), ("--json",), ("--json", "--num_samples", "2")])
def test_ctrl_c_prints_the_samples_so_far(directory, heeds_ctrl_c, flags):
    words = [sys.executable, "-u", "-m", "mlxgpt.generate", "--model", str(directory), "--prompt", "abc", *flags]
    master, terminal = pty.openpty()  # the progress bar on standard error shows that sampling has begun
    words += ["--max_new_tokens", "10000000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=terminal, text=True) as process:
        assert process.stdout is not None
        head = process.stdout.read(20) if not flags else os.read(master, 1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out = process.stdout.read()
    os.close(terminal)
    os.close(master)
    assert process.returncode == 130
    if flags:
        lines = records(out)
        assert len(lines) == (2 if "--num_samples" in flags else 1)
        assert all(line["finish"] == "interrupted" and line["tokens"] for line in lines)
        assert all(len(line["text"]) == len(line["tokens"]) for line in lines)
    else:
        assert str(head).startswith("abc")
        assert out.endswith("\n")


def test_a_draft_of_another_vocabulary_is_refused(directory, tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=12, n_layer=1, n_head=1, n_embd=4))
    model_directory.save_model(tmp_path / "m", model, CharTokenizer("\nabcdefgh!"))
    with pytest.raises(ValueError, match=r"draft: .* has another vocabulary than "):
        generate.main(["--model", str(directory), "--draft", str(tmp_path / "m")])


def test_a_quantized_file_of_unknown_bits_is_refused(directory, tmp_path):
    model = tmp_path / "m"
    model.mkdir()
    config = json.loads((directory / "config.json").read_text())
    config["quantization"] = {"bits": 7, "group_size": 64}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantization\.bits is 7, expected 2 or 3 or 4 or 5 or 6 or 8"):
        generate.main(["--model", str(model)])
