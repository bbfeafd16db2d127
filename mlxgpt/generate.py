"""python -m mlxgpt.generate: samples text from a model directory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from .common import cli
from .common.console import peak_memory
from .common.settings import require, require_at_least, require_seed
from .data.tokenizer import Tokenizer
from .generation.samples import Batch, Sample, load, load_named, start
from .generation.sampling import Sampler
from .model.gpt import GPT

PROG = "mlxgpt.generate"

_imported = time.perf_counter()


@dataclass(frozen=True)
class SampleConfig:
    """Sample text from a model directory."""

    model: str
    """the model directory that training or the converter wrote"""
    prompt: str = ""
    """the text to go on from, or - to read it from standard input; empty starts from the end-of-text token, or a
    line break for characters"""
    prompts: str = ""
    """a file of prompts, one a line, or - for standard input"""
    num_samples: int = 1
    """how many samples to draw of each prompt"""
    batch_size: int = 8
    """prompts of a file that are computed together"""
    max_new_tokens: int = 500
    """tokens to generate per sample"""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """a text that ends a sample and is left out of it, with escapes as in \\n and \\t; may be given several times"""

    temperature: float = 0.8
    """divides the logits; 0 takes the most likely token"""
    top_k: int = 0
    """sample among the k most likely tokens; 0 among all"""
    top_p: float = 1.0
    """sample among the fewest tokens whose probabilities sum to this"""
    min_p: float = 0.0
    """sample among tokens of at least this times the most likely one's probability"""
    repetition_penalty: float = 1.0
    """above 1, tokens of the text so far become less likely"""
    logit_bias: str = ""
    """ID:BIAS,ID:BIAS: numbers added to the logits of some ids; -inf forbids one"""
    seed: int = 1337
    """same seed, same text"""

    on_full: Literal["slide", "stop"] = "slide"
    """when all of the model's positions are taken: slide drops the oldest half of what it sees and reads the rest
    again, stop ends the sample"""
    draft: str = ""
    """a smaller model directory of the same vocabulary, which proposes tokens that the model checks together"""
    draft_tokens: int = 4
    """tokens that the draft proposes at a time"""

    json: bool = False
    """print one JSON object per sample and line"""
    logprobs: bool = False
    """give each token's log-probability by the model, before temperature and the like"""
    verbose: bool = False
    """end with times, speed and memory on standard error"""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes the GPU where MLX has one"""

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_samples", "batch_size", "max_new_tokens", "draft_tokens")
        require(not (self.prompt and self.prompts), "prompts", repr(self.prompts), "none beside a prompt")
        require_seed(self.seed)


def main(args: Sequence[str]) -> None:
    config = cli.parse(SampleConfig, args, PROG)
    try:
        sampler = Sampler(
            config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty,
            _biases(config.logit_bias), config.seed,
        )  # fmt: skip
        stop = [_unescaped(text) for text in config.stop]
    except ValueError as error:
        raise cli.UsageError(str(error)) from None
    prompts = _prompts(config)
    model, tokenizer = load(config.model, config.device)
    draft = _draft(config, tokenizer)
    samples = [
        start(model, tokenizer, prompt, config.on_full, name)
        for name, prompt in prompts.items()
        for _ in range(config.num_samples)
    ]
    _say_what_is_cut(samples[:: config.num_samples], prompts, model)
    output, times = _Output(config, tokenizer, len(samples)), _Times()
    rows = config.batch_size * config.num_samples if config.prompts else len(samples)
    rows = 1 if draft else rows  # it is checked for one sequence at a time
    done = True
    for at in range(0, len(samples), rows):
        batch = Batch(
            model, tokenizer, samples[at : at + rows], dataclasses.replace(sampler, seed=config.seed + at),
            max_new_tokens=config.max_new_tokens, stop=stop, on_full=config.on_full, draft=draft,
            n_draft=config.draft_tokens, logprobs=config.logprobs,
        )  # fmt: skip
        try:
            output.follow(batch)
        except KeyboardInterrupt:
            batch.interrupt()
            done = False
        times.add(batch)
        output.show(batch)
        if not done:
            break
    if config.verbose:
        times.show()
    if not done:
        sys.exit(130)  # as a shell says it of Ctrl-C


def _prompts(config: SampleConfig) -> dict[str, str]:
    """The prompts by the names that messages give them."""
    if not config.prompts:
        return {"prompt": _read("prompt", "-").removesuffix("\n") if config.prompt == "-" else config.prompt}
    text = _read("prompts", config.prompts)
    if not text:
        raise ValueError(f"prompts: {config.prompts} is empty, expected a prompt a line")
    return {f"prompts: line {n}": line for n, line in enumerate(text.removesuffix("\n").split("\n"), 1)}


def _read(setting: str, name: str) -> str:
    """A text file, or standard input for -, with \\n for its line ends."""
    content = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
    try:
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        where = "standard input" if name == "-" else name
        raise ValueError(f"{setting}: {where} is not UTF-8 at byte {error.start}") from None


def _draft(config: SampleConfig, tokenizer: Tokenizer) -> GPT | None:
    if not config.draft:
        return None
    draft, other = load_named(Path(config.draft), "draft")
    if _vocabulary(other) != _vocabulary(tokenizer):
        raise ValueError(f"draft: {config.draft} has another vocabulary than {config.model}")
    return draft


def _vocabulary(tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]


def _biases(text: str) -> dict[int, float]:
    """ID:BIAS,ID:BIAS as a dictionary."""
    biases = {}
    for pair in filter(None, text.split(",")):
        token, _, bias = pair.partition(":")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise ValueError(f"logit_bias is {text!r}, expected ID:BIAS,ID:BIAS") from None
    return biases


_ESCAPES = {"n": b"\n", "t": b"\t", "r": b"\r", "0": b"\0", "\\": b"\\", "'": b"'", '"': b'"'}


def _unescaped(text: str) -> str:
    """A stop string with its escapes read: those above, and \\xHH for a byte of UTF-8."""

    def byte(match: re.Match[bytes]) -> bytes:
        escape = match[1].decode("utf-8", "replace")
        if escape[:1] == "x" and len(escape) == 3:
            return bytes([int(escape[1:], 16)])
        if escape not in _ESCAPES:
            raise ValueError(f"stop: unknown escape \\{escape}, expected \\n, \\t, \\r, \\0, \\\\ or \\xHH")
        return _ESCAPES[escape]

    try:
        return re.sub(
            rb"\\(x[0-9a-fA-F]{2}|.?)", byte, text.encode("utf-8", "surrogateescape"), flags=re.DOTALL
        ).decode("utf-8")
    except UnicodeError:
        raise ValueError(f"stop is {text!r}, expected UTF-8") from None


def _say_what_is_cut(samples: Sequence[Sample], names: Iterable[str], model: GPT) -> None:
    size = model.config.block_size
    for sample, name in zip(samples, names, strict=True):
        if (length := len(sample.prompt_tokens)) > size:
            print(f"{PROG}: {name}: of {length} tokens the model sees the last {size} (block_size)", file=sys.stderr)


class _Output:
    """What is printed, and when: the first sample of a prompt as it comes, all others when their batch is done."""

    def __init__(self, config: SampleConfig, tokenizer: Tokenizer, n_samples: int) -> None:
        self._config, self._tokenizer, self._n_samples = config, tokenizer, n_samples
        self._as_it_comes = not config.json and not config.prompts
        self._shown = 0  # samples
        self._written = 0  # characters of the sample that is shown as it comes

    def follow(self, batch: Batch) -> None:
        """Runs a batch to its end."""
        if self._as_it_comes and not self._shown:
            sys.stdout.write(batch.samples[0].prompt)
            sys.stdout.flush()
            for row, piece in batch:
                if row == 0 and piece.text:
                    sys.stdout.write(piece.text)
                    self._written += len(piece.text)
                    sys.stdout.flush()
        else:
            last = self._shown + len(batch.samples)
            with _progress(f"sample {last} of {self._n_samples}", self._config.max_new_tokens) as advance:
                for row, _ in batch:
                    if row == 0:
                        advance()

    def show(self, batch: Batch) -> None:
        """Prints a batch that has ended, as far as it isn't printed yet."""
        for sample in batch.samples:
            if self._config.json:
                print(json.dumps(self._record(batch, sample)))
            else:
                if self._shown:
                    print("---------------")
                streamed = self._as_it_comes and not self._shown
                print(sample.text[self._written :] if streamed else sample.prompt + sample.text)
                for token, logprob in zip(sample.tokens, sample.logprobs or (), strict=False):
                    print(f"{logprob:9.4f}  {self._name(token)}")
            self._shown += 1
        sys.stdout.flush()

    def _record(self, batch: Batch, sample: Sample) -> dict[str, Any]:
        record: dict[str, Any] = {"prompt": sample.prompt, "text": sample.text, "tokens": sample.tokens}
        if sample.logprobs is not None:
            record["logprobs"] = sample.logprobs
        record["finish"] = sample.finish
        if self._config.verbose:
            record["prompt_tokens"] = len(sample.prompt_tokens)
            record["seconds_to_first_token"] = batch.first - batch.began
            record["seconds"] = batch.last - batch.began  # of the whole batch
        return record

    def _name(self, token: int) -> str:
        """A token as Python writes its text, or its bytes where they are only a part of a character."""
        content = self._tokenizer.token_bytes(token)
        try:
            return repr(content.decode("utf-8"))
        except UnicodeDecodeError:
            return repr(content)


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error while it is a terminal. Gives what moves it on by one."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    import rich.progress
    from rich.console import Console

    # standard output is not rich's to redirect: it may be a file
    bar = rich.progress.Progress(
        console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


class _Times:
    """What --verbose says at the end, of all batches."""

    def __init__(self) -> None:
        self._prompt_tokens = self._tokens = 0
        self._to_first: tuple[float, float] | None = None  # seconds from the process's start and from the prompt's
        self._seconds = 0.0  # of tokens after the first of each row, and how many they are
        self._after_first = 0

    def add(self, batch: Batch) -> None:
        self._prompt_tokens += sum(len(sample.prompt_tokens) for sample in batch.samples)
        if self._to_first is None and batch.first > batch.began:
            self._to_first = batch.first - _process_start(), batch.first - batch.began
        self._tokens += sum(len(sample.tokens) for sample in batch.samples)
        self._after_first += sum(max(len(sample.tokens) - 1, 0) for sample in batch.samples)
        self._seconds += batch.last - batch.first

    def show(self) -> None:
        from_start, from_prompt = self._to_first or (float("nan"), float("nan"))
        speed = self._after_first / self._seconds if self._seconds else float("nan")
        memory = peak_memory() // 10**6
        print(
            f"{PROG}: {self._prompt_tokens} prompt tokens; first token {from_start:.3f} s after the start, "
            f"{from_prompt:.3f} s after the prompt\n"
            f"{PROG}: {self._tokens} tokens, {speed:.1f} tokens/s after the first; peak memory {memory:,} MB",
            file=sys.stderr,
        )


def _process_start() -> float:
    """When this process began, on time.perf_counter's clock; where that isn't told, when this module was imported."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError, IndexError):
            ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine's start
            age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
            return time.perf_counter() - age
    return _imported


if __name__ == "__main__":
    cli.run(PROG, main)
