"""python -m mlxgpt.train: trains a GPT on text, and shows how it comes along."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten
from rich.console import Console

from . import checkpoint, cli, data, device, kernels, loggers, ops, plot, report, tokenizer
from .config import GPTConfig, TrainConfig, settings
from .decoding import Decoder
from .model import GPT
from .optim import learning_rate
from .sampling import Sampler
from .training import Trainer


class Run:
    """A training run and its directory: settings.toml, metrics.jsonl, loss.png, the models best/ and last/."""

    def __init__(self, config: TrainConfig, console: Console, vocab_given: bool) -> None:
        self.config, self.console = config, console
        loggers.require(config)
        where = ops.use_device(config.device)
        corpus = data.load_corpus(config.data)
        source = _source(vars(config))
        self.tokenizer = tokenizer.load(source) if source else _tokenizer(config, corpus)
        model_config = config.model
        if not vocab_given:
            model_config = dataclasses.replace(model_config, vocab_size=self.tokenizer.vocab_size)
        elif model_config.vocab_size < self.tokenizer.vocab_size:
            least = f"at least the tokenizer's {self.tokenizer.vocab_size}"
            raise ValueError(f"vocab_size is {model_config.vocab_size}, expected {least}")
        record = checkpoint.load_training_record(source) if source and config.resume else None
        self.first_step = record["step"] if record else 0  # of optimizer steps taken before this run
        if self.first_step >= config.max_iters:
            raise ValueError(f"max_iters is {config.max_iters}, but {source} has done {self.first_step} steps already")
        mx.random.seed(config.seed + self.first_step)
        self.model = GPT(model_config)  # lazy: no memory is taken yet
        _check_memory(self.model)
        if source:
            _require_same_shape(config, checkpoint.load_config(source), self.tokenizer, source)
        try:
            train, val = (data.encode(self.tokenizer, documents) for documents in (corpus.train, corpus.val))
        except ValueError as error:
            raise ValueError(f"data: {corpus.name} does not fit the tokenizer of {source}: {error}") from None
        shape = (model_config.block_size, config.batch_size)
        self.batches = data.Batches(train, *shape, config.seed, "training")
        validation = data.Batches(val, *shape, config.seed + 1, "validation")
        self.val_batches = [validation.draw(n) for n in range(config.eval_iters)]

        if source:
            _put_weights(self.model, checkpoint.load_model(source))
        self.trainer = Trainer(self.model, config)
        if source and record:
            checkpoint.load_training_state(source, self.model, self.trainer.optimizer)
            self.trainer.steps = self.first_step
        home = _run_of(source, config) if source and record else None
        self.out_dir = home or _make_out_dir(config)
        go_on_after = self.first_step if home else None
        shown = {**_settings_of_run(config), **vars(model_config)}
        to = loggers.start(config, self.out_dir, go_on_after, shown, functools.partial(report.say, console))
        self.metrics = report.Metrics(self.out_dir / report.METRICS, go_on_after, to)
        self.best, self.best_step = math.inf, 0
        if record and (self.out_dir / "best").is_dir() and record["best_val_loss"] is not None:
            self.best = record["best_val_loss"]  # that model's
            steps, losses = self.metrics.curve("val_loss")
            self.best_step = int(dict(zip(losses, steps, strict=True)).get(self.best, 0))
        checkpoint.write_file(self.out_dir / "settings.toml", _toml(dataclasses.replace(config, model=model_config)))
        self._introduce(corpus, len(train), len(val), source, where)

    def _introduce(self, corpus: data.Corpus, n_train: int, n_val: int, source: Path | None, where: mx.Device) -> None:
        files = f"{len(corpus.train)} + {len(corpus.val)} files" if len(corpus.train) > 1 else "one file"
        stdlib = self.config.data == "stdlib"
        skipped = f", {corpus.skipped} skipped as not UTF-8 text" if corpus.skipped and not stdlib else ""
        how = "the C++ kernels" if kernels.available() else "MLX alone"
        device_name = "GPU" if where.type == mx.gpu else f"CPU with {how}"
        done = f", after {self.first_step} steps" if self.first_step else ""
        shape = self.model.config
        lines = [
            f"data: {corpus.name}, {files}{skipped}; {n_train:,} training and {n_val:,} validation tokens",
            f"model: {self.model.n_params():,} parameters; {shape.n_layer} layers, {shape.n_head} heads of "
            f"{shape.head_dim}, {shape.n_embd} wide, {shape.block_size} positions, {shape.vocab_size} token ids",
            *([f"weights: from {source}{done}"] if source else []),
            f"device: {device_name}, {self.config.dtype}; writing to {self.out_dir}",
        ]
        for line in lines:
            report.say(self.console, line)

    def train(self) -> None:
        """All steps, with an evaluation before the first, every eval_interval and after the last.

        Ctrl-C finishes the step, evaluates, saves and ends as the last step would.
        """
        config = self.config
        interrupted = _Interrupt()
        tokens_per_step = config.gradient_accumulation_steps * config.batch_size * self.model.config.block_size
        losses: list[mx.array] = []
        first, micro_batches = self.first_step, config.gradient_accumulation_steps
        progress = report.Progress(
            self.console, first, config.max_iters, tokens_per_step, eval_interval=config.eval_interval,
            flops_per_token=device.training_flops(self.model.config), peak_flops=device.peak_flops(config.dtype),
            tokens=self.metrics.last("tokens", 0), seconds=self.metrics.last("seconds", 0.0),
        )  # fmt: skip
        spikes = report.Spikes(config.spike_threshold)
        if first not in self.metrics.curve("val_loss")[0]:
            with progress.paused():
                self._evaluate()
        with progress, interrupted:
            for step in range(first + 1, config.max_iters + 1):
                batches = [self.batches.draw(n) for n in range((step - 1) * micro_batches, step * micro_batches)]
                lr = learning_rate(config, step - 1)
                losses.append(self.trainer.step(batches))
                last = step == config.max_iters or interrupted.asked
                if step % config.log_interval == 0 or step == first + 1 or last:
                    loss = self._finite(float(mx.stack(losses).mean()))
                    for at, each in enumerate(losses, step - len(losses) + 1):
                        if above := spikes.seen(float(each)):
                            self.metrics.add(step=at, event="spike", loss=float(each), deviations=above)
                    self.metrics.add(step=step, loss=loss, lr=lr, **progress.log(step, loss, lr))
                    losses = []
                if step % config.eval_interval == 0 or last:
                    with progress.paused():
                        self._evaluate()
                if last:
                    break
        self._summary()

    def _evaluate(self) -> None:
        """The validation loss; after the first step also a sample, the curve, and the model saved as best
        if it is, and as last with all that training goes on from."""
        loss, step = self._finite(self.trainer.evaluate(self.val_batches)), self.trainer.steps
        self.metrics.add(step=step, val_loss=loss)
        best = step > self.first_step and loss < self.best
        report.say(self.console, f"step {step}: validation loss {loss:.4f}{' (best so far)' if best else ''}", "bold")
        if step == self.first_step:
            return
        if best:
            checkpoint.save_model(self.out_dir / "best", self.model, self.tokenizer)
            self.best, self.best_step = loss, step
        state = checkpoint.TrainingState(self.trainer.optimizer, step, self.best, _settings_of_run(self.config))
        checkpoint.save_model(self.out_dir / "last", self.model, self.tokenizer, state)
        plot.draw_losses({self.out_dir.name: self.metrics}, self.out_dir / "loss.png", title=self.out_dir.name)
        if self.config.sample_tokens:
            report.say(self.console, _indented(self.sample()), "dim")

    def _finite(self, loss: float) -> float:
        """A loss, before anything is written of a model that has one. ValueError for one that is not finite."""
        if not math.isfinite(loss):
            kept = f" (the model of step {self.best_step} is kept)" if self.best_step else ""
            raise ValueError(
                f"the loss is {loss} at step {self.trainer.steps}: training has diverged; "
                f"try a learning_rate below {self.config.learning_rate}{kept}"
            )
        return loss

    def sample(self) -> str:
        """Text from the model as it is, from an empty prompt; the same seed each time."""
        sampler = Sampler(temperature=0.8, seed=self.config.seed)
        steps = Decoder(self.model, [[self.tokenizer.start]], sampler, vocab_size=self.tokenizer.vocab_size)
        tokens = [int(step.tokens[0]) for step in itertools.islice(steps, self.config.sample_tokens)]
        return tokenizer.decode(self.tokenizer, tokens)

    def _summary(self) -> None:
        self.metrics.close()
        curves = {"training": self.metrics.curve("loss"), "validation": self.metrics.curve("val_loss")}
        print(plot.terminal_losses(curves, self.console))
        head, *lines = report.summary(
            self.metrics, self.trainer.steps, self.config.max_iters, self.out_dir
        ).splitlines()
        report.say(self.console, head, "bold")
        report.say(self.console, "\n".join(lines))


class _Interrupt:
    """While it is entered, a first Ctrl-C or SIGTERM only sets `asked`; a second one interrupts."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> None:
        self._handlers = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _check_memory(model: GPT) -> None:
    """MemoryError for a model that can't be trained here. (A GPU's own allocator says so; MLX on a CPU crashes.)"""
    if mx.default_device().type == mx.gpu:
        return
    needed = 4 * 4 * model.n_params()  # float32 weights, gradients and AdamW's two averages
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise MemoryError(
            f"model: {model.n_params():,} parameters take {needed / 1e9:,.0f} GB to train, "
            f"this machine has {available / 1e9:,.0f} GB"
        )


