"""Tokenised examples in memory: flat id arrays with offsets, so that a batch is one gather."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elm_jax.data.vocabulary import EOS_ID, Vocabulary
from elm_jax.errors import ElmError

if TYPE_CHECKING:
    from elm_jax.data.examples import Example

ARRAYS = ("inputs", "inputs_offsets", "targets", "targets_offsets", "index")


@dataclass(frozen=True, eq=False)
class ExampleTable:
    """The token ids of n examples; those of example i are `inputs[offsets[i]:offsets[i + 1]]`.

    Attributes:
      inputs: int32, the ids of all inputs one after the other.
      inputs_offsets: int64[n + 1].
      targets: int32, likewise.
      targets_offsets: int64[n + 1].
      index: int64[n], the place of each example where it came from.

    Raises:
      ElmError: if there is no example, or offsets and ids do not fit together.
    """

    inputs: np.ndarray
    inputs_offsets: np.ndarray
    targets: np.ndarray
    targets_offsets: np.ndarray
    index: np.ndarray

    def __post_init__(self) -> None:
        if not len(self):
            raise ElmError("a table needs at least one example")
        for name in ("inputs", "targets"):
            ids, offsets = getattr(self, name), getattr(self, f"{name}_offsets")
            if len(offsets) != len(self) + 1 or offsets[0] != 0 or offsets[-1] != len(ids):
                raise ElmError(
                    f"{name}_offsets should be {len(self) + 1} numbers from 0 to {len(ids)}, got "
                    f"{len(offsets)} from {offsets[:1]} to {offsets[-1:]}"
                )
            if (np.diff(offsets) < 1).any():
                empty = int(np.argmax(np.diff(offsets) < 1))
                raise ElmError(f"example {empty} has no {name}; every example needs at least EOS")

    @classmethod
    def from_ids(
        cls,
        inputs: Iterable[Sequence[int]],
        targets: Iterable[Sequence[int]],
        index: Sequence[int] | None = None,
    ) -> ExampleTable:
        """Builds a table from the ids of each example, EOS included.

        >>> table = ExampleTable.from_ids([[5, 6, 1], [7, 1]], [[8, 1], [9, 9, 1]])
        >>> table.inputs.tolist(), table.targets_offsets.tolist()
        ([5, 6, 1, 7, 1], [0, 2, 5])
        """
        flat_inputs, inputs_offsets = _flatten(inputs)
        flat_targets, targets_offsets = _flatten(targets)
        places = np.arange(len(inputs_offsets) - 1) if index is None else np.asarray(index)
        return cls(
            flat_inputs, inputs_offsets, flat_targets, targets_offsets, places.astype(np.int64)
        )

    @classmethod
    def concatenate(cls, tables: Sequence[ExampleTable]) -> ExampleTable:
        """Joins tables; the examples of the first come first, `index` is kept."""
        if len(tables) == 1:
            return tables[0]
        return cls(
            np.concatenate([table.inputs for table in tables]),
            _offsets(np.concatenate([table.inputs_lengths for table in tables])),
            np.concatenate([table.targets for table in tables]),
            _offsets(np.concatenate([table.targets_lengths for table in tables])),
            np.concatenate([table.index for table in tables]),
        )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def inputs_lengths(self) -> np.ndarray:
        """int64[n], ids of each input."""
        return np.diff(self.inputs_offsets)

    @property
    def targets_lengths(self) -> np.ndarray:
        """int64[n], ids of each target."""
        return np.diff(self.targets_offsets)

    def example(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of one example, inputs and targets."""
        row = range(len(self))[row]
        inputs = self.inputs[self.inputs_offsets[row] : self.inputs_offsets[row + 1]]
        return inputs, self.targets[self.targets_offsets[row] : self.targets_offsets[row + 1]]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the ids and offsets, in hex."""
        digest = hashlib.sha256()
        for name in ARRAYS[:-1]:
            array = getattr(self, name)
            digest.update(f"{name}{array.dtype.str}{len(array)}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the table as a folder of .npy files, all or nothing.

        Raises:
          FileExistsError: if the folder exists.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder} exists; tables are never overwritten")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        try:
            for name in ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(self, name), allow_pickle=False)
            description = {"format": 1, "examples": len(self), "fingerprint": self.fingerprint}
            (temporary / "table.json").write_text(json.dumps(description) + "\n")
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ExampleTable:
        """Memory-maps a saved table and checks it against its fingerprint.

        Raises:
          FileNotFoundError: if the folder holds no table.
          ElmError: if a file is missing or the content is not what was saved.
        """
        folder = Path(folder)
        if not (folder / "table.json").is_file():
            raise FileNotFoundError(f"no table in {folder} (it would hold a table.json)")
        try:
            expected = json.loads((folder / "table.json").read_text())["fingerprint"]
            table = cls(
                *(
                    np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                    for name in ARRAYS
                )
            )
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise ElmError(f"{folder}: damaged table ({error})") from None
        if table.fingerprint != expected:
            raise ElmError(f"{folder}: damaged table, the ids do not match their fingerprint")
        return table


def tokenize(
    examples: Sequence[Example],
    vocabulary: Vocabulary,
    *,
    inputs_length: int,
    targets_length: int,
) -> ExampleTable:
    """Encodes examples: inputs, and the first of the targets.

    A text of more than `length - 1` ids is cut there, so that EOS is always its last id, as
    `seqio.preprocessors.append_eos_after_trim` does.

    Args:
      examples: at least one.
      vocabulary: encodes the texts.
      inputs_length: most ids of an input, EOS included.
      targets_length: most ids of a target, EOS included.

    Raises:
      ElmError: if there are no examples, or a length is below 1.
    """
    if min(inputs_length, targets_length) < 1:
        raise ElmError(
            f"inputs_length is {inputs_length} and targets_length {targets_length}, "
            "both should be at least 1"
        )
    inputs = vocabulary.encode_all([example.inputs for example in examples])
    targets = vocabulary.encode_all([example.targets[0] for example in examples])
    return ExampleTable.from_ids(
        [[*ids[: inputs_length - 1], EOS_ID] for ids in inputs],
        [[*ids[: targets_length - 1], EOS_ID] for ids in targets],
    )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _flatten(rows: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    arrays = [np.asarray(row, np.int32) for row in rows]
    offsets = _offsets(np.array([len(array) for array in arrays], np.int64))
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int32), offsets
