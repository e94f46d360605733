"""Batches of tables as numpy arrays; a training batch is a pure function of (seed, step)."""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from elm_jax.data.table import ExampleTable
from elm_jax.errors import ElmError

# Draws of a mixture come in blocks of about this size, in which every table has its share.
BLOCK = 2**14
# Rows that stand open for further examples while packing.
WINDOW = 32
BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


def shift_right(targets: np.ndarray) -> np.ndarray:
    """Returns decoder inputs: targets one place later, with start id 0 in front.

    >>> shift_right(np.array([[3, 8, 1, 0]])).tolist()
    [[0, 3, 8, 1]]
    """
    return np.pad(targets[:, :-1], ((0, 0), (1, 0)))


def padded_batch(
    inputs: np.ndarray, targets: np.ndarray, inputs_length: int, targets_length: int
) -> dict[str, np.ndarray]:
    """Pads with 0 and names the arrays as seqio's EncDecFeatureConverter does, for t5x's models.

    Args:
      inputs: int[B, <= T].
      targets: int[B, <= U].
      inputs_length: T.
      targets_length: U.

    Returns:
      int32 arrays `encoder_input_tokens` [B, T], `decoder_input_tokens`, `decoder_target_tokens`
      and `decoder_loss_weights` [B, U], the last 1 where there is a target.

    >>> batch = padded_batch(np.array([[5, 1]]), np.array([[7, 1]]), 3, 3)
    >>> {key: array[0].tolist() for key, array in batch.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'encoder_input_tokens': [5, 1, 0], 'decoder_input_tokens': [0, 7, 1],
     'decoder_target_tokens': [7, 1, 0], 'decoder_loss_weights': [1, 1, 0]}
    """
    inputs = np.pad(inputs, ((0, 0), (0, inputs_length - inputs.shape[1]))).astype(np.int32)
    targets = np.pad(targets, ((0, 0), (0, targets_length - targets.shape[1]))).astype(np.int32)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shift_right(targets),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets != 0).astype(np.int32),
    }


