"""The numbers of a run: metrics.jsonl, written and read, and what stands out among the losses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..common.disk import write_file
from .loss_scale import is_overflow

METRICS = "metrics.jsonl"  # in the run's directory


class History:
    """The lines of a metrics.jsonl.

    Every line has `step`, the optimizer steps done. A line of the log has `loss` (the mean since the line before),
    `lr`, and what Progress.log returns: `tokens_per_s`, `mfu`, `memory`, `tokens` and `seconds`. An evaluation's line
    has `val_loss`, and an event's has `event`, its name. Losses are in nats per token; null stands for a number that is
    not finite.
    """

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        self.lines = list(lines)

    @classmethod
    def read(cls, path: Path) -> History:
        """Reads a metrics.jsonl; a last line that was cut off while it was written is left out. FileNotFoundError;
        ValueError for any other line that is not a JSON object with a step."""
        text = path.read_text(encoding="utf-8", errors="replace")
        whole, _, torn = text.rpartition("\n")
        rows = whole.split("\n") if whole else []
        lines = [_line(row) for row in rows]
        if None in lines:
            number = lines.index(None)
            raise ValueError(f"{path}: line {number + 1} is {rows[number][:60]!r}, expected a JSON object with a step")
        last = _line(torn)  # only its line break is missing, or more of it
        return cls([line for line in (*lines, last) if line is not None])

    def curve(self, name: str, x: str = "step") -> tuple[list[float], list[float]]:
        """Where one quantity was measured, and its values: a list of steps, tokens or seconds, and one of values.

        For lines that do not have x it is interpolated between the nearest ones that do; at step 0 it is 0.
        """
        points = [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]
        steps, values = [step for step, _ in points], [value for _, value in points]
        if x == "step":
            return steps, values
        known = {0: 0.0, **dict(zip(*self.curve(x), strict=True))}
        return np.interp(steps, list(known), list(known.values())).tolist(), values

    def last(self, name: str, default: Any = None) -> Any:
        """The newest value of a quantity, or the default if no line has it."""
        return next((line[name] for line in reversed(self.lines) if line.get(name) is not None), default)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of one kind of event."""
        return [line for line in self.lines if line.get("event") == name]

    def best(self) -> tuple[float, int] | None:
        """The lowest validation loss and its step; the first of equal ones."""
        steps, losses = self.curve("val_loss")
        return min(zip(losses, map(int, steps), strict=True), default=None)

    def speed(self) -> tuple[float, float] | None:
        """Tokens per second over all of the training, and the MFU at that speed, 0 where no line has an MFU; None
        before the first line of the log."""
        tokens, seconds, newest = (self.last(name, 0) for name in ("tokens", "seconds", "tokens_per_s"))
        if not (seconds and newest):
            return None
        return tokens / seconds, self.last("mfu", 0) * tokens / seconds / newest


def _line(row: str) -> dict[str, Any] | None:
    """A row of metrics.jsonl as an object; None if it is not a JSON object with a step."""
    try:
        line = json.loads(row)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


class Logger(Protocol):
    """Logs the lines of a run's metrics to another program."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics(History):
    """The metrics of a run: each line is written to metrics.jsonl at once, and handed on to loggers."""

    def __init__(self, path: Path | None, after: int | None = None, loggers: Sequence[Logger] = ()) -> None:
        """Starts a new file, or with `after` continues the file at the path: the lines of steps after that are
        dropped. Without a path nothing is written, and the lines are only held in memory.

        ValueError for a file that is not a metrics.jsonl.
        """
        written = [] if after is None or path is None else History.read(path).lines
        lines = [line for line in written if line["step"] <= (after or 0)]
        super().__init__(lines)
        self.path, self._loggers = path, loggers
        if path:
            write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def add(self, *, step: int, **values: Any) -> None:
        """Adds a line. OSError names the file."""
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
    """None for a number that is not finite, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Spikes:
    """Finds losses far above the recent ones.

    A loss is compared with a running mean and standard deviation: of all losses at first, later with exponentially
    decaying weights. There a spike counts only up to the threshold, so it neither hides the next one nor persists
    where a loss has risen for good.
    """

    WARM_UP = 50  # losses before the first that can be a spike
    DECAY = 0.98

    def __init__(self, threshold: float, state: Mapping[str, float] | None = None) -> None:
        """`threshold` is in standard deviations, and 0 finds no spikes; `state` is an earlier object's, to continue
        from."""
        self.threshold = threshold
        self.state = {"count": 0, "mean": 0.0, "variance": 0.0, **(state or {})}

    def add(self, loss: float) -> float | None:
        """Takes in the next loss -> how many standard deviations it lies above the mean if it is a spike, else None.

        A loss that is not finite is ignored.
        """
        if not math.isfinite(loss):
            return None
        count, mean = self.state["count"] + 1, self.state["mean"]
        # At least a thousandth of the mean: a loss that hardly changes would make spikes of rounding.
        deviation = max(math.sqrt(self.state["variance"]), 1e-3 * abs(mean))
        above = (loss - mean) / deviation if deviation else 0.0
        armed = self.threshold > 0 and count > self.WARM_UP
        difference = min(loss - mean, self.threshold * deviation) if armed else loss - mean
        share = max(1 / count, 1 - self.DECAY)
        variance = (1 - share) * (self.state["variance"] + share * difference**2)
        self.state = {"count": count, "mean": mean + share * difference, "variance": variance}
        return above if armed and above > self.threshold else None


class LossMonitor:
    """What a run knows of its losses from step to step: those since the last line of the log, the statistics that
    spikes are found by, and how many steps in a row were skipped."""

    def __init__(self, spike_threshold: float, state: Mapping[str, Any]) -> None:
        """`state` is an earlier object's, to continue from, or empty."""
        self.since_log: list[float] = state.get("losses", [])
        self.spikes = Spikes(spike_threshold, state.get("spikes"))
        self.skipped_in_row: int = state.get("skipped_in_row", 0)
        self.grad_norm = math.nan  # of the newest step

    @property
    def state(self) -> dict[str, Any]:
        """JSON values to continue from."""
        return {"losses": self.since_log, "spikes": self.spikes.state, "skipped_in_row": self.skipped_in_row}

    def add(self, loss: float, grad_norm: float, scale: float = 1.0) -> dict[str, Any] | None:
        """Takes in a step's loss, norm of the gradient and loss scale -> the line of metrics.jsonl for an event, if it
        is one.

        A step where loss or norm is not finite was skipped, which is an event too. An overflow that a smaller loss
        scale may mend is another: it does not count among the skipped steps in a row.
        """
        self.grad_norm = grad_norm
        if is_overflow(loss, grad_norm, scale):
            return {"event": "overflow", "loss_scale": scale}
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.skipped_in_row += 1
            return {"event": "skipped", "in_row": self.skipped_in_row}
        self.since_log.append(loss)
        self.skipped_in_row = 0
        deviations = self.spikes.add(loss)
        return None if deviations is None else {"event": "spike", "value": loss, "deviations": deviations}

    def take_mean(self) -> float | None:
        """The mean loss since the last call; None if all steps were skipped."""
        losses, self.since_log = self.since_log, []
        return sum(losses) / len(losses) if losses else None
