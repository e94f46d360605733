"""Greedy decoding against full recomputation and PyTorch's `generate`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import CONFIG, WIDER, ends, initial, inputs, padded, torch_generate

from elm_jax.decoding import GenerationConfig, generate, greedy_decode, stacked_generate
from elm_jax.errors import ElmError
from elm_jax.models import T5, FullSpec, get_spec

LENGTH = 10
GREEDY = GenerationConfig(max_new_tokens=LENGTH)


def step_by_step(model: T5, variables: dict, tokens: np.ndarray, length: int) -> np.ndarray:
    """Argmax of the last position, all positions computed anew each time."""
    out = np.zeros((len(tokens), length), np.int32)
    done = np.zeros(len(tokens), bool)
    apply = jax.jit(model.apply)
    for u in range(length):
        shifted = np.pad(out, ((0, 0), (1, 0)))[:, :length]
        token = np.asarray(jnp.argmax(apply(variables, tokens, shifted)[:, u], axis=-1))
        out[:, u] = np.where(done, 0, token)
        done |= token == 1
    return out


@pytest.mark.parametrize("kind", [None, "elm_code", "lora"])
def test_equals_full_recomputation(kind: str | None) -> None:
    spec = None if kind is None else get_spec(kind)
    model, variables = T5(CONFIG, spec), initial(spec)
    tokens = greedy_decode(model, variables, inputs(), max_decode_len=LENGTH)
    assert tokens.shape == (8, LENGTH) and tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, step_by_step(model, variables, inputs(), LENGTH))


def test_outputs_vary_and_some_end_early() -> None:
    """Guards the comparisons of this file against being empty."""
    lengths = [
        ends(greedy_decode(T5(CONFIG), initial(seed=seed), inputs(), max_decode_len=LENGTH))
        for seed in range(4)
    ]
    assert LENGTH in np.ravel(lengths) and len(np.unique(lengths)) > 3, lengths


@pytest.mark.parametrize(
    "options",
    [{}, {"min_new_tokens": 6}, {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3}],
    ids=["plain", "at least 6", "no bigram twice", "no trigram twice"],
)
def test_equals_pytorch_generate(options: dict[str, Any]) -> None:
    options, tokens = {"max_new_tokens": LENGTH, **options}, inputs(WIDER)
    changed = False
    for seed in range(5):
        theirs = torch_generate(seed, WIDER, tokens, num_beams=1, do_sample=False, **options)
        variables = initial(seed=seed, config=WIDER)
        ours = generate(T5(WIDER), variables, tokens, GenerationConfig(**options)).tokens
        np.testing.assert_array_equal(ours[:, 0], padded(theirs.sequences.numpy(), LENGTH))
        plain = generate(T5(WIDER), variables, tokens, GREEDY).tokens
        changed = changed or not np.array_equal(ours, plain)
    assert changed == (len(options) > 1)


def test_stops_when_every_row_has_ended() -> None:
    """A row's steps are its tokens up to the end; the loop takes those of the longest row."""
    seen = set()
    for seed in range(4):
        for tokens in np.split(inputs(), 8):
            found = generate(T5(CONFIG), initial(seed=seed), tokens, GREEDY)
            assert int(found.steps) == ends(found.tokens).max()
            seen.add(int(found.steps))
    assert min(seen) < LENGTH


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_stacked_equals_each_expert_alone(kind: str) -> None:
    spec = get_spec(kind)
    model, params = T5(CONFIG, spec), initial()["params"]
    alone = [
        jax.tree.map(lambda p: p * 0.5, initial(None, seed)["params"])
        if isinstance(spec, FullSpec)
        else initial(spec, seed)["expert"]
        for seed in (1, 2, 3)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    together = stacked_generate(model, spec, params, stacked, inputs(), GREEDY).tokens[:, :, 0]
    assert together.shape == (3, 8, LENGTH)
    for x, expert in enumerate(alone):
        if isinstance(spec, FullSpec):
            variables = {"params": jax.tree.map(jnp.add, params, expert)}
        else:
            variables = {"params": params, "expert": expert}
        one = greedy_decode(model, variables, inputs(), max_decode_len=LENGTH)
        np.testing.assert_array_equal(together[x], one)
    assert not np.array_equal(together[0], together[1])


def test_stacked_steps_are_those_of_the_longest() -> None:
    spec = get_spec("lora")
    model, params = T5(WIDER, spec), initial(config=WIDER)["params"]
    alone = [initial(spec, seed, WIDER)["expert"] for seed in (6, 7)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    seen = set()
    for tokens in np.split(inputs(WIDER), 8):
        found = stacked_generate(model, spec, params, stacked, tokens, GREEDY)
        assert int(found.steps) == ends(found.tokens).max()
        seen.add(int(found.steps))
    assert min(seen) < LENGTH


def test_vmap_over_experts() -> None:
    spec = get_spec("adapter")
    model, params = T5(CONFIG, spec), initial()["params"]
    alone = [initial(spec, seed)["expert"] for seed in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)

    def one(expert: dict) -> jax.Array:
        variables = {"params": params, "expert": expert}
        return greedy_decode(model, variables, inputs(), max_decode_len=LENGTH)

    expected = stacked_generate(model, spec, params, stacked, inputs(), GREEDY).tokens[:, :, 0]
    np.testing.assert_array_equal(jax.vmap(one)(stacked), expected)


def test_shorter_limit_is_a_prefix() -> None:
    model, variables = T5(CONFIG), initial()
    whole = greedy_decode(model, variables, inputs(), max_decode_len=LENGTH)
    part = greedy_decode(model, variables, inputs(), max_decode_len=1)
    np.testing.assert_array_equal(part, whole[:, :1])


def test_padding_of_the_input_does_not_count() -> None:
    model, variables = T5(CONFIG), initial()
    narrow = greedy_decode(model, variables, inputs(), max_decode_len=LENGTH)
    wide = jnp.pad(inputs(), ((0, 0), (0, 30)))
    np.testing.assert_array_equal(
        greedy_decode(model, variables, wide, max_decode_len=LENGTH), narrow
    )


def test_no_room_is_refused() -> None:
    with pytest.raises(ElmError, match="max_new_tokens must be at least 1, got 0"):
        greedy_decode(T5(CONFIG), initial(), inputs(), max_decode_len=0)
