"""Adapters: a correction of low rank to some linear layers, trained in the place of their weights.

    y = W x + b + (alpha / rank) B A x,    A (rank, n_in), B (n_out, rank)

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685. A is drawn as
the paper's own code draws it, B is zero, so that training starts from the model as it was. Every other parameter is
frozen. Linear in model.py computes it.

Adapters are stored alone, as PEFT stores them (https://github.com/huggingface/peft): adapter_model.safetensors, and
adapter_config.json with the path of the model that they correct, the base. PEFT opens them on transformers' GPT-2.
adapter_base.json is ours: {"sha256": ...}, the base's weights file. (PEFT warns of a key that it doesn't know.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..common.settings import nearest
from .gpt import GPT, Linear

WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "adapter_base.json"
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LoRA:
    """What a model's adapters are. ValueError for what they can't be."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # of LAYERS
    base: Path | None = None  # the model directory that they correct, and the SHA-256 of the weights there
    base_sha256: str = ""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora_rank is {self.rank}, expected at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora_alpha is {self.alpha}, expected a finite number above 0")
        for target in self.targets:
            if target not in LAYERS:
                hint = nearest(target, LAYERS)
                raise ValueError(f"lora_targets: unknown layer {target!r}{hint}; there are {', '.join(LAYERS)}")
        if not self.targets:
            raise ValueError(f"lora_targets is empty, expected some of {', '.join(LAYERS)}")

    @staticmethod
    def of(rank: int, alpha: float | None, targets: str, base: Path | None) -> LoRA:
        """From TrainConfig's lora_rank, lora_alpha and lora_targets, for the model in a directory."""
        if base is None:
            rule = "expected 0 unless init_from is a model directory (scripts/convert_weights.py makes one)"
            raise ValueError(f"lora_rank is {rank}, {rule}")
        names = tuple(dict.fromkeys(name.strip() for name in targets.split(",") if name.strip()))
        lora = LoRA(rank, 2.0 * rank if alpha is None else alpha, names)
        return dataclasses.replace(lora, base=base.resolve(), base_sha256=_sha256(_weights_in(base)))


def add(model: GPT, lora: LoRA) -> None:
    """Gives a model adapters, A drawn from mx.random, and freezes all else."""
    model.freeze()
    for layer in layers(model, lora).values():
        n_out, n_in = layer.weight.shape
        bound = 1 / math.sqrt(n_in)  # the paper's code: kaiming_uniform_(a=sqrt(5))
        layer.lora_A = mx.random.uniform(-bound, bound, (lora.rank, n_in))
        layer.lora_B = mx.zeros((n_out, lora.rank))
        layer.lora_scale = lora.alpha / lora.rank
        layer.unfreeze(recurse=False, keys=list(_PARTS))
    model.lora = lora


def merge(model: GPT) -> None:
    """Adds the adapters to the weights, W + (alpha / rank) B A, and takes them off the model."""
    for layer in layers(model, model.lora).values():
        layer.weight = layer.weight + correction(layer)
        mx.eval(layer.weight)  # one layer's product is held at a time
        for part in _PARTS:
            del layer[part]
    model.lora = None
    model.unfreeze()


def correction(layer: Linear) -> mx.array:
    """(alpha / rank) B A, (n_out, n_in)."""
    return layer.lora_scale * (layer.lora_B @ layer.lora_A)


def layers(model: GPT, lora: LoRA) -> dict[str, Any]:
    """The linear layers that are corrected, by their names."""
    modules = dict(model.named_modules())
    names = [f"h.{n}.{target}" for n in range(model.config.n_layer) for target in lora.targets]
    return {name: modules[name] for name in names}


# ---- files ----


def tensors(model: GPT) -> dict[str, mx.array]:
    """What adapter_model.safetensors holds: a model's adapters by PEFT's names, A (rank, n_in) and B (n_out, rank)."""
    weights = model.named_weights()
    return {file_name(name): weights[name] for name in names(model)}


def names(model: GPT) -> list[str]:
    """Of the adapters' matrices, as "h.0.attn.c_attn.lora_A"."""
    return [name for name in model.named_weights() if name.endswith(_PARTS)]


def file_name(name: str) -> str:
    """PEFT's name of an adapter's matrix."""
    return f"base_model.model.transformer.{name}.weight"


def files(model: GPT) -> dict[str, bytes]:
    """The small files that go beside an adapter's tensors; none for a model without adapters."""
    lora: LoRA | None = model.lora
    if lora is None:
        return {}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(lora.base),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,  # transformers' GPT-2 keeps its weights (n_in, n_out)
        "inference_mode": True,
    }
    contents = {CONFIG: values, BASE: {"sha256": lora.base_sha256}}
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in contents.items()}


def is_in(directory: Path) -> bool:
    """Whether a directory holds adapters, and not a whole model."""
    return (directory / CONFIG).is_file()


def read(directory: Path) -> LoRA:
    """What the adapters in a directory are. ValueError, naming the file, for what is not an adapter of a GPT-2."""
    path, content = directory / CONFIG, _json(directory / CONFIG)
    if content.get("peft_type") != "LORA":
        raise ValueError(f"{path}: not the configuration of a LoRA adapter")
    for name, expected in _PLAIN.items():
        if content.get(name, expected) not in (expected, None):
            raise ValueError(f"{path}: {name} is {content[name]!r}, expected {expected!r}")
    names = ("r", "lora_alpha", "target_modules", "base_model_name_or_path")
    rank, alpha, targets, base = (content.get(name) for name in names)
    sha256 = _json(directory / BASE).get("sha256") if (directory / BASE).is_file() else ""  # PEFT's own say none
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


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not an object of settings")
    return content


_PLAIN: dict[str, Any] = {  # PEFT's variants that compute something else
    "use_rslora": False, "use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None, "layers_to_transform": None,
}  # fmt: skip


def require_base(lora: LoRA, directory: Path) -> Path:
    """The base of a directory's adapters. FileNotFoundError if it is gone, ValueError if its weights have changed."""
    base = lora.base
    if base is None or not (base / "config.json").is_file():
        raise FileNotFoundError(f"{directory}: its base, the model directory {base}, is not there")
    if lora.base_sha256 and _sha256(_weights_in(base)) != lora.base_sha256:
        raise ValueError(f"{directory}: its base {base} has changed since: {_weights_in(base).name} is another")
    return base


def _weights_in(directory: Path) -> Path:
    path = directory / (WEIGHTS if is_in(directory) else "model.safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"lora: the base {directory} has no {path.name}, expected a model directory")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
