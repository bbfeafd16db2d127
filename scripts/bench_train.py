"""Times whole training steps (forward, backward, clipping, AdamW) beside PyTorch, eager and compiled.

    python scripts/bench_train.py [--device auto|cpu|gpu] [--dtype float32 bfloat16] [--shape small|medium|gpt2]
                                  [--steps N] [--compile]

Each contender is a process of its own, on the same threads. They take turns of some steps, so that all see the same
state of the machine; figures are medians. MFU is the share of the rate of large matrix products in the same type,
measured among the turns. Memory held is what MLX or PyTorch says that it held at most; on the CPU's kernels, and for
PyTorch on a CPU, it is what the process took for the model and its training. PyTorch's half precision is its autocast.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import limits
import numpy as np
import report
import turns
from report import Row, Settings
from turns import Contender

SHAPES: dict[str, tuple[dict[str, int], int]] = {  # and the number of sequences
    "small": (dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 12),
    "medium": (dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65), 16),
    "gpt2": (dict(n_layer=12, n_head=12, n_embd=768, block_size=512, vocab_size=50304), 4),
}
TOY: dict[str, tuple[dict[str, int], int]] = {
    "toy": (dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=32), 2),
}
STEPS = {"small": 200, "medium": 10, "gpt2": 4, "toy": 2}  # counted, if the time allows
SHARES = {"small": 2, "medium": 3, "gpt2": 6, "toy": 1}  # of the time
ADAMW = dict(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95)
DTYPES = report.DTYPES[:2]
TURN = 0.5  # seconds of steps in a turn, or one step

TITLE = "Training"
NOTE = (
    "Whole steps with clipping and AdamW; medians. MFU is the share of the rate of matrix products in the same type. "
    "PyTorch's half precision is its autocast."
)
COLUMNS = [
    ("model", "model", "{}"),
    ("", "contender", "{}"),
    ("step", "step_ms", "{:,.1f} ms"),
    ("tokens/s", "tokens_per_s", "{:,.0f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("of the multiply-add peak", "share_of_multiply_adds", "{:.1%}"),
    ("memory held", "memory_held_mb", "{:,.0f} MB"),
    ("predicted", "memory_predicted_mb", "{:,.0f} MB"),
    ("process", "process_peak_mb", "{:,.0f} MB"),
    ("time over ours", "time_over_ours", "{:.2f}"),
    ("steps", "steps", "{}"),
]

# A step of any batch, waiting for the device, and the most bytes held on it (0 where it is the process that counts).
Training = tuple[Callable[[np.ndarray, np.ndarray], object], Callable[[], object], Callable[[], int]]


# ---- the contenders' processes ----


def ours(shape: dict[str, int], device: str, dtype: str) -> Training:
    import mlx.core as mx

    from mlxgpt.cpu import extension
    from mlxgpt.model import ops
    from mlxgpt.model.config import GPTConfig
    from mlxgpt.model.gpt import GPT
    from mlxgpt.training.recipe import TrainConfig
    from mlxgpt.training.trainer import Trainer

    ops.use_device(device)
    config = TrainConfig(**ADAMW, dtype=dtype, warmup_iters=0, decay_lr=False, model=GPTConfig(**shape))
    trainer = Trainer(GPT(config.model), config)
    on_kernels = extension.available(getattr(mx, dtype))
    losses: list[mx.array] = []

    def step(x: np.ndarray, y: np.ndarray) -> None:
        losses.append(trainer.step([(x, y)]))
        if len(losses) > 1:  # as a run does, which reads each loss while the next step is computed
            mx.eval(losses.pop(0))

    return (
        step,
        lambda: mx.eval(trainer.model.state, trainer.optimizer.state),
        lambda: 0 if on_kernels else mx.get_peak_memory(),
    )


def pytorch(shape: dict[str, int], device: str, dtype: str, compiled: bool, threads: int) -> Training:
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch_gpt

    torch.set_num_threads(threads)
    name = turns.pytorch_device(device)
    model = torch_gpt.GPT(**shape).to(name)
    optimizer = model.adamw(**ADAMW)
    loss_of = torch.compile(model.loss) if compiled else model.loss

    def step(x: np.ndarray, y: np.ndarray) -> None:
        with torch.autocast(name, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = loss_of(*(torch.from_numpy(a).long().to(name) for a in (x, y)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    held: dict[str, Callable[[], int]] = {
        "cpu": lambda: 0,
        "cuda": lambda: torch.cuda.max_memory_allocated(),
        "mps": lambda: torch.mps.driver_allocated_memory(),  # its pool, which only grows
    }
    return step, lambda: turns.wait_for_pytorch(name), held[name]


def make(maker: str, **work: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A process: the plan, or a contender. A contender answers a number of steps with the seconds of one and this
    number, and 0 with the bytes that it held at most."""
    if maker == "plan":
        return plan(**work), lambda question: None
    importlib.import_module("torch" if maker == "pytorch" else "mlxgpt.training.trainer")  # no model's memory
    before = turns.process_peak_bytes()
    shape, batch = work["shape"], work.pop("batch")
    step, wait, held = (pytorch if maker == "pytorch" else ours)(**work)
    rng = np.random.default_rng(0)

    def seconds(steps: int) -> float:
        """The mean time of a step, over so many steps."""
        ids = rng.integers(0, shape["vocab_size"], (steps, batch, shape["block_size"] + 1)).astype(np.int32)
        batches = [(np.ascontiguousarray(window[:, :-1]), np.ascontiguousarray(window[:, 1:])) for window in ids]
        start = time.perf_counter()
        for x, y in batches:
            step(x, y)
        wait()
        return (time.perf_counter() - start) / steps

    def answer(steps: int) -> Any:
        if steps > 1:
            seconds(1)  # wakes threads, and is short
        peak = turns.process_peak_bytes()
        return (seconds(steps), steps) if steps else {"held": held() or peak - before, "process": peak}

    first = seconds(1)  # compiles, allocates, starts threads
    return first if first > 5 else seconds(1), answer


