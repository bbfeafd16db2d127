"""Times generation with GPT-2's shape next to transformers, llama.cpp, nanoGPT's sampler and the memory's bandwidth.

    python scripts/bench_generate.py [--context N] [--transformers-python PATH] [--llama-python PATH] [--quick]

Each contender is a process of its own, on the same threads, with the same random weights; transformers and
llama-cpp-python take part where they are installed, in this Python or in the one that is named. They take turns, so
that all see the same state of the machine: a turn is a prompt of N tokens and 64 greedy ones behind it, and a prompt
of 256 (whoever needs half a minute for that is asked once). Printed are medians of the turns; the share of what
reading the weights once per token allows (the best bandwidth measured among the turns, over the bytes of all weights
but the positions', a tied head counted once); the time over that of our model in the same or the nearest storage; the
time of a whole process that prints one token; and the peak memory of a process. The last line is a model so small that
Python's own time is left.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VOCAB_SIZE, BLOCK_SIZE = 50257, 1024  # GPT-2's
NEW_TOKENS, PREFILL, RECOMPUTED = 64, 256, 256  # tokens of a turn, and the context of nanoGPT's row
SLOW = 30  # seconds of a turn: who takes more is asked once
PROMPT = "The meeting began at nine, and by noon they had not agreed on"
OURS = {  # directories, by what they hold, and the options that convert float32 to them
    "float32": None,
    "float16": ["--dtype", "float16"],
    "bfloat16": ["--dtype", "bfloat16"],
    "8-bit": ["--dtype", "float16", "--quantize", "8"],
    "4-bit": ["--dtype", "float16", "--quantize", "4"],
}
GGUF = {"f32": "float32", "f16": "float16", "q8_0": "8-bit", "q4_0": "4-bit"}  # and our nearest storage
LLAMA_QUANTIZE = """
import sys, llama_cpp
types = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = types[sys.argv[3]]
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""
TRANSFORMERS_FIRST_TOKEN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
ids = tokenizer(sys.argv[3], return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0]))
"""
LLAMA_FIRST_TOKEN = """
import sys, llama_cpp
n = int(sys.argv[2])
model = llama_cpp.Llama(sys.argv[1], n_ctx=1024, n_batch=512, n_threads=n, n_threads_batch=n, verbose=False)
print(model.create_completion(sys.argv[3], max_tokens=1, temperature=0)["choices"][0]["text"])
"""

Times = Callable[[list[int], int], list[float]]  # a prompt and a number of tokens -> when each of them was there


@dataclass
class Contender:
    name: str
    kind: str  # of work()
    python: str
    path: str = ""  # of the weights
    like: str = ""  # the name of ours that it is compared with
    context: int = 0
    bytes_per_token: int = 0
    first_token: Sequence[str] = ()  # a command that prints one token


# ---- the contenders' processes ----


def ours(path: str) -> Times:
    import mlxgpt
    from mlxgpt.generation.decoding import Decoder
    from mlxgpt.generation.sampling import Sampler

    model, _ = mlxgpt.load(path, device="cpu")

    def times(ids: list[int], n: int) -> list[float]:
        steps = Decoder(model, [ids], Sampler(temperature=0))
        return [time.perf_counter() for _ in itertools.islice(steps, n)]

    return times


def transformers(path: str, dtype: str, threads: int) -> Times:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None  # the end of a text stops nothing
    model.generation_config.pad_token_id = 0

    def times(ids: list[int], n: int) -> list[float]:
        clock, prompt = Clock(), torch.tensor([ids])
        mask = torch.ones_like(prompt)
        model.generate(prompt, attention_mask=mask, max_new_tokens=n, do_sample=False, streamer=clock)
        return clock.times[1:]  # the first is the prompt's

    return times


def llama(path: str, threads: int) -> Times:
    """By llama_decode and NumPy's argmax: no slower than its own sampler, and faster than create_completion."""
    from llama_cpp import Llama

    model = Llama(
        path, n_ctx=BLOCK_SIZE, n_batch=512, n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False
    )

    def times(ids: list[int], n: int) -> list[float]:
        model.reset()
        taken: list[float] = []
        while len(taken) < n:
            model.eval(ids)
            ids = [int(np.ctypeslib.as_array(model._ctx.get_logits(), shape=(VOCAB_SIZE,)).argmax())]
            taken.append(time.perf_counter())
        return taken

    return times


