"""AdamW as GPTs are trained with it: decay on matrices only, warm-up and cosine decay."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ..cpu import operations
from ..model.differentiable import after
from .recipe import TrainConfig


class _Update(NamedTuple):
    """What all parameters of an update have in common: scalars, so that a step that is skipped changes nothing."""

    is_finite: mx.array  # whether the step is taken
    clip: mx.array  # gradients are multiplied by it
    rates: tuple[mx.array, mx.array]  # 1 - beta1, 1 - beta2; 0 where the step is skipped, and so for the next two
    step_size: mx.array  # the learning rate, with the correction of the first average's bias
    decay: mx.array  # learning rate * weight decay
    correction: mx.array  # of the second average's bias
    previous: list[mx.array]  # what the parameter before this one has become


class AdamW(mlx.optimizers.Adam):
    """Adam with bias correction and decoupled weight decay of the parameters of two or more dimensions.

    Biases and layer norms are not decayed. Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config.learning_rate, [config.beta1, config.beta2], bias_correction=True)
        self.weight_decay = config.weight_decay
        self._own: list[mx.array] = []  # the weights that own_weights made
        self._own_state: dict | None = None

    def update_if_finite(self, model: Any, gradients: dict[str, Any], loss: mx.array, max_norm: float) -> mx.array:
        """Clips the gradients to max_norm (0 for none), and updates the model -> their norm before clipping, a scalar.

        Where the norm or the loss is not finite, the model and the optimizer's state (its step too) stay as they were,
        and the scalar is not finite. Nothing is evaluated: the graph itself chooses.
        """
        norm = global_norm(gradients)
        norm = mx.where(mx.isfinite(loss), norm, mx.nan)
        model.update(self._apply(gradients, model, mx.isfinite(norm), clip_factor(norm, max_norm)))
        return norm

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        if not self._initialized:
            self.init(gradients)
        return self._apply(gradients, parameters, mx.array(True), mx.array(1.0))

    def _apply(self, gradients: Any, parameters: Any, is_finite: mx.array, clip: mx.array) -> Any:
        """A tree of new parameters, from gradients times `clip`; the old ones where is_finite is false."""
        taken, step, (beta1, beta2) = is_finite.astype(mx.float32), self.step + 1, self.betas
        update = _Update(
            is_finite, clip, (taken * (1 - beta1), taken * (1 - beta2)),
            step_size=taken * self.learning_rate / (1 - beta1**step),
            decay=taken * self.learning_rate * self.weight_decay,
            correction=mx.rsqrt(1 - beta2**step), previous=[],
        )  # fmt: skip
        self.state["step"] = mx.where(is_finite, step, self.step)
        return tree_map(functools.partial(self._updated, update), gradients, parameters, self.state)

    def _updated(self, update: _Update, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """The new parameter; `state` gets the new averages.

        One parameter is updated at a time and with few intermediates, for each of them is as large as it.
        """
        m, v = state["m"], state["v"]
        g = mx.where(update.is_finite, after(gradient, update.previous) * update.clip, 0)
        m = state["m"] = m + (g - m) * update.rates[0]
        v = state["v"] = v + (g * g - v) * update.rates[1]
        if parameter.ndim >= 2:
            parameter = parameter * (1 - update.decay)
        # In this order, and with no other use of m and v, a GPU does all of it in one kernel.
        new = parameter - m * update.step_size / (mx.sqrt(v) * update.correction + self.eps)
        update.previous[:] = [new]
        return new

    def update_in_place(self, weights: list[mx.array], gradients: list[mx.array], max_norm: float) -> float:
        """Clips the gradients and updates the weights on the CPU's kernels -> the norm before clipping.

        Arrays are in order of the model's parameters, and the weights are those of own_weights(). Where the norm is not
        finite, weights and state stay as they were.
        """
        step = int(self.step.item()) + 1
        norm = operations.adamw(
            weights, gradients, *self._averages, learning_rate=self.learning_rate.item(), beta1=self.betas[0],
            beta2=self.betas[1], eps=self.eps, weight_decay=self.weight_decay, step=step, max_norm=max_norm,
        )  # fmt: skip
        if math.isfinite(norm):
            self.state["step"] = mx.array(step, mx.uint64)
        return norm

    def own_weights(self, model: Any) -> list[mx.array]:
        """The parameters that are trained, in memory that nobody else holds, so that they can be updated in place.

        They and the averages are copied the first time, and whenever somebody has put other arrays into the model or
        the state.
        """
        weights = list(model.trainable_weights().values())
        if self.state is not self._own_state or any(p is not own for p, own in zip(weights, self._own, strict=True)):
            del weights
            _own(model)
            _own(self.state)
            self._own_state = self.state
            self._own = weights = list(model.trainable_weights().values())
            averages = list(self.averages(model).values())
            self._averages = averages[: len(weights)], averages[len(weights) :]
        return weights

    def averages(self, model: Any) -> dict[str, mx.array]:
        """The averages of a model's gradients, "m.wte.weight" and so on, then of their squares, "v.wte.weight".

        They are the arrays themselves, which a step may update in place. Frozen parameters have none.
        """
        state: dict[str, Any] = dict(tree_flatten(self.state))  # type: ignore[arg-type]
        names = model.trainable_weights()
        return {f"{average}.{name}": state[f"{name}.{average}"] for average in "mv" for name in names}

    def restore(self, model: Any, step: int, averages: dict[str, mx.array]) -> None:
        """Continues from averages, named as in averages(), after `step` steps."""
        names = model.trainable_weights()
        state = {f"{name}.{average}": averages[f"{average}.{name}"] for name in names for average in "mv"}
        state["step"] = mx.array(step, mx.uint64)
        self.init(model.trainable_parameters())
        # the same dictionary as before, since a compiled step holds it
        self.state.update(tree_map_with_path(lambda name, array: state.get(name, array), self.state))
        self._own_state = None


def _own(tree: Any) -> None:
    """Copies a tree's arrays in place, one after the other, so that two whole trees never exist at one time."""
    for key, value in enumerate(tree) if isinstance(tree, list) else list(tree.items()):
        if isinstance(value, mx.array):
            tree[key] = mx.array(np.array(value, copy=False))
        elif isinstance(value, (dict, list)):
            _own(value)


def global_norm(gradients: Any) -> mx.array:
    """The Euclidean norm of all arrays of a tree together, a float32 scalar; not finite if an element is not.

    Elements are divided by the largest first, so that no square is too large for float32.
    """
    arrays = dict(tree_flatten(gradients)).values()  # type: ignore[arg-type]  # pairs
    largest, squares = mx.array(1e-30), mx.array(0.0)
    for g in arrays:
        g = after(g, [largest])  # one at a time, as the sum below has intermediates as large as g
        largest = mx.maximum(largest, mx.maximum(g.max(), -g.min()))
    for g in arrays:
        squares = squares + mx.square(after(g, [squares]) / largest).sum()
    return largest * mx.sqrt(squares)


def clip_factor(norm: mx.array, max_norm: float) -> mx.array:
    """What gradients are multiplied by to clip them: min(1, max_norm / norm), and 1 where max_norm is 0.

    Pascanu et al. 2013, https://arxiv.org/abs/1211.5063; PyTorch and MLX add the same 1e-6 to the norm.
    """
    return mx.minimum(max_norm / (norm + 1e-6), 1.0) if max_norm else mx.array(1.0)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of the step that follows `step` others: linear warm-up, then a cosine down to min_lr.

    nanoGPT's get_lr, which counts its steps from 0 as well.
    """
    low = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    end = config.lr_decay_iters or config.max_iters
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return config.learning_rate
    done = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    return low + 0.5 * (1 + math.cos(math.pi * done)) * (config.learning_rate - low)
