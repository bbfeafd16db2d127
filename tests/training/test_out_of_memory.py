"""Whole runs that don't fit: what --fit does, and that a run which memory ends loses nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mlxgpt import train
from mlxgpt.common import cli
from mlxgpt.common.settings import read_toml
from mlxgpt.cpu import extension
from mlxgpt.formats import safetensors_file
from mlxgpt.training import device_memory, fitting
from mlxgpt.training.device_memory import DeviceMemory
from mlxgpt.training.origin import outline
from mlxgpt.training.recipe import TrainConfig
from mlxgpt.training.trainer import Trainer

FLAGS = (
    "--device cpu --n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 8 --max_iters 6 --eval_interval 3 "
    "--eval_iters 2 --log_interval 2 --sample_tokens 0 --learning_rate 0.01 --warmup_iters 2"
).split()
TIMES = {"tokens_per_s", "mfu", "memory", "seconds"}  # which differ between any two runs
NO_MEMORY = {
    "kernels": MemoryError("Unable to allocate 16.0 MiB for an array with shape (4194304,)"),
    "mlx": RuntimeError("[malloc] Unable to allocate 16777216 bytes."),
}


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch) -> Path:
    """The working directory, with a text in it."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 80)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> None:
    train.main(["--data", "text.txt", *FLAGS, *args])


