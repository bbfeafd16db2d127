"""python -m mlxgpt.generate: samples text from a model directory, and prints it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import tyro

from .common import cli
from .common.console import peak_memory, progress
from .common.settings import require, require_at_least
from .data.tokenizer import Tokenizer
from .generation.samples import Sample, SampleBatch, SampleOptions, empty_sample, load, load_named
from .model.gpt import GPT

PROG = "mlxgpt.generate"

_imported_at = time.perf_counter()


@tyro.conf.configure(tyro.conf.UseAppendAction)  # --stop may be given several times
@dataclass(frozen=True)
class SampleConfig:
    """Sample text from a model directory."""

    model: str
    """the model directory that training or the converter wrote"""
    prompt: str = ""
    """the text to continue, or - to read it from standard input; empty starts from the end-of-text token, or a
    line break for characters"""
    prompts: str = ""
    """a file of prompts, one a line, or - for standard input"""
    num_samples: int = 1
    """how many samples to draw of each prompt"""
    batch_size: int = 8
    """prompts of a file that are computed together"""
    draft: str = ""
    """a smaller model directory of the same vocabulary, which proposes tokens that the model checks together"""

    json: bool = False
    """print one JSON object per sample and line"""
    verbose: bool = False
    """end with times, speed and memory on standard error"""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes the GPU where MLX has one"""

    # its help stands in the type: to find a docstring, tyro would parse this file at every start, not for --help alone
    sampling: Annotated[SampleOptions, tyro.conf.arg(help="how a sample is made")] = field(
        default_factory=SampleOptions
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_samples", "batch_size")
        require(not (self.prompt and self.prompts), "prompts", repr(self.prompts), "none beside a prompt")


def main(args: Sequence[str]) -> None:
    with _FLAG_TYPES:
        config = cli.parse(SampleConfig, args, PROG)
    try:
        stop = tuple(_unescaped(text) for text in config.sampling.stop)
    except ValueError as error:
        raise cli.UsageError(str(error)) from None
    options = replace(config.sampling, stop=stop)
    prompts = _prompts(config)
    model, tokenizer = load(config.model, config.device)
    draft = _load_draft(config, tokenizer)
    samples = [
        empty_sample(model, tokenizer, prompt, options, name)
        for name, prompt in prompts.items()
        for _ in range(config.num_samples)
    ]
    _warn_of_cropped_prompts(samples[:: config.num_samples], prompts, model)
    output, times = _Output(config, tokenizer, len(samples)), _Times()
    rows = config.batch_size * config.num_samples if config.prompts else len(samples)
    rows = 1 if draft else rows  # a draft is checked for one sequence at a time
    interrupted = False
    for at in range(0, len(samples), rows):
        batch_options = replace(options, seed=options.seed + at)  # each sample has a seed of its own
        batch = SampleBatch(model, tokenizer, samples[at : at + rows], batch_options, draft)
        try:
            output.follow(batch)
        except KeyboardInterrupt:
            batch.interrupt()
            interrupted = True
        times.add(batch)
        output.show(batch)
        if interrupted:
            break
    if config.verbose:
        times.show()
    if interrupted:
        sys.exit(130)  # the status by which a shell tells Ctrl-C


def _prompts(config: SampleConfig) -> dict[str, str]:
    """The prompts, by the names that error messages call them."""
    if not config.prompts:
        return {"prompt": _read_text("prompt", "-").removesuffix("\n") if config.prompt == "-" else config.prompt}
    text = _read_text("prompts", config.prompts)
    if not text:
        raise ValueError(f"prompts: {config.prompts} is empty, expected a prompt a line")
    return {f"prompts: line {n}": line for n, line in enumerate(text.removesuffix("\n").split("\n"), 1)}


def _read_text(setting: str, name: str) -> str:
    """The text of a file, or of standard input for -, with every line end as \\n. ValueError for bytes not UTF-8."""
    content = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
    try:
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        where = "standard input" if name == "-" else name
        raise ValueError(f"{setting}: {where} is not UTF-8 at byte {error.start}") from None


def _load_draft(config: SampleConfig, tokenizer: Tokenizer) -> GPT | None:
    """The draft model, if one is asked for. ValueError for another vocabulary than the tokenizer's."""
    if not config.draft:
        return None
    draft, draft_tokenizer = load_named(Path(config.draft), "draft")
    if _vocabulary(draft_tokenizer) != _vocabulary(tokenizer):
        raise ValueError(f"draft: {config.draft} has another vocabulary than {config.model}")
    return draft


def _vocabulary(tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]


_FLAG_TYPES = tyro.constructors.ConstructorRegistry()


@_FLAG_TYPES.primitive_rule
def _logit_bias_flag(flag: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Lets a mapping be given as one word, ID:BIAS,ID:BIAS."""
    if get_origin(flag.type) is not Mapping:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="ID:BIAS,ID:BIAS",
        instance_from_str=lambda words: _biases(words[0]),
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda biases: [",".join(f"{token}:{bias}" for token, bias in biases.items())],
    )


def _biases(text: str) -> dict[int, float]:
    """ID:BIAS,ID:BIAS as a dictionary."""
    biases = {}
    for pair in filter(None, text.split(",")):
        token, _, bias = pair.partition(":")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise cli.UsageError(f"logit_bias is {text!r}, expected ID:BIAS,ID:BIAS") from None
    return biases


_ESCAPES = {"n": b"\n", "t": b"\t", "r": b"\r", "0": b"\0", "\\": b"\\", "'": b"'", '"': b'"'}


def _unescaped(text: str) -> str:
    """A stop string with its escapes replaced: those in _ESCAPES, and \\xHH for a byte of UTF-8."""

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


def _warn_of_cropped_prompts(samples: Sequence[Sample], names: Iterable[str], model: GPT) -> None:
    """Says on standard error which prompts are longer than block_size."""
    size = model.config.block_size
    for sample, name in zip(samples, names, strict=True):
        if (length := len(sample.prompt_tokens)) > size:
            print(f"{PROG}: {name}: of {length} tokens the model sees the last {size} (block_size)", file=sys.stderr)


class _Output:
    """Prints samples: of one prompt, the first token by token, and all other samples when their batch is done."""

    def __init__(self, config: SampleConfig, tokenizer: Tokenizer, n_samples: int) -> None:
        self._config, self._tokenizer, self._n_samples = config, tokenizer, n_samples
        self._streams = not config.json and not config.prompts
        self._n_printed = 0  # samples
        self._n_streamed = 0  # characters already printed of the sample that is streamed

    def follow(self, batch: SampleBatch) -> None:
        """Draws all tokens of a batch, and prints or counts them as they come."""
        if self._streams and not self._n_printed:
            sys.stdout.write(batch.samples[0].prompt)
            sys.stdout.flush()
            for row, piece in batch:
                if row == 0 and piece.text:
                    sys.stdout.write(piece.text)
                    self._n_streamed += len(piece.text)
                    sys.stdout.flush()
        else:
            last = self._n_printed + len(batch.samples)
            with progress(f"sample {last} of {self._n_samples}", self._config.sampling.max_new_tokens) as advance:
                for row, _ in batch:
                    if row == 0:
                        advance(1)

    def show(self, batch: SampleBatch) -> None:
        """Prints what is not printed yet of a batch that has ended."""
        for sample in batch.samples:
            if self._config.json:
                print(json.dumps(self._record(batch, sample)))
            else:
                if self._n_printed:
                    print("---------------")
                is_streamed = self._streams and not self._n_printed
                print(sample.text[self._n_streamed :] if is_streamed else sample.prompt + sample.text)
                for token, logprob in zip(sample.tokens, sample.logprobs or (), strict=False):
                    print(f"{logprob:9.4f}  {self._token_text(token)}")
            self._n_printed += 1
        sys.stdout.flush()

    def _record(self, batch: SampleBatch, sample: Sample) -> dict[str, Any]:
        record: dict[str, Any] = {"prompt": sample.prompt, "text": sample.text, "tokens": sample.tokens}
        if sample.logprobs is not None:
            record["logprobs"] = sample.logprobs
        record["finish"] = sample.finish
        if self._config.verbose:  # the times are of the whole batch
            record["prompt_tokens"] = len(sample.prompt_tokens)
            record["seconds_to_first_token"] = batch.first_token_at - batch.started_at
            record["seconds"] = batch.last_token_at - batch.started_at
        return record

    def _token_text(self, token: int) -> str:
        """The repr of a token's text, or of its bytes where they are not whole characters."""
        content = self._tokenizer.token_bytes(token)
        try:
            return repr(content.decode("utf-8"))
        except UnicodeDecodeError:
            return repr(content)


class _Times:
    """The numbers of tokens and the times of all batches, which --verbose prints at the end."""

    def __init__(self) -> None:
        self._prompt_tokens = self._tokens = 0
        # seconds to the first token, from the start of the process and from the start of the first batch
        self._to_first: tuple[float, float] | None = None
        self._tokens_after_first, self._seconds_after_first = 0, 0.0  # without the first token of each sample

    def add(self, batch: SampleBatch) -> None:
        self._prompt_tokens += sum(len(sample.prompt_tokens) for sample in batch.samples)
        if self._to_first is None and batch.first_token_at > batch.started_at:
            self._to_first = batch.first_token_at - _process_start(), batch.first_token_at - batch.started_at
        self._tokens += sum(len(sample.tokens) for sample in batch.samples)
        self._tokens_after_first += sum(max(len(sample.tokens) - 1, 0) for sample in batch.samples)
        self._seconds_after_first += batch.last_token_at - batch.first_token_at

    def show(self) -> None:
        from_start, from_prompt = self._to_first or (float("nan"), float("nan"))
        speed = self._tokens_after_first / self._seconds_after_first if self._seconds_after_first else float("nan")
        memory = peak_memory() // 10**6
        print(
            f"{PROG}: {self._prompt_tokens} prompt tokens; first token {from_start:.3f} s after the start, "
            f"{from_prompt:.3f} s after the prompt\n"
            f"{PROG}: {self._tokens} tokens, {speed:.1f} tokens/s after the first; peak memory {memory:,} MB",
            file=sys.stderr,
        )


def _process_start() -> float:
    """The time at which this process started, on time.perf_counter's clock; where the system doesn't tell it, the
    time at which this module was imported."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError, IndexError):
            ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # from the machine's start
            age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
            return time.perf_counter() - age
    return _imported_at


if __name__ == "__main__":
    cli.run(PROG, main)
