"""Adapters: corrections of low rank to some linear layers, trained instead of the layers' weights.

    y = W x + b + (alpha / rank) B A x,    A (rank, n_in), B (n_out, rank)

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685. A is drawn as
the paper's own code draws it, and B is zero, so that training starts from the model as it was. Every other parameter is
frozen. Linear in gpt.py computes y; formats/adapters.py reads and writes adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..common.settings import nearest
from .gpt import GPT, Linear

LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LoRA:
    """A description of a model's adapters. ValueError for one that can't be."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # of LAYERS
    base: Path | None = None  # the model directory that they correct
    base_sha256: str = ""  # of the weights file there

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


def add(model: GPT, lora: LoRA) -> None:
    """Gives a model adapters, with A drawn from mx.random, and freezes every other parameter."""
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
    """Adds the adapters to the weights, W + (alpha / rank) B A, and removes them from the model."""
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
    """The linear layers that adapters correct, by their names."""
    modules = dict(model.named_modules())
    names = [f"h.{n}.{target}" for n in range(model.config.n_layer) for target in lora.targets]
    return {name: modules[name] for name in names}


def names(model: GPT) -> list[str]:
    """The names of the adapters' matrices, as "h.0.attn.c_attn.lora_A"."""
    return [name for name in model.named_weights() if name.endswith(_PARTS)]
