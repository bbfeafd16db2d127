"""Installing the package: one build of MLX, and the extension, which a checkout does not hide."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import metadata, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mlxgpt

ROOT = Path(__file__).parents[1]


def mlx_builds(platform: str, *extras: str) -> set[str]:
    """The extras of `mlx` that an install of mlxgpt[extras] asks for."""
    asked = set()
    for text in requires("mlxgpt") or []:
        requirement = Requirement(text)
        environments = [{"platform_system": platform, "extra": extra} for extra in ("", *extras)]
        if requirement.name == "mlx" and (
            requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments)
        ):
            asked |= requirement.extras
    return asked


@pytest.mark.parametrize("extra", ["cpu", "cuda12", "cuda13"])
def test_an_extra_asks_for_one_build_of_mlx(extra):
    assert mlx_builds("Linux", extra, "test", "parity", "dev") == {extra}
    assert mlx_builds("Darwin", extra) == set()  # on a Mac `mlx` itself brings Metal


def test_without_an_extra_no_build_is_asked_for():
    """The builds install the same file, so a build among the base dependencies would clash with every other."""
    assert mlx_builds("Linux") == mlx_builds("Darwin") == set()


def test_mlx_has_extras_of_these_names():
    assert {"cpu", "cuda12", "cuda13"} <= set(metadata("mlx").get_all("Provides-Extra"))


def test_the_version_is_the_one_that_is_installed():
    assert mlxgpt.__version__ == version("mlxgpt")


def test_a_wheel_is_tagged_for_the_macos_that_the_extension_is_built_for():
    tag = re.search(r'CMAKE_OSX_DEPLOYMENT_TARGET = .*default = "([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    binary = re.search(r"set\(oldest_macos ([\d.]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert tag[1] == binary[1]


def test_running_from_a_checkout_finds_the_installed_extension(monkeypatch, tmp_path):
    pytest.importorskip("mlxgpt._core")
    monkeypatch.delenv("MLXGPT_KERNELS", raising=False)
    check = "import sys; sys.path.insert(0, ''); import mlxgpt.cpu.extension as e; print(e.is_there())"
    for folder in (ROOT, tmp_path):
        result = subprocess.run([sys.executable, "-c", check], cwd=folder, capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "True"


@pytest.mark.parametrize(("value", "used"), [("0", "False"), ("1", "True")])
def test_kernels_can_be_switched_off(value, used, monkeypatch):
    pytest.importorskip("mlxgpt._core")
    monkeypatch.setenv("MLXGPT_KERNELS", value)
    check = "import mlxgpt.cpu.extension as e; print(e.is_there())"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == used


def test_without_a_build_of_mlx_a_verb_is_one_line(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    command = [sys.executable, "-m", "mlxgpt.train"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "libmlx.so" in line
    assert "pip install 'mlxgpt[cpu]'" in line
