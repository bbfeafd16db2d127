"""A run's checkpoints: whole or not there, whatever ends the process, and found again."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxgpt.common import disk
from mlxgpt.cpu import extension
from mlxgpt.data.tokenizer import CharTokenizer
from mlxgpt.formats import model_directory, safetensors_file, training_state
from mlxgpt.formats.safetensors_file import Tensor
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training import checkpoints
from mlxgpt.training.checkpoints import Checkpoints, TrainingState
from mlxgpt.training.optim import AdamW
from mlxgpt.training.recipe import TrainConfig
from mlxgpt.training.trainer import Trainer

TINY = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
CHARS = CharTokenizer("abcdefghijk")
FILES = {
    "config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "tokenizer_config.json",
    "training.json", "SHA256SUMS",
}  # fmt: skip


def trained(step: int = 7) -> tuple[GPT, TrainingState]:
    """A model and its training state; no two arrays are equal."""
    model, optimizer = GPT(TINY), AdamW(TrainConfig(learning_rate=0.25, beta1=0.5, weight_decay=0.125))
    averages = {
        f"{average}.{name}": mx.random.uniform(shape=p.shape)
        for average in "mv"
        for name, p in model.named_weights().items()
    }
    optimizer.restore(model, step, averages)
    return model, TrainingState(optimizer, step, 1.5, {"max_iters": 9, "beta1": 0.5}, {"skipped": [3]})


def save(run: Path, *steps: int, best: int = 0, keep_last: int = 9) -> None:
    run.mkdir(exist_ok=True)
    writer = Checkpoints(run, keep_last)
    for step in steps:
        model, state = trained(step)
        writer.save(model, CHARS, state, step == best)
    writer.wait()


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:07}"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def snapshot(optimizer: AdamW) -> dict[str, np.ndarray]:
    return {name: np.array(a) for name, a in tree_flatten(optimizer.state)}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with three checkpoints, the second one the best."""
    save(tmp_path / "run", 3, 6, 9, best=6)
    return tmp_path / "run"


@pytest.fixture
def resumable(tmp_path) -> Path:
    """A model directory with training state and without SHA256SUMS, as the converter writes it."""
    save(tmp_path / "seven", 7)
    shutil.copytree(at(tmp_path / "seven", 7), tmp_path / "model")
    (tmp_path / "model" / "SHA256SUMS").unlink()
    return tmp_path / "model"


def test_a_checkpoint_restores_every_bit(tmp_path):
    model, state = trained()
    writer = Checkpoints(tmp_path, 1)
    writer.save(model, CHARS, state, False)
    writer.wait()
    directory = tmp_path / "last"
    record = json.loads((directory / "training.json").read_text())
    assert record == dict(
        format=2, step=7, skipped=0, learning_rate=0.25, beta1=0.5, beta2=0.99, eps=1e-8, weight_decay=0.125,
        best_val_loss=1.5, settings={"max_iters": 9, "beta1": 0.5}, progress={"skipped": [3]},
    )  # fmt: skip
    assert mx.load(str(directory / "optimizer.safetensors"))["m.h.0.attn.c_attn.weight"].shape == (24, 8)
    again, optimizer = model_directory.load_model(directory), AdamW(TrainConfig(learning_rate=0.25))
    for name, p in model.named_weights().items():
        assert np.array_equal(p, again.named_weights()[name]), name
    assert checkpoints.restore_optimizer(directory, again, optimizer) == record
    assert optimizer.step.item() == 7
    expected, restored = snapshot(state.optimizer), snapshot(optimizer)
    assert expected.keys() == restored.keys()
    for name, value in expected.items():
        assert np.array_equal(value, restored[name]), name
    model_directory.save_model(tmp_path / "model", model, CHARS)
    for name in names(tmp_path / "model"):
        assert (tmp_path / "model" / name).read_bytes() == (directory / name).read_bytes()


