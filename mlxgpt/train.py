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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from rich.console import Console

from . import checkpoint, cli, data, kernels, ops, report, tokenizer
from .config import TrainConfig, settings
from .model import GPT
from .optim import AdamW, clip_grad_norm, learning_rate

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, each (B, T)


class Trainer:
    """A model, its optimizer, and the two things done with them: a step, and an evaluation.

    The weights and the optimizer's state are float32; with dtype bfloat16 the loss and its gradient are
    computed in bfloat16 from a copy of the weights. On a GPU both are compiled.
    """

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.optimizer = AdamW(config)
        self.optimizer.init(model.parameters())
        self.steps = 0  # optimizer steps taken
        compute = getattr(mx, config.dtype)

        def loss(weights: dict[str, Any], x: mx.array, y: mx.array) -> mx.array:
            model.update(tree_map(lambda w: w.astype(compute), weights))
            return model.loss(x, y)

        def with_weights(function: Callable[..., Any], x: mx.array, y: mx.array) -> Any:
            weights = model.parameters()
            result = function(weights, x, y)
            model.update(weights)  # the float32 ones again
            return result

        def gradient(x: mx.array, y: mx.array) -> tuple[mx.array, dict[str, Any]]:
            return with_weights(mx.value_and_grad(loss), x, y)

        def update(gradients: dict[str, Any]) -> None:
            if config.grad_clip:
                gradients, _ = clip_grad_norm(gradients, config.grad_clip)
            self.optimizer.update(model, gradients)

        def evaluation(x: mx.array, y: mx.array) -> mx.array:
            return with_weights(loss, x, y)

        if _compiles(config):
            state = [model.state, self.optimizer.state]
            gradient = mx.compile(gradient, [model.state, mx.random.state], [mx.random.state])
            update = mx.compile(update, state, state)
            evaluation = mx.compile(evaluation, [model.state])
        self._gradient, self._update, self._evaluation = gradient, update, evaluation
        self._in_place = kernels.available(compute)
        self._gradients: list[mx.array] = []

    def step(self, batches: Sequence[Batch]) -> mx.array:
        """One optimizer step on the mean gradient of some micro-batches -> their mean loss, a scalar."""
        if not self.model.training:
            self.model.train()
        self.optimizer.learning_rate = learning_rate(self.config, self.steps)
        self.steps += 1
        if self._in_place:
            return self._step_in_place(batches)
        (x, y), *others = batches
        loss, gradients = self._gradient(mx.array(x), mx.array(y))
        for x, y in others:
            mx.eval(loss, gradients)  # so that one micro-batch's activations are held at a time
            sums = loss, gradients
            loss, gradients = tree_map(mx.add, sums, self._gradient(mx.array(x), mx.array(y)))
        if others:
            loss, gradients = tree_map(lambda a: a / len(batches), (loss, gradients))
        self._update(gradients)
        mx.async_eval(loss, self.model.state, self.optimizer.state)
        return loss

    def _step_in_place(self, batches: Sequence[Batch]) -> mx.array:
        """The same on the CPU's kernels, in memory that is kept from step to step."""
        weights = self.optimizer.own_weights(self.model)
        if not self._gradients:
            self._gradients = [mx.zeros(w.shape) for w in weights]
        kernels.zero(self._gradients)
        add = functools.partial(kernels.add_gradients, weights, self._gradients, 1 / len(batches), self.model.loss)
        losses = [add(mx.array(x), mx.array(y)).item() for x, y in batches]
        self.optimizer.update_in_place(weights, self._gradients, self.config.grad_clip)
        return mx.array(sum(losses) / len(losses))

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss over some batches, without dropout."""
        self.model.eval()
        loss = functools.partial(kernels.run, self.model.loss) if self._in_place else self._evaluation
        return sum(float(loss(mx.array(x), mx.array(y))) for x, y in batches) / len(batches)


def _compiles(config: TrainConfig) -> bool:
    """On a GPU; the CPU's kernels run at once and leave no graph to compile."""
    return config.compile and mx.default_device().type == mx.gpu