def plan(device: str, dtypes: Sequence[str], shapes: Sequence[str]) -> dict[str, Any]:
    """For each shape the FLOPs of a step, and for each type the bytes that a step is predicted to hold at most."""
    import mlx.core as mx

    from mlxgpt.model import ops
    from mlxgpt.model.config import GPTConfig
    from mlxgpt.model.gpt import GPT
    from mlxgpt.training.device import training_flops
    from mlxgpt.training.footprint import step_memory

    ops.use_device(device)
    plans = {}
    for name in shapes:
        shape, batch = (SHAPES | TOY)[name]
        model = GPT(GPTConfig(**shape))  # MLX is lazy: it takes no memory
        plans[name] = {
            "flops": training_flops(model.config) * batch * shape["block_size"],
            "bytes": {dtype: step_memory(model, batch, False, getattr(mx, dtype)).total for dtype in dtypes},
        }
    return plans


# ---- the comparison ----


class Peaks:
    """The best rates of matrix products, and of multiply-adds on the kernels, in FLOP/s: measured again and again,
    since a shared machine's change."""

    def __init__(self, settings: Settings, asked: Contender) -> None:
        self._asked, self._on_kernels = asked, settings.machine["kernels"]
        self.products: dict[str, float] = {}
        self.multiply_adds = 0.0

    def measure(self, dtypes: Sequence[str]) -> None:
        for dtype in dtypes:
            self.products[dtype] = max(self.products.get(dtype, 0), self._rate("matrix product", dtype))
        if self._on_kernels:
            self.multiply_adds = max(self.multiply_adds, self._rate("multiply-adds", 10))

    def _rate(self, *question: Any) -> float:
        return 1e9 * (self._asked.ask(question, 120) or 0)


def memory_there(settings: Settings) -> float:
    """Bytes that the device can give."""
    return 1e9 * float(settings.machine["free_memory_gb"] or settings.machine["memory_gb"])


