"""Trains a small GPT here and in PyTorch, from the same weights on the same batches, and draws both loss curves.

    python scripts/yardstick.py [--data FILE] [--steps N] [--float64] [--out yardstick.png]

nanoGPT's recipe for a CPU (the preset `cpu`): 4 layers, 4 heads, 128 wide, 64 characters, batches of 12, AdamW,
clipping, warm-up and cosine decay. The two differ in rounding alone. With --float64 PyTorch trains a third time in
double precision, which shows how far rounding takes each of the two from there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from matplotlib.figure import Figure

from mlxgpt.common.settings import from_dict
from mlxgpt.data import corpus
from mlxgpt.data.tokenizer import CharTokenizer
from mlxgpt.model import ops
from mlxgpt.model.gpt import GPT
from mlxgpt.training import plot
from mlxgpt.training.optim import learning_rate
from mlxgpt.training.recipe import TrainConfig, preset
from mlxgpt.training.trainer import Batch, Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import torch_gpt

EVAL_INTERVAL, EVAL_BATCHES = 50, 20


@dataclass
class Curve:
    """The losses of one training."""

    name: str
    training: np.ndarray  # of each step, before its update
    steps: list[int]  # of the evaluations
    validation: list[float]


def draw_batches(tokens: np.ndarray, config: TrainConfig, count: int, seed: int) -> list[Batch]:
    """Random windows of tokens (n,): inputs and targets, each (B, T) int32."""
    rng, T = np.random.default_rng(seed), config.model.block_size
    starts = rng.integers(len(tokens) - T, size=(count, config.batch_size, 1))
    windows = tokens[starts + np.arange(T + 1)].astype(np.int32)  # (count, B, T + 1)
    return [(w[:, :-1], w[:, 1:]) for w in windows]


def follow(
    name: str, batches: Sequence[Batch], train: Callable[[int, int], list[float]], evaluate: Callable[[], float]
) -> Curve:
    """Trains on all batches, with an evaluation every EVAL_INTERVAL steps and at both ends.

    `train` takes the numbers of its first batch and of the one after its last, and returns the losses.
    """
    steps = [*range(0, len(batches), EVAL_INTERVAL), len(batches)]
    losses, validation = [], [evaluate()]
    for first, end in itertools.pairwise(steps):
        losses += train(first, end)
        validation.append(evaluate())
        print(f"{name:>16} step {end:4}: training {losses[-1]:.5f}, validation {validation[-1]:.5f}", flush=True)
    return Curve(name, np.array(losses), steps, validation)


def train_here(model: GPT, config: TrainConfig, batches: list[Batch], held_out: list[Batch]) -> Curve:
    trainer = Trainer(model, config)
    return follow(
        "mlxgpt",
        batches,
        lambda first, end: [trainer.step([batch]).item() for batch in batches[first:end]],
        lambda: trainer.evaluate(held_out),
    )


def train_in_pytorch(
    weights: dict[str, np.ndarray], config: TrainConfig, batches: list[Batch], held_out: list[Batch], dtype: torch.dtype
) -> Curve:
    shape = {name: value for name, value in vars(config.model).items() if name != "layer_norm_epsilon"}
    model = torch_gpt.GPT(**shape).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(weights[name]))
    rates = [learning_rate(config, step) for step in range(len(batches))]
    names = ("weight_decay", "beta1", "beta2")
    optimizer = model.adamw(learning_rate=rates[0], **{name: getattr(config, name) for name in names})

    @torch.no_grad()
    def evaluate() -> float:
        ids = [[torch.tensor(a, dtype=torch.long) for a in batch] for batch in held_out]
        return float(np.mean([model.loss(x, y).item() for x, y in ids]))

    return follow(
        "PyTorch" if dtype == torch.float32 else "PyTorch float64",
        batches,
        lambda first, end: torch_gpt.train(model, batches[first:end], rates[first:end], optimizer),
        evaluate,
    )


def compare(a: Curve, b: Curve) -> str:
    """A sentence about the distance between two curves, in nats per token."""
    apart = np.abs(a.training - b.training)
    places = " ".join(f"{apart[: n + 1].max():.1e} by step {n + 1}," for n in (0, 9, 99) if n + 1 < len(apart))
    return (
        f"{a.name} beside {b.name}: training losses differ by {places} {apart.max():.1e} in all {len(apart)} steps, "
        f"{apart.mean():.1e} on average; validation losses at the end {a.validation[-1]:.5f} and "
        f"{b.validation[-1]:.5f}, {abs(a.validation[-1] - b.validation[-1]):.1e} apart"
    )


def draw(curves: list[Curve], path: str, title: str) -> None:
    """Writes a picture: the curves over one another, and below them the others' distance from the first."""
    figure = Figure(figsize=(9, 7), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
    for curve, colour, width, style in zip(curves, plot.COLOURS, (5, 1.4, 1.2), ("-", "-", "--"), strict=False):
        steps, look = np.arange(1, len(curve.training) + 1), dict(color=colour, linewidth=width, linestyle=style)
        alpha = 0.4 if width > 2 else 1.0  # curves below stay visible
        top.plot(steps, curve.training, alpha=alpha, label=f"{curve.name}, training", **look)
        top.plot(
            curve.steps, curve.validation, "o", color=colour, markersize=2 * width + 3, alpha=alpha,
            label=f"{curve.name}, validation, {curve.validation[-1]:.4f} at the end",
        )  # fmt: skip
        if curve is not curves[0]:
            apart = np.abs(curve.training - curves[0].training)
            bottom.plot(steps, np.maximum(apart, 1e-8), color=colour, linewidth=1, label=curve.name)
    bottom.set(yscale="log", xlabel="step", ylabel=f"distance from {curves[0].name}")
    top.set(ylabel="loss (nats per token)", title=title)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def main(args: Sequence[str]) -> list[Curve]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib", help="a text, as in training (default: stdlib)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1337, help="of the weights and the batches")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="of this package; PyTorch uses the CPU"
    )
    parser.add_argument("--float64", action="store_true", help="PyTorch in double precision too")
    parser.add_argument("--out", default="yardstick.png", help="the picture")
    options = parser.parse_args(args)

    ops.use_device(options.device)
    text = corpus.load_corpus(options.data)
    tokenizer = CharTokenizer.of(*text.train, *text.val)
    settings = {**preset("cpu"), "max_iters": options.steps, "vocab_size": tokenizer.vocab_size, "seed": options.seed}
    config = from_dict(TrainConfig, settings, "preset cpu")
    train, val = (corpus.encode(tokenizer, documents) for documents in (text.train, text.val))
    batches = draw_batches(train, config, options.steps, options.seed)
    held_out = draw_batches(val, config, EVAL_BATCHES, options.seed + 1)

    mx.random.seed(options.seed)
    model = GPT(config.model)
    weights = {name: np.array(weight) for name, weight in model.named_weights().items()}
    print(f"{text.name}: {len(train):,} training and {len(val):,} validation tokens; {model.n_params():,} parameters")
    curves = [train_here(model, config, batches, held_out)]
    for dtype in (torch.float32, torch.float64)[: 1 + options.float64]:
        curves.append(train_in_pytorch(weights, config, batches, held_out, dtype))
    for n, curve in enumerate(curves[1:]):
        for other in curves[: n + 1]:
            print(compare(other, curve))
    draw(curves, options.out, f"{text.name}: the same weights, batches and schedule")
    return curves


if __name__ == "__main__":
    main(sys.argv[1:])
