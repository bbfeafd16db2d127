"""The memory that devices say they have, and the limits that MLX gets for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

from mlxgpt.training import device_memory
from mlxgpt.training.device_memory import DeviceMemory

GB = 10**9
METAL = {"memory_size": 32 * GB, "max_recommended_working_set_size": 22 * GB, "device_name": "Apple M4"}
CUDA = {"total_memory": 80 * GB, "free_memory": 60 * GB, "uuid": "GPU-1"}


@pytest.fixture
def gpu(monkeypatch):
    """Called with what MLX says about a GPU, it makes that the default device, for questions only."""

    def use(info: object) -> None:
        def device_info(device: object = None) -> object:
            if isinstance(info, Exception):
                raise info
            return info

        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        monkeypatch.setattr(mx, "device_info", device_info)

    return use


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (METAL, DeviceMemory(32 * GB, 22 * GB)),
        (CUDA, DeviceMemory(80 * GB, 60 * GB, "GPU-1")),
        ({"device_name": "another"}, None),
        ({**METAL, "max_recommended_working_set_size": 0}, None),
        (RuntimeError("no such device"), None),
    ],
)
def test_a_gpus_memory(gpu, info, expected):
    gpu(info)
    assert device_memory.available() == expected


def linux(root: Path, **files: str) -> Path:
    """A Linux machine's files, of which these are more: a double underscore stands for a slash."""
    meminfo = "MemTotal:       16000000 kB\nMemFree:  100 kB\nMemAvailable:    9000000 kB\nHugePages_Total:       0\n"
    for name, text in {"proc__meminfo": meminfo, **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_linux_machines_memory(tmp_path):
    assert device_memory.linux_memory(linux(tmp_path)) == DeviceMemory(16_384_000_000, 9_216_000_000)
    assert device_memory.linux_memory(linux(tmp_path, proc__meminfo="MemTotal: 16000000 kB\n")) is None
    assert device_memory.linux_memory(tmp_path / "elsewhere") is None


def test_a_containers_limit_counts(tmp_path):
    """Also one of a group above the container's own, and files in memory, which are given up, are not used memory."""
    root = linux(tmp_path, proc__self__cgroup="0::/machine/box\n")
    for group, limit, used in [("machine", 6 * GB, 3 * GB), ("machine/box", "max", 2 * GB)]:
        at = root / "sys/fs/cgroup" / group
        at.mkdir(parents=True)
        for name, text in {"memory.max": limit, "memory.current": used}.items():
            (at / name).write_text(f"{text}\n")
        (at / "memory.stat").write_text(f"anon 5\ninactive_file {GB}\n")
    assert device_memory.linux_memory(root) == DeviceMemory(6 * GB, 4 * GB)
    (root / "sys/fs/cgroup/machine/memory.current").write_text(f"{9 * GB}\n")
    assert device_memory.linux_memory(root) == DeviceMemory(6 * GB, 0)


def test_a_container_of_the_older_kind(tmp_path):
    root = linux(tmp_path, proc__self__cgroup="9:name=systemd:/\n4:cpu,memory:/box\n0::/\n")
    at = root / "sys/fs/cgroup/memory"
    (at / "box").mkdir(parents=True)
    (at / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")  # no limit
    (at / "box/memory.limit_in_bytes").write_text(f"{5 * GB}\n")
    for group in (at, at / "box"):
        (group / "memory.usage_in_bytes").write_text(f"{2 * GB}\n")
        (group / "memory.stat").write_text(f"inactive_file 7\ntotal_inactive_file {GB}\n")
    assert device_memory.linux_memory(root) == DeviceMemory(5 * GB, 4 * GB)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux alone")
def test_a_limit_of_the_shell_counts(run_python):
    """MLX on a CPU crashes at such a limit."""
    code = "import resource as r; from mlxgpt.training import device_memory; r.setrlimit(r.RLIMIT_AS, (6 << 30,) * 2)"
    result = run_python("-c", f"{code}; m = device_memory.linux_memory(); print(m.total, m.free)")
    total, free = map(int, result.stdout.split())
    assert total <= 6 << 30
    assert free < total - 10_000_000


def test_a_macs_memory(monkeypatch):
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:          10000.\n"
        "Pages active:       200000.\nPages inactive:      20000.\nPages speculative:    1000.\n"
        "Pages wired down:   100000.\nPages purgeable:       500.\n\"Translation faults\":  123456.\n"
    )  # fmt: skip
    told = subprocess.CompletedProcess(["vm_stat"], 0, stdout=text)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: told)
    memory = device_memory.mac_memory()
    assert memory
    assert memory.total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory.free == 31_500 * 16384
    told.stdout = "nothing that is known\n"
    assert device_memory.mac_memory() is None


def test_this_machine_says_how_much_it_has():
    memory = device_memory.available()
    assert memory
    assert 0 < memory.room < memory.free <= memory.total


@pytest.fixture
def set_limits():
    """Sets the limits for some memory -> what MLX's limits of memory, cache and wired memory are then. Before they are
    GB, GB / 2 and 0."""
    kept = mx.set_memory_limit(GB), mx.set_cache_limit(GB // 2), mx.set_wired_limit(0)

    def call(memory: DeviceMemory | None) -> tuple[int, int, int]:
        device_memory.set_limits(memory, held=3 * GB)
        return mx.set_memory_limit(GB), mx.set_cache_limit(GB // 2), mx.set_wired_limit(0)

    yield call
    mx.set_memory_limit(kept[0])
    mx.set_cache_limit(kept[1])
    mx.set_wired_limit(kept[2])


def test_a_gpu_gets_limits(gpu, set_limits):
    before = GB, GB // 2, 0
    assert set_limits(DeviceMemory(32 * GB, 22 * GB)) == before  # on a CPU
    gpu(METAL)
    assert set_limits(None) == before
    assert set_limits(DeviceMemory(32 * GB, 22 * GB)) == (22 * GB, 19 * GB, 0)
    assert set_limits(DeviceMemory(32 * GB, 1000)) == (1000, 0, 0)
