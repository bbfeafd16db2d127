"""Measures everything on this machine in less than 10 minutes, and writes a table and a JSON file to send.

    python scripts/bench.py [--device auto|cpu|gpu] [--quick] [--only training ...] [--out bench.json]

The machine, what it can do, attention, training and generation, with PyTorch beside it where that is installed: the
parts are limits.py, bench_attention.py, bench_train.py and bench_generate.py, which run by themselves too. The slower
a machine is, the fewer turns are taken; what would take too long is left out, and its row says why. Both files are
written after each row, so that Ctrl-C loses little. Weights are random, and nothing is asked of the network.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_attention
import bench_generate
import bench_train
import limits
import report
from report import Row

# In this order: what a part does not use of its time goes to those behind it.
PARTS = {"limits": limits, "attention": bench_attention, "generation": bench_generate, "training": bench_train}
SHARES = {"limits": 0.2, "attention": 0.8, "generation": 2.0, "training": 5.0}  # of the time
MINUTES, QUICK_MINUTES = 8.5, 1.5  # what has begun is finished, which takes a while more


def as_markdown(result: dict[str, Any]) -> str:
    """The result, for a person to read."""
    parts = [f"# mlxgpt on {result['machine']['chip']}", f"`{result['command']}`, {result['seconds']:.0f} s"]
    if not result["complete"]:
        parts.append("It was stopped before the end.")
    parts.append(report.machine_table(result["machine"]))
    for name, part in PARTS.items():
        if result.get(name):
            parts += [f"## {part.TITLE}", part.NOTE, report.markdown(result[name], part.COLUMNS)]
    return "\n\n".join(parts) + "\n"


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows what is done now, and for how long this command has been running."""
    if not sys.stderr.isatty():
        yield report.say
        return
    from rich.console import Console

    start = time.perf_counter()
    with Console(stderr=True).status("") as status:
        yield lambda title: status.update(f"{time.perf_counter() - start:4.0f} s  {title}")


class Result:
    """What was measured, and the two files that hold it."""

    def __init__(self, machine: dict[str, Any], json_file: Path) -> None:
        self._file, self._start = json_file, time.perf_counter()
        self.values: dict[str, Any] = {
            "command": shlex.join(["python", "scripts/bench.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "seconds": 0.0,
            "complete": False,
            "machine": machine,
        }

    def add(self, part: str, row: Row) -> None:
        self.values.setdefault(part, []).append(row)
        self.write()

    def write(self) -> None:
        self.values["seconds"] = time.perf_counter() - self._start
        self._file.write_text(json.dumps(self.values, indent=2) + "\n", encoding="utf-8")
        self._file.with_suffix(".md").write_text(as_markdown(self.values), encoding="utf-8")

    def has_failed(self) -> bool:
        """Whether a row of ours ended with an error."""
        return any(row.get("failed") for part in PARTS for row in self.values.get(part, []))


def measure(settings: report.Settings, parts: list[str], minutes: float, result: Result) -> None:
    end = time.perf_counter() + 60 * minutes
    for n, name in enumerate(parts):
        share = SHARES[name] / sum(SHARES[later] for later in parts[n:])
        settings.seconds = max(1.0, (end - time.perf_counter()) * share)
        for row in PARTS[name].rows(settings):
            result.add(name, row)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--dtype", nargs="+", choices=report.DTYPES, default=(), help="only these types")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts")
    parser.add_argument("--quick", action="store_true", help="one small turn of everything: whether all runs")
    parser.add_argument("--minutes", type=float, help=f"about how long it may take (default: {MINUTES})")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="the JSON file; the table is beside it")
    parser.add_argument("--toy", action="store_true", help=report.argparse.SUPPRESS)
    options = parser.parse_args()
    minutes = (QUICK_MINUTES if options.quick else MINUTES) if options.minutes is None else options.minutes
    if not 0 < minutes < 1e6:
        parser.error(f"--minutes is {minutes}, expected a number above 0")
    if options.out.suffix != ".json":
        parser.error(f"--out is {options.out}, expected a name that ends in .json")
    settings = report.settings(parser, options, dtypes=options.dtype, quick=options.quick, toy=options.toy)
    result, status = Result(settings.machine, options.out), 0
    try:
        result.write()
    except OSError as error:
        parser.error(f"--out is {options.out}: {error.strerror}")
    try:
        with progress() as settings.tell:
            measure(settings, [part for part in PARTS if part in options.only], minutes, result)
        result.values["complete"], status = True, int(result.has_failed())
    except KeyboardInterrupt:
        report.say("stopped; what was measured until now is kept")
        status = 130
    result.write()
    print(as_markdown(result.values))
    report.say(f"{options.out} and {options.out.with_suffix('.md')} hold this")
    sys.exit(status)


if __name__ == "__main__":
    main()
