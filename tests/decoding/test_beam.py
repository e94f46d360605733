"""Beam search against Hugging Face's `generate`, against all sequences there are, and itself."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import CONFIG, WIDER, ends, initial, inputs, padded, torch_generate

from elm_jax.decoding import GenerationConfig, generate, stacked_generate
from elm_jax.models import T5, get_spec

LENGTH = 10
BATCH = inputs(WIDER, batch=6)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": dict(num_beams=4),
    "two beams, both": dict(num_beams=2, num_return_sequences=2),
    "all of three, long preferred": dict(num_beams=3, num_return_sequences=3, length_penalty=2.0),
    "sums": dict(num_beams=4, length_penalty=0.0, early_stopping="never"),
    "early": dict(num_beams=4, num_return_sequences=4, early_stopping=True),
    "never, long preferred": dict(num_beams=4, early_stopping="never", length_penalty=1.5),
    "never, short preferred": dict(num_beams=3, early_stopping="never", length_penalty=-0.5),
    "no unigram twice": dict(num_beams=3, no_repeat_ngram_size=1, max_new_tokens=6),
    "no bigram twice": dict(num_beams=4, num_return_sequences=3, no_repeat_ngram_size=2),
    "at least 5": dict(num_beams=4, num_return_sequences=2, min_new_tokens=5),
    "one token": dict(num_beams=2, max_new_tokens=1),
    "all at once": dict(
        num_beams=3, num_return_sequences=3, no_repeat_ngram_size=2, min_new_tokens=3,
        length_penalty=0.7, early_stopping=True,
    ),
}  # fmt: skip


def beams(seed: int = 0, tokens: np.ndarray = BATCH, **options: Any) -> Any:
    config = GenerationConfig(**{"max_new_tokens": LENGTH, "num_beams": 4} | options)
    return generate(T5(WIDER), initial(seed=seed, config=WIDER), tokens, config)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_pytorch_generate(name: str) -> None:
    options = {"max_new_tokens": LENGTH} | OPTIONS[name]
    returned = options.get("num_return_sequences", 1)
    for seed in range(4):
        theirs = torch_generate(seed, WIDER, BATCH, **options)
        ours = beams(seed, **options)
        length = options["max_new_tokens"]
        expected = padded(theirs.sequences.numpy(), length).reshape(len(BATCH), returned, length)
        np.testing.assert_array_equal(ours.tokens, expected, err_msg=f"seed {seed}")
        scores = theirs.sequences_scores.numpy().reshape(len(BATCH), returned)
        np.testing.assert_allclose(ours.scores, scores, rtol=1e-4, err_msg=f"seed {seed}")


def test_equals_pytorch_generate_where_the_embedding_is_tied() -> None:
    config = WIDER.replace(logits_via_embedding=True, mlp_activations=("relu",), vocab_size=40)
    options = dict(num_beams=3, num_return_sequences=2, max_new_tokens=LENGTH)
    lengths = set()
    for seed in range(6):
        tokens = inputs(config)
        theirs = torch_generate(seed, config, tokens, **options)
        ours = generate(
            T5(config), initial(seed=seed, config=config), tokens, GenerationConfig(**options)
        )
        expected = padded(theirs.sequences.numpy(), LENGTH).reshape(len(tokens), 2, LENGTH)
        np.testing.assert_array_equal(ours.tokens, expected)
        lengths |= set(ends(ours.tokens).ravel().tolist())
    assert len(lengths) > 2


def test_the_options_matter_and_rows_end_at_different_times() -> None:
    """Guards the comparisons above against being empty."""
    plain = [np.asarray(beams(seed).tokens) for seed in range(6)]
    lengths = ends(np.stack(plain))
    assert len(np.unique(lengths)) >= 6
    assert max(len(np.unique(of_seed)) for of_seed in lengths) >= 4
    for name in ("sums", "early", "never, long preferred", "no bigram twice", "at least 5"):
        changed = [np.asarray(beams(seed, **OPTIONS[name]).tokens)[:, :1] for seed in range(6)]
        assert not np.array_equal(changed, plain), name


def test_enough_beams_find_the_best_of_all_sequences() -> None:
    config, length = CONFIG.replace(vocab_size=5), 3
    tokens, model = inputs(config, batch=3), T5(config)
    apply = jax.jit(model.apply)
    every = {
        tuple(np.where(np.cumsum(np.array(s) == 1) - (np.array(s) == 1) > 0, 0, s))
        for s in itertools.product(range(5), repeat=length)
    }
    targets = np.array(sorted(every), np.int32)
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    scored = np.where(np.cumsum(targets == 1, axis=1) - (targets == 1) > 0, 0, 1)
    for seed in range(3):
        variables = initial(seed=seed, config=config)
        search = GenerationConfig(
            max_new_tokens=length, num_beams=25, length_penalty=0.0, early_stopping="never"
        )
        found = generate(model, variables, tokens, search)
        for row, source in enumerate(tokens):
            logits = apply(variables, np.tile(source, (len(targets), 1)), shifted)
            log_p = np.asarray(jax.nn.log_softmax(logits))
            chosen = np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
            total = (chosen * scored).sum(-1)
            np.testing.assert_array_equal(found.tokens[row, 0], targets[total.argmax()])
            assert float(found.scores[row, 0]) == pytest.approx(total.max(), abs=1e-4)


def test_scores_are_those_of_the_sequences() -> None:
    """A cache whose slots were confused would show here."""
    model, variables = T5(WIDER), initial(seed=3, config=WIDER)
    config = GenerationConfig(max_new_tokens=LENGTH, num_beams=4, num_return_sequences=4)
    found = generate(model, variables, BATCH, config)
    targets = np.asarray(found.tokens).reshape(-1, LENGTH)
    lengths = ends(targets)
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    logits = jax.jit(model.apply)(variables, np.repeat(BATCH, 4, axis=0), shifted)
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=-1)[
        ..., 0
    ]
    total = (log_p * (np.arange(LENGTH) < lengths[:, None])).sum(-1) / lengths
    np.testing.assert_allclose(found.scores.ravel(), total, rtol=1e-4)
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_stops_when_no_row_can_improve() -> None:
    steps = set()
    for seed in range(6):
        together = int(beams(seed, early_stopping=True).steps)
        alone = [
            int(beams(seed, tokens=BATCH[i : i + 1], early_stopping=True).steps) for i in range(6)
        ]
        assert together == max(alone)
        steps |= set(alone)
    assert min(steps) < LENGTH and len(steps) > 2


def test_a_row_does_not_depend_on_its_batch() -> None:
    together = beams(num_return_sequences=4)
    for i in range(len(BATCH)):
        alone = beams(tokens=BATCH[i : i + 1], num_return_sequences=4)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])


def test_stacked_equals_each_expert_alone() -> None:
    spec = get_spec("lora")
    model, params = T5(WIDER, spec), initial(config=WIDER)["params"]
    config = GenerationConfig(max_new_tokens=LENGTH, num_beams=3, num_return_sequences=2)
    alone = [initial(spec, seed, WIDER)["expert"] for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    together = stacked_generate(model, spec, params, stacked, BATCH, config)
    assert together.tokens.shape == (3, 6, 2, LENGTH) and together.scores.shape == (3, 6, 2)
    for x, expert in enumerate(alone):
        found = generate(model, {"params": params, "expert": expert}, BATCH, config)
        np.testing.assert_array_equal(together.tokens[x], found.tokens)
        np.testing.assert_allclose(together.scores[x], found.scores, rtol=1e-4)
    assert not np.array_equal(together.tokens[0], together.tokens[1])


def test_scanned_layers_give_the_same_beams() -> None:
    from elm_jax.models.scan import stack_layers

    variables = initial(config=WIDER)
    scanned = {"params": stack_layers(variables["params"], WIDER)}
    config = GenerationConfig(max_new_tokens=LENGTH, num_beams=4)
    found = generate(T5(WIDER.replace(scan_layers=True)), scanned, BATCH, config)
    np.testing.assert_array_equal(found.tokens, beams().tokens)