def test_the_sums_are_sha256sums(run):
    text = (run / "last" / "SHA256SUMS").read_text()
    sums = dict(reversed(line.split("  ")) for line in text.splitlines())
    assert {*sums, "SHA256SUMS"} == FILES == set(names(run / "last"))
    for name, digest in sums.items():
        assert hashlib.sha256((run / "last" / name).read_bytes()).hexdigest() == digest, name
    if program := shutil.which("sha256sum"):
        subprocess.run([program, "--check", "--strict", "SHA256SUMS"], cwd=run / "last", check=True)


# ---- which checkpoints are kept, and which one is found ----


def test_the_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, best=2, keep_last=2)
    assert names(tmp_path / "checkpoints") == ["step-0000002", "step-0000004", "step-0000005"]
    assert os.readlink(tmp_path / "best") == "checkpoints/step-0000002"
    assert os.readlink(tmp_path / "last") == "checkpoints/step-0000005"
    best = at(tmp_path, 2)
    assert set(names(best)) == FILES - {"optimizer.safetensors", "training.json"}
    assert checkpoints.find_damage(best) is None
    assert model_directory.find_model(tmp_path) == best
    assert model_directory.load_model(best).config == TINY
    with pytest.raises(FileNotFoundError, match=r"best holds no training state: it has no training\.json"):
        checkpoints.find(tmp_path / "best")
    save(tmp_path, 6, best=6, keep_last=2)
    assert names(tmp_path / "checkpoints") == ["step-0000005", "step-0000006"]


def test_later_checkpoints_are_removed_when_a_run_was_resumed_at_an_earlier_step(run):
    save(run, 4, keep_last=2)
    assert names(run / "checkpoints") == ["step-0000003", "step-0000004", "step-0000006"]
    assert checkpoints.find(run) == (at(run, 4), [])
    assert set(names(run / "best")) == FILES - {"optimizer.safetensors", "training.json"}


def test_a_checkpoint_of_the_same_step_is_replaced(run):
    before = (at(run, 9) / "model.safetensors").read_bytes()
    save(run, 9)
    assert (at(run, 9) / "model.safetensors").read_bytes() != before
    assert checkpoints.find(run) == (at(run, 9), [])
    assert names(run / "checkpoints") == ["step-0000003", "step-0000006", "step-0000009"]


def test_the_checkpoint_that_a_path_names(run, resumable, monkeypatch):
    assert checkpoints.find(run) == (at(run, 9), [])
    assert checkpoints.find(run / "last") == (at(run, 9), [])
    assert checkpoints.find(run / "best") == (at(run, 6), [])
    assert checkpoints.find(at(run, 3)) == (at(run, 3), [])
    assert checkpoints.find(resumable) == (resumable, [])
    assert model_directory.find_model(run) == model_directory.find_model(run / "best") == at(run, 6)
    (run / "best").unlink()
    assert model_directory.find_model(run) == at(run, 9)
    assert checkpoints.run_of(at(run, 3)) == checkpoints.run_of(run / "last") == run
    assert checkpoints.run_of(resumable) is None
    monkeypatch.chdir(at(run, 3))
    assert checkpoints.run_of(Path(".")) == Path("../..")
    for nothing in (run.parent / "nowhere", run.parent):
        with pytest.raises(FileNotFoundError, match=rf"{nothing} holds no training state: it has no training\.json"):
            checkpoints.find(nothing)


def test_a_checkpoint_that_no_link_points_to_yet_is_found(run):
    (run / "last").unlink()
    assert checkpoints.find(run)[0] == at(run, 9)
    (run / "last").symlink_to("checkpoints/step-0000007")  # which is not there
    assert checkpoints.find(run)[0] == at(run, 6)


