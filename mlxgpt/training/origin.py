"""Where a run begins: anew, from the weights of a model (--init_from), or where a run left off (--resume)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..common import cli
from ..common.settings import read_toml
from ..data import tokenizer
from ..data.dataset import Dataset
from ..formats import adapters, mlx_arrays, sources, training_state
from ..formats import model_directory as checkpoint
from ..model import lora
from ..model.config import GPTConfig
from ..model.gpt import GPT
from .recipe import TrainConfig

# Without these a run that goes on would not be the same run.
_FIXED = ("seed", "freeze", "lora_rank", "lora_alpha", "lora_targets")
# Of how a run goes these say nothing: the model's shape lies with the model, and data has its checksum.
_NOT_KEPT = ("model", "config", "resume", "init_from", "out_dir", "overwrite")
_NOT_TOLD = ("preset", "data")


@dataclass(frozen=True)
class Start:
    """A model to start from, or a checkpoint to go on with."""

    path: Path
    shape: GPTConfig
    tokenizer: tokenizer.Tokenizer
    record: Mapping[str, Any] | None = None  # what training.json says of a checkpoint that the run goes on with
    damaged: tuple[str, ...] = ()  # newer checkpoints that were passed over, and why
    load: Callable[[], GPT] | None = None  # the weights of a model that is no checkpoint
    directory: Path | None = None  # where that model lies, if it is a model directory: adapters need one to refer to

    @property
    def step(self) -> int:
        """Optimizer steps taken before."""
        return self.record["step"] if self.record else 0

    @property
    def progress(self) -> dict[str, Any]:
        """What the run wrote down for itself; the converter's checkpoints have nothing."""
        return dict(self.record.get("progress") or {}) if self.record else {}

    @property
    def _of_model(self) -> dict[str, Any]:
        """The settings that the model itself has."""
        return {**vars(self.shape), "tokenizer": tokenizer.kind_of(self.tokenizer)}

    def settings(self) -> dict[str, Any]:
        """The settings that come with it, of TrainConfig and GPTConfig."""
        if self.record is None:
            return self._of_model
        adamw = {name: self.record[name] for name in ("beta1", "beta2", "weight_decay")}
        return {**adamw, **self.record["settings"], **self._of_model}

    def require_shape(self, config: TrainConfig) -> None:
        """ValueError for a setting that contradicts the model: all of its shape but dropout, and fewer positions for a
        fresh start."""
        now = {**vars(config), **vars(config.model)}
        for name, value in self._of_model.items():
            crop = name == "block_size" and now[name] < value and self.record is None
            if now[name] != value and name != "dropout" and not crop:
                raise ValueError(f"{name} is {now[name]}, but {value} in the model of {self.path}")

    def require_same_run(self, config: TrainConfig, data: Dataset) -> None:
        """ValueError for what a run that goes on can't change: its data, its seed, what of the model is trained."""
        if self.record is None:
            return
        if self.step >= config.max_iters:
            raise ValueError(f"max_iters is {config.max_iters}, but {self.path} has done {self.step} steps already")
        for name in _FIXED:
            now = getattr(config, name)
            if (value := self.record["settings"].get(name, now)) != now:
                raise ValueError(f"{name} is {now!r}, but {value!r} in {self.path}, and a run can't change it")
        if self.progress.get("data", data.fingerprint) != data.fingerprint:
            raise ValueError(
                f"data: {data.name} is not what {self.path} was trained on; --init_from starts from its weights afresh"
            )

    def introduction(self, config: TrainConfig) -> list[str]:
        """Lines for a person: where the weights come from, and what is another setting now."""
        lines = list(self.damaged)
        if self.record is None:
            return [*lines, f"weights: from {self.path}"]
        before = {**self.record["settings"], "dropout": self.shape.dropout}
        now = {**vars(config), **vars(config.model)}
        lines.append(f"weights: from {self.path}, after {self.step} steps")
        for name, value in before.items():
            if name not in _NOT_TOLD and now.get(name, value) != value:
                lines.append(f"changed: {name} from {value} to {now[name]}")
        return lines

    def put_weights(self, model: GPT) -> None:
        """Its weights into a model, of as many positions as that has; with its adapters, if it has some."""
        adapted = self.record is not None and adapters.is_in(self.path)
        load = self.load or functools.partial(checkpoint.load_base if adapted else checkpoint.load_model, self.path)
        mlx_arrays.copy_weights(load(), model)
        if adapted:
            lora.add(model, adapters.read(self.path))
            adapters.load(self.path, model)

    def home(self, config: TrainConfig) -> Path | None:
        """The directory of the run that goes on, to write there again, unless out_dir names another.

        ValueError where the run has gone on from this checkpoint already.
        """
        run = training_state.run_of(self.path) if self.record else None
        if run is None or not (run / "metrics.jsonl").exists():
            return None
        if config.out_dir and Path(config.out_dir).expanduser().resolve() != run.resolve():
            return None
        newest = (run / "last").resolve()
        if newest != self.path.resolve() and not self.damaged and not config.overwrite:
            raise ValueError(
                f"resume: {run} has gone on from {self.path.name} to {newest.name}; give another --out_dir, "
                "or --overwrite to drop what came after"
            )
        return run


def choose_trained(model: GPT, config: TrainConfig, start: Start | None) -> None:
    """Gives a model the adapters that the settings ask for, and freezes what they say. ValueError."""
    if config.lora_rank and model.lora is None:
        mx.random.seed(config.seed)
        base = start.directory if start else None
        lora.add(model, adapters.new(config.lora_rank, config.lora_alpha, config.lora_targets, base))
    if config.freeze:
        model.freeze_named(name.strip() for name in config.freeze.split(",") if name.strip())


def kept_settings(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint keeps of a run's settings."""
    return {name: value for name, value in vars(config).items() if name not in _NOT_KEPT}


class Begin:
    """What the settings that are given say to begin from, once they are known."""

    start: Start | None = None
    anew = False  # a run that is resumed, but has no checkpoint yet

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Finds it -> the settings that come with it. FileNotFoundError, ValueError, cli.UsageError."""
        if given.get("init_from") and given.get("resume"):
            raise cli.UsageError("init_from and resume are both given, expected one of them")
        if given.get("resume"):
            path = Path(str(given["resume"])).expanduser()
            if _without_checkpoint(path):
                self.anew = True
                again = read_toml(str(path / "settings.toml")) | {"out_dir": str(path), "overwrite": True}
                return {**self.settings(again), **again}
            path, damaged = training_state.find(path)
            record = training_state.load_training_record(path)
            self.start = Start(path, checkpoint.load_config(path), tokenizer.load(path), record, tuple(damaged))
        elif given.get("init_from"):
            found = sources.open_model(path := Path(str(given["init_from"])).expanduser())
            path = found.directory or path
            self.start = Start(path, found.config, found.tokenizer, load=found.load, directory=found.directory)
        return self.start.settings() if self.start else {}


def _without_checkpoint(run: Path) -> bool:
    """Whether a run has ended before its first checkpoint: all that it has is its settings."""
    names = (*run.glob("checkpoints/step-*"), run / "last", run / training_state.TRAINING)
    return (run / "settings.toml").is_file() and not any(path.exists() for path in names)
