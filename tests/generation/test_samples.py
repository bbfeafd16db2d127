"""The Python interface: mlxgpt.load, mlxgpt.sample and mlxgpt.stream."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlxgpt
from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer
from mlxgpt.formats import model_directory
from mlxgpt.generation.samples import Piece, Sample
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    mx.random.seed(5)
    path = tmp_path_factory.mktemp("model") / "m"
    model = GPT(GPTConfig(block_size=16, vocab_size=12, n_layer=1, n_head=2, n_embd=8))
    model.wte.weight = mx.random.normal((12, 8), scale=0.5)
    model_directory.save_model(path, model, CharTokenizer("\nabcdefghi"))  # two ids of padding
    return path


@pytest.fixture(scope="module")
def loaded(directory):
    return mlxgpt.load(directory)


def test_load_gives_the_model_and_its_tokenizer(directory):
    model, tokenizer = mlxgpt.load(str(directory), device="cpu")
    assert (model.config.block_size, tokenizer.vocab_size) == (16, 10)
    assert mx.default_device() == mx.Device(mx.cpu)
    with pytest.raises(FileNotFoundError, match="model: there is no directory"):
        mlxgpt.load(directory / "none")


def test_one_prompt_gives_a_sample(loaded):
    sample = mlxgpt.sample(*loaded, "abc", max_new_tokens=10)
    assert isinstance(sample, Sample)
    assert (sample.prompt, sample.prompt_tokens, sample.finish) == ("abc", [1, 2, 3], "length")
    assert len(sample.text) == len(sample.tokens) == 10
    assert str(sample) == sample.text
    assert sample.logprobs is None


def test_prompts_in_a_batch_give_the_samples_that_they_give_alone(loaded):
    prompts = ["abc", "", "defghia"]
    together = mlxgpt.sample(*loaded, prompts, max_new_tokens=12, temperature=0)
    alone = [mlxgpt.sample(*loaded, prompt, max_new_tokens=12, temperature=0) for prompt in prompts]
    assert together == alone
    assert mlxgpt.sample(*loaded, []) == []


def test_row_n_draws_with_seed_plus_n(loaded):
    rows = mlxgpt.sample(*loaded, ["a"] * 3, max_new_tokens=8, seed=4)
    assert rows[2].text == mlxgpt.sample(*loaded, "a", max_new_tokens=8, seed=6).text
    assert len({row.text for row in rows}) == 3


def test_logprobs_are_the_models(loaded):
    model, tokenizer = loaded
    sample = mlxgpt.sample(model, tokenizer, "ab", max_new_tokens=6, logprobs=True, temperature=0.1, top_k=3)
    ids = [*sample.prompt_tokens, *sample.tokens]
    logits = np.array(model(mx.array([ids], mx.int32)))[0, 1:-1, :10].astype(np.float64)
    expected = (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))[np.arange(6), sample.tokens]
    np.testing.assert_allclose(sample.logprobs, expected, rtol=1e-4)


def test_the_pieces_of_a_stream_make_the_sample(loaded):
    sample = mlxgpt.sample(*loaded, "abc", max_new_tokens=9, logprobs=True, seed=3)
    pieces = list(mlxgpt.stream(*loaded, "abc", max_new_tokens=9, logprobs=True, seed=3))
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == sample.text
    assert [piece.token for piece in pieces] == sample.tokens
    assert [piece.logprob for piece in pieces] == sample.logprobs
    assert [piece.finish for piece in pieces] == [None] * 8 + ["length"]


def test_a_stop_string_ends_a_text_and_is_left_out(loaded):
    whole = mlxgpt.sample(*loaded, "abc", max_new_tokens=30, seed=3)
    stop = whole.text[10:13]  # three tokens
    cut = mlxgpt.sample(*loaded, "abc", max_new_tokens=30, seed=3, stop=stop)
    at = whole.text.index(stop)
    assert (cut.text, cut.finish) == (whole.text[:at], "stop")
    assert cut.tokens == whole.tokens[: at + 3]
    pieces = list(mlxgpt.stream(*loaded, "abc", max_new_tokens=30, seed=3, stop=[stop, "\n\n\n"]))
    assert "".join(piece.text for piece in pieces) == cut.text
    assert pieces[-1].finish == "stop"


def test_text_held_back_comes_with_the_last_piece(loaded):
    whole = mlxgpt.sample(*loaded, "abc", max_new_tokens=12, seed=3)
    never = whole.text[-2:] + "\n\n\n\n"
    *_, last = mlxgpt.stream(*loaded, "abc", max_new_tokens=12, seed=3, stop=never)
    assert (last.text, last.finish) == (whole.text[-2:], "length")


def test_a_text_may_end_when_all_positions_are_taken(loaded):
    sample = mlxgpt.sample(*loaded, ["abc", "a"], on_full="stop", stop="\n\n\n\n\n\n")
    assert [row.finish for row in sample] == ["full", "full"]
    assert [len(row.tokens) for row in sample] == [14, 16]  # the last token takes no position
    pieces = list(mlxgpt.stream(*loaded, "abc", on_full="stop"))
    assert [piece.finish for piece in pieces] == [None] * 13 + ["full"]
    assert "".join(piece.text for piece in pieces) == sample[0].text
    with pytest.raises(ValueError, match="prompt: 17 tokens, at most block_size = 16"):
        mlxgpt.sample(*loaded, "a" * 17, on_full="stop")
    assert len(mlxgpt.sample(*loaded, "a" * 17, max_new_tokens=5).text) == 5


def equal_logits(tokenizer: BPETokenizer) -> GPT:
    """A model whose logits are all equal for any input, so that logit_bias decides."""
    model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=1, n_head=1, n_embd=4))
    model.ln_f.weight, model.ln_f.bias = mx.zeros((4,)), mx.zeros((4,))
    return model


def test_end_of_text_ends_a_sample():
    tokenizer = BPETokenizer.gpt2()
    sample = mlxgpt.sample(equal_logits(tokenizer), tokenizer, "Hi", logit_bias={50256: 1.0}, temperature=0)
    assert (sample.text, sample.tokens, sample.finish) == ("", [], "end_of_text")
    (piece,) = mlxgpt.stream(equal_logits(tokenizer), tokenizer, "Hi", logit_bias={50256: 1.0}, temperature=0)
    assert piece == Piece("", 50256, None, "end_of_text")
    with pytest.raises(ValueError, match="logit_bias: id 50257, expected 0 to 50256"):  # padding
        mlxgpt.sample(equal_logits(tokenizer), tokenizer, "Hi", logit_bias={50257: 1.0})


def test_an_empty_prompt_starts_from_end_of_text():
    tokenizer = BPETokenizer.gpt2()
    sample = mlxgpt.sample(equal_logits(tokenizer), tokenizer, "", max_new_tokens=1)
    assert sample.prompt_tokens == [50256]


def test_a_part_of_a_character_is_held_back():
    tokenizer = BPETokenizer.gpt2()
    first = int(tokenizer.encode("😀")[0])
    assert tokenizer.token_bytes(first) == b"\xf0\x9f\x98"
    pieces = list(
        mlxgpt.stream(
            equal_logits(tokenizer), tokenizer, "Hi", max_new_tokens=3, logit_bias={first: 9.0}, temperature=0
        )
    )
    assert [piece.text for piece in pieces] == ["", "\ufffd", "\ufffd\ufffd"]


def test_padding_is_never_drawn(loaded):
    model, tokenizer = loaded
    sample = mlxgpt.sample(model, tokenizer, "a", max_new_tokens=300, temperature=1000.0)
    assert set(sample.tokens) == set(range(10))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0, expected at least 1"),
        (dict(top_p=0.0), "top_p is 0.0, expected 0 < top_p <= 1"),
        (dict(stop=""), "stop is '', expected at least one character"),
        (dict(stop=["a", "aé"]), "stop: character 'é' at position 1 is not among the 10"),
        (dict(stop="\udcff"), "stop: .*surrogates not allowed"),
    ],
)
def test_rules_name_the_value(loaded, settings, message):
    for function in (mlxgpt.sample, mlxgpt.stream):
        with pytest.raises(ValueError, match=message):
            function(*loaded, "a", **settings)
    with pytest.raises(ValueError, match="prompt: character 'é' at position 0"):
        mlxgpt.sample(*loaded, "é")


def test_an_unknown_option_is_named_with_the_nearest(loaded):
    for function in (mlxgpt.sample, mlxgpt.stream):
        for name, hint in (("temprature", "temperature"), ("max_tokens", "max_new_tokens"), ("stopp", "stop")):
            with pytest.raises(TypeError, match=rf"unknown option '{name}' \(did you mean '{hint}'\?\)"):
                function(*loaded, "a", **{name: 1})


@pytest.mark.parametrize(
    "code",
    [
        "import mlxgpt; print(mlxgpt.sample(*mlxgpt.load(m), 'a', **s)); import mlxgpt.generate as g; g.main",
        "import mlxgpt.generate; print(mlxgpt.sample(*mlxgpt.load(m), 'a', **s)); mlxgpt.generate.main",
        "from mlxgpt import generate, load, sample; generate.main; print(sample(*load(m), 'a', **s))",
        "from mlxgpt import load, stream; print(''.join(p.text for p in stream(*load(m), 'a', **s)))",
    ],
)
def test_the_functions_and_the_command_can_be_imported_in_any_order(run_python, directory, loaded, code):
    result = run_python("-c", f"m, s = {str(directory)!r}, dict(max_new_tokens=5, temperature=0); {code}")
    expected = mlxgpt.sample(*loaded, "a", max_new_tokens=5, temperature=0).text + "\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, expected, "")


def test_importing_the_package_imports_none_of_its_modules(run_python):
    result = run_python("-c", "import mlxgpt, sys; print([m for m in sys.modules if m.startswith('mlxgpt.')])")
    assert result.stdout == "[]\n"
    with pytest.raises(AttributeError, match="has no attribute 'genrate'"):
        mlxgpt.genrate  # noqa: B018
