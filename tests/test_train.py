"""Training from the command line: whole runs, what they write, and how they are resumed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlxgpt import prepare, train
from mlxgpt.common import cli
from mlxgpt.formats import model_directory, safetensors_file
from mlxgpt.training import checkpoints
from mlxgpt.training.trainer import Trainer

TINY_FLAGS = (
    "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --max_iters 6 --eval_interval 3 "
    "--eval_iters 2 --log_interval 2 --sample_tokens 8"
).split()


@pytest.fixture
def corpus(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return file


def command(*args: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlxgpt.train", *args], cwd=cwd, capture_output=True, text=True, check=False, **options
    )


def test_a_run_writes_its_files_and_says_what_it_does(corpus, tmp_path):
    result = command("--data", str(corpus), "--out_dir", "run", *TINY_FLAGS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    written = ["best", "checkpoints", "last", "loss.png", "metrics.jsonl", "settings.toml"]
    assert sorted(p.name for p in run.iterdir()) == written
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
    model = model_directory.load_model(run / "last")
    assert model.config.vocab_size == len(set(corpus.read_text()))


def test_the_same_run_gives_the_same_numbers(corpus, tmp_path, monkeypatch):
    """The process may be a new one, or one that has done other things before."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(corpus), "--device", "cpu", *TINY_FLAGS]  # a GPU adds gradients of embeddings in any order
    assert command(*flags, "--out_dir", "a", cwd=tmp_path).returncode == 0
    main(*flags, "--out_dir", "b")
    main("--config", "a/settings.toml", "--out_dir", "c")

    def losses(name):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [line.get("loss", line.get("val_loss")) for line in lines]

    assert losses("a") == losses("b") == losses("c")


def test_the_best_model_is_kept_when_later_ones_are_worse(corpus, tmp_path, monkeypatch):
    values = iter([3.0, 2.0, 1.0, 2.5])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, batches: next(values))
    monkeypatch.chdir(tmp_path)
    train.main(["--data", str(corpus), "--out_dir", "run", *TINY_FLAGS, "--max_iters", "9"])
    best, last = (model_directory.load_model(tmp_path / "run" / name) for name in ("best", "last"))
    assert not mx.array_equal(best.wte.weight, last.wte.weight).item()
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["val_loss"] for line in lines if "val_loss" in line] == [3.0, 2.0, 1.0, 2.5]


def test_a_model_that_has_diverged_is_not_saved(corpus, tmp_path, monkeypatch):
    values = iter([3.0, 2.0, float("nan")])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, batches: next(values))
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(corpus), "--out_dir", "run", *TINY_FLAGS, "--log_interval", "100"]
    with pytest.raises(ValueError, match=r"loss is nan at step 6: .* last good checkpoint is step-0000003"):
        train.main(flags)
    best, last = (model_directory.load_model(tmp_path / "run" / name) for name in ("best", "last"))
    assert mx.array_equal(best.wte.weight, last.wte.weight).item()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_out_dir_is_not_overwritten_unasked(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(corpus), *TINY_FLAGS]
    for expected in ("runs/cpu", "runs/cpu-2"):
        main(*flags, "--preset", "cpu")
        assert (tmp_path / expected / "best").is_dir()
    before = files(tmp_path)
    with pytest.raises(ValueError, match="out_dir: runs/cpu already holds a run; give another, or --overwrite"):
        main(*flags, "--out_dir", "runs/cpu")
    assert files(tmp_path) == before
    main(*flags, "--out_dir", "runs/cpu", "--overwrite", "--max_iters", "3")
    assert list(curve(tmp_path / "runs/cpu")) == [0, 3]


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
def test_bad_input_is_one_line(corpus, tmp_path, monkeypatch, capsys, args, message):
    if "gpu" in args and mx.is_available(mx.gpu):
        pytest.skip("MLX has a GPU here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--data", "text.txt", "--out_dir", "run", *TINY_FLAGS, *args])
    with pytest.raises(SystemExit) as stop:
        cli.run("mlxgpt.train", train.main)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
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
def test_a_resumed_run_equals_one_that_was_never_interrupted(
    corpus, half, tmp_path, monkeypatch, switch_off_kernels, kernels_there
):
    if not kernels_there:
        switch_off_kernels()
    flags = [*TINY_FLAGS, "--learning_rate", "0.01", "--warmup_iters", "2", "--gradient_accumulation_steps", "2"]
    flags += ["--dropout", "0.1"]
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
        for name in ("training.json", "SHA256SUMS"):  # they differ in lr_decay_iters alone
            ours.pop(name, None), theirs.pop(name, None)
        assert ours == theirs
    assert "resume =" not in (half / "settings.toml").read_text()


