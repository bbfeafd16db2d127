"""What a run shows of itself: metrics.jsonl, the progress line, the closing summary; and what it looks for in its
losses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from ..common import console
from ..common.disk import write_file

METRICS = "metrics.jsonl"  # in the run's directory


class History:
    """The lines of a metrics.jsonl.

    Every line has `step`, the optimizer steps done. One of the log has `loss` (the mean since the last one), `lr`,
    and of Progress.log `tokens_per_s`, `mfu`, `memory`, `tokens` and `seconds`; one of an evaluation has `val_loss`;
    one of an event has `event`, its name. Losses are in nats per token; null is a number that is not finite.
    """

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        self.lines = list(lines)

    @classmethod
    def read(cls, path: Path) -> History:
        """FileNotFoundError; ValueError for a line that is none. A last line cut off in writing is left out."""
        text = path.read_text(encoding="utf-8", errors="replace")
        whole, _, torn = text.rpartition("\n")
        rows = whole.split("\n") if whole else []
        lines = [_line(row) for row in rows]
        if None in lines:
            number = lines.index(None)
            raise ValueError(f"{path}: line {number + 1} is {rows[number][:60]!r}, expected a JSON object with a step")
        last = _line(torn)  # complete, but for the line break, or torn
        return cls([line for line in (*lines, last) if line is not None])

    def curve(self, name: str, x: str = "step") -> tuple[list[float], list[float]]:
        """The values of one quantity and the steps, or what else grows with them, that they belong to.

        Lines without x take it between the nearest ones that have it, and step 0 has 0 of everything.
        """
        points = [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]
        steps, values = [step for step, _ in points], [value for _, value in points]
        if x == "step":
            return steps, values
        known = {0: 0.0, **dict(zip(*self.curve(x), strict=True))}
        return np.interp(steps, list(known), list(known.values())).tolist(), values

    def last(self, name: str, default: Any = None) -> Any:
        """The newest value of a quantity."""
        return next((line[name] for line in reversed(self.lines) if line.get(name) is not None), default)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of one kind of event."""
        return [line for line in self.lines if line.get("event") == name]

    def best(self) -> tuple[float, int] | None:
        """The lowest validation loss and its step; the first of equal ones."""
        steps, losses = self.curve("val_loss")
        return min(zip(losses, map(int, steps), strict=True), default=None)

    def speed(self) -> tuple[float, float] | None:
        """Tokens per second of training over all of it, and the MFU at that speed, 0 where no line has one."""
        tokens, seconds, newest = (self.last(name, 0) for name in ("tokens", "seconds", "tokens_per_s"))
        if not (seconds and newest):
            return None
        return tokens / seconds, self.last("mfu", 0) * tokens / seconds / newest


