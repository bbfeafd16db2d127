"""Sampling: each function against a naive one, in NumPy and MLX; the frequencies of draws; edge cases."""

from __future__ import annotations

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxgpt.generation import sampling
from mlxgpt.generation.sampling import Sampler

ARRAYS = [np.array, mx.array]


def logits_of(B: int, V: int, seed: int, step: float = 0.0) -> np.ndarray:
    """Normally distributed logits (B, V). A step above 0 rounds them to its multiples, which makes many equal."""
    x = np.random.default_rng(seed).normal(scale=2, size=(B, V)).astype(np.float32)
    return np.round(x / step).astype(np.float32) * np.float32(step) if step else x


def softmax(x: np.ndarray) -> np.ndarray:
    weight = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


def untypicality(row: np.ndarray) -> np.ndarray:
    """|H(p) + log p| of each token of a row (V,), in float64: Meister et al. 2022, equation 5.

    Rounded far below any difference that the tests ask for, so that equal logits are equally close.
    """
    p = softmax(row)
    logs = np.log(p, out=np.full(p.shape, -np.inf), where=p > 0)
    entropy = -sum(x * log for x, log in zip(p, logs, strict=True) if x > 0)
    return np.round(np.abs(entropy + logs), 12)


def naive_kept(name: str, row: np.ndarray, value: float) -> list[bool]:
    """Which tokens of a row (V,) a sampler keeps, by its definition."""
    p = softmax(row)
    if name == "top_k":
        return [sum(row > x) < value for x in row]
    if name in ("top_p", "typical_p"):
        distance = -row if name == "top_p" else untypicality(row)
        ranked = sorted(range(len(row)), key=lambda i: (distance[i], i))
        sums = list(itertools.accumulate(p[ranked]))
        size = next((n for n, total in enumerate(sums, 1) if total >= value), len(row))
        return [ranked.index(i) < size for i in range(len(row))]
    return list(p >= value * p.max())


@pytest.mark.parametrize("make", ARRAYS)
@settings(deadline=None, derandomize=True)
@given(
    cut=st.one_of(
        st.tuples(st.just("top_k"), st.integers(1, 25)),
        st.tuples(st.just("top_p"), st.floats(0.001, 0.999)),
        st.tuples(st.just("min_p"), st.floats(0.001, 0.999)),
        st.tuples(st.just("typical_p"), st.floats(0.001, 0.999)),
    ),
    V=st.integers(1, 20),
    seed=st.integers(0, 999),
    step=st.sampled_from([0.0, 1.5]),
)
def test_each_function_keeps_the_tokens_of_its_definition(make, cut, V, seed, step):
    name, value = cut
    x = logits_of(3, V, seed, step)
    p = softmax(x)
    if name == "top_p":  # a sum that falls on p can go either way
        edge = np.abs(np.cumsum(-np.sort(-p, axis=-1), axis=-1) - value).min()
    elif name == "typical_p":  # and so can two tokens equally far from the entropy, one above it and one below
        far = np.array([untypicality(row) for row in x])
        sums = np.cumsum(np.take_along_axis(p, np.argsort(far, axis=-1, kind="stable"), axis=-1), axis=-1)
        steps = [np.diff(np.sort(row)) for row in np.concatenate([far, np.full((3, 1), np.inf)], axis=-1)]
        edge = min(np.abs(sums - value).min(), *(step[step > 0].min() for step in steps))
    else:
        edge = np.abs(p / p.max(axis=-1, keepdims=True) - value).min()
    if name != "top_k" and edge < 1e-5:
        return
    out = np.array(getattr(sampling, name)(make(x), value))
    expected = [naive_kept(name, row, value) for row in x]
    np.testing.assert_array_equal(np.isfinite(out), expected)
    np.testing.assert_array_equal(out, np.where(expected, x, -np.inf))
    assert out.dtype == np.float32


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_the_nucleus_of_a_large_vocabulary(p):
    """For logits that leave few tokens to sort, and for logits that leave nearly all."""
    for scale in (0.01, 1, 5):
        x = logits_of(1, 50257, 3) * np.float32(scale)
        kept = softmax(x)[np.isfinite(sampling.top_p(x, p))]
        assert kept.sum() >= p - 1e-6
        assert kept.sum() - kept.min() < p + 1e-6
        assert len(kept) == 50257 or kept.min() >= softmax(x)[np.isinf(sampling.top_p(x, p))].max() * (1 - 1e-6)


