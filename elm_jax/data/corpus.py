"""Plain text for pre-training: a folder of books to token ids, and denoising batches of them."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.data.batches import padded_batch
from elm_jax.data.denoising import (
    prefix_lm,
    span_corruption,
    span_corruption_lengths,
    span_counts,
)
from elm_jax.data.vocabulary import EOS_ID, Vocabulary
from elm_jax.errors import ElmError, nearest

OBJECTIVES = ("span_corruption", "prefix_lm")


@dataclass(frozen=True, eq=False)
class Corpus:
    """The token ids of a text folder.

    Attributes:
      train: uint16[n] or int32[n], the documents one after the other, each closed by EOS.
      heldout: the ends of the same documents, likewise.
      fingerprint: sha256 over what the ids follow from (texts, vocabulary, split).
    """

    train: np.ndarray
    heldout: np.ndarray
    fingerprint: str


def load_corpus(
    folder: str | os.PathLike[str],
    vocabulary: Vocabulary,
    *,
    heldout_fraction: float = 0.01,
    cache: str | os.PathLike[str] | None = None,
) -> Corpus:
    """Tokenises every `*.txt` and `*.txt.gz` of a folder, in the order of their names.

    Hard line wraps become spaces; a blank line ends a paragraph. Each document is the ids of its
    paragraphs and then EOS. The last `heldout_fraction` of each document is held out.

    Args:
      folder: where the texts are, UTF-8.
      vocabulary: encodes them.
      heldout_fraction: share of each document, from its end, that is not trained on; below 1.
      cache: a folder for the ids; those of the same texts, vocabulary and fraction are
        memory-mapped from there, others are added.

    Raises:
      FileNotFoundError: if the folder is missing or holds no text file.
      ElmError: if a file is not UTF-8 text or truncated, or all are empty.
    """
    if not 0 <= heldout_fraction < 1:
        raise ElmError(f"heldout_fraction is {heldout_fraction}, should be from 0 to below 1")
    files = text_files(Path(folder))
    description: dict[str, Any] = {
        "format": 1,
        "vocabulary": vocabulary.fingerprint,
        "extra_ids": vocabulary.extra_ids,
        "heldout_fraction": heldout_fraction,
        "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }
    fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    if cache is None:
        return Corpus(*_tokenize_files(files, vocabulary, heldout_fraction), fingerprint)
    stem = Path(cache) / f"corpus-{fingerprint[:16]}"
    arrays = [stem.with_suffix(f".{split}.npy") for split in ("train", "heldout")]
    sidecar = stem.with_suffix(".json")
    if not sidecar.exists():
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path, ids in zip(
            arrays, _tokenize_files(files, vocabulary, heldout_fraction), strict=True
        ):
            temporary = path.with_suffix(f".{os.getpid()}.npy")
            np.save(temporary, ids, allow_pickle=False)
            os.replace(temporary, path)
        # The sidecar comes last: where it is, the arrays are whole.
        temporary = sidecar.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(description, indent=1) + "\n")
        os.replace(temporary, sidecar)
    try:
        train, heldout = (np.load(path, mmap_mode="r", allow_pickle=False) for path in arrays)
    except (OSError, ValueError) as error:
        raise ElmError(f"{arrays[0]}: damaged cache, delete {sidecar} ({error})") from None
    return Corpus(train, heldout, fingerprint)


def read_paragraphs(path: str | os.PathLike[str]) -> list[str]:
    """Returns the paragraphs of a text file, each on one line.

    Raises:
      ElmError: if the file is not UTF-8 text, or its gzip stream is damaged.
    """
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if str(path).endswith(".gz") else data).decode()
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ElmError(f"{path}: not a readable UTF-8 text file ({error})") from None
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in paragraphs if paragraph]


@dataclass(frozen=True, eq=False)
class DenoisingStream:
    """Batches of a corpus for pre-training; `batch_at` depends on nothing but seed and step.

    In each epoch the ids are cut into chunks from a random offset on, and the chunks are shuffled;
    batches run on across the ends of epochs.

    Attributes:
      ids: int[n], the corpus, for example `Corpus.train`.
      objective: 'span_corruption' or 'prefix_lm'.
      batch_size: rows B of a batch.
      inputs_length: encoder tokens T.
      targets_length: decoder tokens U; for span corruption at least the second of
        `span_corruption_lengths(inputs_length)`.
      vocab_size: sentinels fall from `vocab_size - 1`.
      sentinels: how many there are (`Vocabulary.sentinels`).
      seed: 0 or more.

    Raises:
      ElmError: if the objective is unknown, a length does not suit it, or the corpus is too short.
    """

    ids: np.ndarray
    objective: str
    batch_size: int
    inputs_length: int
    targets_length: int
    vocab_size: int
    sentinels: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            hint = nearest(self.objective, OBJECTIVES)
            raise ElmError(f"objective is {self.objective!r}, one of {OBJECTIVES} expected{hint}")
        if self.batch_size < 1 or self.seed < 0:
            raise ElmError(
                f"batch_size is {self.batch_size} and seed {self.seed}, at least 1 and 0 expected"
            )
        if self.objective == "span_corruption":
            needed = span_corruption_lengths(self.inputs_length)[1]
            if self.targets_length < needed:
                raise ElmError(
                    f"targets_length is {self.targets_length}, span corruption of inputs_length "
                    f"{self.inputs_length} needs at least {needed}"
                )
            spans = span_counts(self.chunk_length)[1]
            if spans > self.sentinels:
                raise ElmError(
                    f"span corruption of inputs_length {self.inputs_length} needs {spans} "
                    f"sentinels, the vocabulary has {self.sentinels}"
                )
        elif self.inputs_length < 1 or self.targets_length < 2:
            raise ElmError(
                f"inputs_length is {self.inputs_length} and targets_length {self.targets_length}, "
                "prefix_lm needs at least 1 and 2"
            )
        if len(self.ids) < self.chunk_length:
            raise ElmError(
                f"the corpus has {len(self.ids)} tokens, a chunk takes {self.chunk_length}"
            )

    @property
    def chunk_length(self) -> int:
        """Tokens of the corpus in one row."""
        if self.objective == "span_corruption":
            return span_corruption_lengths(self.inputs_length)[0]
        return min(self.inputs_length + 1, self.targets_length)

    @functools.cached_property
    def chunks_per_epoch(self) -> int:
        """Rows in one pass over the corpus."""
        return max(1, (len(self.ids) - self.chunk_length + 1) // self.chunk_length)

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step, a pure function of (seed, step).

        Returns:
          int32 arrays under the keys of t5x, see `elm_jax.data.batches.padded_batch`.
        """
        if step < 0:
            raise ElmError(f"step is {step}, should be 0 or more")
        positions = step * self.batch_size + np.arange(self.batch_size)
        epochs, chunks = np.divmod(positions, self.chunks_per_epoch)
        starts = np.concatenate(
            [self._starts(int(epoch))[chunks[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        tokens = np.asarray(self.ids)[starts[:, None] + np.arange(self.chunk_length)]
        tokens = tokens.astype(np.int32)
        rng = np.random.default_rng([self.seed, 1, step])
        if self.objective == "span_corruption":
            inputs, targets = span_corruption(tokens, rng, vocab_size=self.vocab_size)
        else:
            inputs, targets = prefix_lm(tokens, rng)
        return padded_batch(inputs, targets, self.inputs_length, self.targets_length)

    @functools.cached_property
    def _starts(self) -> Any:
        @functools.lru_cache(maxsize=2)
        def starts(epoch: int) -> np.ndarray:
            rng = np.random.default_rng([self.seed, 0, epoch])
            count, length = self.chunks_per_epoch, self.chunk_length
            offset = rng.integers(min(length, len(self.ids) - count * length + 1))
            return offset + length * rng.permutation(count)

        return starts

    def state(self) -> dict[str, Any]:
        """Returns what the batches depend on, for a check when a run is resumed."""
        ids = hashlib.sha256(np.ascontiguousarray(self.ids).data).hexdigest()
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"ids": ids}


def text_files(folder: Path) -> Sequence[Path]:
    """Returns the *.txt and *.txt.gz of a folder, sorted by name.

    Raises:
      FileNotFoundError: if the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no text folder at {folder}")
    files = sorted({*folder.glob("*.txt"), *folder.glob("*.txt.gz")})
    if not files:
        raise FileNotFoundError(f"no *.txt or *.txt.gz in {folder}")
    return files


def _tokenize_files(
    files: Sequence[Path], vocabulary: Vocabulary, heldout_fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    dtype = np.uint16 if vocabulary.vocab_size <= 2**16 else np.int32
    train: list[np.ndarray] = []
    heldout: list[np.ndarray] = []
    for file in files:
        paragraphs = vocabulary.encode_all(read_paragraphs(file))
        ids = np.array([token for paragraph in paragraphs for token in paragraph], dtype)
        cut = len(ids) - round(len(ids) * heldout_fraction)
        for split, part in ((train, ids[:cut]), (heldout, ids[cut:])):
            if len(part):
                split += [part, np.array([EOS_ID], dtype)]
    if not train:
        raise ElmError(f"the text files in {files[0].parent} are all empty")
    return np.concatenate(train), np.concatenate(heldout or [np.zeros(0, dtype)])
