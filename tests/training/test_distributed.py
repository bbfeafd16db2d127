"""Training on several ranks, which are processes here: the same curve, one writer, and no hang when one dies."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from mlxgpt import train
from mlxgpt.training import distributed

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="MLX's ring backend")

FLAGS = (
    "--data text.txt --device cpu --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --eval_interval 2 "
    "--eval_iters 3 --log_interval 1 --sample_tokens 4 --warmup_iters 2 --learning_rate 0.01 --lr_decay_iters 6"
).split()
COMMAND = ["-m", "mlxgpt.train"]


@pytest.fixture(autouse=True)
def corpus(tmp_path, monkeypatch) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    monkeypatch.chdir(tmp_path)


def start(ranks: Sequence[Sequence[str]], hostfile: str = "hosts.json") -> list[subprocess.Popen]:
    """Starts Python with the arguments of each rank; the ranks meet on free ports of the loopback."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in ranks]
    Path(hostfile).write_text(json.dumps([[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]))
    for s in sockets:
        s.close()
    environment = {**os.environ, "MLX_HOSTFILE": hostfile, "MLXGPT_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments], env={**environment, "MLX_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank, arguments in enumerate(ranks)
    ]  # fmt: skip


def finish(processes: Sequence[subprocess.Popen]) -> list[subprocess.CompletedProcess]:
    """Waits for all processes and returns what they wrote. All are read at once: one whose pipe is full would block."""
    results: dict[int, subprocess.CompletedProcess] = {}

    def wait(rank: int, process: subprocess.Popen) -> None:
        out, err = process.communicate()
        results[rank] = subprocess.CompletedProcess(process.args, process.returncode, out, err)

    threads = [threading.Thread(target=wait, args=pair) for pair in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for process in processes:
        process.kill()
    assert len(results) == len(processes), "a rank hangs"
    return [results[rank] for rank in range(len(processes))]


def launch(*ranks: Sequence[str]) -> list[subprocess.CompletedProcess]:
    return finish(start(ranks))


def curve(run: str) -> dict[tuple[str, int], float]:
    """The losses of a run, by kind and step."""
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return {(kind, line["step"]): line[kind] for line in lines for kind in ("loss", "val_loss") if kind in line}


def files(directory: str) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("batch_size", "micro_batches", "size"), [(3, 4, 2), (4, 3, 2), (4, 1, 4), (1, 4, 4), (5, 2, 1)]
)
def test_the_ranks_share_all_windows_once_and_equally(batch_size, micro_batches, size):
    shares = [distributed.rank_windows(batch_size, micro_batches, rank, size) for rank in range(size)]
    assert len({tuple(map(len, share)) for share in shares}) == 1
    windows = list(itertools.chain(*itertools.chain(*shares)))
    assert sorted(windows) == list(range(batch_size * micro_batches))
    assert all(w.start // batch_size == (w.stop - 1) // batch_size for share in shares for w in share)


def test_a_step_that_cannot_be_shared_is_refused():
    expected = "batch_size is 6 and gradient_accumulation_steps 3, expected one of them to be a multiple of the 4 ranks"
    with pytest.raises(ValueError, match=expected):
        distributed.rank_windows(6, 3, 0, 4)


def test_a_process_without_a_launcher_is_a_group_of_one(monkeypatch):
    monkeypatch.delitem(sys.modules, "mlxgpt.training.watch", raising=False)
    with distributed.join_group() as group:
        assert (group.rank, group.size, group.any(True), group.any(False)) == (0, 1, True, False)
        tree = {"a": mx.ones(2)}
        assert group.average(tree) is tree
        group.agree({"a": 1})
    assert "mlxgpt.training.watch" not in sys.modules


@pytest.mark.parametrize(
    ("variables", "backend"),
    [
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "[[]]"}, "ring"),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "\n"}, None),
        ({"MLX_RANK": "0", "MLX_JACCL_COORDINATOR": "10.0.0.1:1"}, "jaccl"),
        ({"MLX_RANK": "0", "NCCL_HOST_IP": "10.0.0.1", "MLX_WORLD_SIZE": "2"}, "nccl"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({}, None),
    ],
)
def test_the_launchers_variables_choose_the_backend(tmp_path, monkeypatch, variables, backend):
    def refuse(strict, backend):
        raise RuntimeError("no such network")

    monkeypatch.setattr(mx.distributed, "init", refuse)
    for name, value in variables.items():
        if name == "MLX_HOSTFILE":
            (tmp_path / "hosts").write_text(value)
            value = str(tmp_path / "hosts")
        monkeypatch.setenv(name, value)
    if backend is None:
        assert distributed.join_group().size == 1
        return
    with pytest.raises(ConnectionError, match=f"MLX's backend {backend} does not start: no such network"):
        distributed.join_group()


