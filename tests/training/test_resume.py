"""A run that is interrupted in any way and resumed equals one that was never interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

FLAGS = (
    "--device cpu --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --dropout 0.2 --batch_size 4 "
    "--gradient_accumulation_steps 2 --learning_rate 0.01 --warmup_iters 20 --max_iters 300 --eval_interval 50 "
    "--eval_iters 2 --save_interval 4 --log_interval 3 --sample_tokens 8"
).split()
TIMES = {"tokens_per_s", "mfu", "memory", "seconds"}  # which differ between any two runs


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A directory with a text and an uninterrupted run; in memory if possible, where checkpoints are written fast."""
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() and os.access(memory, os.W_OK) else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir=where) as directory:
        path = Path(directory)
        (path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}\n" for n in range(400)))
        finish("--data", "text.txt", "--out_dir", "whole", *FLAGS, cwd=path)
        yield path


def start(*args: str, cwd: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-c",
        "from mlxgpt import train; from mlxgpt.common import cli; cli.run('mlxgpt.train', train.main)",
        *args,
    ]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*args: str, cwd: Path) -> str:
    process = start(*args, cwd=cwd)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    return output


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def result(run: Path) -> dict[str, object]:
    """Everything in which two equal runs must agree."""
    found: dict[str, object] = {
        "metrics": metrics(run),
        "checkpoints": sorted(p.name for p in (run / "checkpoints").iterdir()),
    }
    for link in ("best", "last"):
        found[link] = (run / link).resolve().name
        for path in (run / link).iterdir():
            if path.name == "training.json":
                record = json.loads(path.read_text())
                record["progress"].pop("seconds")
                found[f"{link}/{path.name}"] = record
            elif path.name != "SHA256SUMS":  # of training.json too
                found[f"{link}/{path.name}"] = path.read_bytes()
    return found


def test_a_run_that_is_killed_many_times_equals_one_that_was_not(place):
    run, when = place / "run", random.Random(1)
    args, kills, in_a_save = ("--data", "text.txt", "--out_dir", "run", *FLAGS), 0, 0
    while kills < 20:
        process = start(*args, cwd=place)
        if not any(line.startswith("step ") and not line.startswith("step 0:") for line in process.stdout):
            pytest.fail(f"the run ended with {process.wait()}")
        # At any moment, or when a checkpoint is being written.
        deadline = time.monotonic() + when.uniform(0, 0.1)
        while time.monotonic() < deadline or kills % 2:
            if kills % 2 and any((run / "checkpoints").glob(".*.tmp")):
                in_a_save += 1
                break
            assert process.poll() is None, "the run was over before it was killed often enough"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        kills += 1
        args = ("--resume", "run")
    finish("--resume", "run", cwd=place)
    assert in_a_save >= 10
    assert result(run) == result(place / "whole")
    assert not list(run.rglob(".*"))
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == [1, *range(3, 301, 3)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_prints_the_command_to_resume_with(place, number):
    run = f"run-{number}"
    process = start("--data", "text.txt", "--out_dir", run, *FLAGS, cwd=place)
    for line in process.stdout:
        if line.startswith("step 30/"):
            break
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "stopped after" in output and f"--resume {run}" in output
    stopped_at = int((place / run / "last").resolve().name.removeprefix("step-"))
    assert 30 <= stopped_at < 300
    finish("--resume", run, cwd=place)
    assert result(place / run) == result(place / "whole")
