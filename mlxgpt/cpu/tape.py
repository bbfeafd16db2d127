"""How gradients flow back on the CPU: a tape of the operations of one forward pass.

Each operation records how its result's gradient flows back to what the result was computed from. The gradient of an
activation exists from the first contribution to it until the operation that made the activation has used it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from .memory import empty, view


class ParameterGradient:
    """The gradient of one parameter, summed over all passes since the array was last zero."""

    __slots__ = ("_array", "_memory", "shape")

    def __init__(self, shape: tuple[int, ...], array: mx.array | None = None) -> None:
        """array is where to sum, evaluated float32; without one an array is made when it is first asked for."""
        self.shape, self._array = shape, array
        self._memory = None if array is None else view(array)

    @property
    def array(self) -> mx.array:
        if self._array is None:
            self._array = mx.array(np.zeros(self.shape, np.float32))
            self._memory = view(self._array)
        return self._array

    def memory(self) -> np.ndarray:
        """The array's memory, for a kernel to add to."""
        if self._memory is None:
            self._memory = view(self.array)
        return self._memory


class Parameter:
    """A parameter of a model as kernels take it: its values, and its gradient unless it is frozen."""

    __slots__ = ("gradient", "shape", "values")

    def __init__(self, array: mx.array, gradient: ParameterGradient | None = None) -> None:
        """array is evaluated, float32 where there is a gradient, and bfloat16 as its bits in uint16."""
        self.shape, self.values, self.gradient = array.shape, view(array), gradient


class Gradient:
    """The gradient of the loss with respect to one activation, as far as the backward pass has come."""

    __slots__ = ("shape", "total")

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.total: np.ndarray | None = None

    def memory(self) -> np.ndarray:
        """Memory for a kernel to write a contribution to, which is then given to add()."""
        return empty(self.shape)

    def add(self, contribution: np.ndarray) -> None:
        """Adds a contribution, whose memory becomes the gradient's own."""
        if self.total is None:
            self.total = contribution
        else:
            self.total += contribution

    def take(self) -> np.ndarray | None:
        """What was added so far, and lets go of it. None where nothing was."""
        total, self.total = self.total, None
        return total


class PartOfGradient(Gradient):
    """The gradient of an array that is a part of another one, in the memory of the other's gradient."""

    __slots__ = ("part", "whole")

    def __init__(self, whole: Gradient, part: Callable[[np.ndarray], np.ndarray]) -> None:
        """`part` gives the part's view of an array like the whole. All parts of the whole are written."""
        super().__init__(())
        self.whole, self.part = whole, part

    def memory(self) -> np.ndarray:
        if self.whole.total is None:
            self.whole.total = self.whole.memory()
        return self.part(self.whole.total)

    def add(self, contribution: np.ndarray) -> None:
        """Nothing: it was written where it belongs."""


class Seeds:
    """The seeds of one pass's dropout masks. The first comes from MLX's generator, the others are counted on."""

    def __init__(self, first: int | None = None, count: int = 0) -> None:
        self.first, self.count = first, count

    def next(self) -> int:
        """The seed of the next dropout mask."""
        if self.first is None:  # drawn only when it is needed: evaluating an MLX array takes 0.1 ms
            self.first = int(mx.random.randint(0, 2**31 - 1)) << 32
        self.count += 1
        return self.first + self.count


class Tape:
    """What a forward pass recorded: for each operation how its result's gradient flows back, in order."""

    def __init__(self, *, records: bool = True, loss_scale: float = 1.0, seeds: Seeds | None = None) -> None:
        """records: False where no gradient is wanted. loss_scale: the gradient of the loss, as the backward pass is
        expected to be given it, so that linear_cross_entropy can compute its gradient together with the loss; 0 where
        it is to wait for the backward pass."""
        self.records, self.loss_scale, self.seeds = records, np.float32(loss_scale), seeds or Seeds()
        self._steps: list[tuple[Gradient, Callable[[np.ndarray], None]]] = []

    def gradient_for(self, shape: tuple[int, ...], *inputs: Any) -> Gradient | None:
        """A gradient for the result of an operation; None where none of its inputs wants one.

        Inputs are Arrays and Parameters; quantized weights and None, which may stand among them, have no gradient.
        """
        wanted = self.records and any(getattr(x, "gradient", None) is not None for x in inputs)
        return Gradient(shape) if wanted else None

    def record(self, gradient: Gradient | None, step: Callable[[np.ndarray], None]) -> None:
        """Records a step of the backward pass: given a result's gradient it adds to those of the inputs.

        Operations whose result wants no gradient are not recorded: the backward pass ends at the lowest layer that
        is trained.
        """
        if gradient is not None:
            self._steps.append((gradient, step))

    def __len__(self) -> int:
        """Number of operations that the backward pass has to go through."""
        return len(self._steps)

    def unwind(self) -> None:
        """Goes back through all operations, the last one first, adding to the gradients of activations and of
        Parameters; what an operation kept is let go of as soon as it was passed."""
        while self._steps:
            gradient_of_result, step = self._steps.pop()
            if (gradient := gradient_of_result.take()) is not None:
                step(gradient)