def nanogpt(threads: int) -> Times:
    """Each token from all of the context anew, as nanoGPT's sample.py does."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch_gpt

    torch.set_num_threads(threads)
    model = torch_gpt.GPT(block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE, n_layer=12, n_head=12, n_embd=768).eval()

    @torch.no_grad()
    def times(ids: list[int], n: int) -> list[float]:
        text, taken = torch.tensor([ids]), []
        for _ in range(n):
            x = model.wte(text) + model.wpe.weight[: text.shape[1]]
            for block in model.h:
                x = block(x)
            logits = model.ln_f(x[:, -1]) @ model.wte.weight.T  # of the last position alone
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
            taken.append(time.perf_counter())
        return taken

    return times


def work(kind: str, path: str, threads: int) -> None:
    """A contender's process: for each line "N TOKENS" of standard input the seconds that a prompt of N tokens and
    each token behind it took; at the end, the process's peak memory."""
    if kind == "bandwidth":
        import limits

        print("ready", flush=True)
        for _ in sys.stdin:
            print(limits.read_bandwidth(), 0, flush=True)
    else:
        makers = {
            "mlxgpt": lambda: ours(path),
            "transformers": lambda: transformers(path, Path(path).name, threads),
            "llama": lambda: llama(path, threads),
            "nanoGPT": lambda: nanogpt(threads),
        }
        times = makers[kind]()
        rng = np.random.default_rng(0)
        print("ready", flush=True)
        for line in sys.stdin:
            length, n = map(int, line.split())
            ids = rng.integers(0, 96 if path.endswith("toy") else VOCAB_SIZE, length).tolist()
            start = time.perf_counter()
            taken = times(ids, n)
            print(taken[0] - start, (taken[-1] - taken[0]) / max(1, n - 1), flush=True)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, flush=True)


# ---- the weights ----


def build(directory: Path, llama_python: str) -> None:
    """Makes what a directory lacks, and prints how many bytes of each a token reads. In a process of its own: its
    arrays would count in the peak memory of the processes that are started from here."""
    import mlx.core as mx

    from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer
    from mlxgpt.formats import model_directory as checkpoint
    from mlxgpt.model.config import GPTConfig
    from mlxgpt.model.gpt import GPT

    mx.random.seed(0)
    if not (directory / "float32").exists():
        checkpoint.save_model(directory / "float32", GPT(GPTConfig(block_size=BLOCK_SIZE)), BPETokenizer.gpt2())
    if not (directory / "toy").exists():
        toy = GPTConfig(block_size=512, vocab_size=96, n_layer=1, n_head=1, n_embd=16)
        checkpoint.save_model(directory / "toy", GPT(toy), CharTokenizer([chr(n) for n in range(32, 128)]))
    convert = [sys.executable, "-m", "mlxgpt.convert"]
    for name, options in OURS.items():
        if options:
            _make(directory / name, [*convert, directory / "float32", directory / name, *options])
    if llama_python:
        for name in ("f32", "f16"):
            file = directory / f"{name}.gguf"
            _make(file, [*convert, directory / GGUF[name], file, "--to", "gguf"])
        for name in ("q8_0", "q4_0"):
            file = directory / f"{name}.gguf"
            _make(file, [llama_python, "-c", LLAMA_QUANTIZE, directory / "f32.gguf", file, name])
    names = [*OURS, *(f"{name}.gguf" for name in (GGUF if llama_python else ()))]
    print(json.dumps({name: _bytes_per_token(directory / name) for name in names}))


