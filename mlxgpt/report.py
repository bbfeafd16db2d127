"""What a run shows of itself: metrics.jsonl, the loss curve as a picture and in the terminal,
and the progress line."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from .checkpoint import write_file


class Metrics:
    """The numbers of a run, one JSON object a line, written as they come.

    Every line has `step`, the optimizer steps done; a line of the log has `loss` (mean since the last one),
    `lr` and `tokens_per_s`, an evaluation has `val_loss`. Losses are in nats per token.
    """

    def __init__(self, path: Path, after: int | None = None, write: bool = True) -> None:
        """Begins anew, or goes on from what a run had written there after some steps; without `write` for itself."""
        self.path, self._write = path, write
        self.lines: list[dict[str, Any]] = []
        if after is not None:
            written = (line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}"))
            self.lines = [line for line in map(json.loads, written) if line["step"] <= after]
        if write:
            write_file(path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def add(self, **values: Any) -> None:
        self.lines.append(values)
        if not self._write:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """The steps and values of one quantity."""
        points = [(line["step"], line[name]) for line in self.lines if name in line]
        return [step for step, _ in points], [value for _, value in points]


def draw_loss(metrics: Metrics, path: Path, title: str) -> None:
    """The training and validation loss over the steps, as a PNG. Needs an evaluation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*metrics.curve("loss"), color="#9ab6d6", linewidth=1.2, label="training")
    steps, losses = metrics.curve("val_loss")
    best = min(range(len(losses)), key=losses.__getitem__)
    label = f"validation, lowest {losses[best]:.3f} at step {steps[best]}"
    axes.plot(steps, losses, color="#1f4e8c", linewidth=2, marker="o", markersize=4, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title, xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_file(path, png.getvalue())


def terminal_curve(metrics: Metrics, console: Console) -> str:
    """The same curves in characters, for the terminal."""
    import uniplot

    curves = {"training": metrics.curve("loss"), "validation": metrics.curve("val_loss")}
    return uniplot.plot_to_string(
        xs=[steps for steps, _ in curves.values()],
        ys=[losses for _, losses in curves.values()],
        legend_labels=list(curves),
        lines=[False, True],
        title="loss (nats per token) by step",
        width=max(20, min(console.width, 100) - 12),
        height=14,
        color=console.is_terminal and not console.no_color,
    )


class Progress:
    """The progress line of a run: a live one on a terminal, elsewhere a line per log."""

    def __init__(self, console: Console, done: int, max_iters: int, tokens_per_step: int) -> None:
        self._console, self._max_iters, self._tokens_per_step = console, max_iters, tokens_per_step
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}")
        self._bar = rich.progress.Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=max_iters, completed=done)
        self._start, self._start_step = time.perf_counter(), done
        self._since = self._start  # the clock and the step of the last log; a pause moves the clock on
        self._since_step = done

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def log(self, step: int, loss: float, lr: float) -> float:
        """Shows the state after a step -> tokens per second since the last log, pauses left out."""
        now = time.perf_counter()
        speed = (step - self._since_step) * self._tokens_per_step / (now - self._since)
        per_step = (now - self._start) / (step - self._start_step)
        left = timedelta(seconds=round(per_step * (self._max_iters - step)))
        text = f"loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s  ETA {left}"
        self._bar.update(self._task, completed=step, description=text)
        if not self._console.is_terminal:
            say(self._console, f"step {step}/{self._max_iters}  {text}")
        self._since, self._since_step = now, step
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training: an evaluation's."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


def say(console: Console, text: str, style: str = "") -> None:
    """Prints a line as it is, without rich's markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
