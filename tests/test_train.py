"""Training: the optimizer and schedule, the curve beside PyTorch's, and whole runs from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import golden
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt import checkpoint, kernels, train
from mlxgpt.config import GPTConfig, TrainConfig
from mlxgpt.model import GPT
from mlxgpt.optim import AdamW, learning_rate

TINY = GPTConfig(block_size=16, vocab_size=32, n_layer=2, n_head=2, n_embd=32)
TINY_FLAGS = (
    "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --max_iters 6 --eval_interval 3 "
    "--eval_iters 2 --log_interval 2 --sample_tokens 8"
).split()


def batches(seed: int, n: int, config: GPTConfig = TINY, size: int = 4) -> list[train.Batch]:
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (n, size, config.block_size + 1)).astype(np.int32)
    return [(a[:, :-1], a[:, 1:]) for a in ids]


def weights_of(trainer: train.Trainer) -> dict[str, np.ndarray]:
    return {name: np.array(p) for name, p in tree_flatten(trainer.model.parameters())}


@pytest.fixture
def corpus(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return file


def command(*args: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlxgpt.train", *args], cwd=cwd, capture_output=True, text=True, check=False, **options
    )


def test_the_loss_curve_follows_pytorchs_for_100_steps():
    file = golden.load("curve.npz")
    config = TrainConfig(**golden.CURVE_SCHEDULE, **golden.CURVE_ADAMW, model=GPTConfig(**golden.CURVE_SHAPE))
    model = GPT(config.model)
    model.update(tree_unflatten([(n, mx.array(w)) for n, w in golden.group(file, "weight").items()]))
    trainer = train.Trainer(model, config)
    losses = [trainer.step([batch]).item() for batch in golden.curve_batches(file["tokens"])]
    assert file["losses"][0] - file["losses"][-1] > 1
    assert np.abs(np.array(losses) - file["losses"]).max() < 1e-3


def test_the_schedule_is_nanogpts():
    config = TrainConfig(**golden.CURVE_SCHEDULE)
    assert [learning_rate(config, step) for step in range(100)] == pytest.approx(golden.curve_rates(), rel=1e-12)
    assert learning_rate(TrainConfig(max_iters=100), 1000) == pytest.approx(1e-4)
    assert learning_rate(TrainConfig(decay_lr=False, warmup_iters=4), 900) == 1e-3
    assert learning_rate(TrainConfig(warmup_iters=0, max_iters=1), 0) == 1e-3


def test_one_batch_is_learnt_by_heart():
    trainer = train.Trainer(GPT(TINY), TrainConfig(learning_rate=3e-3, warmup_iters=0, max_iters=200, model=TINY))
    (batch,) = batches(0, 1)
    for _ in range(150):
        loss = trainer.step([batch])
    assert loss.item() < 0.1


def test_only_matrices_decay():
    config = TrainConfig(weight_decay=0.5, learning_rate=0.1, warmup_iters=0, model=TINY)
    model = GPT(TINY)
    before = {name: np.array(p) for name, p in tree_flatten(model.parameters())}
    optimizer = AdamW(config)
    zeros = tree_unflatten([(name, mx.zeros_like(p)) for name, p in tree_flatten(model.parameters())])
    optimizer.update(model, zeros)
    for name, p in tree_flatten(model.parameters()):
        expected = before[name] * (0.95 if before[name].ndim == 2 else 1)
        assert np.abs(np.array(p) - expected).max() < 1e-7, name


def test_accumulated_micro_batches_are_one_large_batch(monkeypatch):
    monkeypatch.setattr(kernels, "_core", None)  # the kernels are tested in test_optim.py
    trainer = train.Trainer(GPT(TINY), TrainConfig(model=TINY))
    seen = []
    monkeypatch.setattr(trainer, "_update", lambda gradients: seen.append(dict(tree_flatten(gradients))))
    parts = batches(1, 3)
    whole = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    losses = [trainer.step(micro_batches).item() for micro_batches in (parts, [whole])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in seen[0].items():
        assert np.abs(np.array(gradient - seen[1][name])).max() < 1e-6, name
        assert mx.abs(gradient).max().item() > 1e-4, name


def test_clipping_bounds_the_gradient(monkeypatch):
    monkeypatch.setattr(kernels, "_core", None)  # the kernels are tested in test_optim.py
    norms = []

    def observe(gradients, limit):
        clipped, norm = train_clip(gradients, limit)
        squares = sum((g * g).sum() for _, g in tree_flatten(clipped))
        norms.append((norm.item(), squares.item() ** 0.5))
        return clipped, norm

    train_clip = train.clip_grad_norm
    monkeypatch.setattr(train, "clip_grad_norm", observe)
    train.Trainer(GPT(TINY), TrainConfig(grad_clip=1e-3, compile=False, model=TINY)).step(batches(2, 1))
    ((before, after),) = norms
    assert before > 0.1
    assert after == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_keeps_float32_weights_and_learns():
    config = TrainConfig(dtype="bfloat16", learning_rate=3e-3, warmup_iters=0, model=TINY)
    trainer = train.Trainer(GPT(TINY), config)
    (batch,) = batches(0, 1)
    losses = [trainer.step([batch]).item() for _ in range(30)]
    assert losses[-1] < losses[0] - 1
    for name, value in weights_of(trainer).items():
        assert value.dtype == np.float32, name
    float32 = train.Trainer(trainer.model, TrainConfig(model=TINY))
    assert trainer.evaluate([batch]) == pytest.approx(float32.evaluate([batch]), rel=0.02)
    assert trainer.evaluate([batch]) != float32.evaluate([batch])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_step_is_the_step(monkeypatch, dtype):
    """What a GPU runs, here on any device: MLX compiles for the CPU too, if a C++ compiler is there."""
    monkeypatch.setattr(kernels, "_core", None)
    model_config = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16)
    start = GPT(model_config).parameters()
    losses = {}
    for compiled in (False, True):
        model = GPT(model_config)
        model.update(start)
        config = TrainConfig(compile=compiled, learning_rate=1e-2, warmup_iters=2, dtype=dtype, model=model_config)
        monkeypatch.setattr(train, "_compiles", lambda config: config.compile)
        trainer = train.Trainer(model, config)
        losses[compiled] = [trainer.step(batches(n, 2, model_config)).item() for n in range(6)]
        losses[compiled].append(trainer.evaluate(batches(9, 1, model_config)))
    assert losses[True] == pytest.approx(losses[False], rel=1e-4 if dtype == "float32" else 2e-2)
    assert len(set(losses[True])) == 7


def test_compiled_dropout_draws_anew_at_each_step(monkeypatch):
    monkeypatch.setattr(kernels, "_core", None)
    monkeypatch.setattr(train, "_compiles", lambda config: True)
    model_config = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    config = TrainConfig(learning_rate=1e-12, warmup_iters=0, model=model_config)
    trainer = train.Trainer(GPT(model_config), config)
    (batch,) = batches(0, 1, model_config)
    assert len({trainer.step([batch]).item() for _ in range(5)}) == 5
    assert len({trainer.evaluate([batch]) for _ in range(3)}) == 1


def test_a_run_writes_what_it_says(corpus, tmp_path):
    result = command("--data", str(corpus), "--out_dir", "run", *TINY_FLAGS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == ["best", "last", "loss.png", "metrics.jsonl", "settings.toml"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 6]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6]
    assert {"loss", "lr", "tokens_per_s"} <= lines[1].keys()
    val = [line["val_loss"] for line in lines if "val_loss" in line]
    assert val[-1] < val[0]
    assert f"step 6: validation loss {val[-1]:.4f}" in result.stdout
    assert "ETA" in result.stdout
    assert "loss.png" in result.stdout
    model = checkpoint.load_model(run / "last")
    assert model.config.vocab_size == len(set(corpus.read_text()))


def test_the_same_run_gives_the_same_numbers(corpus, tmp_path):
    flags = ["--data", str(corpus), "--device", "cpu", *TINY_FLAGS]  # a GPU adds gradients of embeddings in any order
    for out_dir in ("a", "b"):
        assert command(*flags, "--out_dir", out_dir, cwd=tmp_path).returncode == 0
    repeat = command("--config", "a/settings.toml", "--out_dir", "c", cwd=tmp_path)
    assert repeat.returncode == 0, repeat.stderr

    def losses(name):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [line.get("loss", line.get("val_loss")) for line in lines]

    assert losses("a") == losses("b") == losses("c")


def test_the_best_model_is_kept_when_later_ones_are_worse(corpus, tmp_path, monkeypatch):
    values = iter([3.0, 2.0, 1.0, 2.5])
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self, batches: next(values))
    monkeypatch.chdir(tmp_path)
    train.main(["--data", str(corpus), "--out_dir", "run", *TINY_FLAGS, "--max_iters", "9"])
    best, last = (checkpoint.load_model(tmp_path / "run" / name) for name in ("best", "last"))
    assert not mx.array_equal(best.wte.weight, last.wte.weight).item()
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["val_loss"] for line in lines if "val_loss" in line] == [3.0, 2.0, 1.0, 2.5]


def test_a_model_that_has_diverged_is_not_saved(corpus, tmp_path, monkeypatch):
    values = iter([3.0, 2.0, float("nan")])
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self, batches: next(values))
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(corpus), "--out_dir", "run", *TINY_FLAGS, "--log_interval", "100"]
    with pytest.raises(ValueError, match=r"the loss is nan at step 6.* \(the model of step 3 is kept\)"):
        train.main(flags)
    best, last = (checkpoint.load_model(tmp_path / "run" / name) for name in ("best", "last"))
    assert mx.array_equal(best.wte.weight, last.wte.weight).item()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_out_dir_is_not_overwritten_unasked(corpus, tmp_path):
    flags = ["--data", str(corpus), *TINY_FLAGS]
    for expected in ("runs/cpu", "runs/cpu-2"):
        assert command(*flags, "--preset", "cpu", cwd=tmp_path).returncode == 0
        assert (tmp_path / expected / "best").is_dir()
    again = command(*flags, "--out_dir", "runs/cpu", cwd=tmp_path)
    assert again.returncode == 1
    assert "out_dir: runs/cpu already holds a run; give another, or --overwrite" in again.stderr
    assert command(*flags, "--out_dir", "runs/cpu", "--overwrite", cwd=tmp_path).returncode == 0


def test_ctrl_c_saves_and_ends(corpus, tmp_path):
    flags = [*TINY_FLAGS, "--max_iters", "1000000", "--eval_interval", "1000000", "--log_interval", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxgpt.train", "--data", str(corpus), "--out_dir", "run", *flags],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped after" in out
    assert checkpoint.load_model(tmp_path / "run" / "last").config.n_layer == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--block_size", "4000"], "fewer than block_size + 1 = 4001"),
        (["--vocab_size", "5"], "vocab_size is 5, expected at least the tokenizer's 28"),
        (["--device", "gpu"], "device is gpu, but MLX has no GPU here"),
        (["--out_dir", "text.txt/run"], "out_dir: text.txt/run can't be made: Not a directory"),
        (["--out_dir", "text.txt"], "out_dir: text.txt can't be made: File exists"),
        (["--n_embd", "1000000"], "parameters take"),
        (["--data", ""], "data: the name is empty"),
        (["--data", os.devnull], "neither a regular file nor a directory"),
        (["--learning_rate", "1e30", "--warmup_iters", "0", "--grad_clip", "0"], "training has diverged"),
    ],
)
def test_bad_input_is_one_line(corpus, tmp_path, args, message):
    if "gpu" in args and mx.is_available(mx.gpu):
        pytest.skip("MLX has a GPU here")
    result = command("--data", "text.txt", "--out_dir", "run", *TINY_FLAGS, *args, cwd=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert message in line


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_an_out_dir_that_cant_be_written(corpus, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("permissions do not bind this user")
    result = command("--data", str(corpus), "--out_dir", "closed/run", *TINY_FLAGS, cwd=tmp_path)
    assert result.returncode == 1
    assert "closed/run can't be made: Permission denied" in result.stderr
    assert not list(closed.iterdir())


def test_a_padded_vocabulary_is_kept(corpus, tmp_path):
    result = command("--data", str(corpus), "--out_dir", "run", *TINY_FLAGS, "--vocab_size", "64", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert checkpoint.load_model(tmp_path / "run" / "last").config.vocab_size == 64
