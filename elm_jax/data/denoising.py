"""Pre-training objectives on token ids: T5's span corruption and prefix language modelling.

Both work on chunks of equal length, so a whole batch goes through at once. With span corruption the
number of noise tokens and spans depends on the chunk length alone: the results are full rectangles.
"""

from __future__ import annotations

import numpy as np

from elm_jax.errors import ElmError

NOISE_DENSITY = 0.15
MEAN_NOISE_SPAN_LENGTH = 3.0


def span_counts(
    length: int,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> tuple[int, int]:
    """Returns how many noise tokens, in how many spans, T5 puts into `length` tokens.

    T5 computes this twice, in double precision for the lengths and in single for the mask, which
    differ by one token at a few lengths (190 for one); here both are the former.

    Raises:
      ElmError: if the density is outside (0, 1), or the spans are shorter than one token.

    >>> span_counts(568)
    (85, 28)
    """
    if not 0 < noise_density < 1:
        raise ElmError(f"noise_density is {noise_density}, should be between 0 and 1")
    if mean_noise_span_length < 1:
        raise ElmError(f"mean_noise_span_length is {mean_noise_span_length}, should be 1 or more")
    tokens = min(max(round(length * noise_density), 1), length - 1)
    # More spans than kept tokens cannot be: each span follows a token that stays.
    return tokens, min(max(round(tokens / mean_noise_span_length), 1), length - tokens)


def span_corruption_lengths(
    inputs_length: int,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> tuple[int, int]:
    """Returns the chunk length and the targets' length that waste no padding.

    A chunk of the first length gives inputs of `inputs_length` ids or just below, and targets of
    exactly the second, both with sentinels and EOS.

    Args:
      inputs_length: encoder tokens T of a batch.
      noise_density: the share of the tokens that is masked.
      mean_noise_span_length: the mean length of a masked span.

    Raises:
      ElmError: if not even two tokens fit.

    Source: `random_spans_helper` of google-research/text-to-text-transfer-transformer.

    >>> span_corruption_lengths(512)
    (568, 114)
    """

    def lengths(tokens: int) -> tuple[int, int]:
        noise, spans = span_counts(tokens, noise_density, mean_noise_span_length)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = 2
    if lengths(tokens)[0] > inputs_length:
        raise ElmError(f"inputs_length is {inputs_length}, span corruption needs at least 3")
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    targets_length = lengths(tokens)[1]
    if noise_density == 0.5 and targets_length > inputs_length:  # T5's: keeps both equal
        return tokens - 1, targets_length - 1
    return tokens, targets_length


def noise_mask(
    rng: np.random.Generator,
    rows: int,
    length: int,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> np.ndarray:
    """Draws T5's random span masks.

    The noise tokens and the kept tokens are each cut at random into the same number of spans, all
    cuts being equally likely, and the spans alternate, a kept one first.

    Args:
      rng: the source of randomness.
      rows: masks to draw, B.
      length: tokens of a chunk, at least 2.
      noise_density: the share of the tokens that is masked.
      mean_noise_span_length: the mean length of a masked span.

    Returns:
      bool[B, length], True where a token is masked.

    Source: `random_spans_noise_mask` of T5; Raffel et al., 2020, section 3.1.4.
    """
    if length < 2:
        raise ElmError(f"chunks of {length} tokens cannot be corrupted, at least 2 are needed")
    noise, spans = span_counts(length, noise_density, mean_noise_span_length)
    kept_ends = _random_segment_ends(rng, rows, length - noise, spans)
    noise_ends = _random_segment_ends(rng, rows, noise, spans)
    # A border where noise starts, and one where it stops; borders alternate, so parity tells.
    borders = np.zeros((rows, length + 1), np.int8)
    noise_starts = kept_ends + np.pad(noise_ends[:, :-1], ((0, 0), (1, 0)))
    np.put_along_axis(borders, noise_starts, 1, axis=1)
    np.put_along_axis(borders, kept_ends + noise_ends, -1, axis=1)
    return np.cumsum(borders[:, :-1], axis=1, dtype=np.int8).astype(bool)


def span_corruption(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    vocab_size: int,
    eos_id: int = 1,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces random spans by sentinels; the targets are what was taken out.

    The n-th span of a row becomes sentinel `vocab_size - n`, in the inputs in the place of the
    masked tokens, in the targets in the place of the kept ones. Both end with EOS.

    Args:
      tokens: int[B, L], chunks of ids.
      rng: the source of randomness.
      vocab_size: sentinels fall from `vocab_size - 1`.
      eos_id: appended to inputs and targets.
      noise_density: the share of the tokens that is masked.
      mean_noise_span_length: the mean length of a masked span.

    Returns:
      Inputs int32[B, T] and targets int32[B, U] without padding; for L of
      `span_corruption_lengths(T)` these are its T (or just below) and U.

    Source: Raffel et al., 2020, sections 3.1.4 and 3.3.4.

    >>> rng = np.random.default_rng(0)
    >>> inputs, targets = span_corruption(np.arange(10, 20)[None], rng, vocab_size=100)
    >>> inputs.tolist(), targets.tolist()
    ([[10, 11, 12, 13, 14, 15, 16, 17, 99, 1]], [[99, 18, 19, 1]])
    """
    rows, length = tokens.shape
    mask = noise_mask(rng, rows, length, noise_density, mean_noise_span_length)
    return (
        _spans_to_sentinels(tokens, mask, vocab_size, eos_id),
        _spans_to_sentinels(tokens, ~mask, vocab_size, eos_id),
    )


def prefix_lm(
    tokens: np.ndarray, rng: np.random.Generator, *, eos_id: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Splits each chunk at a random place: the inputs are the prefix, the targets the rest and EOS.

    The prefix has 1 to L - 1 tokens, each length being equally likely.

    Args:
      tokens: int[B, L], chunks of ids, L at least 2.
      rng: the source of randomness.
      eos_id: appended to the targets.

    Returns:
      Inputs int32[B, L - 1] and targets int32[B, L], padded with 0.

    Source: Raffel et al., 2020, section 3.2.3; LM adaptation: Lester et al., 2021, section 3.1.
    """
    rows, length = tokens.shape
    if length < 2:
        raise ElmError(f"chunks of {length} tokens cannot be split, at least 2 are needed")
    split = rng.integers(1, length, size=(rows, 1))
    columns = np.arange(length)
    inputs = np.where(columns < split, tokens, 0)[:, :-1]
    source = columns + split
    targets = np.take_along_axis(tokens, np.minimum(source, length - 1), axis=1)
    targets = np.where(source < length, targets, np.where(source == length, eos_id, 0))
    return inputs.astype(np.int32), targets.astype(np.int32)


def _random_segment_ends(
    rng: np.random.Generator, rows: int, items: int, segments: int
) -> np.ndarray:
    """Cuts `items` into `segments` non-empty parts, all ways equally likely; [rows, segments]."""
    cuts = np.zeros((rows, items - 1), bool)
    cuts[:, : segments - 1] = True
    cuts = rng.permuted(cuts, axis=1)
    ends = np.full((rows, segments), items)
    ends[:, :-1] = np.nonzero(cuts)[1].reshape(rows, segments - 1) + 1
    return ends


def _spans_to_sentinels(
    tokens: np.ndarray, mask: np.ndarray, vocab_size: int, eos_id: int
) -> np.ndarray:
    """Puts one falling sentinel in the place of each masked span, and EOS at the end."""
    rows = len(tokens)
    follows = np.zeros_like(mask)
    follows[:, 1:] = mask[:, :-1]
    first = mask & ~follows
    tokens = np.where(first, vocab_size - np.cumsum(first, axis=1, dtype=np.int32), tokens)
    kept = tokens[~(mask & follows)].reshape(rows, -1)
    return np.concatenate([kept, np.full((rows, 1), eos_id)], axis=1).astype(np.int32)
