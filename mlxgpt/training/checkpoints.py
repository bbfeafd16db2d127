"""Training state, and the checkpoints of a run: what training goes on from after whatever ended it.

Training state lies beside a model in two files. `optimizer.safetensors` holds AdamW's averages of the gradients and of
their squares, m.NAME and v.NAME for each parameter that is trained, float32, by our names and in our layout.
`training.json` holds "format": 2; "step", the steps so far, and "skipped", those of them that changed nothing;
"learning_rate" (of the last step), "beta1", "beta2", "eps" and "weight_decay"; "best_val_loss", or null; "settings",
values of TrainConfig; and "progress", an object that is the run's own. Format 1 had no "skipped" and no "progress".

A run's checkpoints are model directories with training state, checkpoints/step-0000500 and so on, and two relative
links name one each: `last`, the newest, and `best`, of the lowest validation loss. SHA256SUMS in each, which
`sha256sum -c` checks, lists its other files, the weights in the last line, so that a list that was cut short shows. A
file that it doesn't list is not the checkpoint's. Earlier versions' runs hold two directories `last` and `best`
instead.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..common import disk
from ..common.settings import from_dict
from ..cpu import operations as kernels
from ..data.tokenizer import Tokenizer
from ..model import lora
from ..model.gpt import GPT
from .optim import AdamW
from .recipe import TrainConfig
from ..formats import model_directory as checkpoint
from ..formats import safetensors_file
from ..formats.safetensors_file import Tensor

OPTIMIZER, TRAINING = "optimizer.safetensors", "training.json"
TRAINING_FORMAT = 2
CHECKPOINTS, LAST, BEST = "checkpoints", "last", "best"
SUMS = "SHA256SUMS"
_WEIGHTS = (checkpoint.WEIGHTS, lora.WEIGHTS)


@dataclass(frozen=True)
class TrainingState:
    """What training goes on from, beside the model."""

    optimizer: AdamW
    step: int
    best_val_loss: float | None
    settings: Mapping[str, Any]  # of TrainConfig, by their flat names
    progress: Mapping[str, Any] = field(default_factory=dict)  # JSON values that the run itself finds again


def training_json(
    *, step: int, learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    best_val_loss: float | None, settings: Mapping[str, Any], progress: Mapping[str, Any] | None = None,
    skipped: int = 0,
) -> bytes:  # fmt: skip
    """The content of training.json. ValueError for a number that is not finite."""
    values = dict(
        format=TRAINING_FORMAT, step=step, skipped=skipped, learning_rate=learning_rate, beta1=beta1, beta2=beta2,
        eps=eps, weight_decay=weight_decay, best_val_loss=best_val_loss, settings=dict(settings),
        progress=dict(progress or {}),
    )  # fmt: skip
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def load_training_record(directory: Path) -> dict[str, Any]:
    """What training.json says, "skipped" and "progress" in any case.

    FileNotFoundError; ValueError that names what is wrong with it, or a format that is newer than this version.
    """
    path = directory / TRAINING
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a training state")
    checkpoint.require_format(path, "format", record.get("format"), TRAINING_FORMAT)
    record = {"skipped": 0, "progress": {}, **record}
    if not all(isinstance(record.get(name), dict) for name in ("settings", "progress")):
        raise ValueError(f"{path}: not a training state")
    for name in ("step", "skipped", "learning_rate", "beta1", "beta2", "eps", "weight_decay", "best_val_loss"):
        value, kind = record.get(name), int if name in ("step", "skipped") else (int, float)
        if value is None and name == "best_val_loss":
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 <= value < math.inf:
            expected = "a whole number of steps" if kind is int else "a number of at least 0"
            raise ValueError(f"{path}: {name} is {value!r}, expected {expected}")
    from_dict(TrainConfig, record["settings"], source=str(path))
    return record


def load_training_state(directory: Path, model: GPT, optimizer: AdamW) -> dict[str, Any]:
    """Puts the training state of a model into its optimizer, whole or not at all -> what training.json says.

    The averages, the step and eps go into the optimizer; its learning rate, betas and decay are its config's.
    FileNotFoundError; ValueError that lists missing, unknown and misshapen averages, or names what is wrong.
    """
    record, path = load_training_record(directory), directory / OPTIMIZER
    weights = model.trainable_weights()
    expected = {f"{average}.{name}": tuple(p.shape) for average in "mv" for name, p in weights.items()}
    tensors = checkpoint.read_tensors(path)
    checkpoint.check_tensors(tensors, expected, path)
    averages = checkpoint.load_arrays(tensors, path)
    optimizer.restore(model, record["step"] - record["skipped"], averages)
    optimizer.eps = record["eps"]
    return record


class Checkpoints:
    """The checkpoints of a run, written by a thread of their own while training goes on.

    Each is written beside, is on the disk before it takes its name, and only then are the links turned to it and older
    ones removed. What a killed run has left half done in the directory is removed or put right at the start.
    """

    def __init__(self, run: Path, keep_last: int) -> None:
        """Keeps the newest keep_last and the best. OSError; ValueError for an earlier version's last/ that can't be
        read."""
        self.run, self.keep_last = run, keep_last
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._copies: dict[tuple[str, str], np.ndarray] = {}
        _remove_leftovers(run)
        _adopt_last(run)

    def save(self, model: GPT, tokenizer: Tokenizer | None, state: TrainingState, best: bool) -> None:
        """Begins a checkpoint of the model and the optimizer as they are, and returns; waits for an earlier one first.

        Nothing is copied unless the next step comes before all is read: then that step waits until what is left is
        copied. OSError of an earlier checkpoint.
        """
        self.wait()
        optimizer = state.optimizer
        weights_file, weights = checkpoint.weights_file(model)
        files = {weights_file: weights, OPTIMIZER: checkpoint.array_tensors(optimizer.averages(model))}
        lent = _Lent(files, self._copies)
        optimizer.before_update = lent.take_back
        record = training_json(
            step=state.step, skipped=state.step - int(optimizer.step.item()),
            learning_rate=optimizer.learning_rate.item(), beta1=optimizer.betas[0], beta2=optimizer.betas[1],
            eps=optimizer.eps, weight_decay=optimizer.weight_decay, best_val_loss=state.best_val_loss,
            settings=state.settings, progress=state.progress,
        )  # fmt: skip
        small = {**checkpoint.small_files(model, tokenizer), TRAINING: record}
        self._thread = threading.Thread(target=self._run, args=(state.step, small, lent, best), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """OSError of a checkpoint that could not be written, once; doesn't wait for one that is being written."""
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    def wait(self) -> None:
        """Until everything is on the disk. OSError as in check."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self, step: int, small: Mapping[str, bytes], lent: _Lent, best: bool) -> None:  # in the thread
        directory = self.run / CHECKPOINTS / _name(step)
        try:
            _write(directory, small, lent)
            for link in (BEST, LAST) if best else (LAST,):
                _turn(self.run, link, directory)
            _prune(self.run, step, self.keep_last)
        except OSError as error:
            last = disk.follow(self.run / LAST)
            kept = f"{last} is kept" if last.is_dir() else "there is no earlier one"
            reason = error.strerror or error
            self._failure = OSError(f"{directory}: the checkpoint can't be written: {reason}; {kept}")
        except BaseException as error:
            self._failure = error
        finally:
            lent.give_back()


def find(path: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint with training state that --resume's path names, a run or one directory, and a line
    for each newer one that is damaged and was passed over: which file, and why.

    Of a run it is the one that `last` names, or one before it. A directory without SHA256SUMS is taken as it is.
    FileNotFoundError if there is none; ValueError if none is whole, the one directory is not, or its format is newer
    than this version.
    """
    run = path.parent if path.name == LAST and path.is_symlink() else path
    is_run = (run / CHECKPOINTS).is_dir() or disk.follow(run / LAST).is_dir()
    damaged: dict[Path, str] = {}
    for directory in filter(_has_training_state, _newest_first(run) if is_run else [disk.follow(path)]):
        if (damage := find_damage(directory)) is None:
            load_training_record(directory)
            return directory, [f"{passed} is passed over: {what}" for passed, what in damaged.items()]
        damaged[directory] = damage
    if damaged:
        what = "; ".join(f"{directory}: {damage}" for directory, damage in damaged.items())
        raise ValueError(f"resume: no checkpoint of {run} is whole: {what}" if is_run else f"resume: {what}")
    raise FileNotFoundError(f"resume: {path} holds no training state: it has no {TRAINING}")