@pytest.mark.parametrize("make", ARRAYS)
def test_the_token_that_crosses_p_is_kept(make):
    x = make(np.log(np.array([[0.5, 0.3, 0.2]], np.float32)))
    for p, size in ((0.2, 1), (0.6, 2), (0.79, 2), (0.81, 3), (1.0, 3)):
        assert np.isfinite(np.array(sampling.top_p(x, p))).sum() == size


@pytest.mark.parametrize("make", ARRAYS)
def test_of_equal_tokens_the_nucleus_takes_the_lower_ids(make):
    out = np.array(sampling.top_p(make(np.zeros((2, 10), np.float32)), 0.25))
    np.testing.assert_array_equal(np.isfinite(out), [[True] * 3 + [False] * 7] * 2)


@pytest.mark.parametrize("make", ARRAYS)
def test_repetition_penalty_and_bias(make):
    x, seen = np.array([[2, -2, 1, -np.inf]], np.float32), np.array([[True, True, False, True]])
    given = make(x)
    out = np.array(sampling.repetition_penalty(given, 2.0, make(seen)))
    np.testing.assert_array_equal(out, [[1, -4, 1, -np.inf]])
    out = np.array(sampling.logit_bias(given, {0: -1.5, 2: -math.inf}))
    np.testing.assert_array_equal(out, [[0.5, -2, -np.inf, -np.inf]])
    np.testing.assert_array_equal(np.array(given), x)  # the argument is unchanged
    with pytest.raises(ValueError, match="logit_bias: id 4, expected 0 to 3"):
        sampling.logit_bias(make(x), {4: 1.0})


@pytest.mark.parametrize("make", ARRAYS)
def test_a_likely_token_that_is_not_typical_is_left_out(make):
    """Half the probability in one token: it says less than the entropy, and the many unlikely ones more."""
    p = np.array([[0.5, 0.2, 0.1, 0.1, 0.05, 0.05]], np.float32)  # 1.47 nats of entropy; 0.2 is the closest
    x = make(np.log(p))
    for mass, kept in ((0.1, [1]), (0.2001, [0, 1]), (0.6, [0, 1]), (0.7001, [0, 1, 2]), (0.85, [0, 1, 2, 3])):
        assert np.flatnonzero(np.isfinite(np.array(sampling.typical_p(x, mass)))).tolist() == kept


@pytest.mark.parametrize("make", ARRAYS)
def test_of_equally_typical_tokens_the_lower_ids_are_kept(make):
    out = np.array(sampling.typical_p(make(np.zeros((2, 10), np.float32)), 0.25))
    np.testing.assert_array_equal(np.isfinite(out), [[True] * 3 + [False] * 7] * 2)


@pytest.mark.parametrize("make", ARRAYS)
def test_tokens_that_are_cut_already_are_never_typical(make):
    x = np.full((1, 300), -np.inf, np.float32)
    x[0, [7, 250]] = [1, 1]
    for mass, kept in ((0.3, [7]), (0.7, [7, 250]), (1 - 1e-9, [7, 250]), (1.0, [7, 250])):
        out = np.array(sampling.typical_p(make(x), mass))
        assert np.flatnonzero(np.isfinite(out)).tolist() == kept


@pytest.mark.parametrize("make", ARRAYS)
def test_the_typical_set_of_a_large_vocabulary(make):
    x = logits_of(2, 50257, 3)
    for mass in (0.05, 0.5, 0.95):
        out = np.isfinite(np.array(sampling.typical_p(make(x), mass)))
        for row, kept in zip(x, out, strict=True):
            p, far = softmax(row), untypicality(row)
            assert p[kept].sum() > mass - 1e-5
            assert p[kept].sum() - p[kept][far[kept].argmax()] < mass + 1e-5
            assert far[kept].max() <= far[~kept].min() + 2e-4  # twice the rounding of a float32 entropy


@pytest.mark.parametrize("make", ARRAYS)
def test_the_order_is_that_of_transformers(make):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    x = logits_of(4, 300, 7)
    seen_ids = np.random.default_rng(1).integers(0, 300, (4, 30))
    seen = np.zeros(x.shape, bool)
    np.put_along_axis(seen, seen_ids, True, axis=-1)
    chain = [
        processors.SequenceBiasLogitsProcessor([[[3], 5.0], [[9], -4.0]]),
        processors.RepetitionPenaltyLogitsProcessor(1.3),
        processors.TemperatureLogitsWarper(0.7),
        processors.TopKLogitsWarper(40),
        processors.TopPLogitsWarper(0.9),
        processors.MinPLogitsWarper(0.02),
        processors.TypicalLogitsWarper(0.95),
    ]
    expected, ids = torch.tensor(x), torch.tensor(seen_ids)
    for process in chain:
        expected = process(ids, expected)
    sampler = Sampler(
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        min_p=0.02,
        typical_p=0.95,
        repetition_penalty=1.3,
        logit_bias={3: 5.0, 9: -4.0},
    )
    out = np.array(sampler.process(make(x), make(seen)))
    assert 40 < np.isfinite(out).sum() < 160  # the functions after top_k cut too
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-6)
    np.testing.assert_allclose(
        np.array(sampler.probabilities(make(x), make(seen))), torch.softmax(expected, -1).numpy(), rtol=1e-5
    )


