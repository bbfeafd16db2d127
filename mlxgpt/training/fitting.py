"""Whether a run fits into the device's memory, and the settings that make it fit."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..common import cli
from ..common.console import size_text
from ..model.gpt import GPT
from . import distributed, footprint
from .device_memory import DeviceMemory
from .distributed import Group
from .recipe import TrainConfig


def run_memory(model: GPT, config: TrainConfig, ranks: int = 1) -> int:
    """Bytes that one of some ranks holds at most: in a step or an evaluation, while a checkpoint is written.

    model: as config describes it; its weights may be lazy. ValueError where the ranks can't share a step.
    """
    dtype = getattr(mx, config.dtype)
    batches = distributed.rank_windows(config.batch_size, config.gradient_accumulation_steps, 0, ranks)
    step = footprint.step_memory(model, len(batches[0]), config.grad_checkpoint, dtype, len(batches) > 1).total
    evaluation = footprint.evaluation_memory(model, config.batch_size, dtype)
    return max(step, evaluation) + footprint.copied_for_checkpoint(model)


@dataclass(frozen=True)
class Choice:
    """Settings to change, with their new values, and the bytes that a run then holds."""

    changes: dict[str, Any]
    memory: int
    is_single: bool = True  # not a combination

    def __str__(self) -> str:
        flags = (f"--{name}" if value is True else f"--{name} {value}" for name, value in self.changes.items())
        return f"{' '.join(flags)} ({size_text(self.memory)})"


def choices(model: GPT, config: TrainConfig, room: int, ranks: int = 1) -> list[Choice]:
    """The changes that make a run fit, alone and combined, the least harmful first.

    Smaller micro-batches, more of them to a step, give the same mean gradient in about the same time: the largest that
    fit. grad_checkpoint takes about a third more time, and bfloat16, which a GPU is fast in, changes the numbers.
    """
    kinds = _kinds_of_changes(config)
    found = []
    for number in range(1, 2 ** len(kinds)):  # its bits say which kinds are combined
        combined = [kind for bit, kind in enumerate(kinds) if number >> bit & 1]
        for parts in itertools.product(*combined):
            changes = {name: value for part in parts for name, value in part.items()}
            try:
                memory = run_memory(model, dataclasses.replace(config, **changes), ranks)
            except ValueError:  # the ranks can't share such a step
                continue
            if memory <= room:
                found.append(Choice(changes, memory, len(combined) == 1))
                break
    return found


def _kinds_of_changes(config: TrainConfig) -> list[list[dict[str, Any]]]:
    """Changes of each kind that these settings allow, the least harmful kind first, and in each the smallest change."""
    checkpointed = [] if config.grad_checkpoint else [{"grad_checkpoint": True}]
    on_gpu = mx.default_device().type == mx.gpu
    halved = [{"dtype": "bfloat16"}] if on_gpu and config.dtype == "float32" else []
    return [kind for kind in (_smaller_batches(config), checkpointed, halved) if kind]


def _smaller_batches(config: TrainConfig) -> list[dict[str, Any]]:
    """Settings that take the windows of a step in smaller micro-batches, the largest first. An evaluation has as many
    windows as before, or a few more where the new size does not divide the old one."""
    windows = config.batch_size * config.gradient_accumulation_steps
    return [
        {
            "batch_size": size,
            "gradient_accumulation_steps": windows // size,
            "eval_iters": -(-config.eval_iters * config.batch_size // size),
        }
        for size in range(config.batch_size - 1, 0, -1)
        if windows % size == 0
    ]


def fit(
    config: TrainConfig, model: GPT, memory: DeviceMemory | None, group: Group, say: Callable[[str, str], None]
) -> TrainConfig:
    """Compares what a run will hold with what there is -> its settings, which with config.fit are changed to such as
    fit. Says what does not fit, and what makes it fit.

    model: as config describes it; its weights may be lazy. memory: this rank's device's, None where it is not known.
    say: takes a line and its style. MemoryError where the weights, gradients and averages alone are more than a device
    has, and with config.fit where nothing fits.
    """
    memory = _least(memory, group)
    if memory is None:
        if config.fit:
            say("memory: how much there is can't be told here, so --fit changes nothing", "yellow")
        return config
    if (least := footprint.parameter_memory(model)) > memory.total:
        raise MemoryError(
            f"model: {model.n_params():,} parameters take {size_text(least)} to train, "
            f"this machine has {size_text(memory.total)}"
        )
    needed, room, ranks = run_memory(model, config, group.size), memory.room, group.size
    if needed <= room:
        return config
    too_much = (
        f"the run takes about {size_text(needed)}, {size_text(needed - room)} too much: "
        f"{size_text(memory.free)} are free, less a tenth for what is not foreseen"
    )
    fitting = choices(model, config, room, ranks)
    if not fitting:
        changes = {name: value for kind in _kinds_of_changes(config) for name, value in kind[-1].items()}
        smallest = Choice(changes, run_memory(model, dataclasses.replace(config, **changes), ranks))
        even = f"it does not fit with {smallest} either" if changes else "no setting makes it less"
        message = f"{too_much}; {even}: take a smaller model or block_size, or train adapters (--lora_rank)"
        if config.fit:
            raise MemoryError(message)
        say(f"memory: {message}", "yellow")
        return config
    if not config.fit:
        ways = ", or with ".join(str(c) for c in [c for c in fitting if c.is_single] or fitting[:1])
        say(f"memory: {too_much}; it fits with {ways}; --fit does the first", "yellow")
        return config
    first = fitting[0]
    changed = ", ".join(f"{name} is {value}, not {getattr(config, name)}" for name, value in first.changes.items())
    say(f"memory: {too_much}; to fit, {changed}: {size_text(first.memory)}", "yellow")
    return dataclasses.replace(config, **first.changes)


def _least(memory: DeviceMemory | None, group: Group) -> DeviceMemory | None:
    """The memory of the rank that has least, where ranks share that of one device; None where no rank knows its own."""
    mine = [f"{platform.node()} {memory.name}", memory.total, memory.free] if memory else None
    told = [json.loads(data) for data in group.gather(json.dumps(mine).encode())]
    known = [(name, total, free) for name, total, free in filter(None, told)]
    ranks_on = collections.Counter(name for name, *_ in known)
    shares = [(total // ranks_on[name], free // ranks_on[name]) for name, total, free in known]
    return DeviceMemory(*map(min, zip(*shares, strict=True))) if shares else None


def explain(
    error: BaseException, step: int, model: GPT, config: TrainConfig, memory: DeviceMemory | None, ranks: int
) -> str:
    """A line about memory that ran out in a step: what the run needs, what there was, and what to change."""
    needed = run_memory(model, config, ranks)
    free = f", and {size_text(memory.free)} were free when it began" if memory else ""
    smaller = [*choices(model, config, needed * 3 // 4, ranks), "a smaller model or block_size"][0]
    return (
        f"no memory left at step {step} ({cli.describe(error)}): the run takes about {size_text(needed)}{free}; "
        f"try {smaller}"
    )
