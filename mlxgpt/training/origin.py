"""Where a run begins: with random weights, with those of a model (--init_from), or where a run left off (--resume)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..common import cli
from ..common.settings import from_dict, read_toml
from ..data import tokenizer
from ..data.dataset import Dataset
from ..formats import adapters, mlx_arrays, model_directory, sources, training_state
from ..model import lora
from ..model.config import GPTConfig
from ..model.gpt import GPT
from . import checkpoints
from .recipe import TrainConfig

# Settings that can't change when a run is resumed: it would not be the same run.
_FIXED = ("seed", "freeze", "lora_rank", "lora_alpha", "lora_targets")
# Settings that a checkpoint does not keep: the model's shape lies in config.json, the others are of one command.
_NOT_KEPT = ("model", "config", "resume", "init_from", "out_dir", "overwrite", "fit")
# Settings whose change is not told: the preset's values are told one by one, and the data has a checksum.
_NOT_TOLD = ("preset", "data")


@dataclass(frozen=True)
class Origin:
    """A model whose weights a run begins with, or a checkpoint that it continues from."""

    path: Path
    shape: GPTConfig
    tokenizer: tokenizer.Tokenizer
    record: Mapping[str, Any] | None = None  # the object in a checkpoint's training.json; None for a model
    damaged: tuple[str, ...] = ()  # a line for each newer checkpoint that was passed over
    load: Callable[[], GPT] | None = None  # loads a model that is no checkpoint
    directory: Path | None = None  # where that model lies, if in a model directory: adapters need one to refer to

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self.record["step"] if self.record else 0

    @property
    def progress(self) -> dict[str, Any]:
        """The run's own values in a checkpoint; empty for a model, and for a checkpoint that the converter wrote."""
        return dict(self.record.get("progress") or {}) if self.record else {}

    @property
    def _settings_of_model(self) -> dict[str, Any]:
        return {**vars(self.shape), "tokenizer": tokenizer.kind_of(self.tokenizer)}

    def settings(self) -> dict[str, Any]:
        """The settings that come with it, by their flat names: the model's, and those that a checkpoint keeps."""
        if self.record is None:
            return self._settings_of_model
        adamw = {name: self.record[name] for name in ("beta1", "beta2", "weight_decay")}
        return {**adamw, **self.record["settings"], **self._settings_of_model}

    def require_shape(self, config: TrainConfig) -> None:
        """ValueError for a setting that contradicts the model's shape or tokenizer.

        Dropout may differ; and a run that only takes the weights may use fewer positions.
        """
        now = config.flat()
        for name, value in self._settings_of_model.items():
            crops = name == "block_size" and now[name] < value and self.record is None
            if now[name] != value and name != "dropout" and not crops:
                raise ValueError(f"{name} is {now[name]}, but {value} in the model of {self.path}")

    def require_same_run(self, config: TrainConfig, data: Dataset) -> None:
        """ValueError if a checkpoint can't be continued so: no steps are left, or the data, the seed or the choice of
        trained parameters is another."""
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
        """Lines for a person: where the weights come from, and which settings have changed."""
        lines = list(self.damaged)
        if self.record is None:
            return [*lines, f"weights: from {self.path}"]
        before, now = {**self.record["settings"], "dropout": self.shape.dropout}, config.flat()
        lines.append(f"weights: from {self.path}, after {self.step} steps")
        for name, value in before.items():
            if name not in _NOT_TOLD and now.get(name, value) != value:
                lines.append(f"changed: {name} from {value} to {now[name]}")
        return lines

    def load_weights(self, model: GPT) -> None:
        """Loads the weights into a model, cropped to its positions, and any adapters."""
        adapted = self.record is not None and adapters.is_in(self.path)
        load_checkpoint = model_directory.load_base if adapted else model_directory.load_model
        load = self.load or functools.partial(load_checkpoint, self.path)
        mlx_arrays.copy_weights(load(), model)
        if adapted:
            lora.add(model, adapters.read(self.path))
            adapters.load(self.path, model)

    def run_to_continue(self, config: TrainConfig) -> Path | None:
        """The directory of the checkpoint's run, to write there again; None if it has none or out_dir names another.

        ValueError if the run has gone on from this checkpoint already.
        """
        run = checkpoints.run_of(self.path) if self.record else None
        if run is None or not (run / "metrics.jsonl").exists():
            return None
        if config.out_dir and Path(config.out_dir).expanduser().resolve() != run.resolve():
            return None
        newest = (run / checkpoints.LAST).resolve()
        if newest != self.path.resolve() and not self.damaged and not config.overwrite:
            raise ValueError(
                f"resume: {run} has gone on from {self.path.name} to {newest.name}; give another --out_dir, "
                "or --overwrite to drop what came after"
            )
        return run


def find_origin(given: Mapping[str, Any]) -> tuple[Origin | None, dict[str, Any]]:
    """Where the given settings say that a run begins, None for random weights, and the settings that come with it.

    A run that is resumed but has no checkpoint yet begins where its own settings say. FileNotFoundError, ValueError,
    cli.UsageError.
    """
    init_from, resume = given.get("init_from"), given.get("resume")
    if init_from and resume:
        raise cli.UsageError("init_from and resume are both given, expected one of them")
    if not (init_from or resume):
        return None, {}
    path = Path(str(init_from or resume)).expanduser()
    if resume and _has_no_checkpoint(path):
        settings = read_toml(str(path / "settings.toml")) | {"out_dir": str(path), "overwrite": True}
        origin, inherited = find_origin(settings)
        return origin, {**inherited, **settings}
    found = _find_checkpoint(path) if resume else _find_model(path)
    return found, found.settings()


def _find_checkpoint(path: Path) -> Origin:
    directory, damaged = checkpoints.find(path)
    record = training_state.load_training_record(directory)
    from_dict(TrainConfig, record["settings"], source=str(directory / training_state.TRAINING))
    shape, text = model_directory.load_config(directory), tokenizer.load(directory)
    return Origin(directory, shape, text, record, tuple(damaged))


def _find_model(path: Path) -> Origin:
    found = sources.open_model(path)
    return Origin(found.directory or path, found.config, found.tokenizer, load=found.load, directory=found.directory)


def _has_no_checkpoint(run: Path) -> bool:
    """Whether a run has ended before its first checkpoint, so that all it has is its settings."""
    names = (*run.glob("checkpoints/step-*"), run / checkpoints.LAST, run / training_state.TRAINING)
    return (run / "settings.toml").is_file() and not any(path.exists() for path in names)


def choose_trained(model: GPT, config: TrainConfig, origin: Origin | None) -> None:
    """Adds the adapters that the settings ask for, and freezes the parameters that they name. ValueError."""
    if config.lora_rank and model.lora is None:
        mx.random.seed(config.seed)
        base = origin.directory if origin else None
        lora.add(model, adapters.new(config.lora_rank, config.lora_alpha, config.lora_targets, base))
    _freeze(model, config)


def outline(config: TrainConfig) -> GPT:
    """The model that settings describe, with its adapters and frozen parameters. Its weights are lazy: they take no
    memory. ValueError."""
    model = GPT(config.model)
    if config.lora_rank:
        lora.add(model, adapters.without_base(config.lora_rank, config.lora_alpha, config.lora_targets))
    _freeze(model, config)
    return model


def _freeze(model: GPT, config: TrainConfig) -> None:
    if config.freeze:
        model.freeze_named(name.strip() for name in config.freeze.split(",") if name.strip())


def kept_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of a run that a checkpoint keeps."""
    return {name: value for name, value in vars(config).items() if name not in _NOT_KEPT}
