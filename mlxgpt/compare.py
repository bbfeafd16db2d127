"""python -m mlxgpt.compare: several training runs in one picture and one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .common import cli
from .common.console import duration_text, say
from .common.settings import from_dict, read_toml, settings
from .model.config import GPTConfig
from .model.gpt import GPT
from .training import plot
from .training.metrics import METRICS, History

IN_TERMINAL = 6  # runs that a terminal's colours tell apart


@dataclass(frozen=True)
class CompareConfig:
    """Show the losses of training runs side by side: a picture, a table and a curve in the terminal."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")] = ()
    """the directories of runs, as training writes them"""
    out: str = "compare.png"
    """the picture"""
    x: Literal["step", "tokens", "seconds"] = "step"
    """the horizontal axis: optimizer steps, tokens trained on, or seconds of training"""
    log: bool = False
    """draw the losses on a logarithmic scale"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("RUN is missing, expected the directories of one run or more")
        if not self.out.endswith(".png"):
            raise ValueError(f"out is {self.out}, expected a name that ends in .png")


@dataclass(frozen=True)
class _Run:
    history: History
    settings: Mapping[str, Any]  # by their flat names; empty where settings.toml is missing

    @classmethod
    def read(cls, path: Path, x: str) -> _Run:
        """Reads a run's directory. FileNotFoundError; ValueError for a run whose losses can't be drawn over x."""
        if not path.is_dir():
            raise FileNotFoundError(f"there is no directory {path}")
        metrics, toml = path / METRICS, path / "settings.toml"
        if not metrics.exists():
            raise FileNotFoundError(f"{path} is not a training run: it has no {metrics.name}")
        history = History.read(metrics)
        if history.last("loss") is None and history.last("val_loss") is None:
            raise ValueError(f"{metrics}: it holds no loss yet")
        if x != "step" and history.last(x) is None:
            raise ValueError(f"{metrics}: it has no {x} to draw losses over")
        return cls(history, read_toml(str(toml)) if toml.exists() else {})

    def n_params(self) -> int | None:
        shape = {name: value for name, value in self.settings.items() if name in settings(GPTConfig)}
        return GPT(from_dict(GPTConfig, shape, "settings.toml")).n_params() if shape else None


def differences(all_settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each run the values of the settings in which the runs differ: "learning_rate 0.001, n_layer 4"."""
    known = [values for values in all_settings if values]
    names = [name for name in dict.fromkeys(name for values in known for name in values) if name not in _NOT_COMPARED]
    differing = [name for name in names if any(values.get(name) != known[0].get(name) for values in known)]
    return [", ".join(f"{name} {values[name]}" for name in differing if name in values) for values in all_settings]


# Settings that have no effect on what is trained.
_NOT_COMPARED = {
    "out_dir", "overwrite", "preset", "tensorboard", "wandb",
    "eval_interval", "log_interval", "sample_tokens", "save_interval", "keep_last",
}  # fmt: skip


def table(runs: Mapping[str, _Run]) -> Table:
    """A row for each run: its size, how far it has come, how good it is, and how fast."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    grid.add_column("run", overflow="fold", min_width=8)
    for column in ("params", "steps", "tokens", "val loss", "at step", "tokens/s", "MFU", "time"):
        grid.add_column(column, justify="right", no_wrap=True)
    for name, run in runs.items():
        history = run.history
        best, speed = history.best(), history.speed()
        row = [
            _count(run.n_params()),
            str(history.lines[-1]["step"]),
            _count(history.last("tokens")),
            *((f"{best[0]:.4f}", str(best[1])) if best else ("", "")),
            f"{speed[0]:,.0f}" if speed else "",
            f"{speed[1]:.1%}" if speed and speed[1] else "",
            duration_text(history.last("seconds")) if speed else "",
        ]
        grid.add_row(Text(name), *row)
    return grid


def _count(n: int | None) -> str:
    """A number for a narrow column: 810 K, 124.4 M."""
    if n is None:
        return ""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " K")):
        if n >= unit:
            return f"{n / unit:.4g}{name}"
    return str(n)


def _by_loss(item: tuple[str, _Run]) -> float:
    best = item[1].history.best()
    return best[0] if best else float("inf")


def main(args: Sequence[str]) -> None:
    config = cli.parse(CompareConfig, args, "mlxgpt.compare")
    out = Path(config.out).expanduser()
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out: there is no directory {out.parent}")
    paths = list(dict.fromkeys(map(Path, config.runs)))
    short = len({path.name for path in paths}) == len(paths)  # whether names alone tell them apart
    given = {path.name if short else str(path): _Run.read(path.expanduser(), config.x) for path in paths}
    runs = dict(sorted(given.items(), key=_by_loss))
    histories = {name: run.history for name, run in runs.items()}
    plot.draw_losses(histories, out, x=config.x, log=config.log)

    console = Console()
    shown = list(histories.items())[:IN_TERMINAL]
    curves = {name: history.curve("val_loss", config.x) for name, history in shown}
    if any(losses for _, losses in curves.values()):
        print(plot.terminal_losses(curves, console, config.x))
    if len(shown) < len(runs):
        say(console, f"the {len(shown)} best of {len(runs)} runs; the picture has all")
    console.print(table(runs))
    for name, text in zip(runs, differences([run.settings for run in runs.values()]), strict=True):
        if text:
            say(console, f"{name}: {text}")
    say(console, f"loss curves: {out}")


if __name__ == "__main__":
    cli.run("mlxgpt.compare", main)