def run_of(directory: Path) -> Path | None:
    """The run whose checkpoint a directory is, of this version or an earlier one; None if it lies elsewhere."""
    absolute = directory.resolve()
    if absolute.parent.name == CHECKPOINTS and _step(absolute) is not None:
        run = absolute.parent.parent
    elif absolute.name == LAST:
        run = absolute.parent
    else:
        return None
    return run if directory.is_absolute() else Path(os.path.relpath(run))


def clear(run: Path) -> None:
    """Removes a run's checkpoints, and the links or directories best and last. What a link names elsewhere stays."""
    for name in (LAST, BEST, CHECKPOINTS):
        _remove(run / name)


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint's files by its SHA256SUMS; None if nothing is, or it has none."""
    try:
        sums = _read_sums(directory)
    except ValueError as error:
        return str(error)
    for name, expected in (sums or {}).items():
        digest = hashlib.sha256()
        try:
            with open(directory / name, "rb", buffering=0) as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
        if digest.hexdigest() != expected:
            return f"{name} is damaged: its SHA-256 is not the one in {SUMS}"
    return None


def _has_training_state(directory: Path) -> bool:
    try:
        sums = _read_sums(directory)
    except ValueError:
        return True  # for all that is known
    return TRAINING in sums if sums else (directory / TRAINING).exists()


