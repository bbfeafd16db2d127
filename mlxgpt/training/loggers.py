"""Loggers for TensorBoard and Weights & Biases, which get every line of metrics.jsonl; both are optional extras."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..common.disk import write_file
from .metrics import METRICS, History, Logger
from .recipe import TrainConfig

TENSORBOARD, WANDB_ID = "tensorboard", "wandb_id"  # in the run's directory


def require_packages(config: TrainConfig) -> None:
    """ValueError, with the command that installs it, for a package that the settings need and that is missing. To be
    called before anything is written."""
    for setting, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        # W&B makes a directory `wandb` where it is run, which Python finds as a namespace package, without an origin.
        if getattr(config, setting) and ((spec := find_spec(package)) is None or spec.origin is None):
            raise ValueError(f"{setting} needs the package {package}: pip install 'mlxgpt[{setting}]'")


def open_loggers(
    config: TrainConfig, out_dir: Path, after: int | None, settings: Mapping[str, Any], warn: Callable[[str], None]
) -> list[Logger]:
    """The loggers that a run's settings ask for, each new, or with `after` continued after that many steps.

    To be called before Metrics, whose `after` is the same, and which drops the later lines. `settings` are shown beside
    the run. A failure of W&B doesn't end the run: `warn` is given a line about it.
    """
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoard(out_dir / TENSORBOARD, after))
    if config.wandb:
        loggers.append(WandB(config.wandb, out_dir, after, settings, warn))
    return loggers


class TensorBoard:
    """Writes TensorBoard's event files. A mark in a resumed run's file hides later steps of the files before it."""

    def __init__(self, directory: Path, after: int | None) -> None:
        from tensorboardX import SummaryWriter

        if after is None:
            shutil.rmtree(directory, ignore_errors=True)
        purge = None if after is None else after + 1
        # A file's name holds the second of its creation, and a run may stop and resume within one: hence the suffix.
        suffix = f".{uuid.uuid4().hex[:8]}"
        # A thread of tensorboardX writes; a process that is killed loses what it logged in its last second.
        self._writer = SummaryWriter(str(directory), purge_step=purge, filename_suffix=suffix, flush_secs=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Logs to a project of Weights & Biases; without a connection into out_dir/wandb, for `wandb sync`.

    A resumed run is the same run there. W&B's history can't be changed: steps that it has are not logged a second time.
    """

    def __init__(
        self, project: str, out_dir: Path, after: int | None, settings: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        import wandb

        self._warn, self._run, self._first = warn, None, 0
        id_file, metrics = out_dir / WANDB_ID, out_dir / METRICS
        if after is None or not id_file.exists():
            write_file(id_file, uuid.uuid4().hex[:8].encode())
        options: dict[str, Any] = dict(
            project=project, id=id_file.read_text(encoding="ascii"), name=out_dir.name, resume="allow",
            dir=str(out_dir), config=dict(settings),
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
        )  # fmt: skip
        try:
            self._run = wandb.init(**options)
        except Exception as error:  # of many kinds: no key, no network, no such project
            warn(f"wandb: {_reason(error)}; logging to {out_dir / 'wandb'} instead, for `wandb sync`")
            with self._surviving():
                self._run = wandb.init(**options, mode="offline")
        if self._run is not None:
            self._first = self._run.starting_step
            if after is not None and self._run.offline and metrics.exists():  # offline, W&B does not say which it has
                self._first = History.read(metrics).last("step", -1) + 1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._run is not None and step >= self._first:
            with self._surviving():
                self._run.log(dict(values), step=step)

    def close(self) -> None:
        if self._run is not None:
            with self._surviving():
                self._run.finish()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Lets a failure of W&B end the logging, and not the run."""
        try:
            yield
        except Exception as error:
            self._run = None
            self._warn(f"wandb: {_reason(error)}; nothing more is logged there")


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
