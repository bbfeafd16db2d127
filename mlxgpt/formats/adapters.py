"""Adapters of low rank (model/lora.py) in files, alone, as PEFT stores them (https://github.com/huggingface/peft).

adapter_model.safetensors holds the matrices A (rank, n_in) and B (n_out, rank) of each layer, adapter_config.json the
path of the model directory that they correct, the base. PEFT opens them on transformers' GPT-2. adapter_base.json is
this package's own: {"sha256": ...}, the base's weights file. (PEFT warns of a key that it doesn't know.)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from ..common import disk
from ..model import lora
from ..model.config import GPTConfig
from ..model.gpt import GPT, Linear
from ..model.lora import LoRA
from . import gpt2, safetensors_file
from .foreign import ForeignModel, read_tokenizer_files
from .mlx_arrays import load_arrays
from .tensors import Tensor, cast, to_float32

WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "adapter_base.json"
_UNSUPPORTED: dict[str, Any] = {  # settings of PEFT that make it compute something else, at what they must be
    "use_rslora": False, "use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None, "layers_to_transform": None,
}  # fmt: skip


def new(rank: int, alpha: float | None, targets: str, base: Path | None) -> LoRA:
    """Describes adapters for the model in a directory, from TrainConfig's lora_rank, lora_alpha and lora_targets.

    ValueError for settings that adapters can't have, and without a directory; FileNotFoundError for a directory that
    holds no model.
    """
    if base is None:
        rule = "expected 0 unless init_from is a model directory (scripts/convert_weights.py makes one)"
        raise ValueError(f"lora_rank is {rank}, {rule}")
    adapters = without_base(rank, alpha, targets)
    return replace(adapters, base=base.resolve(), base_sha256=disk.sha256(_weights_in(base)))


def without_base(rank: int, alpha: float | None, targets: str) -> LoRA:
    """The same for no model in particular: the adapters' shapes. ValueError for settings that adapters can't have."""
    names = tuple(dict.fromkeys(name.strip() for name in targets.split(",") if name.strip()))
    return LoRA(rank, 2.0 * rank if alpha is None else alpha, names)


# ---- writing ----


def tensors(model: GPT) -> dict[str, mx.array]:
    """What adapter_model.safetensors holds: a model's adapters by PEFT's names, A (rank, n_in) and B (n_out, rank)."""
    weights = model.named_weights()
    return {file_name(name): weights[name] for name in lora.names(model)}


def file_name(name: str) -> str:
    """PEFT's name of an adapter's matrix."""
    return f"base_model.model.transformer.{name}.weight"


def small_files(model: GPT) -> dict[str, bytes]:
    """The small files that go beside an adapter's tensors; none for a model without adapters."""
    adapters: LoRA | None = model.lora
    if adapters is None:
        return {}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(adapters.base),
        "r": adapters.rank,
        "lora_alpha": int(adapters.alpha) if adapters.alpha == int(adapters.alpha) else adapters.alpha,
        "target_modules": list(adapters.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,  # transformers' GPT-2 keeps its weights (n_in, n_out)
        "inference_mode": True,
    }
    return {CONFIG: disk.json_bytes(values), BASE: disk.json_bytes({"sha256": adapters.base_sha256})}


# ---- reading ----


def is_in(directory: Path) -> bool:
    """Whether a directory holds adapters, and not a whole model."""
    return (directory / CONFIG).is_file()


