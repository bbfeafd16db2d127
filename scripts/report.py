"""What a benchmark is told, and what it reports: settings, the machine, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import turns

DTYPES = ("float32", "bfloat16", "float16")
FLAGS = "avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_bf16 asimddp bf16".split()  # of /proc/cpuinfo
VARIABLES = ("OPENBLAS_", "MLXGPT_", "OMP_NUM_THREADS", "MKL_")  # of the environment, which change speed

Column = tuple[str, str, str]  # its title, the name of its figure in a row, and the figure's format
# A line of a table: figures by names that end in their units, or why it was "left_out". "failed" is true where that is
# an error.
Row = dict[str, Any]


def say(title: str) -> None:
    """Progress, a line on standard error."""
    print(title, file=sys.stderr, flush=True)


@dataclass
class Settings:
    """What all parts of a benchmark are told."""

    machine: dict[str, Any]  # describe()
    seconds: float = float("inf")  # a part's share of the time; with infinity the number of turns decides
    quick: bool = False  # one small turn of everything
    toy: bool = False  # sizes that take no time, for tests
    dtypes: Sequence[str] = ()  # those asked for; empty: a part's own choice
    tell: Callable[[str], None] = say  # progress

    @property
    def device(self) -> str:
        return str(self.machine["device"])

    @property
    def environment(self) -> dict[str, str]:
        """Contenders' environment: the same number of threads for all, and no network."""
        threads = str(self.machine["threads"])
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {**os.environ, **offline, "MLXGPT_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}


# ---- the machine ----


def describe(threads: int | None) -> dict[str, Any]:
    """The machine, MLX's default device and the versions of what is measured; nothing that names a person or a host."""
    import mlx.core as mx

    import mlxgpt
    from mlxgpt.cpu import extension
    from mlxgpt.training import device_memory

    on_gpu = mx.default_device().type == mx.gpu
    gpu = mx.device_info(mx.gpu) if on_gpu else {}
    kernels = extension.core if extension.is_there() else None
    threads = threads or (kernels.num_threads() if kernels else os.cpu_count() or 1)
    if on_gpu:
        backend = "MLX on Metal" if mx.metal.is_available() else "MLX on CUDA"
    elif kernels:
        backend = f"the extension's kernels ({kernels.isa()}), {threads} threads"
    else:
        backend = "MLX on the CPU"
    memory = device_memory.available()
    return {
        **(_mac() if sys.platform == "darwin" else _linux()),
        "architecture": platform.machine(),
        "processors": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "load_average": os.getloadavg()[0],  # above 0 where other work runs
        "device": "gpu" if on_gpu else "cpu",
        "gpu": gpu.get("device_name"),
        "device_memory_gb": memory.total / 1e9 if memory else None,
        "free_memory_gb": memory.free / 1e9 if memory else None,
        "backend": backend,
        "threads": threads,
        "kernels": kernels is not None and not on_gpu,
        "mlxgpt": mlxgpt.__version__,
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def _mac() -> dict[str, Any]:
    chip = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
    return {"system": f"macOS {platform.mac_ver()[0]}", "chip": chip or platform.processor(), "cpu_flags": []}


def _linux() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    values = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    there = f"{values.get('flags', '')} {values.get('features', '')}".split()  # x86's name, Arm's name
    chip = values.get("model name") or platform.processor() or platform.machine()
    flags = [flag for flag in FLAGS if flag in there]
    return {"system": f"{platform.system()} {platform.release().split('-')[0]}", "chip": chip, "cpu_flags": flags}


def _version(package: str) -> str | None:
    if not is_installed(package):
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def machine_table(machine: dict[str, Any]) -> str:
    """The machine as a table of two columns."""
    shown = {name: value for name, value in machine.items() if value not in (None, "", [], {})}
    shown |= {name: f"{value:.1f}" for name, value in shown.items() if isinstance(value, float)}
    shown |= {name: " ".join(value) for name, value in shown.items() if isinstance(value, list)}
    shown |= {
        name: " ".join(f"{n}={v}" for n, v in value.items()) for name, value in shown.items() if name == "environment"
    }
    rows = [{"name": name.replace("_gb", " (GB)").replace("_", " "), "value": value} for name, value in shown.items()]
    return markdown(rows, [("", "name", "{}"), ("", "value", "{}")])


def find_machine(device: str, threads: int | None) -> dict[str, Any]:
    """describe(), from a process that ends: MLX's memory would count in the processes that are started from here.
    ValueError for a device that is not there."""
    asked = turns.Contender("machine", turns.command(__file__, device=device, threads=threads))
    asked.start(120, dict(os.environ))
    asked.end()
    if asked.stopped:
        raise ValueError(asked.stopped.removeprefix("ValueError: "))
    return dict(asked.ready)


def _make(device: str, threads: int | None) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    from mlxgpt.model import ops

    ops.use_device(device)
    return describe(threads), lambda question: None


# ---- command lines and tables ----


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with the options that all benchmarks have. Bad usage is one line, and exit status 2."""
    result = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: MLX's GPU, if any")
    result.add_argument("--threads", type=int, help="threads of each contender on the CPU (default: physical cores)")
    result.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    return result


def settings(parser: argparse.ArgumentParser, options: argparse.Namespace, **more: Any) -> Settings:
    """What the options of `parser` say; a device that is not there is bad usage."""
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads}, expected at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # contenders' processes are ended as after Ctrl-C
    try:
        machine = find_machine(options.device, options.threads)
    except ValueError as error:
        parser.error(str(error))
    return Settings(machine, **more)


def run_alone(told: Settings, rows: Iterable[Row], columns: Sequence[Column]) -> None:
    """A part of the benchmark by itself: prints the machine and the part's table, after Ctrl-C what there is of it."""
    print(f"{told.machine['chip']}, {told.machine['backend']}", flush=True)
    found: list[Row] = []
    try:
        for row in rows:
            found.append(row)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        if found:
            print(markdown(found, columns))
    sys.exit(any(row.get("failed") for row in found))


def is_installed(package: str, python: str = sys.executable) -> bool:
    if python == sys.executable:
        return find_spec(package) is not None
    check = f"import importlib.util as u, sys; sys.exit(not u.find_spec({package!r}))"
    return subprocess.run([python, "-c", check]).returncode == 0


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A table. A row that was left out says why in place of its first figure; a column without figures is not there."""
    kept = [column for column in columns if any(column[1] in row for row in rows)]
    lines = [f"| {' | '.join(title for title, _, _ in kept)} |", "|---" * len(kept) + "|"]
    for row in rows:
        why = f"left out: {row['left_out']}" if "left_out" in row else ""
        cells = []
        for _, name, form in kept:
            cells.append(form.format(row[name]) if row.get(name) is not None else "")
            if not cells[-1] and why:
                cells[-1], why = why.replace("|", "/"), ""
        if why:
            cells[-1] = why.replace("|", "/")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    work = parser(__doc__).parse_args().work
    turns.serve(lambda: _make(**work))