def _tokenizer(config: TrainConfig, corpus: data.Corpus) -> tokenizer.Tokenizer:
    if config.tokenizer == "gpt2":
        return tokenizer.BPETokenizer.gpt2()
    return tokenizer.CharTokenizer.of(*corpus.train, *corpus.val)


def _source(given: Mapping[str, Any]) -> Path | None:
    """The model directory that a run starts from or goes on with. FileNotFoundError."""
    if given.get("resume"):
        return checkpoint.find_training_state(Path(str(given["resume"])).expanduser())
    if given.get("init_from"):
        return checkpoint.find_model(Path(str(given["init_from"])).expanduser(), "init_from")
    return None


def _inherited(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that come with the model that a run starts from or goes on with."""
    if given.get("init_from") and given.get("resume"):
        raise cli.UsageError("init_from and resume are both given, expected one of them")
    if (source := _source(given)) is None:
        return {}
    values = {**vars(checkpoint.load_config(source)), "tokenizer": _kind(tokenizer.load(source))}
    if given.get("resume"):
        record = checkpoint.load_training_record(source)
        values = {**{n: record[n] for n in ("beta1", "beta2", "weight_decay")}, **record["settings"], **values}
    return values


def _kind(text: tokenizer.Tokenizer) -> str:
    return "gpt2" if isinstance(text, tokenizer.BPETokenizer) else "char"


def _require_same_shape(config: TrainConfig, theirs: GPTConfig, text: tokenizer.Tokenizer, source: Path) -> None:
    """ValueError for a setting that contradicts the model: all but dropout, and fewer positions for a fresh start."""
    ours = {**vars(config.model), "tokenizer": config.tokenizer}
    for name, value in {**vars(theirs), "tokenizer": _kind(text)}.items():
        crop = name == "block_size" and ours[name] < value and not config.resume
        if ours[name] != value and name != "dropout" and not crop:
            raise ValueError(f"{name} is {ours[name]}, but {value} in the model of {source}")


def _put_weights(model: GPT, other: GPT) -> None:
    """Another's weights, of as many positions as the model has."""
    weights = other.named_weights()
    weights["wpe.weight"] = weights["wpe.weight"][: model.config.block_size]
    model.update(tree_unflatten(list(weights.items())))


def _run_of(source: Path, config: TrainConfig) -> Path | None:
    """The directory of the run whose last model it is, to go on writing there, unless out_dir names another."""
    run = source.resolve().parent
    if source.resolve().name != "last" or not (run / "metrics.jsonl").exists():
        return None
    return source.parent if not config.out_dir or Path(config.out_dir).expanduser().resolve() == run else None


def _settings_of_run(config: TrainConfig) -> dict[str, Any]:
    """What a run that goes on needs to know; the model's shape lies with the model."""
    left_out = {"model", "config", "out_dir", "overwrite", "init_from", "resume"}
    return {name: value for name, value in vars(config).items() if name not in left_out}


def _make_out_dir(config: TrainConfig) -> Path:
    """The run's directory, made. ValueError if it holds a run that may not be overwritten."""
    if config.out_dir:
        path = Path(config.out_dir).expanduser()
        if (path / "metrics.jsonl").exists() or (path / "config.json").exists():
            if not config.overwrite:
                raise ValueError(f"out_dir: {path} already holds a run; give another, or --overwrite")
            for model in ("best", "last"):
                shutil.rmtree(path / model, ignore_errors=True)
    else:
        names = (f"runs/{config.preset}{n}" for n in itertools.chain([""], (f"-{i}" for i in itertools.count(2))))
        path = next(Path(name) for name in names if not Path(name).exists())
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"out_dir: {path} can't be made: {error.strerror}") from None
    return path


def _toml(config: TrainConfig) -> bytes:
    """Every setting of a run: `--config` on this file repeats it."""
    values = {**vars(config), **vars(config.model)}
    names = [n for n in settings(TrainConfig) if values[n] is not None and n not in ("config", "resume")]
    lines = (f"{n} = {json.dumps(values[n])}" for n in names)
    return ("\n".join(lines) + "\n").encode()


def _indented(text: str) -> str:
    printable = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
    return "\n".join(f"  | {line}" for line in printable.split("\n"))


def main(args: Sequence[str]) -> None:
    on_gpu = cli.given(TrainConfig, args).get("device") != "cpu" and mx.is_available(mx.gpu)
    fallback = "shakespeare-char" if on_gpu else "cpu"
    default, preset_names = cli.with_defaults(TrainConfig, args, fallback, _inherited)
    config = cli.parse(TrainConfig, args, "mlxgpt.train", default)
    vocab_given = "vocab_size" in preset_names | set(cli.given(TrainConfig, args))
    Run(config, Console(), vocab_given).train()


if __name__ == "__main__":
    cli.run("mlxgpt.train", main)