def reason_to_leave_out(
    settings: Settings, plan: dict[str, Any], contender: Contender, peaks: Peaks, seconds: float
) -> str:
    """Why a contender does not train a shape here; empty if it does."""
    there, needed = memory_there(settings), plan["bytes"].get(contender.dtype, 0)
    if needed > 0.9 * there:
        return f"it needs {needed / 1e9:.1f} GB, and {there / 1e9:.1f} are free"
    if not contender.is_ours or not (rate := peaks.products[contender.dtype]):
        return ""
    if settings.device == "cpu" and contender.dtype != "float32" and not settings.dtypes:
        return f"on a CPU MLX's own operations train in it, at {rate / 1e9:.1f} GFLOP/s; --dtype asks for it"
    if (least := plan["flops"] / rate) * 3 > seconds:  # two steps that are not counted, and one that is
        return f"a step takes at least {least:.0f} s at {rate / 1e9:.1f} GFLOP/s"
    return ""


def contenders(settings: Settings, name: str, dtypes: Sequence[str], compiled: bool) -> list[Contender]:
    shape, batch = (SHAPES | TOY)[name]
    common = dict(shape=shape, batch=batch, device=settings.device)

    def contender(title: str, dtype: str, **work: Any) -> Contender:
        command = turns.command(__file__, **common, dtype=dtype, **work)
        return Contender(f"{title}, {dtype}", command, dtype, is_ours=work["maker"] == "ours")

    result = [contender("mlxgpt", dtype, maker="ours") for dtype in dtypes]
    if settings.machine["torch"]:
        flags = settings.machine["cpu_flags"]
        multiplies = (
            settings.device == "gpu" or settings.dtypes or {"avx512_bf16", "amx_bf16", "bf16"}.intersection(flags)
        )
        work = dict(maker="pytorch", threads=settings.machine["threads"])
        for is_compiled in (False, True)[: 1 + compiled]:  # compiled ones last: they may take all of the time
            for dtype in dtypes if multiplies else ["float32"]:
                title = "PyTorch compiled" if is_compiled else "PyTorch"
                result.append(contender(title, dtype, **work, compiled=is_compiled))
    return result


