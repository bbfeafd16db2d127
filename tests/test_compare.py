"""python -m mlxgpt.compare: its picture, its table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from mlxgpt import compare
from mlxgpt.common import cli
from mlxgpt.training import plot
from mlxgpt.training.metrics import History


def make_run(path: Path, lowest: float, **settings: object) -> Path:
    path.mkdir(parents=True)
    lines: list[dict[str, float]] = []
    for step in range(0, 101, 10):
        loss = lowest + 3 * 0.95**step
        lines.append({"step": step, "loss": loss, "tokens": 64 * step, "seconds": step / 4, "tokens_per_s": 256.0,
                      "mfu": 0.25})  # fmt: skip
        if step % 50 == 0:
            lines.append({"step": step, "val_loss": loss})
    lines[0] = {"step": 0, "event": "spike", "loss": None, "deviations": 8.0}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 30, **settings}
    (path / "settings.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    return path


def row(text: str, name: str) -> str:
    return next(" ".join(line.split()) for line in text.splitlines() if line.split()[:1] == [name])


def test_the_table_and_the_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    make_run(tmp_path / "runs/slow", 1.5, learning_rate=1e-4, out_dir="slow")
    make_run(tmp_path / "runs/fast", 1.25, learning_rate=1e-3, out_dir="fast")
    make_run(tmp_path / "runs/old", 2.0)
    (tmp_path / "runs/old/settings.toml").unlink()
    compare.main(["runs/slow", "runs/fast", "runs/old", "runs/slow"])
    text = capsys.readouterr().out
    n_params = 30 * 8 + 16 * 8 + 2 * 8 + 12 * 64 + 13 * 8
    assert row(text, "fast") == f"fast {n_params / 1e3:.4g} K 100 6.4 K 1.2678 100 256 25.0% 0:00:25"
    assert row(text, "old") == "old 100 6.4 K 2.0178 100 256 25.0% 0:00:25"
    table = text.split("params")[1]
    assert table.index("fast") < table.index("slow") < table.index("old")
    assert row(text, "slow:") == "slow: learning_rate 0.0001"
    assert row(text, "fast:") == "fast: learning_rate 0.001"
    assert "old:" not in text
    assert "loss (nats per token) by step" in text
    assert imread("compare.png").shape == (600, 960, 4)


def test_pictures_of_many_runs_and_of_a_short_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = [str(make_run(tmp_path / f"{n:02}", 1 + n / 20)) for n in range(45)]
    for flags in (["--x", "tokens", "--log"], ["--x", "seconds"]):
        compare.main([*names, "--out", "many.png", *flags])
        assert imread("many.png").shape == (600, 2400, 4)
    assert "the 6 best of 45 runs; the picture has all" in capsys.readouterr().out
    (tmp_path / "short").mkdir()
    (tmp_path / "short/metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n{"step": 2, "loss"')
    compare.main(["short", "--out", "short.png"])
    assert row(capsys.readouterr().out, "short") == "short 1"


def pixels(path: Path, colour: str) -> int:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(imread(path)[..., :3] - wanted).max(-1) < 0.02).sum())


def test_each_run_has_a_colour_of_its_own(tmp_path):
    runs = {f"run {n}": History([{"step": s, "val_loss": 2 + n - s / 100} for s in (0, 100)]) for n in range(3)}
    plot.draw_losses(runs, tmp_path / "three.png")
    plot.draw_losses({"run": runs["run 0"]}, tmp_path / "one.png", title="run")
    assert [pixels(tmp_path / "three.png", colour) > 1000 for colour in plot.COLOURS[:4]] == [True] * 3 + [False]
    assert [pixels(tmp_path / "one.png", colour) > 1000 for colour in plot.COLOURS[:2]] == [True, False]


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ("", 2, "RUN is missing, expected the directories of one run or more"),
        ("nowhere", 1, "there is no directory nowhere"),
        ("good empty", 1, "empty is not a training run: it has no metrics.jsonl"),
        ("none", 1, "none/metrics.jsonl: it holds no loss yet"),
        ("torn", 1, 'torn/metrics.jsonl: line 1 is \'{"step": 1, "lo\', expected a JSON object with a step'),
        ("old --x tokens", 1, "old/metrics.jsonl: it has no tokens to draw losses over"),
        ("good --out curves.pdf", 2, "out is curves.pdf, expected a name that ends in .png"),
        ("good --out no/curves.png", 1, "out: there is no directory no"),
        ("good --x epochs", 2, "invalid choice 'epochs' for argument '--x'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, flags, status, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "good", 2.0)
    for name, text in {
        "empty": None,
        "none": "",
        "torn": '{"step": 1, "lo\n{"step": 2, "loss": 3.0}\n',
        "old": '{"step": 1, "loss": 3.0, "tokens_per_s": 5.0}\n',
    }.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "metrics.jsonl").write_text(text)
    monkeypatch.setattr("sys.argv", ["compare", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        cli.run("mlxgpt.compare", compare.main)
    assert stop.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlxgpt.compare: error: {message}")
    assert not list(tmp_path.glob("*.png"))
