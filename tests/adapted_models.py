"""A small base and models with adapters on it, for the tests of adapters and of their files."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlxgpt.data.tokenizer import CharTokenizer
from mlxgpt.formats import adapters
from mlxgpt.model import lora
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training.recipe import TrainConfig
from mlxgpt.training.trainer import Trainer

SHAPE = GPTConfig(block_size=16, vocab_size=30, n_layer=2, n_head=2, n_embd=32)
ALL = ",".join(lora.LAYERS)
TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz0123")
BATCH = tuple(np.random.default_rng(0).integers(0, 30, (2, 4, 16)).astype(np.int32))
X, Y = map(mx.array, BATCH)


def base_model() -> GPT:
    mx.random.seed(3)
    model = GPT(SHAPE)
    model.eval()
    return model


def adapted(
    targets: str = ALL, random: bool = False, rank: int = 4, alpha: float | None = None, base: Path | None = None
) -> GPT:
    """The base model with adapters; with `random` they correct something already. `base` is the directory that it is
    stored in, if it is."""
    model = base_model()
    mx.eval(model.parameters())
    mx.random.seed(1)
    if base is None:
        settings = lora.LoRA(rank, 2.0 * rank if alpha is None else alpha, tuple(targets.split(",")))
    else:
        settings = adapters.new(rank, alpha, targets, base)
    lora.add(model, settings)
    if random:
        b = {n: mx.random.normal(p.shape, scale=0.1) for n, p in model.trainable_weights().items() if "lora_B" in n}
        model.update(tree_unflatten(list(b.items())))
    return model


def train(model: GPT, n: int = 12, **options) -> tuple[Trainer, list[float]]:
    trainer = Trainer(model, TrainConfig(learning_rate=1e-2, warmup_iters=0, model=SHAPE, **options))
    return trainer, [trainer.step([BATCH]).item() for _ in range(n)]
