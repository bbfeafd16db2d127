"""Times causal attention beside PyTorch's, and on a CPU beside what the processor's multiply-add units reach.

    python scripts/bench_attention.py [--device auto|cpu|gpu] [--dtype T] [--threads N] [--seconds S] [--memory]

Each line is one shape (B, n_head, T, head_dim), forward or forward and backward: on a CPU the extension's kernels in
float32, else MLX. The two take turns, so that both see the same state of the machine; times are medians, the ratio is
PyTorch's time over ours. GFLOP/s count the causal half only: 4 * head_dim for each pair of a query and a key it sees,
and 2.5 times that for the backward pass. --memory measures what T = 32768 needs beyond inputs and outputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import limits
import numpy as np
import report
import turns
from report import Row, Settings
from turns import Contender

SHAPES = [(8, 12, 512, 64), (1, 12, 4096, 64), (12, 4, 64, 32), (16, 6, 256, 64), (2, 16, 1024, 128)]
TOY = [(1, 2, 16, 8)]
PASSES = {"forward": 1.0, "forward + backward": 3.5}  # and its operations over the forward pass's
LONG = (1, 12, 32768, 64)
TURN = 0.02  # seconds of calls in a turn, or one call

TITLE = "Attention"
NOTE = "Causal, (B, n_head, T, head_dim). Medians; operations of the causal half only."
COLUMNS = [
    ("shape", "shape", "{}"),
    ("pass", "pass", "{}"),
    ("", "contender", "{}"),
    ("time", "ms", "{:,.2f} ms"),
    ("GFLOP/s", "gflop_per_s", "{:,.0f}"),
    ("of the multiply-add peak", "share_of_multiply_adds", "{:.0%}"),
    ("time over ours", "time_over_ours", "{:.2f}"),
]

Passes = dict[str, Callable[[], object]]  # of PASSES


# ---- the contenders' processes ----


def draw(shape: tuple[int, ...]) -> list[np.ndarray]:
    """q, k, v and the output's gradient."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for _ in range(4)]


def kernels(shape: tuple[int, ...]) -> Passes:
    """The extension's."""
    from mlxgpt.cpu.extension import core

    q, k, v, dout = draw(shape)
    out, lse, *gradients = (np.ones(s, np.float32) for s in (shape, shape[:3], shape, shape, shape))  # in memory now
    scale = shape[3] ** -0.5

    def forward() -> None:
        core.attention_forward(q, k, v, out, lse, scale=scale)

    def both() -> None:
        forward()
        core.attention_backward(q, k, v, out, lse, dout, *gradients, scale=scale)

    return dict(zip(PASSES, (forward, both), strict=True))


def by_mlx(shape: tuple[int, ...], dtype: str) -> Passes:
    """The model's own operation, as it is trained by MLX."""
    import mlx.core as mx

    from mlxgpt.model import ops

    *qkv, dout = (mx.array(x).astype(getattr(mx, dtype)) for x in draw(shape))
    mx.eval(qkv, dout)
    mx.reset_peak_memory()
    return dict(
        zip(
            PASSES,
            (lambda: mx.eval(ops.attention(*qkv)), lambda: mx.eval(mx.vjp(ops.attention, qkv, [dout]))),
            strict=True,
        )
    )


def by_pytorch(shape: tuple[int, ...], dtype: str, device: str) -> Passes:
    """torch.nn.functional.scaled_dot_product_attention."""
    import torch

    name = turns.pytorch_device(device)
    *qkv, dout = (torch.from_numpy(x).to(name, getattr(torch, dtype)) for x in draw(shape))
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward() -> None:
        with torch.no_grad():
            attend(*qkv, is_causal=True)
        turns.wait_for_pytorch(name)

    def both() -> None:
        leaves = [x.detach().requires_grad_() for x in qkv]
        torch.autograd.grad(attend(*leaves, is_causal=True), leaves, dout)
        turns.wait_for_pytorch(name)

    return dict(zip(PASSES, (forward, both), strict=True))


def make(maker: str, device: str, dtype: str, threads: int) -> tuple[Any, Callable[[Any], Any]]:
    """A contender: it answers [shape, pass] with the seconds of each of some calls, and ["memory", pass] with bytes."""
    if maker == "by_pytorch":
        import torch

        torch.set_num_threads(threads)
    else:
        from mlxgpt.model import ops

        ops.use_device(device)
    current: list[Any] = [None, {}]

    def passes(shape: list[int]) -> Passes:
        if current[0] != shape:
            made = {
                "kernels": lambda: kernels(tuple(shape)),
                "by_mlx": lambda: by_mlx(tuple(shape), dtype),
                "by_pytorch": lambda: by_pytorch(tuple(shape), dtype, device),
            }[maker]()
            current[:] = shape, made
            for function in made.values():
                function()  # first calls allocate, compile and start threads
        return current[1]

    def times(shape: list[int], name: str) -> list[float]:
        function, taken = passes(shape)[name], []
        end = time.perf_counter() + TURN
        function()  # wakes threads
        while not taken or time.perf_counter() < end:
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
        return taken

    return "ready", lambda question: memory(maker, dtype) if question == "memory" else times(*question)


