"""A training step and an evaluation, on the CPU's kernels or compiled for a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from . import kernels
from .config import TrainConfig
from .distributed import Group
from .model import GPT
from .optim import AdamW, clip_grad_norm, learning_rate

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, each (B, T)


class Trainer:
    """A model, its optimizer, and the two things done with them: a step, and an evaluation.

    The weights and the optimizer's state are float32; with dtype bfloat16 the loss and its gradient are
    computed in bfloat16 from a copy of the weights. On a GPU both are compiled. Of a `group` every rank makes the
    same step, each on batches of its own.
    """

    def __init__(self, model: GPT, config: TrainConfig, group: Group | None = None) -> None:
        self.model, self.config, self.group = model, config, group or Group()
        self.optimizer = AdamW(config)
        self.optimizer.init(model.parameters())
        self.steps = 0  # optimizer steps taken
        compute = getattr(mx, config.dtype)

        def loss(weights: dict[str, Any], x: mx.array, y: mx.array) -> mx.array:
            model.update(tree_map(lambda w: w.astype(compute), weights))
            return model.loss(x, y)

        def with_weights(function: Callable[..., Any], x: mx.array, y: mx.array) -> Any:
            weights = model.parameters()
            result = function(weights, x, y)
            model.update(weights)  # the float32 ones again
            return result

        def gradient(x: mx.array, y: mx.array) -> tuple[mx.array, dict[str, Any]]:
            return with_weights(mx.value_and_grad(loss), x, y)

        def update(gradients: dict[str, Any]) -> None:
            if config.grad_clip:
                gradients, _ = clip_grad_norm(gradients, config.grad_clip)
            self.optimizer.update(model, gradients)

        def evaluation(x: mx.array, y: mx.array) -> mx.array:
            return with_weights(loss, x, y)

        if _compiles(config):
            state = [model.state, self.optimizer.state]
            gradient = mx.compile(gradient, [model.state, mx.random.state], [mx.random.state])
            update = mx.compile(update, state, state)
            evaluation = mx.compile(evaluation, [model.state])
        self._gradient, self._update, self._evaluation = gradient, update, evaluation
        self._in_place = kernels.available(compute)
        self._gradients: list[mx.array] = []

    def step(self, batches: Sequence[Batch]) -> mx.array:
        """One optimizer step on the mean gradient of all ranks' micro-batches -> their mean loss, a scalar."""
        if not self.model.training:
            self.model.train()
        self.optimizer.learning_rate = learning_rate(self.config, self.steps)
        self.steps += 1
        if self._in_place:
            return self._step_in_place(batches)
        (x, y), *others = batches
        loss, gradients = self._gradient(mx.array(x), mx.array(y))
        for x, y in others:
            mx.eval(loss, gradients)  # so that one micro-batch's activations are held at a time
            sums = loss, gradients
            loss, gradients = tree_map(mx.add, sums, self._gradient(mx.array(x), mx.array(y)))
        if others:
            loss, gradients = tree_map(lambda a: a / len(batches), (loss, gradients))
        if self.group.size > 1:
            loss, gradients = self.group.average((loss.astype(mx.float32), gradients))
        self._update(gradients)
        mx.async_eval(loss, self.model.state, self.optimizer.state)
        return loss

    def _step_in_place(self, batches: Sequence[Batch]) -> mx.array:
        """The same on the CPU's kernels, in memory that is kept from step to step."""
        weights = self.optimizer.own_weights(self.model)
        if not self._gradients:
            self._gradients = [mx.zeros(w.shape) for w in weights]
        kernels.zero(self._gradients)
        add = functools.partial(kernels.add_gradients, weights, self._gradients, 1 / len(batches), self.model.loss)
        losses = [add(mx.array(x), mx.array(y)).item() for x, y in batches]
        loss, *gradients = self.group.average([mx.array(sum(losses) / len(losses)), *self._gradients])
        self.optimizer.update_in_place(weights, gradients, self.config.grad_clip)
        return loss

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss over some batches, the same ones on all ranks, which share them; without dropout."""
        self.model.eval()
        loss = functools.partial(kernels.run, self.model.loss) if self._in_place else self._evaluation
        ours = batches[self.group.rank :: self.group.size]
        (total,) = self.group.sum(sum(float(loss(mx.array(x), mx.array(y))) for x, y in ours))
        return total / len(batches)


def _compiles(config: TrainConfig) -> bool:
    """On a GPU; the CPU's kernels run at once and leave no graph to compile."""
    return config.compile and mx.default_device().type == mx.gpu