GROUP_SCRIPT = """
import json, zlib
import mlx.core as mx, numpy as np
from mlxgpt.training import distributed
from mlxgpt.training.trainer import Trainer
from mlxgpt.cpu import extension
from mlxgpt.model.config import GPTConfig
from mlxgpt.training.recipe import TrainConfig
from mlxgpt.model.gpt import GPT

def run(group, batch_size, micro_batches):
    shape = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16)
    config = TrainConfig(batch_size=batch_size, gradient_accumulation_steps=micro_batches, learning_rate=1e-2,
                         warmup_iters=2, grad_clip=0.5, device="cpu", model=shape)
    mx.set_default_device(mx.cpu)
    mx.random.seed(group.rank)
    model = GPT(shape)
    model.update(group.broadcast(model.parameters()))
    trainer = Trainer(model, config, group)
    share = distributed.rank_windows(batch_size, micro_batches, group.rank, group.size)
    losses = []
    for step in range(5):
        ids = np.random.default_rng(step).integers(0, 32, (batch_size * micro_batches, 17)).astype(np.int32)
        losses.append(trainer.step([(ids[w, :-1], ids[w, 1:]) for w in map(list, share)]).item())
    losses.append(trainer.evaluate([(ids[[i], :-1], ids[[i], 1:]) for i in range(3)]))
    weights = b"".join(np.array(w).tobytes() for w in model.named_weights().values())
    return losses, zlib.crc32(weights)

with distributed.join_group() as group:
    results = [run(group, *c) for c in ((4, 1), (2, 4))]
    with extension.switched_off():
        results += [run(group, *c) for c in ((4, 1), (2, 4))]
    sums = group.sum(group.rank, 0.1), group.any(group.rank == group.size - 1), group.any(False)
    values = group.gather(b"x" * group.rank)
    average = group.average([mx.full((3,), group.rank), mx.full((2, 2), 1.0)])
    try:
        group.agree({"same": [1], "lr": 0.1 if group.rank < 1 else 0.2})
        said = ""
    except ValueError as error:
        said = str(error)
    print(json.dumps([results, sums, list(map(len, values)), [a.tolist() for a in average], said]))
"""


@pytest.fixture(scope="module")
def one_process() -> list:
    process = subprocess.run([sys.executable, "-c", GROUP_SCRIPT], capture_output=True, text=True, check=True)
    return json.loads(process.stdout)[0]


@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_train_as_one_process_does(one_process, size):
    results = launch(*[["-c", GROUP_SCRIPT]] * size)
    assert [r.stderr for r in results] == [""] * size
    first, *others = [json.loads(r.stdout) for r in results]
    for other in others:
        assert other == first  # losses and weights to the bit
    for (losses, _), (expected, _) in zip(first[0], one_process, strict=True):
        assert losses == pytest.approx(expected, abs=1e-5)
        assert abs(losses[0] - losses[4]) > 0.01
    total, average, host = size * (size - 1) / 2, (size - 1) / 2, socket.gethostname()
    assert first[1] == [[total, pytest.approx(0.1 * size, rel=1e-15)], True, False]
    assert first[2] == list(range(size))
    assert first[3] == [[average] * 3, [[1, 1], [1, 1]]]
    assert first[4] == f"lr is 0.2 on rank 1 ({host}), but 0.1 on rank 0 ({host})"


def test_a_run_is_resumed_with_another_number_of_ranks(capsys):
    train.main([*FLAGS, "--out_dir", "whole", "--max_iters", "6"])
    first = launch(*[[*COMMAND, *FLAGS, "--out_dir", "run", "--max_iters", "2"]] * 2)
    assert [r.returncode for r in first] == [0, 0], first
    assert "ranks: rank 0 (" in first[0].stdout
    assert first[1].stdout == first[1].stderr == ""
    train.main(["--resume", "run", "--max_iters", "4"])
    last = launch(*[[*COMMAND, "--resume", "run", "--max_iters", "6"]] * 4)
    assert [r.returncode for r in last] == [0] * 4, last
    assert curve("run") == pytest.approx(curve("whole"), abs=1e-5)
    assert {step for _, step in curve("run")} == set(range(7))


