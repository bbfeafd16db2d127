"""The checkpoints of a run: written while training goes on, whole or not there, and found again.

A checkpoint is a model directory with training state: checkpoints/step-0000500 and so on. Two relative links in the
run's directory name one each: `last`, the newest, and `best`, the one of the lowest validation loss.

SHA256SUMS in each checkpoint, which `sha256sum -c` checks, lists its other files, the weights in the last line, so that
a list that was cut short is noticed. A file that it doesn't list does not belong to the checkpoint.

Runs of earlier versions hold two directories `last` and `best` instead, without SHA256SUMS.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..common import disk
from ..data.tokenizer import Tokenizer
from ..formats import adapters, gpt2, model_directory, safetensors_file, training_state
from ..formats.mlx_arrays import as_tensors
from ..formats.training_state import OPTIMIZER, TRAINING
from ..model.gpt import GPT
from .lending import Key, LentArrays
from .optim import AdamW

CHECKPOINTS, LAST, BEST = "checkpoints", "last", "best"
SUMS = "SHA256SUMS"
_WEIGHTS = (gpt2.WEIGHTS, adapters.WEIGHTS)


@dataclass(frozen=True)
class TrainingState:
    """What training continues from, beside the model."""

    optimizer: AdamW
    step: int
    best_val_loss: float | None
    settings: Mapping[str, Any]  # of TrainConfig, by their flat names
    progress: Mapping[str, Any] = field(default_factory=dict)  # JSON values that the run itself reads back

    def json(self) -> bytes:
        """The content of training.json."""
        optimizer = self.optimizer
        return training_state.training_json(
            step=self.step, skipped=self.step - int(optimizer.step.item()),
            learning_rate=optimizer.learning_rate.item(), beta1=optimizer.betas[0], beta2=optimizer.betas[1],
            eps=optimizer.eps, weight_decay=optimizer.weight_decay, best_val_loss=self.best_val_loss,
            settings=self.settings, progress=self.progress,
        )  # fmt: skip


def restore_optimizer(directory: Path, model: GPT, optimizer: AdamW) -> dict[str, Any]:
    """Puts a directory's training state into the optimizer of its model, whole or not at all -> training.json's object.

    The averages, the step and eps come from the files; the learning rate, betas and decay are those of the optimizer's
    own config. FileNotFoundError; ValueError that lists missing, unknown and misshapen averages, or names what is
    wrong.
    """
    record = training_state.load_training_record(directory)
    shapes = {name: tuple(weight.shape) for name, weight in model.trainable_weights().items()}
    averages = training_state.load_averages(directory, shapes)
    optimizer.restore(model, record["step"] - record["skipped"], averages)
    optimizer.eps = record["eps"]
    return record


class Checkpoints:
    """The checkpoints of a run, written by a thread of their own while training goes on.

    Each is written under a temporary name and is on the disk before it takes its own; only then do the links point to
    it, and older ones are removed. What a run that was killed has left unfinished is removed or completed at the start.
    """

    def __init__(self, run: Path, keep_last: int) -> None:
        """Keeps the newest keep_last and the best. OSError; ValueError for an earlier version's last/ that can't be
        read."""
        self.run, self.keep_last = run, keep_last
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._lent: LentArrays | None = None
        self._copies: dict[Key, np.ndarray] = {}
        _remove_leftovers(run)
        _adopt_last(run)

    def save(self, model: GPT, tokenizer: Tokenizer | None, state: TrainingState, best: bool) -> None:
        """Starts to write the model and the optimizer as they are now, and returns; first waits for an earlier
        checkpoint.

        From then on `before_arrays_change` must be called before their arrays change in place. OSError of the earlier
        checkpoint.
        """
        self.wait()
        weights_file, weights = model_directory.weights_file(model)
        averages = as_tensors(state.optimizer.averages(model))
        self._lent = LentArrays({weights_file: weights, OPTIMIZER: averages}, self._copies)
        small_files = {**model_directory.small_files(model, tokenizer), TRAINING: state.json()}
        self._thread = threading.Thread(
            target=self._write_checkpoint, args=(state.step, small_files, self._lent, best), name="checkpoint"
        )
        self._thread.start()

    def before_arrays_change(self) -> None:
        """Makes sure that the checkpoint that is being written does not see the change: what it has not read yet is
        copied."""
        if self._lent:
            self._lent.copy_unread()

    def check(self) -> None:
        """OSError of a checkpoint that could not be written, once; doesn't wait for one that is being written."""
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    def wait(self) -> None:
        """Returns when everything is on the disk. OSError as in check."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def _write_checkpoint(self, step: int, small_files: Mapping[str, bytes], lent: LentArrays, best: bool) -> None:
        """The thread's work; what goes wrong is kept for check()."""
        directory = self.run / CHECKPOINTS / _name(step)
        try:
            _write(directory, small_files, lent)
            for link in (BEST, LAST) if best else (LAST,):
                _point_link(self.run, link, directory)
            _prune(self.run, step, self.keep_last)
        except OSError as error:
            last = disk.follow(self.run / LAST)
            kept = f"{last} is kept" if last.is_dir() else "there is no earlier one"
            reason = error.strerror or error
            self._failure = OSError(f"{directory}: the checkpoint can't be written: {reason}; {kept}")
        except BaseException as error:
            self._failure = error
        finally:
            lent.finish()


