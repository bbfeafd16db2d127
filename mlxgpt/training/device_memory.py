"""The memory that a device has, and MLX's limits for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that a device has, and those that one program may take."""

    total: int
    free: int
    name: str = ""  # which of a machine's devices it is, where these have memory of their own

    @property
    def room(self) -> int:
        """What a run may be predicted to hold: a tenth is left, because the prediction is true to a tenth."""
        return self.free * 9 // 10


def available() -> DeviceMemory | None:
    """The memory of the default device; None where it can't be asked for."""
    if mx.default_device().type == mx.gpu:
        return _gpu_memory()
    return mac_memory() if sys.platform == "darwin" else linux_memory()


def _gpu_memory() -> DeviceMemory | None:
    try:
        info = mx.device_info(mx.gpu)
    except RuntimeError:
        return None
    if "memory_size" in info:  # Metal
        return _memory(info["memory_size"], info.get("max_recommended_working_set_size"))
    return _memory(info.get("total_memory"), info.get("free_memory"), str(info.get("uuid", "")))  # CUDA


def _memory(total: Any, free: Any, name: str = "") -> DeviceMemory | None:
    if not (isinstance(total, int) and isinstance(free, int) and total > 0 and free > 0):
        return None
    return DeviceMemory(total, min(free, total), name)


def mac_memory() -> DeviceMemory | None:
    """A Mac's memory, and how much of it nothing uses or can be taken back at once, which vm_stat says."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        text = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=10, check=True).stdout
        page = int(text.split("page size of ")[1].split()[0])
        pages = dict(line.rstrip(". ").split(":") for line in text.splitlines()[1:] if ":" in line)
        names = "Pages free", "Pages inactive", "Pages speculative", "Pages purgeable"
        return _memory(total, page * sum(int(pages.get(name, 0)) for name in names))
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def linux_memory(root: Path = Path("/")) -> DeviceMemory | None:
    """A Linux machine's memory, or what a container's control groups or `ulimit -v` leave of it.

    root: where proc/ and sys/ lie.
    """
    try:
        rows = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        kilobytes = {row[0]: int(row[1]) for row in rows if len(row) > 1}
        total, free = kilobytes["MemTotal:"] * 1024, kilobytes["MemAvailable:"] * 1024
    except (OSError, ValueError, KeyError):
        return None
    for limit, used in (*_group_limits(root), *_address_limit(root)):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return DeviceMemory(total, free)


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """The limit of each control group that this process is in, and the bytes used there, but for files in memory."""
    for row in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = row.split(":", 2)
        if not controllers:
            base, limit, usage, files = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            files = "total_inactive_file"
        else:
            continue
        group = root / base / path.lstrip("/")
        while group.is_relative_to(root / base):  # a container sees its own group as the highest one
            bound, used = _read(group / limit).strip(), _read(group / usage).strip()
            rows = _read(group / "memory.stat").splitlines()
            cached = next((int(line.split()[1]) for line in rows if line.startswith(f"{files} ")), 0)
            if bound.isdigit() and used.isdigit():
                yield int(bound), max(0, int(used) - cached)
            group = group.parent


def _address_limit(root: Path) -> Iterator[tuple[int, int]]:
    """The bytes of addresses that a process may have, and those that this one has."""
    import resource

    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _read(root / "proc/self/statm").split()
    if limit != resource.RLIM_INFINITY and pages:
        yield limit, int(pages[0]) * os.sysconf("SC_PAGE_SIZE")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def set_limits(memory: DeviceMemory | None, held: int) -> None:
    """Sets the limits of MLX on a GPU so that too large a run slows a Mac down, and does not bring it to a stop.

    memory: the device's; None where it is not known, and MLX's own limits stay. held: bytes that a run holds between
    its steps.
    """
    if memory is None or mx.default_device().type != mx.gpu:
        return
    # Above it MLX waits for running work before it starts more, and so holds less. (By itself it would wait at 1.5
    # times what Metal recommends.)
    mx.set_memory_limit(memory.free)
    # Freed buffers, kept for the next step: together with what is held between steps no more than there is.
    mx.set_cache_limit(max(0, memory.free - held))
    # No buffer is wired: some Macs' systems have stopped with wired ones (ml-explore/mlx#3186), and others can be
    # swapped.
    mx.set_wired_limit(0)
