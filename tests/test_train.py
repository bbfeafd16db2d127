"""Training: the optimizer and schedule, the curve beside PyTorch's, and whole runs from the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import golden
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt import checkpoint, cli, kernels, train
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


def main(*args: str) -> None:
    train.main(["--device", "cpu", *args])


def curve(run: Path) -> dict[int, float]:
    """Validation losses by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    assert len(dict(losses)) == len(losses)
    return dict(losses)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def half(corpus, tmp_path, monkeypatch) -> Path:
    """A run of 6 steps, on a schedule of 12."""
    monkeypatch.chdir(tmp_path)
    main(
        "--data",
        str(corpus),
        "--out_dir",
        "half",
        *TINY_FLAGS,
        "--lr_decay_iters",
        "12",
        "--learning_rate",
        "0.01",
        "--warmup_iters",
        "2",
    )
    return tmp_path / "half"


@pytest.mark.parametrize("kernels_there", [True, False])
def test_a_run_that_is_resumed_is_the_run_that_was_not(corpus, half, tmp_path, monkeypatch, kernels_there):
    if not kernels_there:
        monkeypatch.setattr(kernels, "_core", None)
    flags = [*TINY_FLAGS, "--learning_rate", "0.01", "--warmup_iters", "2", "--gradient_accumulation_steps", "2"]
    main("--data", str(corpus), "--out_dir", "whole", *flags, "--max_iters", "12")
    main("--data", str(corpus), "--out_dir", "half", *flags, "--lr_decay_iters", "12", "--overwrite")
    first = curve(half)
    best = min((loss, step) for step, loss in first.items() if step)
    with open(half / "metrics.jsonl", "a") as file:  # what a run that was killed leaves behind
        file.write('{"step": 8, "loss": 1.0, "lr": 0.1, "tokens_per_s": 1.0}\n{"step": 9, "lo')
    main("--resume", "half", "--max_iters", "12")
    assert curve(half) == curve(tmp_path / "whole")
    assert list(curve(half)) == [0, 3, 6, 9, 12]
    assert min(loss for step, loss in curve(half).items() if step > 6) < best[0]
    for model in ("last", "best"):
        ours, theirs = files(half / model), files(tmp_path / "whole" / model)
        ours.pop("training.json", None), theirs.pop("training.json", None)  # they differ in lr_decay_iters alone
        assert ours == theirs
    assert "resume =" not in (half / "settings.toml").read_text()


def test_a_best_model_outlives_a_resumption_that_finds_no_better(half, monkeypatch):
    best = files(half / "best")
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self, batches: 50.0)
    main("--resume", "half/last", "--max_iters", "9")
    assert files(half / "best") == best
    record = json.loads((half / "last" / "training.json").read_text())
    assert record["step"] == 9
    assert record["best_val_loss"] == min(loss for step, loss in curve(half).items() if step)


def test_a_resumed_run_may_go_elsewhere(half, tmp_path):
    before = files(half)
    main("--resume", "half", "--max_iters", "9", "--out_dir", "other", "--learning_rate", "0.02", "--dropout", "0.1")
    assert files(half) == before
    assert list(curve(tmp_path / "other")) == [6, 9]
    assert curve(tmp_path / "other")[6] == curve(half)[6]
    record = json.loads((tmp_path / "other" / "last" / "training.json").read_text())
    kept = json.loads((half / "last" / "training.json").read_text())["settings"]
    assert record["settings"] == kept | {"max_iters": 9, "learning_rate": 0.02}
    assert checkpoint.load_model(tmp_path / "other" / "best").config.dropout == 0.1


