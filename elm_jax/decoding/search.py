"""Greedy search, sampling and beam search over any function that scores the next token.

Each is one `lax.while_loop`, which ends when every row has ended. Rows do not see each other.
Shapes: B inputs, H hypotheses per input, U new tokens, V vocab, C = 2 H candidates.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.decoding.config import GenerationConfig
from elm_jax.decoding.filters import forbid, truncate

Array = jax.Array
START_ID = 0
"""The decoder's first input, T5's."""
WORST = -1e9
"""Added to the score of a beam that is out of the race, as Hugging Face does."""


class Step(Protocol):
    """Scores the token after `position`.

    Called with the cache; the tokens at `position`, int32 [B, H]; the position, int32 scalar; and,
    in a beam search, the ancestors int32 [B, H, U] (see `T5.decode_step`). Returns scores
    float32 [B, H, V] and the cache.
    """

    def __call__(
        self, cache: Any, last: Array, position: Array, ancestors: Array | None, /
    ) -> tuple[Array, Any]: ...


class Generated(NamedTuple):
    """What a search returns, R sequences for each input.

    Attributes:
      tokens: int32 [B, R, U], the end-of-sequence token kept, `pad_id` after it.
      scores: float32 [B, R], in a beam search: the summed log-probability of each sequence, divided
        by its length to the power of `length_penalty`; in falling order. Else None.
      steps: int32 scalar, how often the next token was scored.
    """

    tokens: Array
    scores: Array | None
    steps: Array


def search(
    step: Step, cache: Any, batch: int, config: GenerationConfig, keys: Array | None = None
) -> Generated:
    """Follows the likeliest or drawn tokens, or the best beams; pure, so it may be traced.

    Args:
      step: scores the next token.
      cache: what `step` is first given.
      batch: B.
      config: how tokens are chosen.
      keys: random keys [B], with `do_sample`. A row's draws depend on its key alone.
    """
    if config.num_beams > 1:
        return _search_beams(step, cache, batch, config)
    return _follow(step, cache, batch, config, keys)


def _buffer(batch: int, config: GenerationConfig) -> Array:
    """Returns tokens int32 [B, H, U + 1]: the start token, then padding."""
    shape = (batch, config.hypotheses, config.max_new_tokens + 1)
    return jnp.full(shape, config.pad_id, jnp.int32).at[..., 0].set(START_ID)


def _likeliest(scores: Array) -> Array:
    """Returns the first argmax over the last axis; two plain reductions, which CPUs do faster."""
    vocab = scores.shape[-1]
    best = scores == jnp.max(scores, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(best, jnp.arange(vocab, dtype=jnp.int32), vocab), axis=-1)
    return jnp.minimum(first, vocab - 1)  # a row of NaN has no maximum


class _Followed(NamedTuple):
    position: Array
    tokens: Array
    done: Array
    cache: Any


def _follow(
    step: Step, cache: Any, batch: int, config: GenerationConfig, keys: Array | None
) -> Generated:
    """One token at a time for each hypothesis, which keep to themselves."""
    hypotheses = jnp.arange(config.hypotheses)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))  # [B], [H] -> [B, H]
    streams = None if keys is None else fold(keys, hypotheses)

    def choose(scores: Array, position: Array) -> Array:
        if streams is None:
            return _likeliest(scores)

        def draw(stream: Array, row: Array) -> Array:
            return jax.random.categorical(jax.random.fold_in(stream, position), row)

        return jax.vmap(jax.vmap(draw))(streams, truncate(scores, config)).astype(jnp.int32)

    def body(state: _Followed) -> _Followed:
        position, tokens, done, cache = state
        last = jax.lax.dynamic_index_in_dim(tokens, position, axis=-1, keepdims=False)
        scores, cache = step(cache, last, position, None)
        token = choose(forbid(scores, tokens, position, config), position)
        token = jnp.where(done, config.pad_id, token)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, position + 1, axis=-1)
        return _Followed(position + 1, tokens, done | (token == config.eos_id), cache)

    def going(state: _Followed) -> Array:
        return (state.position < config.max_new_tokens) & ~state.done.all()

    none = jnp.zeros((batch, config.hypotheses), bool)
    start = _Followed(jnp.int32(0), _buffer(batch, config), none, cache)
    end = jax.lax.while_loop(going, body, start)
    return Generated(end.tokens[..., 1:], None, end.position)


class _Beams(NamedTuple):
    """The state of a beam search.

    Attributes:
      position: int32 scalar, the last place in `tokens` that is filled.
      tokens: int32 [B, H, U + 1], of the running beams, best first.
      scores: float32 [B, H], their summed log-probabilities.
      ancestors: int32 [B, H, U], in whose cache slot each of their tokens is.
      ended_tokens: int32 [B, H, U + 1], the best sequences that have ended.
      ended_scores: float32 [B, H], theirs, with the length penalty.
      ended: bool [B, H], whether there is such a sequence yet.
      open: bool [B], whether a running beam might still get among them.
      cache: the step's.
    """

    position: Array
    tokens: Array
    scores: Array
    ancestors: Array
    ended_tokens: Array
    ended_scores: Array
    ended: Array
    open: Array
    cache: Any


def _pick(index: Array, *arrays: Array) -> tuple[Array, ...]:
    """Takes hypotheses: index int32 [B, n] of arrays [B, H, ...] -> [B, n, ...]."""
    return tuple(jax.vmap(lambda row, i: row[i])(array, index) for array in arrays)


def _search_beams(step: Step, cache: Any, batch: int, config: GenerationConfig) -> Generated:
    """The beam search of Hugging Face's `generate`, token for token.

    Of the 2 H best continuations of the beams, H run on (at most H of them have just ended), and
    those of the best H that have ended compete with the ended ones before them.
    """
    beams, limit = config.num_beams, config.max_new_tokens
    # In double precision, as the lengths and the power are Python numbers there.
    penalties = jnp.asarray(
        np.concatenate([[1.0], np.arange(1.0, limit + 1) ** config.length_penalty]), jnp.float32
    )

    def body(state: _Beams) -> _Beams:
        position = state.position
        slots = jnp.broadcast_to(jnp.arange(beams, dtype=jnp.int32), (batch, beams))
        ancestors = jax.lax.dynamic_update_index_in_dim(state.ancestors, slots, position, axis=-1)
        last = jax.lax.dynamic_index_in_dim(state.tokens, position, axis=-1, keepdims=False)
        logits, cache = step(state.cache, last, position, ancestors)

        log_p = forbid(jax.nn.log_softmax(logits), state.tokens, position, config)
        total = (log_p + state.scores[..., None]).reshape(batch, -1)
        scores, index = jax.lax.top_k(total, 2 * beams)
        parents, token = jnp.divmod(index, logits.shape[-1])
        (tokens,) = _pick(parents, state.tokens)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, position + 1, axis=-1)
        ended = (token == config.eos_id) | (position + 1 == limit)

        running = scores + WORST * ended
        chosen = jax.lax.top_k(running, beams)[1]
        next_tokens, next_scores, chosen_parents = _pick(chosen, tokens, running, parents)
        (ancestors,) = _pick(chosen_parents, ancestors)

        just_ended = ended & (jnp.arange(2 * beams) < beams)
        closed = ~state.open
        if config.early_stopping is True:
            closed = closed | state.ended.all(axis=-1)
        final = scores / penalties[position + 1] + WORST * closed[:, None] + WORST * ~just_ended
        all_tokens = jnp.concatenate([state.ended_tokens, tokens], axis=1)
        all_scores = jnp.concatenate([state.ended_scores, final], axis=1)
        all_ended = jnp.concatenate([state.ended, just_ended], axis=1)
        best = jax.lax.top_k(all_scores, beams)[1]
        ended_tokens, ended_scores, has_ended = _pick(best, all_tokens, all_scores, all_ended)

        never = config.early_stopping == "never" and config.length_penalty > 0
        hoped = next_scores[:, 0] / penalties[limit if never else position + 1]
        bar = jnp.where(has_ended, ended_scores.min(axis=-1, keepdims=True), WORST)
        return _Beams(
            position + 1,
            next_tokens,
            next_scores,
            ancestors,
            ended_tokens,
            ended_scores,
            has_ended,
            state.open & (hoped[:, None] > bar).any(axis=-1),
            cache,
        )

    def going(state: _Beams) -> Array:
        undecided = state.open.any()
        if config.early_stopping is True:
            undecided = undecided & ~state.ended.all()
        return (state.position < limit) & undecided

    shape = (batch, beams)
    start = _Beams(
        position=jnp.int32(0),
        tokens=_buffer(batch, config),
        scores=jnp.full(shape, WORST).at[:, 0].set(0.0),  # all beams are equal at first: use one
        ancestors=jnp.zeros((*shape, limit), jnp.int32),
        ended_tokens=_buffer(batch, config),
        ended_scores=jnp.full(shape, WORST),
        ended=jnp.zeros(shape, bool),
        open=jnp.ones(batch, bool),
        cache=cache,
    )
    end = jax.lax.while_loop(going, body, start)
    returned = config.num_return_sequences
    return Generated(
        end.ended_tokens[:, :returned, 1:], end.ended_scores[:, :returned], end.position
    )