def compare(
    settings: Settings, group: list[Contender], memory: dict[str, Any], peaks: Peaks, seconds: float, steps: int
) -> None:
    """Contenders train a shape by turns, and keep their answers; what each held goes into `memory`, by its name."""
    own_types = {contender.dtype for contender in group} & set(peaks.products)
    end = time.perf_counter() + seconds
    with turns.started(group, settings.environment, 0.7 * seconds, settings.tell):  # the rest is for turns
        ready = [contender for contender in group if not contender.stopped]
        in_turn = {c.name: 1 if settings.quick else max(1, min(20, steps, int(TURN / c.ready))) for c in ready}
        turns.take_turns(
            ready,
            lambda contender: in_turn[contender.name],
            seconds=end - time.perf_counter(),
            most=1 if settings.quick else -(-steps // min(in_turn.values(), default=1)),
            between=lambda: peaks.measure(sorted(own_types)),
        )
        for contender in ready:
            memory[contender.name] = contender.ask(0, 60)


def sharing_memory(settings: Settings, plan: dict[str, Any], all_of_them: list[Contender]) -> list[list[Contender]]:
    """The contenders in groups that memory holds at once: all, or those of each type, or each alone."""
    by_type = [[c for c in all_of_them if c.dtype == dtype] for dtype in plan["bytes"]]
    for groups in ([all_of_them], by_type):
        needed = [sum(1.5 * plan["bytes"][c.dtype] for c in group) for group in groups]  # PyTorch takes more than ours
        if max(needed) < 0.8 * memory_there(settings):
            return [group for group in groups if group]
    return [[contender] for contender in all_of_them]


def of_shape(
    settings: Settings, name: str, plan: dict[str, Any], peaks: Peaks, seconds: float, steps: int, compiled: bool
) -> Iterator[Row]:
    """The rows of a shape."""
    end = time.perf_counter() + seconds
    everyone = contenders(settings, name, list(plan["bytes"]), compiled and not settings.quick)
    for contender in everyone:
        contender.stopped = reason_to_leave_out(settings, plan, contender, peaks, seconds)
    groups = sharing_memory(settings, plan, [contender for contender in everyone if not contender.stopped])
    memory: dict[str, dict[str, int]] = {}
    interrupt: list[KeyboardInterrupt] = []
    try:
        for n, group in enumerate(groups):  # what one does not use of its time goes to those behind it
            left, waiting = end - time.perf_counter(), sum(map(len, groups[n:]))
            compare(settings, group, memory, peaks, left * len(group) / waiting, steps)
    except KeyboardInterrupt as stop:  # the rows tell what was measured until then
        interrupt.append(stop)
    shape, batch = (SHAPES | TOY)[name]
    medians = {c.name: statistics.median(taken for taken, _ in c.answers) for c in everyone if c.answers}
    ours = [contender for contender in everyone if contender.is_ours]
    base = next((medians[contender.name] for contender in ours if contender.name in medians), None)
    in_turns = {contender.name for group in groups if len(group) > 1 for contender in group}
    for contender in everyone:
        row: Row = {"model": shown(shape, batch), "contender": contender.name, **contender.why()}
        if median := medians.get(contender.name):
            row |= {"step_ms": 1e3 * median, "tokens_per_s": batch * shape["block_size"] / median}
            row |= {"steps": sum(n for _, n in contender.answers), "in_turns": contender.name in in_turns}
            row |= {"time_over_ours": median / medians.get(f"mlxgpt, {contender.dtype}", base)} if base else {}
            if any(own.dtype == contender.dtype and own.answers for own in ours):  # else MLX's rate is not the device's
                row["mfu"] = plan["flops"] / median / peaks.products[contender.dtype]
            if peaks.multiply_adds and contender.dtype == "float32":
                row["share_of_multiply_adds"] = plan["flops"] / median / peaks.multiply_adds
        if found := memory.get(contender.name):
            row |= {"memory_held_mb": found["held"] / 1e6, "process_peak_mb": found["process"] / 1e6}
        yield row | ({"memory_predicted_mb": plan["bytes"][contender.dtype] / 1e6} if contender.is_ours else {})
    if interrupt:
        raise interrupt[0]


def shown(shape: dict[str, int], batch: int) -> str:
    ids = "ids" if shape["vocab_size"] > 1000 else "characters"
    tokens = f"{batch} x {shape['block_size']} tokens, {shape['vocab_size']} {ids}"
    return f"{shape['n_layer']} layers, {shape['n_embd']} wide, {tokens}"


def rows(settings: Settings, shape: str = "", steps: int = 0, compiled: bool = True) -> Iterator[Row]:
    """Trains all shapes, or one. steps: counted ones of each contender, at most; 0 for STEPS."""
    names = [shape] if shape else list(TOY if settings.toy else SHAPES)
    dtypes = settings.dtypes or DTYPES
    planning = Contender(
        "plan", turns.command(__file__, maker="plan", device=settings.device, dtypes=dtypes, shapes=names)
    )
    with turns.started([planning], settings.environment):
        plans = planning.ready
    if planning.stopped:
        raise SystemExit(f"training can't be planned: {planning.stopped}")
    end, asked = time.perf_counter() + settings.seconds, limits.measuring(settings)
    with turns.started([asked], settings.environment):
        peaks = Peaks(settings, asked)
        peaks.measure(dtypes)
        for n, name in enumerate(names):
            settings.tell(f"training {name}")
            seconds = (end - time.perf_counter()) * SHARES[name] / sum(SHARES[later] for later in names[n:])
            yield from of_shape(settings, name, plans[name], peaks, seconds, steps or STEPS[name], compiled)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument(
        "--dtype", nargs="+", choices=report.DTYPES, default=(), help="default: the first two, on a CPU float32"
    )
    parser.add_argument("--shape", choices=SHAPES, default="", help="only this one (default: all)")
    parser.add_argument("--steps", type=int, default=0, help="counted steps (default: 200, 10 and 4)")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well (its start takes minutes)")
    options = parser.parse_args()
    if options.work:
        return turns.serve(lambda: make(**options.work))
    if options.steps < 0:
        parser.error(f"--steps is {options.steps}, expected at least 1")
    settings = report.settings(parser, options, dtypes=options.dtype)
    report.run_alone(settings, rows(settings, options.shape, options.steps, options.compile), COLUMNS)


if __name__ == "__main__":
    main()
