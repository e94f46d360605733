"""Sampling: what may be drawn against filters computed by hand, how often, and with which keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import WIDER, ends, initial, inputs

from elm_jax.decoding import GenerationConfig, generate, stacked_generate
from elm_jax.decoding.filters import truncate
from elm_jax.errors import ElmError
from elm_jax.models import T5, get_spec

LENGTH = 8
TRUNCATIONS: list[dict[str, Any]] = [
    {},
    dict(temperature=0.5),
    dict(top_k=1),
    dict(top_k=3),
    dict(top_k=500),
    dict(top_p=0.1),
    dict(top_p=0.75),
    dict(top_p=0.999),
    dict(temperature=2.0, top_k=7),
    dict(temperature=0.6, top_p=0.8),
    dict(top_k=5, top_p=0.6),
    dict(temperature=1.7, top_k=6, top_p=0.9),
]


def by_hand(scores: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Temperature, then the k best, then the fewest that hold top_p; one row, in doubles."""
    kept = scores.astype(np.float64) / options.get("temperature", 1.0)
    order = np.argsort(-kept, kind="stable")
    if options.get("top_k"):
        kept[order[options["top_k"] :]] = -np.inf
    if "top_p" in options:
        probabilities = np.exp(kept - kept.max())
        probabilities /= probabilities.sum()
        held = 0.0
        for token in order:
            if held >= options["top_p"]:
                kept[token] = -np.inf
            held += probabilities[token]
    return kept


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_truncation_is_the_one_by_hand(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, (3, 4, 300)).astype(np.float32)
    scores[0, 0, :290] = -np.inf  # as something forbidden
    found = np.asarray(truncate(jnp.asarray(scores), GenerationConfig(do_sample=True, **options)))
    expected = np.apply_along_axis(by_hand, -1, scores, options)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    np.testing.assert_allclose(softmax(found), softmax(expected), rtol=1e-5)


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_truncation_is_pytorchs(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    scores = np.random.default_rng(1).normal(0, 1.5, (6, 200)).astype(np.float32)
    theirs = torch.tensor(scores)
    for name, warper in (
        ("temperature", transformers.TemperatureLogitsWarper),
        ("top_k", transformers.TopKLogitsWarper),
        ("top_p", transformers.TopPLogitsWarper),
    ):
        if name in options:
            theirs = warper(options[name])(None, theirs)
    ours = truncate(jnp.asarray(scores), GenerationConfig(do_sample=True, **options))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_equal_scores_stay_together() -> None:
    scores = jnp.log(jnp.array([0.3, 0.2, 0.2, 0.2, 0.1]))
    kept = truncate(scores, GenerationConfig(do_sample=True, top_k=2))
    assert np.isfinite(kept).tolist() == [True, True, True, True, False]
    kept = truncate(scores, GenerationConfig(do_sample=True, top_p=0.4))
    assert np.isfinite(kept).tolist() == [True, True, True, True, False]


def sample(
    key: Any = None, seed: int = 0, tokens: np.ndarray | None = None, **options: Any
) -> np.ndarray:
    config = GenerationConfig(**{"max_new_tokens": LENGTH, "do_sample": True} | options)
    key = jax.random.key(0) if key is None else key
    tokens = inputs(WIDER) if tokens is None else tokens
    variables = initial(seed=seed, config=WIDER)
    return np.asarray(generate(T5(WIDER), variables, tokens, config, key).tokens)


@pytest.mark.parametrize(
    "options", [{}, dict(temperature=2.5, top_k=8, top_p=0.9)], ids=["all", "truncated"]
)
def test_tokens_are_drawn_as_often_as_they_should_be(options: dict[str, Any]) -> None:
    """The first two tokens, given the first: chi-square on a fixed seed."""
    draws, tokens = 150, np.repeat(inputs(WIDER)[2:3], 20, axis=0)
    found = sample(
        tokens=tokens, num_return_sequences=draws, max_new_tokens=2, min_new_tokens=1, **options
    ).reshape(-1, 2)
    first, counts = np.unique(found[:, 0], return_counts=True)
    common = int(first[counts.argmax()])
    shifted = np.array([[0, common]], np.int32)
    variables = initial(config=WIDER)
    logits = np.array(T5(WIDER).apply(variables, tokens[:1], shifted))[0]
    logits[0, 1] = -np.inf  # no end yet
    samples = (found[:, 0], found[found[:, 0] == common, 1])
    for row, drawn in zip(logits, samples, strict=True):
        p = softmax(by_hand(row, options))
        seen = np.bincount(drawn, minlength=len(p))
        assert not seen[p == 0].any()
        expected = p[p > 0] * len(drawn)
        statistic = ((seen[p > 0] - expected) ** 2 / expected).sum()
        freedom = len(expected) - 1
        assert statistic < freedom + 4 * np.sqrt(2 * freedom), (statistic, freedom)
        assert freedom >= 3 and len(drawn) > 300


def test_the_key_decides() -> None:
    first = sample()
    np.testing.assert_array_equal(first, sample())
    assert not np.array_equal(first, sample(key=jax.random.key(1)))
    np.testing.assert_array_equal(first, sample(key=jax.random.PRNGKey(0)))  # the older kind
    lengths = ends(first)
    assert len(np.unique(lengths)) >= 4


def test_a_row_draws_by_its_own_key_in_any_batch() -> None:
    tokens, keys = inputs(WIDER), jax.random.split(jax.random.key(5), 8)
    together = sample(key=keys)
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_array_equal(sample(key=keys[order], tokens=tokens[order]), together[order])
    np.testing.assert_array_equal(sample(key=keys[3:4], tokens=tokens[3:4]), together[3:4])
    folded = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(8))
    np.testing.assert_array_equal(sample(key=folded), sample(key=jax.random.key(0)))


