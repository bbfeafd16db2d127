"""python -m mlxgpt.evaluate, against a float64 computation of each token by itself."""

from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import golden
import mlx.core as mx
import numpy as np
import pytest
import reference
from mlx.utils import tree_unflatten

from mlxgpt import evaluate
from mlxgpt.cpu import extension
from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer
from mlxgpt.formats import model_directory as checkpoint
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT

T, V = golden.SHAPE["block_size"], golden.SHAPE["vocab_size"]
TOKENS = np.random.default_rng(7).integers(0, V, 45).astype(np.uint8)
CHARACTERS = "\nabcdé€"


def model_with(weights: dict[str, np.ndarray], config: GPTConfig) -> GPT:
    model = GPT(config)
    model.update(tree_unflatten([(name, mx.array(np.asarray(w))) for name, w in weights.items()]))
    return model


@pytest.fixture
def model() -> GPT:
    rng = np.random.default_rng(3)
    drawn = GPT(GPTConfig(**golden.SHAPE)).named_weights()
    weights = {name: np.array(w) + rng.normal(0, 0.3, w.shape).astype(np.float32) for name, w in drawn.items()}
    return model_with(weights, GPTConfig(**golden.SHAPE))


@pytest.fixture(params=["kernels", "mlx"])
def backend(request, switch_off_kernels):
    if request.param == "mlx":
        switch_off_kernels()
    elif not extension.available():
        pytest.skip("without the extension, or on a GPU")


def naive(model: GPT, tokens: np.ndarray, stride: int) -> list[float]:
    """-log p of each token but the first, from the context that its window gives it."""
    weights = {name: np.array(w.astype(mx.float32)) for name, w in model.named_weights().items()}
    shape = (model.config.n_layer, model.config.n_head, False)
    losses = []
    for at in range(1, len(tokens)):
        window = max(0, math.ceil((at - T) / stride))  # the first one that reaches it
        context = tokens[None, window * stride : at].astype(int)
        logits = reference.gpt_loss_and_gradients(
            weights, *shape, context, np.zeros_like(context), model.config.layer_norm_epsilon
        )[0][0, -1]
        losses.append(float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[at]]))
    return losses