def memory(maker: str, dtype: str) -> dict[str, int]:
    """Bytes beyond inputs and outputs that each pass over LONG takes."""
    import mlx.core as mx

    passes = kernels(LONG) if maker == "kernels" else by_mlx(LONG, dtype)
    peak = turns.process_peak_bytes if maker == "kernels" else mx.get_peak_memory
    before, found = peak(), {}
    for name, function in passes.items():
        function()
        found[name] = peak() - before
    return found


# ---- the comparison ----


def contenders(settings: Settings) -> list[Contender]:
    dtype = next(iter(settings.dtypes), "float32" if settings.device == "cpu" else "bfloat16")
    on_kernels = settings.machine["kernels"] and dtype == "float32"
    work = dict(device=settings.device, dtype=dtype, threads=settings.machine["threads"])
    makers = {f"mlxgpt, {dtype}": "kernels" if on_kernels else "by_mlx"}
    if settings.machine["torch"]:
        makers[f"PyTorch, {dtype}"] = "by_pytorch"
    return [
        Contender(name, turns.command(__file__, maker=maker, **work), dtype, is_ours=maker != "by_pytorch")
        for name, maker in makers.items()
    ]


def of_pass(
    settings: Settings, group: list[Contender], shape: tuple[int, ...], name: str, seconds: float, peak: float
) -> Iterator[Row]:
    """The rows of one shape and pass. peak: of multiply-adds, in FLOP/s; 0 where there is none to compare with."""
    for contender in group:
        contender.answers.clear()
    most = 1 if settings.quick else 10**6
    turns.take_turns(group, lambda contender: [shape, name], seconds=seconds, most=most)
    B, n_head, T, head_dim = shape
    operations = PASSES[name] * B * n_head * T * (T + 1) / 2 * 4 * head_dim
    medians = [statistics.median([s for answer in c.answers for s in answer] or [0.0]) for c in group]
    for contender, median in zip(group, medians, strict=True):
        row: Row = {"shape": str(shape), "pass": name, "contender": contender.name, **contender.why()}
        if median:
            row |= {"ms": 1e3 * median, "gflop_per_s": operations / median / 1e9}
            row |= {"time_over_ours": median / medians[0]} if medians[0] else {}
            row |= {"share_of_multiply_adds": operations / median / peak} if peak else {}
        yield row


def rows(settings: Settings, seconds: float = 0) -> Iterator[Row]:
    """seconds: of each line; 0 for its share of the settings'."""
    shapes, group, asked = TOY if settings.toy else SHAPES, contenders(settings), limits.measuring(settings)
    lines = [(shape, name) for shape in shapes for name in PASSES]
    end, peak = time.perf_counter() + settings.seconds, 0.0  # a shared machine's peak changes: the highest is the limit
    with turns.started([asked, *group], settings.environment, tell=settings.tell):
        for n, (shape, name) in enumerate(lines):
            settings.tell(f"attention {shape} {name}")
            if settings.machine["kernels"]:
                peak = max(peak, 1e9 * (asked.ask(["multiply-adds", 20], 60) or 0))
            share = seconds or (end - time.perf_counter()) / (len(lines) - n)
            yield from of_pass(settings, group, shape, name, share, peak)


def memory_rows(settings: Settings) -> Iterator[Row]:
    (own, *_) = contenders(settings)
    with turns.started([own], settings.environment):
        found = own.ask("memory", 3600) or {}
    for name in PASSES:
        row = {"shape": str(LONG), "pass": name, "contender": own.name}
        yield row | ({"beyond_inputs_and_outputs_mb": found[name] / 1e6} if found else own.why())


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument(
        "--dtype", nargs=1, choices=report.DTYPES, default=(), help="default: float32, on a GPU bfloat16"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each line (default: 4)")
    parser.add_argument("--memory", action="store_true", help="measure memory at T = 32768 instead")
    options = parser.parse_args()
    if options.work:
        return turns.serve(lambda: make(**options.work))
    settings = report.settings(parser, options, dtypes=options.dtype)
    if options.memory:
        columns = [*COLUMNS[:3], ("beyond inputs and outputs", "beyond_inputs_and_outputs_mb", "{:,.1f} MB")]
        report.run_alone(settings, memory_rows(settings), columns)
    report.run_alone(settings, rows(settings, options.seconds), COLUMNS)


if __name__ == "__main__":
    main()