def test_mlx_launch_starts_the_ranks():
    flags = [*FLAGS, "--out_dir", "run", "--max_iters", "2", "--gradient_accumulation_steps", "2"]
    port = socket.create_server(("127.0.0.1", 0))
    number = port.getsockname()[1]
    port.close()
    hosts = [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2
    Path("two.json").write_text(json.dumps({"backend": "ring", "envs": ["MLXGPT_NUM_THREADS=1"], "hosts": hosts}))
    launcher = "from mlx._distributed_utils.launch import main; main()"
    process = subprocess.Popen(  # its standard input stays open: at an end of file it spins
        [sys.executable, "-c", launcher, "--hostfile", "two.json", "--starting-port", str(min(number, 65000)),
         "--", sys.executable, *COMMAND, *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.wait(60)
    out, err = process.communicate()
    assert err == ""
    assert out.count("step 2: validation loss") == 1
    train.main([*flags, "--out_dir", "one"])
    assert curve("run") == pytest.approx(curve("one"), abs=1e-5)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (["--learning_rate", "0.02"], "learning_rate is 0.02 on rank 1 ({host}), but 0.01 on rank 0 ({host})"),
        (["--data", "other.txt"], "the data's SHA-256 is "),
        (["--data", "nowhere"], "rank 1 ({host}): data: there is no file or directory nowhere"),
        (["--n_lay", "1"], "rank 1 ({host}): unknown flag --n_lay (did you mean 'n_layer'?)"),
    ],
)
def test_ranks_that_differ_are_one_line_and_write_nothing(theirs, message):
    text = Path("text.txt").read_text()
    Path("other.txt").write_text(text.replace("quick", "kciuq"))
    Path("run/best").mkdir(parents=True)
    Path("run/metrics.jsonl").write_text("kept\n")
    Path("run/best/config.json").write_text("kept too")
    before = files(".")
    ours = [*COMMAND, *FLAGS, "--out_dir", "run", "--overwrite", "--max_iters", "2"]
    zero, one = launch(ours, [*ours, *theirs])
    assert (zero.returncode, one.returncode) == (1, 2 if "--n_lay" in theirs else 1)
    (line,) = zero.stderr.splitlines()
    assert line.startswith("mlxgpt.train: error: " + message.format(host=socket.gethostname()))
    assert one.stderr == zero.stdout == one.stdout == ""
    assert {name: content for name, content in files(".").items() if name != "hosts.json"} == before


LOOP_SCRIPT = """
import sys
import mlx.core as mx
from mlxgpt.training import distributed, watch
watch.SILENCE = float(sys.argv[1])
with distributed.join_group() as group:
    group.on_death(lambda: open(f"farewell{group.rank}", "w").close())
    for n in range(10**9):
        group.average([mx.ones(1000)])
        if n == 10:
            print("runs", flush=True)
"""


@pytest.mark.parametrize(("victim", "number"), [(0, "KILL"), (1, "KILL"), (2, "KILL"), (1, "STOP")])
def test_a_rank_that_dies_is_named_and_ends_the_others(victim, number):
    processes = start([["-c", LOOP_SCRIPT, "30" if number == "KILL" else "2"]] * 3)
    for process in processes:
        assert process.stdout.readline() == "runs\n"
    processes[victim].send_signal(getattr(signal, f"SIG{number}"))
    since = time.monotonic()
    results = finish([p for rank, p in enumerate(processes) if rank != victim])
    processes[victim].kill()
    processes[victim].communicate()
    assert time.monotonic() - since < (5 if number == "KILL" else 10)
    for rank, result in zip([r for r in range(3) if r != victim], results, strict=True):
        assert result.returncode == 1
        ours = [line for line in result.stderr.splitlines() if "[ring]" not in line and "closed by" not in line]
        expected = (
            f"mlxgpt.train: error: rank {victim} ({socket.gethostname()}) has died; go on from the last checkpoint"
        )
        assert [line[: len(expected)] for line in ours if line] == [expected], result.stderr
        assert Path(f"farewell{rank}").exists()


def test_a_rank_that_never_starts_ends_the_others():
    script = "from mlxgpt.training import distributed, watch; watch.START = 0.5; distributed.join_group()"
    (result, _) = launch(["-c", script], ["-c", ""])
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"mlxgpt.train: error: {socket.gethostname()}: MLX could not connect all ranks in 0 s")


def test_any_rank_may_be_asked_to_stop():
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # in case that the tests run under nohup
    processes = start([[*COMMAND, *FLAGS, "--out_dir", "run", "--max_iters", "1000000"]] * 2)
    signal.signal(signal.SIGHUP, handler)
    for line in processes[0].stdout:
        if line.startswith("step 3/"):
            break
    processes[1].send_signal(signal.SIGHUP)
    zero, one = finish(processes)
    assert (zero.returncode, zero.stderr, one.returncode, one.stderr) == (0, "", 0, "")
    assert "stopped after" in zero.stdout