def find(path: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint at the path that --resume names, and a line for each newer one that is damaged.

    The path is a run's directory, where the search begins at the checkpoint that `last` names, or one checkpoint. A
    directory without SHA256SUMS is not checked. FileNotFoundError if there is no training state; ValueError if no
    checkpoint is whole, or its format is newer than this version.
    """
    run = path.parent if path.name == LAST and path.is_symlink() else path
    is_run = (run / CHECKPOINTS).is_dir() or disk.follow(run / LAST).is_dir()
    damaged: dict[Path, str] = {}
    for directory in filter(_has_training_state, _newest_first(run) if is_run else [disk.follow(path)]):
        if (damage := find_damage(directory)) is None:
            training_state.load_training_record(directory)
            return directory, [f"{passed} is passed over: {what}" for passed, what in damaged.items()]
        damaged[directory] = damage
    if damaged:
        what = "; ".join(f"{directory}: {damage}" for directory, damage in damaged.items())
        raise ValueError(f"resume: no checkpoint of {run} is whole: {what}" if is_run else f"resume: {what}")
    raise FileNotFoundError(f"resume: {path} holds no training state: it has no {TRAINING}")


def run_of(directory: Path) -> Path | None:
    """The run that a checkpoint belongs to, of this version or an earlier one; None if it lies elsewhere."""
    absolute = directory.resolve()
    if absolute.parent.name == CHECKPOINTS and _step(absolute) is not None:
        run = absolute.parent.parent
    elif absolute.name == LAST:
        run = absolute.parent
    else:
        return None
    return run if directory.is_absolute() else Path(os.path.relpath(run))


def clear(run: Path) -> None:
    """Removes a run's checkpoints, and the links or directories best and last. The targets of links outside the run
    stay."""
    for name in (LAST, BEST, CHECKPOINTS):
        _remove_at_once(run / name)


def find_damage(directory: Path) -> str | None:
    """The first fault of a checkpoint's files by its SHA256SUMS; None if there is none, or no such list."""
    try:
        sums = _read_sums(directory)
    except ValueError as error:
        return str(error)
    for name, expected in (sums or {}).items():
        try:
            digest = disk.sha256(directory / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
        if digest != expected:
            return f"{name} is damaged: its SHA-256 is not the one in {SUMS}"
    return None


def _has_training_state(directory: Path) -> bool:
    try:
        sums = _read_sums(directory)
    except ValueError:
        return True  # it may have: only a whole list would say that it has none
    return TRAINING in sums if sums else (directory / TRAINING).exists()


def _read_sums(directory: Path) -> dict[str, str] | None:
    """The SHA-256 of each file in a checkpoint's SHA256SUMS; None if it has no such list. ValueError if the list is
    damaged."""
    try:
        text = (directory / SUMS).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    *lines, end = text.split("\n")
    sums = {}
    for line in lines:
        if not (match := re.fullmatch(r"([0-9a-f]{64})  ([\w.]+)", line)):
            raise ValueError(f"{SUMS} is damaged: it has a line {line!r}")
        sums[match[2]] = match[1]
    if end or not sums or list(sums)[-1] not in _WEIGHTS:
        raise ValueError(f"{SUMS} is cut short: its last line is not that of {' or '.join(_WEIGHTS)}")
    return sums


def _sums(digests: Mapping[str, str]) -> bytes:
    """The content of SHA256SUMS, the weights last."""
    names = sorted(digests, key=lambda name: (name in _WEIGHTS, name))
    return "".join(f"{digests[name]}  {name}\n" for name in names).encode()


def _write(directory: Path, small_files: Mapping[str, bytes], lent: LentArrays) -> None:
    """Writes a checkpoint's directory, which appears when all of it is on the disk."""
    directory.parent.mkdir(exist_ok=True)
    with disk.appearing(directory) as temporary:
        temporary.mkdir()
        digests = {name: hashlib.sha256(content) for name, content in small_files.items()}
        for name, content in small_files.items():
            (temporary / name).write_bytes(content)
        for name, tensors in lent.files.items():
            digests[name] = hashlib.sha256()
            safetensors_file.write(temporary / name, tensors, lent.finish_array, digests[name])
        (temporary / SUMS).write_bytes(_sums({name: digest.hexdigest() for name, digest in digests.items()}))
    disk.sync(directory.parent)


def _point_link(run: Path, link: str, directory: Path) -> None:
    """Points a link of a run to a checkpoint, in one rename."""
    temporary = _temporary(run / link)
    os.symlink(directory.relative_to(run), temporary)
    disk.replace(temporary, run / link)
    disk.sync(run)


def _prune(run: Path, step: int, keep_last: int) -> None:
    """After a checkpoint at `step`: keeps the newest keep_last up to it, and the best.

    Later ones are left over from a run later resumed at an earlier step. The best, if it is not among the newest, is
    kept as a model to sample from.
    """
    directories = _by_step(run)
    best, newest = disk.follow(run / BEST), sorted(n for n in directories if n <= step)[-keep_last:]
    for n, directory in directories.items():
        if n not in newest:
            _drop_training_state(directory) if directory == best else _remove_at_once(directory)


def _drop_training_state(directory: Path) -> None:
    """Leaves the model of a checkpoint. SHA256SUMS is changed first: should this be killed between, it says which
    files belong to the checkpoint."""
    with contextlib.suppress(ValueError):  # a damaged list stays as it is, so that the damage is still found
        if sums := _read_sums(directory):
            rest = {name: digest for name, digest in sums.items() if name not in (TRAINING, OPTIMIZER)}
            if rest != sums:
                disk.write_file(directory / SUMS, _sums(rest))
                disk.sync(directory)
        for name in (TRAINING, OPTIMIZER):
            (directory / name).unlink(missing_ok=True)


def _adopt_last(run: Path) -> None:
    """Makes an earlier version's last/ a checkpoint, so that it is kept until there is a newer one."""
    last = run / LAST
    if not last.is_symlink() and (last / TRAINING).exists():
        directory = run / CHECKPOINTS / _name(training_state.load_training_record(last)["step"])
        directory.parent.mkdir(exist_ok=True)
        disk.replace(last, directory)
        disk.sync(directory.parent)
        _point_link(run, LAST, directory)


def _remove_leftovers(run: Path) -> None:
    """Removes the temporary files of a run that was killed, and completes what it was replacing."""
    checkpoints = run / CHECKPOINTS
    for path in (*run.glob(".*.tmp"), *checkpoints.glob(".*.tmp"), *checkpoints.glob(f"step-*/.{SUMS}.*")):
        disk.remove(path)
    for old in (*run.glob(".*.old"), *checkpoints.glob(".*.old")):
        replaced = old.with_name(old.name.split(".")[1])
        disk.remove(old) if os.path.lexists(replaced) else os.rename(old, replaced)


def _remove_at_once(path: Path) -> None:
    """Removes a link or a directory, if it is there, so that nobody sees half of it."""
    if path.is_symlink() or path.is_dir():
        temporary = _temporary(path)
        os.rename(path, temporary)
        disk.remove(temporary)


def _temporary(path: Path) -> Path:
    """A name beside a path, whose file or directory is a leftover when a run starts."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _name(step: int) -> str:
    return f"step-{step:07}"


def _step(directory: Path) -> int | None:
    match = re.fullmatch(r"step-(\d+)", directory.name)
    return int(match[1]) if match else None


def _by_step(run: Path) -> dict[int, Path]:
    steps = {_step(path): path for path in (run / CHECKPOINTS).glob("step-*")}
    return {step: path for step, path in steps.items() if step is not None}


def _newest_first(run: Path) -> list[Path]:
    """A run's checkpoints: `last` and backwards from there, and after them the ones of later steps, which are left over
    from a run later resumed at an earlier step."""
    by_step, last = _by_step(run), disk.follow(run / LAST)
    newest = _step(last)
    order = sorted(by_step, key=lambda step: (newest is not None and step > newest, -step))
    directories = [by_step[step] for step in order]
    return directories if last in directories or not last.is_dir() else [last, *directories]