def test_a_run_may_start_from_a_model(half, corpus, tmp_path):
    flags = ["--batch_size", "4", "--eval_iters", "2", "--sample_tokens", "0"]
    main("--init_from", "half/last", "--data", str(corpus), "--out_dir", "tuned", "--max_iters", "3", *flags)
    assert curve(tmp_path / "tuned")[0] == curve(half)[6]
    record = json.loads((tmp_path / "tuned" / "last" / "training.json").read_text())
    assert record["step"] == 3
    (tmp_path / "few.txt").write_text("the lazy dog\n" * 40)
    flags += ["--block_size", "8", "--dropout", "0.1", "--max_iters", "1"]
    main("--init_from", "half", "--data", "few.txt", "--out_dir", "cropped", *flags)
    start, config = checkpoint.load_model(half / "best"), checkpoint.load_config(tmp_path / "cropped" / "last")
    assert (config.block_size, config.dropout, config.vocab_size, config.n_layer) == (8, 0.1, 28, 1)
    model = checkpoint.load_model(tmp_path / "cropped" / "last")
    assert mx.abs(model.wpe.weight - start.wpe.weight[:8]).max().item() < 2e-5  # one warm-up step away
    tokenizers = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("half/last", "cropped/last")]
    assert tokenizers[0] == tokenizers[1]
    assert 'init_from = "half"' in (tmp_path / "cropped" / "settings.toml").read_text()


@pytest.mark.parametrize("restored_after", [0, 2])
@pytest.mark.parametrize("compiled", [True, False])
def test_steps_go_on_from_a_restored_state(monkeypatch, compiled, restored_after):
    """Compiled as on a GPU, and in place on the CPU's kernels, where they are."""
    if compiled:
        monkeypatch.setattr(kernels, "_core", None)
        monkeypatch.setattr(train, "_compiles", lambda config: True)
    model_config = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16)
    config = TrainConfig(learning_rate=1e-2, warmup_iters=2, model=model_config)
    some = batches(5, 8, model_config)
    trainer, other = (train.Trainer(GPT(model_config), config) for _ in range(2))
    for batch in some[:4]:
        trainer.step([batch])
    for batch in some[:restored_after]:
        other.step([batch])
    weights, averages = (  # copied, since the trainer updates its own in place
        {name: mx.array(np.array(a)) for name, a in arrays.items()}
        for arrays in (trainer.model.named_weights(), trainer.optimizer.averages(trainer.model))
    )
    other.model.update(tree_unflatten(list(weights.items())))
    other.optimizer.restore(other.model, 4, averages)
    other.steps = 4
    losses = [[t.step([batch]).item() for batch in some[4:]] for t in (trainer, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ("--init_from nowhere", 1, "init_from: there is no directory nowhere"),
        ("--init_from empty", 1, "init_from: empty is not a model directory: it has no config.json"),
        ("--init_from half --n_layer 2", 1, "n_layer is 2, but 1 in the model of half/best"),
        ("--init_from half --no-tied_head", 1, "tied_head is False, but True in the model of half/best"),
        ("--init_from half --vocab_size 64", 1, "vocab_size is 64, but 28 in the model of half/best"),
        ("--init_from half --block_size 17", 1, "block_size is 17, but 16 in the model of half/best"),
        ("--init_from half --tokenizer gpt2", 1, "tokenizer is gpt2, but char in the model of half/best"),
        ("--init_from half --data other.txt", 1, "data: other does not fit the tokenizer of half/best: character 'é'"),
        ("--init_from half --resume half", 2, "init_from and resume are both given, expected one of them"),
        ("--resume nowhere", 1, "resume: nowhere holds no training state: it has no training.json"),
        ("--resume half/best", 1, "resume: half/best holds no training state: it has no training.json"),
        ("--resume half", 1, "max_iters is 6, but half/last has done 6 steps already"),
        ("--resume half --max_iters 9 --block_size 8", 1, "block_size is 8, but 16 in the model of half/last"),
        ("--resume torn --max_iters 9", 1, "torn/last has no optimizer.safetensors"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(half, tmp_path, capsys, monkeypatch, flags, status, message):
    (tmp_path / "other.txt").write_text("café\n" * 40)
    (tmp_path / "empty").mkdir()
    shutil.copytree(half, tmp_path / "torn")
    (tmp_path / "torn" / "last" / "optimizer.safetensors").unlink()
    before = files(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--device", "cpu", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        cli.run("mlxgpt.train", train.main)
    assert stop.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlxgpt.train: error: {message}")
    assert files(tmp_path) == before


def test_a_padded_vocabulary_is_kept(corpus, tmp_path):
    result = command("--data", str(corpus), "--out_dir", "run", *TINY_FLAGS, "--vocab_size", "64", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert checkpoint.load_model(tmp_path / "run" / "last").config.vocab_size == 64
