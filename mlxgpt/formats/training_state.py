"""Training state: the two files beside a model that training continues from.

`optimizer.safetensors` holds AdamW's running averages for each parameter that is trained: m.NAME of its gradients and
v.NAME of their squares, float32, with this package's parameter names and layout.

`training.json` holds an object:

    format         2; format 1 had no "skipped" and no "progress"
    step           optimizer steps so far
    skipped        how many of them were skipped, and changed nothing
    learning_rate  of the last step; beside it AdamW's beta1, beta2, eps and weight_decay
    best_val_loss  the lowest validation loss so far, or null
    settings       the run's settings, by their flat names
    progress       an object whose content is the run's own
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..common import disk
from . import gpt2, safetensors_file
from .mlx_arrays import load_arrays

OPTIMIZER, TRAINING = "optimizer.safetensors", "training.json"
TRAINING_FORMAT = 2


def training_json(
    *, step: int, learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    best_val_loss: float | None, settings: Mapping[str, Any], progress: Mapping[str, Any] | None = None,
    skipped: int = 0,
) -> bytes:  # fmt: skip
    """The content of training.json. ValueError for a number that is not finite."""
    return disk.json_bytes(
        dict(
            format=TRAINING_FORMAT, step=step, skipped=skipped, learning_rate=learning_rate, beta1=beta1, beta2=beta2,
            eps=eps, weight_decay=weight_decay, best_val_loss=best_val_loss, settings=dict(settings),
            progress=dict(progress or {}),
        )
    )  # fmt: skip


def load_training_record(directory: Path) -> dict[str, Any]:
    """The object in a directory's training.json; "skipped" and "progress" are there whatever the format.

    FileNotFoundError; ValueError that names what is wrong, or a format that is newer than this version. The settings
    are not checked: which names and values are valid is known to the run.
    """
    path = directory / TRAINING
    record = disk.read_json(path)
    disk.require_format(path, "format", record.get("format"), TRAINING_FORMAT)
    record = {"skipped": 0, "progress": {}, **record}
    if not all(isinstance(record.get(name), dict) for name in ("settings", "progress")):
        raise ValueError(f"{path}: not a training state: settings and progress are not both objects")
    for name in ("step", "skipped", "learning_rate", "beta1", "beta2", "eps", "weight_decay", "best_val_loss"):
        value, kind = record.get(name), int if name in ("step", "skipped") else (int, float)
        if value is None and name == "best_val_loss":
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 <= value < math.inf:
            expected = "a whole number of steps" if kind is int else "a number of at least 0"
            raise ValueError(f"{path}: {name} is {value!r}, expected {expected}")
    return record


def load_averages(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, mx.array]:
    """AdamW's running averages in a directory's optimizer.safetensors, float32, by the names m.NAME and v.NAME.

    `shapes` are those of the parameters that are trained, by NAME. FileNotFoundError; ValueError that lists missing,
    unknown and misshapen averages, or names one that holds a value that is not finite.
    """
    path = directory / OPTIMIZER
    expected = {f"{average}.{name}": shape for average in "mv" for name, shape in shapes.items()}
    tensors = safetensors_file.read(path)
    gpt2.check_tensors(tensors, expected, path)
    return load_arrays(tensors, path)
