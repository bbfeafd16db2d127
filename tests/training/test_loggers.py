"""TensorBoard's event files as they are read back, and Weights & Biases without a connection."""

from __future__ import annotations

import struct
import sys
import time
import types
from pathlib import Path

import pytest

from mlxgpt.training import loggers
from mlxgpt.training.metrics import Metrics
from mlxgpt.training.recipe import TrainConfig


def a_run(path: Path, config: TrainConfig, after: int | None, steps: range, said: list[str]) -> None:
    """Logs a loss for each step and an evaluation at the last."""
    metrics = Metrics(
        path / "metrics.jsonl", after, loggers.open_loggers(config, path, after, {"learning_rate": 1e-3}, said.append)
    )
    for step in steps:
        metrics.add(step=step, loss=10.0 - step, mfu=0.5)
    metrics.add(step=steps[-1], event="spike", loss=20.0, deviations=9.0)
    metrics.add(step=steps[-1], val_loss=1.0)
    metrics.close()


def shown(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: a start mark in a file hides the later steps of the files before it."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    points: list[tuple[str, int, float]] = []
    for file in sorted(directory.iterdir(), key=lambda f: f.stat().st_mtime_ns):
        content, at = file.read_bytes(), 0
        while at < len(content):  # length and its checksum, an event and its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log"):
                points = [point for point in points if point[1] < event.step]
            points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return {tag: [(step, value) for t, step, value in points if t == tag] for tag, _, _ in points}


def test_tensorboard_has_each_line_once(tmp_path):
    pytest.importorskip("tensorboardX")
    config = TrainConfig(tensorboard=True)
    loggers.require_packages(config)
    a_run(tmp_path, config, None, range(1, 8), [])
    a_run(tmp_path, config, 4, range(5, 10), [])
    assert shown(tmp_path / "tensorboard") == {
        "loss": [(step, 10.0 - step) for step in range(1, 10)],
        "mfu": [(step, 0.5) for step in range(1, 10)],
        "spike/loss": [(9, 20.0)],
        "spike/deviations": [(9, 9.0)],
        "val_loss": [(9, 1.0)],
    }
    a_run(tmp_path, config, None, range(1, 3), [])
    assert shown(tmp_path / "tensorboard")["loss"] == [(1, 9.0), (2, 8.0)]


def test_a_line_is_in_tensorboard_soon(tmp_path):
    """It does not wait for the end of the run, which may be killed."""
    pytest.importorskip("tensorboardX")
    metrics = Metrics(tmp_path / "m", None, [loggers.TensorBoard(tmp_path / "tensorboard", None)])
    metrics.add(step=1, loss=3.0)
    deadline = time.monotonic() + 30
    while shown(tmp_path / "tensorboard") != {"loss": [(1, 3.0)]}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    metrics.close()


@pytest.mark.parametrize(
    ("config", "package"), [(TrainConfig(tensorboard=True), "tensorboardX"), (TrainConfig(wandb="gpt"), "wandb")]
)
def test_a_missing_package_is_named(monkeypatch, tmp_path, config, package):
    setting = package.lower().removesuffix("x")
    message = rf"^{setting} needs the package {package}: pip install 'mlxgpt\[{setting}\]'$"
    (tmp_path / package).mkdir()  # as W&B leaves it where it was run
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(ValueError, match=message):
        loggers.require_packages(config)
    loggers.require_packages(TrainConfig())
    assert loggers.open_loggers(TrainConfig(), tmp_path, None, {}, print) == []


class Offline:
    """A stand-in for the package wandb whose server can't be reached."""

    def __init__(self, **failures: Exception) -> None:
        self.failures, self.logged, self.options = failures, [], []
        self.Settings = dict
        self.starting_step, self.offline = 0, True

    def init(self, **options):
        self.options.append(options)
        if error := self.failures.get(options.get("mode", "online")):
            raise error
        return self

    def log(self, values, step):
        if "log" in self.failures:
            raise self.failures["log"]
        self.logged.append((step, *values))

    def finish(self):
        self.logged.append("finish")


def use(monkeypatch, stand_in: Offline) -> Offline:
    module = types.ModuleType("wandb")
    module.init, module.Settings = stand_in.init, stand_in.Settings
    monkeypatch.setitem(sys.modules, "wandb", module)
    return stand_in


def test_wandb_logs_offline_and_a_resumed_run_is_the_same_run(monkeypatch, tmp_path):
    config, said = TrainConfig(wandb="gpt"), []
    wandb = use(monkeypatch, Offline(online=OSError("no route to host\nand more")))
    a_run(tmp_path, config, None, range(1, 4), said)
    assert said == [f"wandb: no route to host; logging to {tmp_path / 'wandb'} instead, for `wandb sync`"]
    spike = (3, "spike/loss", "spike/deviations")
    assert wandb.logged == [*((n, "loss", "mfu") for n in (1, 2, 3)), spike, (3, "val_loss"), "finish"]
    assert wandb.options[1]["mode"] == "offline"
    assert (wandb.options[1]["project"], wandb.options[1]["config"]) == ("gpt", {"learning_rate": 1e-3})
    wandb.logged.clear()
    a_run(tmp_path, config, 2, range(3, 6), said)
    assert [line[0] for line in wandb.logged[:2]] == [4, 5]  # it has step 3
    ids = {options["id"] for options in wandb.options}
    assert ids == {(tmp_path / "wandb_id").read_text()}
    a_run(tmp_path, config, None, range(1, 2), said)
    assert {options["id"] for options in wandb.options} > ids


@pytest.mark.parametrize(
    "failures", [{"online": OSError("no"), "offline": OSError("disk full")}, {"log": OSError("no")}]
)
def test_a_run_outlives_wandb(monkeypatch, tmp_path, failures):
    said: list[str] = []
    use(monkeypatch, Offline(**failures))
    a_run(tmp_path, TrainConfig(wandb="gpt"), None, range(1, 4), said)
    assert said[-1].endswith("; nothing more is logged there")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_wandb_itself_offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    for after, steps in ((None, range(1, 4)), (3, range(4, 6))):
        a_run(tmp_path, TrainConfig(wandb="gpt"), after, steps, said)
    assert said == []
    identifier = (tmp_path / "wandb_id").read_text()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{identifier}*/run-{identifier}.wandb"))
    assert 1 <= len(files) <= 2  # a directory's name has its second
    assert all(file.stat().st_size > 1000 for file in files)
