"""python -m mlxgpt.train: trains a GPT on text, and shows how it comes along."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

from .common import cli, disk
from .common.console import say
from .common.settings import settings
from .cpu import operations as kernels
from .data import dataset
from .data.tokenizer import Tokenizer, decode, kind_of
from .data.windows import Prefetch, Windows
from .formats import training_state
from .generation.decoding import Decoder
from .generation.sampling import Sampler
from .model import ops
from .model.gpt import GPT
from .training import device, distributed, loggers, plot
from .training import metrics as report
from .training import origin as start
from .training.distributed import Group
from .training.optim import learning_rate
from .training.recipe import TrainConfig, preset
from .training.trainer import Batch, Trainer


class Run:
    """A training run and its directory: settings.toml, metrics.jsonl, loss.png, checkpoints, and the links `best` and
    `last` to two of them. Of several ranks only the first writes and speaks.

    Whatever is drawn at random follows from the seed and a number: of the step, the window, the micro-batch. So a run
    that goes on from a checkpoint is the run that was never broken off.
    """

    def __init__(
        self, config: TrainConfig, given: set[str], begin: start.Start | None, console: Console, group: Group
    ) -> None:
        """Checks and loads everything, and only then writes. `given` are the settings that somebody has chosen."""
        self.console, self.group = console, group
        where = ops.use_device(config.device)
        if begin:
            begin.require_shape(config)
        of_model = (begin.tokenizer, begin.path) if begin else ()
        self.data = dataset.load(config.data, config.tokenizer, "tokenizer" in given, *of_model)
        self.tokenizer = self.data.tokenizer
        self.config = config = _of_the_tokenizer(config, self.tokenizer, "vocab_size" in given)
        self.first_step = begin.step if begin else 0  # of optimizer steps taken before
        before = begin.progress if begin else {}
        if begin:
            begin.require_same_run(config, self.data)
        mx.random.seed(config.seed)
        self.model = GPT(config.model)  # lazy: no memory is taken yet
        _check_memory(self.model, config)
        self._share = distributed.share(config.batch_size, config.gradient_accumulation_steps, group.rank, group.size)
        self._windows_per_step = config.batch_size * config.gradient_accumulation_steps  # of all ranks
        self._windows_before = before.get("windows", self.first_step * self._windows_per_step)
        self.batches = self._windows_of(self.data.train, config.seed, "training")
        validation = self._windows_of(self.data.val, config.seed + 1, "validation")
        self.val_batches = [validation.draw(n * config.batch_size, config.batch_size) for n in range(config.eval_iters)]

        if begin:
            begin.put_weights(self.model)
        start.choose_trained(self.model, config, begin)
        self.trainer = Trainer(self.model, config, group)
        if begin and begin.record:
            training_state.load_training_state(begin.path, self.model, self.trainer.optimizer)
            self.trainer.steps = self.first_step
        common = {name: value for name, value in _all_settings(config).items() if name not in _OF_A_RANK}
        group.agree({**common, "the data's SHA-256": self.data.fingerprint, "the step": self.first_step})
        self.model.update(group.broadcast(self.model.parameters()))  # machines may round random numbers differently

        self.losses: list[float] = before.get("losses", [])  # since the last line of the log
        self._before = before.get("tokens", 0), before.get("seconds", 0.0)
        self.spikes = report.Spikes(config.spike_threshold, before.get("spikes"))
        self.skipped_in_row = before.get("skipped_in_row", 0)
        self._pending: list[tuple[int, Any, Any]] = []  # steps, their losses and norms, that nobody has looked at yet
        home = begin.home(config) if begin else None
        self.is_new = home is None
        self.out_dir = home or _make_out_dir(config, group)
        self.best, self.best_step = math.inf, 0
        if begin and begin.record and (self.out_dir / "best").is_dir():
            self.best_step = before.get("best_step", 0)
            if begin.record["best_val_loss"] is not None:
                self.best = begin.record["best_val_loss"]
        self._introduce(begin, where)

    def _windows_of(self, shards: Sequence[Any], seed: int, name: str) -> Windows:
        return Windows(shards, self.config.model.block_size, seed, name, self.config.model.vocab_size)

    def _introduce(self, begin: start.Start | None, where: mx.Device) -> None:
        """Writes the run's first files, and says what it is."""
        config, shape, writes = self.config, self.config.model, self.group.rank == 0
        after = None if self.is_new else self.first_step
        if writes:
            disk.write_file(self.out_dir / "settings.toml", _toml(config))
        others = loggers.start(config, self.out_dir, after, _all_settings(config), self._say) if writes else []
        self.metrics = report.Metrics(self.out_dir / "metrics.jsonl" if writes else None, after, others)
        self.checkpoints = training_state.Checkpoints(self.out_dir, config.keep_last) if writes else None
        if self.checkpoints:
            self.group.on_death(self.checkpoints.wait)
        n_train, n_val = self.data.sizes()
        how = "GPU" if where.type == mx.gpu else f"CPU with {'the C++ kernels' if kernels.available() else 'MLX alone'}"
        self._say(
            f"data: {self.data.name}, {self.data.description}; {n_train:,} training and {n_val:,} validation tokens"
        )
        self._say(
            f"model: {self.model.n_params():,} parameters; {shape.n_layer} layers, {shape.n_head} heads of "
            f"{shape.head_dim}, {shape.n_embd} wide, {shape.block_size} positions, {shape.vocab_size} token ids"
        )
        for line in begin.introduction(config) if begin else []:
            self._say(line)
        self._say(f"device: {how}, {config.dtype}; writing to {self.out_dir}")
        if self.group.size > 1:
            self._say(f"ranks: {', '.join(self.group.names)}")

    def _say(self, text: str, style: str = "") -> None:
        say(self.console, text, style)

    def train(self) -> None:
        """All steps, with an evaluation before the first, every eval_interval and after the last.

        Ctrl-C or SIGTERM finishes the step, saves, and ends.
        """
        config, interrupted = self.config, _Interrupt()
        save_interval = config.save_interval or config.eval_interval
        draw, (tokens, seconds) = Prefetch(self._micro_batches), self._before
        progress = report.Progress(
            self.console, self.first_step, config.max_iters, self._windows_per_step * config.model.block_size,
            eval_interval=config.eval_interval, flops_per_token=device.training_flops(config.model),
            peak_flops=device.peak_flops(config.dtype) * self.group.size, tokens=tokens, seconds=seconds,
        )  # fmt: skip
        with interrupted, progress:
            if self.is_new:
                with progress.paused():
                    self._evaluate()
            for step in range(self.first_step + 1, config.max_iters + 1):
                loss = self.trainer.step(draw(step))
                self._pending.append((step, loss, self.trainer.norm))
                stop, done = self.group.any(interrupted.asked), step == config.max_iters
                evaluates = step % config.eval_interval == 0 or done
                saves = step % save_interval == 0 or evaluates or stop
                logs = step % config.log_interval == 0 or step == 1 or done
                self._look(all_of_them=logs or saves)
                if logs:
                    self._log(progress, step)
                if saves:
                    with progress.paused():
                        best = evaluates and self._evaluate()
                        if evaluates or stop:
                            self._draw()
                        if not self.skipped_in_row or done:  # else the weights may be why the last loss is not finite
                            self._save(best, progress)
                elif self.checkpoints:
                    self.checkpoints.check()
                if stop:
                    break
        self._end()

    def _micro_batches(self, step: int) -> list[Batch]:
        """This rank's share of a step's windows."""
        before = self._windows_after(step - 1)
        return [self.batches.draw(before + windows.start, len(windows)) for windows in self._share]

    def _windows_after(self, steps: int) -> int:
        """How many windows all ranks have drawn by then: the position in the data."""
        return self._windows_before + (steps - self.first_step) * self._windows_per_step

    def _look(self, all_of_them: bool) -> None:
        """At the losses of steps taken: of all, or of all but the newest, which a GPU may still be computing.

        ValueError when too many in a row were skipped.
        """
        while len(self._pending) > (0 if all_of_them else 1):
            step, *values = self._pending.pop(0)
            loss, norm = map(float, values)
            self.grad_norm = norm
            if math.isfinite(loss) and math.isfinite(norm):
                self.losses.append(loss)
                self.skipped_in_row = 0
                if (above := self.spikes.seen(loss)) is not None:
                    self.metrics.add(step=step, event="spike", value=loss, deviations=above)
                    self._say(f"step {step}: the loss jumps to {loss:.4f}, {above:.1f} standard deviations", "yellow")
                continue
            self.skipped_in_row += 1
            self.metrics.add(step=step, event="skipped", in_row=self.skipped_in_row)
            self._say(f"step {step} is skipped: loss {loss}, norm of the gradient {norm}", "yellow")
            if self.skipped_in_row >= self.config.max_skipped:
                self._diverged(f"{self.skipped_in_row} steps in a row, to step {step}, had no finite loss and gradient")

    def _log(self, progress: report.Progress, step: int) -> None:
        if self.losses:  # not all were skipped
            loss, lr = sum(self.losses) / len(self.losses), learning_rate(self.config, step - 1)
            self.metrics.add(step=step, loss=loss, lr=lr, grad_norm=self.grad_norm, **progress.log(step, loss, lr))
            self.losses = []

    def _evaluate(self) -> bool:
        """The validation loss, and after the first step a sample -> whether it is the lowest loss so far."""
        loss, step = self.trainer.evaluate(self.val_batches), self.trainer.steps
        if not math.isfinite(loss):
            self._diverged(f"the validation loss is {loss} at step {step}")
        self.metrics.add(step=step, val_loss=loss)
        best = step > self.first_step and loss < self.best and not self.skipped_in_row
        self._say(f"step {step}: validation loss {loss:.4f}{' (best so far)' if best else ''}", "bold")
        if best:
            self.best, self.best_step = loss, step
        if step > self.first_step and self.config.sample_tokens and self.group.rank == 0:
            self._say(_indented(self.sample()), "dim")
        return best

    def _save(self, best: bool, progress: report.Progress) -> None:
        """A checkpoint, written while training goes on. OSError if an earlier one couldn't be."""
        if self.checkpoints is None:
            return
        steps = self.trainer.steps
        state = training_state.TrainingState(
            self.trainer.optimizer, steps, self.best if math.isfinite(self.best) else None,
            start.kept_settings(self.config),
            progress={
                "data": self.data.fingerprint, "windows": self._windows_after(steps),
                "best_step": self.best_step, "losses": self.losses, "spikes": self.spikes.state,
                "skipped_in_row": self.skipped_in_row, **progress.totals(steps),
            },
        )  # fmt: skip
        disk.sync(self.out_dir / "metrics.jsonl")  # so that a checkpoint never knows more than the metrics
        self.checkpoints.save(self.model, self.tokenizer, state, best)

    def _draw(self) -> None:
        if self.group.rank == 0:
            plot.draw_losses({self.out_dir.name: self.metrics}, self.out_dir / "loss.png", title=self.out_dir.name)

    def _diverged(self, what: str) -> None:
        """ValueError, when the checkpoint that is being written is on the disk."""
        if self.checkpoints:
            self.checkpoints.wait()
        last = self.out_dir / "last"
        kept = f"; the last good checkpoint is {last.resolve().name}" if last.exists() else ""
        raise ValueError(f"{what}: training has diverged; try a learning_rate below {self.config.learning_rate}{kept}")

    def sample(self) -> str:
        """Text from the model as it is, from an empty prompt; the same seed each time."""
        sampler = Sampler(temperature=0.8, seed=self.config.seed)
        steps = Decoder(self.model, [[self.tokenizer.start]], sampler, vocab_size=self.tokenizer.vocab_size)
        tokens = [int(step.tokens[0]) for step in itertools.islice(steps, self.config.sample_tokens)]
        return decode(self.tokenizer, tokens)

    def _end(self) -> None:
        if self.checkpoints:
            self.checkpoints.wait()
        self.metrics.close()
        curves = {"training": self.metrics.curve("loss"), "validation": self.metrics.curve("val_loss")}
        if self.group.rank == 0:
            print(plot.terminal_losses(curves, self.console))
        steps = self.trainer.steps, self.config.max_iters
        head, *rest = report.summary(self.metrics, *steps, self.out_dir).splitlines()
        self._say(head, "bold")
        self._say("\n".join(rest))


