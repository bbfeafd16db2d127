"""Whether a run fits, and the settings that make it fit."""

from __future__ import annotations

import dataclasses
import json
import platform

import mlx.core as mx
import pytest

from mlxgpt.cpu import extension
from mlxgpt.model.config import GPTConfig
from mlxgpt.training import fitting
from mlxgpt.training.device_memory import DeviceMemory
from mlxgpt.training.distributed import Group
from mlxgpt.training.origin import outline
from mlxgpt.training.recipe import TrainConfig

GB = 10**9
SHAPE = GPTConfig(block_size=256, vocab_size=1000, n_layer=6, n_head=6, n_embd=384)
CONFIG = TrainConfig(batch_size=12, gradient_accumulation_steps=2, eval_iters=5, model=SHAPE)


@pytest.fixture
def on_gpu(monkeypatch) -> None:
    """The default device is a GPU, for those who ask."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


def needed(config: TrainConfig, ranks: int = 1) -> int:
    return fitting.run_memory(outline(config), config, ranks)


def memory_of(room: int) -> DeviceMemory:
    """Memory that has just this room for a run."""
    memory = DeviceMemory(64 * GB, -(-room * 10 // 9))
    assert memory.room == room
    return memory


def fitted(config: TrainConfig, memory: DeviceMemory | None, group: Group | None = None) -> tuple[TrainConfig, str]:
    lines: list[str] = []
    config = fitting.fit(config, outline(config), memory, group or Group(), lambda line, style: lines.append(line))
    assert len(lines) <= 1
    return config, "".join(lines)


def test_choices_are_the_smallest_changes_that_fit_and_come_in_order(on_gpu):
    model, before = outline(CONFIG), needed(CONFIG)
    parts = {"batch_size": "batches", "grad_checkpoint": "checkpointed", "dtype": "halved"}
    order = ["batches", "checkpointed", "batches checkpointed", "halved", "batches halved", "checkpointed halved"]
    seen = set()
    for room in range(before, 0, -before // 40):
        found = fitting.choices(model, CONFIG, room)
        kinds = [" ".join(parts[name] for name in parts if name in c.changes) for c in found]
        assert kinds == sorted(kinds, key=[*order, "batches checkpointed halved"].index)
        assert [c.is_single for c in found] == [" " not in kind for kind in kinds]
        for choice in found:
            changed = dataclasses.replace(CONFIG, **choice.changes)
            assert choice.memory == needed(changed) <= room
            assert changed.batch_size * changed.gradient_accumulation_steps == 24
            assert changed.batch_size * changed.eval_iters >= 60
            larger = [size for size in (8, 6, 4, 3, 2, 1) if size > changed.batch_size]
            if larger and changed.batch_size < 12:
                bigger = dataclasses.replace(
                    changed, batch_size=larger[-1], gradient_accumulation_steps=24 // larger[-1]
                )
                assert needed(bigger) > room
        seen.update(kinds)
    assert seen == {*order, "batches checkpointed halved"}


def test_a_cpu_is_offered_no_bfloat16():
    assert not any("dtype" in c.changes for c in fitting.choices(outline(CONFIG), CONFIG, 10**12))


def test_a_run_that_fits_is_left_alone():
    config = dataclasses.replace(CONFIG, fit=True)
    assert fitted(config, memory_of(needed(CONFIG))) == (config, "")


def test_a_run_that_does_not_fit_is_told_what_would(on_gpu):
    singles = [{"grad_checkpoint": True}, {"dtype": "bfloat16"}]
    room = max(needed(dataclasses.replace(CONFIG, **change)) for change in singles)
    config, line = fitted(CONFIG, memory_of(room))
    assert config == CONFIG
    for part in (
        "memory: the run takes about", "too much", "it fits with --batch_size ", " --gradient_accumulation_steps ",
        ", or with --grad_checkpoint (", ", or with --dtype bfloat16 (", "--fit does the first",
    ):  # fmt: skip
        assert part in line
    assert "\n" not in line


def test_fit_takes_the_first_and_says_so():
    room = needed(dataclasses.replace(CONFIG, batch_size=6))
    config, line = fitted(dataclasses.replace(CONFIG, fit=True), memory_of(room))
    assert (config.batch_size, config.gradient_accumulation_steps, config.eval_iters) == (6, 4, 10)
    assert (config.grad_checkpoint, config.dtype) == (False, "float32")
    assert "to fit, batch_size is 6, not 12, gradient_accumulation_steps is 4, not 2" in line


on_kernels = pytest.mark.skipif(
    not extension.is_there(), reason="by MLX's operations grad_checkpoint saves nothing in one window of this model"
)


@on_kernels
def test_fit_combines_where_one_change_is_not_enough():
    smallest = dataclasses.replace(CONFIG, batch_size=1, grad_checkpoint=True)
    config, _ = fitted(dataclasses.replace(CONFIG, fit=True), memory_of(needed(smallest)))
    assert (config.batch_size, config.gradient_accumulation_steps, config.grad_checkpoint) == (1, 24, True)


@on_kernels
def test_where_nothing_fits():
    room = needed(dataclasses.replace(CONFIG, batch_size=1, grad_checkpoint=True)) - 1
    config, line = fitted(CONFIG, memory_of(room))
    assert config == CONFIG
    assert "does not fit with --batch_size 1 --gradient_accumulation_steps 24 --eval_iters 60 --grad_checkpoint" in line
    with pytest.raises(MemoryError, match="take a smaller model or block_size, or train adapters"):
        fitted(dataclasses.replace(CONFIG, fit=True), memory_of(room))
    alone = dataclasses.replace(CONFIG, batch_size=1, gradient_accumulation_steps=1, grad_checkpoint=True)
    assert "no setting makes it less" in fitted(alone, memory_of(1000))[1]


def test_weights_that_are_more_than_the_device_has():
    with pytest.raises(MemoryError, match=r"model: 11,129,856 parameters take 178 MB to train, .* has 100 MB"):
        fitted(CONFIG, DeviceMemory(100_000_000, 90_000_000))


def test_memory_that_is_not_known():
    assert fitted(CONFIG, None) == (CONFIG, "")
    config = dataclasses.replace(CONFIG, fit=True)
    assert fitted(config, None) == (config, "memory: how much there is can't be told here, so --fit changes nothing")


@pytest.mark.parametrize("changes", [{"lora_rank": 4}, {"freeze": "wte,wpe,h.0,h.1"}])
def test_what_is_frozen_has_no_gradient_and_no_averages(changes):
    assert needed(dataclasses.replace(CONFIG, **changes)) < needed(CONFIG) - 12 * GPT_EMBEDDINGS


GPT_EMBEDDINGS = (SHAPE.vocab_size + SHAPE.block_size) * SHAPE.n_embd


# ---- several ranks ----


class OneOfTwo(Group):
    """Rank 0 of two, of which the other has told a host and its memory."""

    def __init__(self, host: str, memory: list[int] | None) -> None:
        super().__init__()
        self.size, self._other = 2, json.dumps(memory and [f"{host} ", *memory]).encode()

    def gather(self, data: bytes) -> list[bytes]:
        return [data, self._other]


def test_ranks_take_the_settings_that_fit_the_smallest_machine():
    config, large = dataclasses.replace(CONFIG, fit=True), memory_of(needed(CONFIG))
    room = needed(dataclasses.replace(CONFIG, batch_size=6, gradient_accumulation_steps=4), 2)
    for small in ([64 * GB, large.free], None):
        assert fitted(config, large, OneOfTwo("another", small))[0] == config
    small = memory_of(room)
    there = fitted(config, large, OneOfTwo("another", [small.total, small.free]))[0]
    here = fitted(config, small, OneOfTwo("another", [large.total, large.free]))[0]
    assert here == there
    assert here.batch_size < 12
    assert needed(here, 2) <= room


def test_ranks_on_one_machine_share_its_memory_but_not_that_of_two_gpus():
    config, memory = dataclasses.replace(CONFIG, fit=True), memory_of(needed(CONFIG))
    beside = OneOfTwo(platform.node(), [memory.total, memory.free])
    assert fitted(config, memory, beside)[0].batch_size < config.batch_size
    assert fitted(config, dataclasses.replace(memory, name="GPU-1"), beside)[0] == config


def test_a_step_that_the_ranks_cant_share_is_not_chosen():
    config = dataclasses.replace(CONFIG, batch_size=6, gradient_accumulation_steps=1)
    for room in range(needed(config, 2), 0, -5_000_000):
        for choice in fitting.choices(outline(config), config, room, 2):
            size = choice.changes.get("batch_size", 6)
            assert size % 2 == 0 or choice.changes["gradient_accumulation_steps"] % 2 == 0
    with pytest.raises(ValueError, match="expected one of them to be a multiple of the 2 ranks"):
        needed(dataclasses.replace(config, batch_size=3), 2)
