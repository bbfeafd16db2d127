"""Contenders that take turns.

A contender is a process of its own. It reads questions from standard input, each a line of JSON, and answers each with
a line. All contenders of a comparison take turns, so that all see the same state of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

PAUSE = 0.05  # seconds before each turn: PyTorch's threads spin for a while after their work, and slow others down


class StoppedError(Exception):
    """A contender gives no answer; the message says why in a few words."""


class TooSlowError(StoppedError):
    """It took longer than it may."""


# ---- a contender's side ----


def serve(make: Callable[[], tuple[Any, Callable[[Any], Any]]]) -> None:
    """A contender's process. `make` returns the first answer, which says that it is ready, and a function from each
    question to its answer."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        ready, answer = make()
        print(json.dumps({"answer": ready}), file=out)
        for line in sys.stdin:
            print(json.dumps({"answer": answer(json.loads(line))}), file=out)
    except Exception as error:
        text = " ".join(str(error).split())
        print(json.dumps({"stopped": f"{type(error).__name__}: {text}"[:160]}), file=out)
        raise


def process_peak_bytes() -> int:
    """The most memory that this process has held so far. (console.peak_memory is not there in others' Pythons.)"""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def pytorch_device(device: str) -> str:
    """PyTorch's name of the CPU, or of the GPU that it has. ValueError if it has none."""
    import torch

    if device == "cpu":
        return "cpu"
    if torch.backends.mps.is_available():
        return "mps"
    if torch.cuda.is_available():
        return "cuda"
    raise ValueError("this PyTorch has no GPU")


def wait_for_pytorch(device: str) -> None:
    """Returns when the device has done all that it was asked to."""
    import torch

    if device != "cpu":
        getattr(torch, device).synchronize()


# ---- the side that asks ----


@dataclass
class Contender:
    """A row of a comparison, and its process once it is started."""

    name: str
    command: Sequence[str]
    dtype: str = ""
    is_ours: bool = False
    ready: Any = None  # its first answer
    answers: list[Any] = field(default_factory=list)
    stopped: str = ""  # why it answers no more
    failed: bool = False  # it stopped because of an error
    _process: subprocess.Popen[str] | None = None
    _waits_for: str = "its start"

    def start(self, timeout: float, environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1,
            env=environment, start_new_session=True,  # so that Ctrl-C reaches this process alone
        )  # fmt: skip
        with self._noted():
            self.ready = self._line(timeout)
            self._waits_for = "a turn"

    def ask(self, question: Any, timeout: float) -> Any:
        """An answer; None from a contender that has stopped, before or because of this question."""
        with self._noted():
            if not self.stopped and self._process:
                print(json.dumps(question), file=self._process.stdin, flush=True)
                return self._line(timeout)

    def why(self) -> dict[str, Any]:
        """For a row of a contender without answers: why it has none. An error of ours is a failure."""
        if self.answers:
            return {}
        return {"left_out": self.stopped or "interrupted", **({"failed": True} if self.failed and self.is_ours else {})}

    def end(self) -> None:
        """Ends its process, and those that it has started."""
        if self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS's answer for one that has ended
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._errors.close()
            self._process = None

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except (StoppedError, BrokenPipeError) as error:
            self.stopped, self.failed = str(error), not isinstance(error, TooSlowError)
            self.end()

    def _line(self, timeout: float) -> Any:
        assert self._process and self._process.stdout
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise TooSlowError(f"{self._waits_for} took more than {timeout:.0f} s")
        message = json.loads(self._process.stdout.readline() or "{}")
        if "answer" in message:
            return message["answer"]
        raise StoppedError(message.get("stopped") or f"{self._last_error()} (status {self._process.wait()})")

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip()[:160] for line in reversed(lines) if line.strip()), "its process ended")


@contextlib.contextmanager
def started(
    contenders: Sequence[Contender],
    environment: dict[str, str],
    seconds: float = 600,
    tell: Callable[[str], None] = lambda title: None,
) -> Iterator[None]:
    """The contenders' processes run while this is entered. A start may take half of the seconds that are left, and 10
    in any case."""
    end = time.perf_counter() + seconds
    try:
        for contender in contenders:
            tell(f"{contender.name} starts")
            contender.start(min(3600, max(10, (end - time.perf_counter()) / 2)), environment)
        yield
    finally:
        for contender in contenders:
            contender.end()


def take_turns(
    contenders: Sequence[Contender],
    question: Callable[[Contender], Any],
    *,
    seconds: float,
    most: int,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Asks all by turns, and adds what they answer to their answers: `most` times, or less often where the seconds are
    over, but once at least. `between` is called before each turn."""
    end, longest = time.perf_counter() + seconds, 0.0
    for turn in range(most):
        start = time.perf_counter()
        if turn and start + longest > end:
            break
        between()
        for contender in contenders:
            time.sleep(PAUSE)
            answer = contender.ask(question(contender), timeout=min(3600, max(30, seconds)))
            if answer is not None:
                contender.answers.append(answer)
        longest = max(longest, time.perf_counter() - start)


def command(file: str, python: str = sys.executable, **work: Any) -> list[str]:
    """The command of a contender's process."""
    return [python, file, "--work", json.dumps(work)]