@pytest.mark.parametrize("stride", [1, 5, T // 2, T])
@pytest.mark.parametrize("n", [2, 5, T + 1, T + 2, 45])
def test_every_token_but_the_first_is_predicted_once(backend, model, n, stride):
    expected = naive(model, TOKENS[:n], stride)
    result = evaluate.evaluate(model, TOKENS[:n], stride=stride, batch_size=3)
    assert result.loss == pytest.approx(np.mean(expected), rel=2e-6)
    assert result.nats == pytest.approx(sum(expected), rel=2e-6)
    assert result.tokens == n - 1
    assert result.counts.tolist() == np.bincount(TOKENS[1:n], minlength=V).tolist()
    assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 5, T // 2, T])
def test_windows_give_each_token_the_context_that_the_stride_promises(stride):
    tokens = np.arange(100)
    context = {}
    for ids, targets in evaluate.windows(tokens, T, stride):
        assert ids.shape == targets.shape == (T,)
        for at in np.flatnonzero(targets >= 0):
            assert ids[: at + 1].tolist() == list(range(ids[0], targets[at]))
            assert targets[at] not in context
            context[int(targets[at])] = at + 1
    assert list(context) == list(range(1, 100))
    assert all(n >= min(token, T - stride + 1) for token, n in context.items())


def test_a_stride_is_half_the_model_unless_given_and_more_context_is_other_context(model):
    losses = {stride: evaluate.evaluate(model, TOKENS, stride=stride).loss for stride in (None, 1, T // 2, T)}
    assert losses[None] == losses[T // 2]
    assert len(set(losses.values())) == 3


def test_batches_of_any_size_say_the_same(backend, model):
    losses = [evaluate.evaluate(model, TOKENS, stride=5, batch_size=size).loss for size in (1, 2, 7, 100)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


@pytest.mark.parametrize("storage", [mx.float16, mx.bfloat16, 8, 4])
def test_matrices_stored_in_less_are_evaluated_as_they_are(backend, storage):
    model = GPT(GPTConfig(**{**golden.SHAPE, "n_head": 2, "n_embd": 32}))
    modules = [model.wte] + [m for b in model.h for m in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)]
    read = {}  # what is read of each matrix, by the same names as its parameter
    for module in modules:
        module.weight = module.weight + mx.random.normal(module.weight.shape, scale=0.3)
    for name, w in model.named_weights().items():
        if w.ndim == 2 and name != "wpe.weight":
            parts = None if isinstance(storage, mx.Dtype) else mx.quantize(w, 32, storage)
            read[name] = mx.dequantize(*parts, 32, storage) if parts else w.astype(storage).astype(mx.float32)
    expected = np.mean(naive(model_with(model.named_weights() | read, model.config), TOKENS, 6))
    assert abs(expected - evaluate.evaluate(model, TOKENS).loss) > 1e-5
    for module in modules:
        if isinstance(storage, mx.Dtype):
            module.weight = module.weight.astype(storage)
        else:
            module.weight, module.scales, module.biases = mx.quantize(module.weight, 32, storage)
            module.group_size = 32
    result = evaluate.evaluate(model, TOKENS).loss
    assert result == pytest.approx(expected, rel=5e-3 if storage == mx.bfloat16 and not extension.available() else 1e-5)


def test_dropout_is_not_left_on():
    model = GPT(GPTConfig(**golden.SHAPE, dropout=0.5))
    model.train()
    assert evaluate.evaluate(model, TOKENS).loss == evaluate.evaluate(model, TOKENS).loss


def test_what_is_told_as_it_goes_on_is_the_whole(model):
    told = []
    result = evaluate.evaluate(model, TOKENS, batch_size=2, done=lambda *part: told.append(part))
    assert len(told) > 2
    assert sum(tokens for tokens, _ in told) == result.tokens
    assert sum(nats for _, nats in told) == pytest.approx(result.nats)


@pytest.mark.parametrize(
    ("tokens", "stride", "message"),
    [
        ([], None, "data: 0 tokens, expected at least 2"),
        ([1], None, "data: 1 tokens, expected at least 2"),
        ([1, 2], 0, "stride is 0, expected 1 to block_size = 12"),
        ([1, 2], 13, "stride is 13, expected 1 to block_size = 12"),
    ],
)
def test_bad_arguments_are_named(model, tokens, stride, message):
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(model, np.array(tokens, np.int32), stride=stride)


def test_a_loss_that_is_not_finite_is_an_error(model):
    model.ln_f.weight = mx.full(model.ln_f.weight.shape, 3e38)
    with pytest.raises(ValueError, match=r"model: the loss is (nan|inf) after 0 tokens, expected a finite number"):
        evaluate.evaluate(model, TOKENS)


# ---- the command ----


def save(directory: Path, tokenizer: CharTokenizer | BPETokenizer, block_size: int = 8, padding: int = 0) -> Path:
    """A model that finds all ids equally likely, log2(V) bits each."""
    shape = dict(block_size=block_size, n_layer=1, n_head=1, n_embd=4)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size + padding, **shape))
    model.wte.weight = mx.zeros(model.wte.weight.shape)
    checkpoint.save_model(directory, model, tokenizer)
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


def test_splits_are_those_of_training(capsys, directory, tmp_path):
    (tmp_path / "t.txt").write_text("abcd\n" * 20)
    flags = ("--model", directory, "--data", tmp_path / "t.txt", "--split")
    assert [record(capsys, *flags, split)["tokens"] for split in ("train", "val", "all")] == [89, 9, 99]


def test_a_screen_for_people(capsys, directory, tmp_path):
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


def test_progress_is_for_a_terminal_on_standard_error(directory, tmp_path):
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
    checkpoint.save_model(
        tmp_path / "m", GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=4)), CharTokenizer("abcd")
    )
    with pytest.raises(ValueError, match="its tokenizer has 4 ids, its model vocab_size = 3"):
        evaluate.main(["--model", str(tmp_path / "m"), "--data", "stdlib"])
