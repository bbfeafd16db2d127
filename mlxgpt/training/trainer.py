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
from .loss_scale import LossScale
from .optim import AdamW, learning_rate
from .recipe import TrainConfig

Sums = tuple[mx.array, dict[str, Any]]  # of losses and of their gradients
Batch = tuple[Any, Any]  # inputs and targets, each (B, T) int32: NumPy's, or MLX's as Trainer.on_device makes them


class Trainer:
    """A model, its optimizer, and the two things done with them: a step, and an evaluation.

    The weights and the optimizer's state are float32. In half precision the loss and its gradient are computed from a
    copy of the weights, and the gradients of micro-batches are summed in float32. On a GPU steps are compiled. With
    several ranks, all take the same step on different batches.
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
        self.loss_scale = LossScale() if config.dtype == "float16" else None
        self.scale = mx.array(1.0)  # of the last step's loss, other than 1 in float16 alone
        model.grad_checkpoint = config.grad_checkpoint
        self._dtype = getattr(mx, config.dtype)
        self.in_place = extension.available(self._dtype)
        # On the kernels, kept from step to step: the gradients' memory, and the model over the arrays that it has.
        self._gradients: list[mx.array] = []
        self._on_kernels: OnKernels | None = None
        self._arrays: list[mx.array] = []
        self._all_are_trained = len(model.trainable_weights()) == len(model.named_weights())
        scale = self.loss_scale.state if self.loss_scale else {}
        self._state = [model.state, self.optimizer.state, scale]  # what an update changes
        gradient, update, evaluation = self._loss_and_gradient, self._update_if_finite, self._loss
        if compiled is None:
            compiled = config.compile and mx.default_device().type == mx.gpu
        if compiled and not self.in_place:
            gradient = mx.compile(gradient, [model.state, scale, mx.random.state], [mx.random.state])
            update = mx.compile(update, self._state, self._state)
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
        sums: Any = None
        for n, batch in enumerate(self.on_device(batches)):
            if sums:
                # Starts the micro-batch before this one, without waiting for it. MLX itself waits when ten command
                # buffers are not done (MAX_ACTIVE_TASKS), so two micro-batches' activations are never held.
                mx.async_eval(sums)
            self._seed_dropout(n)
            sums = self._gradient(sums, *batch)
        if self.group.size > 1:
            sums = self.group.average(sums)
        loss, self.norm, self.scale = self._update(sums, len(batches))
        del sums  # the gradients are freed one by one, as the parameters are updated
        mx.async_eval(loss, self.norm, self.scale, self._state)
        return loss

    def on_device(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches in the memory that they are computed from; those that are there already stay as they are.

        Any thread may call it, ahead of the step.
        """
        if self.in_place:
            return list(batches)
        return [(_as_mlx(x), _as_mlx(y)) for x, y in batches]

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss over some batches, without dropout; each rank takes its share of them."""
        self.model.eval()
        mine = batches[self.group.rank :: self.group.size]
        if self.in_place:
            losses = [float(ops.without_gradient(self.model, GPT.loss, *batch)) for batch in mine]
        else:
            losses = self._losses(mine)
        return self.group.sum(sum(losses))[0] / len(batches)

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

    def _losses(self, batches: Sequence[Batch]) -> list[float]:
        """The loss of each batch, without dropout. Only the last one is waited for."""
        losses = []
        for batch in self.on_device(batches):
            losses.append(self._evaluation(*batch))
            mx.async_eval(losses[-1])
        return mx.stack(losses).tolist() if losses else []  # type: ignore[return-value]  # of numbers

    def _loss_and_gradient(self, sums: Sums | None, x: mx.array, y: mx.array) -> Sums:
        """The loss, and its gradient with respect to the float32 weights that are trained, which is multiplied by the
        loss scale; both are added to `sums`, if there are any."""
        frozen = with_parameters(self.model, self._cast(self.model.parameters()))  # outside of the gradient

        def loss(trained: dict[str, Any]) -> tuple[mx.array, mx.array]:
            loss = with_parameters(frozen, self._cast(trained)).loss(x, y)
            return loss * self.loss_scale.scale if self.loss_scale else loss, loss

        (_, value), gradients = mx.value_and_grad(loss)(self.model.trainable_parameters())
        return tree_map(mx.add, sums, (value, gradients)) if sums else (value, gradients)

    def _update_if_finite(self, sums: Sums, n: int) -> tuple[mx.array, mx.array, mx.array]:
        """Updates the model by the mean of n micro-batches -> their mean loss, the norm of its gradient, and the loss
        scale that they were computed with."""
        scale = self.loss_scale.scale if self.loss_scale else mx.array(1.0)
        loss, gradients = sums[0] / n, sums[1]
        if self.loss_scale or n > 1:
            divisor = n * scale
            gradients = tree_map(lambda g: g / divisor, gradients)
        norm = self.optimizer.update_if_finite(self.model, gradients, loss, self.config.grad_clip)
        if self.loss_scale:
            self.loss_scale.update(loss, norm)
        return loss, norm, scale

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


def _as_mlx(array: Any) -> mx.array:
    return mx.array(array) if isinstance(array, np.ndarray) else array
