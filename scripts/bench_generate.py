"""Times generation with GPT-2's shape next to transformers, llama.cpp, nanoGPT's sampler and the memory's bandwidth.

    python scripts/bench_generate.py [--device auto|cpu|gpu] [--dtype float32 8-bit ...] [--context N]
                                     [--transformers-python PATH] [--llama-python PATH] [--quick]

Each contender is a process of its own, on the same threads, with the same random weights; transformers and
llama-cpp-python take part where they are installed, in this Python or in the one that is named. They take turns, so
that all see the same state of the machine: a turn is a prompt of N tokens and 64 greedy ones behind it, and a prompt
of 256 (whoever needs half a minute for that is asked once). Printed are medians of the turns; the share of what
reading the weights once per token allows (the best bandwidth measured among the turns, over the bytes of all weights
but the positions', a tied head counted once); the time over that of our model in the same or the nearest storage; the
time of a whole process that prints one token; and the peak memory. The last line is a model so small that Python's own
time is left.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import limits
import numpy as np
import report
import turns
from report import Row, Settings
from turns import Contender

VOCAB_SIZE, BLOCK_SIZE = 50257, 1024  # GPT-2's
TOY_VOCAB_SIZE = 96  # printable ASCII, as in the default corpus
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

TITLE = "Generation"
NOTE = (
    "GPT-2's shape, 124 M parameters, greedy, after a prompt of 16 tokens; medians. The limit is reading all weights "
    "once per token, at the best bandwidth measured in that time."
)
COLUMNS = [
    ("", "contender", "{}"),
    ("tokens/s", "tokens_per_s", "{:,.1f}"),
    ("read per token", "mb_per_token", "{:,.0f} MB"),
    ("of what reading the weights allows", "share_of_bandwidth", "{:.0%}"),
    ("time over ours", "time_over_ours", "{:.2f}"),
    (f"prompt of {PREFILL}, tokens/s", "prompt_tokens_per_s", "{:,.0f}"),
    ("process to first token", "first_token_s", "{:.2f} s"),
    ("peak memory", "peak_memory_mb", "{:,.0f} MB"),
]

Times = Callable[[list[int], int], list[float]]  # a prompt and a number of tokens -> when each of them was there


# ---- the contenders' processes ----


def ours(path: str, device: str) -> Times:
    import mlxgpt
    from mlxgpt.generation.decoding import Decoder
    from mlxgpt.generation.sampling import Sampler

    model, _ = mlxgpt.load(path, device=device)

    def times(ids: list[int], n: int) -> list[float]:
        steps = Decoder(model, [ids], Sampler(temperature=0))
        return [time.perf_counter() for _ in itertools.islice(steps, n)]

    return times


def transformers(path: str, device: str, threads: int) -> Times:
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
    name = turns.pytorch_device(device)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, Path(path).name)).eval().to(name)
    model.generation_config.eos_token_id = None  # the end of a text stops nothing
    model.generation_config.pad_token_id = 0

    def times(ids: list[int], n: int) -> list[float]:
        clock, prompt = Clock(), torch.tensor([ids], device=name)
        mask = torch.ones_like(prompt)
        model.generate(prompt, attention_mask=mask, max_new_tokens=n, do_sample=False, streamer=clock)
        return clock.times[1:]  # the first is the prompt's

    return times


def llama(path: str, device: str, threads: int) -> Times:
    """By llama_decode and NumPy's argmax: no slower than its own sampler, and faster than create_completion."""
    from llama_cpp import Llama

    on_gpu = dict(n_gpu_layers=-1 if device == "gpu" else 0)
    model = Llama(
        path, n_ctx=BLOCK_SIZE, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False, **on_gpu
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


def nanogpt(device: str, threads: int) -> Times:
    """Each token from all of the context anew, as nanoGPT's sample.py does."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch_gpt

    torch.set_num_threads(threads)
    name = turns.pytorch_device(device)
    shape = dict(block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE, n_layer=12, n_head=12, n_embd=768)
    model = torch_gpt.GPT(**shape).eval().to(name)

    @torch.no_grad()
    def times(ids: list[int], n: int) -> list[float]:
        text, taken = torch.tensor([ids], device=name), []
        for _ in range(n):
            x = model.wte(text) + model.wpe.weight[: text.shape[1]]
            for block in model.h:
                x = block(x)
            logits = model.ln_f(x[:, -1]) @ model.wte.weight.T  # of the last position alone
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
            turns.wait_for_pytorch(name)
            taken.append(time.perf_counter())
        return taken

    return times


def make(maker: str, **work: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A process: what makes the weights, or a contender."""
    return (build(**work), lambda question: None) if maker == "build" else generate(maker, **work)


def generate(maker: str, path: str, vocab_size: int, device: str, threads: int) -> tuple[Any, Callable[[Any], Any]]:
    """A contender: it answers [[length, new tokens], ...] with [seconds of the prompt, seconds of each token behind
    it] for each, and [] with the bytes that it held at most."""
    makers: dict[str, Callable[[], Times]] = {
        "mlxgpt": lambda: ours(path, device),
        "transformers": lambda: transformers(path, device, threads),
        "llama": lambda: llama(path, device, threads),
        "nanoGPT": lambda: nanogpt(device, threads),
    }
    times, rng = makers[maker](), np.random.default_rng(0)

    def seconds(length: int, n: int) -> tuple[float, float]:
        ids = rng.integers(0, vocab_size, length).tolist()
        start = time.perf_counter()
        taken = times(ids, n)
        return taken[0] - start, (taken[-1] - taken[0]) / max(1, n - 1)

    def answer(question: list[list[int]]) -> Any:
        return [seconds(length, n) for length, n in question] if question else peak_bytes(maker, device)

    return "ready", answer


def peak_bytes(maker: str, device: str) -> int:
    """The most bytes held on a GPU as MLX says, else by the process."""
    if device == "gpu" and maker == "mlxgpt":
        import mlx.core as mx

        return mx.get_peak_memory()
    return turns.process_peak_bytes()


# ---- the weights ----


def build(directory: str, storages: list[str], llama_python: str, toy: bool) -> dict[str, int]:
    """Makes what a directory lacks -> how many bytes of each a token reads. In a process of its own: its arrays would
    count in the peak memory of the processes that are started from here."""
    import mlx.core as mx

    from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer
    from mlxgpt.formats import model_directory as checkpoint
    from mlxgpt.model.config import GPTConfig
    from mlxgpt.model.gpt import GPT

    mx.random.seed(0)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    characters = CharTokenizer([chr(n) for n in range(32, 32 + TOY_VOCAB_SIZE)])
    if toy:
        config = GPTConfig(block_size=512, vocab_size=TOY_VOCAB_SIZE, n_layer=1, n_head=1, n_embd=64)
        checkpoint.save_model(path / "float32", GPT(config), characters)
    if not (path / "float32").exists():
        checkpoint.save_model(path / "float32", GPT(GPTConfig(block_size=BLOCK_SIZE)), BPETokenizer.gpt2())
    if not (path / "toy").exists():
        config = GPTConfig(block_size=512, vocab_size=TOY_VOCAB_SIZE, n_layer=1, n_head=1, n_embd=16)
        checkpoint.save_model(path / "toy", GPT(config), characters)
    convert = [sys.executable, "-m", "mlxgpt.convert"]
    for name in storages:
        if options := OURS[name]:
            _make(path / name, [*convert, path / "float32", path / name, *options])
    if llama_python:
        for name in ("f32", "f16"):
            file = path / f"{name}.gguf"
            _make(file, [*convert, path / GGUF[name], file, "--to", "gguf"])
        for name in ("q8_0", "q4_0"):
            file = path / f"{name}.gguf"
            _make(file, [llama_python, "-c", LLAMA_QUANTIZE, path / "f32.gguf", file, name])
    names = [*storages, "toy", *(f"{name}.gguf" for name in (GGUF if llama_python else ()))]
    return {name: _bytes_per_token(path / name) for name in names}


def _make(path: Path, command: list[str | Path]) -> None:
    if not path.exists():
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"{path.name} can't be made: {made.stderr or made.stdout}")


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