@pytest.mark.parametrize("name", sorted(FILES))
def test_damage_in_any_file_is_found(run, name):
    path = at(run, 9) / name
    content = path.read_bytes()
    rng = random.Random(name)
    lines = [n + 1 for n, byte in enumerate(content) if byte == 10]  # where a text would still look whole
    cuts = [0, *lines[:-1], len(content) - 1, *rng.sample(range(len(content)), 8)]
    flips = rng.sample(range(8 * len(content)), 400 if name == "SHA256SUMS" else 40)
    assert checkpoints.find_damage(at(run, 9)) is None
    for damaged in [
        *(content[:cut] for cut in cuts),
        *(content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :] for bit in flips),
    ]:
        path.write_bytes(damaged)
        damage = checkpoints.find_damage(at(run, 9))
        assert damage and (name in damage or name == "SHA256SUMS"), damage
    found, (line,) = checkpoints.find(run)
    assert found == at(run, 6)
    assert line == f"{at(run, 9)} is passed over: {damage}"
    if name != "SHA256SUMS":
        path.unlink()
        assert checkpoints.find(run) == (at(run, 6), [f"{at(run, 9)} is passed over: {name} is missing"])
        assert checkpoints.find(run / "last")[0] == at(run, 6)
    with pytest.raises(ValueError, match=rf"^resume: {at(run, 9)}: "):
        checkpoints.find(at(run, 9))


def test_a_run_without_a_whole_checkpoint(run):
    for step in (3, 6, 9):
        (at(run, step) / "optimizer.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"^resume: no checkpoint of {run} is whole: {at(run, 9)}: opt.* is missing;"):
        checkpoints.find(run)


def test_a_newer_version_s_checkpoint_is_refused_and_not_passed_over(run):
    path = at(run, 9) / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3, "settings": None}))
    sums = at(run, 9) / "SHA256SUMS"
    lines = sums.read_text().splitlines()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sums.write_text("".join(f"{digest}  training.json\n" if "training.json" in s else f"{s}\n" for s in lines))
    with pytest.raises(ValueError, match=r"training\.json: format is 3, this version reads up to 2; nothing was ch"):
        checkpoints.find(run)


# ---- what may happen while a checkpoint is written ----

SAVER = """
import os, sys
from pathlib import Path
from mlxgpt.model.config import GPTConfig
from mlxgpt.training.recipe import TrainConfig
import mlx.core as mx
from mlxgpt.model import ops
from mlxgpt.model.gpt import GPT
from mlxgpt.training.checkpoints import Checkpoints, TrainingState
from mlxgpt.training.optim import AdamW
from mlx.utils import tree_map

def save(run, first):
    ops.use_device("cpu")
    checkpoints = Checkpoints(run, 2)
    os.write(1, b"begun\\n")  # in one piece: two processes write here
    model, optimizer = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)), AdamW(TrainConfig())
    for step in range(first, first + 100000):
        model.update(tree_map(lambda p: mx.full(p.shape, step), model.parameters()))
        averages = {f"{a}.{n}": mx.full(p.shape, step) for a in "mv" for n, p in model.named_weights().items()}
        optimizer.restore(model, step, averages)
        checkpoints.save(model, None, TrainingState(optimizer, step, float(step), {}), step % 3 == 0)

for line in sys.stdin:  # a process for each, without importing everything again
    if (child := os.fork()) == 0:
        save(Path(sys.argv[1]), int(line))
    os.write(1, b"%d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"ended\\n")
"""


def require_one_state(directory: Path) -> int:
    """Checks that a checkpoint is whole and all of it is of one step -> the step."""
    assert checkpoints.find_damage(directory) is None
    record = training_state.load_training_record(directory)
    for name in ("model.safetensors", "optimizer.safetensors"):
        for key, tensor in safetensors_file.read(directory / name).items():
            assert (tensor.read() == record["step"]).all(), key
    assert directory.name == f"step-{record['step']:07}"
    return record["step"]


