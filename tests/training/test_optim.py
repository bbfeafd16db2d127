"""Steps of training on the CPU's kernels, in place, against the same steps on MLX's own operations."""

from __future__ import annotations

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxgpt.cpu import extension, memory
from mlxgpt.cpu.entry import OnKernels
from mlxgpt.cpu.tape import ParameterGradient, Tape
from mlxgpt.formats import model_directory as checkpoint
from mlxgpt.formats import nanogpt, sources
from mlxgpt.model import ops
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training.checkpoints import Checkpoints, TrainingState, restore_optimizer
from mlxgpt.training.recipe import TrainConfig
from mlxgpt.training.trainer import Trainer

if not extension.is_there():
    pytest.skip("the extension is not there", allow_module_level=True)

SHAPE = dict(block_size=16, vocab_size=30, n_layer=2, n_head=2, n_embd=32)


def trainer(freeze: str = "", **options) -> Trainer:
    ops.use_device("cpu")
    mx.random.seed(0)
    config = TrainConfig(
        **{**dict(model=GPTConfig(**SHAPE), device="cpu", learning_rate=1e-2, warmup_iters=0), **options}
    )
    model = GPT(config.model)
    if freeze:
        model.freeze_named(freeze.split(","))
    return Trainer(model, config)


def batches(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(n)
    return [tuple(rng.integers(0, 30, (2, 4, 16)).astype(np.int32)) for _ in range(n)]


def arrays_of(trainer: Trainer) -> dict[str, np.ndarray]:
    tree = {"model": trainer.model.parameters(), "optimizer": trainer.optimizer.state}
    return {name: np.array(a) for name, a in tree_flatten(tree)}


def gradient_averages(trainer: Trainer) -> dict[str, np.ndarray]:
    """AdamW's averages of the gradient, by parameter. After the first step each is (1 - beta1) times the clipped
    gradient of that step."""
    averages = trainer.optimizer.averages(trainer.model)
    return {name: np.array(a) for name, a in averages.items() if name.startswith("m.")}


def assert_gradients_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """To float32's rounding, whatever the BLAS and the instruction set."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() <= 1e-7 + 1e-5 * np.abs(value).max(), name


def assert_moved_alike(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], steps: int) -> None:
    """Weights after some steps of a trainer() lie together, as measured by how far the steps may move them.

    Adam divides a gradient by its own size, and so makes the rounding of a gradient near 0 as large as any step: a
    bound in terms of the weights would hold for one BLAS and fail for the next.
    """
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if "c_attn.bias" in name:
            continue  # a key's bias has no gradient but rounding errors
        bound = 1e-3 * steps * 1e-2 if name.startswith("model.") else 1e-2 * np.abs(value).max() + 1e-9
        assert np.abs(ours[name] - value).mean() <= bound, name


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.0}, {"grad_clip": 0.05, "weight_decay": 1.0}])
def test_steps_are_mlxs(accumulation, options):
    def run():
        t = trainer(**options)
        losses = [t.step(batches(accumulation)).item()]
        first = gradient_averages(t)
        return t, losses + [t.step(batches(accumulation)).item() for _ in range(5)], first

    ours, losses, first = run()
    with extension.switched_off():
        theirs, expected, expected_first = run()
    assert ours.in_place and not theirs.in_place
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.3
    assert_gradients_close(first, expected_first)
    assert_moved_alike(arrays_of(ours), arrays_of(theirs), steps=6)


def test_arrays_that_others_hold_stay_as_they_are():
    t = trainer()
    held = t.model.parameters()
    before = tree_map(np.array, held)
    t.step(batches(1))
    loaded = tree_map(lambda p: p + 1, t.model.parameters())  # as a checkpoint would be put in later
    t.model.update(loaded)
    after = tree_map(np.array, loaded)
    t.step(batches(1))
    for tree, values in ((held, before), (loaded, after)):
        for (_, array), (name, value) in zip(tree_flatten(tree), tree_flatten(values), strict=True):
            np.testing.assert_array_equal(np.array(array), value, err_msg=name)


def test_training_goes_on_from_a_restored_state():
    t = trainer()
    t.step(batches(1))
    weights, state = (
        tree_map(lambda a: mx.array(np.array(a)), tree) for tree in (t.model.parameters(), t.optimizer.state)
    )
    expected = [t.step(batches(1)).item() for _ in range(3)]
    t.model.update(weights)
    t.optimizer.state = state
    t.steps = 1
    assert [t.step(batches(1)).item() for _ in range(3)] == expected


def test_an_optimizer_alone_may_be_restored():
    t, fresh = trainer(), trainer()
    for _ in range(2):
        t.step(batches(1))
    fresh.model.update(tree_map(lambda p: mx.array(np.array(p)), t.model.parameters()))
    zeros = {name: mx.zeros_like(a) for name, a in t.optimizer.averages(t.model).items()}
    t.optimizer.restore(t.model, 0, zeros)  # its weights stay where they are
    t.steps = 0
    losses = [[each.step(batches(1)).item() for _ in range(3)] for each in (t, fresh)]
    assert losses[0] == losses[1]


def test_steps_take_no_new_memory():
    t = trainer()
    for _ in range(3):
        t.step(batches(1))
    held = memory.pool.nbytes
    arrays = [id(a) for a in (*t.optimizer.own_weights(t.model), *t.optimizer.averages(t.model).values())]
    for _ in range(3):
        t.step(batches(1))
    assert memory.pool.nbytes == held
    assert arrays == [id(a) for a in (*t.optimizer.own_weights(t.model), *t.optimizer.averages(t.model).values())]


def test_accumulated_micro_batches_are_one_large_batch():
    parts = batches(3)
    whole = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    gradients = []
    for micro_batches in (parts, [whole]):
        t = trainer(beta1=0.0, grad_clip=0.0)
        loss = t.step(micro_batches).item()
        gradients.append((loss, list(gradient_averages(t).values())))  # the gradient itself
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    for ours, theirs in zip(gradients[0][1], gradients[1][1], strict=True):
        assert np.abs(ours - theirs).max() <= 1e-6 + 1e-5 * np.abs(theirs).max()
        assert np.abs(theirs).max() > 1e-4


# ---- frozen parameters ----

FROZEN = {  # what is frozen, and how many of the 2 + 2 * 12 + 2 parameters are left
    "wte,wpe": 26,  # no gradient flows into the embeddings, but through all of block 0
    "wte,wpe,h.0,h.1.ln_1": 12,
    "wpe,h.1,ln_f": 13,  # the last block is on the way, and the head trains its own weight
    "wte.weight,h.0.mlp.c_proj.weight,h.1.mlp.c_fc,h.1.attn.c_attn.bias,ln_f.weight": 22,
    "h": 4,
    "wpe,wte,h.0,ln_f,h.1.mlp,h.1.attn.c_proj,h.1.ln_1,h.1.ln_2.weight,h.1.attn.c_attn.weight": 2,
}


@pytest.mark.parametrize("freeze", FROZEN)
@pytest.mark.parametrize("options", [{}, {"model": GPTConfig(**SHAPE, tied_head=False, dropout=0.0)}])
def test_frozen_parameters_stay_and_the_others_go_mlxs_way(freeze, options):
    def run():
        t = trainer(freeze, **options)
        before = {name: np.array(p) for name, p in t.model.named_weights().items()}
        losses = [t.step(batches(2)).item()]
        first = gradient_averages(t)
        losses += [t.step(batches(2)).item() for _ in range(5)]
        assert losses[-1] < losses[0] - 1e-3
        return t, losses, first, before

    ours, losses, first, before = run()
    with extension.switched_off():
        theirs, expected, expected_first, _ = run()
    assert ours.in_place and not theirs.in_place
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    trained = ours.model.trainable_weights().keys()
    assert len(trained) == FROZEN[freeze] + ("model" in options)
    assert_gradients_close(first, expected_first)
    assert_moved_alike(arrays_of(ours), arrays_of(theirs), steps=6)
    assert list(ours.optimizer.averages(ours.model)) == [f"{a}.{name}" for a in "mv" for name in trained]
    for name, value in before.items():
        after = arrays_of(ours)[f"model.{name}"]
        assert np.array_equal(after, value) == (name not in trained), name


def test_gradients_in_mlxs_graph_are_of_what_is_trained():
    """By way of custom_function, with and without the gradient made in the forward pass, and another cotangent."""
    for training in (True, False):
        for freeze in FROZEN:
            model = trainer(freeze).model.train(training)
            ids, targets = map(mx.array, batches(1)[0])

            def loss(weights, model=model, ids=ids, targets=targets):
                model.update(weights)
                return 3 * model.loss(ids, targets)

            weights, found = model.trainable_parameters(), []
            for kernels_there in (nullcontext(), extension.switched_off()):
                with kernels_there:
                    found.append([np.array(g) for _, g in tree_flatten(mx.grad(loss)(weights))])
                    model.update(weights)
            assert len(found[0]) == FROZEN[freeze]
            for ours, theirs in zip(*found, strict=True):
                assert np.abs(ours - theirs).max() <= 1e-6 + 1e-5 * np.abs(theirs).max()


def test_the_backward_pass_ends_at_the_lowest_layer_that_is_trained():
    def recorded(freeze: str) -> int:
        model, tape = trainer(freeze).model, Tape()
        gradients = {name: ParameterGradient(w.shape) for name, w in model.trainable_weights().items()}
        OnKernels(model, gradients).run(GPT.loss, tape, *batches(1)[0])
        return len(tape)

    block = 9  # two layer norms, c_attn, attention, merge_heads, c_proj, and the MLP's c_fc, GELU and c_proj
    assert recorded("") == 1 + 2 * block + 2  # the embeddings, and at the end ln_f and the loss
    assert recorded("wte,wpe,h.0") == block + 2
    assert recorded("wte,wpe,h") == 2


def test_names_to_freeze_are_whole_parts():
    model = GPT(GPTConfig(**{**SHAPE, "n_layer": 11}))
    model.freeze_named(["h.1", "wpe", "h.3.mlp.c_fc.weight"])
    frozen = model.named_weights().keys() - model.trainable_weights().keys()
    assert len(frozen) == 12 + 2
    assert {name.rsplit(".", 2)[0] for name in frozen} <= {"wpe", "h.1", "h.1.attn", "h.1.mlp", "h.3.mlp", "wpe.weight"}
    assert "h.10.ln_1.weight" in model.trainable_weights()


@pytest.mark.parametrize(
    "names, message",
    [
        (["wet"], r"no parameter's name begins with 'wet' \(did you mean 'wte'\?\)"),
        (["h.2"], r"no parameter's name begins with 'h.2' \(did you mean 'h."),
        (["h.0.attn.c_att"], r"no parameter's .*'h.0.attn.c_att' \(did you mean 'h.0.attn.c_attn'"),
        (["wte", "wpe", "h", "ln_f"], "it leaves no parameter to train"),
    ],
)
def test_names_that_fit_nothing_are_named(names, message):
    with pytest.raises(ValueError, match=f"^freeze: {message}"):
        GPT(GPTConfig(**SHAPE)).freeze_named(names)


@pytest.mark.parametrize("on_kernels", [True, False])
def test_training_with_frozen_parameters_goes_on_from_its_files(tmp_path, on_kernels):
    with nullcontext() if on_kernels else extension.switched_off():
        t = trainer("wte,h.1,ln_f.bias")
        for _ in range(2):
            t.step(batches(1))
        checkpoints = Checkpoints(tmp_path, 1)
        checkpoints.save(t.model, None, TrainingState(t.optimizer, 2, None, {}), best=False)
        checkpoints.wait()
        expected = [t.step(batches(1)).item() for _ in range(3)]
        other = trainer("wte,h.1,ln_f.bias")
        other.model.update(checkpoint.load_model(tmp_path / "last").parameters())
        restore_optimizer(tmp_path / "last", other.model, other.optimizer)
        other.steps = 2
        assert [other.step(batches(1)).item() for _ in range(3)] == expected
    with pytest.raises(ValueError, match=r"optimizer.safetensors: missing m.wte.weight; .*missing m.h.1"):
        everything = trainer()
        restore_optimizer(tmp_path / "last", everything.model, everything.optimizer)
    source = sources.read_model(tmp_path / "last")  # the converter takes them along, and nanoGPT's optimizer the same
    numbers = nanogpt.checkpoint_of(source)["optimizer"]["state"]
    assert len(numbers) == len(source.averages) / 2 == 28 - 14