# ---- the comparison ----


@dataclass
class Peers:
    """Which others take part: the Python that has each, or "" for none; and what is asked of all."""

    transformers_python: str = ""
    llama_python: str = ""
    sampler: bool = False  # nanoGPT's, which computes the whole context anew
    first_token: bool = False  # whole processes that print one token
    context: int = 16
    turns: int = 5
    directory: str = ""


@dataclass
class Generator(Contender):
    """A contender, and what its row is computed from."""

    like: str = ""  # the name of ours that it is compared with
    question: list[list[int]] = field(default_factory=list)
    bytes_per_token: int = 0
    first_token: Sequence[str] = ()  # a command that prints one token


def contenders(settings: Settings, directory: Path, sizes: dict[str, int], peers: Peers) -> Iterator[Generator]:
    device, threads, here = settings.device, settings.machine["threads"], sys.executable
    n = 8 if settings.quick else NEW_TOKENS

    def generator(
        name: str, maker: str, file: str, like: str, first: Sequence[str] = (), python: str = here,
        context: int = peers.context, n: int = n,
    ) -> Generator:  # fmt: skip
        vocab_size = TOY_VOCAB_SIZE if settings.toy or file == "toy" else VOCAB_SIZE
        work = dict(maker=maker, path=str(directory / file), vocab_size=vocab_size, device=device, threads=threads)
        question, is_ours = [[context, n], [PREFILL, 1]], maker == "mlxgpt"
        return Generator(
            name, turns.command(__file__, python, **work), is_ours=is_ours, like=like, question=question,
            bytes_per_token=sizes[file], first_token=first if device == "cpu" or is_ours else (),
        )  # fmt: skip

    options = ["--device", device, "--temperature", "0", "--max_new_tokens", "1", "--prompt", PROMPT, "--model"]
    for name in own(settings):
        row, first = f"mlxgpt {name}", [here, "-m", "mlxgpt.generate", *options, str(directory / name)]
        yield generator(row, "mlxgpt", name, row, first)
    if python := peers.transformers_python:
        for name in ("float32", "bfloat16"):
            first = [python, "-c", TRANSFORMERS_FIRST_TOKEN, str(directory / name), name, PROMPT]
            yield generator(f"transformers {name}", "transformers", name, f"mlxgpt {name}", first, python)
    if python := peers.llama_python:
        for name, like in GGUF.items():
            file = f"{name}.gguf"
            first = [python, "-c", LLAMA_FIRST_TOKEN, str(directory / file), str(threads), PROMPT]
            yield generator(f"llama.cpp {name}", "llama", file, f"mlxgpt {like}", first, python)
    if peers.sampler and (python := peers.transformers_python):
        row = f"mlxgpt float32 after {RECOMPUTED}"
        yield generator(row, "mlxgpt", "float32", row, context=RECOMPUTED)
        yield generator(
            f"nanoGPT after {RECOMPUTED}", "nanoGPT", "float32", row, python=python, context=RECOMPUTED, n=4
        )
    yield generator("one layer of 16, 96 characters", "mlxgpt", "toy", "", context=1, n=256)


