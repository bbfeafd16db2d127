"""scripts/bench.py at toy size: what it writes, and what it does about contenders that fail. Nothing here is timed."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
TOY = [sys.executable, str(SCRIPTS / "bench.py"), "--toy", "--quick", "--device", "cpu", "--out", "b.json"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The JSON and the Markdown of a run."""
    folder = tmp_path_factory.mktemp("bench")
    run = subprocess.run(TOY, cwd=folder, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    table = (folder / "b.md").read_text(encoding="utf-8")
    assert table in run.stdout
    return json.loads((folder / "b.json").read_text(encoding="utf-8")), table


def test_the_json_file_holds_the_machine_and_every_part(result):
    values, _ = result
    assert values["complete"] is True
    assert values["machine"]["memory_gb"] > 0.1
    assert values["machine"]["device"] == "cpu"
    assert {"system", "chip", "backend", "mlx", "python", "torch", "threads"} <= set(values["machine"])
    assert all(row.get("gflop_per_s", row.get("gb_per_s", 0)) > 0 for row in values["limits"])
    measured = {row["contender"]: row for row in values["training"] if "left_out" not in row}
    ours = measured["mlxgpt, float32"]
    assert ours["tokens_per_s"] == pytest.approx(2 * 8 / ours["step_ms"] * 1000)
    assert 0 < ours["mfu"] < 1
    assert ours["memory_held_mb"] > 0
    assert ours["memory_predicted_mb"] > 0
    assert {row["contender"] for row in values["generation"]} >= {"mlxgpt float32", "mlxgpt 4-bit"}
    assert all(row["prompt_tokens_per_s"] > 0 for row in values["generation"])
    assert {row["pass"] for row in values["attention"]} == {"forward", "forward + backward"}


def test_a_row_without_figures_says_why(result):
    values, table = result
    (row,) = [row for row in values["training"] if row["contender"] == "mlxgpt, bfloat16"]
    assert "--dtype asks for it" in row["left_out"]
    assert "failed" not in row
    assert f"left out: {row['left_out']}" in table


def test_the_table_has_a_line_for_each_row(result):
    values, table = result
    sections = dict(section.split("\n", 1) for section in table.split("\n## ")[1:])
    assert list(sections) == ["What the machine can do", "Attention", "Generation", "Training"]
    for part, section in zip(("limits", "attention", "generation", "training"), sections.values(), strict=True):
        lines = [line for line in section.splitlines() if line.startswith("|")]
        assert len(lines) == 2 + len(values[part])
        assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--out", "b.txt"], "--out"),
        (["--out", "no/such/b.json"], "--out"),
        (["--minutes", "0"], "--minutes"),
        (["--threads", "0"], "--threads"),
        (["--only", "nothing"], "--only"),
    ],
)
def test_bad_usage_is_one_line(flags, named, tmp_path):
    run = subprocess.run([*TOY, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert named in line
    assert not list(tmp_path.iterdir())


def test_what_was_measured_before_an_interrupt_is_kept(heeds_ctrl_c, tmp_path):
    file = tmp_path / "b.json"
    with subprocess.Popen(TOY, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and not (file.exists() and '"limits"' in file.read_text()):
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=600)
    assert run.returncode == 130, err
    assert "It was stopped before the end." in out
    values = json.loads(file.read_text(encoding="utf-8"))
    assert values["complete"] is False
    assert values["limits"]


# ---- contenders that take turns ----

ANSWERS = "import sys; sys.path.insert(0, {scripts!r}); import turns; turns.serve(lambda: ('ready', {answer}))"


@pytest.fixture
def scripts(monkeypatch):
    """Imports a script by its name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module
    for name in [n for n, m in sys.modules.items() if Path(getattr(m, "__file__", None) or ".").parent == SCRIPTS]:
        monkeypatch.delitem(sys.modules, name)


def contender(turns, name, answer):
    return turns.Contender(
        name, [sys.executable, "-c", ANSWERS.format(scripts=str(SCRIPTS), answer=answer)], is_ours=True
    )


def test_contenders_take_turns(scripts):
    turns = scripts("turns")
    group = [contender(turns, name, "lambda n: [n, __import__('time').time()]") for name in "ab"]
    with turns.started(group, {}):
        turns.take_turns(group, lambda c: c.name, seconds=60, most=3)
    assert [[name for name, _ in c.answers] for c in group] == [["a"] * 3, ["b"] * 3]
    times = [time for answers in zip(*(c.answers for c in group), strict=True) for _, time in answers]
    assert times == sorted(times)


def test_who_fails_or_is_too_slow_says_why_and_the_others_go_on(scripts):
    turns = scripts("turns")
    broken = contender(turns, "broken", "lambda n: 1 // 0")
    slow = contender(turns, "slow", "lambda n: __import__('time').sleep(600)")
    well = contender(turns, "well", "lambda n: print('noise') or n")
    missing = turns.Contender("missing", [sys.executable, "-c", "import nothing_of_this_name"])
    group = [broken, well, missing]
    with turns.started([*group, slow], {}):
        turns.take_turns(group, lambda c: 1, seconds=60, most=2)
        assert slow.ask(1, timeout=0.1) is None
    assert well.answers == [1, 1]
    assert broken.why() == {"left_out": "ZeroDivisionError: integer division or modulo by zero", "failed": True}
    assert "nothing_of_this_name" in missing.why()["left_out"]
    assert "failed" not in missing.why()  # it is not ours
    assert slow.why() == {"left_out": "a turn took more than 0 s"}


def test_a_shape_is_left_out_where_it_would_not_fit_or_would_take_too_long(scripts):
    train, report, turns = map(scripts, ("bench_train", "report", "turns"))
    settings = report.Settings({"device": "cpu", "free_memory_gb": 8.0, "kernels": False})
    peaks = train.Peaks(settings, turns.Contender("limits", []))
    peaks.products = {"float32": 1e9, "bfloat16": 1e9}

    def reason(gigabytes=1.0, seconds_of_step=1.0, dtype="float32", is_ours=True):
        plan = {"flops": seconds_of_step * 1e9, "bytes": {dtype: gigabytes * 1e9}}
        return train.reason_to_leave_out(settings, plan, turns.Contender("c", [], dtype, is_ours), peaks, seconds=60)

    assert reason() == ""
    assert reason(gigabytes=7.5) == "it needs 7.5 GB, and 8.0 are free"
    assert reason(gigabytes=7.5, is_ours=False) == "it needs 7.5 GB, and 8.0 are free"
    assert reason(seconds_of_step=30) == "a step takes at least 30 s at 1.0 GFLOP/s"
    assert reason(seconds_of_step=30, is_ours=False) == ""
    assert "--dtype asks for it" in reason(dtype="bfloat16")
    settings.dtypes = ["bfloat16"]
    assert reason(dtype="bfloat16") == ""
