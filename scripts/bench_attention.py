"""Times the attention kernels next to PyTorch's, and next to what the processor's multiply-add units reach.

    python scripts/bench_attention.py [--threads N] [--seconds S] [--memory]

Each line is one shape (B, n_head, T, head_dim), forward or forward and backward, causal, float32. The two
take turns, so that both see the same state of the machine; times are medians, the ratio is PyTorch's time
over ours. GFLOP/s count the causal half only: 4 * head_dim for each pair of a query and a key it sees, and
2.5 times that for the backward pass. --memory measures what T = 32768 needs beyond inputs and outputs.
"""

import argparse
import os
import platform
import resource
import statistics
import sys
import time

SHAPES = [(8, 12, 512, 64), (1, 12, 4096, 64), (12, 4, 64, 32), (16, 6, 256, 64), (2, 16, 1024, 128)]
PASSES = ("forward", "both")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="threads of both (default: physical cores)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each line (default: 4)")
    parser.add_argument("--memory", action="store_true", help="measure memory at T = 32768 instead")
    return parser.parse_args()


def arrays(B, n_head, T, head_dim, seed=0):
    """q, k, v, dout and the kernels' outputs: out, lse, dq, dk, dv."""
    rng = np.random.default_rng(seed)
    shape = (B, n_head, T, head_dim)
    inputs = [rng.standard_normal(shape, dtype=np.float32) for _ in range(4)]
    outputs = [np.zeros(shape, np.float32), np.zeros(shape[:3], np.float32)]
    return inputs, outputs + [np.zeros(shape, np.float32) for _ in range(3)]


def kernels(shape):
    """Functions for one forward, and one forward and backward, pass of the extension."""
    (q, k, v, dout), (out, lse, dq, dk, dv) = arrays(*shape)
    scale = shape[3] ** -0.5

    def forward():
        _core.attention_forward(q, k, v, out, lse, scale=scale)

    def both():
        forward()
        _core.attention_backward(q, k, v, out, lse, dout, dq, dk, dv, scale=scale)

    return forward, both


def pytorch(shape):
    """The same with torch.nn.functional.scaled_dot_product_attention."""
    inputs, _ = arrays(*shape)
    q, k, v, dout = (torch.from_numpy(x) for x in inputs)
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward():
        with torch.no_grad():
            attend(q, k, v, is_causal=True)

    def both():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(attend(*leaves, is_causal=True), leaves, dout)

    return forward, both


def take_turns(functions, seconds):
    """Median time of each function; they run by turns for about so many seconds, 3 times at least."""
    times = [[] for _ in functions]
    for function in functions:
        function()  # first calls allocate and start threads
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for function, own in zip(functions, times, strict=True):
            time.sleep(0.03)  # PyTorch's threads spin for 10 ms after their work, and would slow the other down
            turn = time.perf_counter() + 0.02
            function()  # wakes this one's threads
            while True:
                start = time.perf_counter()
                function()
                now = time.perf_counter()
                own.append(now - start)
                if now > turn:
                    break
    return [statistics.median(own) for own in times]


def speed(seconds):
    peaks = []
    print("             shape     pass |       ms  GFLOP/s  of peak |  PyTorch  GFLOP/s | ratio")
    for shape in SHAPES:
        B, n_head, T, head_dim = shape
        theirs = pytorch(shape) if torch else (None, None)
        for name, own, other, factor in zip(PASSES, kernels(shape), theirs, (1, 3.5), strict=True):
            operations = factor * B * n_head * T * (T + 1) / 2 * 4 * head_dim
            peaks.append(_core.fma_peak())
            ours, *rest = take_turns([own, other] if other else [own], seconds)
            line = f"{shape!s:>18} {name:>8} | {ours * 1e3:8.2f} {operations / ours / 1e9:8.0f}"
            line += f" {operations / ours / 1e9 / max(peaks):8.0%} |"
            for their in rest:
                line += f" {their * 1e3:8.2f} {operations / their / 1e9:8.0f} | {their / ours:.2f}"
            print(line, flush=True)
    print(f"peak, multiply-adds alone: {max(peaks):.0f} GFLOP/s, in the median {statistics.median(peaks):.0f}")


def memory():
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

    (q, k, v, dout), (out, lse, dq, dk, dv) = arrays(1, 12, 32768, 64)
    for array in (out, lse, dq, dk, dv):
        array[:] = 1  # so that its pages are there before
    before = peak()
    _core.attention_forward(q, k, v, out, lse, scale=0.125)
    print(f"(1, 12, 32768, 64) forward:  {peak() - before:6.1f} MB beyond inputs and outputs")
    _core.attention_backward(q, k, v, out, lse, dout, dq, dk, dv, scale=0.125)
    print(f"(1, 12, 32768, 64) backward: {peak() - before:6.1f} MB beyond inputs and outputs")


if __name__ == "__main__":
    options = parse()
    if options.threads:
        os.environ["MLXGPT_NUM_THREADS"] = str(options.threads)

    import numpy as np

    from mlxgpt import _core

    try:
        import torch  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        torch = None
    threads = _core.num_threads()
    version = "not installed"
    if torch:
        torch.set_num_threads(threads)
        version = torch.__version__
    print(f"{platform.machine()}, {_core.isa()}, {threads} threads, PyTorch {version}")
    if options.memory:
        memory()
    else:
        speed(options.seconds)
