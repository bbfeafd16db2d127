"""Which windows of the data each step and each evaluation takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.windows import Windows
from . import distributed
from .distributed import Group
from .recipe import TrainConfig
from .trainer import Batch


class StepWindows:
    """The windows of the training data that each optimizer step takes, and this rank's share of them."""

    def __init__(
        self, shards: Sequence[np.ndarray], config: TrainConfig, group: Group, first_step: int, drawn: int | None
    ) -> None:
        """`drawn` windows were taken by all ranks in the steps before; None if that is not known, as with these
        settings. ValueError if a step can't be shared by the ranks, or the data is too short for a window."""
        sizes = config.batch_size, config.gradient_accumulation_steps
        self.per_step = config.batch_size * config.gradient_accumulation_steps  # of all ranks
        self._share = distributed.rank_windows(*sizes, group.rank, group.size)
        self._windows = _windows(shards, config, config.seed, "training")
        self._first_step, self._drawn = first_step, first_step * self.per_step if drawn is None else drawn

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        before = self.drawn_after(step - 1)
        return [self._windows.draw(before + part.start, len(part)) for part in self._share]

    def drawn_after(self, steps: int) -> int:
        """How many windows all ranks have drawn in that many steps: the position in the data."""
        return self._drawn + (steps - self._first_step) * self.per_step


def validation_batches(shards: Sequence[np.ndarray], config: TrainConfig) -> list[Batch]:
    """The batches of every evaluation, always the same ones."""
    windows, size = _windows(shards, config, config.seed + 1, "validation"), config.batch_size
    return [windows.draw(n * size, size) for n in range(config.eval_iters)]


def _windows(shards: Sequence[np.ndarray], config: TrainConfig, seed: int, name: str) -> Windows:
    return Windows(shards, config.model.block_size, seed, name, config.model.vocab_size)
