"""Greedy decoding with a key-value cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.decoding.rank import EOS_ID
from elm_jax.decoding.shapes import trim_padding
from elm_jax.errors import ElmError
from elm_jax.experts.apply import bind_variables
from elm_jax.models import T5, ExpertSpec

Array = jax.Array
Step = Callable[[Any, Array, Array], tuple[Array, Any]]
"""(cache, tokens [..., B], position) -> (logits [..., B, V], cache)."""


def _greedy_loop(
    first: tuple[Array, Any], step: Step, length: int, eos_id: int
) -> tuple[Array, Array]:
    """Follows the likeliest token until every row has ended.

    Args:
      first: logits [..., B, V] of position 0, and the cache.
      step: scores the next position.
      length: most tokens to decode.
      eos_id: the end-of-sequence token.

    Returns:
      Tokens int32 [..., B, length], and how many positions were scored, int32 scalar.
    """

    def emit(state: tuple[Array, ...], logits: Array) -> tuple[Array, ...]:
        position, out, done = state
        token = jnp.where(done, 0, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        out = jax.lax.dynamic_update_index_in_dim(out, token, position, axis=-1)
        return position + 1, out, done | (token == eos_id)

    def body(carry: tuple[tuple[Array, ...], Any]) -> tuple[tuple[Array, ...], Any]:
        state, cache = carry
        position, out, _ = state
        token = jax.lax.dynamic_index_in_dim(out, position - 1, axis=-1, keepdims=False)
        logits, cache = step(cache, token, position)
        return emit(state, logits), cache

    def going(carry: tuple[tuple[Array, ...], Any]) -> Array:
        (position, _, done), _ = carry
        return (position < length) & ~done.all()

    logits, cache = first
    rows = logits.shape[:-1]
    empty = (jnp.int32(0), jnp.zeros((*rows, length), jnp.int32), jnp.zeros(rows, bool))
    (position, out, _), _ = jax.lax.while_loop(going, body, (emit(empty, logits), cache))
    return out, position


def _first(model: T5, variables: Any, tokens: Array, length: int) -> tuple[Array, Any]:
    """Encodes the input and scores position 0."""
    start = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    encoded = model.apply(variables, tokens, method="encode")
    logits, made = model.apply(
        variables,
        start,
        0,
        tokens,
        length=length,
        encoded=encoded,
        method="decode_step",
        mutable=["cache"],
    )
    return logits[:, 0], made["cache"]


def _next(
    model: T5, variables: Any, tokens: Array, length: int, cache: Any, last: Array, position: Array
) -> tuple[Array, Any]:
    """Scores the position after `last` [B]."""
    logits, made = model.apply(
        {**variables, "cache": cache},
        last[:, None],
        position,
        tokens,
        length=length,
        method="decode_step",
        mutable=["cache"],
    )
    return logits[:, 0], made["cache"]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _greedy(
    model: T5, variables: Any, tokens: Array, length: int, eos_id: int
) -> tuple[Array, Array]:
    step = functools.partial(_next, model, variables, tokens, length)
    return _greedy_loop(_first(model, variables, tokens, length), step, length, eos_id)


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6))
def _stacked_greedy(
    model: T5, spec: ExpertSpec, params: Any, experts: Any, tokens: Array, length: int, eos_id: int
) -> tuple[Array, Array]:
    # The loop is outside of vmap: a batched loop condition would copy the caches in every step.
    variables = bind_variables(spec, params, experts)  # a task vector broadcasts over X
    axes = {"params": None, "expert": 0} if "expert" in variables else {"params": 0}

    def first(variables: Any) -> tuple[Array, Any]:
        return _first(model, variables, tokens, length)

    def after(variables: Any, cache: Any, last: Array, position: Array) -> tuple[Array, Any]:
        return _next(model, variables, tokens, length, cache, last, position)

    step = functools.partial(jax.vmap(after, in_axes=(axes, 0, 0, None)), variables)
    return _greedy_loop(jax.vmap(first, in_axes=(axes,))(variables), step, length, eos_id)


def _check_length(max_decode_len: int) -> None:
    if max_decode_len < 1:
        raise ElmError(f"max_decode_len must be at least 1, got {max_decode_len!r}")


def greedy_decode(
    model: T5,
    variables: Any,
    encoder_input_tokens: np.ndarray | Array,
    *,
    max_decode_len: int,
    eos_id: int = EOS_ID,
) -> Array:
    """Decodes the likeliest token at each position; stops when every row has ended.

    Args:
      model: the backbone with its expert's spec.
      variables: `params` and, with an adapter or LoRA, `expert`.
      encoder_input_tokens: int32 [B, T], 0 is padding; a NumPy array is cut to its longest input.
      max_decode_len: most tokens to decode.
      eos_id: the end-of-sequence token.

    Returns:
      int32 [B, max_decode_len]; the end-of-sequence token is kept, 0 follows it.

    Raises:
      ElmError: if `max_decode_len` is below 1.
    """
    _check_length(max_decode_len)
    tokens = trim_padding(encoder_input_tokens)
    return _greedy(model, variables, tokens, max_decode_len, eos_id)[0]


def stacked_greedy_decode(
    model: T5,
    spec: ExpertSpec,
    params: Any,
    experts: Any,
    encoder_input_tokens: np.ndarray | Array,
    *,
    max_decode_len: int,
    eos_id: int = EOS_ID,
) -> Array:
    """Decodes the same inputs with X experts at once over one backbone.

    Args:
      model: the backbone with the experts' spec.
      spec: the experts' spec.
      params: the backbone.
      experts: the stacked experts, each array [X, ...].
      encoder_input_tokens: int32 [B, T].
      max_decode_len: most tokens to decode.
      eos_id: the end-of-sequence token.

    Returns:
      int32 [X, B, max_decode_len], as `greedy_decode`.

    Raises:
      ElmError: if `max_decode_len` is below 1.
    """
    _check_length(max_decode_len)
    tokens = trim_padding(encoder_input_tokens)
    return _stacked_greedy(model, spec, params, experts, tokens, max_decode_len, eos_id)[0]