class BatchStream:
    """Training batches from one table or a mixture of several.

    One table is gone through in epochs, each in an order of its own, and batches run on across
    their ends: no example is dropped. A mixture goes through each of its tables that way and draws
    which table comes next, in blocks of about 16,000 draws in which every table has its share (one
    draw at least). With packing, the examples of an epoch or block fill rows by first fit, each
    exactly once; those rows may then be of several tables.

    An example longer than a row is cut, its last id (EOS) kept, as `tokenize` would have cut it.

    >>> table = ExampleTable.from_ids([[5, 1], [6, 6, 1]], [[7, 1], [8, 1]])
    >>> stream = BatchStream(table, batch_size=2, inputs_length=4, targets_length=2, shuffle=False)
    >>> stream.batch_at(0)['encoder_input_tokens'].tolist()
    [[5, 1, 0, 0], [6, 6, 1, 0]]
    """

    def __init__(
        self,
        tables: ExampleTable | Sequence[ExampleTable],
        *,
        batch_size: int,
        inputs_length: int,
        targets_length: int,
        seed: int = 0,
        pack: bool = False,
        shuffle: bool = True,
        rates: Sequence[float] | None = None,
    ) -> None:
        """Prepares a stream.

        Args:
          tables: one table or several.
          batch_size: rows B.
          inputs_length: encoder tokens T.
          targets_length: decoder tokens U.
          seed: 0 or more.
          pack: put several examples in a row, told apart by segment ids.
          shuffle: False keeps the order of each table.
          rates: how often each table is drawn, relative to the others; default: by its examples.

        Raises:
          ElmError: if a number is out of range, or rates and tables differ in number.
        """
        self.tables = [tables] if isinstance(tables, ExampleTable) else list(tables)
        if not self.tables:
            raise ElmError("a stream needs at least one table")
        if min(batch_size, inputs_length, targets_length) < 1 or seed < 0:
            raise ElmError(
                f"batch_size {batch_size}, inputs_length {inputs_length} and targets_length "
                f"{targets_length} should be at least 1, seed {seed} at least 0"
            )
        self._sizes = np.array([len(table) for table in self.tables])
        weights = self._sizes if rates is None else np.asarray(rates, np.float64)
        if weights.shape != self._sizes.shape or not (np.isfinite(weights) & (weights > 0)).all():
            raise ElmError(
                f"rates are {rates}, {len(self.tables)} positive numbers expected, one a table"
            )
        self.batch_size = batch_size
        self.inputs_length = inputs_length
        self.targets_length = targets_length
        self.seed = seed
        self.pack = pack
        self.shuffle = shuffle
        self.rates = None if rates is None else [float(rate) for rate in rates]
        self._table = ExampleTable.concatenate(self.tables)
        # A round is an epoch of one table, or a block of draws from several.
        self._draws = (
            self._sizes
            if len(self.tables) == 1
            else np.maximum(1, np.rint(BLOCK * weights / weights.sum()).astype(np.int64))
        )
        self._order = functools.lru_cache(maxsize=2 * len(self.tables))(self._epoch_order)
        self._rows = functools.lru_cache(maxsize=2)(self._round_rows)
        self._first_rows = [0]

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step, a pure function of (seed, step).

        Returns:
          int32 arrays under the keys of `padded_batch`, and with packing also
          `encoder_segment_ids`, `encoder_positions` [B, T], `decoder_segment_ids` and
          `decoder_positions` [B, U]; segments count from 1, and 0 is padding.
        """
        if step < 0:
            raise ElmError(f"step is {step}, should be 0 or more")
        parts: list[np.ndarray] = []
        counts: list[int] = []
        number, row = self._locate(step * self.batch_size)
        while len(counts) < self.batch_size:
            examples, offsets = self._rows(number)
            taken = offsets[row : row + self.batch_size - len(counts) + 1]
            parts.append(examples[taken[0] : taken[-1]])
            counts += np.diff(taken).tolist()
            number, row = number + 1, 0
        examples = np.concatenate(parts)
        if self.pack:
            return packed_batch(
                self._table, examples, counts, self.inputs_length, self.targets_length
            )
        return padded_batch(
            gather(self._table, "inputs", examples, self.inputs_length),
            gather(self._table, "targets", examples, self.targets_length),
            self.inputs_length,
            self.targets_length,
        )

    def state(self) -> dict[str, Any]:
        """Returns what the batches depend on, for a check when a run is resumed."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "inputs_length": self.inputs_length,
            "targets_length": self.targets_length,
            "pack": self.pack,
            "shuffle": self.shuffle,
            "rates": self.rates,
            "tables": [table.fingerprint for table in self.tables],
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of `state()`, in hex."""
        return hashlib.sha256(json.dumps(self.state(), sort_keys=True).encode()).hexdigest()

    def _epoch_order(self, table: int, epoch: int) -> np.ndarray:
        """The order of one table's examples in one of its epochs."""
        if not self.shuffle:
            return np.arange(self._sizes[table])
        rng = np.random.default_rng([self.seed, 0, table, epoch])
        return rng.permutation(self._sizes[table])

    def _round_examples(self, number: int) -> np.ndarray:
        """The examples of a round, in order, as rows of the joined table."""
        parts = []
        for table, (size, draws) in enumerate(zip(self._sizes, self._draws, strict=True)):
            epochs, places = np.divmod(number * draws + np.arange(draws), size)
            first = self._sizes[:table].sum()
            parts += [
                first + self._order(table, int(epoch))[places[epochs == epoch]]
                for epoch in np.unique(epochs)
            ]
        drawn = np.concatenate(parts)
        if len(self.tables) == 1:
            return drawn
        turns = np.repeat(np.arange(len(self.tables)), self._draws)
        turns = np.random.default_rng([self.seed, 1, number]).permutation(turns)
        examples = np.empty_like(drawn)
        examples[np.argsort(turns, kind="stable")] = drawn
        return examples

    def _round_rows(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of a round, row after row, and the offsets of the rows in them."""
        examples = self._round_examples(number)
        if not self.pack:
            return examples, np.arange(len(examples) + 1)
        row_of = first_fit(
            np.minimum(self._table.inputs_lengths[examples], self.inputs_length),
            np.minimum(self._table.targets_lengths[examples], self.targets_length),
            self.inputs_length,
            self.targets_length,
        )
        offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
        return examples[np.argsort(row_of, kind="stable")], offsets

    def _locate(self, position: int) -> tuple[int, int]:
        """The round in which the stream's row `position` is, and its place there."""
        if not self.pack:
            return divmod(position, int(self._draws.sum()))
        # Rounds pack into different numbers of rows: those before have to be packed once.
        while self._first_rows[-1] <= position:
            _, offsets = self._rows(len(self._first_rows) - 1)
            self._first_rows.append(self._first_rows[-1] + len(offsets) - 1)
        number = bisect.bisect_right(self._first_rows, position) - 1
        return number, position - self._first_rows[number]


def gather(table: ExampleTable, feature: str, examples: np.ndarray, length: int) -> np.ndarray:
    """Returns 'inputs' or 'targets' of some examples as int32[B, length], padded with 0.

    What is longer is cut, its last id kept.
    """
    ids, offsets = getattr(table, feature), getattr(table, f"{feature}_offsets")
    starts, ends = offsets[examples][:, None], offsets[examples + 1][:, None]
    lengths = np.minimum(ends - starts, length)
    columns = np.arange(length)
    source = np.where(columns == lengths - 1, ends - 1, np.minimum(starts + columns, ends - 1))
    return np.where(columns < lengths, np.asarray(ids)[source], 0).astype(np.int32)


def packed_batch(
    table: ExampleTable,
    examples: np.ndarray,
    counts: Sequence[int],
    inputs_length: int,
    targets_length: int,
) -> dict[str, np.ndarray]:
    """Lays several examples in each row, as seqio's EncDecFeatureConverter does with `pack=True`.

    Args:
      table: what the examples are rows of.
      examples: int[n], those of the first row of the batch, then of the next.
      counts: B numbers, how many examples go into each row; they have to fit.
      inputs_length: T.
      targets_length: U.

    Returns:
      The int32 arrays described in `BatchStream.batch_at`.
    """
    rows = len(counts)
    row_of = np.repeat(np.arange(rows), counts)
    row_starts = np.cumsum(counts) - counts
    segment_of = np.arange(len(examples)) - row_starts[row_of] + 1

    def lay(feature: str, length: int) -> list[np.ndarray]:
        offsets = getattr(table, f"{feature}_offsets")
        starts, ends = offsets[examples], offsets[examples + 1]
        lengths = np.minimum(ends - starts, length)
        before = np.cumsum(lengths) - lengths
        # From here on, arrays have one entry per token.
        owner = np.repeat(np.arange(len(examples)), lengths)
        position = np.arange(len(owner)) - before[owner]
        column = (before - before[row_starts][row_of])[owner] + position
        source = np.where(position == lengths[owner] - 1, ends[owner] - 1, starts[owner] + position)
        values = (np.asarray(getattr(table, feature))[source], segment_of[owner], position)
        laid = [np.zeros((rows, length), np.int32) for _ in values]
        for array, value in zip(laid, values, strict=True):
            array[row_of[owner], column] = value
        return laid

    inputs, encoder_segments, encoder_positions = lay("inputs", inputs_length)
    targets, decoder_segments, decoder_positions = lay("targets", targets_length)
    batch = padded_batch(inputs, targets, inputs_length, targets_length)
    # The first id of a segment is 0, not the EOS of the segment before; so is padding.
    batch["decoder_input_tokens"] *= decoder_positions > 0
    return batch | {
        "encoder_segment_ids": encoder_segments,
        "encoder_positions": encoder_positions,
        "decoder_segment_ids": decoder_segments,
        "decoder_positions": decoder_positions,
    }


def first_fit(
    inputs_lengths: np.ndarray, targets_lengths: np.ndarray, inputs_room: int, targets_room: int
) -> np.ndarray:
    """Assigns each example to the first row it fits in, of the last 32 opened.

    Args:
      inputs_lengths: int[n], none above `inputs_room`.
      targets_lengths: int[n], none above `targets_room`.
      inputs_room: encoder tokens of a row.
      targets_room: decoder tokens of a row.

    Returns:
      int64[n], the row of each example; rows count from 0 in the order they were opened.

    >>> first_fit(np.array([3, 4, 2, 1]), np.array([1, 1, 1, 1]), 5, 2).tolist()
    [0, 1, 0, 1]
    """
    rows = np.empty(len(inputs_lengths), np.int64)
    opened: list[list[int]] = []
    count = 0
    for number, (inputs, targets) in enumerate(
        zip(inputs_lengths.tolist(), targets_lengths.tolist(), strict=True)
    ):
        for row in opened:
            if row[1] >= inputs and row[2] >= targets:
                break
        else:
            row = [count, inputs_room, targets_room]
            opened = [*opened[-WINDOW + 1 :], row]
            count += 1
        row[1] -= inputs
        row[2] -= targets
        rows[number] = row[0]
    return rows


def fit_lengths(
    table: ExampleTable, multiple: int = 8, maximum: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Returns the smallest (T, U), multiples of `multiple`, that hold every example uncut.

    Args:
      table: the examples.
      multiple: of which both are multiples, unless `maximum` is smaller.
      maximum: upper bounds of T and U.

    >>> fit_lengths(ExampleTable.from_ids([[5] * 9], [[6, 1]]))
    (16, 8)
    """
    if multiple < 1 or min(maximum or (1, 1)) < 1:
        raise ElmError(f"multiple {multiple} and maximum {maximum} should be at least 1")
    longest = (int(table.inputs_lengths.max()), int(table.targets_lengths.max()))
    inputs, targets = (-(-length // multiple) * multiple for length in longest)
    return (min(inputs, maximum[0]), min(targets, maximum[1])) if maximum else (inputs, targets)


def pad_batches(
    table: ExampleTable, batch_size: int, buckets: Sequence[int] = BUCKETS
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Goes once through a table for evaluation, in batches of few different shapes.

    Examples are sorted by length, and each batch is padded to the smallest buckets that hold it.
    The last batch is filled up with a repeated example whose loss weights are 0.

    Args:
      table: the examples.
      batch_size: rows B of every batch.
      buckets: the lengths T and U may take.

    Yields:
      int64[B], the row of each example in the table, -1 for filling; and the batch as of
      `padded_batch`.

    Raises:
      ElmError: if an example is longer than the largest bucket.
    """
    if batch_size < 1:
        raise ElmError(f"batch_size is {batch_size}, should be 1 or more")
    sizes = np.array(sorted(buckets))
    inputs_lengths, targets_lengths = table.inputs_lengths, table.targets_lengths
    longest = max(inputs_lengths.max(), targets_lengths.max())
    if not len(sizes) or longest > sizes[-1]:
        raise ElmError(f"an example of {longest} ids does not fit the buckets {tuple(buckets)}")
    order = np.lexsort((targets_lengths, inputs_lengths))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        filled = np.pad(rows, (0, batch_size - len(rows)), mode="edge")
        inputs = int(sizes[np.searchsorted(sizes, inputs_lengths[rows].max())])
        targets = int(sizes[np.searchsorted(sizes, targets_lengths[rows].max())])
        batch = padded_batch(
            gather(table, "inputs", filled, inputs),
            gather(table, "targets", filled, targets),
            inputs,
            targets,
        )
        batch["decoder_loss_weights"][len(rows) :] = 0
        yield np.pad(rows, (0, batch_size - len(rows)), constant_values=-1), batch