class Run:
    """A training run and its directory: settings.toml, metrics.jsonl, loss.png, the models best/ and last/."""

    def __init__(self, config: TrainConfig, console: Console, vocab_given: bool) -> None:
        self.config, self.console = config, console
        device = ops.use_device(config.device)
        corpus = data.load_corpus(config.data)
        self.tokenizer: tokenizer.Tokenizer
        if config.tokenizer == "gpt2":
            self.tokenizer = tokenizer.BPETokenizer.gpt2()
        else:
            self.tokenizer = tokenizer.CharTokenizer.of(*corpus.train, *corpus.val)
        model_config = config.model
        if not vocab_given:
            model_config = dataclasses.replace(model_config, vocab_size=self.tokenizer.vocab_size)
        elif model_config.vocab_size < self.tokenizer.vocab_size:
            least = f"at least the tokenizer's {self.tokenizer.vocab_size}"
            raise ValueError(f"vocab_size is {model_config.vocab_size}, expected {least}")
        mx.random.seed(config.seed)
        self.model = GPT(model_config)  # lazy: no memory is taken yet
        _check_memory(self.model)
        train, val = (data.encode(self.tokenizer, documents) for documents in (corpus.train, corpus.val))
        shape = (model_config.block_size, config.batch_size)
        self.batches = data.Batches(train, *shape, config.seed, "training")
        validation = data.Batches(val, *shape, config.seed + 1, "validation")
        self.val_batches = [validation.draw() for _ in range(config.eval_iters)]

        self.out_dir = _make_out_dir(config)
        checkpoint.write_file(self.out_dir / "settings.toml", _toml(dataclasses.replace(config, model=model_config)))
        self.metrics = report.Metrics(self.out_dir / "metrics.jsonl")
        self.best, self.best_step = math.inf, 0
        self.trainer = Trainer(self.model, config)

        files = f"{len(corpus.train)} + {len(corpus.val)} files" if len(corpus.train) > 1 else "one file"
        skipped = f", {corpus.skipped} skipped as not UTF-8 text" if corpus.skipped and config.data != "stdlib" else ""
        how = "the C++ kernels" if kernels.available() else "MLX alone"
        device_name = "GPU" if device.type == mx.gpu else f"CPU with {how}"
        report.say(
            console,
            f"data: {corpus.name}, {files}{skipped}; {len(train):,} training and {len(val):,} validation tokens",
        )
        report.say(
            console,
            f"model: {self.model.n_params():,} parameters; {model_config.n_layer} layers, {model_config.n_head} heads "
            f"of {model_config.head_dim}, {model_config.n_embd} wide, {model_config.block_size} positions, "
            f"{model_config.vocab_size} token ids",
        )
        report.say(console, f"device: {device_name}, {config.dtype}; writing to {self.out_dir}")

    def train(self) -> None:
        """All steps, with an evaluation before the first, every eval_interval and after the last.

        Ctrl-C finishes the step, evaluates, saves and ends as the last step would.
        """
        config = self.config
        interrupted = _Interrupt()
        tokens_per_step = config.gradient_accumulation_steps * config.batch_size * self.model.config.block_size
        losses: list[mx.array] = []
        self._evaluate()
        with report.Progress(self.console, config.max_iters, tokens_per_step) as progress, interrupted:
            for step in range(1, config.max_iters + 1):
                batches = [self.batches.draw() for _ in range(config.gradient_accumulation_steps)]
                lr = learning_rate(config, step - 1)
                losses.append(self.trainer.step(batches))
                last = step == config.max_iters or interrupted.asked
                if step % config.log_interval == 0 or step == 1 or last:
                    loss = self._finite(float(mx.stack(losses).mean()))
                    speed = progress.log(step, loss, lr)
                    self.metrics.add(step=step, loss=loss, lr=lr, tokens_per_s=speed)
                    losses = []
                if step % config.eval_interval == 0 or last:
                    with progress.paused():
                        self._evaluate()
                if last:
                    break
        self._summary()

    def _evaluate(self) -> None:
        """The validation loss; after the first step also a sample, the curve, and the model saved as last,
        and as best if it is."""
        loss, step = self._finite(self.trainer.evaluate(self.val_batches)), self.trainer.steps
        self.metrics.add(step=step, val_loss=loss)
        best = step > 0 and loss < self.best
        report.say(self.console, f"step {step}: validation loss {loss:.4f}{' (best so far)' if best else ''}", "bold")
        if step == 0:
            return
        checkpoint.save_model(self.out_dir / "last", self.model, self.tokenizer)
        if best:
            checkpoint.save_model(self.out_dir / "best", self.model, self.tokenizer)
            self.best, self.best_step = loss, step
        report.draw_loss(self.metrics, self.out_dir / "loss.png", self.out_dir.name)
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
        self.model.eval()
        ids = mx.array([[self.tokenizer.start]], mx.int32)
        tokens = self.model.generate(ids, temperature=0.8, seed=self.config.seed, vocab_size=self.tokenizer.vocab_size)
        return tokenizer.decode(self.tokenizer, [int(t) for t in itertools.islice(tokens, self.config.sample_tokens)])

    def _summary(self) -> None:
        print(report.terminal_curve(self.metrics, self.console))
        what = "done" if self.trainer.steps == self.config.max_iters else "stopped"
        best = f"best validation loss {self.best:.4f} at step {self.best_step}"
        report.say(self.console, f"{what} after {self.trainer.steps} steps; {best}", "bold")
        report.say(self.console, f"loss curve: {self.out_dir / 'loss.png'}")
        report.say(self.console, f"sample more: python -m mlxgpt.generate --model {self.out_dir / 'best'}")


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
    lines = (f"{n} = {json.dumps(values[n])}" for n in settings(TrainConfig) if values[n] is not None and n != "config")
    return ("\n".join(lines) + "\n").encode()


def _indented(text: str) -> str:
    printable = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
    return "\n".join(f"  | {line}" for line in printable.split("\n"))


def main(args: Sequence[str]) -> None:
    on_gpu = cli.given(TrainConfig, args).get("device") != "cpu" and mx.is_available(mx.gpu)
    default, preset_names = cli.with_defaults(TrainConfig, args, "shakespeare-char" if on_gpu else "cpu")
    config = cli.parse(TrainConfig, args, "mlxgpt.train", default)
    vocab_given = "vocab_size" in preset_names | set(cli.given(TrainConfig, args))
    Run(config, Console(), vocab_given).train()


if __name__ == "__main__":
    cli.run("mlxgpt.train", main)
