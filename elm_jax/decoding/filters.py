"""What may come next: scores are made -inf where a token must not be chosen.

All shapes are static, so that these run inside a compiled loop.
Shapes: B inputs, H hypotheses per input, U new tokens, V vocab. Scores are float32 [B, H, V].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from elm_jax.decoding.config import GenerationConfig

Array = jax.Array


def forbid(scores: Array, tokens: Array, position: Array, config: GenerationConfig) -> Array:
    """Applies `no_repeat_ngram_size` and `min_new_tokens`.

    Args:
      scores: float32 [B, H, V], of the token after `position`.
      tokens: int32 [B, H, U + 1], the start token and what was chosen since.
      position: int32 scalar, the last place in `tokens` that is filled.
      config: the two options.
    """
    if config.no_repeat_ngram_size:
        scores = forbid_repeats(scores, tokens, position, config.no_repeat_ngram_size)
    if config.min_new_tokens:
        ends = jnp.arange(scores.shape[-1]) == config.eos_id
        scores = jnp.where(ends & (position < config.min_new_tokens), -jnp.inf, scores)
    return scores


def forbid_repeats(scores: Array, tokens: Array, position: Array, size: int) -> Array:
    """Forbids each token that would end a run of `size` tokens for the second time.

    The start token counts as a token of its sequence, as in Hugging Face's `generate`.

    Args:
      scores: float32 [B, H, V].
      tokens: int32 [B, H, U + 1].
      position: int32 scalar, the last place in `tokens` that is filled.
      size: the length of a run, at least 1.

    >>> tokens = jnp.array([[[0, 3, 1, 3, 0]]])
    >>> forbid_repeats(jnp.zeros((1, 1, 4)), tokens, jnp.int32(3), 2)  # 3 1 came before
    Array([[[  0., -inf,   0.,   0.]]], dtype=float32)
    """
    runs = tokens.shape[-1] - size + 1
    if runs < 1:
        return scores
    last = tokens[..., size - 1 :]  # of each run
    repeats = jnp.arange(runs) + size - 1 <= position  # the run is complete
    for i in range(size - 1):
        # Before the first complete run this reads an arbitrary token, and no run is complete.
        now = jax.lax.dynamic_index_in_dim(tokens, position - (size - 2) + i, axis=-1)
        repeats = repeats & (tokens[..., i : i + runs] == now)
    rows, hypotheses = jnp.indices(tokens.shape[:2])
    limit = jnp.where(repeats, -jnp.inf, jnp.inf)
    return scores.at[rows[..., None], hypotheses[..., None], last].min(limit)


def truncate(scores: Array, config: GenerationConfig) -> Array:
    """Applies `temperature`, then `top_k`, then `top_p`, each to what the one before leaves.

    Equal scores stay or go together, so that more than `top_k` may stay.

    Args:
      scores: float32 [..., V], unnormalised log-probabilities.
      config: the three options.

    Source: Fan et al. (2018), section 5.1, for top k; Holtzman et al. (2020), section 3.1, for
    top p; the order is that of Hugging Face's `generate`.
    """
    scores = scores / config.temperature
    if 0 < config.top_k < scores.shape[-1]:
        least = jax.lax.top_k(scores, config.top_k)[0][..., -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if config.top_p < 1:
        scores = keep_top_p(scores, config.top_p)
    return scores


def keep_top_p(scores: Array, top_p: float) -> Array:
    """Keeps a token if those with a higher score hold less than `top_p` of the probability.

    The least score to keep is found by bisection over the float32 numbers, exactly and in 32
    passes: cheaper than to sort a vocabulary.

    Args:
      scores: float32 [..., V].
      top_p: in (0, 1).
    """
    probabilities = jax.nn.softmax(scores, axis=-1)
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)  # integers in the same order

    def halve(_: int, limits: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = limits
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
        above = jnp.sum(jnp.where(order > middle, probabilities, 0.0), axis=-1, keepdims=True)
        enough = above < top_p
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    shape = (*scores.shape[:-1], 1)
    limits = jnp.iinfo(jnp.int32)
    bounds = jnp.full(shape, limits.min, jnp.int32), jnp.full(shape, limits.max, jnp.int32)
    least, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(order >= least, scores, -jnp.inf)
