"""What the golden files hold, for the script that makes them and the tests that read them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"

# the model of gpt_*.npz
SHAPE = dict(block_size=12, vocab_size=23, n_layer=2, n_head=3, n_embd=12)
VARIANTS = {"tanh": dict(bias=True, activation="gelu_new"), "exact_no_bias": dict(bias=False, activation="gelu")}

# curve.npz: the model, and how it was trained
CURVE_SHAPE = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
CURVE_ADAMW = dict(weight_decay=0.1, beta1=0.9, beta2=0.99)
CURVE_SCHEDULE = dict(learning_rate=3e-3, min_lr=3e-4, warmup_iters=10, max_iters=100)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as file:
        return dict(file)


def group(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays named prefix/..., by the rest of their names."""
    return {name.removeprefix(f"{prefix}/"): a for name, a in arrays.items() if name.startswith(f"{prefix}/")}


def curve_batches(tokens: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """100 batches of 8 windows, by a rule that needs no generator."""
    starts = [[(997 * step + 131 * row) % (len(tokens) - 17) for row in range(8)] for step in range(100)]
    windows = tokens[np.array(starts)[..., None] + np.arange(17)].astype(np.int32)  # (100, 8, 17)
    return [(w[:, :-1], w[:, 1:]) for w in windows]


def curve_rates() -> list[float]:
    """nanoGPT's get_lr, for the schedule above."""

    def rate(it: int) -> float:
        top, low, warmup, end = (CURVE_SCHEDULE[k] for k in ("learning_rate", "min_lr", "warmup_iters", "max_iters"))
        if it < warmup:
            return top * (it + 1) / (warmup + 1)
        return low + 0.5 * (1 + math.cos(math.pi * (it - warmup) / (end - warmup))) * (top - low)

    return [rate(it) for it in range(100)]
