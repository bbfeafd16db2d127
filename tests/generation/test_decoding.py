"""Decoding with a cache, against the model without one on every window; on the kernels and on MLX alone."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.cpu import extension
from mlxgpt.formats import gpt2, model_directory, quantized
from mlxgpt.generation.decoding import Decoder
from mlxgpt.generation.sampling import Sampler
from mlxgpt.model import ops
from mlxgpt.model.cache import KVCache
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT

T, V = 24, 50
PROMPTS = ([1], [5, 6, 7], list(range(T)), list(range(40)))
GREEDY = Sampler(temperature=0)


@pytest.fixture(params=["kernels", "mlx"])
def backend(request, switch_off_kernels):
    if request.param == "mlx":
        switch_off_kernels()
    elif not extension.is_there():
        pytest.skip("without the extension")
    return request.param


def random_model(n_layer=2, n_embd=32, seed=3, scale=0.4, **shape) -> GPT:
    mx.random.seed(seed)
    model = GPT(
        GPTConfig(**{"block_size": T, "vocab_size": V, "n_head": 4, "n_layer": n_layer, "n_embd": n_embd} | shape)
    )
    model.wte.weight = mx.random.normal(model.wte.weight.shape, scale=scale)  # large enough that tokens differ
    return model.eval()


def tokens(steps: Decoder, n: int) -> list[list[int]]:
    """n steps of all sequences, (n, B)."""
    return [step.tokens.tolist() for step in itertools.islice(steps, n)]


def uncached(model: GPT, prompt: list[int], n: int, slides: bool = True) -> list[int]:
    """The most likely tokens, by running the model on all that it sees, each time."""
    size = model.config.block_size
    text, start = list(prompt), max(0, len(prompt) - size)
    while len(text) < len(prompt) + n and (slides or len(text) <= size):
        if len(text) - start > size:
            start = len(text) - max(1, size // 2)
        logits = np.array(model(mx.array([text[start:]])))[0, -1]
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_decoding_takes_the_most_likely_token_of_each_window(backend, prompt):
    model = random_model()
    found = tokens(Decoder(model, [prompt], GREEDY), 60)
    assert [row[0] for row in found] == uncached(model, prompt, 60)


def test_a_model_with_one_position_sees_the_last_token_alone(backend):
    model = random_model(block_size=1)
    found = tokens(Decoder(model, [[3]], GREEDY), 8)
    assert [row[0] for row in found] == uncached(model, [3], 8)


def test_a_repeated_step_gives_the_logits_of_every_position(backend):
    model = random_model()
    ids = np.random.default_rng(0).integers(0, V, (2, T)).astype(np.int32)
    whole = np.array(model(mx.array(ids)))  # (2, T, V)
    for T_step in (1, 3):
        cache = KVCache(2, T, 2)
        step = ops.repeated(model, GPT.__call__, cache)
        for at in range(0, T, T_step):
            part = ids[:, at : at + T_step]
            logits = np.array(step(part if backend == "kernels" else mx.array(part)))
            np.testing.assert_allclose(logits, whole[:, at : at + T_step], atol=1e-5)
        full = ops.repeated(model, GPT.__call__, cache)  # a step that has not run yet
        for _ in range(2):
            with pytest.raises(ValueError, match="at most block_size"):
                full(part if backend == "kernels" else mx.array(part))
        with pytest.raises(ValueError, match=rf"cache: {T} \+ {T_step} positions, at most block_size = {T}"):
            step(part if backend == "kernels" else mx.array(part))


@pytest.mark.parametrize("bits", [16, 8, 4, 3])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_weights_in_low_precision_are_computed_with_as_they_are_stored(backend, tmp_path, dtype, bits):
    """Every position's logits against those of the same weights in float32, without a cache."""
    model = random_model(n_embd=128)
    weights = {name: p.astype(dtype) for name, p in model.named_weights().items()}
    quantization = {"group_size": 64, "bits": bits} if bits < 16 else None
    if quantization:
        weights = quantized.quantize(weights, bits)
    else:
        weights = {f"model.{name}": p for name, p in weights.items()}
    (tmp_path / "config.json").write_bytes(gpt2.config_json(model.config, quantization=quantization))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    low = model_directory.load_model(tmp_path, dtype=None)
    stays = bits < 16 and (bits != 3 or backend == "mlx")
    assert ("h.0.mlp.c_fc.scales" in low.named_weights()) == stays
    ids = mx.array(np.random.default_rng(0).integers(0, V, (2, T)), mx.int32)
    assert low(ids, KVCache(2, T, 2, low.head.dtype)).dtype == (dtype if backend == "mlx" else mx.float32)
    exact = np.array(model_directory.load_model(tmp_path)(ids))
    for T_step in (1, 6):
        cache = KVCache(2, T, 2, low.head.dtype)
        parts = [low(ids[:, at : at + T_step], cache).astype(mx.float32) for at in range(0, T, T_step)]
        error = np.abs(np.concatenate([np.array(part) for part in parts], axis=1) - exact).max() / np.abs(exact).max()
        # MLX computes in the type of the weights; the kernels in float32, but they keep keys and values in it
        assert error < {mx.float32: 1e-4, mx.float16: 6e-3, mx.bfloat16: 5e-2}[dtype]
        if backend == "kernels":
            assert error < {mx.float32: 3e-5, mx.float16: 1e-3, mx.bfloat16: 1e-2}[dtype]