def _read_sums(directory: Path) -> dict[str, str] | None:
    """SHA-256 by file, or None if there is no such list. ValueError if it is damaged."""
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
    names = sorted(digests, key=lambda name: (name in _WEIGHTS, name))
    return "".join(f"{digests[name]}  {name}\n" for name in names).encode()


class _Lent:
    """A model's own arrays while a thread writes them, for as long as no step changes them in place."""

    def __init__(self, files: Mapping[str, Mapping[str, Tensor]], copies: dict[tuple[str, str], np.ndarray]) -> None:
        """What had to be copied has its memory in `copies` from then on: fresh memory takes ten times as long."""
        self._copies = copies
        self._unread = {(file, name): t.read() for file, tensors in files.items() for name, t in tensors.items()}
        self._condition, self._reading = threading.Condition(), False  # an array of the model's, not a copy
        self._is_copy = False
        self.files = {
            file: {
                name: Tensor(t.dtype, t.shape, functools.partial(self._read, (file, name)))
                for name, t in tensors.items()
            }
            for file, tensors in files.items()
        }

    def _read(self, key: tuple[str, str]) -> np.ndarray:
        with self._condition:
            self._reading = not self._is_copy
            return self._unread.pop(key)

    def written(self, n: int = 0) -> None:
        """What was read last is not needed any more."""
        with self._condition:
            self._reading = False
            self._condition.notify()

    def give_back(self) -> None:
        """Nothing more will be read."""
        with self._condition:
            self._unread.clear()
        self.written()

    def take_back(self) -> None:
        """From now on the thread reads copies; a second call finds them made."""
        with self._condition:
            for key, array in self._unread.items() if not self._is_copy else ():
                if key not in self._copies:
                    self._copies[key] = np.empty(array.shape, array.dtype)
                kernels.copy(array, self._copies[key])
                self._unread[key] = self._copies[key]
            self._is_copy = True
            self._condition.wait_for(lambda: not self._reading)