def test_a_whole_checkpoint_is_left_whenever_the_run_is_killed(tmp_path):
    delays, latest, leftovers = random.Random(5), 0, 0
    with (
        subprocess.Popen(
            [sys.executable, "-c", SAVER, tmp_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as zygote,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(os.killpg, zygote.pid, signal.SIGKILL)  # so that a failure is seen, and not waited for
        for kill in range(40):
            print(latest + 1, file=zygote.stdin, flush=True)
            lines = {zygote.stdout.readline().strip() for _ in range(2)}  # in any order
            (child,) = lines - {"begun"}
            deadline = time.monotonic() + 5
            while kill == 0 and not (tmp_path / "best").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(delays.uniform(0, 0.12))
            os.kill(int(child), signal.SIGKILL)
            assert zygote.stdout.readline() == "ended\n"
            leftovers += any(path.name.endswith(".tmp") for path in tmp_path.rglob(".*"))
            directory, passed_over = checkpoints.find(tmp_path)
            assert passed_over == []
            step = require_one_state(directory)
            assert latest <= step
            latest = step
            best = model_directory.find_model(tmp_path)
            assert best == disk.follow(tmp_path / "best")
            assert checkpoints.find_damage(best) is None
            assert (tmp_path / "last").resolve() == directory.resolve()
        zygote.stdin.close()
    assert leftovers > 5
    assert latest > 10
    Checkpoints(tmp_path, 2)
    assert not [path for path in tmp_path.rglob(".*")]


def test_a_reader_never_sees_half_a_checkpoint(tmp_path):
    save(tmp_path, 1, best=1)
    stop, seen = threading.Event(), []

    def write() -> None:
        for step in range(2, 25):
            save(tmp_path, step, best=step, keep_last=30)
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        for directory in (model_directory.find_model(tmp_path), checkpoints.find(tmp_path)[0]):
            assert set(names(directory)) == FILES
            assert checkpoints.find_damage(directory) is None
            seen.append(directory)
    writer.join()
    assert len(set(seen)) > 5


@pytest.mark.skipif(not extension.available(), reason="without the kernels no array is changed in place")
@pytest.mark.parametrize(("overtaken_at", "while_written"), [(1, False), (4, False), (4, True), (1000, False)])
def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch, overtaken_at, while_written):
    """The checkpoint has the state at the moment of save(), though steps change the arrays in place before they are
    read, or while they are written."""
    trainer = Trainer(GPT(TINY), TrainConfig(model=TINY, learning_rate=0.1, warmup_iters=0))
    ids = np.random.default_rng(0).integers(0, 11, (4, 9)).astype(np.int32)
    batch = ids[:, :-1], ids[:, 1:]
    trainer.step([batch])
    halted, go, reads = threading.Event(), threading.Event(), [0]
    write = safetensors_file.write

    def halting(read):
        def halting_read():
            reads[0] += 1
            if reads[0] == overtaken_at and not while_written:
                halted.set()
                go.wait(5)
            array = read()
            if reads[0] == overtaken_at and while_written:
                halted.set()
                go.wait(0.3)  # and then the step has had to wait
            return array

        return halting_read

    def halting_write(path, tensors, *args):
        return write(path, {name: Tensor(t.dtype, t.shape, halting(t.read)) for name, t in tensors.items()}, *args)

    monkeypatch.setattr(safetensors_file, "write", halting_write)
    writer = Checkpoints(tmp_path, 3)
    for step in (1, 2):
        expected = {
            **{n: np.array(p) for n, p in trainer.model.named_weights().items()},
            **{n: np.array(a) for n, a in trainer.optimizer.averages(trainer.model).items()},
        }
        reads[0] = 0
        halted.clear(), go.clear()
        writer.save(trainer.model, CHARS, TrainingState(trainer.optimizer, step, None, {}), False)
        if overtaken_at < 1000:
            assert halted.wait(5)
        trainer.step([batch], writer.before_arrays_change)
        go.set()
        writer.wait()
        model, optimizer = model_directory.load_model(at(tmp_path, step)), AdamW(TrainConfig())
        checkpoints.restore_optimizer(at(tmp_path, step), model, optimizer)
        for name, array in {**model.named_weights(), **optimizer.averages(model)}.items():
            assert np.array_equal(array, expected[name]), name
        assert not np.array_equal(expected["wte.weight"], trainer.model.wte.weight)


def test_steps_taken_before_a_checkpoint_is_written_do_not_change_it(tmp_path, monkeypatch):
    write, go_on = safetensors_file.write, threading.Event()
    monkeypatch.setattr(safetensors_file, "write", lambda *args: (go_on.wait(60), write(*args)))
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8))
    config = TrainConfig(model=model.config)
    trainer = Trainer(model, config)
    ids = np.arange(9)[None] % 11
    batch = ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32)
    trainer.step([batch])
    before = {name: np.array(p) for name, p in model.named_weights().items()}
    writer = Checkpoints(tmp_path, 2)
    writer.save(model, None, TrainingState(trainer.optimizer, 1, None, {}), best=False)
    for _ in range(3):
        trainer.step([batch], writer.before_arrays_change)
    go_on.set()
    writer.wait()
    saved = model_directory.load_model(tmp_path / "last").named_weights()
    for name, p in before.items():
        np.testing.assert_array_equal(saved[name], p, err_msg=name)
    assert not np.array_equal(model.wte.weight, before["wte.weight"])


