"""What a run shows a person: its progress line and the closing summary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from ..common import console
from .metrics import History


class Progress:
    """The progress of a run: a live line on a terminal, elsewhere a new line each time that a step is logged."""

    def __init__(
        self, terminal: Console, done: int, max_iters: int, tokens_per_step: int, *, eval_interval: int,
        flops_per_token: float = 0.0, peak_flops: float = 0.0, tokens: int = 0, seconds: float = 0.0,
    ) -> None:  # fmt: skip
        """`done` steps on `tokens` tokens, which took `seconds`, came before.

        tokens_per_step and peak_flops are the sum over all devices; without peak_flops no MFU is shown.
        """
        self._console, self._max_iters, self._eval_interval = terminal, max_iters, eval_interval
        self._tokens_per_step = tokens_per_step
        self._mfu_of_speed = flops_per_token / peak_flops if peak_flops else None
        columns = TextColumn("step"), MofNCompleteColumn(), TextColumn("{task.description}"), BarColumn(bar_width=12)
        self._bar = rich.progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal)
        self._task = self._bar.add_task("", total=max_iters, completed=done)
        self._tokens, self._seconds = tokens, seconds  # of all training until the last log
        self._since, self._since_step = time.perf_counter(), done  # the last log's time, later by each pause; its step
        self._timed_from = done, seconds  # the step and seconds that the time per step is measured from
        self._logs = 0
        self._pause = 0.0  # seconds that the last pause took

    def __enter__(self) -> Progress:
        self._bar.start()
        self._since = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def totals(self, step: int, at: float | None = None) -> dict[str, Any]:
        """`tokens` trained on up to a step, and `seconds` of training without pauses: a resumed run continues from
        these. The step was taken at a time of time.perf_counter, or now."""
        tokens = self._tokens + (step - self._since_step) * self._tokens_per_step
        now = time.perf_counter() if at is None else at
        return {"tokens": tokens, "seconds": self._seconds + now - self._since}

    def log(self, step: int, loss: float, lr: float, at: float | None = None) -> dict[str, Any]:
        """Shows the state after a step -> the values for its line in metrics.jsonl beside `loss` and `lr`.

        The step was taken at a time of time.perf_counter, or now.
        `tokens_per_s` since the last log without pauses; `mfu`, model FLOPs utilization (PaLM, arXiv:2204.02311,
        appendix B), if the peak is known; `memory`, the peak so far in bytes; and the totals.
        """
        at = time.perf_counter() if at is None else at
        totals = self.totals(step, at)
        speed = (totals["tokens"] - self._tokens) / (totals["seconds"] - self._seconds)
        self._tokens, self._seconds = totals["tokens"], totals["seconds"]
        self._since, self._since_step = at, step
        mfu = {} if self._mfu_of_speed is None else {"mfu": speed * self._mfu_of_speed}
        values = {"tokens_per_s": speed, **mfu, "memory": console.peak_memory(), **totals}
        share = f"MFU {mfu['mfu']:.0%}  " if mfu else ""
        text = (
            f"loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s  {share}{console.size_text(values['memory'])}  "
            f"ETA {console.duration_text(self._left(step))}"
        )
        self._bar.update(self._task, completed=step, description=text)
        if not self._console.is_terminal:
            console.say(self._console, f"step {step}/{self._max_iters}  {text}")
        self._logs += 1
        if self._logs == 1:  # the first steps start threads or compile, and would make the estimate too long
            self._timed_from = step, self._seconds
        return values

    def _left(self, step: int) -> float:
        """The estimated seconds that remain, from the time of the steps so far and of the last pause."""
        from_step, from_seconds = self._timed_from
        per_step = (self._seconds - from_seconds) / (step - from_step)
        # evaluations still to come, this step's among them
        evaluations = -(-self._max_iters // self._eval_interval) - (step - 1) // self._eval_interval
        return per_step * (self._max_iters - step) + self._pause * evaluations

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of its block out of the training: an evaluation, and what is saved and shown after it."""
        start = time.perf_counter()
        yield
        self._pause = time.perf_counter() - start
        self._since += self._pause


def summary(history: History, step: int, max_iters: int, out_dir: Path) -> str:
    """The closing lines of a run: steps, best loss, speed, memory, events, and the commands to continue with."""
    memory, best = history.last("memory"), history.best()
    head = f"done after {step} steps" if step == max_iters else f"stopped after {step} of {max_iters} steps"
    if best:
        head += f"; best validation loss {best[0]:.4f} at step {best[1]}"
    lines = [head]
    if speed := history.speed():
        share = f", MFU {speed[1]:.1%}" if speed[1] else ""
        took = console.duration_text(history.last("seconds"))
        lines.append(f"trained: {history.last('tokens'):,} tokens in {took}, {speed[0]:,.0f} tokens/s{share}")
    if memory:
        lines.append(f"memory: {console.size_text(memory)} at most")
    if events := [f"{what} {len(found)}" for name, what in _EVENTS.items() if (found := history.events(name))]:
        lines.append(f"events: {', '.join(events)}")
    lines += [
        f"loss curve: {out_dir / 'loss.png'}",
        f"sample more: python -m mlxgpt.generate --model {out_dir}",
        f"train on: python -m mlxgpt.train --resume {out_dir}{f' --max_iters {2 * step}' if step == max_iters else ''}",
    ]
    return "\n".join(lines)


_EVENTS = {"skipped": "skipped steps", "overflow": "overflows of float16", "spike": "spikes of the loss"}
