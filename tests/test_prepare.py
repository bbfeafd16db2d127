"""The command line of prepare: its errors, what it prints, and its script."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxgpt import prepare
from mlxgpt.common import cli

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_text.py"


def test_bad_usage_is_one_line():
    for arguments, message in (
        (["--out", "x"], "inputs is empty, expected at least one file, directory or glob"),
        (["a.txt"], "out is empty, expected the directory to write"),
        (["a.txt", "--out", "x", "--val_fraction", "1"], "val_fraction is 1.0, expected 0 < val_fraction < 1"),
        (["a.txt", "--verify", "x"], "verify is 'x', expected no inputs beside it"),
        (["a.txt", "--outt", "x"], r"unknown flag --outt \(did you mean 'out'\?\)"),
    ):
        with pytest.raises(cli.UsageError, match=message):
            prepare.main(arguments)


def test_the_summary_says_what_lies_in_the_directory(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abc\ncab\n" * 200)
    prepare.main([str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "char", "--workers", "1"])
    first = " ".join(capsys.readouterr().err.split())
    assert "train 1,5" in first and "val " in first and "tokens of 1 documents in 1 shard" in first
    assert "text 0.0 MB, 1.00 bytes per token ids 4 in uint16, the largest is 3 state" in first
    assert "MB/s on 1 processes" in first and "next python -m mlxgpt.train --data" in first
    prepare.main(["--verify", str(tmp_path / "out")])
    assert "state every checksum is right" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("command", "name"), [(["-m", "mlxgpt.prepare"], "mlxgpt.prepare"), ([str(SCRIPT)], "prepare_text")]
)
def test_the_command_names_itself_as_it_was_started(command, name, run_python):
    error = run_python(*command, "--outt", "x")
    assert (error.returncode, error.stdout) == (2, "")
    assert error.stderr == f"{name}: error: unknown flag --outt (did you mean 'out'?)\n"
    help_text = run_python(*command, "--help")
    assert help_text.returncode == 0
    assert help_text.stdout.startswith(f"usage: {name} [-h]")