def test_a_full_disk_keeps_the_last_checkpoint_and_is_one_error(run):
    writer = Checkpoints(run, 9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # a file that can't grow fails as one on a full disk does
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        model, state = trained(12)
        writer.save(model, CHARS, state, True)
        message = f"^{at(run, 12)}: the checkpoint can't be written: File too large; {at(run, 9)} is kept$"
        with pytest.raises(OSError, match=message):
            for _ in range(500):
                writer.check()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.before_arrays_change()  # waits for nobody
    writer.wait()  # the error is raised once
    assert names(run / "checkpoints") == ["step-0000003", "step-0000006", "step-0000009"]
    assert checkpoints.find(run) == (at(run, 9), [])
    writer.save(model, CHARS, state, True)
    writer.wait()
    assert checkpoints.find(run) == (at(run, 12), [])


@pytest.mark.parametrize("name", ["rename", "symlink", "fsync", "mkdir"])
def test_a_lost_permission_keeps_the_last_checkpoint(run, monkeypatch, name):
    writer = Checkpoints(run, 9)

    def denied(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, denied)
        writer.save(*trained(12)[:1], CHARS, trained(12)[1], True)
        with pytest.raises(OSError, match=r"step-0000012: the checkpoint can't be written: Permission denied; .* is k"):
            writer.wait()
    directory, passed_over = checkpoints.find(run)
    assert directory == at(run, 9) and not passed_over
    assert not [path for path in run.rglob(".*") if path.is_dir() and not path.is_symlink()]


def test_a_directory_that_is_removed_is_not_made_again(tmp_path):
    (tmp_path / "run").mkdir()
    writer = Checkpoints(tmp_path / "run", 2)
    (tmp_path / "run").rmdir()
    writer.save(trained()[0], CHARS, trained()[1], False)
    with pytest.raises(OSError, match=r"can't be written: No such file or directory; there is no earlier one"):
        writer.wait()
    assert not (tmp_path / "run").exists()


def test_what_a_killed_run_left_unfinished_is_removed_or_completed(run):
    shutil.copytree(at(run, 9), run / "checkpoints" / ".step-0000012.1.tmp")
    (run / ".last.1.tmp").symlink_to("checkpoints/step-0000012")
    os.rename(at(run, 9), run / "checkpoints" / ".step-0000009.1.old")  # while it was being replaced
    shutil.copytree(at(run, 6), run / "checkpoints" / ".step-0000006.1.old")
    (at(run, 6) / ".SHA256SUMS.1").write_text("")
    (at(run, 6) / "training.json").touch()
    Checkpoints(run, 9)
    assert not [path for path in run.rglob(".*")]
    assert checkpoints.find(run) == (at(run, 9), [])


def test_training_state_that_the_sums_do_not_list_is_ignored(run):
    """A run that is killed between rewriting the list and removing the files leaves them so."""
    path = at(run, 6) / "SHA256SUMS"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(s for s in lines if "training" not in s and "optimizer" not in s))
    with pytest.raises(FileNotFoundError, match="holds no training state"):
        checkpoints.find(at(run, 6))
    save(run, 12, 15, keep_last=2)
    assert set(names(at(run, 6))) == FILES - {"optimizer.safetensors", "training.json"}


