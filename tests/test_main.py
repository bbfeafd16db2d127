"""The command `mlxgpt VERB`: the list of verbs, its errors, and that a verb runs as `python -m mlxgpt.VERB` does."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from mlxgpt.__main__ import VERBS
from mlxgpt.common.settings import tomllib

ROOT = Path(__file__).parents[1]
INSTALLED = "import sys; sys.argv[0] = '/usr/local/bin/mlxgpt'; from mlxgpt.__main__ import main; main()"
STARTS = {"mlxgpt": ["-c", INSTALLED], "python -m mlxgpt": ["-m", "mlxgpt"]}  # by what the command calls itself


def test_the_verbs_are_the_modules_at_the_root():
    assert set(VERBS) == {file.stem for file in (ROOT / "mlxgpt").glob("[!_]*.py")}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_main(verb):
    assert callable(importlib.import_module(f"mlxgpt.{verb}").main)


def test_the_package_installs_the_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["mlxgpt"].partition(":")
    assert (module, callable(getattr(importlib.import_module(module), function))) == ("mlxgpt.__main__", True)


@pytest.mark.parametrize("prog", STARTS)
@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_verb_it_lists_them(prog, arguments, run_python):
    result = run_python(*STARTS[prog], *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    first, *lines = result.stdout.splitlines()
    assert first == f"usage: {prog} VERB ..."
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(VERBS)
    assert all(line.endswith(VERBS[line.split()[0]]) for line in lines if line.startswith("  "))


def test_a_reader_of_the_list_may_stop_reading(run_python):
    program = (
        "import os, subprocess, sys\n"
        "end, out = os.pipe()\n"
        "os.close(end)\n"
        "lister = subprocess.run([sys.executable, '-m', 'mlxgpt'], stdout=out, stderr=subprocess.PIPE)\n"
        "print(lister.returncode, lister.stderr.decode())\n"
    )
    assert run_python("-c", program).stdout.strip() == "1"


@pytest.mark.parametrize("prog", STARTS)
def test_an_unknown_verb_is_one_line_with_the_nearest(prog, run_python):
    result = run_python(*STARTS[prog], "trian", "--max_iters", "3")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{prog}: error: unknown verb 'trian' (did you mean 'train'?); --help lists them\n"


def test_the_version(run_python):
    import mlxgpt

    assert run_python("-m", "mlxgpt", "--version").stdout == f"mlxgpt {mlxgpt.__version__}\n"


@pytest.mark.parametrize("prog", STARTS)
def test_a_verb_names_itself_as_it_was_started(prog, run_python):
    mistake = run_python(*STARTS[prog], "generate", "--modle", "x")
    assert mistake.returncode == 2
    assert mistake.stderr == f"{prog} generate: error: unknown flag --modle (did you mean 'model'?)\n"
    failure = run_python(*STARTS[prog], "generate", "--model", "no-such-directory")
    assert failure.returncode == 1
    assert failure.stderr.startswith(f"{prog} generate: error: model: there is no directory no-such-directory")
    help_text = run_python(*STARTS[prog], "generate", "--help")
    assert help_text.returncode == 0
    assert help_text.stdout.startswith(f"usage: {prog} generate [-h]")


def imported(run_python, *arguments) -> set[str]:
    result = run_python("-X", "importtime", "-m", *arguments)
    assert result.returncode == 0
    return {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


def test_listing_the_verbs_imports_neither_mlx_nor_a_command_line_parser(run_python):
    modules = imported(run_python, "mlxgpt")
    assert "mlxgpt" in modules
    assert not {"mlx", "mlx.core", "tyro", "numpy", "rich"} & modules


def test_the_command_imports_what_the_module_alone_does(run_python):
    alone = imported(run_python, "mlxgpt.generate", "--help")
    by_command = imported(run_python, "mlxgpt", "generate", "--help")
    assert {"mlx.core", "mlxgpt.common.cli"} <= alone
    assert by_command - alone <= {"mlxgpt.generate"}  # alone it is the module __main__


def test_without_mlx_the_verbs_are_listed_and_a_verb_is_one_line(tmp_path, run_python, monkeypatch):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    assert "evaluate" in run_python("-m", "mlxgpt").stdout
    result = run_python("-m", "mlxgpt", "train")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "libmlx.so" in line and "pip install 'mlxgpt[cpu]'" in line


@pytest.mark.parametrize(
    ("module", "args", "status", "message"),
    [
        ("train", ["--n_layr", "3"], 2, "did you mean 'n_layer'?"),
        ("train", ["--data", "no-such-file.txt"], 1, "no-such-file.txt"),
        ("train", ["--config", "no-such.toml"], 1, "no-such.toml"),
        ("generate", [], 2, "model"),
        ("generate", ["--model", "no-such-dir"], 1, "no-such-dir"),
        ("inspect", ["gpt3"], 1, "gpt3"),
    ],
)
def test_a_users_mistake_is_one_line_without_a_traceback(tmp_path, module, args, status, message):
    result = subprocess.run(
        [sys.executable, "-m", f"mlxgpt.{module}", *args], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == status
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"mlxgpt.{module}: error: ")
    assert message in line
    assert not list(tmp_path.iterdir())