def own(settings: Settings) -> Sequence[str]:
    """The storages of ours that take part."""
    asked_for = [name for name in settings.dtypes if name in OURS]
    return asked_for or (["float32", "4-bit"] if settings.toy else list(OURS))


def rows(settings: Settings, peers: Peers | None = None) -> Iterator[Row]:
    end = time.perf_counter() + settings.seconds
    with ExitStack() as stack:
        told = peers or Peers(sys.executable if settings.machine["transformers"] else "")
        path = told.directory or stack.enter_context(tempfile.TemporaryDirectory())
        settings.tell("weights are made")
        # others' weights are made from ours, or are them
        storages = list(OURS) if told.llama_python or told.transformers_python else sorted({"float32", *own(settings)})
        work = dict(maker="build", directory=path, storages=storages, llama_python=told.llama_python, toy=settings.toy)
        building = Contender("weights", turns.command(__file__, **work))
        with turns.started([building], settings.environment):
            sizes = building.ready
        if building.stopped:
            raise SystemExit(building.stopped)
        yield from compare(settings, Path(path), sizes, told, end - time.perf_counter())


def compare(settings: Settings, directory: Path, sizes: dict[str, int], peers: Peers, seconds: float) -> Iterator[Row]:
    group = list(contenders(settings, directory, sizes, peers))
    asked, best, end = limits.measuring(settings), 0.0, time.perf_counter() + seconds
    memory: dict[str, int] = {}
    first: dict[str, float] = {}
    interrupt: list[KeyboardInterrupt] = []

    def measure() -> None:
        nonlocal best
        best = max(best, 1e9 * (asked.ask(["reading", settings.machine["threads"]], 120) or 0))

    try:
        with turns.started([asked, *group], settings.environment, seconds, settings.tell):
            turns.take_turns(
                warmed_up(settings, group, end), lambda contender: contender.question,
                seconds=end - time.perf_counter(), most=1 if settings.quick else peers.turns, between=measure,
            )  # fmt: skip
            memory = {contender.name: contender.ask([], 60) for contender in group}
        if peers.first_token:
            first = first_tokens(settings, group, peers.turns)
    except KeyboardInterrupt as stop:  # the rows tell what was measured until then
        interrupt.append(stop)
    decode = {c.name: statistics.median(answer[0][1] for answer in c.answers) for c in group if c.answers}
    for contender in group:
        row: Row = {"contender": contender.name, "mb_per_token": contender.bytes_per_token / 1e6, **contender.why()}
        if seconds_each := decode.get(contender.name):
            row |= {"tokens_per_s": 1 / seconds_each, "ms_per_token": 1e3 * seconds_each}
            row["prompt_tokens_per_s"] = PREFILL / statistics.median(answer[1][0] for answer in contender.answers)
            row |= {"share_of_bandwidth": contender.bytes_per_token / best / seconds_each} if best else {}
            row |= {"time_over_ours": seconds_each / decode[contender.like]} if contender.like in decode else {}
        row |= {"peak_memory_mb": memory[contender.name] / 1e6} if memory.get(contender.name) else {}
        yield row | ({"first_token_s": first[contender.name]} if contender.name in first else {})
    if interrupt:
        raise interrupt[0]


