"""A training step and an evaluation, on the CPU's kernels or compiled for a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from ..common.modules import with_parameters
from ..cpu import extension
from ..cpu.entry import OnKernels
from ..cpu.memory import zero
from ..cpu.tape import ParameterGradient, Tape
from ..model import ops
from ..model.gpt import GPT
from .distributed import Group
from .optim import AdamW, learning_rate
from .recipe import TrainConfig

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, each (B, T)


class Trainer:
    """A model, its optimizer, and the two things done with them: a step, and an evaluation.

    The weights and the optimizer's state are float32; with dtype bfloat16 the loss and its gradient are computed in
    bfloat16 from a copy of the weights. On a GPU both are compiled. With several ranks, all take the same step on
    different batches.
    """

    def __init__(
        self, model: GPT, config: TrainConfig, group: Group | None = None, *, compiled: bool | None = None
    ) -> None:
        """Weights and state are the same on all ranks of the group, if the process is one of several.

        compiled: whether steps are compiled where the kernels don't compute them; None for config.compile on a GPU.
        """
        self.model, self.config, self.group = model, config, group or Group()
        self.optimizer = AdamW(config)
        self.optimizer.init(model.trainable_parameters())
        self.steps = 0  # taken or skipped
        self.norm = mx.array(0.0)  # of the last step's gradient, before clipping; not finite where the step was skipped
        model.grad_checkpoint = config.grad_checkpoint
        self._dtype = getattr(mx, config.dtype)
        self.in_place = extension.available(self._dtype)
        # On the kernels, kept from step to step: the gradients' memory, and the model over the arrays that it has.
        self._gradients: list[mx.array] = []
        self._on_kernels: OnKernels | None = None
        self._arrays: list[mx.array] = []
        self._all_are_trained = len(model.trainable_weights()) == len(model.named_weights())
        gradient, update, evaluation = self._loss_and_gradient, self._update_if_finite, self._loss
        if compiled is None:
            compiled = config.compile and mx.default_device().type == mx.gpu
        if compiled and not self.in_place:
            state = [model.state, self.optimizer.state]
            gradient = mx.compile(gradient, [model.state, mx.random.state], [mx.random.state])
            update = mx.compile(update, state, state)
            evaluation = mx.compile(evaluation, [model.state])
        self._gradient, self._update, self._evaluation = gradient, update, evaluation

    def step(self, batches: Sequence[Batch], before_update: Callable[[], None] = lambda: None) -> mx.array:
        """One optimizer step on the mean gradient of some micro-batches, of all ranks together -> their mean loss.

        Where the loss (a scalar) or the gradient's norm is not finite, weights and optimizer stay as they were: the
        step is skipped. before_update is called before arrays change in place, which they do on the CPU's kernels.
        """
        if not self.model.training:
            self.model.train()
        self.optimizer.learning_rate = learning_rate(self.config, self.steps)
        self.steps += 1
        if self.in_place:
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
        del gradients  # they are freed one by one, as the parameters are updated
        mx.async_eval(loss, self.norm, self.model.state, self.optimizer.state)
        return loss

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss over some batches, without dropout; each rank takes its share of them."""
        self.model.eval()
        mine = batches[self.group.rank :: self.group.size]
        return self.group.sum(sum(map(self._loss_without_gradient, mine)))[0] / len(batches)

    def _loss_without_gradient(self, batch: Batch) -> float:
        if self.in_place:
            return float(ops.without_gradient(self.model, GPT.loss, *batch))
        return float(self._evaluation(*map(mx.array, batch)))

    def _gradient_of(self, n: int, batch: Batch) -> tuple[mx.array, dict[str, Any]]:
        self._seed_dropout(n)
        return self._gradient(*map(mx.array, batch))

    def _seed_dropout(self, n: int) -> None:
        """Seeds MLX's generator, which dropout masks are drawn from, for this rank's n-th micro-batch of the step.

        The masks follow from the run's seed and the numbers of step and micro-batch: a run that is resumed, on any
        number of ranks, has the same ones.
        """
        if self.model.config.dropout:
            numbers = self.config.seed, self.steps, self.group.rank + n * self.group.size
            mx.random.seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

    # ---- by MLX's operations ----

    def _cast(self, weights: Any) -> Any:
        """Weights as the loss is computed from them."""
        return tree_map(lambda w: w.astype(self._dtype), weights)

    def _loss(self, x: mx.array, y: mx.array) -> mx.array:
        return with_parameters(self.model, self._cast(self.model.parameters())).loss(x, y)

    def _loss_and_gradient(self, x: mx.array, y: mx.array) -> tuple[mx.array, dict[str, Any]]:
        """The loss, and its gradient with respect to the float32 weights that are trained."""
        frozen = with_parameters(self.model, self._cast(self.model.parameters()))  # outside of the gradient

        def loss(trained: dict[str, Any]) -> mx.array:
            return with_parameters(frozen, self._cast(trained)).loss(x, y)

        return mx.value_and_grad(loss)(self.model.trainable_parameters())

    def _update_if_finite(self, gradients: dict[str, Any], loss: mx.array) -> mx.array:
        return self.optimizer.update_if_finite(self.model, gradients, loss, self.config.grad_clip)

    # ---- on the CPU's kernels ----

    def _step_in_place(self, batches: Sequence[Batch], before_update: Callable[[], None]) -> mx.array:
        """step() on the CPU's kernels, in memory that is kept from step to step."""
        weights = self.optimizer.own_weights(self.model)
        on_kernels = self._model_on_kernels(weights)
        zero(self._gradients)
        losses, scale = [], 1 / len(batches)
        for n, batch in enumerate(batches):
            self._seed_dropout(n)
            loss = on_kernels.run(GPT.loss, Tape(loss_scale=scale), *batch)
            loss.backward(scale)
            losses.append(float(loss.values))
        mean = mx.array(sum(losses) / len(losses))
        mean, gradients = self.group.average((mean, self._gradients))
        norm = math.nan
        if math.isfinite(float(mean)):
            before_update()
            norm = self.optimizer.update_in_place(weights, gradients, self.config.grad_clip)
        self.norm = mx.array(norm, mx.float64)  # it may be finite where a float32 is not
        return mean

    def _model_on_kernels(self, weights: list[mx.array]) -> OnKernels:
        """The model over the arrays that it has now; made anew only when somebody has put other arrays into it."""
        frozen = [] if self._all_are_trained else list(self.model.named_weights().values())
        arrays = [*weights, *frozen]
        if self._on_kernels is None or any(a is not b for a, b in zip(arrays, self._arrays, strict=True)):
            trained = self.model.trainable_weights()
            if not self._gradients:
                self._gradients = [mx.zeros(w.shape) for w in trained.values()]
                mx.eval(self._gradients)
            gradients = zip(trained, self._gradients, strict=True)
            self._on_kernels = OnKernels(self.model, {name: ParameterGradient(g.shape, g) for name, g in gradients})
            self._arrays = arrays
        return self._on_kernels