def test_a_cache_of_another_number_of_sequences_is_refused(backend):
    with pytest.raises(ValueError, match="cache: it is of 2 sequences, expected 3"):
        random_model()(mx.zeros((3, 1), mx.int32), KVCache(2, T, 2))


def test_a_cache_can_go_back_to_an_earlier_position(backend):
    model = random_model()
    cache = KVCache(2, T)
    first = np.array(model(mx.array([[1, 2, 3, 4, 5]]), cache))
    cache.offsets[:] = 2
    again = np.array(model(mx.array([[3, 4, 5]]), cache))
    np.testing.assert_allclose(again, first[:, 2:], atol=1e-5)


def test_a_step_is_compiled_once_for_each_size_of_the_cache(monkeypatch, switch_off_kernels):
    switch_off_kernels()
    model, hidden, lengths = random_model(n_layer=1, n_embd=16, block_size=600), GPT.hidden, []
    monkeypatch.setattr(
        GPT, "hidden", lambda self, ids, cache: (lengths.append(ids.shape[1]), hidden(self, ids, cache))[1]
    )
    tokens(Decoder(model, [[1, 2]], GREEDY), 590)
    assert lengths == [2, 1, 1, 1]  # the prompt; 256, 512 and 600 positions


def test_long_prompts_are_read_in_chunks(backend, monkeypatch):
    monkeypatch.setattr("mlxgpt.generation.decoding.PREFILL_CHUNK", 7)
    model = random_model()
    assert [t for (t,) in tokens(Decoder(model, [list(range(20))], GREEDY), 3)] == uncached(model, list(range(20)), 3)


def test_prompts_in_a_batch_get_the_tokens_that_they_get_alone(backend):
    model = random_model()
    prompts = [[9] * 11, [3, 4], list(range(40)), [3, 4], [1]]
    found = tokens(Decoder(model, prompts, GREEDY), 60)
    for n, prompt in enumerate(prompts):
        assert [row[n] for row in found] == uncached(model, prompt, 60)


def test_the_draws_of_a_sequence_do_not_depend_on_the_others(backend):
    model = random_model()
    together = tokens(Decoder(model, [[1, 2]] * 3, Sampler(temperature=3, seed=5)), 40)
    assert len({tuple(column) for column in zip(*together, strict=True)}) == 3
    for n in range(3):
        alone = tokens(Decoder(model, [[1, 2]], Sampler(temperature=3, seed=5 + n)), 40)
        assert [row[n] for row in together] == [t for (t,) in alone]


def test_both_backends_draw_the_same(switch_off_kernels):
    model, found = random_model(), []
    for _ in range(2):
        steps = Decoder(model, [[1], [2, 3]], Sampler(temperature=0.9, top_k=20, repetition_penalty=1.3))
        found.append(tokens(steps, 50))
        switch_off_kernels()
    assert found[0] == found[1]


def test_a_sequence_may_stop_when_the_model_is_full(backend):
    model = random_model()
    steps = Decoder(model, [[1] * 20, [2, 3]], GREEDY, on_full="stop")
    found = [step.tokens.tolist() for step in steps]
    assert len(found) == T - 2 + 1  # the last token takes no position
    ours = [row[0] for row in found]
    assert ours == [*uncached(model, [1] * 20, 99, slides=False), *[-1] * 18]
    assert [row[1] for row in found] == uncached(model, [2, 3], 99, slides=False)
    assert steps.full.all()


def test_finished_sequences_are_left_out(backend):
    model = random_model()
    steps = Decoder(model, [[1], [2, 3]], GREEDY)
    next(steps)
    steps.finish(0)
    rest = tokens(steps, 50)
    assert {row[0] for row in rest} == {-1}
    assert [row[1] for row in rest] == uncached(model, [2, 3], 51)[1:]
    steps.finish(1)
    assert tokens(steps, 5) == []
    assert not steps.full.any()


def test_an_abandoned_decoder_frees_its_arrays_at_once():
    model, arrays = random_model(), []
    gc.collect()
    gc.disable()
    try:
        for draft in (None, random_model(1, 16)):
            steps = Decoder(model, [[1, 2]], GREEDY, draft=draft)
            next(steps)
            arrays.append(weakref.ref(steps._sequences))
            del steps
        assert [array() for array in arrays] == [None, None]
    finally:
        gc.enable()