class _Interrupt:
    """While it is entered, a first Ctrl-C, SIGTERM or SIGHUP only sets `asked`; a second one interrupts.

    SIGHUP is what Ctrl-C in mlx.launch makes of itself on the far side of an ssh; nohup's stays ignored.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> None:
        signals = [signal.SIGINT, signal.SIGTERM]
        signals += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        self._handlers = {s: signal.signal(s, self._ask) for s in signals}

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _of_the_tokenizer(config: TrainConfig, tokenizer: Tokenizer, vocab_given: bool) -> TrainConfig:
    """The settings with the tokenizer's name and, unless it was given, its number of ids."""
    shape = config.model
    if not vocab_given:
        shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    elif shape.vocab_size < tokenizer.vocab_size:
        least = f"at least the tokenizer's {tokenizer.vocab_size}"
        raise ValueError(f"vocab_size is {shape.vocab_size}, expected {least}")
    return dataclasses.replace(config, tokenizer=kind_of(tokenizer), model=shape)  # type: ignore[arg-type]


def _check_memory(model: GPT, config: TrainConfig) -> None:
    """MemoryError for a model that can't be trained here. (A GPU's own allocator says so; MLX on a CPU crashes.)"""
    if mx.default_device().type == mx.gpu:
        return
    # float32 weights, and unless adapters alone are trained gradients and AdamW's two averages
    needed = 4 * (1 if config.lora_rank else 4) * model.n_params()
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise MemoryError(
            f"model: {model.n_params():,} parameters take {needed / 1e9:,.0f} GB to train, "
            f"this machine has {available / 1e9:,.0f} GB"
        )