def test_a_best_model_is_kept_when_the_resumed_run_finds_no_better_one(half, monkeypatch):
    best = files(half / "best")
    monkeypatch.setattr(Trainer, "evaluate", lambda self, batches: 50.0)
    main("--resume", "half/last", "--max_iters", "9")
    assert files(half / "best") == best
    record = json.loads((half / "last" / "training.json").read_text())
    assert record["step"] == 9
    assert record["best_val_loss"] == min(loss for step, loss in curve(half).items() if step)


def test_a_resumed_run_may_write_to_another_directory(half, tmp_path):
    before = files(half)
    main("--resume", "half", "--max_iters", "9", "--out_dir", "other", "--learning_rate", "0.02", "--dropout", "0.1")
    assert files(half) == before
    assert list(curve(tmp_path / "other")) == [6, 9]
    assert curve(tmp_path / "other")[6] == curve(half)[6]
    record = json.loads((tmp_path / "other" / "last" / "training.json").read_text())
    kept = json.loads((half / "last" / "training.json").read_text())["settings"]
    assert record["settings"] == kept | {"max_iters": 9, "learning_rate": 0.02}
    assert model_directory.load_model(tmp_path / "other" / "best").config.dropout == 0.1


def test_a_run_may_start_from_a_model(half, corpus, tmp_path):
    flags = ["--batch_size", "4", "--eval_iters", "2", "--sample_tokens", "0"]
    main("--init_from", "half/last", "--data", str(corpus), "--out_dir", "tuned", "--max_iters", "3", *flags)
    assert curve(tmp_path / "tuned")[0] == curve(half)[6]
    record = json.loads((tmp_path / "tuned" / "last" / "training.json").read_text())
    assert record["step"] == 3
    (tmp_path / "few.txt").write_text("the lazy dog\n" * 40)
    flags += ["--block_size", "8", "--dropout", "0.1", "--max_iters", "1"]
    main("--init_from", "half", "--data", "few.txt", "--out_dir", "cropped", *flags)
    start, config = (
        model_directory.load_model(half / "best"),
        model_directory.load_config(tmp_path / "cropped" / "last"),
    )
    assert (config.block_size, config.dropout, config.vocab_size, config.n_layer) == (8, 0.1, 28, 1)
    model = model_directory.load_model(tmp_path / "cropped" / "last")
    assert mx.abs(model.wpe.weight - start.wpe.weight[:8]).max().item() < 2e-5  # one warm-up step away
    tokenizers = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("half/last", "cropped/last")]
    assert tokenizers[0] == tokenizers[1]
    assert 'init_from = "half"' in (tmp_path / "cropped" / "settings.toml").read_text()


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ("--init_from nowhere", 1, "init_from: there is no file or directory nowhere"),
        ("--init_from empty", 1, "init_from: empty is not a model directory: it has no config.json"),
        ("--init_from half --n_layer 2", 1, "n_layer is 2, but 1 in the model of STEP6"),
        ("--init_from half --no-tied_head", 1, "tied_head is False, but True in the model of STEP6"),
        ("--init_from half --vocab_size 64", 1, "vocab_size is 64, but 28 in the model of STEP6"),
        ("--init_from half --block_size 17", 1, "block_size is 17, but 16 in the model of STEP6"),
        ("--init_from half --tokenizer gpt2", 1, "tokenizer is gpt2, but char in the model of STEP6"),
        ("--init_from half --data other.txt", 1, "data: other does not fit the tokenizer of STEP6: character 'é'"),
        ("--init_from half --resume half", 2, "init_from and resume are both given, expected one of them"),
        ("--resume nowhere", 1, "resume: nowhere holds no training state: it has no training.json"),
        ("--resume half", 1, "max_iters is 6, but STEP6 has done 6 steps already"),
        ("--resume half --max_iters 9 --block_size 8", 1, "block_size is 8, but 16 in the model of STEP6"),
        ("--resume torn --max_iters 9", 1, "resume: no checkpoint of torn is whole: torn/checkpoints/step-0000006: "),
        ("--resume half --max_iters 9 --seed 1", 1, "seed is 1, but 1337 in STEP6, and a run can't change it"),
        ("--resume half --max_iters 9 --freeze wte", 1, "freeze is 'wte', but '' in STEP6, and a run can't change it"),
        ("--resume half --max_iters 9 --data more.txt", 1, "data: more is not what STEP6 was trained on; --init_from"),
        ("--resume half/checkpoints/step-0000003 --max_iters 9", 1, "resume: half has gone on from step-0000003 to"),
        ("--resume newer --max_iters 9", 1, "newer/training.json: format is 99, this version reads up to 2"),
        ("--resume half --max_iters 9 --out_dir other", 1, "out_dir: other already holds a run; give another, or"),
    ],
)
def test_a_wrong_init_from_or_resume_is_one_line(half, tmp_path, capsys, monkeypatch, flags, status, message):
    (tmp_path / "other.txt").write_text("café\n" * 40)
    (tmp_path / "empty").mkdir()
    shutil.copytree(half, tmp_path / "torn", symlinks=True)
    for path in (tmp_path / "torn" / "checkpoints").glob("*/optimizer.safetensors"):
        path.unlink()
    (tmp_path / "more.txt").write_text("the lazy dog\n" * 400)
    shutil.copytree(half / "last", tmp_path / "newer")
    (tmp_path / "newer" / "SHA256SUMS").unlink()
    record = json.loads((tmp_path / "newer" / "training.json").read_text())
    (tmp_path / "newer" / "training.json").write_text(json.dumps(record | {"format": 99}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text("")
    before = files(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--device", "cpu", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        cli.run("mlxgpt.train", train.main)
    assert stop.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    message = message.replace("STEP6", "half/checkpoints/step-0000006")
    assert line.startswith(f"mlxgpt.train: error: {message}")
    assert files(tmp_path) == before


def test_a_padded_vocabulary_is_kept(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main("--data", str(corpus), "--out_dir", "run", *TINY_FLAGS, "--vocab_size", "64")
    assert model_directory.load_model(tmp_path / "run" / "last").config.vocab_size == 64


def events(run: Path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["event"]) for line in lines if "event" in line]


def steps_saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def fail_at(monkeypatch, *steps: int) -> None:
    """Makes some steps return a loss that is not a number."""
    step = Trainer.step

    def failing(self, batches, before_update):
        if self.steps + 1 not in steps:
            return step(self, batches, before_update)
        self.steps += 1
        self.norm = mx.array(float("nan"))
        return mx.array(float("nan"))

    monkeypatch.setattr(Trainer, "step", failing)


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "text.txt", *TINY_FLAGS, "--max_iters", "12", "--save_interval", "1", "--max_skipped", "3"]
    fail_at(monkeypatch, 2, 4, 5, 8, 9, 10)
    with pytest.raises(
        ValueError, match=r"3 steps in a row, to step 10, had no finite loss.* checkpoint is step-0000007"
    ):
        main("--out_dir", "run", *flags)
    assert events(tmp_path / "run") == [(n, "skipped") for n in (2, 4, 5, 8, 9, 10)]
    assert "step 2 is skipped: loss nan" in capsys.readouterr().out
    assert steps_saved(tmp_path / "run")[-2:] == ["step-0000006", "step-0000007"]
    record = json.loads((tmp_path / "run" / "last" / "training.json").read_text())
    assert (record["step"], record["skipped"]) == (7, 3)


def test_a_run_with_skipped_steps_is_resumed_exactly(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "text.txt", *TINY_FLAGS, "--lr_decay_iters", "9", "--learning_rate", "0.01"]
    fail_at(monkeypatch, 2, 4)
    main("--out_dir", "whole", *flags, "--max_iters", "9")
    main("--out_dir", "half", *flags)
    main("--resume", "half", "--max_iters", "9")
    assert curve(tmp_path / "half") == curve(tmp_path / "whole")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "half/last" / name).read_bytes() == (tmp_path / "whole/last" / name).read_bytes()


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write, files_written = safetensors_file.write, []

    def full(path, *args):
        files_written.append(path)
        if len(files_written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *args)

    monkeypatch.setattr(safetensors_file, "write", full)
    flags = ["--device", "cpu", "--data", "text.txt", "--out_dir", "run", *TINY_FLAGS, "--max_iters", "12"]
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    with pytest.raises(SystemExit) as stop:
        cli.run("mlxgpt.train", train.main)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-0000006: the checkpoint can't be written: No space left on device; " in line
    assert line.endswith("run/checkpoints/step-0000003 is kept")
    assert checkpoints.find(tmp_path / "run")[0].name == "step-0000003"
    monkeypatch.setattr(safetensors_file, "write", write)
    main("--resume", "run")
    assert checkpoints.find(tmp_path / "run")[0].name == "step-0000012"


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_resumed(half, tmp_path, capsys, damage):
    whole = files(half / "last")
    path = half / "checkpoints/step-0000006/model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:-1] if damage == "cut" else content)
    main("--resume", "half")
    assert "half/checkpoints/step-0000006 is passed over: model.safetensors is damaged" in capsys.readouterr().out
    ours = files(half / "last")
    assert ours["model.safetensors"] == whole["model.safetensors"]
    assert list(curve(half)) == [0, 3, 6]


def test_changed_settings_are_printed(half, capsys):
    main("--resume", "half", "--max_iters", "9", "--learning_rate", "0.02", "--dropout", "0.1", "--batch_size", "2")
    out = capsys.readouterr().out
    for line in (
        "max_iters from 6 to 9",
        "learning_rate from 0.01 to 0.02",
        "dropout from 0.0 to 0.1",
        "batch_size from",
    ):
        assert f"changed: {line}" in out
    record = json.loads((half / "last" / "training.json").read_text())
    assert record["progress"]["windows"] == 6 * 4 + 3 * 2  # the position in the data goes on
    assert record["progress"]["tokens"] == record["progress"]["windows"] * 16


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "text.txt", *TINY_FLAGS, "--learning_rate", "0.01"]
    main("--out_dir", "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "evaluate", lambda self, batches: (_ for _ in ()).throw(KeyboardInterrupt))
        main("--out_dir", "run", *flags)
    main("--resume", "run")
    assert "run has no checkpoint yet: the run begins anew" in capsys.readouterr().out
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


FINE_TUNING = {
    "freeze": ["--freeze", "wte,wpe,h.0.mlp"],
    "lora": ["--lora_rank", "2", "--lora_targets", "attn.c_attn,mlp.c_proj"],
    "blocks": ["--grad_checkpoint", "--dropout", "0.2"],
}


@pytest.mark.parametrize("how", FINE_TUNING)
def test_fine_tuning_is_resumed_exactly(half, corpus, tmp_path, how):
    flags = [
        "--init_from",
        "half",
        "--data",
        "text.txt",
        "--batch_size",
        "4",
        "--eval_iters",
        "2",
        "--sample_tokens",
        "8",
    ]
    flags += ["--eval_interval", "3", "--lr_decay_iters", "6", "--learning_rate", "0.01", *FINE_TUNING[how]]
    main("--out_dir", "whole", *flags, "--max_iters", "6")
    main("--out_dir", "tuned", *flags, "--max_iters", "3")
    main("--resume", "tuned", "--max_iters", "6")
    assert curve(tmp_path / "tuned") == curve(tmp_path / "whole")
    ours, theirs = files(tmp_path / "tuned/last"), files(tmp_path / "whole/last")
    weights = "adapter_model.safetensors" if how == "lora" else "model.safetensors"
    assert ours[weights] == theirs[weights]
    assert ("model.safetensors" in ours) == (how != "lora")
    start, tuned = model_directory.load_model(half / "best"), model_directory.load_model(tmp_path / "tuned/last")
    moved = {n: bool(mx.any(w != tuned.named_weights()[n]).item()) for n, w in start.named_weights().items()}
    if how == "freeze":
        assert {n for n, has_moved in moved.items() if not has_moved} == {
            n for n in moved if n.startswith(("wte", "wpe", "h.0.mlp"))
        }
    if how == "lora":
        assert {n for n, has_moved in moved.items() if has_moved} == {"h.0.attn.c_attn.weight", "h.0.mlp.c_proj.weight"}


@pytest.fixture
def prepared(corpus, tmp_path, monkeypatch) -> Path:
    """The corpus, prepared as shards."""
    monkeypatch.chdir(tmp_path)
    args = ["text.txt", "--out", "prepared", "--tokenizer", "char", "--workers", "1", "--val_fraction", "0.1"]
    prepare.main(args)
    return tmp_path / "prepared"


def test_a_run_on_shards(prepared, tmp_path):
    main("--data", "prepared", "--out_dir", "run", *TINY_FLAGS, "--lr_decay_iters", "9")
    main("--data", "prepared", "--out_dir", "whole", *TINY_FLAGS, "--max_iters", "9", "--lr_decay_iters", "9")
    shutil.move("prepared", "moved")  # the same data elsewhere
    main("--resume", "run", "--max_iters", "9", "--data", "moved")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert model_directory.load_config(tmp_path / "run" / "last").vocab_size == 28


def test_shards_that_do_not_fit_are_one_line(prepared, tmp_path, capsys):
    def error(*flags: str) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            main("--data", "prepared", "--out_dir", "run", *TINY_FLAGS, *flags)
        assert not (tmp_path / "run").exists()
        return cli.describe(caught.value)

    (tmp_path / "other.txt").write_text("other characters\n" * 40)
    main("--data", "other.txt", "--out_dir", "other", *TINY_FLAGS)
    assert "the shards are of another tokenizer" in error("--init_from", "other")
    assert "tokenizer is gpt2, but prepared was prepared with char" in error("--tokenizer", "gpt2")
    assert "vocab_size is 5, expected at least the tokenizer's 28" in error("--vocab_size", "5")
    manifest = json.loads((prepared / "manifest.json").read_text())
    shard = next(prepared.glob("train-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    assert shard.name in error()
    assert manifest["train"]