@pytest.mark.parametrize("make", ARRAYS)
@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(temperature=1.0),
        Sampler(temperature=0.7, top_k=4),
        Sampler(temperature=1.5, top_p=0.8, min_p=0.05),
        Sampler(temperature=1.5, typical_p=0.8),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(make, sampler):
    """A chi-square test of 20,000 draws with a fixed seed, at the 0.9999998 quantile."""
    x = logits_of(1, 8, 5)
    p, n = np.array(sampler.probabilities(make(x)))[0], 20_000
    u = next(sampling.uniforms(1, n))
    drawn = np.array(sampler(make(np.repeat(x, n, axis=0)), None, u))
    counts = np.bincount(drawn, minlength=8)
    assert not counts[p == 0].any()
    possible = p > 0
    chi2 = ((counts[possible] - n * p[possible]) ** 2 / (n * p[possible])).sum()
    assert chi2 < 45  # 7 degrees of freedom: 0.9999998
    assert possible.sum() > 2


def test_a_draw_is_the_first_token_past_u():
    """Also in a vocabulary that is searched by blocks."""
    x = logits_of(1, 5000, 2)
    sums = np.cumsum(softmax(x)[0])
    for u in np.linspace(0, 0.999, 200):
        expected = int(np.searchsorted(sums, u, side="right"))
        assert abs(int(sampling.draw(x, np.array([u]))[0]) - expected) <= 1  # sums are rounded
    lone = np.full((1, 5000), -np.inf, np.float32)
    lone[0, [700, 3000]] = 0
    assert [int(sampling.draw(lone, np.array([u]))[0]) for u in (0.0, 0.499, 0.501, 1 - 2**-53)] == [
        700,
        700,
        3000,
        3000,
    ]


@pytest.mark.parametrize("make", ARRAYS)
@pytest.mark.parametrize("V", [1, 3, 255, 256, 257, 1025])
def test_no_draw_is_outside_or_of_probability_0(make, V):
    """For the smallest and largest u, with tokens of probability 0 at both ends."""
    x = logits_of(1, V, V)
    if V > 2:
        x[0, [0, -1]] = -np.inf
    for u in (0.0, 5e-324, 0.5, 1 - 2**-24, 1 - 2**-53):
        token = int(np.array(sampling.draw(make(x), np.array([u])))[0])
        assert 0 <= token < V
        assert np.isfinite(x[0, token])


@pytest.mark.parametrize("make", ARRAYS)
def test_a_row_of_one_possible_token(make):
    x = np.full((2, 600), -np.inf, np.float32)
    x[0, 599], x[1, 0] = 3, -1e30
    for sampler in (Sampler(temperature=0), Sampler(), Sampler(temperature=1, top_k=5, top_p=0.5, min_p=0.5)):
        assert np.array(sampler(make(x), None, np.array([0.9, 0.1]))).tolist() == [599, 0]


@pytest.mark.parametrize("make", ARRAYS)
def test_neutral_settings_change_nothing(make):
    x = logits_of(2, 50, 1)
    neutral = Sampler(temperature=1, top_k=50, top_p=1, min_p=0, typical_p=1, repetition_penalty=1)
    np.testing.assert_array_equal(np.array(neutral.process(make(x))), x)
    np.testing.assert_array_equal(np.array(sampling.top_k(make(x), 1000)), x)


@pytest.mark.parametrize("make", ARRAYS)
def test_greedy_takes_the_lowest_id_of_the_largest_logits(make):
    x = np.array([[1, 3, 3, 0], [5, -np.inf, 2, 5]], np.float32)
    for sampler in (Sampler(temperature=0), Sampler(temperature=1e-6)):
        assert sampler.greedy
        tokens = sampler(make(x))
        assert np.array(tokens).tolist() == [1, 0]
        assert np.array(tokens).dtype == np.int32
        np.testing.assert_array_equal(np.array(sampler.probabilities(make(x))), [[0, 1, 0, 0], [1, 0, 0, 0]])
    assert np.array(Sampler(temperature=0, logit_bias={3: 9.0})(make(x))).tolist() == [3, 3]