def _line(row: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is none."""
    try:
        line = json.loads(row)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


class Logger(Protocol):
    """Takes the lines of a run's metrics elsewhere too."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics(History):
    """The numbers of a run, written as they come, one JSON object a line, and handed on to loggers."""

    def __init__(self, path: Path | None, after: int | None = None, loggers: Sequence[Logger] = ()) -> None:
        """Begins anew, or goes on after some steps of what a run had written there: later lines go. Without a path
        the numbers are only held.

        ValueError for a file that isn't one.
        """
        written = [] if after is None or path is None else History.read(path).lines
        lines = [line for line in written if line["step"] <= (after or 0)]
        super().__init__(lines)
        self.path, self._loggers = path, loggers
        if path:
            write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def add(self, *, step: int, **values: Any) -> None:
        """Writes a line. OSError names the file."""
        values = {name: _finite(value) for name, value in values.items()}
        self.lines.append({"step": step, **values})
        if self.path is None:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        prefix = f"{values['event']}/" if "event" in values else ""
        numbers = {f"{prefix}{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        for logger in self._loggers:
            logger.log(step, numbers)

    def close(self) -> None:
        """Ends the loggers."""
        for logger in self._loggers:
            logger.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Spikes:
    """Finds losses far above the others of late.

    They are measured by a running mean and variance, of all losses at first and then exponential. A spike counts in
    them only as far as the threshold: neither does one hide the next, nor is a loss that has risen for good a
    spike forever.
    """

    WARM_UP = 50  # losses before the first that can be a spike
    DECAY = 0.98

    def __init__(self, threshold: float, state: Mapping[str, float] | None = None) -> None:
        """`threshold` in standard deviations, 0 for none; `state` is that of another, to go on from."""
        self.threshold = threshold
        self.state = {"count": 0, "mean": 0.0, "variance": 0.0, **(state or {})}

    def seen(self, loss: float) -> float | None:
        """Takes the next loss -> how many deviations it lies above the mean, if that is a spike.

        One that is not finite is passed over.
        """
        if not math.isfinite(loss):
            return None
        count, mean = self.state["count"] + 1, self.state["mean"]
        # No less than a thousandth of the mean: a loss that stands still is no measure.
        deviation = max(math.sqrt(self.state["variance"]), 1e-3 * abs(mean))
        above = (loss - mean) / deviation if deviation else 0.0
        armed = self.threshold > 0 and count > self.WARM_UP
        difference = min(loss - mean, self.threshold * deviation) if armed else loss - mean
        share = max(1 / count, 1 - self.DECAY)
        variance = (1 - share) * (self.state["variance"] + share * difference**2)
        self.state = {"count": count, "mean": mean + share * difference, "variance": variance}
        return above if armed and above > self.threshold else None


class Progress:
    """The progress line of a run: a live one on a terminal, elsewhere a line per log."""

    def __init__(
        self, terminal: Console, done: int, max_iters: int, tokens_per_step: int, *, eval_interval: int,
        flops_per_token: float = 0.0, peak_flops: float = 0.0, tokens: int = 0, seconds: float = 0.0,
    ) -> None:  # fmt: skip
        """`done` steps, with `tokens` and `seconds`, came before; without peak_flops there is no MFU.

        tokens_per_step and peak_flops are those of all devices that take part.
        """
        self._console, self._max_iters, self._eval_interval = terminal, max_iters, eval_interval
        self._tokens_per_step = tokens_per_step
        self._mfu_of_speed = flops_per_token / peak_flops if peak_flops else None
        columns = TextColumn("step"), MofNCompleteColumn(), TextColumn("{task.description}"), BarColumn(bar_width=12)
        self._bar = rich.progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal)
        self._task = self._bar.add_task("", total=max_iters, completed=done)
        self._tokens, self._seconds = tokens, seconds  # of training until the last log
        self._since, self._since_step = time.perf_counter(), done  # of the last log; a pause moves the clock on
        self._timed_from = done, seconds  # the ETA goes by the steps since
        self._logs = 0
        self._pause = 0.0

    def __enter__(self) -> Progress:
        self._bar.start()
        self._since = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def totals(self, step: int) -> dict[str, Any]:
        """`tokens` trained on until a step, and `seconds` of training, pauses left out: where a resumed run begins."""
        tokens = self._tokens + (step - self._since_step) * self._tokens_per_step
        return {"tokens": tokens, "seconds": self._seconds + time.perf_counter() - self._since}

    def log(self, step: int, loss: float, lr: float) -> dict[str, Any]:
        """Shows the state after a step -> what metrics say of it beside the loss and the learning rate.

        `tokens_per_s` since the last log, pauses left out; `mfu`, model FLOPs utilization (PaLM, arXiv:2204.02311,
        appendix B), where the peak is known; `memory`, the most so far in bytes; and the totals.
        """
        totals = self.totals(step)
        speed = (totals["tokens"] - self._tokens) / (totals["seconds"] - self._seconds)
        self._tokens, self._seconds = totals["tokens"], totals["seconds"]
        self._since, self._since_step = time.perf_counter(), step
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
        if self._logs == 1:  # the first steps start threads, or compile
            self._timed_from = step, self._seconds
        return values

    def _left(self, step: int) -> float:
        """Seconds that remain, by the steps so far and the last evaluation."""
        from_step, from_seconds = self._timed_from
        per_step = (self._seconds - from_seconds) / (step - from_step)
        evaluations = -(-self._max_iters // self._eval_interval) - (step - 1) // self._eval_interval  # of this step too
        return per_step * (self._max_iters - step) + self._pause * evaluations

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training: an evaluation's, with all that is saved and shown after it."""
        start = time.perf_counter()
        yield
        self._pause = time.perf_counter() - start
        self._since += self._pause


def summary(history: History, step: int, max_iters: int, out_dir: Path) -> str:
    """What a run has come to, in some lines: how far and how fast, how well, what happened, and how to go on."""
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


_EVENTS = {"skipped": "skipped steps", "spike": "spikes of the loss"}
