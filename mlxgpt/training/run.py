"""A training run and its directory: its steps, evaluations, log lines and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from rich.console import Console

from ..common import cli, disk
from ..common.console import say
from ..cpu import extension
from ..data import dataset
from ..data.dataset import Dataset
from ..data.tokenizer import decode, kind_of
from ..data.windows import Prefetch
from ..generation.decoding import Decoder
from ..generation.sampling import Sampler
from ..model import ops
from ..model.gpt import GPT
from . import checkpoints, device, device_memory, fitting, footprint, loggers, plot
from .batches import StepWindows, validation_batches
from .checkpoints import Checkpoints, TrainingState
from .distributed import Group
from .interrupt import Interrupt
from .metrics import METRICS, LossMonitor, Metrics
from .optim import learning_rate
from .origin import Origin, choose_trained, kept_settings, outline
from .progress import Progress, summary
from .recipe import TrainConfig
from .trainer import Trainer


class Run:
    """A training run and its directory, which holds settings.toml, metrics.jsonl, loss.png, checkpoints, and the links
    `best` and `last` to two of them. With several ranks only rank 0 writes and prints.

    Each random draw follows from the seed and a number: of the step, the window or the micro-batch. So a run that
    continues from a checkpoint takes the same steps as one that was never interrupted.
    """

    def __init__(
        self, config: TrainConfig, chosen: set[str], origin: Origin | None, console: Console, group: Group
    ) -> None:
        """Checks and loads everything, and only then writes. `chosen` are the settings that somebody has set.

        ValueError, FileNotFoundError, MemoryError.
        """
        self.console, self.group, self.origin = console, group, origin
        saved = origin.progress if origin else {}
        self.first_step = origin.step if origin else 0  # the optimizer steps taken before
        self.device = ops.use_device(config.device)
        self.config, self.data = _open_data(config, chosen, origin)
        self.memory = device_memory.available()  # before the run takes any; None where it is not known
        self.config = self._fit(self.config)
        self.model = _build_model(self.config)
        self.windows = StepWindows(self.data.train, self.config, group, self.first_step, saved.get("windows"))
        self.val_batches = validation_batches(self.data.val, self.config)
        self.trainer = self._restore()
        self.losses = LossMonitor(self.config.spike_threshold, saved)
        self.tokens_before, self.seconds_before = saved.get("tokens", 0), saved.get("seconds", 0.0)
        self._unread: list[tuple[int, float, tuple[mx.array, ...]]] = []  # steps, when taken, loss, norm, loss scale
        self._whole_step = self._saved_step = self.first_step  # the last step taken, and the last in a checkpoint
        self._changing = False  # on the kernels, whether the next step has begun to change weights
        run_to_continue = origin.run_to_continue(self.config) if origin else None
        self.is_new = run_to_continue is None
        self.out_dir = run_to_continue or _make_directory(self.config, group)
        self.best = Best.of(origin, self.out_dir)
        self.metrics, self.checkpoints = self._open_directory()
        self._introduce()

    def _fit(self, config: TrainConfig) -> TrainConfig:
        """Says whether the run fits into memory, or with config.fit makes it fit, and sets a GPU's limits."""
        model = outline(config)
        device_memory.set_limits(self.memory, footprint.weights_and_averages(model))
        return fitting.fit(config, model, self.memory, self.group, self._say)

    def _restore(self) -> Trainer:
        """Gives the model and the optimizer the state that the run begins with, the same on all ranks."""
        config, group = self.config, self.group
        if self.origin:
            self.origin.load_weights(self.model)
        choose_trained(self.model, config, self.origin)
        trainer = Trainer(self.model, config, group)
        if self.origin and self.origin.record:
            checkpoints.restore_optimizer(self.origin.path, self.model, trainer.optimizer)
            trainer.steps = self.first_step
            if trainer.loss_scale and (saved := self.origin.progress.get("loss_scale")):
                trainer.loss_scale.restore(saved)
        common = {name: value for name, value in config.recorded().items() if name not in _MAY_DIFFER}
        group.agree({**common, "the data's SHA-256": self.data.fingerprint, "the step": self.first_step})
        self.model.update(group.broadcast(self.model.parameters()))  # machines may round random numbers differently
        return trainer

    def _open_directory(self) -> tuple[Metrics, Checkpoints | None]:
        """Writes the run's first files. Only rank 0 has checkpoints, and metrics on the disk."""
        after = None if self.is_new else self.first_step
        if self.group.rank > 0:
            return Metrics(None, after), None
        disk.write_file(self.out_dir / "settings.toml", self.config.toml())
        others = loggers.open_loggers(self.config, self.out_dir, after, self.config.recorded(), self._say)
        metrics = Metrics(self.out_dir / METRICS, after, others)
        writer = Checkpoints(self.out_dir, self.config.keep_last)
        self.group.on_death(writer.wait)
        return metrics, writer

    def _introduce(self) -> None:
        """Says what the run trains, on what, and where."""
        config, shape = self.config, self.config.model
        n_train, n_val = self.data.sizes()
        self._say(
            f"data: {self.data.name}, {self.data.description}; {n_train:,} training and {n_val:,} validation tokens"
        )
        self._say(
            f"model: {self.model.n_params():,} parameters; {shape.n_layer} layers, {shape.n_head} heads of "
            f"{shape.head_dim}, {shape.n_embd} wide, {shape.block_size} positions, {shape.vocab_size} token ids"
        )
        for line in self.origin.introduction(config) if self.origin else []:
            self._say(line)
        cpu = f"CPU with {'the C++ kernels' if self.trainer.in_place else 'MLX alone'}"
        where = "GPU" if self.device.type == mx.gpu else cpu
        self._say(f"device: {where}, {config.dtype}; writing to {self.out_dir}")
        if extension.available() and not self.trainer.in_place:
            self._say(f"{config.dtype} has no C++ kernels: on a CPU, --dtype float32 is many times faster", "yellow")
        if self.group.size > 1:
            self._say(f"ranks: {', '.join(self.group.names)}")

    def _say(self, text: str, style: str = "") -> None:
        say(self.console, text, style)

    def train(self) -> None:
        """Takes all steps, with an evaluation before the first, every eval_interval and after the last.

        Ctrl-C or SIGTERM finishes the step, saves, and ends. ValueError when training has diverged.
        """
        config, interrupt = self.config, Interrupt()
        batches_of = Prefetch(lambda step: self.trainer.on_device(self.windows.batches(step)))
        progress = Progress(
            self.console, self.first_step, config.max_iters, self.windows.per_step * config.model.block_size,
            eval_interval=config.eval_interval, flops_per_token=device.training_flops(config.model),
            peak_flops=device.peak_flops(config.dtype) * self.group.size,
            tokens=self.tokens_before, seconds=self.seconds_before,
        )  # fmt: skip
        with interrupt, progress, self._memory_errors_explained(progress):
            if self.is_new:
                with progress.paused():
                    self._evaluate()
            for step in range(self.first_step + 1, config.max_iters + 1):
                loss = self.trainer.step(batches_of(step), before_update=self._before_arrays_change)
                self._whole_step, self._changing = step, False
                self._unread.append((step, time.perf_counter(), (loss, self.trainer.norm, self.trainer.scale)))
                stop = self.group.any(interrupt.asked)
                self._after_step(step, stop, progress)
                if stop:
                    break
        self._finish()

    def _before_arrays_change(self) -> None:
        self._changing = True
        if self.checkpoints:
            self.checkpoints.before_arrays_change()

    def _after_step(self, step: int, stop: bool, progress: Progress) -> None:
        """Reads and logs losses, evaluates and saves, where the settings say so, and at the last step."""
        config = self.config
        done = step == config.max_iters
        evaluates = step % config.eval_interval == 0 or done
        saves = step % (config.save_interval or config.eval_interval) == 0 or evaluates or stop
        # A GPU may still be computing the newest step, and is not kept waiting: that is logged after the next one.
        self._read_losses(progress, all_of_them=saves or self.trainer.in_place)
        if saves:
            with progress.paused():
                best = evaluates and self._evaluate()
                if evaluates or stop:
                    self._draw()
                if not self.losses.skipped_in_row or done:  # else the weights may be why the last loss is not finite
                    self._save(best, progress)
        elif self.checkpoints:
            self.checkpoints.check()

    def _read_losses(self, progress: Progress, all_of_them: bool) -> None:
        """Reads and logs the losses of all steps taken, or of all but the newest.

        ValueError when too many steps in a row were skipped.
        """
        while len(self._unread) > (0 if all_of_them else 1):
            step, at, values = self._unread.pop(0)
            loss, norm, scale = map(float, values)
            self._note(step, loss, norm, scale)
            if step % self.config.log_interval == 0 or step in (1, self.config.max_iters):
                self._log(step, scale, progress, at if self._unread else time.perf_counter())

    def _note(self, step: int, loss: float, norm: float, scale: float) -> None:
        """Takes in a step's loss, and tells if it stands out. ValueError when too many in a row were skipped."""
        event = self.losses.add(loss, norm, scale)
        if event is None:
            return
        self.metrics.add(step=step, **event)
        if event["event"] == "spike":
            above = event["deviations"]
            self._say(f"step {step}: the loss jumps to {loss:.4f}, {above:.1f} standard deviations", "yellow")
        elif event["event"] == "overflow":
            self._say(f"step {step} is skipped: its gradient overflows at a loss scale of {scale:g}", "dim")
        else:
            self._say(f"step {step} is skipped: loss {loss}, norm of the gradient {norm}", "yellow")
            if (in_row := event["in_row"]) >= self.config.max_skipped:
                self._raise_diverged(f"{in_row} steps in a row, to step {step}, had no finite loss and gradient")

    def _log(self, step: int, scale: float, progress: Progress, at: float) -> None:
        loss, lr = self.losses.take_mean(), learning_rate(self.config, step - 1)
        if loss is not None:
            shown = progress.log(step, loss, lr, at)
            scaled = {"loss_scale": scale} if self.trainer.loss_scale else {}
            self.metrics.add(step=step, loss=loss, lr=lr, grad_norm=self.losses.grad_norm, **scaled, **shown)

    def _evaluate(self) -> bool:
        """Takes the validation loss, and after the first step a sample -> whether it is the lowest loss so far."""
        loss, step = self.trainer.evaluate(self.val_batches), self.trainer.steps
        if not math.isfinite(loss):
            self._raise_diverged(f"the validation loss is {loss} at step {step}")
        self.metrics.add(step=step, val_loss=loss)
        best = step > self.first_step and loss < self.best.loss and not self.losses.skipped_in_row
        self._say(f"step {step}: validation loss {loss:.4f}{' (best so far)' if best else ''}", "bold")
        if best:
            self.best = Best(loss, step)
        if step > self.first_step and self.config.sample_tokens and self.group.rank == 0:
            self._say(_indented(self.sample()), "dim")
        return best

    def _save(self, best: bool, progress: Progress) -> None:
        """Starts a checkpoint, which is written while training goes on. OSError if an earlier one couldn't be."""
        if self.checkpoints is None:
            return
        steps, scale = self.trainer.steps, self.trainer.loss_scale
        state = TrainingState(
            self.trainer.optimizer, steps, self.best.loss if math.isfinite(self.best.loss) else None,
            kept_settings(self.config),
            progress={
                "data": self.data.fingerprint, "windows": self.windows.drawn_after(steps),
                "best_step": self.best.step, **self.losses.state, **progress.totals(steps),
                **({"loss_scale": scale.saved()} if scale else {}),
            },
        )  # fmt: skip
        disk.sync(self.out_dir / METRICS)  # a checkpoint must not know of steps that the metrics don't have
        self.checkpoints.save(self.model, self.data.tokenizer, state, best)
        self._saved_step = steps

    def _draw(self) -> None:
        if self.group.rank == 0:
            plot.draw_losses({self.out_dir.name: self.metrics}, self.out_dir / "loss.png", title=self.out_dir.name)

    def _raise_diverged(self, what: str) -> None:
        """ValueError, once the checkpoint that is being written is on the disk."""
        if self.checkpoints:
            self.checkpoints.wait()
        wider = ", or --dtype bfloat16" if self.config.dtype == "float16" else ""
        advice = f"try a learning_rate below {self.config.learning_rate}{wider}"
        raise ValueError(f"{what}: training has diverged; {advice}{self._last_kept()}")

    @contextlib.contextmanager
    def _memory_errors_explained(self, progress: Progress) -> Iterator[None]:
        """While it is entered, memory that runs out is a MemoryError of one line, raised when all that is whole is on
        the disk."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not cli.is_out_of_memory(error):
                raise
            at, ranks = self.trainer.steps, self.group.size
            self._save_last_whole_step(progress)
            line = fitting.explain(error, at, self.model, self.config, self.memory, ranks)
            raise MemoryError(f"{line}{self._last_kept()}") from None

    def _save_last_whole_step(self, progress: Progress) -> None:
        """Saves what was trained before memory ran out, where the failed step has not touched it, and waits for the
        disk. By MLX's operations a step's arrays take the place of the last one's before they are computed."""
        if self.checkpoints is None:
            return
        touched = self._changing if self.trainer.in_place else self._unread or self.trainer.steps > self._whole_step
        if not touched and self._whole_step > self._saved_step:
            self._read_losses(progress, all_of_them=True)
            self.trainer.steps = self._whole_step
            if not self.losses.skipped_in_row:
                self._save(False, progress)
        self.checkpoints.wait()

    def _last_kept(self) -> str:
        last = self.out_dir / checkpoints.LAST
        return f"; the last good checkpoint is {last.resolve().name}" if last.exists() else ""

    def sample(self) -> str:
        """Text from the model as it is now, from an empty prompt, with the same seed each time."""
        tokenizer = self.data.tokenizer
        sampler = Sampler(temperature=0.8, seed=self.config.seed)
        steps = Decoder(self.model, [[tokenizer.start]], sampler, vocab_size=tokenizer.vocab_size)
        tokens = [int(step.tokens[0]) for step in itertools.islice(steps, self.config.sample_tokens)]
        return decode(tokenizer, tokens)

    def _finish(self) -> None:
        """Waits for the last checkpoint, and prints the loss curves and the summary."""
        if self.checkpoints:
            self.checkpoints.wait()
        self.metrics.close()
        curves = {"training": self.metrics.curve("loss"), "validation": self.metrics.curve("val_loss")}
        if self.group.rank == 0:
            print(plot.terminal_losses(curves, self.console))
        text = summary(self.metrics, self.trainer.steps, self.config.max_iters, self.out_dir)
        head, *rest = text.splitlines()
        self._say(head, "bold")
        self._say("\n".join(rest))