def test_draws_of_one_input_differ_and_do_not_depend_on_their_number() -> None:
    several = sample(num_return_sequences=3)
    assert several.shape == (8, 3, LENGTH)
    assert not np.array_equal(several[:, 0], several[:, 1])
    np.testing.assert_array_equal(several[:, :2], sample(num_return_sequences=2))


def test_the_only_token_left_is_the_likeliest() -> None:
    greedy = generate(
        T5(WIDER), initial(config=WIDER), inputs(WIDER), GenerationConfig(max_new_tokens=LENGTH)
    ).tokens
    np.testing.assert_array_equal(sample(top_k=1), greedy)
    assert not np.array_equal(sample(), greedy)


def test_stacked_experts_draw_as_alone() -> None:
    spec = get_spec("lora")
    params = initial(config=WIDER)["params"]
    experts = [initial(spec, seed, WIDER)["expert"] for seed in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *experts)
    config = GenerationConfig(
        max_new_tokens=LENGTH, do_sample=True, top_k=5, num_return_sequences=2
    )
    model, key = T5(WIDER, spec), jax.random.key(3)
    together = stacked_generate(model, spec, params, stacked, inputs(WIDER), config, key)
    assert together.tokens.shape == (2, 8, 2, LENGTH) and together.scores is None
    for x, expert in enumerate(experts):
        variables = {"params": params, "expert": expert}
        alone = generate(model, variables, inputs(WIDER), config, key)
        np.testing.assert_array_equal(together.tokens[x], alone.tokens)


def test_keys_are_checked() -> None:
    run = (T5(WIDER), initial(config=WIDER), inputs(WIDER))
    with pytest.raises(ElmError, match="needs a random key, such as jax.random.key"):
        generate(*run, GenerationConfig(do_sample=True))
    with pytest.raises(ElmError, match="a key has no effect without do_sample"):
        generate(*run, GenerationConfig(), jax.random.key(0))
    with pytest.raises(ElmError, match=r"one for each of 8 inputs, got \(3,\)"):
        sample(key=jax.random.split(jax.random.key(0), 3))
