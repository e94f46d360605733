"""The name of a backbone's contents, by which an expert knows the backbone it was trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from typing import Any

import numpy as np

from elm_jax.experts.tree import Tree, flatten, unflatten
from elm_jax.models import T5Config
from elm_jax.models.config import RUN_FIELDS
from elm_jax.models.scan import to_storage

LARGE = 2**20
"""Arrays with more elements than this are fingerprinted by a sample."""
SAMPLE = 2**16
"""About how many elements such a sample has."""
BLOCK = 4096
"""How many elements at each end of such an array are hashed besides the sample."""


def fingerprint(config: T5Config, params: Tree) -> str:
    """Names a backbone by its architecture and weights, in seconds even at 11B parameters.

    Covers the config without the fields that say how it is run (`RUN_FIELDS`), and each array's
    path, shape and values as float32, so that numpy or jax, bfloat16 or the same values in
    float32, scanned layers or not, give one fingerprint.
    Arrays of up to 2**20 elements count in full. Of larger ones only their ends (4,096 elements
    each) and a regular sample of about 2**16 elements count, which tells any two trainings apart
    but not every edit of one element; `experts.checksum` covers every byte.

    Args:
      config: the backbone's config.
      params: nested dict of floating arrays.

    Returns:
      'sha256:' and 64 hexadecimal digits; messages show the first 23 characters.
    """
    digest = _begin(config)
    for path, array in flatten(to_storage(params, config)).items():
        digest.update(_title(path, array.shape))
        for part in _sample(array):
            digest.update(_values(part))
    return f"sha256:{digest.hexdigest()}"


class Samples:
    """A fingerprint of arrays that come in any order and do not stay, or not with these values.

    What counts of each array waits in a temporary file until all are there.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="elm_jax_fingerprint_")  # noqa: SIM115
        self._entries: dict[str, tuple[tuple[int, ...], int, int]] = {}

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, path: str, array: np.ndarray) -> None:
        """Takes in an array as stored, under its path per layer."""
        start = self._file.seek(0, os.SEEK_END)
        for part in _sample(array):
            self._file.write(_values(part))
        self._entries[path] = (tuple(array.shape), start, self._file.tell() - start)

    def fingerprint(self, config: T5Config) -> str:
        """Returns what `fingerprint` would of all arrays."""
        digest = _begin(config)
        for path in flatten(unflatten(dict.fromkeys(self._entries))):
            shape, start, count = self._entries[path]
            digest.update(_title(path, shape))
            self._file.seek(start)
            digest.update(self._file.read(count))
        return f"sha256:{digest.hexdigest()}"


def _begin(config: T5Config) -> Any:
    # Fields at their default are left out, so that a new field leaves old fingerprints alone.
    fields = {
        field.name: value
        for field in dataclasses.fields(config)
        if field.name not in RUN_FIELDS and (value := getattr(config, field.name)) != field.default
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode())


def _title(path: str, shape: tuple[int, ...]) -> bytes:
    return f"\n{path} {list(shape)}\n".encode()


def _values(part: Any) -> memoryview:
    return np.ascontiguousarray(part, dtype="<f4").data


def _sample(array: Any) -> list[Any]:
    """Returns the pieces of an array that its fingerprint covers."""
    flat = array.reshape(-1)
    if flat.size <= LARGE:
        return [flat]
    stride = flat.size // SAMPLE
    # A stride that shares a factor with the row length would visit the same few columns only.
    while math.gcd(stride, array.shape[-1]) > 1:
        stride += 1
    return [flat[:BLOCK], flat[::stride], flat[-BLOCK:]]