def error_of(capsys, *args: str) -> str:
    """The one line that a run ends with on the command line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run("mlxgpt.train", train.main, ["--data", "text.txt", *FLAGS, *args])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def metrics(name: str) -> list[dict]:
    lines = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def losses(name: str) -> list[float]:
    return [line.get("loss", line.get("val_loss")) for line in metrics(name)]


def weights(name: str) -> bytes:
    return Path(name, "last/model.safetensors").read_bytes()


def room_for(monkeypatch, **settings: object) -> None:
    """Gives the device just the memory that a run with these settings fits in."""
    values = read_toml("whole/settings.toml")
    config = train.from_dict(TrainConfig, {**values, **settings}, source="test")
    free = -(-fitting.run_memory(outline(config), config) * 10 // 9)
    monkeypatch.setattr(device_memory, "available", lambda: DeviceMemory(10**12, free))


# ---- a run that does not fit ----


def test_fit_takes_the_same_steps_in_less_memory(cpu_backend, monkeypatch, capsys):
    run("--out_dir", "whole")
    room_for(monkeypatch, batch_size=4, gradient_accumulation_steps=2)
    capsys.readouterr()
    run("--out_dir", "fitted", "--fit")
    assert "batch_size is 4, not 8, gradient_accumulation_steps is 2, not 1, eval_iters is 4, not 2" in " ".join(
        capsys.readouterr().out.split()
    )
    used = read_toml("fitted/settings.toml")
    assert (used["batch_size"], used["gradient_accumulation_steps"], used["eval_iters"]) == (4, 2, 4)
    assert "fit" not in used
    assert losses("fitted") == pytest.approx(losses("whole"), rel=1e-5)
    assert np.ptp(losses("whole")) > 0.1


def test_a_run_that_was_made_to_fit_is_resumed_as_it_was(monkeypatch):
    """Also where there is more memory by then."""
    run("--out_dir", "whole")
    room_for(monkeypatch, batch_size=2, grad_checkpoint=True)
    run("--out_dir", "fitted", "--fit")
    run("--out_dir", "half", "--fit", "--max_iters", "3", "--lr_decay_iters", "6")
    monkeypatch.setattr(device_memory, "available", lambda: DeviceMemory(10**12, 10**12))
    train.main(["--device", "cpu", "--resume", "half", "--max_iters", "6"])
    assert [line for line in metrics("half") if "val_loss" in line] == [m for m in metrics("fitted") if "val_loss" in m]
    assert weights("half") == weights("fitted")
    train.main(["--config", "fitted/settings.toml", "--out_dir", "again"])
    assert metrics("again") == metrics("fitted")


def test_a_run_that_does_not_fit_only_warns(monkeypatch, capsys):
    run("--out_dir", "whole")
    room_for(monkeypatch, batch_size=4, gradient_accumulation_steps=2)
    capsys.readouterr()
    run("--out_dir", "warned")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: the run takes"))
    assert "it fits with --batch_size 4 --gradient_accumulation_steps 2 --eval_iters 4 (" in line
    assert losses("warned") == losses("whole")


@pytest.mark.parametrize("total", [10**12, 1000])
def test_nothing_is_written_where_nothing_fits(monkeypatch, capsys, total):
    monkeypatch.setattr(device_memory, "available", lambda: DeviceMemory(total, 1000))
    line = error_of(capsys, "--out_dir", "run", *["--fit"] * (total > 1000))
    assert ("parameters take" if total == 1000 else "take a smaller model or block_size") in line
    assert not Path("run").exists()


# ---- memory that runs out ----


def fail_at(monkeypatch, step: int, error: Exception, after: bool = False) -> None:
    """Makes a step of every trainer fail, before it does anything or when it has done everything."""
    take_step = Trainer.step

    def fails(self, *args, **keywords):
        if self.steps == step - 1:
            if after:
                take_step(self, *args, **keywords)
            else:
                self.steps += 1
            raise error
        return take_step(self, *args, **keywords)

    monkeypatch.setattr(Trainer, "step", fails)


def test_a_step_without_memory_ends_with_a_line_and_loses_nothing(cpu_backend, monkeypatch, capsys):
    run("--out_dir", "whole")
    with monkeypatch.context() as patch:
        fail_at(patch, 6, NO_MEMORY[cpu_backend])
        line = error_of(capsys, "--out_dir", "run")
    assert "no memory left at step 6 (" in line
    assert "nable to allocate" in line
    assert "the run takes about" in line
    assert "; try --batch_size 4 --gradient_accumulation_steps 2 --eval_iters 4 (" in line
    # What the failed step has not touched is saved: on the kernels all of the step before it.
    kept = {"kernels": 5, "mlx": 3}[cpu_backend]
    assert line.endswith(f"; the last good checkpoint is step-{kept:07}")
    assert [entry["step"] for entry in metrics("run")][-1] == {"kernels": 4, "mlx": 4}[cpu_backend]
    train.main(["--device", "cpu", "--resume", "run"])
    assert metrics("run") == metrics("whole")
    assert weights("run") == weights("whole")


def test_an_update_that_was_cut_short_is_not_saved(monkeypatch, capsys):
    fail_at(monkeypatch, 5, MemoryError("Unable to allocate"), after=True)
    assert error_of(capsys, "--out_dir", "run").endswith("the last good checkpoint is step-0000003")


def test_an_evaluation_without_memory_keeps_its_step(cpu_backend, monkeypatch, capsys):
    evaluate = Trainer.evaluate

    def fails(self, batches):
        if self.steps == 6:
            raise NO_MEMORY[cpu_backend]
        return evaluate(self, batches)

    monkeypatch.setattr(Trainer, "evaluate", fails)
    assert error_of(capsys, "--out_dir", "run").endswith("the last good checkpoint is step-0000006")
    record = json.loads(Path("run/last/training.json").read_text())
    assert record["step"] == 6
    assert safetensors_file.read(Path("run/last/model.safetensors"))


def test_before_the_first_checkpoint_there_is_none_to_name(monkeypatch, capsys):
    fail_at(monkeypatch, 1, MemoryError())
    assert "good checkpoint" not in error_of(capsys, "--out_dir", "run")


def test_another_error_is_not_taken_for_one_of_memory(monkeypatch):
    fail_at(monkeypatch, 2, RuntimeError("[matmul] shapes"))
    with pytest.raises(RuntimeError, match=r"\[matmul\] shapes"):
        run("--out_dir", "run")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux keeps to a limit of addresses")
def test_memory_that_really_runs_out_on_the_kernels(run_python, directory):
    """From step 5 on the process may take no more addresses, and its batches are four times as large."""
    if not extension.is_there():
        pytest.skip("the extension is not there")
    code = """
import resource, sys, numpy as np
from mlxgpt import train
from mlxgpt.common import cli
from mlxgpt.training.trainer import Trainer
take_step = Trainer.step
def step(self, batches, **keywords):
    if self.steps == 4:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used, used))
        batches = [tuple(np.concatenate([a] * 4) for a in map(np.asarray, batch)) for batch in batches]
    return take_step(self, batches, **keywords)
Trainer.step = step
cli.run("mlxgpt.train", train.main, sys.argv[1:])
"""
    flags = ["--data", str(directory / "text.txt"), "--out_dir", str(directory / "run"), *FLAGS]
    large = ["--n_embd", "256", "--block_size", "128", "--batch_size", "32"]
    result = run_python("-c", code, *flags, *large)
    assert result.returncode == 1
    assert result.stderr.startswith("mlxgpt.train: error: no memory left at step 5 (")
    assert result.stderr.endswith("the last good checkpoint is step-0000004\n")
