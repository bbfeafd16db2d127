"""python -m mlxgpt.train: trains a GPT on text, and shows how it comes along."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from rich.console import Console

from .common import cli
from .common.console import say
from .common.settings import from_dict, read_toml
from .training import distributed, loggers
from .training.origin import Origin, find_origin
from .training.recipe import TrainConfig, preset
from .training.run import Run


def settings_from(args: Sequence[str]) -> tuple[TrainConfig, set[str], Origin | None]:
    """The settings of a command line, the names of those that somebody has chosen, and where the run begins.

    Four layers lie over one another: a preset; what comes with the model or checkpoint that the run begins with; a TOML
    file (--config); the command line's flags. ValueError, FileNotFoundError, cli.UsageError.
    """
    flags = cli.read_flags(TrainConfig, args)
    given = cli.given(flags)
    file = read_toml(given["config"]) if given.get("config") else {}
    origin, inherited = find_origin({**file, **given})
    on_gpu = given.get("device") != "cpu" and mx.is_available(mx.gpu)
    fallback = "shakespeare-char" if on_gpu else "cpu"
    name = given.get("preset") or file.get("preset") or inherited.get("preset") or fallback
    values = {**preset(name), **inherited, **file, "preset": name}
    default = from_dict(TrainConfig, values, source=given.get("config") or f"preset {name}")
    return cli.from_flags(TrainConfig, flags, "mlxgpt.train", default), {*values, *given}, origin


def main(args: Sequence[str]) -> None:
    with distributed.join_group() as group:
        config, chosen, origin = settings_from(args)
        loggers.require_packages(config)
        console = Console(quiet=group.rank > 0)
        if config.resume and not (origin and origin.record):
            say(console, f"{config.resume} has no checkpoint yet: the run begins anew")
        Run(config, chosen, origin, console, group).train()


if __name__ == "__main__":
    cli.run("mlxgpt.train", main)
