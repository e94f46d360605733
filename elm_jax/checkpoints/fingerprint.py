"""The name of a backbone's contents, by which an expert knows the backbone it was trained on."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

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
    arrays = flatten(to_storage(params, config))
    with Fingerprint(config, arrays) as found:
        for path, array in arrays.items():
            found.add(path, array, stays=True)
        return str(found)


class Fingerprint:
    """A fingerprint of arrays that come in any order.

    Those before their turn wait: themselves, where they stay in memory anyhow, else what counts of
    them, in a temporary file.

    Args:
      config: the backbone's.
      paths: of all arrays, per layer.
    """

    def __init__(self, config: T5Config, paths: Iterable[str]) -> None:
        self._digest = _begin(config)
        self._left = collections.deque(flatten(unflatten(dict.fromkeys(paths))))
        self._waiting: dict[str, _Sample] = {}
        self._file = tempfile.TemporaryFile(prefix="elm_jax_fingerprint_")  # noqa: SIM115

    def __enter__(self) -> Fingerprint:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, path: str, array: Any, *, stays: bool) -> None:
        """Takes in an array as stored, under its path per layer.

        Args:
          path: one of the paths, each of which comes once.
          array: its values.
          stays: whether it stays in memory, with these values, until all have come.
        """
        shape = tuple(array.shape)
        if stays or path == self._left[0]:
            self._waiting[path] = _Sample(shape, array)
        else:
            start = self._file.seek(0, os.SEEK_END)
            for part in _sample(array):
                self._file.write(_values(part))
            self._waiting[path] = _Sample(shape, None, start, self._file.tell() - start)
        while self._left and self._left[0] in self._waiting:
            path = self._left.popleft()
            self._update(path, self._waiting.pop(path))

    def _update(self, path: str, sample: _Sample) -> None:
        self._digest.update(f"\n{path} {list(sample.shape)}\n".encode())
        if sample.array is None:
            self._file.seek(sample.start)
            self._digest.update(self._file.read(sample.nbytes))
            return
        for part in _sample(sample.array):
            self._digest.update(_values(part))

    def __str__(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"


class _Sample(NamedTuple):
    """An array whose turn has not come, or where in the file lies what counts of it."""

    shape: tuple[int, ...]
    array: Any
    start: int = 0
    nbytes: int = 0


def _begin(config: T5Config) -> Any:
    # Fields at their default are left out, so that a new field leaves old fingerprints alone.
    fields = {
        field.name: value
        for field in dataclasses.fields(config)
        if field.name not in RUN_FIELDS and (value := getattr(config, field.name)) != field.default
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode())


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
