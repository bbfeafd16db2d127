"""How often training waits for the device, as on a GPU: MLX's own operations, compiled, on whatever device there is."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxgpt import train
from mlxgpt.generation.decoding import Decoder
from mlxgpt.generation.evaluation import evaluate
from mlxgpt.generation.sampling import Sampler
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training import run
from mlxgpt.training.recipe import TrainConfig
from mlxgpt.training.trainer import Trainer

SHAPE = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16)


class Witness:
    """Notes each evaluation that is started, each wait for one, and each trace of a compiled function.

    What belongs to one evaluation can be read when all of it is computed. So a wait is noted as the number of the
    evaluation that is waited for, once for each; and as the newest for an array that was in none.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, Any]] = []
        self.evaluations = 0
        self._waited_for = 0
        self._arrays: dict[int, tuple[mx.array, int]] = {}  # held, so that no other array gets the same id
        for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
            monkeypatch.setattr(mx.array, name, self._reading(getattr(mx.array, name)))
        for name in ("array", "asarray"):
            monkeypatch.setattr(np, name, self._reading(getattr(np, name)))
        for name in ("eval", "async_eval"):
            monkeypatch.setattr(mx, name, self._evaluating(name, getattr(mx, name)))
        compile = mx.compile
        monkeypatch.setattr(mx, "compile", lambda function, *args, **kw: compile(self._traced(function), *args, **kw))

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def clear(self) -> None:
        self.events.clear()

    def _reading(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def read(a: Any, *args: Any, **options: Any) -> Any:
            if isinstance(a, mx.array):
                self._wait(self._arrays.get(id(a), (a, self.evaluations + 1))[1])
            return function(a, *args, **options)

        return read

    def _evaluating(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*trees: Any) -> None:
            self.evaluations += 1
            self.events.append((name, self.evaluations))
            for _, a in tree_flatten(trees):
                if isinstance(a, mx.array):
                    self._arrays.setdefault(id(a), (a, self.evaluations))
            function(*trees)
            if name == "eval":
                self._wait(self.evaluations)

        return evaluate

    def _wait(self, evaluation: int) -> None:
        if evaluation > self._waited_for:
            self._waited_for = min(evaluation, self.evaluations)
            self.events.append(("wait", evaluation))

    def _traced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def trace(*args: Any) -> Any:
            self.events.append(("trace", function.__name__))
            return function(*args)

        return trace


def test_the_witness_sees_what_it_should(monkeypatch):
    witness = Witness(monkeypatch)
    double = mx.compile(lambda x: 2 * x)
    x, y = double(mx.array(1.0)), double(mx.array([1.0, 2.0]))
    mx.async_eval(x)
    mx.async_eval([y])
    assert (x.item(), x.item(), np.asarray(y).tolist()) == (2, 2, [2, 4])
    mx.eval(x)
    assert bool(mx.array(1.0) + 1)
    names = ["trace", "trace", "async_eval", "async_eval", "wait", "wait", "eval", "wait", "wait"]
    assert witness.names() == names
    assert [number for name, number in witness.events if name == "wait"] == [1, 2, 3, 4]


@pytest.mark.parametrize(("dtype", "compiled"), [("float32", True), ("float16", False)])  # float16 compiles for 30 s
def test_a_step_waits_once_at_most_and_never_for_itself(monkeypatch, tmp_path, switch_off_kernels, dtype, compiled):
    """And a compiled one is traced in the first step only."""
    switch_off_kernels()
    witness, steps = Witness(monkeypatch), []
    monkeypatch.setattr(run, "Trainer", functools.partial(Trainer, compiled=compiled))
    step = Trainer.step

    def observed(self: Trainer, *args: Any, **options: Any) -> mx.array:
        steps.append(len(witness.events))
        return step(self, *args, **options)

    monkeypatch.setattr(Trainer, "step", observed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    flags = (
        f"--data text.txt --out_dir run --dtype {dtype} --dropout 0.1 --n_layer 1 --n_head 2 --n_embd 16 "
        "--block_size 16 --batch_size 4 --gradient_accumulation_steps 2 --max_iters 6 --eval_interval 6 "
        "--eval_iters 3 --log_interval 1 --sample_tokens 0 --warmup_iters 3"
    )
    train.main(flags.split())
    assert len(steps) == 6
    for number, (start, end) in enumerate(itertools.pairwise(steps), 1):
        events = witness.events[start:end]
        names, waits = [name for name, _ in events], [which for name, which in events if name == "wait"]
        newest = max(which for name, which in events if name == "async_eval")
        assert names.count("async_eval") == 2, number  # one for each micro-batch, the last with the update
        assert "eval" not in names, number
        assert waits == ([newest - 2] if number > 1 else []), number  # for the step before
        assert ("trace" in names) == (compiled and number == 1), number


def test_an_evaluation_waits_once(monkeypatch, switch_off_kernels):
    switch_off_kernels()
    witness = Witness(monkeypatch)
    trainer = Trainer(GPT(SHAPE), TrainConfig(model=SHAPE), compiled=True)
    batches = [(np.full((2, 16), n, np.int32), np.full((2, 16), n + 1, np.int32)) for n in range(5)]
    first = trainer.evaluate(batches)
    assert witness.names().count("trace") == 1
    witness.clear()
    assert trainer.evaluate(batches) == first
    assert witness.names() == ["async_eval"] * 5 + ["wait"]


def test_a_text_is_evaluated_a_batch_ahead(monkeypatch, switch_off_kernels):
    switch_off_kernels()
    witness = Witness(monkeypatch)
    evaluate(GPT(SHAPE), np.arange(65) % 32, stride=16, batch_size=1)
    assert witness.events == [
        ("async_eval", 1), ("async_eval", 2), ("wait", 1), ("async_eval", 3), ("wait", 2), ("async_eval", 4),
        ("wait", 3), ("wait", 4),
    ]  # fmt: skip


def test_a_sample_is_read_while_the_next_token_is_computed(monkeypatch, switch_off_kernels):
    switch_off_kernels()
    witness = Witness(monkeypatch)
    steps = Decoder(GPT(SHAPE), [[1, 2, 3]], Sampler(), logprobs=True)
    next(steps)
    for _ in range(8):
        witness.clear()
        next(steps)
        assert [name for name in witness.names() if name != "trace"] == ["async_eval", "async_eval", "wait"]
        assert witness.events[-1] == ("wait", witness.evaluations - 1)  # the last is of the next token's logits
