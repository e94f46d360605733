"""What all ways of generation share: options, forbidden tokens, what is compiled when."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import WIDER, initial, inputs

from elm_jax.decoding import GenerationConfig, generate, stacked_generate
from elm_jax.decoding.filters import forbid_repeats
from elm_jax.decoding.generation import _generate, _stacked_generate
from elm_jax.errors import ElmError
from elm_jax.models import T5, get_spec

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": dict(num_beams=3),
    "sampling": dict(do_sample=True, top_p=0.9),
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(max_new_tokens=2.0), "max_new_tokens must be at least 1, got 2.0"),
        (dict(max_new_tokens=True), "max_new_tokens must be at least 1, got True"),
        (dict(max_new_tokens=5, min_new_tokens=6), r"at most max_new_tokens \(5\), got 6"),
        (dict(num_beams=0), "num_beams must be at least 1, got 0"),
        (dict(num_beams=2, num_return_sequences=3), "3 is more than the 2 that the search keeps"),
        (dict(num_return_sequences=2), "raise num_beams, or set do_sample=True"),
        (dict(num_beams=2, do_sample=True), "a beam search does not draw"),
        (dict(num_beams=2, length_penalty=float("nan")), "a finite number, got nan"),
        (dict(num_beams=2, early_stopping="now"), "True, False or 'never', got 'now'"),
        (dict(num_beams=2, early_stopping=1), "True, False or 'never', got 1"),
        (dict(length_penalty=2.0), "length_penalty=2.0 has no effect without num_beams above 1"),
        (dict(early_stopping=True), "early_stopping=True has no effect without num_beams"),
        (dict(temperature=0.5), "temperature=0.5 has no effect without do_sample=True"),
        (dict(top_k=5), "top_k=5 has no effect without do_sample=True"),
        (dict(do_sample=True, temperature=0), "temperature must be above 0, got 0"),
        (dict(do_sample=True, top_p=1.5), "top_p must be above 0 and at most 1, got 1.5"),
        (dict(do_sample=True, top_k=-1), "top_k must be at least 0, got -1"),
        (dict(do_sample="yes"), "do_sample must be True or False, got 'yes'"),
        (dict(no_repeat_ngram_size=-1), "no_repeat_ngram_size must be at least 0, got -1"),
        (dict(eos_id=-1), "eos_id must be at least 0, got -1"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ElmError, match=message):
        GenerationConfig(**options)


def test_what_does_not_fit_the_model_is_refused() -> None:
    model, variables = T5(WIDER), initial(config=WIDER)
    with pytest.raises(ElmError, match="eos_id is 14, but the backbone's vocabulary ends at 13"):
        generate(model, variables, inputs(WIDER), GenerationConfig(eos_id=14))
    with pytest.raises(ElmError, match=r"must be int32 \[B, T\], got shape \[9\]"):
        generate(model, variables, inputs(WIDER)[0], GenerationConfig())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_forbidden_repeats_are_those_of_a_loop(size: int) -> None:
    rng = np.random.default_rng(size)
    tokens = rng.integers(0, 3, (5, 2, 9)).astype(np.int32)
    for position in range(9):
        scores = rng.normal(size=(5, 2, 4)).astype(np.float32)
        found = forbid_repeats(jnp.asarray(scores), jnp.asarray(tokens), position, size)
        for b, h in np.ndindex(5, 2):
            past = tokens[b, h, : position + 1].tolist()
            start = past[len(past) - size + 1 :] if size > 1 else []
            for i in range(len(past) - size + 1):
                if past[i : i + size - 1] == start and len(start) == size - 1:
                    scores[b, h, past[i + size - 1]] = -np.inf
        np.testing.assert_array_equal(found, scores)


@pytest.mark.parametrize("way", WAYS)
def test_another_expert_or_batch_compiles_nothing(way: str) -> None:
    """Values are arguments; a batch's width is rounded, at least to 32."""
    config = GenerationConfig(max_new_tokens=6, **WAYS[way])
    key = jax.random.key(0) if config.do_sample else None
    spec = get_spec("lora")
    model, params = T5(WIDER, spec), initial(config=WIDER)["params"]
    compiled, results = [], []
    for seed, length in ((0, 9), (1, 17), (2, 30), (3, 40))[: 4 if way == "greedy" else 3]:
        variables = {"params": params, "expert": initial(spec, seed, WIDER)["expert"]}
        tokens = np.pad(inputs(WIDER, batch=3, length=length), ((0, 0), (0, 64 - length)))
        results.append(np.asarray(generate(model, variables, tokens, config, key).tokens))
        compiled.append(_generate._cache_size())
    assert compiled[0] == compiled[1] == compiled[2]
    if way == "greedy":
        assert compiled[3] == compiled[2] + 1  # 40 tokens do not fit in 32: the count does count
    assert not np.array_equal(results[0], results[1])


def test_another_stack_of_experts_compiles_nothing() -> None:
    config, spec = GenerationConfig(max_new_tokens=6, num_beams=2), get_spec("lora")
    model, params = T5(WIDER, spec), initial(config=WIDER)["params"]
    compiled = []
    for seed in (0, 2, 4):
        experts = [initial(spec, seed + i, WIDER)["expert"] for i in range(2)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *experts)
        stacked_generate(model, spec, params, stacked, inputs(WIDER), config)
        compiled.append(_stacked_generate._cache_size())
    assert len(set(compiled)) == 1


@pytest.mark.parametrize("way", WAYS)
def test_least_and_most_tokens_and_padding(way: str) -> None:
    options = WAYS[way] | dict(max_new_tokens=7, min_new_tokens=3, pad_id=5)
    config = GenerationConfig(**options)
    key = jax.random.key(0) if config.do_sample else None
    found = generate(T5(WIDER), initial(config=WIDER), inputs(WIDER), config, key)
    assert found.tokens.shape == (8, 1, 7) and found.tokens.dtype == jnp.int32
    tokens = np.asarray(found.tokens[:, 0])
    assert not (tokens[:, :3] == 1).any()
    assert (tokens == 1).any()
    for row in tokens:
        end = np.flatnonzero(row == 1)
        if end.size:
            assert (row[end[0] + 1 :] == 5).all()


def test_a_longer_limit_draws_the_same() -> None:
    """Each row stops for itself, and its draws are those of its places."""
    found = []
    for limit in (5, 9):
        config = GenerationConfig(max_new_tokens=limit, do_sample=True)
        variables = initial(config=WIDER)
        out = generate(T5(WIDER), variables, inputs(WIDER), config, jax.random.key(0))
        found.append(np.asarray(out.tokens))
    np.testing.assert_array_equal(found[0], found[1][..., :5])


def test_in_bfloat16_scores_stay_float32() -> None:
    model = T5(WIDER.replace(dtype="bfloat16"))
    config = GenerationConfig(max_new_tokens=5, num_beams=3)
    found = generate(model, initial(config=WIDER), inputs(WIDER), config)
    assert found.scores.dtype == jnp.float32
    assert np.isfinite(found.scores).all()


def test_a_config_is_a_value() -> None:
    config = GenerationConfig(num_beams=4, early_stopping="never", length_penalty=0.5)
    assert GenerationConfig(**dataclasses.asdict(config)) == config
    assert hash(GenerationConfig(**dataclasses.asdict(config))) == hash(config)