def warmed_up(settings: Settings, group: Sequence[Generator], end: float) -> list[Generator]:
    """Asks each once, which allocates and starts threads -> those that are asked again. Who is slow is not, and keeps
    this answer."""
    again = []
    for contender in group:
        settings.tell(f"{contender.name} warms up")
        start = time.perf_counter()
        answer = contender.ask(contender.question, timeout=max(30, min(3600, (end - start) / 2)))
        if answer is not None and time.perf_counter() - start > SLOW:
            contender.answers.append(answer)
        elif answer is not None:
            again.append(contender)
    return again


def first_tokens(settings: Settings, group: Sequence[Generator], turns: int) -> dict[str, float]:
    """The median seconds of a whole process that prints one token. The first turn does not count: it reads files that
    are not in memory yet."""
    seconds: dict[str, list[float]] = {}
    for turn in range(1 + turns):
        for contender in group:
            if contender.first_token:
                settings.tell(f"{contender.name}: first token")
                start = time.perf_counter()
                subprocess.run(contender.first_token, env=settings.environment, check=True, capture_output=True)
                if turn:
                    seconds.setdefault(contender.name, []).append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--dtype", nargs="+", choices=OURS, default=(), help="our storages (default: all)")
    parser.add_argument("--context", type=int, default=16, help="tokens before those that are timed (default: 16)")
    parser.add_argument("--turns", type=int, default=5, help="counted turns (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one turn of 8 tokens: whether all runs")
    parser.add_argument("--directory", default="", help="where the weights are made and kept (default: nowhere)")
    parser.add_argument("--transformers-python", default=sys.executable, metavar="PATH", help="the one that has it")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH", help="the one with llama-cpp-python")
    options = parser.parse_args()
    if options.work:
        return turns.serve(lambda: make(**options.work))
    settings = report.settings(parser, options, dtypes=options.dtype, quick=options.quick)
    n_turns, longest = 1 if options.quick else options.turns, BLOCK_SIZE - NEW_TOKENS
    if not 1 <= options.context <= longest:
        parser.error(f"--context is {options.context}, expected 1 to {longest}")
    if n_turns < 1:
        parser.error(f"--turns is {n_turns}, expected at least 1")
    pythons = {}
    for setting, package in (("transformers_python", "transformers"), ("llama_python", "llama_cpp")):
        pythons[setting] = getattr(options, setting)
        if not report.is_installed(package, pythons[setting]):
            settings.tell(f"without {package}, which {pythons[setting]} doesn't have")
            pythons[setting] = ""
    peers = Peers(**pythons, sampler=True, first_token=True, context=options.context, turns=n_turns)
    peers.directory = options.directory
    report.run_alone(settings, rows(settings, peers), COLUMNS)


if __name__ == "__main__":
    main()
