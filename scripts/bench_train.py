"""Times whole training steps (forward, backward, clipping, AdamW) next to PyTorch, eager and compiled.

    python scripts/bench_train.py [--shape small|medium|gpt2] [--steps N] [--compile]

Each contender is a process of its own, float32, on the same threads. They take turns of some steps, so that all
see the same state of the machine; printed are medians, the ratio to ours, the share of the multiply-add peak
(model FLOPs as `python -m mlxgpt.inspect` counts them) and the peak memory of the whole process.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

SHAPES = {
    "small": (dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 12),
    "medium": (dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65), 16),
    "gpt2": (dict(n_layer=12, n_head=12, n_embd=768, block_size=512, vocab_size=50304), 4),
}
ADAMW = dict(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95)


def ours(shape: dict[str, int]) -> Callable[[np.ndarray, np.ndarray], float]:
    import mlx.core as mx

    from mlxgpt.model import ops
    from mlxgpt.model.config import GPTConfig
    from mlxgpt.model.gpt import GPT
    from mlxgpt.training import trainer as training
    from mlxgpt.training.recipe import TrainConfig

    ops.use_device("cpu")
    config = TrainConfig(**ADAMW, warmup_iters=0, decay_lr=False, model=GPTConfig(**shape))
    trainer = training.Trainer(GPT(config.model), config)

    def step(x: np.ndarray, y: np.ndarray) -> float:
        loss = trainer.step([(x, y)])
        mx.eval(loss, trainer.model.state, trainer.optimizer.state)
        return float(loss)

    return step


def pytorch(shape: dict[str, int], compiled: bool, threads: int) -> Callable[[np.ndarray, np.ndarray], float]:
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch_gpt

    torch.set_num_threads(threads)
    model = torch_gpt.GPT(**shape)
    optimizer = model.adamw(**ADAMW)
    loss_of = torch.compile(model.loss) if compiled else model.loss

    def step(x: np.ndarray, y: np.ndarray) -> float:
        loss = loss_of(torch.from_numpy(x).long(), torch.from_numpy(y).long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def work(contender: str, name: str, threads: int) -> None:
    """A contender's process: for each line on standard input a step and its seconds; at the end, its peak memory."""
    shape, batch = SHAPES[name]
    step = ours(shape) if contender == "mlxgpt" else pytorch(shape, contender == "PyTorch compiled", threads)
    rng = np.random.default_rng(0)
    print("ready", flush=True)
    for _ in sys.stdin:
        ids = rng.integers(0, shape["vocab_size"], (batch, shape["block_size"] + 1)).astype(np.int32)
        x, y = np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])
        start = time.perf_counter()
        step(x, y)
        print(time.perf_counter() - start, flush=True)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, flush=True)


def flops_per_step(name: str) -> int:
    """Of the matrix products of a forward and a backward pass, the causal half of attention only."""
    import mlx.core as mx

    from mlxgpt.inspect import trace
    from mlxgpt.model.config import GPTConfig
    from mlxgpt.model.gpt import GPT

    shape, batch = SHAPES[name]
    calls = trace(GPT(GPTConfig(**shape)), mx.zeros((batch, shape["block_size"]), mx.int32))
    return 3 * sum(call.matmul_flops() for call in calls)


def compare(name: str, contenders: list[str], steps: int, in_turn: int, threads: int) -> None:
    from mlxgpt import _core

    command = [sys.executable, __file__, "--shape", name, "--threads", str(threads), "--work"]
    environment = {**os.environ, "MLXGPT_NUM_THREADS": str(threads)}
    processes = {
        c: subprocess.Popen(
            [*command, c], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        for c in contenders
    }

    def answer(process: subprocess.Popen, question: bool = True) -> str:
        if question:
            process.stdin.write("step\n")
        line = process.stdout.readline()
        if not line:
            sys.exit(f"{name}: a contender stopped with status {process.wait()}")
        return line

    for process in processes.values():
        answer(process, question=False)
    seconds: dict[str, list[float]] = {c: [] for c in contenders}
    peak = 0.0  # taken among the steps, since a shared machine's changes
    for turn in range(2 + steps // in_turn):
        peak = max(peak, *(_core.fma_peak() for _ in range(10)))
        for contender, process in processes.items():
            time.sleep(0.05)  # PyTorch's threads spin for a while after their work, and would slow the other down
            woken = in_turn > 1  # by a step that isn't counted: it wakes threads, and is short
            taken = [float(answer(process)) for _ in range(woken + in_turn)]
            if turn >= 2:  # the first ones compile, allocate and start threads
                seconds[contender] += taken[woken:]
    shape, batch = SHAPES[name]
    base = statistics.median(seconds[contenders[0]])
    for contender, process in processes.items():
        process.stdin.close()
        memory = int(process.stdout.readline()) / 1e6
        median = statistics.median(seconds[contender])
        rate = batch * shape["block_size"] / median
        share = flops_per_step(name) / median / 1e9 / peak
        print(
            f"{name:>8} {contender:>17} | {median * 1e3:10.1f} ms {rate:9,.0f} tokens/s | "
            f"{share:6.1%} of peak | {median / base:5.2f} x our time | {memory:7,.0f} MB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="only this one (default: all)")
    parser.add_argument("--steps", type=int, help="counted steps (default: 200, 10 and 4)")
    parser.add_argument("--threads", type=int, help="threads of each (default: physical cores)")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well (its start takes minutes)")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options.shape, options.threads)

    from mlxgpt import _core

    contenders = ["mlxgpt"]
    if find_spec("torch"):
        contenders += ["PyTorch", "PyTorch compiled"] if options.compile else ["PyTorch"]
    # In a process of its own: its arrays would count in the peak memory of the processes started from here.
    subprocess.run([sys.executable, Path(__file__).with_name("limits.py")], check=True)
    for name, steps, in_turn in zip(SHAPES, (200, 10, 4), (20, 2, 1), strict=True):
        if options.shape in (None, name):
            compare(name, contenders, options.steps or steps, in_turn, options.threads or _core.num_threads())


if __name__ == "__main__":
    main()