# ---- earlier versions' runs ----


@pytest.fixture
def old(run, tmp_path) -> Path:
    """A run of an earlier version, with directories best and last."""
    shutil.copytree(at(run, 9), tmp_path / "old" / "last")
    shutil.copytree(at(run, 6), tmp_path / "old" / "best")
    for name in ("best/SHA256SUMS", "last/SHA256SUMS", "best/training.json", "best/optimizer.safetensors"):
        (tmp_path / "old" / name).unlink()
    path = tmp_path / "old" / "last" / "training.json"
    record = json.loads(path.read_text()) | {"format": 1}
    del record["progress"]
    path.write_text(json.dumps(record))
    return tmp_path / "old"


def test_a_run_of_an_earlier_version_is_read_and_continued(old):
    assert checkpoints.find(old) == checkpoints.find(old / "last") == (old / "last", [])
    assert training_state.load_training_record(old / "last")["progress"] == {}
    assert checkpoints.run_of(old / "last") == old
    assert model_directory.find_model(old) == old / "best"
    best = (old / "best" / "model.safetensors").read_bytes()
    save(old, 12)
    assert names(old) == ["best", "checkpoints", "last"]
    assert (old / "best" / "model.safetensors").read_bytes() == best
    assert names(old / "checkpoints") == ["step-0000009", "step-0000012"]
    assert checkpoints.find(old) == (at(old, 12), [])
    save(old, 15, best=15)
    assert os.readlink(old / "best") == "checkpoints/step-0000015"
    assert names(old) == ["best", "checkpoints", "last"]


def test_a_run_is_cleared(run, old, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    os.rename(run / "checkpoints", elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    for directory in (run, old, tmp_path / "model"):
        directory.mkdir(exist_ok=True)
        (directory / "metrics.jsonl").touch()
        checkpoints.clear(directory)
        assert names(directory) == ["metrics.jsonl"]
    assert len(names(elsewhere)) == 3


# ---- the optimizer's averages ----


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("m.ln_f.weight", None, "missing m.ln_f.weight"),
        ("m.h.9.ln_1.weight", mx.ones((8,)), "unknown m.h.9.ln_1.weight"),
        ("v.h.0.attn.c_attn.weight", mx.ones((8, 24)), r"v.h.0.attn.c_attn.weight is \(8, 24\), expected \(24, 8\)"),
        ("v.wte.weight", mx.full((11, 8), np.nan), "v.wte.weight holds a value that is not finite"),
    ],
)
def test_averages_that_do_not_fit_leave_the_optimizer_as_it_was(resumable, name, tensor, message):
    path = resumable / "optimizer.safetensors"
    averages = mx.load(str(path))
    mx.eval(averages)
    averages[name] = tensor
    if tensor is None:
        del averages[name]
    mx.save_safetensors(str(path), averages)
    model, state = trained(step=3)
    before = snapshot(state.optimizer)
    with pytest.raises(ValueError, match=message):
        checkpoints.restore_optimizer(resumable, model, state.optimizer)
    for name, value in snapshot(state.optimizer).items():
        assert np.array_equal(value, before[name]), name
