"""AdamW as GPTs are trained with it: decay on matrices only, warm-up and cosine decay."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers
from mlx.optimizers import clip_grad_norm

from .config import TrainConfig

__all__ = ["AdamW", "clip_grad_norm", "learning_rate"]


class AdamW(mlx.optimizers.Adam):
    """Adam with bias correction and decoupled weight decay of the parameters of two or more dimensions:
    biases and layer norms are not decayed. Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config.learning_rate, [config.beta1, config.beta2], bias_correction=True)
        self.weight_decay = config.weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        if parameter.ndim >= 2:
            parameter = parameter * (1 - self.learning_rate * self.weight_decay)
        return super().apply_single(gradient, parameter, state)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the step that follows `step` others: linear warm-up, then a cosine down to min_lr (nanoGPT's get_lr)."""
    low = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    end = config.lr_decay_iters or config.max_iters
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return config.learning_rate
    done = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    return low + 0.5 * (1 + math.cos(math.pi * done)) * (config.learning_rate - low)