def _make_out_dir(config: TrainConfig, group: Group) -> Path:
    """The run's directory, made by the first rank. ValueError if it holds a run that may not be overwritten."""
    if config.out_dir:
        path = Path(config.out_dir).expanduser()
        if group.rank == 0 and ((path / "metrics.jsonl").exists() or (path / "config.json").exists()):
            if not config.overwrite:
                raise ValueError(f"out_dir: {path} already holds a run; give another, or --overwrite")
            training_state.clear(path)
    else:
        names = (f"runs/{config.preset}{n}" for n in itertools.chain([""], (f"-{i}" for i in itertools.count(2))))
        path = next(Path(name) for name in names if not Path(name).exists())
    try:
        if group.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"out_dir: {path} can't be made: {error.strerror}") from None
    return path


_OF_A_RANK = ("data", "out_dir", "overwrite", "init_from")  # paths may differ: what they lead to is compared


def _all_settings(config: TrainConfig) -> dict[str, Any]:
    """Every setting of a run by its flat name, but where it is written and what it began from."""
    values = {**vars(config), **vars(config.model)}
    return {name: values[name] for name in settings(TrainConfig) if name not in ("config", "resume")}


def _toml(config: TrainConfig) -> bytes:
    """Every setting of a run: `--config` on this file repeats it."""
    values = {name: value for name, value in _all_settings(config).items() if value is not None}
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()).encode()


def _indented(text: str) -> str:
    printable = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return "\n".join(f"  | {line}" for line in printable.split("\n"))


def main(args: Sequence[str]) -> None:
    with distributed.start() as group:
        on_gpu = cli.given(TrainConfig, args).get("device") != "cpu" and mx.is_available(mx.gpu)
        begin = start.Begin()
        fallback = "shakespeare-char" if on_gpu else "cpu"
        default, names = cli.with_defaults(TrainConfig, args, preset, fallback, begin.settings)
        config = cli.parse(TrainConfig, args, "mlxgpt.train", default)
        loggers.require(config)
        console = Console(quiet=group.rank > 0)
        if begin.anew:
            say(console, f"{config.resume} has no checkpoint yet: the run begins anew")
        Run(config, names | set(cli.given(TrainConfig, args)), begin.start, console, group).train()


if __name__ == "__main__":
    cli.run("mlxgpt.train", main)