def read(directory: Path) -> LoRA:
    """The description of the adapters in a directory. ValueError, naming the file, for what is not a GPT-2's."""
    path, content = directory / CONFIG, disk.read_json(directory / CONFIG)
    if content.get("peft_type") != "LORA":
        raise ValueError(f"{path}: not the configuration of a LoRA adapter")
    for name, expected in _UNSUPPORTED.items():
        if content.get(name, expected) not in (expected, None):
            raise ValueError(f"{path}: {name} is {content[name]!r}, expected {expected!r}")
    names = ("r", "lora_alpha", "target_modules", "base_model_name_or_path")
    rank, alpha, targets, base = (content.get(name) for name in names)
    sha256 = disk.read_json(directory / BASE).get("sha256") if (directory / BASE).is_file() else ""  # PEFT writes none
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or not isinstance(targets, list):
        raise ValueError(f"{path}: r, lora_alpha or target_modules is missing or of another type")
    if not isinstance(sha256, str):
        raise ValueError(f"{directory / BASE}: sha256 is {sha256!r}, expected a digest")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: base_model_name_or_path is {base!r}, expected a model directory")
    try:
        return LoRA(rank, float(alpha), tuple(targets), Path(base), sha256)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def require_base(directory: Path) -> Path:
    """The base of the adapters in a directory. FileNotFoundError if it is gone, ValueError if its weights have
    changed."""
    adapters = read(directory)
    base = adapters.base
    if base is None or not (base / gpt2.CONFIG).is_file():
        raise FileNotFoundError(f"{directory}: its base, the model directory {base}, is not there")
    if adapters.base_sha256 and disk.sha256(_weights_in(base)) != adapters.base_sha256:
        raise ValueError(f"{directory}: its base {base} has changed since: {_weights_in(base).name} is another")
    return base


def config_on_base(directory: Path, base: GPTConfig) -> GPTConfig:
    """The shape of the model whose adapters are in a directory: its base's, but perhaps with fewer positions and
    another dropout. ValueError for any other difference."""
    config = gpt2.read_config(directory).model
    allowed = replace(base, block_size=min(config.block_size, base.block_size), dropout=config.dropout)
    for name, value in vars(allowed).items():
        if getattr(config, name) != value:
            raise ValueError(f"{directory}: {name} is {getattr(config, name)}, but {value} in its base")
    return config


def load(directory: Path, model: GPT) -> None:
    """Puts the adapters in a directory, bit for bit, into a model that has adapters of their shapes.

    FileNotFoundError; ValueError that lists missing, unknown and misshapen tensors, or names one that holds a value
    that is not finite.
    """
    path = directory / WEIGHTS
    names = {file_name(name): name for name in lora.names(model)}
    expected = {name: tuple(array.shape) for name, array in tensors(model).items()}
    found = safetensors_file.read(path)
    gpt2.check_tensors(found, expected, path)
    model.update(tree_unflatten([(names[name], array) for name, array in load_arrays(found, path).items()]))


def merged(directory: Path, base: ForeignModel) -> ForeignModel:
    """The adapters in a directory merged with their base, in the base's types, each weight when it is read."""
    adapters = read(directory)
    config = config_on_base(directory, base.config)
    base = base.cropped(config.block_size)
    model = GPT(config)  # lazy: only its adapters take memory
    lora.add(model, adapters)
    load(directory, model)
    weights = {
        f"{name}.weight": _merged(f"{name}.weight", base.tensors[f"{name}.weight"], layer)
        for name, layer in lora.layers(model, adapters).items()
    }
    return replace(
        base, source=f"LoRA adapters of {adapters.base}", config=config, tensors=base.tensors | weights,
        tokenizer_files=read_tokenizer_files(directory) or base.tokenizer_files, averages={}, training={}, nanogpt={},
    )  # fmt: skip


def _merged(name: str, weight: Tensor, layer: Linear) -> Tensor:
    def read() -> np.ndarray:
        return to_float32(weight.read(), weight.dtype) + np.array(lora.correction(layer), copy=False)

    return cast(name, Tensor("float32", weight.shape, read), weight.dtype)


def _weights_in(directory: Path) -> Path:
    path = directory / (WEIGHTS if is_in(directory) else gpt2.WEIGHTS)
    if not path.is_file():
        raise FileNotFoundError(f"lora: the base {directory} has no {path.name}, expected a model directory")
    return path