@dataclass(frozen=True)
class Best:
    """The lowest validation loss of a run so far, and its step."""

    loss: float = math.inf
    step: int = 0

    @classmethod
    def of(cls, origin: Origin | None, out_dir: Path) -> Best:
        """The best of the run that a checkpoint continues, if its model is still there."""
        if not (origin and origin.record and (out_dir / checkpoints.BEST).is_dir()):
            return cls()
        loss = origin.record["best_val_loss"]
        return cls(math.inf if loss is None else loss, origin.progress.get("best_step", 0))


def _open_data(config: TrainConfig, chosen: set[str], origin: Origin | None) -> tuple[TrainConfig, Dataset]:
    """Opens the data -> the settings with the tokenizer's name and, unless it was chosen, its number of ids; the data.

    ValueError if settings and data do not fit the model or checkpoint that the run begins with.
    """
    if origin:
        origin.require_shape(config)
    model_tokenizer, model = (origin.tokenizer, origin.path) if origin else (None, None)
    data = dataset.load(config.data, config.tokenizer, "tokenizer" in chosen, model_tokenizer, model)
    shape, tokenizer = config.model, data.tokenizer
    if "vocab_size" not in chosen:
        shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    elif shape.vocab_size < tokenizer.vocab_size:
        least = f"at least the tokenizer's {tokenizer.vocab_size}"
        raise ValueError(f"vocab_size is {shape.vocab_size}, expected {least}")
    config = dataclasses.replace(config, tokenizer=kind_of(tokenizer), model=shape)  # type: ignore[arg-type]
    if origin:
        origin.require_same_run(config, data)
    return config, data


def _build_model(config: TrainConfig) -> GPT:
    """A model with random weights, which are lazy: they take no memory yet."""
    mx.random.seed(config.seed)
    return GPT(config.model)


def _make_directory(config: TrainConfig, group: Group) -> Path:
    """A new run's directory, made by rank 0. ValueError if it holds a run that may not be overwritten."""
    if config.out_dir:
        path = Path(config.out_dir).expanduser()
        if group.rank == 0 and ((path / METRICS).exists() or (path / "config.json").exists()):
            if not config.overwrite:
                raise ValueError(f"out_dir: {path} already holds a run; give another, or --overwrite")
            checkpoints.clear(path)
    else:
        names = (f"runs/{config.preset}{n}" for n in itertools.chain([""], (f"-{i}" for i in itertools.count(2))))
        path = next(Path(name) for name in names if not Path(name).exists())
    try:
        if group.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"out_dir: {path} can't be made: {error.strerror}") from None
    return path


_MAY_DIFFER = ("data", "out_dir", "overwrite", "init_from")  # among ranks, as paths: what they lead to is compared


def _indented(text: str) -> str:
    printable = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return "\n".join(f"  | {line}" for line in printable.split("\n"))
