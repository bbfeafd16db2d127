"""A training step and an evaluation, on the CPU's kernels or compiled for a GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from ..cpu import operations as kernels
from ..model.gpt import GPT
from .distributed import Group
from .optim import AdamW, learning_rate
from .recipe import TrainConfig

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, each (B, T)


class Trainer:
    """A model, its optimizer, and the two things done with them: a step, and an evaluation.

    The weights and the optimizer's state are float32; with dtype bfloat16 the loss and its gradient are
    computed in bfloat16 from a copy of the weights. On a GPU both are compiled. Of a `group` every rank makes the
    same step, each on batches of its own.
    """

    def __init__(self, model: GPT, config: TrainConfig, group: Group | None = None) -> None:
        """Weights and state are the same on all ranks of the group, if the process is one of several."""
        self.model, self.config, self.group = model, config, group or Group()
        self.optimizer = AdamW(config)
        self.optimizer.init(model.trainable_parameters())
        self.steps = 0  # taken or skipped
        self.norm = mx.array(0.0)  # of the last step's gradient, before clipping; not finite where the step was skipped
        model.grad_checkpoint = config.grad_checkpoint
        compute = getattr(mx, config.dtype)

        def cast(weights: dict[str, Any]) -> None:
            model.update(tree_map(lambda w: w.astype(compute), weights))

        def loss(trained: dict[str, Any], x: mx.array, y: mx.array) -> mx.array:
            cast(trained)
            return model.loss(x, y)

        def with_weights(function: Callable[..., Any], x: mx.array, y: mx.array) -> Any:
            weights, trained = model.parameters(), model.trainable_parameters()
            cast(weights)  # the frozen ones here, where no gradient is taken
            result = function(trained, x, y)
            model.update(weights)  # the float32 ones again
            return result

        def gradient(x: mx.array, y: mx.array) -> tuple[mx.array, dict[str, Any]]:
            return with_weights(mx.value_and_grad(loss), x, y)

        def update(gradients: dict[str, Any], loss: mx.array) -> mx.array:
            return self.optimizer.update_if_finite(model, gradients, loss, config.grad_clip)

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

    def step(self, batches: Sequence[Batch], before_update: Callable[[], None] = lambda: None) -> mx.array:
        """One optimizer step on the mean gradient of some micro-batches, all ranks' together -> their mean loss, a
        scalar.

        `before_update` is called right before the model's and the optimizer's arrays are changed in place.

        Where that or the gradient's norm is not finite, weights and optimizer stay as they were: the step is skipped.
        """
        if not self.model.training:
            self.model.train()
        self.optimizer.learning_rate = learning_rate(self.config, self.steps)
        self.steps += 1
        if self._in_place:
            return self._step_in_place(batches, before_update)
        loss, gradients = self._gradient_of(0, batches[0])
        for n, batch in enumerate(batches[1:], 1):
            mx.eval(loss, gradients)  # so that one micro-batch's activations are held at a time
            sums = loss, gradients
            loss, gradients = tree_map(mx.add, sums, self._gradient_of(n, batch))
        if len(batches) > 1:
            loss, gradients = tree_map(lambda a: a / len(batches), (loss, gradients))
        if self.group.size > 1:
            loss, gradients = self.group.average((loss.astype(mx.float32), gradients))
        self.norm = self._update(gradients, loss)
        mx.async_eval(loss, self.norm, self.model.state, self.optimizer.state)
        return loss

    def _gradient_of(self, n: int, batch: Batch) -> tuple[mx.array, dict[str, Any]]:
        self._begin(n)
        return self._gradient(*map(mx.array, batch))

    def _begin(self, n: int) -> None:
        """Puts MLX's generator, which dropout masks are drawn from, where the step and this rank's n-th micro-batch
        say: a run may be broken off, and go on with other ranks, and has the same masks."""
        if self.model.config.dropout:
            place = self.config.seed, self.steps, self.group.rank + n * self.group.size
            mx.random.seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))

    def _step_in_place(self, batches: Sequence[Batch], before_update: Callable[[], None]) -> mx.array:
        """The same on the CPU's kernels, in memory that is kept from step to step."""
        weights = self.optimizer.own_weights(self.model)
        if not self._gradients:
            self._gradients = [mx.zeros(w.shape) for w in weights]
        kernels.zero(self._gradients)
        add = functools.partial(kernels.add_gradients, weights, self._gradients, 1 / len(batches), self.model.loss)
        losses = []
        for n, (x, y) in enumerate(batches):
            self._begin(n)
            losses.append(add(mx.array(x), mx.array(y)).item())
        mean = mx.array(sum(losses) / len(losses))
        loss, gradients = self.group.average((mean, self._gradients))
        norm = math.nan
        if math.isfinite(float(loss)):
            before_update()
            norm = self.optimizer.update_in_place(weights, gradients, self.config.grad_clip)
        self.norm = mx.array(norm, mx.float64)  # it may be finite where a float32 is not
        return loss

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss over some batches, without dropout; of several ranks each takes its share of them."""
        self.model.eval()
        loss = functools.partial(kernels.run, self.model.loss) if self._in_place else self._evaluation
        ours = (float(loss(mx.array(x), mx.array(y))) for x, y in batches[self.group.rank :: self.group.size])
        return self.group.sum(sum(ours))[0] / len(batches)


def _compiles(config: TrainConfig) -> bool:
    """On a GPU; the CPU's kernels run at once and leave no graph to compile."""
    return config.compile and mx.default_device().type == mx.gpu
