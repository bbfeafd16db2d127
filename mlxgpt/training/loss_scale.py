"""The scale of a float16 loss, which keeps small elements of its gradient above float16's smallest number."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx

FIRST, FLOOR, CEILING = 2.0**14, 1.0, 2.0**24  # a GPT's first gradients have a norm near 5: at 2**16 some overflow
INTERVAL = 2000  # steps without an overflow, after which the scale is doubled


class LossScale:
    """A factor of the loss that adapts: an overflow of the gradient halves it, INTERVAL steps without one double it.

    Nothing is evaluated: the arrays of `state` are inputs and outputs of the step's graph.
    Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740. INTERVAL is torch.amp.GradScaler's, which has neither
    FLOOR nor CEILING.
    """

    def __init__(self) -> None:
        self.state: dict[str, mx.array] = {}
        self.restore({"scale": FIRST, "good_steps": 0})

    @property
    def scale(self) -> mx.array:
        """A float32 scalar, a power of two."""
        return self.state["scale"]

    def update(self, loss: mx.array, norm: mx.array) -> None:
        """Adapts to a step's loss and the norm of its gradient, both scalars.

        A loss that is not finite says nothing about the scale, which stays.
        """
        scale, good_steps = self.state["scale"], self.state["good_steps"]
        overflow, good = mx.isfinite(loss) & ~mx.isfinite(norm), mx.isfinite(norm)
        good_steps = mx.where(overflow, 0, good_steps + good.astype(mx.int32))
        doubles = good_steps >= INTERVAL
        halved, doubled = mx.maximum(scale / 2, FLOOR), mx.minimum(scale * 2, CEILING)
        self.state["scale"] = mx.where(overflow, halved, mx.where(doubles, doubled, scale))
        self.state["good_steps"] = mx.where(doubles, 0, good_steps)

    def saved(self) -> dict[str, float]:
        """JSON values to continue from."""
        return {name: array.item() for name, array in self.state.items()}  # type: ignore[misc]  # numbers

    def restore(self, saved: Mapping[str, float]) -> None:
        """Continues from what saved() returned, in the same dictionary, since a compiled step holds it."""
        self.state["scale"] = mx.array(saved["scale"], mx.float32)
        self.state["good_steps"] = mx.array(saved["good_steps"], mx.int32)


def is_overflow(loss: float, norm: float, scale: float) -> bool:
    """Whether a step was skipped, and a smaller loss scale may mend it."""
    return scale > FLOOR and math.isfinite(loss) and not math.isfinite(norm)