def _write(directory: Path, small: Mapping[str, bytes], lent: _Lent) -> None:
    """A checkpoint's directory, which appears when all of it is on the disk."""
    directory.parent.mkdir(exist_ok=True)
    temporary = _beside(directory)
    temporary.mkdir()
    try:
        digests = {name: hashlib.sha256(content) for name, content in small.items()}
        for name, content in small.items():
            disk.write_file(temporary / name, content)
        for name, tensors in lent.files.items():
            digests[name] = hashlib.sha256()
            safetensors_file.write(temporary / name, tensors, lent.written, digests[name])
        for name in lent.files:  # which takes longer than all before, and no array any more
            disk.sync(temporary / name)
        disk.write_file(temporary / SUMS, _sums({name: digest.hexdigest() for name, digest in digests.items()}))
        disk.sync(temporary)
        disk.replace(temporary, directory)
        disk.sync(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _turn(run: Path, link: str, directory: Path) -> None:
    """Points a link of a run to a checkpoint, in one rename."""
    temporary, old = _beside(run / link), run / f".{link}.{os.getpid()}.old.tmp"
    os.symlink(directory.relative_to(run), temporary)
    if (run / link).is_dir() and not (run / link).is_symlink():  # an earlier version's, which a link can't replace
        os.rename(run / link, old)
    os.replace(temporary, run / link)
    disk.sync(run)
    _remove(old)


def _prune(run: Path, step: int, keep_last: int) -> None:
    """After a checkpoint at `step` leaves the newest of them and the best. Later ones are of a run that was gone back
    from. The best, if it is not among the newest, is kept as a model to sample from."""
    directories = _by_step(run)
    best, newest = disk.follow(run / BEST), sorted(n for n in directories if n <= step)[-keep_last:]
    for n, directory in directories.items():
        if n not in newest:
            _drop_training_state(directory) if directory == best else _remove(directory)


def _drop_training_state(directory: Path) -> None:
    """The list of sums goes first: it says what belongs to a checkpoint, whenever this is killed."""
    with contextlib.suppress(ValueError):  # a list that is damaged stays, to be seen
        if sums := _read_sums(directory):
            rest = {name: digest for name, digest in sums.items() if name not in (TRAINING, OPTIMIZER)}
            if rest != sums:
                disk.write_file(directory / SUMS, _sums(rest))
                disk.sync(directory)
        for name in (TRAINING, OPTIMIZER):
            (directory / name).unlink(missing_ok=True)


def _adopt_last(run: Path) -> None:
    """Makes an earlier version's last/ a checkpoint, so that it is there until there is a newer one."""
    last = run / LAST
    if not last.is_symlink() and (last / TRAINING).exists():
        directory = run / CHECKPOINTS / _name(load_training_record(last)["step"])
        directory.parent.mkdir(exist_ok=True)
        disk.replace(last, directory)
        disk.sync(directory.parent)
        _turn(run, LAST, directory)


def _remove_leftovers(run: Path) -> None:
    """Of a run that was killed."""
    for path in (*run.glob(".*.tmp"), *(run / CHECKPOINTS).glob(".*.tmp")):
        _remove(path)
    for old in (run / CHECKPOINTS).glob(".step-*.old"):
        directory = old.with_name(old.name.split(".")[1])
        _remove(old) if directory.exists() else os.rename(old, directory)
    for path in (run / CHECKPOINTS).glob(f"step-*/.{SUMS}.*"):
        path.unlink()


def _remove(path: Path) -> None:
    """A link or a directory if it is there; a directory at once, so that nobody sees half of it."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        hidden = path if path.name.endswith(".tmp") else _beside(path)
        os.rename(path, hidden)
        shutil.rmtree(hidden)


def _beside(path: Path) -> Path:
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
    """A run's checkpoints from `last` on backwards, and after them those later than it, which are of a run that was
    gone back from."""
    by_step, last = _by_step(run), disk.follow(run / LAST)
    newest = _step(last)
    order = sorted(by_step, key=lambda step: (newest is not None and step > newest, -step))
    directories = [by_step[step] for step in order]
    return directories if last in directories or not last.is_dir() else [last, *directories]
