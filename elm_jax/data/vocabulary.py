"""Text to ids and back: a SentencePiece model with T5's special ids and sentinels."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from elm_jax.errors import ElmError

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
_FIRST_BYTE = 3


@dataclass(frozen=True)
class Vocabulary:
    """A SentencePiece model file, with `extra_ids` sentinels placed after its pieces.

    Ids are those of `seqio.SentencePieceVocabulary(path, extra_ids)` and of T5: pad 0, eos 1, unk
    2, then the pieces, then the sentinels in falling order, so `<extra_id_0>` is the last id. A
    model which already holds sentinels of its own (mT5's) takes `extra_ids=0`.

    Attributes:
      path: the SentencePiece model file.
      extra_ids: how many sentinels to add.

    Raises:
      FileNotFoundError: if there is no file at `path`.
      ElmError: if the file is no SentencePiece model, or its pad, eos and unk are not 0, 1 and 2.
    """

    path: str | os.PathLike[str]
    extra_ids: int = 100

    def __post_init__(self) -> None:
        if self.extra_ids < 0:
            raise ElmError(f"extra_ids is {self.extra_ids}, should be 0 or more (T5 has 100)")
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"no SentencePiece model at {self.path}")
        model = self._processor
        ids = (model.pad_id(), model.eos_id(), model.unk_id())
        if ids != (PAD_ID, EOS_ID, UNK_ID):
            raise ElmError(f"{self.path}: (pad, eos, unk) ids are {ids}, T5 models need (0, 1, 2)")

    @functools.cached_property
    def _processor(self) -> Any:
        # A serialized protobuf message grows by concatenation: what is appended to the bytes of the
        # model joins its repeated `pieces` field.
        extra = b"".join(map(_sentinel_piece, reversed(range(self.extra_ids))))
        try:
            return sentencepiece.SentencePieceProcessor(
                model_proto=Path(self.path).read_bytes() + extra
            )
        except RuntimeError:
            raise ElmError(f"{self.path} is not a SentencePiece model") from None

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the model file, in hex."""
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """The number of ids: special ids, pieces and sentinels (32,100 for T5)."""
        return int(self._processor.get_piece_size())

    @functools.cached_property
    def sentinels(self) -> int:
        """The number of sentinels at the end of the vocabulary."""
        count = 0
        while self._processor.id_to_piece(self.vocab_size - 1 - count) == f"▁<extra_id_{count}>":
            count += 1
        return count

    def sentinel(self, number: int) -> int:
        """Returns the id of `<extra_id_{number}>`.

        Raises:
          ElmError: if the vocabulary has no such sentinel.
        """
        if not 0 <= number < self.sentinels:
            raise ElmError(f"{self.path} has {self.sentinels} sentinels, no <extra_id_{number}>")
        return self.vocab_size - 1 - number

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without EOS."""
        return list(self._processor.encode(text))

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text, several texts at a time."""
        return list(self._processor.encode(list(texts)))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids up to the first EOS; ids beyond the vocabulary become unknown."""
        ids = np.fromiter(ids, np.int64)
        ids = ids[: np.argmax(ids == EOS_ID)] if EOS_ID in ids else ids
        known = np.where((ids >= 0) & (ids < self.vocab_size), ids, UNK_ID)
        return str(self._processor.decode(known.tolist()))

    def to_seqio(self) -> Any:
        """Returns the `seqio.SentencePieceVocabulary` of the same ids."""
        import seqio

        return seqio.SentencePieceVocabulary(os.fspath(self.path), extra_ids=self.extra_ids)


@dataclass(frozen=True)
class ByteVocabulary(Vocabulary):
    """ByT5's vocabulary: pad 0, eos 1, unk 2, then the 256 bytes of UTF-8, then sentinels.

    Ids are those of Hugging Face's ByT5Tokenizer, sentinels included: `<extra_id_0>` is 259 and
    they rise.

    Attributes:
      path: the JSON file that names ByT5Tokenizer, from which it came.
      extra_ids: how many sentinels there are.
    """

    path: str | os.PathLike[str]
    extra_ids: int = 125

    def __post_init__(self) -> None:
        if type(self.extra_ids) is not int or not 0 <= self.extra_ids <= 2**16:
            raise ElmError(f"{self.path}: extra_ids is {self.extra_ids!r}, should be 0 or more")

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides the ids, in hex."""
        return hashlib.sha256(f"bytes {self.extra_ids}".encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """The number of ids: special ids, bytes and sentinels (384 for ByT5)."""
        return _FIRST_BYTE + 256 + self.extra_ids

    @functools.cached_property
    def sentinels(self) -> int:
        """The number of sentinels at the end of the vocabulary."""
        return self.extra_ids

    def sentinel(self, number: int) -> int:
        """Returns the id of `<extra_id_{number}>`.

        Raises:
          ElmError: if the vocabulary has no such sentinel.
        """
        if not 0 <= number < self.extra_ids:
            raise ElmError(f"{self.path} has {self.extra_ids} sentinels, no <extra_id_{number}>")
        return _FIRST_BYTE + 256 + number

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without EOS.

        >>> ByteVocabulary('tokenizer_config.json').encode('a<extra_id_1>é')
        [100, 260, 198, 172]
        """
        ids: list[int] = []
        for i, part in enumerate(re.split(r"<extra_id_(\d{1,5})>", text)):
            if i % 2 == 0:
                ids += [byte + _FIRST_BYTE for byte in part.encode("utf-8", errors="replace")]
            elif part == str(int(part)) and int(part) < self.extra_ids:
                ids.append(self.sentinel(int(part)))
            else:  # no sentinel of this vocabulary
                ids += [byte + _FIRST_BYTE for byte in f"<extra_id_{part}>".encode()]
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids up to the first EOS; what is no UTF-8 is left out."""
        parts, first_sentinel = [], _FIRST_BYTE + 256
        for i in ids:
            if i == EOS_ID:
                break
            if _FIRST_BYTE <= i < first_sentinel:
                parts.append(bytes([i - _FIRST_BYTE]))
            elif first_sentinel <= i < self.vocab_size:
                parts.append(f"<extra_id_{i - first_sentinel}>".encode())
        return b"".join(parts).decode("utf-8", errors="ignore")

    def to_seqio(self) -> Any:
        """Returns the `seqio.ByteVocabulary` of as many ids; its ids of text are the same."""
        import seqio

        return seqio.ByteVocabulary(extra_ids=self.extra_ids)


def load_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """Reads the vocabulary of a backbone.

    Args:
      path: a SentencePiece model, to which T5's 100 sentinels are added unless it ends with
        sentinels of its own (mT5's); or a JSON file that names Hugging Face's ByT5Tokenizer.

    Raises:
      FileNotFoundError: if there is no file.
      ElmError: if it is neither.
    """
    path = Path(path)
    if path.suffix != ".json":
        own = Vocabulary(path, extra_ids=0)
        return own if own.sentinels else Vocabulary(path)
    if not path.is_file():
        raise FileNotFoundError(f"no vocabulary at {path}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ElmError(f"{path}: invalid JSON ({error})") from None
    if not isinstance(data, dict) or data.get("tokenizer_class") != "ByT5Tokenizer":
        raise ElmError(f"{path}: does not name the tokenizer_class 'ByT5Tokenizer'")
    # Files of transformers 5 say extra_ids 0, and list the sentinels as tokens of their own.
    listed = data.get("extra_special_tokens") or data.get("additional_special_tokens") or ()
    pattern = re.compile(r"<extra_id_\d+>")
    named = len({t for t in listed if isinstance(t, str) and pattern.fullmatch(t)})
    return ByteVocabulary(path, named or data.get("extra_ids", 125))


def train_vocabulary(
    texts: Iterable[str],
    output_prefix: str | os.PathLike[str],
    size: int,
    *,
    character_coverage: float = 0.9995,
) -> Path:
    """Trains a unigram SentencePiece model as T5's was and writes `<output_prefix>.model`.

    Special pieces, normalisation (nmt_nfkc), character coverage and the splitting rules are those
    stored in T5's own model file. All texts are used in the order given, on one thread, so the
    same texts give the same file to the byte.

    Args:
      texts: sentences or paragraphs; those longer than 4,192 bytes are left out.
      output_prefix: where to write, without the `.model` suffix.
      size: the number of pieces, special ones included and sentinels excluded.
      character_coverage: the share of the characters in the texts that get a piece.

    Returns:
      The path of the model.

    Raises:
      ElmError: if the texts are too few for `size` pieces.

    Source: Kudo, "Subword Regularization", 2018; Raffel et al., 2020, section 2.2.1.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            character_coverage=character_coverage,
            normalization_rule_name="nmt_nfkc",
            byte_fallback=False,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        # SentencePiece names its source file and assertion first, the remedy last.
        reason = " ".join(str(error).split("] ")[-1].split()) or "there are none"
        raise ElmError(f"no vocabulary of {size} pieces from these texts: {reason}") from None
    path = Path(f"{os.fspath(output_prefix)}.model")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, path)
    return path


def _sentinel_piece(number: int) -> bytes:
    """The field `ModelProto.pieces` of one sentinel: its text, score 0, type USER_DEFINED (4)."""
    text = f"▁<extra_id_{number}>".encode()
    piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x04"
    return b"\x0a" + bytes([len(piece)]) + piece