def test_log_probabilities_are_the_models_before_the_sampler(backend):
    model = random_model()
    for draft in (None, random_model(1, 16)):
        steps = Decoder(model, [[1, 2]], Sampler(temperature=0.5, top_k=3), logprobs=True, draft=draft)
        text = [1, 2]
        for step in itertools.islice(steps, 20):
            logits = np.array(model(mx.array([text])))[0, -1].astype(np.float64)
            text.append(int(step.tokens[0]))
            expected = logits[text[-1]] - np.log(np.exp(logits).sum())
            assert step.logprobs[0] == pytest.approx(expected, abs=1e-5)


def test_ids_of_the_padding_are_never_drawn(backend):
    model = random_model()
    model.wte.weight[40:] = model.wte.weight[:10] * 3  # copies with larger logits
    for draft in (None, random_model(1, 16)):
        steps = Decoder(model, [[1]], Sampler(temperature=2), vocab_size=40, draft=draft)
        assert max(t for (t,) in tokens(steps, 100)) < 40


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("draft_tokens", [1, 4, 20])
def test_a_draft_changes_nothing_in_greedy_decoding(backend, prompt, draft_tokens):
    model = random_model()
    for draft in (model, random_model(1, 16), random_model(1, 16, block_size=7)):
        steps = Decoder(model, [prompt], GREEDY, draft=draft, draft_tokens=draft_tokens)
        assert [t for (t,) in tokens(steps, 60)] == uncached(model, prompt, 60)
    stopped = [step.tokens[0] for step in Decoder(model, [prompt[:T]], GREEDY, draft=draft, on_full="stop")]
    assert stopped == uncached(model, prompt[:T], 99, slides=False)


def test_a_good_draft_saves_steps_of_the_model(monkeypatch):
    model, calls = random_model(), []
    repeated = ops.repeated

    def counting(of, method, cache):
        step = repeated(of, method, cache)
        return lambda ids: (calls.append(of), step(ids))[1]

    monkeypatch.setattr(ops, "repeated", counting)
    draft = random_model()  # the same weights
    tokens(Decoder(model, [[1]], GREEDY, draft=draft, draft_tokens=4), 20)
    assert sum(of is model for of in calls) <= 5


def test_drawing_with_a_draft_keeps_the_distribution():
    """Of the first three tokens (the draft proposes from the second on), against the exact probabilities."""
    size, settings = 4, dict(temperature=0.4, top_k=3, repetition_penalty=1.2)
    model, draft = (random_model(vocab_size=size, seed=s, scale=0.05) for s in (1, 2))
    probabilities = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tail, p in probabilities.items():
            seen = np.isin(np.arange(size), [1, 2, *tail])[None]
            logits = np.array(model(mx.array([[1, 2, *tail]])))[:, -1]
            for token, q in enumerate(Sampler(**settings).probabilities(logits, seen)[0].tolist()):
                longer[(*tail, token)] = p * q
        probabilities = longer
    n = 1500
    found = Counter()
    for seed in range(n):
        steps = Decoder(model, [[1, 2]], Sampler(**settings, seed=seed), draft=draft, draft_tokens=2)
        found[tuple(t for (t,) in tokens(steps, 3))] += 1
    assert all(probabilities[text] > 0 for text in found)
    expected = {text: n * p for text, p in probabilities.items() if n * p >= 5}
    assert len(expected) > 10
    observed = [found[text] for text in expected]
    chi2 = sum((o - e) ** 2 / e for o, e in zip(observed, expected.values(), strict=True))
    chi2 += (n - sum(observed) - (rare := n - sum(expected.values()))) ** 2 / max(rare, 1)
    assert chi2 < len(expected) + 4 * (2 * len(expected)) ** 0.5  # four standard deviations above its mean


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=[]), "prompt: no tokens, expected at least one"),
        (dict(prompts=[[1], []]), "prompt: no tokens, expected at least one"),
        (dict(prompts=[[1] * 25], on_full="stop"), "prompt: 25 tokens, at most block_size = 24 unless the window"),
        (dict(prompts=[[1], [0, V]]), "prompt: it holds id 50, expected 0 <= id < vocab_size = 50"),
        (dict(prompts=[[-1]]), "prompt: it holds id -1"),
        (dict(sampler=Sampler(logit_bias={40: 1.0}), vocab_size=40), "logit_bias: id 40, expected 0 to 39"),
        (dict(on_full="crash"), "on_full is 'crash', expected 'slide' or 'stop'"),
        (dict(draft=random_model(vocab_size=51)), "draft: its vocab_size is 51, the model's 50"),
        (dict(draft=random_model(), prompts=[[1], [2]]), "draft: 2 prompts and draft_tokens = 4, expected one"),
        (dict(draft=random_model(), draft_tokens=0), "draft: 1 prompts and draft_tokens = 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Decoder(**{"model": random_model(), "prompts": [[1]], "sampler": GREEDY} | arguments)
