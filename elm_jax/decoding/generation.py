"""Text from a model and its expert: `generate`, and `stacked_generate` for X experts at once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.decoding.config import GenerationConfig
from elm_jax.decoding.search import START_ID, Generated, search
from elm_jax.decoding.shapes import trim_padding
from elm_jax.errors import ElmError
from elm_jax.experts.apply import bind_variables
from elm_jax.models import T5, ExpertSpec

Array = jax.Array


def start_cache(model: T5, variables: Any, tokens: Array, config: GenerationConfig) -> Any:
    """Encodes the input and returns the cache that decoding starts from.

    Args:
      model: the backbone with its expert's spec.
      variables: `params` and, with an adapter or LoRA, `expert`.
      tokens: int32 [B, T], 0 is padding.
      config: says how many tokens and hypotheses the cache must hold.
    """
    encoded = model.apply(variables, tokens, method="encode")
    # Of this step only the keys and values of `encoded` are used, so no more of it is compiled; the
    # loop does it again as its first. That keeps a second copy of the decoder out of the program.
    _, made = model.apply(
        variables,
        jnp.full((tokens.shape[0], config.hypotheses), START_ID),
        0,
        tokens,
        length=config.max_new_tokens,
        encoded=encoded,
        method="decode_step",
        mutable=["cache"],
    )

    def empty(path: Any, array: Array) -> Array:
        return jnp.zeros_like(array) if path[-1].key.startswith("self_") else array

    return jax.tree_util.tree_map_with_path(empty, made["cache"])


def next_scores(
    model: T5,
    variables: Any,
    tokens: Array,
    config: GenerationConfig,
    cache: Any,
    last: Array,
    position: Array,
    ancestors: Array | None,
) -> tuple[Array, Any]:
    """Scores the token after `last` [B, H]; see `search.Step` and `T5.decode_step`."""
    logits, made = model.apply(
        {**variables, "cache": cache},
        last,
        position,
        tokens,
        length=config.max_new_tokens,
        ancestors=ancestors,
        method="decode_step",
        mutable=["cache"],
    )
    return logits, made["cache"]


@functools.partial(jax.jit, static_argnames=("model", "config"))
def _generate(
    model: T5, variables: Any, tokens: Array, config: GenerationConfig, keys: Array | None
) -> Generated:
    cache = start_cache(model, variables, tokens, config)
    step = functools.partial(next_scores, model, variables, tokens, config)
    return search(step, cache, tokens.shape[0], config, keys)


@functools.partial(jax.jit, static_argnames=("model", "spec", "config"))
def _stacked_generate(
    model: T5,
    spec: ExpertSpec,
    params: Any,
    experts: Any,
    tokens: Array,
    config: GenerationConfig,
    keys: Array | None,
) -> Generated:
    # The loop is outside of vmap: a batched loop condition would copy the caches in every step.
    # Inside of it, X experts on B inputs are X * B rows.
    variables = bind_variables(spec, params, experts)  # a task vector broadcasts over X
    axes = {"params": None, "expert": 0} if "expert" in variables else {"params": 0}
    width, batch = jax.tree.leaves(experts)[0].shape[0], tokens.shape[0]

    def split(rows: Array) -> Array:
        return rows.reshape(width, batch, *rows.shape[1:])

    def join(array: Array) -> Array:
        return array.reshape(width * batch, *array.shape[2:])

    @functools.partial(jax.vmap, in_axes=(axes,))
    def start(variables: Any) -> Any:
        return start_cache(model, variables, tokens, config)

    @functools.partial(jax.vmap, in_axes=(axes, 0, 0, None, 0))
    def after(
        variables: Any, cache: Any, last: Array, position: Array, ancestors: Array | None
    ) -> tuple[Array, Any]:
        return next_scores(model, variables, tokens, config, cache, last, position, ancestors)

    def step(
        cache: Any, last: Array, position: Array, ancestors: Array | None
    ) -> tuple[Array, Any]:
        ancestors = None if ancestors is None else split(ancestors)
        logits, cache = after(variables, cache, split(last), position, ancestors)
        return join(logits), cache

    if keys is not None:
        keys = jnp.tile(keys, width)  # an expert draws as it would alone
    found = search(step, start(variables), width * batch, config, keys)
    scores = None if found.scores is None else split(found.scores)
    return Generated(split(found.tokens), scores, found.steps)


def _row_keys(config: GenerationConfig, key: Array | None, batch: int) -> Array | None:
    """Returns random keys [B], or None where nothing is drawn."""
    if not config.do_sample:
        if key is not None:
            raise ElmError("a key has no effect without do_sample=True")
        return None
    if key is None:
        raise ElmError("do_sample=True needs a random key, such as jax.random.key(0)")
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape == ():
        return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch))
    if key.shape != (batch,):
        raise ElmError(f"expected one key, or one for each of {batch} inputs, got {key.shape}")
    return key


def _prepare(
    model: T5, tokens: np.ndarray | Array, config: GenerationConfig, key: Array | None
) -> tuple[Any, Array | None]:
    if tokens.ndim != 2:
        raise ElmError(f"encoder_input_tokens must be int32 [B, T], got shape {list(tokens.shape)}")
    for name in ("eos_id", "pad_id"):
        if getattr(config, name) >= model.config.vocab_size:
            raise ElmError(
                f"{name} is {getattr(config, name)}, but the backbone's vocabulary ends at "
                f"{model.config.vocab_size - 1}"
            )
    return trim_padding(tokens), _row_keys(config, key, tokens.shape[0])


def generate(
    model: T5,
    variables: Any,
    encoder_input_tokens: np.ndarray | Array,
    config: GenerationConfig,
    key: Array | None = None,
) -> Generated:
    """Generates sequences for each input; stops when all have ended.

    Compiled once for each config and rounded shape: another expert, or another batch whose longest
    input is rounded to the same length, compiles nothing.

    Args:
      model: the backbone with its expert's spec.
      variables: `params` and, with an adapter or LoRA, `expert`; see `bind_variables`.
      encoder_input_tokens: int32 [B, T], 0 is padding; a NumPy array is cut to its longest input.
      config: how tokens are chosen.
      key: with `do_sample`, a random key, or keys [B], one for each input, so that what is drawn
        for an input does not depend on the batch that it is in. From a single key each row's is
        made with `jax.random.fold_in(key, row)`.

    Returns:
      `Generated`: tokens int32 [B, R, U], where R is `num_return_sequences` and U
      `max_new_tokens`; the scores float32 [B, R] of a beam search; and the number of steps.

    Raises:
      ElmError: for `eos_id` or `pad_id` outside the vocabulary, or keys that do not fit.

    Source: greedy and beam search, token for token, Hugging Face transformers' `generate`.
    """
    tokens, keys = _prepare(model, encoder_input_tokens, config, key)
    return _generate(model, variables, tokens, config, keys)


def stacked_generate(
    model: T5,
    spec: ExpertSpec,
    params: Any,
    experts: Any,
    encoder_input_tokens: np.ndarray | Array,
    config: GenerationConfig,
    key: Array | None = None,
) -> Generated:
    """Generates for the same inputs with X experts at once over one backbone.

    Args:
      model: the backbone with the experts' spec.
      spec: the experts' spec.
      params: the backbone.
      experts: the stacked experts, each array [X, ...].
      encoder_input_tokens: int32 [B, T].
      config: how tokens are chosen.
      key: as in `generate`; each expert draws what it would draw alone.

    Returns:
      As `generate`, with a leading X: tokens int32 [X, B, R, U], scores float32 [X, B, R].

    Raises:
      ElmError: as `generate`.
    """
    tokens, keys = _prepare(model, encoder_input_tokens, config, key)
    return _stacked_generate(model, spec, params, experts, tokens, config, keys)
