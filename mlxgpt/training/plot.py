"""Loss curves of one run or several, as a picture and in the terminal."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..common.disk import write_file
from .metrics import History

# Okabe and Ito's colours, which the colour-blind can tell apart, without yellow, which is hard to see on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
STYLES: tuple[Any, ...] = (
    "-",
    "--",
    ":",
    "-.",
    (0, (8, 1, 1, 1, 1, 1)),
    (0, (8, 4)),
)  # one for each time that all colours are used
LABELS = {"step": "step", "tokens": "tokens", "seconds": "seconds of training"}
MOST_IN_COLUMN = 20  # runs in each column of a legend beside the axes


def draw_losses(
    runs: Mapping[str, History], path: Path, *, title: str = "", x: str = "step", log: bool = False
) -> None:
    """Writes a PNG with the training losses (thin) and validation losses (bold) of runs over x: step, tokens or
    seconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    several, beside = len(runs) > 1, len(runs) > 6
    columns = -(-len(runs) // MOST_IN_COLUMN)
    figure = Figure(figsize=(8 + 4 * columns * beside, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    looks = itertools.cycle(itertools.product(STYLES, COLOURS))
    for (name, history), (style, colour) in zip(runs.items(), looks, strict=False):
        steps, losses = history.curve("val_loss", x)
        best = history.best()
        lowest = f", lowest {best[0]:.3f} at step {best[1]}" if best else ""
        thin, bold = ("", _shortened(name)) if several else ("training", "validation")
        for curve, label, look in (
            (history.curve("loss", x), thin, dict(linewidth=0.9, alpha=0.45, markersize=3)),
            ((steps, losses), bold + lowest, dict(linewidth=2, linestyle=style, markersize=4)),
        ):
            axes.plot(*curve, color=colour, label=label, marker="o" if len(curve[0]) <= 50 else "", **look)
    if x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel=LABELS[x], ylabel="loss (nats per token)", title=title, xlim=(0, None))
    if log:
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    options: dict[str, Any] = dict(frameon=False, fontsize="small", alignment="left")
    if several:
        options |= dict(title="thin: training, bold: validation", title_fontsize="small")
    if beside:
        options |= dict(loc="upper left", bbox_to_anchor=(1, 1), ncols=columns)
    axes.legend(**options)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_file(path, png.getvalue())


def _shortened(name: str) -> str:
    return name if len(name) <= 32 else f"...{name[-29:]}"


def terminal_losses(curves: Mapping[str, tuple[list[float], list[float]]], console: Console, x: str = "step") -> str:
    """Curves drawn with characters, for the terminal; a curve named `training` as points, the others as lines."""
    import uniplot

    shown = {name: curve for name, curve in curves.items() if curve[0]}
    return uniplot.plot_to_string(
        xs=[steps for steps, _ in shown.values()],
        ys=[losses for _, losses in shown.values()],
        legend_labels=list(shown),
        lines=[name != "training" for name in shown],
        title=f"loss (nats per token) by {LABELS[x]}",
        width=max(20, min(console.width, 100) - 12),
        height=14,
        color=console.is_terminal and not console.no_color,
    )
