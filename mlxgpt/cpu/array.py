"""Activations on the CPU: values in memory, and the tape on which operations on them are recorded.

An operation runs its kernel at once, without a graph or a thread to wake, except that the last step of a linear layer
or of dropout waits until its result is read: a sum or a GELU that reads it is computed in the same pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from . import extension
from .memory import empty
from .tape import Gradient, Tape


class Recompute(Protocol):
    """How the backward pass computes an array's values once more, in place of keeping them until then."""

    def __call__(self) -> np.ndarray: ...


class Array:
    """An activation, or token ids: values (NumPy), the tape of their pass, and a gradient where one is wanted."""

    __slots__ = ("_values", "gradient", "recompute", "shape", "tape")

    def __init__(
        self,
        values: np.ndarray | None,
        tape: Tape,
        gradient: Gradient | None = None,
        recompute: Recompute | None = None,
    ) -> None:
        self._values, self.tape, self.gradient, self.recompute = values, tape, gradient, recompute
        self.shape: tuple[int, ...] = () if values is None else values.shape

    @property
    def values(self) -> np.ndarray:
        return self._values  # type: ignore[return-value]

    def compute(self) -> None:
        """Runs the kernel that the values are waiting for, if there is one."""

    def for_backward(self) -> Callable[[], np.ndarray]:
        """A function that gives the values in the backward pass, and keeps no more memory than it must."""
        if self.recompute is not None:
            return self.recompute
        values = self.values
        return lambda: values

    def backward(self, gradient: float | np.ndarray = 1.0) -> None:
        """Adds the gradients of a loss to those of all Parameters, given the loss's gradient for this array."""
        if self.gradient is not None:
            whole = empty(self.shape)
            whole[...] = gradient
            self.gradient.add(whole)
            self.tape.unwind()

    def __add__(self, other: Array) -> Array:
        """x + y, of the same shape."""
        if isinstance(other, Deferred):
            return other.added_to(self)
        return self.added_to(other)

    def added_to(self, x: Array) -> Array:
        """x + this array, by a kernel of its own."""
        out, gradient = empty(self.shape), self.tape.gradient_for(self.shape, self, x)
        extension.core.dropout(self.values, x.values, 0.0, 0, out)  # dropout of nothing
        gradients = self.gradient, x.gradient

        def backward(dout: np.ndarray) -> None:
            first, *others = (g for g in gradients if g is not None)
            for other in others:
                contribution = other.memory()
                contribution[...] = dout
                other.add(contribution)
            first.add(dout)

        self.tape.record(gradient, backward)
        return Array(out, self.tape, gradient)

    def __getitem__(self, index: Any) -> Array:
        """A part of the array. TypeError where a gradient is wanted, which parts do not have."""
        if self.gradient is not None:
            raise TypeError("the CPU path has no gradient for a part of an array")
        return Array(self.values[index], self.tape)


class Kernel(Protocol):
    def __call__(self, gradient: Gradient | None, residual: Array | None = None) -> np.ndarray:
        """Runs -> values, with the residual added to them. Records the backward step for their gradient."""


class Deferred(Array):
    """An array whose kernel runs when its values are first read, or together with the sum that it is added to."""

    __slots__ = ("kernel",)

    def __init__(self, shape: tuple[int, ...], tape: Tape, gradient: Gradient | None, kernel: Kernel) -> None:
        super().__init__(None, tape, gradient)
        self.shape, self.kernel = shape, kernel

    @property
    def is_computed(self) -> bool:
        return self._values is not None

    def compute(self) -> None:
        if self._values is None:
            self._values = self.kernel(self.gradient)
            del self.kernel  # and with it what it reads

    @property
    def values(self) -> np.ndarray:
        self.compute()
        return self._values  # type: ignore[return-value]

    def added_to(self, x: Array) -> Array:
        if self.is_computed:
            return super().added_to(x)
        gradient = self.tape.gradient_for(self.shape, self, x)
        return Array(self.kernel(gradient, residual=x), self.tape, gradient)