def _make(path: Path, command: list[str | Path]) -> None:
    if not path.exists():
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            sys.exit(f"{path.name} can't be made: {made.stderr or made.stdout}")


def _bytes_per_token(path: Path) -> int:
    """Of all tensors but the positions', of which a token reads one row; wte's is read whole, by the head."""
    if path.is_dir():
        with open(path / "model.safetensors", "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        ends = {name: tensor["data_offsets"] for name, tensor in header.items() if "wpe" not in name}
        return sum(end - begin for begin, end in ends.values())
    import gguf

    return int(sum(t.n_bytes for t in gguf.GGUFReader(path).tensors if t.name != "position_embd.weight"))


# ---- taking turns ----


def contenders(directory: Path, sizes: dict[str, int], options: argparse.Namespace) -> Iterator[Contender]:
    here, context = sys.executable, options.context
    generate = [here, "-m", "mlxgpt.generate", "--device", "cpu", "--temperature", "0"]
    one_token = [*generate, "--max_new_tokens", "1", "--prompt", PROMPT, "--model"]
    for name in OURS:
        path, row = str(directory / name), f"mlxgpt {name}"
        yield Contender(row, "mlxgpt", here, path, row, context, sizes[name], [*one_token, path])
    if python := options.transformers_python:
        for name in ("float32", "bfloat16"):
            path, like = str(directory / name), f"mlxgpt {name}"
            command = [python, "-c", TRANSFORMERS_FIRST_TOKEN, path, name, PROMPT]
            yield Contender(f"transformers {name}", "transformers", python, path, like, context, sizes[name], command)
    if python := options.llama_python:
        for name, like in GGUF.items():
            path = str(directory / f"{name}.gguf")
            command = [python, "-c", LLAMA_FIRST_TOKEN, path, str(options.threads), PROMPT]
            size = sizes[f"{name}.gguf"]
            yield Contender(f"llama.cpp {name}", "llama", python, path, f"mlxgpt {like}", context, size, command)
    if python := options.transformers_python:
        row = f"mlxgpt float32 after {RECOMPUTED}"
        yield Contender(row, "mlxgpt", here, str(directory / "float32"), row, RECOMPUTED, sizes["float32"])
        name = f"nanoGPT after {RECOMPUTED}"
        yield Contender(name, "nanoGPT", python, "", row, RECOMPUTED, sizes["float32"])


class Process:
    """A contender's process, and what it has answered."""

    def __init__(self, contender: Contender, environment: dict[str, str], threads: int) -> None:
        command = [contender.python, __file__, "--work", contender.kind, "--threads", str(threads)]
        self.contender = contender
        self.decode: list[float] = []  # seconds per token
        self.prefill: list[float] = []  # seconds
        self.is_slow = False
        self._process = subprocess.Popen(
            [*command, "--directory", contender.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment,
        )  # fmt: skip
        self._line()

    def ask(self, length: int, n: int) -> tuple[float, float]:
        """The seconds of a prompt, and of each token behind it."""
        self._process.stdin.write(f"{length} {n}\n")
        first, rest = map(float, self._line().split())
        return first, rest

    def peak_memory(self) -> int:
        """Ends the process."""
        self._process.stdin.close()
        return int(self._process.stdout.readline())

    def _line(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.contender.name}: stopped with status {self._process.wait()}")
        return line


def compare(directory: Path, sizes: dict[str, int], options: argparse.Namespace) -> None:
    here, threads = sys.executable, options.threads
    environment = {**os.environ, "MLXGPT_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # of transformers, as it loads weights
    bandwidth = Process(Contender("bandwidth", "bandwidth", here), environment, threads)
    toy = Process(Contender("toy", "mlxgpt", here, str(directory / "toy")), environment, threads)
    processes = [Process(c, environment, threads) for c in contenders(directory, sizes, options)]
    best, overhead = 0.0, math.inf
    for turn in range(1 + options.turns):
        for process in processes:
            if turn and process.is_slow:
                continue
            best = max(best, bandwidth.ask(0, 0)[0])
            time.sleep(0.05)  # others' threads spin for a while after their work, and would slow the next one down
            n = 4 if process.contender.kind == "nanoGPT" else options.tokens
            start = time.perf_counter()
            decode, prefill = process.ask(process.contender.context, n)[1], process.ask(PREFILL, 1)[0]
            process.is_slow = time.perf_counter() - start > SLOW
            if turn or process.is_slow:  # the first ones allocate and start threads
                process.decode.append(decode)
                process.prefill.append(prefill)
        overhead = min(overhead, toy.ask(1, 500)[1])
    memory = {process.contender.name: process.peak_memory() for process in (bandwidth, toy, *processes)}
    first: dict[str, list[float]] = {process.contender.name: [] for process in processes}
    for turn in range(1 + options.turns):
        for process in processes:
            if command := process.contender.first_token:
                start = time.perf_counter()
                subprocess.run(command, env=environment, check=True, capture_output=True)
                if turn:  # the first ones read files that are not in memory yet
                    first[process.contender.name].append(time.perf_counter() - start)
    print(f"{threads} threads, reading {best:.1f} GB/s; medians of {options.turns} turns")
    ours = {process.contender.name: statistics.median(process.decode) for process in processes}
    for process in processes:
        contender, seconds = process.contender, statistics.median(process.decode)
        limit = contender.bytes_per_token / best / 1e9
        whole = f"{statistics.median(times):5.2f} s" if (times := first[contender.name]) else f"{'-':>7}"
        print(
            f"{contender.name:>25} | {1 / seconds:6.1f} tokens/s {seconds * 1e3:7.2f} ms | "
            f"{limit / seconds:6.1%} of {1 / limit:4.0f} tokens/s | {seconds / ours[contender.like]:5.2f} x our time | "
            f"prefill {PREFILL / statistics.median(process.prefill):5,.0f} tokens/s | first token {whole} | "
            f"{memory[contender.name] / 1e6:6,.0f} MB",
            flush=True,
        )
    print(f"one layer of 16, 96 characters: {overhead * 1e6:.1f} us per token")


def _has(python: str, package: str) -> bool:
    check = f"import importlib.util as u, sys; sys.exit(not u.find_spec({package!r}))"
    return subprocess.run([python, "-c", check]).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=16, help="tokens before those that are timed (default: 16)")
    parser.add_argument("--turns", type=int, default=5, help="counted turns (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one turn of 8 tokens: whether all runs")
    parser.add_argument("--threads", type=int, help="threads of each (default: physical cores)")
    parser.add_argument("--directory", default="", help="where the weights are made and kept (default: nowhere)")
    parser.add_argument("--transformers-python", default=sys.executable, metavar="PATH", help="the one that has it")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH", help="the one with llama-cpp-python")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work == "build":
        return build(Path(options.directory), options.llama_python)
    if options.work:
        return work(options.work, options.directory, options.threads)

    from mlxgpt import _core

    options.threads = options.threads or _core.num_threads()
    options.tokens = 8 if options.quick else NEW_TOKENS
    options.turns = 1 if options.quick else options.turns
    if not 1 <= options.context <= BLOCK_SIZE - options.tokens:
        parser.error(f"--context is {options.context}, expected 1 to {BLOCK_SIZE - options.tokens}")
    for setting, package in (("transformers_python", "transformers"), ("llama_python", "llama_cpp")):
        if not _has(getattr(options, setting), package):
            print(f"without {package}, which {getattr(options, setting)} doesn't have", file=sys.stderr)
            setattr(options, setting, "")
    with ExitStack() as stack:
        directory = Path(options.directory or stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--work", "build", "--directory", str(directory)]
        made = subprocess.run([*command, "--llama-python", options.llama_python], stdout=subprocess.PIPE, check=True)
        compare(directory, json.loads(made.stdout), options)


if __name__ == "__main__":
    main()