@pytest.mark.parametrize("make", ARRAYS)
@pytest.mark.parametrize(
    "sampler",
    [Sampler(temperature=0), Sampler(), Sampler(temperature=1, top_k=2, top_p=0.5, min_p=0.5)],
)
@pytest.mark.parametrize(("bad", "value"), [(math.nan, "nan"), (math.inf, "inf")])
def test_logits_that_are_not_finite_are_refused(make, sampler, bad, value):
    x = logits_of(2, 300, 0)
    x[1, 299] = bad
    if make is mx.array:  # lazy arrays, so -1 in place of an error
        tokens = np.array(sampler(mx.array(x), None, np.array([0.5, 0.5])))
        assert (tokens < 0).tolist() == [False, True]
        return
    with pytest.raises(ValueError, match=f"logits: the largest is {value}, expected a finite number"):
        sampler(x, None, np.array([0.5, 0.5]))


def test_forbidding_every_token_is_refused():
    sampler, x, u = Sampler(logit_bias={0: -math.inf, 1: -math.inf}), np.zeros((1, 2), np.float32), np.array([0.5])
    with pytest.raises(ValueError, match="the largest is -inf"):
        sampler(x, None, u)
    assert sampler(mx.array(x), None, u).tolist() == [-1]


@pytest.mark.parametrize("make", ARRAYS)
def test_rows_do_not_depend_on_each_other(make):
    x, u = logits_of(5, 700, 4), next(sampling.uniforms(3, 5))
    sampler = Sampler(temperature=1.2, top_k=100, top_p=0.95, min_p=0.001)
    together = np.array(sampler(make(x), None, u))
    alone = [int(np.array(sampler(make(x[n : n + 1]), None, u[n : n + 1]))[0]) for n in range(5)]
    assert together.tolist() == alone


def test_numpy_and_mlx_draw_the_same_tokens():
    x, u = logits_of(50, 400, 8), next(sampling.uniforms(5, 50))
    sampler = Sampler(temperature=0.9, top_k=60, top_p=0.9)
    assert sampler(x, None, u).tolist() == sampler(mx.array(x), None, u).tolist()


def test_the_random_numbers_of_a_row_depend_on_its_seed_alone():
    three = np.array(list(itertools.islice(sampling.uniforms(7, 3), 10)))  # (10, 3)
    alone = np.array(list(itertools.islice(sampling.uniforms(9, 1), 10)))  # (10, 1)
    np.testing.assert_array_equal(three[:, 2:], alone)
    assert len(np.unique(three)) == 30
    assert 0 <= three.min() and three.max() < 1


@pytest.mark.parametrize("make", ARRAYS)
def test_logprobs(make):
    x, tokens = logits_of(3, 40, 6) * 20, np.array([1, 0, 39], np.int32)
    shifted = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    expected = (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))[np.arange(3), tokens]
    out = np.array(sampling.logprobs(make(x), make(tokens)))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert out.dtype == np.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-1.0), "temperature is -1.0, expected at least 0"),
        (dict(temperature=math.nan), "temperature is nan, expected at least 0"),
        (dict(temperature=math.inf), "temperature is inf, expected a finite number"),
        (dict(top_k=-1), "top_k is -1, expected at least 0"),
        (dict(top_p=0.0), "top_p is 0.0, expected 0 < top_p <= 1"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(min_p=-0.1), "min_p is -0.1, expected 0 <= min_p <= 1"),
        (dict(typical_p=0.0), "typical_p is 0.0, expected 0 < typical_p <= 1"),
        (dict(repetition_penalty=0.0), "repetition_penalty is 0.0, expected a finite number above 0"),
        (dict(logit_bias={-1: 1.0}), "logit_bias: id is -1, expected at least 0"),
        (dict(logit_bias={1: math.nan}), "logit_bias: 1's is nan, expected a finite number, or -inf"),
        (dict(seed=-1), "seed is -1"),
    ],
)
def test_rules_name_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)


def test_missing_arguments_are_named():
    x = np.zeros((1, 3), np.float32)
    with pytest.raises(ValueError, match="the ids seen are not given"):
        Sampler(temperature=0, repetition_penalty=1.1)(x)
    with pytest.raises(ValueError, match="no random numbers are given"):
        Sampler(temperature=1)(x)
